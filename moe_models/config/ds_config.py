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
from moe_models.config.layout import Degrees, Layout
from moe_models.config.moe_section import Moe
from moe_models.config.pipeline import Pipeline
from moe_models.config.section import translate
from moe_models.errors import Problems, one_line, show, unknown_key
from moe_models.files import read_json

Precision = Literal["bf16", "fp16", "fp32", "auto"]

Offloadable = Literal["optimizer", "weights"]
OFFLOAD_KEYS: dict[Offloadable, str] = {"optimizer": "offload_optimizer", "weights": "offload_param"}
"""Key of ``zero_optimization`` that moves each of them to host memory or NVMe."""


_PLAIN_PARTITIONS = {
    "zero_hpz_partition_size": 1,
    "mics_shard_size": -1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
}
"""Keys under which ZeRO-3 cuts or stores partitions in another way, and the value that leaves them plain."""


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
    precision: Precision
    """Training precision; "auto" leaves it to the training arguments."""
    pp_size: int = 1
    """Stages of the pipeline (``pipeline.stages``; 1 is off)."""

    def value(self, section: str, key: str, default: Any = None) -> Any:
        """``raw[section][key]``, or ``default`` where the JSON does not say it."""
        return self.raw.get(section, {}).get(key, default)

    def zero(self, key: str, default: Any = None) -> Any:
        """``zero_optimization.key``, or ``default`` where the JSON does not say it."""
        return self.value("zero_optimization", key, default)

    @property
    def ep_size(self) -> int:
        """Ranks of one expert-parallel group; 1 without ``expert_parallel`` and ``moe.layer``."""
        if self.moe.layer is not None:
            return self.moe.layer.ep_size
        return self.expert_parallel.autoep_size if self.expert_parallel else 1

    @property
    def spreads_experts(self) -> bool:
        """Whether AutoEP or native layers replace the model's blocks; else every rank has all experts."""
        return self.expert_parallel is not None or self.moe.layer is not None

    def layout(self, world_size: int) -> Layout:
        """The grid of ``world_size`` ranks. Raises UserError if the sizes do not fit."""
        return Layout(world_size, self.ep_size, self.tp_size, self.sp_size, self.pp_size)

    @property
    def offloaded(self) -> frozenset[Offloadable]:
        """What ZeRO-Offload keeps in host memory or on NVMe."""
        moved: set[Offloadable] = set()
        for what, key in OFFLOAD_KEYS.items():
            section = self.zero(key) or {}
            if section.get("device", "none") != "none":
                moved.add(what)
        return frozenset(moved)

    @property
    def odd_partitions(self) -> str | None:
        """The key with which ZeRO-3 does not keep a plain range of each tensor in memory, and its value; else None.

        A rank cannot read its own partition from the model's files then.
        """
        if self.zero_stage < 3:
            return None
        if (self.zero("offload_param") or {}).get("device") == "nvme":
            return 'zero_optimization.offload_param.device = "nvme"'
        for key, plain in _PLAIN_PARTITIONS.items():
            value = self.zero(key, plain)
            if value not in (plain, None):
                return f"zero_optimization.{key} = {value}"
        return None

    @property
    def has_optimizer(self) -> bool:
        """Whether DeepSpeed builds the optimizer, from the JSON."""
        return isinstance(self.raw.get("optimizer"), dict)

    @property
    def deepcompile(self) -> bool:
        """Whether DeepSpeed's own compiler passes are on (``compile.deepcompile``)."""
        return bool(self.value("compile", "deepcompile"))

    @property
    def compiles_around_experts(self) -> bool:
        """Whether DeepSpeed compiles what is around the AutoEP layers (``compile.autoep_non_moe``)."""
        return bool(self.value("compile", "autoep_non_moe"))

    @property
    def waits_for_timer(self) -> bool:
        """Whether DeepSpeed's throughput timer waits for the GPU around each forward and backward pass: its default."""
        timer = self.value("timers", "throughput", {})
        return bool(timer.get("enabled", True) and timer.get("synchronized", True))


def load_ds_config(path: str | Path) -> DsConfig:
    """Read and check a ds_config JSON file.

    Raises one UserError with all problems: what ``read_json`` refuses; unknown keys anywhere that DeepSpeed or this
    package would ignore or refuse; values of the wrong type; "auto" where nothing fills it; bf16 and fp16 at once.
    What depends on the model or the world size is for ``moe_models.preflight.run``. Imports DeepSpeed (seconds).
    """
    path = Path(path)
    raw = read_json(path)
    problems = Problems()

    # 1. What the JSON alone tells: unknown keys, and "auto" in the wrong place.
    problems.add(*_top_level_problems(raw))
    problems.add(*_auto_problems(raw))

    # 2. Each section as a type of its own. A section with problems is left out here.
    sections = _parse_sections(raw, problems)
    experts = sections.get("expert_parallel")
    assert experts is None or isinstance(experts, ExpertParallel)
    moe = sections.get("moe", Moe())
    assert isinstance(moe, Moe)

    # 3. What two keys or two sections say against each other.
    if experts is not None:
        problems.add(*experts.conflicts())
    problems.add(*_moe_problems(moe, experts))
    precision = _precision(raw, problems)

    Problems(f"{path}: {line}" for line in problems.lines).refuse()
    degrees = Degrees.from_json(raw)
    return DsConfig(
        path=path,
        raw=raw,
        deepspeed=without_own_autos({key: copy.deepcopy(value) for key, value in raw.items() if key != "moe"}),
        expert_parallel=experts if experts is not None and experts.enabled else None,
        moe=moe,
        zero_stage=int(getattr(sections.get("zero_optimization"), "stage", 0)),
        tp_size=degrees.tp,
        sp_size=degrees.sp,
        pp_size=degrees.pp,
        precision=precision,
    )


def without_own_autos(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """Leaves out AutoEP's own "auto", its default: accelerate 1.15.0 takes each for one to be filled in, and fails."""
    experts = deepspeed.get("expert_parallel", {})
    for key in [key for key, value in experts.items() if value == "auto"]:
        del experts[key]
    return deepspeed


def _parse_sections(raw: Mapping[str, Any], problems: Problems) -> dict[str, BaseModel]:
    """Every section that has a type, by name, as far as its values allow one; the others become problems."""
    models: dict[str, type[BaseModel]] = {"expert_parallel": ExpertParallel, "moe": Moe, "pipeline": Pipeline}
    for name, (module, attribute) in DEEPSPEED_MODELS.items():
        if name in raw:  # the import takes seconds
            models[name] = getattr(importlib.import_module(module), attribute)
    sections: dict[str, BaseModel] = {}
    for name, model in models.items():
        if _is_object(raw, name):
            section = _parse(name, raw[name], model, problems)
            if section is not None:
                sections[name] = section
    timer = raw["timers"].get("throughput", {}) if _is_object(raw, "timers") else {}
    if not isinstance(timer, dict):
        problems.add(f"timers.throughput = {show(timer)}: must be an object {{...}}")
    elif timer:
        model = importlib.import_module("deepspeed.utils.config").DeepSpeedThroughputTimerConfig
        _parse("timers.throughput", timer, model, problems)
    return sections


def _parse(section: str, values: dict[str, Any], model: type[BaseModel], problems: Problems) -> BaseModel | None:
    """The section as ``model``, or None after noting one line for each problem in it."""
    removed = [key for key in values if section == "zero_optimization" and key in REMOVED_ZERO_KEYS]
    for key in removed:
        problems.add(f"{section}.{key} = {show(values[key])}: DeepSpeed no longer has it; remove it")
    try:
        parsed = model(**{key: value for key, value in values.items() if key not in removed})
    except ValidationError as error:
        problems.add(*translate(error, section, values, model))
        return None
    except (AssertionError, TypeError, ValueError) as error:  # DeepSpeed's deprecated keys, beside their new names
        problems.add(f"{section}: {one_line(error)}")
        return None
    return None if removed else parsed


def _moe_problems(moe: Moe, experts: ExpertParallel | None) -> Iterator[str]:
    """What ``moe`` says against itself and against the other section about experts."""
    if moe.kernels != "fused" and "dispatch" in moe.model_fields_set:
        yield (
            f'moe.dispatch = {show(moe.dispatch)}: does nothing without "kernels": "fused" beside it; add that, or '
            "remove the key"
        )
    if moe.layer is None:
        return
    yield from moe.layer.conflicts()
    if moe.balance is not None and moe.layer.aux_loss == "layer":
        yield 'moe.layer.aux_loss = "layer" and moe.balance are two ways to balance the experts; remove one of them'
    if experts is not None and experts.enabled:
        yield "moe.layer and expert_parallel both replace the model's MoE blocks; remove one of the two sections"


def _precision(raw: Mapping[str, Any], problems: Problems) -> Precision:
    """The one precision that the sections ``bf16`` and ``fp16`` turn on."""
    enabled = {name: (raw.get(name) or {}).get("enabled", False) for name in ("bf16", "fp16") if _is_object(raw, name)}
    if list(enabled.values()).count(True) == 2:
        problems.add("bf16.enabled and fp16.enabled are both true; set one of them to false")
    if enabled.get("bf16") is True:
        return "bf16"
    if enabled.get("fp16") is True:
        return "fp16"
    return "auto" if "auto" in enabled.values() else "fp32"


def _is_object(raw: Mapping[str, Any], name: str) -> bool:
    return isinstance(raw.get(name), dict)


def _top_level_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """Unknown keys at the top and in the sections that DeepSpeed reads with ``dict.get``, and wrong plain values."""
    for key, value in raw.items():
        if key in REMOVED_KEYS:
            yield f"{key} = {show(value)}: DeepSpeed no longer has this section; remove it"
        elif key not in TOP_LEVEL_KEYS and key != "moe":
            yield unknown_key("", key, value, [*TOP_LEVEL_KEYS, "moe"])
    for name in ("expert_parallel", "moe", "pipeline", *DEEPSPEED_MODELS, *SECTION_KEYS):
        if name in raw and not _is_object(raw, name):
            yield f"{name} = {show(raw[name])}: must be an object {{...}}; remove the key to leave the section out"
    for name, allowed in SECTION_KEYS.items():
        if _is_object(raw, name):
            for key, value in raw[name].items():
                if key not in allowed:
                    yield unknown_key(f"{name}.", key, value, allowed)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if not _is_count(raw.get(key, 1)):
            yield f'{key} = {show(raw[key])}: must be a whole number of at least 1, or "auto" (from the command line)'
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if not _is_count(raw.get(key, 1)):
            yield f"{key} = {show(raw[key])}: must be a whole number of at least 1; remove the key for 1"
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


def _is_count(value: object) -> bool:
    """Whether a value is a whole number of at least 1 (``true`` is none), or "auto", which has checks of its own."""
    return value == "auto" or (type(value) is int and value >= 1)


def _auto_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    """ "auto" where neither HF nor DeepSpeed replaces it: DeepSpeed would drop it or fail far from here."""
    allowed = (*AUTO_FILLED, *AUTO_OWN)
    for key, value in raw.items():
        # expert_parallel's own fields say where they take "auto"; an unknown key is already a problem.
        if key not in TOP_LEVEL_KEYS or key == "expert_parallel":
            continue
        for where in _places_of_auto(value, key):
            if where in allowed:
                continue
            if "." in where:
                section = where.split(".")[0] + "."
                near = [place for place in allowed if place.startswith(section)]
            else:
                near = [place for place in allowed if "." not in place]
            may = ", ".join(near or AUTO_FILLED)
            yield f'{where} = "auto": nobody fills it in here; write a value; "auto" may stand at {may}'


def _places_of_auto(value: object, where: str) -> Iterator[str]:
    """The paths below ``where`` that say "auto", e.g. ``optimizer.params.betas[1]``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places_of_auto(item, f"{where}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places_of_auto(item, f"{where}[{index}]")
    elif value == "auto":
        yield where
