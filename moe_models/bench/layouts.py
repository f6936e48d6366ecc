"""What recipes/bench.py is asked to compare: layouts, read from the command line into rows to be measured.

A layout is a ds_config, which runs through MoETrainer as in recipes/finetune.py, or one of :data:`BASELINES`. After
`+` stand changes to it: `liger`, `checkpointing` and `compile` (`--torch_compile`, with AutoEP around its layers), or
one value of the JSON by its dotted name. All of them combine:

    ds_configs/zero1_ep2.json+liger+expert_parallel.gate_up_impl=fused
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_models.config.ds_config import DsConfig, load_ds_config
from moe_models.config.layout import divisors
from moe_models.errors import UserError
from moe_models.families.table import family_of, moe_blocks
from moe_models.files import read_json
from moe_models.preflight.liger import no_kernels
from moe_models.preflight.run import check_run
from moe_models.preflight.torch_compile import compile_problems

ROOT = Path(__file__).resolve().parents[2]
BASELINES = {
    "hf_zero3": "the plain HF model, ZeRO-3 (ds_configs/zero3.json without timers), a bare deepspeed.initialize loop",
    "autoep_stock": "AutoEP at ZeRO-1 with DeepSpeed's defaults for all else, a bare deepspeed.initialize loop",
    "transformers_ep": "transformers' own expert parallelism: DistributedConfig(ep_size, fsdp_size), FSDP2, AdamW",
    "bare:FILE.json": "a bare deepspeed.initialize loop with the same model and JSON: what MoETrainer adds is the rest",
}
"""Layouts that have a name instead of a file."""

CHANGES = ("liger", "checkpointing", "compile")
_STOCK: dict[str, Any] = {
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}


@dataclass(frozen=True, kw_only=True)
class BenchLayout:
    """One way to train."""

    name: str
    """As written on the command line, without folder and ending of the file."""
    kind: str
    """`trainer` (MoETrainer), `bare` (deepspeed.initialize) or `transformers_ep`."""
    json: dict[str, Any] | None
    """The ds_config with its changes; None for transformers_ep."""
    ep_size: int
    liger: bool = False
    checkpointing: bool = False
    compile: bool = False


def read_layouts(
    words: list[str], model_config: Mapping[str, Any], world_size: int, scratch: Path
) -> list[BenchLayout]:
    """The layouts that ``words`` name. Raises UserError with every problem of all of them."""
    layouts, problems = [], []
    for word in words:
        try:
            layouts.append(_read(word, model_config, world_size, scratch))
        except UserError as error:
            problems += error.problems
    names = [layout.name for layout in layouts]
    problems += [f"--deepspeed: {name} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise UserError(problems)
    return layouts


def _read(word: str, model_config: Mapping[str, Any], world_size: int, scratch: Path) -> BenchLayout:
    base, *changes = word.split("+")
    flags = [change for change in changes if "=" not in change]
    unknown = [change for change in flags if change not in CHANGES]
    if unknown:
        raise UserError(f"{word}: +{unknown[0]}: must be one of {', '.join(CHANGES)}, or KEY.KEY=VALUE of the JSON")
    switches = {change: change in flags for change in CHANGES}
    source = base.removeprefix("bare:")
    raw = _json_of(source, model_config, world_size)
    name = "+".join([("bare:" if base.startswith("bare:") else "") + Path(source).stem, *changes])
    kind = "trainer" if base.endswith(".json") and base == source else "bare"
    if base == "transformers_ep":
        kind = base
    for flag in ("liger", "compile"):
        if kind != "trainer" and flag in flags:
            raise UserError(f"{word}: +{flag}: is a flag of the Trainer; take it with a ds_config, without bare:")
    if raw is None:
        if len(flags) < len(changes):
            raise UserError(f"{word}: transformers_ep has no JSON to change")
        ep_size = _largest_ep(model_config, world_size)
        return BenchLayout(name=name, kind=kind, json=None, ep_size=ep_size, **switches)
    raw = copy.deepcopy(raw)
    for change in changes:
        if "=" in change:
            _set(raw, change, word)
    if switches["compile"] and "expert_parallel" in raw:
        _set(raw, "compile.autoep_non_moe=true", word)
    path = scratch / f"{name.replace('/', '_').replace(':', '_')}.json"
    path.write_text(json.dumps(raw, indent=2))
    try:
        ds = load_ds_config(str(path))
    except UserError as error:  # it names the changed copy; the user wrote `word`
        raise UserError(problem.replace(f"{path}: ", f"{word}: ") for problem in error.problems) from error
    problems = check_run(ds, model_config, world_size) + _not_here(ds, kind)
    problems += compile_problems(ds, switches["compile"], switches["liger"])
    if switches["liger"]:
        problems += no_kernels(model_config, "+liger")
    if problems:
        raise UserError(f"{word}: {problem}" for problem in problems)
    return BenchLayout(name=name, kind=kind, json=raw, ep_size=ds.ep_size, **switches)


def _json_of(source: str, model_config: Mapping[str, Any], world_size: int) -> dict[str, Any] | None:
    if source == "hf_zero3":
        plain = read_json(str(ROOT / "ds_configs" / "zero3.json"))
        plain.pop("timers")  # DeepSpeed's default, and that of every user: it waits for the GPU in each forward pass
        return plain
    if source == "autoep_stock":
        ep_size = _largest_ep(model_config, world_size)
        return {"expert_parallel": {"enabled": True, "autoep_size": ep_size}, **_STOCK}
    if source == "transformers_ep":
        if not _experts(model_config):
            raise UserError("transformers_ep: the model has no MoE layer of a known family")
        return None
    if not source.endswith(".json"):
        raise UserError(f"--deepspeed {source}: must be a ds_config (.json) or one of {', '.join(BASELINES)}")
    return read_json(source)


def _experts(model_config: Mapping[str, Any]) -> int:
    family = family_of(model_config)
    return family.num_experts(model_config) if family and list(moe_blocks(family, model_config)) else 0


def _largest_ep(model_config: Mapping[str, Any], world_size: int) -> int:
    """As many ranks to one copy of the experts as the model and the machine allow."""
    experts = _experts(model_config)
    return max((size for size in divisors(world_size) if experts and experts % size == 0), default=1)


def _not_here(ds: DsConfig, kind: str) -> list[str]:
    if ds.sp_size > 1:
        return ["sequence_parallel_size: not in this benchmark"]
    if kind == "bare" and (ds.moe.layer is not None or ds.moe.balance is not None):
        return ["moe: the section is ours; a bare loop cannot read it"]
    return []


def _set(raw: dict[str, Any], change: str, word: str) -> None:
    where, _, text = change.partition("=")
    *path, last = where.split(".")
    section = raw
    for key in path:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise UserError(f"{word}: {where}: {key} is no section of the JSON")
    try:
        section[last] = json.loads(text)
    except ValueError:  # a word without quotes is a string
        section[last] = text
