"""The writer of Hugging Face folders by itself: what it was given, whole, or an error and nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_models.checkpoint.hf_folder import ExportError, HFFolderWriter
from moe_models.files import parse_size
from tests.checkpoint.test_export_faults import leftovers
from tests.support.roundtrip import load_tensors

# Two experts and a norm; the shard limit makes three shards of them.
NAMES = {"model.norm.weight": (4,), "experts.0.w1.weight": (3, 4), "experts.1.w1.weight": (3, 4)}


def make_writer(folder: Path) -> HFFolderWriter:
    import torch

    return HFFolderWriter(folder, {name: (shape, torch.float32) for name, shape in NAMES.items()}, max_shard_bytes=50)


def complete(writer: HFFolderWriter) -> None:
    for name, tensor in good_tensors().items():
        writer.add(name, tensor)
    writer.close_weights()
    (writer.staging / "config.json").write_text("{}")
    writer.finish()


def good_tensors() -> dict[str, Any]:
    import torch

    return {
        name: torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) for name, shape in NAMES.items()
    }


def test_writer_writes_what_it_was_given(tmp_path: Path) -> None:
    import torch

    writer = make_writer(tmp_path / "out")
    tensors = good_tensors()
    for name, tensor in tensors.items():
        writer.add(name, tensor.t().contiguous().t())  # strides must not matter
    writer.close_weights()
    writer.finish()
    assert {k: v.tolist() for k, v in load_tensors(tmp_path / "out").items()} == {
        k: v.tolist() for k, v in tensors.items()
    }
    (tmp_path / "plain").touch()
    modes = [file.stat().st_mode for file in (tmp_path / "out").glob("*.safetensors")]
    assert modes == [(tmp_path / "plain").stat().st_mode] * 3, "readable for whom any other file is"
    assert leftovers(tmp_path / "out") == []
    assert all(t.dtype == torch.float32 for t in tensors.values())


def spoil(name: str, change: Callable[[Any], Any]) -> Callable[[HFFolderWriter], None]:
    def apply(writer: HFFolderWriter) -> None:
        for key, tensor in good_tensors().items():
            writer.add(key, change(tensor) if key == name else tensor)

    return apply


def with_nan(tensor: Any) -> Any:
    tensor[1, 2] = float("nan")
    return tensor


def with_inf(tensor: Any) -> Any:
    tensor[0, 0] = float("-inf")
    return tensor


def withhold(writer: HFFolderWriter) -> None:
    for name, tensor in good_tensors().items():
        if name != "experts.1.w1.weight":
            writer.add(name, tensor)
    writer.close_weights()


def twice(writer: HFFolderWriter) -> None:
    for name, tensor in [*good_tensors().items(), *good_tensors().items()]:
        writer.add(name, tensor)


def unknown(writer: HFFolderWriter) -> None:
    writer.add("experts.2.w1.weight", good_tensors()["experts.0.w1.weight"])


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (withhold, r"1 of 3 tensors are missing: experts\.1\.w1\.weight"),
        (twice, r"model\.norm\.weight: arrived twice"),
        (unknown, r"experts\.2\.w1\.weight: not a tensor of this model"),
        (spoil("experts.1.w1.weight", lambda t: t.t()), r"experts\.1\.w1\.weight: has shape \[4, 3\], expected \[3"),
        (spoil("experts.1.w1.weight", lambda t: t[:2]), r"experts\.1\.w1\.weight: has shape \[2, 4\], expected \[3"),
        (spoil("experts.0.w1.weight", lambda t: t.bfloat16()), r"experts\.0\.w1\.weight: is torch\.bfloat16, expected"),
        (spoil("experts.1.w1.weight", with_nan), r"experts\.1\.w1\.weight: 1 of 12 values are NaN or infinite"),
        (spoil("experts.0.w1.weight", with_inf), r"experts\.0\.w1\.weight: 1 of 12 values are NaN or infinite"),
    ],
    ids=["withheld", "twice", "unknown", "transposed", "short", "dtype", "nan", "inf"],
)  # fmt: skip
def test_writer_sees_a_wrong_tensor(fault: Callable[[HFFolderWriter], None], words: str, tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "out")
    with pytest.raises(ExportError, match=words):
        fault(writer)
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_slices_do_not_keep_the_gathered_tensor_alive(tmp_path: Path) -> None:
    import torch

    writer = make_writer(tmp_path / "out")
    stacked = torch.zeros(100, 3, 4)
    gathered = weakref.ref(stacked.untyped_storage())
    writer.add("experts.0.w1.weight", stacked[7])
    del stacked
    assert gathered() is None
    writer.discard()


@pytest.mark.parametrize("foreign", ["train.py", "optimizer.pt", "pytorch_model.bin", "runs/events", "global_step5/x"])
def test_foreign_folders_are_refused(foreign: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / foreign).parent.mkdir(parents=True)
    (out / foreign).write_text("mine")
    (out / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="is not empty and is not an earlier export"):
        make_writer(out)
    assert leftovers(out) == []
    assert (out / foreign).read_text() == "mine"


def test_a_file_is_refused_and_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ExportError, match="is a file"):
        make_writer(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    writer = make_writer(tmp_path / "empty")
    complete(writer)
    assert len(load_tensors(tmp_path / "empty")) == 3


def test_two_exports_into_one_folder(tmp_path: Path) -> None:
    first = make_writer(tmp_path / "out")
    with pytest.raises(ExportError, match="another export is writing there"):
        make_writer(tmp_path / "out")
    complete(first)
    assert len(load_tensors(tmp_path / "out")) == 3
    make_writer(tmp_path / "out").discard()  # the lock is gone with the first


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for _ in range(2):
        complete(make_writer(tmp_path / "out"))
    assert (tmp_path / "out").is_symlink()
    assert len(load_tensors(tmp_path / "disk" / "out")) == 3
    assert leftovers(tmp_path / "disk" / "out") == leftovers(tmp_path / "out") == []


def test_an_export_with_a_selection_bias_is_an_export(tmp_path: Path) -> None:
    from moe_models.routing.callback import BIAS_FILE

    complete(make_writer(tmp_path / "out"))
    (tmp_path / "out" / BIAS_FILE).write_text("the trainer puts it beside models that have no place for it")
    complete(make_writer(tmp_path / "out"))
    assert not (tmp_path / "out" / BIAS_FILE).exists()


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500 mb", "2GiB", "1.5KB")] == [5 * 10**9, 5 * 10**8, 2**31, 1500]
    assert parse_size("5") == 5
    for text in ("", "GB", "-5GB", "0GB", "5XB", "5TB"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_value_is_seen_wherever_it_is(dtype: str, bad: float) -> None:
    """The check takes extremes; a vectorised loop might lose a NaN at its start, its end or between."""
    import torch

    from moe_models.checkpoint.hf_folder import _is_finite

    for count in (1, 7, 64, 1001):
        values = torch.arange(count).to(getattr(torch, dtype)) / count
        assert _is_finite(values)
        for place in {0, count // 3, count - 1}:
            spoiled = values.clone()
            spoiled[place] = bad
            assert not _is_finite(spoiled), (count, place)
    assert _is_finite(torch.empty(0))
