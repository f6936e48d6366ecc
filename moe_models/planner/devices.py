"""What a GPU and its links reach: ``devices.json``, overridden by what was measured (``docs/calibration.md``).

Units: GB is 10^9 bytes, GiB is 2^30 bytes. ``sent`` is what one rank puts on the wire in one call (``traffic.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_models.errors import Problems, UserError, show
from moe_models.files import read_json

DEVICES_FILE = Path(__file__).with_name("devices.json")
GIB = 2**30
"""Bytes of one GiB."""

Pairs = tuple[tuple[float, float], ...]
"""``(x, y)`` in ascending x."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """Speed of one kind of collective: bandwidth and latency, or the GB/s reached at several sizes."""

    gb_per_s: float
    """At large sizes."""
    latency_us: float = 0.0
    """Of one call; part of the figures in ``pairs``."""
    pairs: Pairs = ()
    """(bytes sent, GB/s reached); empty for bandwidth and latency alone."""

    def seconds(self, sent: float, calls: int = 1) -> float:
        """Time of ``calls`` equal calls that send ``sent`` bytes together."""
        if sent <= 0:
            return 0.0
        calls = max(1, calls)
        if not self.pairs:
            latency = calls * self.latency_us / 1e6
            return latency + sent / self.gb_per_s / 1e9

        # Between two measured sizes the time of a call is interpolated; above the last one its GB/s holds.
        sent_by_one = sent / calls
        largest, speed_at_largest = self.pairs[-1]
        if sent_by_one > largest:
            return calls * (sent_by_one / speed_at_largest / 1e9)
        times = tuple((size, size / speed / 1e9) for size, speed in self.pairs)
        return calls * interpolate(times, sent_by_one)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of GPU in its node."""

    name: str
    matmul_tflops: float
    """10^12 floating point operations a second of a large bf16 matrix product."""
    memory_gb_per_s: float
    """Read plus written, of a large element-wise kernel."""
    usable_gib: float
    """Memory that torch can use on an empty GPU."""
    reserved_gib: float
    """Memory in use that torch's allocator does not count: CUDA context, kernels, NCCL's buffers."""
    host_link_gb_per_s: float
    """Between pinned host memory and one GPU, all of the node copying."""
    host_adam_gparams_per_s: float
    """10^9 parameters a second that one rank's share of the CPU updates."""
    node: Mapping[str, Link]
    """``all_to_all``, ``all_reduce`` and, where it differs from that, ``all_gather`` inside a node."""
    network: Mapping[str, Link]
    """The same between nodes, for groups with one GPU in each node, all groups at once."""
    grouped_matmul_efficiency: Pairs = ()
    """(rows of one expert, share of matmul_tflops); empty: by the model of ``step_time.py``."""
    measured: tuple[str, ...] = ()
    """The ``measured`` lines of the calibrations in it."""


def interpolate(pairs: Pairs, x: float) -> float:
    """y at ``x``, linear between pairs, constant outside."""
    if x <= pairs[0][0]:
        return pairs[0][1]
    for (x0, y0), (x1, y1) in pairwise(pairs):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return pairs[-1][1]


def _read_devices_file() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(DEVICES_FILE.read_text(encoding="utf-8"))
    return data


def device_names() -> list[str]:
    """Names that ``read_device`` takes."""
    return sorted(_read_devices_file()["devices"])


def link_gb_per_s(gpu: str) -> float | None:
    """What the links of a GPU, by the name that the driver gives it, carry in one direction; None where unknown."""
    if "PCI" in gpu.upper():  # no NVLink
        return None
    for device in _read_devices_file()["devices"].values():
        model = device["name"].split()[1]  # H200 of "NVIDIA H200 SXM5 141 GB"
        if re.search(rf"\b{model}\b", gpu):
            return float(device["link_gb_per_s"]["value"])
    return None


def read_device(name: str, calibrations: Iterable[str | Path] = ()) -> Device:
    """The device ``name`` with measured figures instead of its own; a later file wins, key by key.

    Raises UserError for an unknown name and for everything wrong in the files.
    """
    data = _read_devices_file()
    if name not in data["devices"]:
        raise UserError(f"--device {name}: unknown; one of {', '.join(sorted(data['devices']))}")

    # 1. The row of devices.json. Devices of one generation share the figures of their host and of their network.
    row = dict(data["devices"][name])
    host = data["links"][row.pop("host")["$like"]]
    network = data["links"][row.pop("network")["$like"]]
    row.update(host)
    numbers: dict[str, Any] = {key: float(row[key]["value"]) for key in _NUMBERS}
    device = Device(
        name=row["name"],
        node={kind: Link(**figure["value"]) for kind, figure in row["node"].items()},
        network={kind: Link(**figure["value"]) for kind, figure in network.items()},
        **numbers,
    )

    # 2. What was measured replaces it.
    problems = Problems()
    for path in calibrations:
        with problems.note():
            device = _calibrated(device, Path(path))
    problems.refuse()
    return device


_NUMBERS = (
    "matmul_tflops",
    "memory_gb_per_s",
    "usable_gib",
    "reserved_gib",
    "host_link_gb_per_s",
    "host_adam_gparams_per_s",
)
"""Keys that hold one number above 0: fields of :class:`Device`."""
_FABRICS = ("node", "network")
_COLLECTIVES = ("all_to_all", "all_reduce", "all_gather")


def _calibrated(device: Device, path: Path) -> Device:
    """The device with the figures of one calibration file (``docs/calibration.md``)."""
    raw = read_json(path)
    allowed = ("measured", "grouped_matmul_efficiency", *_NUMBERS, *_FABRICS)
    changed: dict[str, Any] = {}
    problems = Problems()
    if not isinstance(raw.get("measured"), str):
        problems.add(f"measured = {show(raw.get('measured'))}: must say in one line when, where and how")
    for key, value in raw.items():
        if key not in allowed:
            problems.add(f"{key} = {show(value)}: unknown key; allowed: {', '.join(allowed)}")
        elif key in _NUMBERS:
            if _positive(value):
                changed[key] = float(value)
            else:
                problems.add(f"{key} = {show(value)}: must be a number above 0; remove the key if not measured")
        elif key == "grouped_matmul_efficiency":
            pairs = _efficiency(value)
            if pairs is None:
                problems.add(f"{key} = {show(value)}: must be a share of at most 1, or ascending [rows, share] pairs")
            else:
                changed[key] = pairs
        elif key in _FABRICS:
            measured = _links(key, value, problems)
            changed[key] = {**getattr(device, key), **measured}
    Problems(f"{path}: {line}" for line in problems.lines).refuse()
    return replace(device, **changed, measured=(*device.measured, raw["measured"]))


def _efficiency(value: object) -> Pairs | None:
    """(rows, share) pairs; one number holds for all rows. None if it is neither."""
    pairs = _pairs([[1, value]]) if _positive(value) else _pairs(value)
    if pairs is None or max(share for _, share in pairs) > 1:
        return None
    return pairs


def _links(fabric: str, value: Any, problems: Problems) -> dict[str, Link]:
    """The collectives of one fabric, those with problems left out."""
    if not isinstance(value, dict):
        problems.add(f"{fabric} = {show(value)}: must be an object with {', '.join(_COLLECTIVES)}")
        return {}
    links = {}
    for kind, figure in value.items():
        where = f"{fabric}.{kind} = {show(figure)}"
        pairs = _pairs(figure)
        if kind not in _COLLECTIVES:
            problems.add(f"{where}: unknown key; allowed: {', '.join(_COLLECTIVES)}")
        elif pairs is not None:
            _, speed_at_largest = pairs[-1]
            links[kind] = Link(gb_per_s=speed_at_largest, pairs=pairs)
        elif _is_speed_and_latency(figure):
            links[kind] = Link(**figure)
        else:
            problems.add(f'{where}: must be {{"gb_per_s": , "latency_us": }} or ascending [bytes sent, GB/s] pairs')
    return links


def _is_speed_and_latency(figure: object) -> bool:
    if not isinstance(figure, dict) or set(figure) != {"gb_per_s", "latency_us"}:
        return False
    return all(_positive(number) for number in figure.values())


def _positive(value: object) -> bool:
    """Whether a value of the JSON is a finite number above 0; ``true`` is none."""
    return type(value) in (int, float) and 0 < value < float("inf")  # type: ignore[operator]


def _pairs(value: object) -> Pairs | None:
    """A list of [x, y] with positive numbers and ascending x, or None."""
    if not isinstance(value, list) or not value:
        return None
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_positive, pair)):
            return None
    xs = [x for x, _ in value]
    if xs != sorted(set(xs)):
        return None
    return tuple((float(x), float(y)) for x, y in value)
