"""``checkpoint/shards.py``: the files are those of safetensors, and several writers make them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_models.checkpoint.hf_folder import ExportError, HFFolderWriter, TensorWriter
from moe_models.checkpoint.shards import ShardFiles, plan_shards


def tensors() -> dict[str, torch.Tensor]:
    """Three dtypes, odd sizes, a scalar, an empty one, and names that sort in another order."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "model.norm.weight": random(7),
        "model.layers.10.w": random(3, 5),
        "model.layers.9.w": random(3, 5, dtype=torch.float16),
        "bias": random(11, dtype=torch.float32),
        'h\u00e4 "quoted"': random(2, 2),
        "scalar": random(dtype=torch.float32),
        "empty": torch.empty(0, 4, dtype=torch.bfloat16),
        "a": random(9, 3),
    }


def expected_of(given: dict[str, torch.Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in given.items()}


def test_a_file_is_that_of_save_file_byte_by_byte(tmp_path: Path) -> None:
    given = tensors()
    shards = plan_shards(expected_of(given), 10**9)
    assert [shard.file for shard in shards] == ["model.safetensors"]
    files = ShardFiles(tmp_path, shards, create=True)
    for name in reversed(given):  # in any order
        files.write(name, given[name])
    files.close()
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("limit", [1, 60, 100, 10**9])
def test_files_are_filled_in_order(limit: int) -> None:
    """As if tensors came one by one, and a file ended where the next one would make it too large."""
    given = tensors()
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in given.items():
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.nbytes
    shards = plan_shards(expected_of(given), limit)
    assert [set(shard.places) for shard in shards] == [set(group) for group in groups]
    assert all(shard.file.endswith(f"-of-{len(groups):05d}.safetensors") for shard in shards) or len(shards) == 1


def two_writers(folder: Path) -> tuple[HFFolderWriter, TensorWriter]:
    expected = expected_of(tensors())
    first = HFFolderWriter(folder, expected, 60)
    return first, TensorWriter(first.staging, expected, 60)


def test_two_writers_make_one_folder(tmp_path: Path) -> None:
    given = tensors()
    first, second = two_writers(tmp_path / "out")
    for index, (name, tensor) in enumerate(given.items()):
        (first, second)[index % 2].add(name, tensor)
    second.close()
    first.add_seen(second.seen)
    first.close_weights()
    first.finish()
    found: dict[str, Any] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        found.update(load_file(file))
    assert sorted(found) == sorted(given)
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_what_no_writer_or_two_have_written_is_refused(tmp_path: Path) -> None:
    given = tensors()
    first, second = two_writers(tmp_path / "out")
    for name, tensor in given.items():
        if name != "bias":
            first.add(name, tensor)
    with pytest.raises(ExportError, match="1 of 8 tensors are missing: bias"):
        first.close_weights()
    second.add("bias", given["bias"])
    second.add("a", given["a"])
    first.add_seen(second.seen)
    with pytest.raises(ExportError, match="a: arrived twice"):
        first.close_weights()
    second.close()
    first.discard()
    assert list(tmp_path.iterdir()) == []
