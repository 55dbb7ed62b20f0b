import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwlit.training.checkpointing.manifest import shard_files
from qwlit.training.checkpointing.shards import DTYPE_NAMES, ShardReader, safetensors_pieces, write_file

TENSORS = {"a": torch.arange(20.0).view(10, 2), "b": torch.arange(3.0), "n": torch.tensor(7.0)}


def cut(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """What FSDP2 gives a rank: torch.chunk's rows, or none."""
    if tensor.ndim == 0:
        return tensor
    chunks = tensor.chunk(count)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


@pytest.fixture(params=[1, 2, 3, 4, 7])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> list[Path]:
    files = [tmp_path / name for name in shard_files("model", request.param)]
    for rank, file in enumerate(files):
        held = {name: cut(tensor, rank, request.param) for name, tensor in TENSORS.items()}
        entry = write_file(file, safetensors_pieces(held))
        content = file.read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return files


def test_what_any_number_of_ranks_has_written_is_read_whole_or_by_rows(files: list[Path]) -> None:
    with ShardReader(files) as reader:
        assert sorted(reader.names()) == ["a", "b", "n"]
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name), tensor)
        for first in range(11):
            for end in range(first, 11):
                assert torch.equal(reader.read_slice("a", first, end), TENSORS["a"][first:end])


def test_a_missing_file_is_told(files: list[Path]) -> None:
    files[-1].unlink()
    with pytest.raises(FileNotFoundError, match="model"):
        ShardReader(files)


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_the_safetensors_library_reads_every_dtype_and_shape_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    drawn = torch.randint(0, 2, (5, 3)).to(dtype)
    tensors = {
        "whole": drawn,
        "turned": drawn.t(),
        "scalar": drawn[0, 0],
        "empty": drawn[:0],
        "bytes": torch.ones(3, dtype=torch.uint8),
    }
    write_file(tmp_path / "a.safetensors", safetensors_pieces(tensors))
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())
