"""Every file in ds_configs/ and its README: loads clean, fits a model, and differs in the layout only."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.config.layout import Layout
from moe_models.config.moe_section import ELSEWHERE, MoeLayer
from moe_models.engine.cpu import adapt_for_cpu
from moe_models.files import read_json
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.run import check_run

FOLDER = Path(__file__).parents[2] / "ds_configs"
FILES = sorted(FOLDER.rglob("*.json"))
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 8, "num_hidden_layers": 32, "num_experts_per_tok": 2}


def fill_autos(config: dict) -> dict:
    """What the HF Trainer does with the "auto" values, for 1 rank."""
    filled = copy.deepcopy(config)
    filled.update(train_batch_size=4, train_micro_batch_size_per_gpu=2, gradient_accumulation_steps=2)
    filled["gradient_clipping"] = 1.0
    filled["optimizer"]["params"].update(lr=1e-4, betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1)
    assert '"auto"' not in json.dumps(filled)
    return filled


def readme_rows() -> dict[str, list[str]]:
    text = (FOLDER / "README.md").read_text()
    return {
        m[1]: [cell.strip() for cell in m[2].split("|")]
        for m in re.finditer(r"^\| `(\w+\.json)` \|(.*)\|$", text, re.M)
    }


def test_count() -> None:
    assert len(FILES) == 23


def test_readme_table() -> None:
    rows = readme_rows()
    assert set(rows) == {path.name for path in FILES}
    for path in FILES:
        ds, (ranks, zero, ep, _, when) = load_ds_config(path), rows[path.name]
        assert zero == str(ds.zero_stage)
        assert ep == (str(ds.ep_size) if ds.expert_parallel or ds.moe.layer else "none")
        least = max(ds.ep_size, ds.tp_size, ds.sp_size) * ds.pp_size
        assert ranks == (f"multiple of {least}" if ds.expert_parallel or ds.moe.layer else "any")
        assert when


def test_readme_values() -> None:
    """The README's reasons name only keys and numbers that stand in the files."""
    text = (FOLDER / "README.md").read_text()
    zero3, zero1 = read_json(FOLDER / "zero3.json"), read_json(FOLDER / "zero1_ep8.json")
    why = text.split("## Why these values")[1].split("Left out on purpose")[0]
    known = {**zero3["zero_optimization"], **zero1["zero_optimization"], **zero3["optimizer"], **zero3}
    known |= zero1["expert_parallel"] | {f"bf16.{key}": value for key, value in zero1["bf16"].items()}
    for key in re.findall(r"^- `(.+?)`|`(stage3_\w+)`", why, re.M):
        assert next(filter(None, key)) in known
    assert "2e8" in text
    assert zero1["zero_optimization"]["reduce_bucket_size"] == 200_000_000
    assert "3e9" in text
    assert zero3["zero_optimization"]["stage3_max_live_parameters"] == 3_000_000_000
    left_out = text.split("Left out on purpose")[1].split("##")[0]
    for path in FILES:
        for key in ("grad_accum_dtype", "round_robin_gradients", "steps_per_print", "scheduler"):
            assert key in left_out
            assert key not in path.read_text()


def test_readme_memory_example() -> None:
    assert round(45.1 * (4 / 8 + 12 / 8) + 1.6 * (4 + 12 / 8)) == 99
    assert "= 99 GB" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loads_clean_and_fits_mixtral(path: Path) -> None:
    ds = load_ds_config(path)
    kinds = r"zero(\d)(?:_pp(?P<pp>\d))?(?:_ep(\d))?(?:_tp(\d))?(?:_sp(\d))?(?:_offload)?(_native)?(_capacity)?"
    found = re.fullmatch(kinds, path.stem)
    assert found is not None
    assert ds.pp_size == int(found["pp"] or 1)
    name = [
        path.stem,
        *(group for number, group in enumerate(found.groups(), 1) if number != found.re.groupindex["pp"]),
    ]
    assert (ds.moe.layer is not None) == bool(name[5])
    assert (ds.moe.layer is not None and ds.moe.layer.drop_tokens) == bool(name[6])
    assert bool(ds.moe.layer and ds.moe.layer.departures()) == bool(name[6])
    sizes = (ds.zero_stage, ds.ep_size, ds.tp_size, ds.sp_size)
    assert sizes == (int(name[1]), int(name[2] or 1), int(name[3] or 1), int(name[4] or 1))
    assert ds.precision == "bf16"
    for copies in (1, 2):
        world_size = ds.ep_size * ds.pp_size * copies
        assert check_run(ds, MIXTRAL, world_size) == []
        assert warnings_for_run(ds, MIXTRAL, world_size, gpus_per_node=8) == []
        assert Layout(world_size, ds.ep_size, pp=ds.pp_size).edp_size == copies


def test_only_the_layout_differs() -> None:
    rest = []
    for path in FILES:
        raw = read_json(path)
        raw.pop("expert_parallel", None)
        raw.pop("moe", None)
        raw.pop("tensor_parallel", None)
        raw.pop("sequence_parallel_size", None)
        raw.pop("pipeline", None)
        unchecked = raw["bf16"].pop("check_grad_overflow", None)
        stage = raw.pop("zero_optimization")
        offload = [key for key in ("offload_optimizer", "offload_param") if stage.pop(key, None)]
        assert bool(offload) == ("_offload" in path.stem)
        assert unchecked == (False if stage["stage"] < 3 and not offload else None)  # read there only
        rest.append(json.dumps(raw))  # order too: a diff of two files shows the layout only
        plain = read_json(FOLDER / f"zero{stage['stage']}{'_ep2' if stage['stage'] < 3 else ''}.json")
        assert stage == plain["zero_optimization"]
    assert len(set(rest)) == 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_it(path: Path) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    ds = load_ds_config(path)
    config = runtime.DeepSpeedConfig(fill_autos(ds.deepspeed))
    assert config.zero_optimization_stage == ds.zero_stage
    assert config.bfloat16_config.enabled
    assert config.expert_parallel_config.enabled == (ds.expert_parallel is not None)
    assert config.expert_parallel_config.autoep_size == (1 if ds.moe.layer else ds.ep_size)
    for key, value in ds.raw["zero_optimization"].items():  # no value is silently dropped
        parsed = getattr(config.zero_config, key.removeprefix("stage3_"))
        if isinstance(value, dict):
            parsed = {name: getattr(parsed, name) for name in value}
        assert parsed == value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cpu_changes_kernels_and_precision_and_no_layout(path: Path) -> None:
    ds = load_ds_config(path)
    adapted, lines = adapt_for_cpu(ds.deepspeed)
    changed = ["bf16.enabled", "optimizer.params.torch_adam"]
    if ds.expert_parallel is not None and ds.tp_size == 1:
        changed.append("expert_parallel.combine_impl")
        assert "combine_impl" not in adapted["expert_parallel"]
        assert ds.deepspeed["expert_parallel"].pop("combine_impl") == "fused_weighted_sum"
    assert [line.split()[1] for line in lines] == changed
    for section in ("expert_parallel", "tensor_parallel", "zero_optimization"):
        assert adapted.get(section) == ds.deepspeed.get(section)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fp16_in_the_place_of_bf16(path: Path, tmp_path: Path) -> None:
    """What the README says to change, in every file; and "auto" for both, which the flags then settle."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    raw = read_json(path)
    del raw["bf16"]
    for sections, precision in (
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "auto"),
    ):
        other = tmp_path / "ds.json"
        other.write_text(json.dumps({**raw, **sections}))
        ds = load_ds_config(other)
        assert ds.precision == precision
        refused = check_run(ds, MIXTRAL, 2 * ds.ep_size * ds.pp_size)
        no_fp16 = ds.pp_size > 1 and precision == "fp16"
        assert [line.split(":")[0] for line in refused] == [f"pipeline.stages = {ds.pp_size} with fp16"] * no_fp16
        adapted, lines = adapt_for_cpu(ds.deepspeed)
        assert not adapted["fp16"]["enabled"]
        fused = ds.expert_parallel is not None and ds.tp_size == 1
        assert len(lines) == 1 + len(sections) + fused
    raw.pop("moe", None)
    config = runtime.DeepSpeedConfig(fill_autos({**raw, "fp16": {"enabled": True}}))
    assert config.float16_config.enabled
    assert not config.bfloat16_config.enabled
    assert config.float16_config.loss_scale == 0  # dynamic


def test_one_plan_for_tensor_parallelism() -> None:
    plans = {json.dumps(read_json(p)["tensor_parallel"]) for p in FILES if "tensor_parallel" in read_json(p)}
    assert len(plans) == 1


def test_every_zero_value_does_something_at_its_stage() -> None:
    """Keys that DeepSpeed reads at one stage only are not written at another."""
    for path in FILES:
        zero = read_json(path)["zero_optimization"]
        assert any(key.startswith("stage3_") for key in zero) == (zero["stage"] == 3)
        assert ("allgather_bucket_size" in zero) == (zero["stage"] < 3)


def test_readme_names_every_key_of_native_layers_with_its_default() -> None:
    text = (FOLDER / "README.md").read_text().split("## Native layers")[1].split("## ")[0]
    rows = {}
    for keys, defaults in re.findall(r"^\| (`.+?) \| (.+?) \|", text, re.M):
        rows.update(zip(re.findall(r"`(\w+)`", keys), defaults.split(", "), strict=True))
    shown = {None: "none", True: "true", False: "false", "model": "`model`"}
    expected = {
        name: shown.get(f.default, str(f.default)) for name, f in MoeLayer.model_fields.items() if name not in ELSEWHERE
    }
    expected |= {"ep_size": "1", "k": "the model's", "capacity_factor": "1.0", "eval_capacity_factor": "1.0"}
    assert rows == {**expected, "min_capacity": "0"}
