"""recipes/plan.py: what it prints and writes, what it refuses, and that its layouts are real ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.errors import run as run_recipe
from moe_models.families.model import Model
from moe_models.planner.devices import read_device
from moe_models.preflight.run import check_run
from recipes import check
from tests.support.layouts import MIXTRAL_8X7B, ROOT, plan, plan_search
from tests.support.tiny import TINY

QWEN3_30B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768,
    "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960,
}  # fmt: skip
REQUEST = plan_search.Request(
    model=Model.of(MIXTRAL_8X7B), gpus=8, gpus_per_node=8, device=read_device("h200"), length=4096, batch=32, skew=1.3,
    liger=False, host_gib=1000,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(
        *more: object, width: int = 80, config: dict[str, Any] = MIXTRAL_8X7B, **given: Any
    ) -> tuple[int, str, str]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = {"model_name_or_path": tmp_path, "gpus": 8, "device": "h100-80g", "seq_length": 4096, **given}
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        monkeypatch.setattr("sys.argv", ["plan.py", *map(str, [*words, *more])])
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as end:
            run_recipe(plan.main)
        return int(end.value.code or 0), *capsys.readouterr()

    return call


@pytest.mark.parametrize("width", [80, 120])
def test_mixtral_on_a_node_of_h100(run: Any, width: int) -> None:
    """46.7 billion parameters x 16 bytes are 93 GB for each of 8 GPUs: only offloading fits 80 GB."""
    code, out, err = run(width=width)
    assert (code, err) == (0, "")
    rows = re.findall(r"^ ?(\d+) +(ZeRO-.*?) +\d+ x \d+ +(?:yes|no) +([\d.]+) +(yes|no)", out, re.M)
    assert len(rows) >= 4
    assert all("offload" in name for _, name, _, fits in rows if fits == "yes")
    assert {fits for *_, fits in rows} == {"yes", "no"}
    assert max(map(len, out.splitlines())) <= width
    assert re.search(r"why +ZeRO-\d.* (beats|is as fast as) ZeRO-\d", " ".join(out.split()))
    assert "at most 4 GPUs" in out


def test_the_parts_add_up(run: Any) -> None:
    best = plan_search.search(REQUEST)[0]
    memory, seconds = best.prediction.memory, best.prediction.time
    assert sum(getattr(memory, part) for part in plan.PARTS) == memory.needed
    assert sum(getattr(seconds, part) for part in plan.TIMES) == pytest.approx(seconds.total)
    assert best.prediction.tokens * 8 == 32 * 4096
    assert best.fits
    assert memory.needed <= REQUEST.device.usable_gib * 2**30


def test_what_it_writes_passes_check(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    code, out, _ = run("--write", tmp_path / "mine.json", device="h200")
    assert code == 0
    assert f"written: {tmp_path}/mine.json" in "".join(out.splitlines())
    flags = re.search(r"--max_length .* --gradient_checkpointing \w+", " ".join(out.split()))
    assert flags is not None
    words = ["--deepspeed", tmp_path / "mine.json", "--model_name_or_path", tmp_path, "--world_size", "8"]
    assert check.main([*map(str, words), *flags[0].split()]) == 0
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("config", [MIXTRAL_8X7B, QWEN3_30B])
def test_every_layout_that_it_compares_passes_check(config: dict[str, Any], tmp_path: Path) -> None:
    """Layouts are built without DeepSpeed's parser; here it reads them all, and finds what was built."""
    names = set()
    request = replace(REQUEST, model=Model.of(config), gpus=16)
    for stage, ep, tp, sp, pp in plan_search.layouts(request):
        for offload in ("", "optimizer", "optimizer and weights"):
            if max(ep, tp, sp) > 4 or (offload == "optimizer and weights" and stage < 3):
                continue
            built = plan_search.build(stage, ep, tp, sp, offload, pp)  # type: ignore[arg-type]
            if check_run(built, config, 16):
                continue
            path = tmp_path / built.path.name
            path.write_text(json.dumps(built.raw))
            read = load_ds_config(path)
            for field in (
                "raw",
                "deepspeed",
                "expert_parallel",
                "moe",
                "zero_stage",
                "tp_size",
                "sp_size",
                "pp_size",
                "precision",
            ):
                assert getattr(read, field) == getattr(built, field), (path.name, field)
            assert check_run(read, config, 16) == []
            names.add(path.name)
    assert len(names) > 30
    assert any("tp2" in name for name in names)
    assert any("pp2" in name for name in names)


def test_refused_layouts_are_not_compared() -> None:
    """The preflight refuses tensor parallelism at ZeRO-3 and without experts spread; nothing here repeats that."""
    plans = plan_search.search(replace(REQUEST, gpus=16, batch=64))
    assert plans
    configs = [p.case.ds for p in plans]
    assert all(check_run(ds, MIXTRAL_8X7B, 16) == [] for ds in configs)
    assert not [ds for ds in configs if ds.tp_size > 1 and (ds.zero_stage == 3 or ds.ep_size == 1)]


def test_ranked(run: Any) -> None:
    plans = plan_search.search(REQUEST)
    fitting = [p for p in plans if p.fits]
    speeds = [p.prediction.tokens_per_s for p in fitting]
    assert all(later <= 1.0051 * earlier for earlier, later in pairwise(speeds))
    assert plans[: len(fitting)] == fitting
    assert all(p.prediction.memory.needed > REQUEST.device.usable_gib * 2**30 for p in plans[len(fitting) :])


def planted(like: Any, stage: int, *, slower: float = 1.0) -> Any:
    """A plan with the figures of another one, at another ZeRO stage; ``slower`` stretches its compute."""
    prediction = like.prediction
    case = replace(prediction.case, ds=replace(prediction.case.ds, zero_stage=stage))
    time = replace(prediction.time, compute=prediction.time.compute * slower)
    return replace(like, prediction=replace(prediction, case=case, time=time))


def test_equal_layouts_share_a_row() -> None:
    """Two that are equal to what is printed, and one that is slower."""
    one = planted(plan_search.search(REQUEST)[0], 1)
    two = planted(one, 2, slower=1 + 1e-9)
    three = planted(one, 3, slower=1.5)
    rows = plan.rows_of([one, three, two])
    assert [[p.name for p in row.plans] for row in rows] == [[one.name, two.name], [three.name]]
    assert rows[0].cells(1) == ("1\n=", f"{one.name}\n{two.name}")
    table = plan.ranking(rows)
    assert table.row_count == len(rows) == plan.memory_table(rows, REQUEST).row_count == 2
    assert plan.why([one, two, three]).startswith(f"{one.name} = {two.name} beats {three.name} by ")
    assert plan.why([one, two]) == f"{one.name} and {two.name} are equal in time and memory; there is no other layout."


def test_why_passes_over_rows_that_differ_in_the_batch_only() -> None:
    one = planted(plan_search.search(REQUEST)[0], 1)
    case = one.prediction.case
    other = replace(case, work=replace(case.work, recompute=not case.work.recompute))
    same = replace(one, prediction=replace(one.prediction, case=other))
    slower = planted(one, 3, slower=1.5)
    assert len(plan.rows_of([one, same, slower])) == 3
    assert plan.why([one, same, slower]).startswith(f"{one.name} beats {slower.name} by ")
    too_large = replace(slower, fits=False)
    names = f"{one.name} and {same.name}"
    assert plan.why([one, same, too_large]).startswith(
        f"{names} are equal in time and memory, and no other layout fits; the next, {slower.name}, needs "
    )


def test_one_gpu(run: Any) -> None:
    """Where nothing is sharded, ZeRO 1 and 2 are one row, and the sentence compares with ZeRO-3."""
    small = {**MIXTRAL_8X7B, "num_hidden_layers": 4}
    code, out, _ = run(gpus=1, device="h200", config=small)
    words = " ".join(out.split())
    assert code == 0
    assert re.search(r"^ 1 +ZeRO-1 .*\n =  ZeRO-2 *\n 2 +ZeRO-3 ", out, re.M)
    assert re.search(r"why ZeRO-1( offload)? = ZeRO-2( offload)? (beats|is as fast as) ZeRO-3", words)
    assert "0.0%" not in out


def test_nothing_fits(run: Any) -> None:
    code, out, err = run(device="a100-40g", gpus=2, host_gib=100)
    lines = err.splitlines()
    assert (code, out, len(lines)) == (2, "", 3)
    assert re.search(
        r"error: nothing fits: .*ZeRO-3.* would do with \d+ GiB of host memory .* --host_gib says 100", lines[0]
    )
    assert re.search(r"error: fewer tokens: not even --seq_length 256 fits", lines[1])
    more = re.search(r"error: more GPUs: --gpus (\d+) fits \(ZeRO-\d.*, \d+ GiB\)", lines[2])
    assert more is not None
    assert run(device="a100-40g", gpus=more[1], host_gib=100)[0] == 0, "what it promises, it keeps"


def test_the_host(run: Any, tmp_path: Path) -> None:
    """One row for each layout, with the peak named; the time to read follows --read_gb_per_s."""
    _, out, _ = run(device="h200")
    rows = re.findall(r"^ ?(\d+) +(\d+) +(\d+) +(\d+) +(read|train|export) +(\d+) +([\d.]+) *$", out, re.M)
    assert len(rows) == len(re.findall(r"^ ?\d+ +ZeRO-", out, re.M))
    assert rows[0] == ("1", "14", "12", "18", "export", "47", "653.8")
    words = " ".join(out.split())
    assert (
        "Read at 2 GB/s a node (assumed; --read_gb_per_s sets it); the exported model takes 93.4 GB of disk." in words
    )
    _, out, _ = run("--read_gb_per_s", 10, device="h200")
    assert re.search(r"^ ?1 +14 +12 +18 +export +9 ", out, re.M)
    assert "Read at 10 GB/s a node; the exported" in " ".join(out.split())
    (tmp_path / "pytorch_model.bin").touch()
    _, out, _ = run(device="h200")
    assert re.search(r"^ ?1 +\d{3} +12 +18 +read +47 ", out, re.M)
    assert "Each rank reads the whole model: it has no safetensors files." in " ".join(out.split())


def test_the_host_has_to_hold_it_too(run: Any) -> None:
    code, _, err = run(device="h200", host_gib=15)
    assert code == 2
    assert re.match(
        r"error: nothing fits: ZeRO-\d.* fits the GPUs and needs 18 GiB of host memory in each node \(to ", err
    )
    assert "and --host_gib says 15" in err


def test_fewer_tokens_fit(run: Any) -> None:
    long = {**QWEN3_30B, "max_position_embeddings": 2**22}
    code, _, err = run(device="h100-80g", seq_length=2**22, config=long)
    found = re.search(r"fewer tokens: --seq_length (\d+) fits", err)
    assert code == 2
    assert found is not None
    assert "nothing fits: the least that 8 GPUs need is" in err
    assert run(device="h100-80g", seq_length=found[1], config=long)[0] == 0


def test_refused(run: Any, tmp_path: Path) -> None:
    code, _, err = run(
        "--calibration", tmp_path / "no.json", "--write", tmp_path, "--read_gb_per_s", 0, gpus=12, device="h300"
    )
    lines = err.splitlines()
    assert code == 2
    assert "error: --gpus 12: is not a whole number of nodes of --gpus_per_node 8" in lines
    assert f"error: --write {tmp_path}: must be a file in a folder that is there" in lines
    assert "error: --read_gb_per_s 0: must be above 0" in lines
    assert any(line.startswith("error: --device h300: unknown; one of a100-40g") for line in lines)
    assert "--seq_length 40000: longer than the model's context; use at most 32768" in run(seq_length=40000)[2]
    batch = run(gpus=16, global_batch_size=3)[2]
    assert "--global_batch_size 3: no layout of 16 GPUs divides it; use a multiple of 16" in batch
    assert "model_type = 'llama': sizes are known for" in run(config={"model_type": "llama"})[2]


def test_calibration_changes_the_plan(run: Any, tmp_path: Path) -> None:
    slow = {"measured": "a slow day", "node": {"all_to_all": {"gb_per_s": 1, "latency_us": 50}}}
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    _, out, _ = run("--calibration", tmp_path / "slow.json", device="h200", gpus=8)
    assert "calibrated by: a slow day" in out
    assert not re.search(r"^ ?1 +ZeRO-\d EP", out, re.M)


def test_thousands_of_gpus_in_seconds() -> None:
    gpus = 4096
    begun = time.perf_counter()
    plans = plan_search.search(replace(REQUEST, model=Model.of(QWEN3_30B), gpus=gpus, batch=4 * gpus))
    assert time.perf_counter() - begun < 10
    assert plans[0].fits


def test_families_and_no_torch(tmp_path: Path) -> None:
    """Every family is planned for in a process of its own, which imports neither torch nor DeepSpeed."""
    for model_type, config in TINY.items():
        (tmp_path / model_type).mkdir()
        (tmp_path / model_type / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    code = (
        "import sys; sys.path.insert(0, 'recipes'); import plan\n"
        f"for name in {sorted(TINY)!r}:\n"
        f"    words = ['--model_name_or_path', {str(tmp_path)!r} + '/' + name, '--gpus', '4', '--gpus_per_node', '4']\n"
        "    plan.main([*words, '--device', 'h200', '--seq_length', '64'])\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("why") == len(TINY)


def test_the_rows_of_the_page_are_printed(run: Any) -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    rows = re.findall(r"^ ?\d  ZeRO-.*%$", page, re.M)
    assert len(rows) == 3
    out = run()[1]
    for row in rows:
        assert row.split() in [line.split() for line in out.splitlines()], row


def test_an_adapter_fits_where_the_whole_model_does_not(run: Any) -> None:
    """Mixtral-8x7B on two GPUs of 80 GB, without a host to offload to; the printed command has the flags."""
    code, _, err = run(gpus=2, host_gib=100)
    assert code == 2
    assert "nothing fits" in err
    code, out, err = run("--use_peft", "--lora_r", 8, gpus=2, host_gib=100)
    assert (code, err) == (0, "")
    assert re.search(r"^ 1 +ZeRO-\d EP 2 ", out, re.M)
    text = " ".join(out.split())
    assert text.index("--use_peft --lora_r 8")
    assert re.search(r"the adapter takes 0.\d+ GB of disk", text)
    code, _, err = run("--lora_target_modules", "q_proj")
    assert (code, err) == (
        2,
        "error: --lora_target_modules: does nothing without --use_peft; add the flag, or drop this one\n",
    )
    code, _, err = run("--use_peft", "--lora_target_modules", "qproj")
    assert code == 2
    assert "matches nothing in this mixtral" in err


QWEN3_235B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
    "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "max_position_embeddings": 40960, "norm_topk_prob": True,
}  # fmt: skip


def test_stages_on_several_nodes() -> None:
    """Qwen3-235B on 64 GPUs: of the layouts of ZeRO-1 only a pipeline fits without offload; the words say what it pays.

    Its states are 4 (D + X/EP) / PP + 12 P / N bytes: 62 GB with PP 8 x EP 8.
    """
    request = replace(REQUEST, model=Model.of(QWEN3_235B), device=read_device("h100-80g", []), gpus=64, batch=256)
    plans = plan_search.search(request)
    fitting = [p for p in plans if p.fits and p.case.ds.zero_stage == 1 and not p.offload]
    assert [p.name for p in fitting] == ["ZeRO-1 PP 8 EP 8"]
    (staged,) = fitting
    memory = staged.prediction.memory
    sizes = staged.case.model.sizes
    dense, experts = sizes.dense_params, sizes.expert_params
    states = 4 * (dense + experts / 8) / 8 + 12 * (dense + experts) / 64
    assert states == pytest.approx(62e9, rel=0.02)
    assert memory.parameters + memory.gradients + memory.optimizer == pytest.approx(states, rel=0.25)
    text = plan.why(plans)
    if plans[0].case.ds.pp_size == 1:
        assert "The best pipeline, ZeRO-1 PP 8 EP 8, takes" in text
    # 32 micro-batches and 8 stages: 7 of 39 turns.
    turn = (staged.prediction.time.compute + staged.prediction.time.all_to_all) / 32
    assert staged.prediction.time.stages == pytest.approx(7 * turn, rel=0.3)


def test_no_stages_within_a_node() -> None:
    plans = plan_search.search(replace(REQUEST, gpus=8, batch=32))
    assert {p.case.ds.pp_size for p in plans} == {1}
    assert "pipeline" not in plan.why(plans)
