"""The head against F.cross_entropy on full logits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.live_bytes import LiveBytes
from qwlit.model import head
from qwlit.model.head import LMHead, linear_cross_entropy

N, D, V = 37, 24, 101


def inputs(
    num_rows: int = N, width: int = D, vocab: int = V, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (num_rows,), generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 5 * 4 * V)
        monkeypatch.setitem(head.BLOCK_BYTES, "cpu", 2 * 4 * V)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_loss_and_gradients_equal_cross_entropy_on_full_logits(dtype: torch.dtype, limit: float) -> None:
    hidden, weight, targets = inputs(dtype=dtype)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    theirs = torch.autograd.grad(expected * 0.37, (hidden, weight))
    loss_sum, num_correct = linear_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad(loss_sum * 0.37, (hidden, weight))
    assert difference(loss_sum, expected) < limit
    assert all(difference(a, b) < limit for a, b in zip(ours, theirs, strict=True))
    assert num_correct.item() == 0


def test_a_second_backward_is_an_error_rather_than_scaled_twice() -> None:
    hidden, weight, targets = inputs()
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    loss_sum.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_sum.backward()


def test_at_qwens_vocabulary_gradients_equal_cross_entropy() -> None:
    hidden, weight, targets = inputs(num_rows=500, width=8, vocab=151_936)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, weight))
    loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad(loss_sum, (hidden, weight))
    assert len(head._chunks(500, 151_936, "cpu")) == 2
    assert difference(loss_sum, expected) < 1e-6
    assert all(difference(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_a_sure_model_in_bf16_still_gets_a_gradient_at_its_target() -> None:
    hidden, weight, _ = inputs(num_rows=1, width=2, vocab=3)
    targets = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        weight.copy_(torch.tensor([[7.5, 0], [0, 0], [0, 1]]))  # probability 0.9989, which bf16 rounds to 1
        hidden.copy_(torch.tensor([[1.0, 0]]))
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    assert difference(torch.autograd.grad(loss_sum, weight)[0], expected) < 1e-2


def test_correct_predictions_are_counted_when_asked() -> None:
    hidden, weight, targets = inputs()
    predicted = (hidden @ weight.T).argmax(dim=-1)
    targets[:20] = predicted[:20]
    with torch.no_grad():
        loss_sum, num_correct = linear_cross_entropy(hidden, weight, targets, count_correct=True)
    assert num_correct.item() == (predicted == targets).sum().item() >= 20
    assert not loss_sum.requires_grad and not num_correct.requires_grad


def test_zero_rows_give_a_zero_that_reaches_every_parameter() -> None:
    hidden, weight, targets = inputs(num_rows=0)
    loss_sum, num_correct = linear_cross_entropy(hidden, weight, targets, count_correct=True)
    assert (loss_sum.item(), num_correct.item()) == (0.0, 0)
    grad_hidden, grad_weight = torch.autograd.grad(loss_sum, (hidden, weight))
    assert grad_hidden.shape == (0, D)
    assert torch.equal(grad_weight, torch.zeros(V, D))


def test_a_frozen_weight_gets_no_gradient_and_costs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the weight's gradient was computed")

    monkeypatch.setattr(head, "_add_product", never)
    hidden, weight, targets = inputs()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = inputs()
    monkeypatch.setattr(torch, "exp", lambda *_, **__: pytest.fail("the gradient was computed"))
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets)


def test_under_bf16_autocast_products_are_bf16_and_sums_float32() -> None:
    hidden, weight, targets = inputs(num_rows=64)
    expected = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), targets, reduction="sum")
    theirs = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    ours = torch.autograd.grad(loss_sum, (hidden, weight))
    assert loss_sum.dtype == torch.float32
    assert difference(loss_sum, expected) < 1e-6
    assert [g.dtype for g in ours] == [torch.float32, torch.float32]
    # bf16 keeps 8 bits, so that each rounding is worth up to 0.4 %.
    assert all(difference(a, b) < 4e-3 for a, b in zip(ours, theirs, strict=True))


def test_chunks_cover_all_rows_evenly_within_the_limit() -> None:
    for num_rows in (0, 1, 2208, 2209, 10_000):
        chunks = head._chunks(num_rows, 151_936, "cuda")
        sizes = [end - start for start, end in chunks]
        assert sum(sizes) == num_rows
        assert not sizes or (max(sizes) - min(sizes) <= 1 and max(sizes) <= 2208)


def test_memory_kept_from_call_to_call_is_not_shared_by_threads_and_survives_inference_mode() -> None:
    with torch.inference_mode():
        linear_cross_entropy(*inputs(num_rows=20))
    batches = [inputs(num_rows=rows) for rows in (3, 11, 7)]
    expected = [F.cross_entropy(h @ w.T, t, reduction="sum").item() for h, w, t in batches]

    def losses(number: int) -> set[float]:
        return {linear_cross_entropy(*batches[number])[0].item() for _ in range(100)}

    with ThreadPoolExecutor(3) as pool:
        for found, value in zip(pool.map(losses, range(3)), expected, strict=True):
            assert max(abs(loss / value - 1) for loss in found) < 1e-6


def test_a_head_gathered_in_bfloat16_gets_the_gradient_of_a_float32_weight() -> None:
    """FSDP2 gathers the weight in bfloat16; its gradient must not be rounded to it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=generator)
    hidden, targets = torch.randn(30, 16, generator=generator), torch.randint(0, 50, (30,), generator=generator)
    gradients: list[Tensor] = []
    for dtype in (torch.float32, torch.bfloat16):
        own = LMHead.of(torch.nn.Linear(16, 50, bias=False))
        own.weight = torch.nn.Parameter(weight.to(dtype))
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = own.loss(hidden, targets, count_correct=False)
        (loss / 3).backward()
        assert own.weight.grad is not None
        gradients.append(own.weight.grad)
    assert gradients[1].dtype == torch.float32 and torch.equal(*gradients)


def test_on_cuda_a_chunks_weight_gradient_is_added_in_pieces_of_limited_size() -> None:
    """Fake tensors: a machine without CUDA has their shapes and sizes, but no numbers."""
    hidden, width, vocab = 4096, 4096, 151_936
    with FakeTensorMode(), LiveBytes() as live:
        total = torch.empty(vocab, width, device="cuda")
        left = torch.empty(hidden, vocab, dtype=torch.bfloat16, device="cuda").T
        right = torch.empty(hidden, width, dtype=torch.bfloat16, device="cuda")
        live.most = before = live.now
        result = head._add_product(total, left, right, torch.float32)
    assert result is total
    assert live.most - before <= 2 * head.PRODUCT_BYTES
    assert sum(len(piece) for piece in total.split(head.product_rows(width))) == vocab


def test_pieces_of_a_product_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    total, left, right = torch.randn(V, D), torch.randn(N, V).T, torch.randn(N, D)
    expected = total + left @ right

    class OnCuda(Tensor):
        """A tensor of this machine that says it is on CUDA, and has the product that only CUDA has."""

        is_cuda = True

    def mm(one: Tensor, two: Tensor, out_dtype: torch.dtype) -> Tensor:
        return one.as_subclass(Tensor).to(out_dtype) @ two.to(out_dtype)

    monkeypatch.setattr(head, "PRODUCT_BYTES", 4 * D * 10)
    monkeypatch.setattr(torch, "mm", mm)
    found = head._add_product(total.double(), left.as_subclass(OnCuda), right, torch.float64)
    assert difference(found, expected) < 1e-6
