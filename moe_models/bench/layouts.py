"""What recipes/bench.py is asked to compare: layouts, read from the command line into rows to be measured.

A layout is a ds_config, which runs through MoETrainer as in recipes/finetune.py; `bare:` and a ds_config, which runs
through a bare deepspeed.initialize loop; or one of :data:`BASELINES`. Changes to it follow after `+`: `liger`,
`checkpointing`, `compile` (`--torch_compile`, with AutoEP around its layers), `lora` and `lora_attention` (`--use_peft`
at rank 16, on attention and experts, or on attention alone), or one value of the JSON by its dotted name. All of them
combine:

    ds_configs/zero1_ep2.json+liger+expert_parallel.gate_up_impl=fused
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_models.bench.adapter import ADAPTERS
from moe_models.config.ds_config import DsConfig, load_ds_config
from moe_models.config.layout import divisors
from moe_models.config.moe_section import Moe
from moe_models.errors import Problems, UserError
from moe_models.families.table import family_of, moe_blocks
from moe_models.files import read_json
from moe_models.preflight.adapters import adapter_layout_problems
from moe_models.preflight.liger import no_kernels
from moe_models.preflight.run import check_run
from moe_models.preflight.torch_compile import compile_problems

ROOT = Path(__file__).resolve().parents[2]
BASELINES = ("hf_zero3", "autoep_stock", "transformers_ep")
"""Layouts that have a name instead of a file; what they are is in the help of recipes/bench.py."""
CHANGES = ("liger", "checkpointing", "compile", *ADAPTERS)
"""Switches of the Trainer and the model, not of the JSON."""
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
    lora: bool = False
    lora_attention: bool = False


def read_layouts(
    words: list[str], model_config: Mapping[str, Any], world_size: int, scratch: Path
) -> list[BenchLayout]:
    """The layouts that ``words`` name. Raises UserError with every problem of all of them."""
    layouts: list[BenchLayout] = []
    problems = Problems()
    for word in words:
        with problems.note():
            layouts.append(_read(word, model_config, world_size, scratch))
    times = Counter(layout.name for layout in layouts)
    problems.add(*(f"--deepspeed: {name} is named twice" for name in sorted(times) if times[name] > 1))
    problems.refuse()
    return layouts


def _read(word: str, model_config: Mapping[str, Any], world_size: int, scratch: Path) -> BenchLayout:
    # 1. The word, taken apart: bare:FILE.json+switch+key.key=value
    base, *changes = word.split("+")
    source = base.removeprefix("bare:")
    flags = [change for change in changes if "=" not in change]
    values = [change for change in changes if "=" in change]
    unknown = [flag for flag in flags if flag not in CHANGES]
    if unknown:
        raise UserError(f"{word}: +{unknown[0]}: must be one of {', '.join(CHANGES)}, or KEY.KEY=VALUE of the JSON")
    switches = {change: change in flags for change in CHANGES}
    raw = _json_of(source, model_config, world_size)
    prefix = "bare:" if base.startswith("bare:") else ""
    name = "+".join([prefix + Path(source).stem, *changes])

    # 2. The loop that runs it. Switches of the Trainer are for the Trainer.
    if base == "transformers_ep":
        kind = "transformers_ep"
    elif base.endswith(".json") and base == source:
        kind = "trainer"
    else:
        kind = "bare"
    for flag in ("liger", "compile", *ADAPTERS):
        if kind != "trainer" and flag in flags:
            raise UserError(f"{word}: +{flag}: is a flag of the Trainer; take it with a ds_config, without bare:")

    # 3. transformers' expert parallelism has no JSON.
    if raw is None:
        if values:
            raise UserError(f"{word}: transformers_ep has no JSON to change")
        ep_size = _largest_ep(model_config, world_size)
        return BenchLayout(name=name, kind=kind, json=None, ep_size=ep_size, **switches)

    # 4. The JSON with its changes, checked as a run would check it.
    raw = copy.deepcopy(raw)
    for change in values:
        _set(raw, change, word)
    if switches["compile"] and "expert_parallel" in raw:
        _set(raw, "compile.autoep_non_moe=true", word)
    path = scratch / f"{name.replace('/', '_').replace(':', '_')}.json"
    path.write_text(json.dumps(raw, indent=2))
    try:
        ds = load_ds_config(str(path))
    except UserError as error:  # it names the changed copy; the user wrote `word`
        raise UserError(problem.replace(f"{path}: ", f"{word}: ") for problem in error.problems) from error
    problems = check_run(ds, model_config, world_size)
    problems += _not_here(ds, kind)
    problems += compile_problems(ds, switches["compile"], switches["liger"])
    if switches["liger"]:
        problems += no_kernels(model_config, "+liger")
    problems += _adapter_problems(ds, switches, model_config)
    if problems:
        raise UserError(f"{word}: {problem}" for problem in problems)
    return BenchLayout(name=name, kind=kind, json=raw, ep_size=ds.ep_size, **switches)


def _json_of(source: str, model_config: Mapping[str, Any], world_size: int) -> dict[str, Any] | None:
    """The ds_config of a file or a baseline; None for transformers_ep."""
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
        known = ", ".join((*BASELINES, "bare:FILE.json"))
        raise UserError(f"--deepspeed {source}: must be a ds_config (.json) or one of {known}")
    return read_json(source)


def _experts(model_config: Mapping[str, Any]) -> int:
    """Experts of a MoE layer; 0 without such layers or for an unknown family."""
    family = family_of(model_config)
    if family is None or not list(moe_blocks(family, model_config)):
        return 0
    return family.num_experts(model_config)


def _largest_ep(model_config: Mapping[str, Any], world_size: int) -> int:
    """As many ranks to one copy of the experts as the model and the machine allow."""
    experts = _experts(model_config)
    if not experts:
        return 1
    return max(size for size in divisors(world_size) if experts % size == 0)


def _not_here(ds: DsConfig, kind: str) -> list[str]:
    """What a run can do and this benchmark cannot."""
    if ds.sp_size > 1:
        return ["sequence_parallel_size: not in this benchmark"]
    if ds.pp_size > 1:
        return ["pipeline.stages: not in this benchmark"]
    if kind == "bare" and ds.moe != Moe():
        return ["moe: the section is ours; a bare loop cannot read it"]
    return []


def _adapter_problems(ds: DsConfig, switches: Mapping[str, bool], model_config: Mapping[str, Any]) -> list[str]:
    """What adapters cannot be combined with."""
    asked = [name for name in ADAPTERS if switches[name]]
    if not asked:
        return []
    if len(asked) > 1:
        return ["+lora with +lora_attention: lora has attention, too; drop one"]
    if family_of(model_config) is None:
        return [f"+{asked[0]}: the model has no MoE layer of a known family"]
    recompute = switches["checkpointing"]
    problems = list(adapter_layout_problems(ds, on_experts=asked[0] == "lora", recompute=recompute))
    if switches["compile"]:
        problems.append(f"+{asked[0]} with +compile: not tested here; drop one")
    return problems


def _set(raw: dict[str, Any], change: str, word: str) -> None:
    """Apply ``KEY.KEY=VALUE`` to the JSON, in place; sections that are missing are made."""
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
