"""ds_config JSON -> typed sections, with every problem reported at once, before any weight is read."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from moe_models.config.deepspeed_keys import (
    AUTO_FILLED,
    AUTO_OWN,
    DEEPSPEED_MODELS,
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    SECTION_KEYS,
    TOP_LEVEL_KEYS,
)
from moe_models.config.expert_parallel import ExpertParallel
from moe_models.config.moe_section import Moe
from moe_models.config.section import translate
from moe_models.errors import UserError, show, unknown_key
from moe_models.files import read_json


@dataclass(frozen=True, kw_only=True)
class DsConfig:
    """A checked ds_config."""

    path: Path
    """The file it came from."""
    raw: dict[str, Any]
    """As written."""
    deepspeed: dict[str, Any]
    """What DeepSpeed gets: ``raw`` without ``"moe"``."""
    expert_parallel: ExpertParallel | None
    """The AutoEP section, or None where it is absent or not enabled."""
    moe: Moe
    """Our section."""
    zero_stage: int
    """0 to 3; 0 where ``zero_optimization`` is absent."""
    tp_size: int
    """Ranks of one tensor-parallel group (``tensor_parallel.autotp_size``; 1 is off)."""
    sp_size: int
    """Ranks of one sequence-parallel group (``sequence_parallel_size``; 1 is off)."""
    precision: Literal["bf16", "fp16", "fp32", "auto"]
    """Training precision; "auto" leaves it to the training arguments."""

    @property
    def ep_size(self) -> int:
        """Ranks of one expert-parallel group; 1 without ``expert_parallel`` and ``moe.layer``."""
        if self.moe.layer is not None:
            return self.moe.layer.ep_size
        return self.expert_parallel.autoep_size if self.expert_parallel else 1

    @property
    def waits_for_timer(self) -> bool:
        """Whether DeepSpeed's throughput timer waits for the GPU around each forward and backward pass: its default."""
        timer = self.raw.get("timers", {}).get("throughput", {})
        return bool(timer.get("enabled", True) and timer.get("synchronized", True))


def load_ds_config(path: str | Path) -> DsConfig:
    """Read and check a ds_config JSON file.

    Raises one UserError with all problems: what ``read_json`` refuses; unknown keys anywhere that DeepSpeed or this
    package would ignore or refuse; values of the wrong type; "auto" where nobody fills it; bf16 and fp16 at once.
    What depends on the model or the world size is for ``moe_models.preflight.run``. Imports DeepSpeed (seconds).
    """
    path = Path(path)
    raw = read_json(path)
    problems = list(_top_level_problems(raw)) + list(_auto_problems(raw))
    sections: dict[str, BaseModel] = {}
    models: dict[str, type[BaseModel]] = {"expert_parallel": ExpertParallel, "moe": Moe}
    for name, (module, attribute) in DEEPSPEED_MODELS.items():
        if name in raw:
            models[name] = getattr(importlib.import_module(module), attribute)
    for name, model in models.items():
        if isinstance(raw.get(name), dict):
            built = _build(name, raw[name], model)
            if isinstance(built, list):
                problems += built
            else:
                sections[name] = built
    timer = raw["timers"].get("throughput", {}) if _is_object(raw, "timers") else {}
    if not isinstance(timer, dict):
        problems.append(f"timers.throughput = {show(timer)}: must be an object {{...}}")
    elif timer:
        parser = importlib.import_module("deepspeed.utils.config").DeepSpeedThroughputTimerConfig
        built = _build("timers.throughput", timer, parser)
        problems += built if isinstance(built, list) else []
    expert_parallel = sections.get("expert_parallel")
    if isinstance(expert_parallel, ExpertParallel):
        problems += expert_parallel.conflicts()
    moe = sections.get("moe", Moe())
    assert isinstance(moe, Moe)
    if moe.layer is not None:
        problems += moe.layer.conflicts()
        if moe.balance is not None and moe.layer.aux_loss == "layer":
            problems.append(
                'moe.layer.aux_loss = "layer" and moe.balance are two ways to balance the experts; remove one of them'
            )
        if isinstance(expert_parallel, ExpertParallel) and expert_parallel.enabled:
            problems.append(
                "moe.layer and expert_parallel both replace the model's MoE blocks; remove one of the two sections"
            )
    enabled = {name: (raw.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16") if _is_object(raw, name)}
    if list(enabled.values()).count(True) == 2:
        problems.append("bf16.enabled and fp16.enabled are both true; set one of them to false")
    if problems:
        raise UserError(f"{path}: {problem}" for problem in problems)
    assert expert_parallel is None or isinstance(expert_parallel, ExpertParallel)
    precision: Literal["bf16", "fp16", "fp32", "auto"] = "auto" if "auto" in enabled.values() else "fp32"
    if enabled.get("bf16") is True:
        precision = "bf16"
    elif enabled.get("fp16") is True:
        precision = "fp16"
    return DsConfig(
        path=path,
        raw=raw,
        deepspeed=without_own_autos({key: copy.deepcopy(value) for key, value in raw.items() if key != "moe"}),
        expert_parallel=expert_parallel if expert_parallel and expert_parallel.enabled else None,
        moe=moe,
        zero_stage=int(getattr(sections.get("zero_optimization"), "stage", 0)),
        tp_size=max(1, getattr(sections.get("tensor_parallel"), "autotp_size", 1)),
        sp_size=raw.get("sequence_parallel_size", 1),
        precision=precision,
    )


def without_own_autos(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Leaves out AutoEP's own "auto", its default: accelerate 1.15.0 takes each for one to be filled in, and fails."""
    experts = deepspeed.get("expert_parallel", {})
    for key in [key for key, value in experts.items() if value == "auto"]:
        del experts[key]
    return deepspeed


def _is_object(raw: Mapping[str, Any], name: str) -> bool:
    return isinstance(raw.get(name), dict)


def _top_level_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Unknown keys at the top and in the sections that DeepSpeed reads with ``dict.get``, and wrong plain values."""
    for key, value in raw.items():
        if key in REMOVED_KEYS:
            yield f"{key} = {show(value)}: DeepSpeed no longer has this section; remove it"
        elif key not in TOP_LEVEL_KEYS and key != "moe":
            yield unknown_key("", key, value, [*TOP_LEVEL_KEYS, "moe"])
    for name in ("expert_parallel", "moe", *DEEPSPEED_MODELS, *SECTION_KEYS):
        if name in raw and not _is_object(raw, name):
            yield f"{name} = {show(raw[name])}: must be an object {{...}}; remove the key to leave the section out"
    for name, allowed in SECTION_KEYS.items():
        for key, value in raw[name].items() if _is_object(raw, name) else ():
            if key not in allowed:
                yield unknown_key(f"{name}.", key, value, allowed)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = raw.get(key, 1)
        if value != "auto" and (type(value) is not int or value < 1):
            yield f'{key} = {show(value)}: must be a whole number of at least 1, or "auto" (from the command line)'
    for key in ("sequence_parallel_size", "data_parallel_size"):
        value = raw.get(key, 1)
        if value != "auto" and (type(value) is not int or value < 1):
            yield f"{key} = {show(value)}: must be a whole number of at least 1; remove the key for 1"
    clip = raw.get("gradient_clipping", 0)
    if clip != "auto" and (type(clip) not in (int, float) or clip < 0):
        yield f'gradient_clipping = {show(clip)}: must be a number of at least 0 (0 is off), or "auto" (max_grad_norm)'
    params = raw["optimizer"].get("params", {}) if _is_object(raw, "optimizer") else {}
    if not isinstance(params, dict):
        yield f"optimizer.params = {show(params)}: must be an object {{...}}"
    elif "max_grad_norm" in params:
        yield (
            f"optimizer.params.max_grad_norm = {show(params['max_grad_norm'])}: DeepSpeed refuses it here; "
            "write it as the top-level key gradient_clipping"
        )


def _auto_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """ "auto" where neither HF nor DeepSpeed replaces it: DeepSpeed would drop it or fail far from here."""
    places = (*AUTO_FILLED, *AUTO_OWN)

    def walk(value: object, where: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{where}.{key}" if where else key)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from walk(item, f"{where}[{index}]")
        elif value == "auto" and where not in places:
            section = where.split(".")[0] + "." if "." in where else ""
            near = [place for place in places if (place.startswith(section) if section else "." not in place)]
            may = ", ".join(near or AUTO_FILLED)
            yield f'{where} = "auto": nobody fills it in here; write a value; "auto" may stand at {may}'

    for key, value in raw.items():
        # expert_parallel's own fields say where they take "auto"; an unknown key is already a problem.
        if key in TOP_LEVEL_KEYS and key != "expert_parallel":
            yield from walk(value, key)


def _build(section: str, values: dict[str, Any], model: type[BaseModel]) -> BaseModel | list[str]:
    """The section as ``model``, or one line for each problem in it."""
    removed = [key for key in values if section == "zero_optimization" and key in REMOVED_ZERO_KEYS]
    lines = [f"{section}.{key} = {show(values[key])}: DeepSpeed no longer has it; remove it" for key in removed]
    try:
        built = model(**{key: value for key, value in values.items() if key not in removed})
        return lines or built
    except ValidationError as error:
        return lines + translate(error, section, values, model)
    except (AssertionError, TypeError, ValueError) as error:  # DeepSpeed's deprecated keys, beside their new names
        return [*lines, f"{section}: {' '.join(str(error).split())}"]
