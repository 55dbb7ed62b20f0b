"""The fingerprint of a tensor, and the sample of an element."""

import numpy
import pytest
import torch

from qwlit.run.kept_tensors import compare_kept, sample_at
from qwlit.training.observed_step import fingerprint


def in_python(numbers: list[int]) -> int:
    """The fingerprint of 32-bit integers, computed without torch."""

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    total = 0
    for place, number in enumerate(numbers):
        mixed = signed(place * 0x1E3779B97F4A7C15)
        total += number * ((mixed ^ (mixed >> 29)) | 1)
    return signed(total)


def test_a_fingerprint_is_what_plain_integers_give():
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert fingerprint(tensor) == in_python(tensor.view(torch.int32).tolist())
    assert fingerprint(tensor.view(10, 100).T.contiguous().T) == fingerprint(tensor)
    assert fingerprint(torch.tensor(2.0)) == in_python([0x40000000])
    assert fingerprint(torch.empty(0)) == 0


def test_a_fingerprint_changes_with_one_bit_of_any_element_and_with_the_order():
    for kind in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        tensor = torch.arange(1, 200).to(kind)
        found = {fingerprint(tensor), fingerprint(tensor.flip(0))}
        for place in range(len(tensor)):
            other = tensor.clone()
            other.view(torch.uint8)[place * tensor.element_size()] ^= 1
            found.add(fingerprint(other))
        assert len(found) == 2 + len(tensor)


def test_a_fingerprint_tells_0_from_its_negative_and_nan_from_nan():
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    one = torch.tensor([0x7FC00000], dtype=torch.int32).view(torch.float32)
    other = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert one.isnan() and other.isnan() and fingerprint(one) != fingerprint(other)


def test_an_element_belongs_to_a_token_of_a_sample():
    packed = {"shape": [1, 7], "lengths": [3, 4], "labels": torch.tensor([1, 4, 6]), "samples": ["a:1", "b:2"]}
    assert sample_at(packed, torch.Size([1, 7, 8]), (0, 2, 5)) == ("a:1", 2)
    assert sample_at(packed, torch.Size([1, 7, 8]), (0, 3, 5)) == ("b:2", 0)
    assert sample_at(packed, torch.Size([3, 8]), (2, 0)) == ("b:2", 3)
    padded = packed | {"shape": [2, 5], "lengths": None}
    assert sample_at(padded, torch.Size([2, 5]), (1, 4)) == ("b:2", 4)
    assert sample_at(padded, torch.Size([3, 8]), (1, 0)) == ("a:1", 4)
    # Loss, rotary tables of another shape, and weights belong to no token.
    for shape, index in ((torch.Size([]), ()), (torch.Size([9, 9]), (0, 0))):
        assert sample_at(packed, shape, index) == (None, None)
    assert sample_at({}, torch.Size([1, 7]), (0, 0)) == (None, None)


def kept(folder, tensor):
    torch.save({"key": [5, 0, "forward", "loss", 0], "tensor": tensor}, folder)
    return folder


def test_the_largest_difference_is_that_of_numpy(tmp_path):
    one = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other[2, 1, 3] += 0.5
    other[0, 0, 0] -= 0.25
    size = compare_kept([kept(tmp_path / "a", one), kept(tmp_path / "b", other)])
    expected = numpy.abs(one.numpy() - other.numpy())
    assert size.index == numpy.unravel_index(expected.argmax(), expected.shape) == (2, 1, 3)
    assert size.largest == pytest.approx(expected.max()) and (size.elements, size.of) == (2, 60)
    assert size.relative == pytest.approx(expected.max() / numpy.abs(one.numpy()).max())


def test_a_number_without_dimensions_nan_and_another_shape_are_compared_too(tmp_path):
    pair = [kept(tmp_path / "a", torch.tensor(2.0)), kept(tmp_path / "b", torch.tensor(3.0))]
    size = compare_kept(pair)
    assert (size.index, size.largest, size.relative, size.values) == ((), 1.0, 0.5, (2.0, 3.0))
    kept(tmp_path / "b", torch.tensor([1.0, float("nan")]))
    assert compare_kept(pair) == "shape () against (2,)"
    kept(tmp_path / "a", torch.tensor([1.0, 2.0]))
    assert compare_kept(pair).index == (1,) and compare_kept(pair).largest == float("inf")
    assert "does not repeat" in compare_kept([tmp_path / "none", tmp_path / "b"])
