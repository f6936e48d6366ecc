"""recipes/plan.py: what it prints and writes, what it refuses, and that its layouts are real ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
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
from moe_models.planner.figures import ways_of
from moe_models.preflight.run import check_run
from recipes import check
from tests.support.cluster import free_port
from tests.support.layouts import MIXTRAL_8X7B, ROOT, plan, plan_search
from tests.support.recipe import ENVIRONMENT, save_model, text_rows, venv_for_run_sh, write_jsonl
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
    rows = re.findall(r"^ ?(\d+) +(ZeRO-.*?) +\d+ x \d+ +(?:yes|no) +([\d.]+) +(yes|tight|no)", out, re.M)
    assert len(rows) >= 4
    assert all("offload" in name for _, name, _, fits in rows if fits == "yes")
    assert [fits for *_, fits in rows] == ["yes"] * 6 + ["tight"] + ["no"] * 2
    table = re.split(r"^GPUS=8 ", out, flags=re.M)[0]
    assert max(map(len, table.splitlines())) <= width
    assert "is 5% faster and fits tightly: 76.3 of 78.6 GiB, and the prediction was off by up to 9%" in " ".join(
        table.split()
    )
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
    line = re.search(r"^GPUS=8 (?s:.*?)\n\n", out, re.M)
    assert line is not None
    flags = shlex.split(line[0].replace("\\\n", " "))
    assert flags[:3] == ["GPUS=8", "./run.sh", "finetune"]
    assert flags[flags.index("--deepspeed") + 1] == f"{tmp_path}/mine.json"
    words = ["--deepspeed", tmp_path / "mine.json", "--model_name_or_path", tmp_path, "--world_size", "8"]
    assert check.main([*map(str, words), *flags[flags.index("--max_length") :]]) == 0
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


def planned(run: Any, tmp_path: Path, **given: Any) -> list[str]:
    """The words of the run that plan prints for a tiny model on CPU ranks."""
    config = {"model_type": "mixtral", **TINY["mixtral"]}
    code, out, err = run("--write", tmp_path / "mine.json", device="h200", seq_length=32, config=config, **given)
    assert (code, err) == (0, "")
    line = re.search(r"^GPUS=\d (?s:.*?)\n\n", out, re.M)
    assert line is not None
    return ["bash", "-c", line[0]]


def test_the_line_of_a_preset_needs_no_other_file(run: Any) -> None:
    out = run(gpus=1024, config=QWEN3_30B, device="h200", global_batch_size=4096)[1]
    assert "--deepspeed ds_configs/zero" in out
    assert "HOSTFILE=hosts ./run.sh finetune" in out
    assert "hosts (a line for each machine: ADDRESS slots=8)" in " ".join(out.split())


def test_hostile_names_stay_one_word(tmp_path: Path) -> None:
    """A shell gives back the words that went in."""
    name = "a b'$(touch hit);\n[bold]x"
    words = ["--model_name_or_path", name, "--gpus", "8", "--device", "h200", "--seq_length", "4096"]
    arguments = plan.parse(words)
    line = plan.command(plan_search.search(REQUEST)[0], Path("my file.json"), REQUEST, arguments)
    seen = subprocess.run(
        ["bash", "-c", line.replace("./run.sh", "printf '%s\\0'")], capture_output=True, text=True, cwd=tmp_path
    )
    assert seen.stdout.split("\0")[:3] == ["finetune", "--model_name_or_path", name]
    assert "my file.json" in seen.stdout.split("\0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.conformance
def test_the_line_runs_as_it_is(run: Any, tmp_path: Path) -> None:
    """Pasted into a shell in a folder that has run.sh, the model and my.jsonl."""
    words = planned(run, tmp_path, gpus=2, gpus_per_node=2)
    save_model(tmp_path)
    write_jsonl(tmp_path / "my.jsonl", text_rows(32))
    for name in ("ds_configs", "recipes", "run.sh", "pyproject.toml", "moe_models", *ROOT.glob("requirements*.txt")):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, tmp_path / source.name)
    venv_for_run_sh(tmp_path)
    environment = {**os.environ, **ENVIRONMENT, "MASTER_PORT": str(free_port())}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert list(tmp_path.glob("out/*/model/config.json"))


def test_the_line_has_the_flags_of_the_recipe(run: Any, tmp_path: Path) -> None:
    """Without a run: the recipe's own parser knows each flag."""
    from trl import ModelConfig, SFTConfig

    text = planned(run, tmp_path, gpus=2, gpus_per_node=2)[2]
    flags = {word.removeprefix("--") for word in shlex.split(text) if word.startswith("--")}
    known = set(SFTConfig.__dataclass_fields__) | set(ModelConfig.__dataclass_fields__) | {"dataset_name"}
    assert len(flags) == 8
    assert flags <= known


def test_hours_and_cost(run: Any) -> None:
    """Tokens / (tokens a second and GPU) GPU hours; the price is for one of them."""
    code, out, _ = run("--dataset_tokens", "1e9", "--price_per_gpu_hour", "2.5", device="h200")
    assert code == 0
    speed = plan_search.search(REQUEST)[0].prediction.tokens_per_s
    gpu_hours = 1e9 / speed / 3600
    row = re.search(r"billion tokens\s+hours +GPU hours +cost *\n.*\n 1 +([\d.,]+) +([\d.,]+) +([\d.,]+)", out)
    assert row is not None
    assert float(row[1]) == pytest.approx(gpu_hours / 8, rel=0.01)
    assert float(row[2]) == pytest.approx(gpu_hours, abs=0.5)
    assert float(row[3]) == pytest.approx(2.5 * gpu_hours, abs=0.5)
    assert "7,629 steps, 2.5 for a GPU hour." in out
    code, _, err = run("--price_per_gpu_hour", "-1")
    assert code == 2
    assert "error: --price_per_gpu_hour -1: must be a number above 0" in err
    assert "--price_per_gpu_hour -1: does nothing without --dataset_tokens" in err
    assert "--dataset_tokens inf: must be a number above 0" in run("--dataset_tokens", "inf")[2]


def test_a_batch_that_nobody_chose(run: Any) -> None:
    err = run(gpus=1024, config=QWEN3_30B, device="h200")[2]
    assert err.startswith(
        "warning: --global_batch_size: not given, so that 1,024 GPUs have 4,096 sequences in a step, "
    )
    assert "16.8 million tokens; few runs take more than 4 million" in err
    assert run(gpus=1024, config=QWEN3_30B, device="h200", global_batch_size=4096)[2] == "", "it was chosen"


def test_what_a_rank_sends(run: Any) -> None:
    """ZeRO-3 without experts spread exchanges nothing, and gathers every weight for each pass."""
    plans = plan_search.search(REQUEST)
    plain = next(p for p in plans if p.name == "ZeRO-3")
    ways = ways_of([plain.case])
    assert ways == ["exchanged", "reduced", "gathered"]
    exchanged, reduced, gathered, across = (float(cell.replace(",", "")) for cell in plan.wire_cells(plain, ways))
    assert exchanged == across == 0
    assert gathered > 2 * 2 * 46 * 7 / 8
    assert reduced > 2 * 46 * 7 / 8
    assert "a rank sends in a step, in GB" in run(device="h200")[1]


def test_a_tight_layout_comes_after_one_that_fits() -> None:
    """The same layout with less memory to spare is ranked lower, however fast it is."""
    one = planted(plan_search.search(REQUEST)[0], 1)
    faster = replace(planted(one, 2, slower=0.5), verdict="tight")
    assert plan_search.ranked([faster, one]) == [one, faster]
    told = plan.why([one, faster])
    assert f"{faster.name} is " in told
    assert "% faster and fits tightly: " in told
    assert "surely fits" in told
    alone = plan.why([faster])
    assert "It fits tightly: " in alone


def test_layouts_that_the_model_cannot_tell_apart_are_ranked_by_memory() -> None:
    one = planted(plan_search.search(REQUEST)[0], 1)
    memory = replace(one.prediction.memory, skew=one.prediction.memory.skew - 2**30)
    smaller = planted(one, 2, slower=1.003)
    smaller = replace(smaller, prediction=replace(smaller.prediction, memory=memory))
    assert plan_search.ranked([one, smaller]) == [smaller, one]
    assert "is as fast as" in plan.why([smaller, one])
    assert "0.0%" not in plan.why([smaller, one])


def test_ranked(run: Any) -> None:
    plans = plan_search.search(REQUEST)
    fitting = [p for p in plans if p.fits]
    assert [p.verdict for p in fitting] == sorted((p.verdict for p in fitting), key=list(plan_search.ORDER).index)
    for verdict in ("yes", "tight"):
        speeds = [p.prediction.tokens_per_s for p in fitting if p.verdict == verdict]
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
    """Two that differ by less than the model can tell, and one that is slower."""
    one = planted(plan_search.search(REQUEST)[0], 1)
    two = planted(one, 2, slower=1.002)
    three = planted(one, 3, slower=1.5)
    rows = plan.rows_of([one, three, two])
    assert [[p.name for p in row.plans] for row in rows] == [[one.name, two.name], [three.name]]
    assert rows[0].cells(1) == ("1\n=", f"{one.name}\n{two.name}", "\n".join(2 * [plan.batch_of(one)]))
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
    too_large = replace(slower, verdict="no")
    names = f"{one.name} and {same.name}"
    assert plan.why([one, same, too_large]).startswith(
        f"{names} are equal in time and memory, and no other layout fits; the next, {slower.name}, needs "
    )


def test_one_gpu(run: Any) -> None:
    """Where nothing is sharded, ZeRO 1 and 2 are one row, and the sentence compares with ZeRO-3."""
    small = {**MIXTRAL_8X7B, "num_hidden_layers": 4}
    code, out, _ = run(gpus=1, device="b200", config=small)
    words = " ".join(out.split())
    assert code == 0
    assert re.search(r"^ 1 +ZeRO-1 .*\n =  ZeRO-2 +4 x 1 *\n 2 +ZeRO-3 ", out, re.M)
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
    assert rows[0] == ("1", "14", "12", "18", "export", "47", "560.4")
    assert rows[3] == ("4", "14", "12", "18", "export", "47", "653.8"), "ZeRO 1 keeps whole weights in a checkpoint"
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
    assert len(rows) == 4
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
        # The one above fits tightly; it is compared with what fits as surely as the first.
        assert (staged.verdict, plans[0].verdict) == ("tight", "yes")
        assert re.search(r"The best pipeline, ZeRO-1 PP \d EP \d offload, takes \d+% longer: its stages wait ", text)
    # 32 micro-batches and 8 stages: 7 of 39 turns.
    turn = (staged.prediction.time.compute + staged.prediction.time.all_to_all) / 32
    assert staged.prediction.time.stages == pytest.approx(7 * turn, rel=0.3)


def test_no_stages_within_a_node() -> None:
    plans = plan_search.search(replace(REQUEST, gpus=8, batch=32))
    assert {p.case.ds.pp_size for p in plans} == {1}
    assert "pipeline" not in plan.why(plans)
