from pathlib import Path

import pytest
import torch

from qwlit.training.checkpointing.shards import ShardReader, write_shard

TENSORS = {"a": torch.arange(20.0).view(10, 2), "b": torch.arange(3.0), "n": torch.tensor(7.0)}


def cut(tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """What FSDP2 gives a rank: torch.chunk's rows, or none."""
    if tensor.ndim == 0:
        return tensor
    chunks = tensor.chunk(count)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


@pytest.fixture(params=[1, 2, 3, 4, 7])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for rank in range(request.param):
        held = {name: cut(tensor, rank, request.param) for name, tensor in TENSORS.items()}
        write_shard(tmp_path, "model", held, rank=rank, count=request.param)
    write_shard(tmp_path, "optimizer", {"x": torch.zeros(2)}, rank=0, count=1)
    return tmp_path


def test_what_any_number_of_ranks_has_written_is_read_whole_or_by_rows(folder: Path) -> None:
    with ShardReader(folder, "model") as reader:
        assert sorted(reader.names()) == ["a", "b", "n"]
        for name, tensor in TENSORS.items():
            assert torch.equal(reader.read(name), tensor)
        for first in range(11):
            for end in range(first, 11):
                assert torch.equal(reader.read_slice("a", first, end), TENSORS["a"][first:end])


def test_a_missing_file_is_told(folder: Path) -> None:
    files = sorted(folder.glob("model*"))
    files[-1].unlink()
    with pytest.raises(FileNotFoundError, match="model"):
        ShardReader(folder, "model")
