"""devices.json and calibration files: figures, interpolation, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_models.errors import UserError
from moe_models.planner.devices import DEVICES_FILE, Link, device_names, interpolate, link_gb_per_s, read_device

PAGE = Path(__file__).parents[2] / "docs" / "calibration.md"


def calibration(folder: Path, **figures: Any) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"measured": "today", **figures}))
    return path


def test_every_figure_has_a_source() -> None:
    def figures(node: Any) -> Any:
        if isinstance(node, dict) and "value" in node:
            yield node
        elif isinstance(node, dict):
            for item in node.values():
                yield from figures(item)

    found = list(figures(json.loads(DEVICES_FILE.read_text())))
    assert len(found) > 20
    assert all(set(figure) == {"value", "source"} and len(figure["source"]) > 10 for figure in found)
    assert {"a100-80g", "h100-80g", "h200"} <= set(device_names())
    for name in device_names():
        assert read_device(name).network["all_reduce"].gb_per_s < read_device(name).node["all_reduce"].gb_per_s


def test_the_page_s_example_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), flags=re.S)
    path = tmp_path / "calibration.json"
    path.write_text(example)
    device = read_device("h200", [path])
    plain = read_device("h200")
    assert device.measured[0].startswith("2026-11-22")
    assert device.grouped_matmul_efficiency[0] == (128, 0.30)
    assert device.node["all_to_all"].pairs[-1] == (268435456, 330.0)
    assert device.memory_gb_per_s == 4200 != plain.memory_gb_per_s
    assert set(json.loads(example)) <= set(re.findall(r"^\| `(\w+)`", PAGE.read_text(), flags=re.M))


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    one = calibration(tmp_path, matmul_tflops=700, node={"all_reduce": {"gb_per_s": 100, "latency_us": 5}})
    two = calibration(tmp_path, matmul_tflops=710, grouped_matmul_efficiency=0.5)
    device = read_device("h100-80g", [one, two])
    assert (device.matmul_tflops, device.node["all_reduce"].gb_per_s) == (710, 100)
    assert device.node["all_to_all"] == read_device("h100-80g").node["all_to_all"]
    assert interpolate(device.grouped_matmul_efficiency, 5000) == 0.5
    assert device.measured == ("today", "today")


def test_seconds() -> None:
    plain = Link(gb_per_s=100, latency_us=50)
    assert plain.seconds(1e9, 10) == pytest.approx(10 * 50e-6 + 0.01)
    curve = Link(gb_per_s=100, pairs=((1e6, 10), (1e7, 50), (1e8, 100)))
    assert curve.seconds(1e6) == pytest.approx(1e6 / 10e9)
    assert curve.seconds(5.5e6) == pytest.approx((1e6 / 10e9 + 1e7 / 50e9) / 2)
    assert curve.seconds(1e9) == pytest.approx(1e9 / 100e9)
    assert curve.seconds(1e5) == curve.seconds(1e6)
    assert curve.seconds(2e7, 2) == pytest.approx(2 * 1e7 / 50e9)
    assert plain.seconds(0) == 0.0


@pytest.mark.parametrize(
    ("figures", "line"),
    [
        ({"matmul": 3}, "matmul = 3: unknown key; allowed: measured, grouped_matmul_efficiency, matmul_tflops"),
        ({"matmul_tflops": -1}, "matmul_tflops = -1: must be a number above 0"),
        ({"matmul_tflops": True}, "matmul_tflops = true: must be a number above 0"),
        ({"grouped_matmul_efficiency": 1.2}, "grouped_matmul_efficiency = 1.2: must be a share of at most 1"),
        ({"grouped_matmul_efficiency": [[2, 0.5], [1, 0.4]]}, "must be a share of at most 1, or ascending"),
        ({"node": 5}, "node = 5: must be an object"),
        ({"node": {"broadcast": 5}}, "node.broadcast = 5: unknown key; allowed: all_to_all, all_reduce, all_gather"),
        ({"network": {"all_reduce": {"gb_per_s": 5}}}, 'must be {"gb_per_s": , "latency_us": } or ascending'),
        ({"measured": 3}, "measured = 3: must say in one line when, where and how"),
    ],
)
def test_refused(tmp_path: Path, figures: dict[str, Any], line: str) -> None:
    path = calibration(tmp_path, **figures)
    with pytest.raises(UserError) as caught:
        read_device("h200", [path])
    assert len(caught.value.problems) == 1
    assert line in caught.value.problems[0]
    assert caught.value.problems[0].startswith(str(path))


def test_unknown_device() -> None:
    with pytest.raises(UserError, match=r"--device h100: unknown; one of a100-40g, a100-80g, b200, h100-80g, h200"):
        read_device("h100")


def test_links_of_the_names_that_drivers_give() -> None:
    """As torch.cuda.get_device_name says them."""
    names = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA L40S", "cpu")
    assert [link_gb_per_s(name) for name in names] == [450, 300, 450, None, None, None]
