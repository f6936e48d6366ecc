"""The weight files of a model folder, looked at before a weight is read: is each there, whole, and of a usable type?

Only headers are read. What is wrong comes out as one line per file, where safetensors and transformers would end with a
traceback, or read on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from moe_models.checkpoint.hf_folder import INDEX_NAME
from moe_models.checkpoint.on_disk import Stored, read_header
from moe_models.errors import Problems, UserError, one_line, some_of
from moe_models.files import read_json

SINGLE_NAME = "model.safetensors"
AGAIN = "download or copy the model again"

_FLOATS = {"F64", "F32", "F16", "BF16"}
"""Types of stored weights that can be cast without more than the values."""
_WEIGHTS = ("weight", "bias", "_proj")
"""How names of weights end; other integers in a file are buffers."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads in a model folder; empty where there are none.

    Raises UserError for an index that cannot be read.
    """
    single = folder / SINGLE_NAME
    if single.is_file():
        return [single]
    if (folder / INDEX_NAME).is_file():
        return sorted({folder / name for name in _weight_map(folder).values()})
    return []


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Tensor -> the file that holds it, from the index. Raises UserError."""
    index = folder / INDEX_NAME
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise UserError(f"{index}: has no weight_map that names a file for each tensor; {AGAIN}")
    return found


def check_model_files(folder: Path, *, quantized: bool = False) -> None:
    """Refuse a folder whose safetensors files cannot be read as they are; headers only.

    ``quantized``: config.json says how the weights are quantized, so any type is right.

    Raises UserError, one line for each file that is missing, damaged or of another type.
    """
    problems = Problems()
    files = weight_files(folder)
    # 1. Every file is there.
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        problems.add(
            f"{folder / INDEX_NAME}: names {len(missing)} files that are not there ({some_of(missing)}); {AGAIN}"
        )
    # 2. Every file is whole, and its weights can be used.
    headers: dict[str, dict[str, Stored]] = {}
    for file in files:
        if not file.is_file():
            continue
        try:
            headers[file.name] = read_header(file)
        except (SafetensorError, OSError, ValueError) as error:
            size = file.stat().st_size
            problems.add(f"{file}: cut short or damaged ({size:,} bytes; {one_line(error)}); {AGAIN}")
            continue
        if not quantized:
            problems.add(*type_problems(file, headers[file.name]))
    # 3. Every tensor is where the index says.
    problems.add(*_index_problems(folder, headers))
    problems.refuse()
    # 4. No expert lacks a part: transformers reports that without a name.
    shapes = {name: stored.shape for header in headers.values() for name, stored in header.items()}
    problems.add(*expert_problems(folder, shapes))
    problems.refuse()


def _index_problems(folder: Path, headers: Mapping[str, Mapping[str, Stored]]) -> Iterator[str]:
    """One line for each file that lacks tensors which the index says are in it."""
    if (folder / SINGLE_NAME).is_file() or not (folder / INDEX_NAME).is_file():
        return
    listed: dict[str, list[str]] = {}
    for tensor, file in _weight_map(folder).items():
        listed.setdefault(file, []).append(tensor)
    for file, tensors in sorted(listed.items()):
        absent = [tensor for tensor in tensors if tensor not in headers.get(file, tensors)]
        if absent:
            yield (
                f"{folder / file}: lacks {len(absent)} of the {len(tensors)} tensors that {INDEX_NAME} says are in it "
                f"({some_of(absent, 2)}); it is a file of another model, or {INDEX_NAME} is; {AGAIN}"
            )


def expert_problems(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """A line if experts of one layer do not have the same tensors, in the same shapes."""
    # 1. Layer -> projection -> expert -> shape.
    layers: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        found = _EXPERT.fullmatch(name)
        if found is not None:
            projections = layers.setdefault(found["layer"], {})
            projections.setdefault(found["projection"], {})[int(found["expert"])] = shape
    # 2. Each projection needs as many experts as the layer has, all of the shape that most have.
    wrong = []
    for layer, projections in layers.items():
        count = 1 + max(expert for experts in projections.values() for expert in experts)
        for projection, experts in projections.items():
            usual = max(experts.values(), key=list(experts.values()).count)
            for expert in range(count):
                if expert not in experts:
                    wrong.append(f"{layer}{expert}{projection} is missing")
                elif experts[expert] != usual:
                    wrong.append(f"{layer}{expert}{projection} is {list(experts[expert])}, others are {list(usual)}")
    if wrong:
        yield f"{folder}: {len(wrong)} weights of experts are missing or incomplete ({some_of(wrong)}); {AGAIN}"


_EXPERT = re.compile(r"(?P<layer>.*\.experts\.)(?P<expert>\d+)(?P<projection>\..*)")
"""Hub name of a tensor of one expert."""


def type_problems(file: str | Path, header: Mapping[str, Stored]) -> Iterable[str]:
    """A line if weights are stored in a type that means nothing without a scale: fp8 and integers."""
    odd = [name for name, stored in header.items() if stored.dtype not in _FLOATS and name.endswith(_WEIGHTS)]
    if not odd:
        return []
    types = ", ".join(sorted({header[name].dtype for name in odd}))
    return [
        f"{file}: {len(odd)} weights are stored as {types} ({some_of(odd, 2)}), and config.json has no "
        "quantization_config that says their scale; give the model in bf16, fp16 or fp32"
    ]
