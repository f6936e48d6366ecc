"""What a GPU and its links reach: ``devices.json``, overridden by what was measured (``docs/calibration.md``).

Units: GB is 10^9 bytes, GiB is 2^30; ``sent`` is what one rank puts on the wire in one call (``traffic.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from moe_models.errors import UserError, show
from moe_models.files import read_json

DEVICES_FILE = Path(__file__).with_name("devices.json")

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
            return calls * self.latency_us / 1e6 + sent / self.gb_per_s / 1e9
        times = tuple((size, size / speed / 1e9) for size, speed in self.pairs)
        last, speed = self.pairs[-1]
        each = sent / calls
        return calls * (interpolate(times, each) if each <= last else each / speed / 1e9)


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


def device_names() -> list[str]:
    """Names that ``read_device`` takes."""
    return sorted(json.loads(DEVICES_FILE.read_text(encoding="utf-8"))["devices"])


def link_gb_per_s(gpu: str) -> float | None:
    """What the links of a GPU, by the name that the driver gives it, carry in one direction; None where unknown."""
    if "PCI" in gpu.upper():  # no NVLink
        return None
    for device in json.loads(DEVICES_FILE.read_text(encoding="utf-8"))["devices"].values():
        if re.search(rf"\b{device['name'].split()[1]}\b", gpu):
            return float(device["link_gb_per_s"]["value"])
    return None


def read_device(name: str, calibrations: Iterable[str | Path] = ()) -> Device:
    """The device ``name`` with measured figures in the place of its own; a later file wins, key by key.

    Raises UserError for an unknown name and for everything wrong in the files.
    """
    data = json.loads(DEVICES_FILE.read_text(encoding="utf-8"))
    if name not in data["devices"]:
        raise UserError(f"--device {name}: unknown; one of {', '.join(sorted(data['devices']))}")
    row = dict(data["devices"][name])
    row.update(data["links"][row.pop("host")["$like"]])
    network = data["links"][row.pop("network")["$like"]]
    numbers: dict[str, Any] = {key: float(figure["value"]) for key, figure in row.items() if key in _NUMBERS}
    device = Device(
        node={kind: Link(**figure["value"]) for kind, figure in row["node"].items()},
        network={kind: Link(**figure["value"]) for kind, figure in network.items()},
        name=row["name"],
        **numbers,
    )
    problems: list[str] = []
    for path in calibrations:
        try:
            device = _calibrated(device, Path(path))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return device


_NUMBERS = (
    "matmul_tflops",
    "memory_gb_per_s",
    "usable_gib",
    "reserved_gib",
    "host_link_gb_per_s",
    "host_adam_gparams_per_s",
)
_FABRICS, _COLLECTIVES = ("node", "network"), ("all_to_all", "all_reduce", "all_gather")


def _calibrated(device: Device, path: Path) -> Device:
    raw, problems = read_json(path), list[str]()
    allowed = ("measured", "grouped_matmul_efficiency", *_NUMBERS, *_FABRICS)
    changed: dict[str, Any] = {}
    if not isinstance(raw.get("measured"), str):
        problems.append(f"measured = {show(raw.get('measured'))}: must say in one line when, where and how")
    for key, value in raw.items():
        if key not in allowed:
            problems.append(f"{key} = {show(value)}: unknown key; allowed: {', '.join(allowed)}")
        elif key in _NUMBERS:
            if _positive(value):
                changed[key] = float(value)
            else:
                problems.append(f"{key} = {show(value)}: must be a number above 0; remove the key if not measured")
        elif key == "grouped_matmul_efficiency":
            pairs = _pairs([[1, value]] if _positive(value) else value)
            if pairs is None or max(share for _, share in pairs) > 1:
                problems.append(
                    f"{key} = {show(value)}: must be a share of at most 1, or ascending [rows, share] pairs"
                )
            else:
                changed[key] = pairs
        elif key in _FABRICS:
            links, wrong = _links(key, value)
            problems += wrong
            changed[key] = {**getattr(device, key), **links}
    if problems:
        raise UserError(f"{path}: {problem}" for problem in problems)
    return replace(device, **changed, measured=(*device.measured, raw["measured"]))


def _links(fabric: str, value: Any) -> tuple[dict[str, Link], list[str]]:
    if not isinstance(value, dict):
        return {}, [f"{fabric} = {show(value)}: must be an object with {', '.join(_COLLECTIVES)}"]
    links, problems = {}, []
    for kind, figure in value.items():
        where = f"{fabric}.{kind} = {show(figure)}"
        pairs = _pairs(figure)
        if kind not in _COLLECTIVES:
            problems.append(f"{where}: unknown key; allowed: {', '.join(_COLLECTIVES)}")
        elif pairs is not None:
            links[kind] = Link(gb_per_s=pairs[-1][1], pairs=pairs)
        elif (
            isinstance(figure, dict)
            and set(figure) == {"gb_per_s", "latency_us"}
            and all(map(_positive, figure.values()))
        ):
            links[kind] = Link(**figure)
        else:
            problems.append(f'{where}: must be {{"gb_per_s": , "latency_us": }} or ascending [bytes sent, GB/s] pairs')
    return links, problems


def _positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")  # type: ignore[operator]


def _pairs(value: object) -> Pairs | None:
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_positive, pair)) for pair in value):
        return None
    xs = [pair[0] for pair in value]
    return tuple((float(x), float(y)) for x, y in value) if xs == sorted(set(xs)) else None
