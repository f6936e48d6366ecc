"""recipes/check.py: what it prints, what it refuses, and that finetune's defaults are its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moe_models.config.ds_config import load_ds_config
from moe_models.config.work import Work
from moe_models.errors import run as run_recipe
from moe_models.preflight.advice import warnings_for_run
from moe_models.preflight.run import check_run
from recipes import check

FOLDER = Path(__file__).parents[2] / "ds_configs"
MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(
        ds: str | dict[str, Any], world_size: int, *more: str, width: int = 80, **config: Any
    ) -> tuple[int, str, str]:
        (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, **config}))
        path = FOLDER / str(ds)
        if isinstance(ds, dict):
            path = tmp_path / "ds.json"
            path.write_text(json.dumps(ds))
        words = ["--deepspeed", path, "--model_name_or_path", tmp_path, "--world_size", world_size, *more]
        monkeypatch.setattr("sys.argv", ["check.py", *map(str, words)])
        monkeypatch.setenv("COLUMNS", str(width))
        with pytest.raises(SystemExit) as end:
            run_recipe(check.main)
        return int(end.value.code or 0), *capsys.readouterr()

    return call


def test_the_grid_of_two_nodes(run: Any) -> None:
    code, out, err = run("zero1_ep4.json", 8, "--gpus_per_node", "4")
    assert (code, err) == (0, "")
    first, second = out.split("node 1")
    assert "8 ranks: EP 4 x EDP 2, ZeRO-1" in first
    assert "│rank 0│rank 1│rank 2│rank 3│" in first
    assert "│ep 0.0│ep 1.0│ep 2.0│ep 3.0│" in first
    assert "│e 0-1 │e 2-3 │e 4-5 │e 6-7 │" in first
    assert "│rank 4│rank 5│rank 6│rank 7│" in second
    assert "│ep 0.1│ep 1.1│ep 2.1│ep 3.1│" in second
    assert "(0 1 2 3) (4 5 6 7) │ inside" in out
    assert "(0 4) (1 5) ..      │ across" in out


def test_bytes_of_mixtral_by_hand(run: Any) -> None:
    """EP 4 of 8 ranks, 8 x 1024 tokens: 32 layers x 8192 tokens x top-2 x 4096 x 2 bytes, there and back, 3/4 leave."""
    _, out, _ = run("zero1_ep4.json", 8)
    assert round(2 * 32 * 8192 * 2 * 4096 * 2 * 3 / 4 / 1e9, 2) == 6.44
    assert re.search(r"dispatch, combine: forward +│ all-to-all +│ EP +│ +6\.44 GB │ inside", out)
    assert "46.7 billion parameters: 45.1 in experts; one token passes 12.9" in out
    assert re.search(r"= 122 GB on each rank", out)  # 45.1 x (4/4 + 12/8) + 1.6 x (4 + 12/8)


def test_what_is_offloaded_is_not_counted(run: Any) -> None:
    """45.1 x 4/8 + 1.6 x 4 on the GPU, 12 bytes for each parameter over 8 on the host."""
    _, out, _ = run("zero1_ep8_offload.json", 8)
    assert "= 29 GB on each rank with AdamW, before" in out
    assert "in host memory, for each rank: optimizer 70.1 GB" in out


def test_the_host_and_the_disk(run: Any, tmp_path: Path) -> None:
    """46.7 billion parameters: 2 bytes to read, 14 in a checkpoint, 18 in the host with offloading."""
    _, out, _ = run("zero1_ep8.json", 8)
    assert "host    a node: read 15 GB, train 12.9 GB, export 18.8 GB; peak: export\n" in out
    assert "        reads 93.4 GB in 47 s at 2 GB/s a node (assumed; --read_gb_per_s)\n" in out
    assert "disk    654 GB a checkpoint, 93.4 GB the export\n" in out
    assert "        every checkpoint is kept; --save_total_limit 2 keeps two\n" in out
    page = (FOLDER.parent / "docs" / "layouts.md").read_text()
    block = re.search(r"^host    .*?(?=```)", page, re.M | re.S)
    assert block is not None
    assert block[0] in run("zero1_ep8.json", 8, "--save_total_limit", "2")[1]
    _, out, _ = run("zero1_ep8.json", 8, "--read_gb_per_s", "6", "--save_total_limit", "2")
    assert "        reads 93.4 GB in 16 s at 6 GB/s a node\n" in out
    assert "        2 kept, and one more while it is written: 1.96 TB\n" in out
    assert "train 854 GB, export 859 GB; peak: export" in run("zero1_ep8_offload.json", 8)[1]
    (tmp_path / "pytorch_model.bin").touch()
    _, out, _ = run("zero3_ep8.json", 8)
    assert "peak: read" in out
    assert "        each rank reads the whole model: it has no safetensors files\n" in out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    ("file", "world_size"),
    [
        ("zero3_ep8.json", 1024),
        ("zero3.json", 1),
        ("zero1_ep2_native.json", 2),
        ("zero1_ep2_tp2.json", 128),
        ("zero1_ep2_sp2.json", 128),
    ],
)
def test_fits_the_screen(run: Any, file: str, world_size: int, width: int) -> None:
    code, out, _ = run(file, world_size, width=width)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width
    assert len(out.splitlines()) < 80
    assert ("... 125 more nodes ..." in out) == (world_size == 1024)
    assert all(f"│{line} " in out or f"│{line}│" in out for line in ("tp 0", "tp 1")) == ("_tp2" in file)
    assert all(f"│{line} " in out or f"│{line}│" in out for line in ("sp 0", "sp 1")) == ("_sp2" in file)
    assert not re.search(r"^\W+(split|inputs|backward)\W", out, re.M), "no row of the table is broken over two lines"


def test_nodes_that_a_token_reaches(run: Any) -> None:
    experts = {"model_type": "deepseek_v3", "n_routed_experts": 64, "num_experts_per_tok": 8, "topk_group": 2}
    latent = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    more = {"v_head_dim": 128, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3}
    raw = json.loads((FOLDER / "zero1_ep8.json").read_text())
    raw["expert_parallel"]["autoep_size"] = 32
    _, out, _ = run(raw, 32, "--gpus_per_node", "8", **experts, **latent, **more, n_group=4)
    assert "the 8 experts of a token lie on at most 2 of 4 nodes (n_group 4, topk_group 2)" in out
    assert "of a token lie" not in run("zero1_ep8.json", 8, **experts, **latent, **more, n_group=4)[1]
    assert "lie on at most 2 of 2 nodes (no group limit)" in run("zero1_ep4.json", 8, "--gpus_per_node", "2")[1]


def test_each_rank_has_its_part_of_a_sequence(run: Any) -> None:
    _, out, _ = run("zero1_ep2_sp2.json", 4)
    assert "4 ranks: EP 2 x EDP 2, SP 2 x DP 2, ZeRO-1" in out
    assert "one optimizer step, 1 x 8 x 512 tokens on each rank at most" in out
    assert re.search(r"SP +│ sequences +│ 2 x 2 +│ \(0 1\) \(2 3\)", out)
    assert re.search(r"attention heads: forward +│ all-to-all +│ SP ", out)


def test_every_error_and_warning_at_once(run: Any) -> None:
    ds = json.loads((FOLDER / "zero2_ep8.json").read_text())
    ds["expert_parallel"]["top_k"] = 9
    more = ("--gpus_per_node", "4", "--max_length", "40000", "--gradient_accumulation_steps", "2")
    code, out, err = run(ds, 12, *more)
    lines = err.splitlines()
    assert (code, out) == (2, "")
    loaded = load_ds_config(FOLDER / "zero2_ep8.json")
    for line in check_run(loaded, MIXTRAL, 12):
        assert f"error: {line}" in lines
    assert "error: --max_length 40000: longer than the model's context; use at most 32768" in lines
    assert any(line.startswith("error: expert_parallel.top_k = 9: must be 1 to 8") for line in lines)
    assert any(line.startswith("warning: zero_optimization.stage = 2 with 2 accumulation steps") for line in lines)
    assert any(
        line.startswith("warning: expert_parallel.autoep_size = 8: EP groups cross nodes of 4") for line in lines
    )


def test_wrong_paths_and_numbers(run: Any, tmp_path: Path) -> None:
    code, _, err = run("none.json", 8, "--max_length", "0", "--save_total_limit", "0", "--read_gb_per_s", "-1")
    assert code == 2
    assert err.splitlines() == [
        f"error: {FOLDER / 'none.json'}: no such file",
        "error: --max_length 0: must be at least 1",
        "error: --save_total_limit 0: must be at least 1; leave it out to keep all",
        "error: --read_gb_per_s -1: must be above 0",
    ]
    assert run("zero1_ep2.json", 0)[0] == 2
    assert "sizes cannot be read from it" in run("zero1_ep2.json", 2, hidden_size=None)[2]


def test_advice_about_tokens() -> None:
    ds = load_ds_config(FOLDER / "zero1_ep2.json")
    few, many = Work(micro_batch=1, length=64), Work(micro_batch=8, length=1024)
    line = warnings_for_run(ds, MIXTRAL, 2, work=few)[0]
    assert line.startswith("micro batch 1 x 64 tokens: about 32 tokens for one expert in one forward pass")
    assert warnings_for_run(ds, MIXTRAL, 2, work=many) == []


def test_deepep_room(tmp_path: Path) -> None:
    raw = json.loads((FOLDER / "zero1_ep2.json").read_text())
    raw["expert_parallel"] |= {"comm_backend": "deepep", "comm_max_tokens_per_rank": 4096, "combine_impl": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(raw))
    ds = load_ds_config(tmp_path / "ds.json")
    line = warnings_for_run(ds, MIXTRAL, 2, work=Work(micro_batch=8, length=1024))[0]
    assert line.startswith("expert_parallel.comm_max_tokens_per_rank = 4096: a rank can hold 8192 tokens")
    assert warnings_for_run(ds, MIXTRAL, 2, work=Work(micro_batch=4, length=1024)) == []


def test_defaults_are_those_of_finetune() -> None:
    from trl import SFTConfig

    given = check.parse(["--deepspeed", "x", "--model_name_or_path", "y", "--world_size", "1"])
    real = SFTConfig(output_dir="x", bf16=False)
    names = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    for name in names:
        assert getattr(given, name) == getattr(real, name), name


def test_amounts() -> None:
    assert [check.amount(n) for n in (0, 999, 1000, 1_234_000, 10**9 - 1, 122_400_000_000, 5 * 10**15)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "1,000 MB", "122 GB", "5,000 TB",
    ]  # fmt: skip


def test_an_adapter(run: Any) -> None:
    """Frozen weights have no gradient and no optimizer state, and are in no checkpoint."""
    code, out, err = run("zero1_ep2.json", 2, "--use_peft", "--lora_r", "16", width=140)
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    assert "frozen, an adapter of rank 16 is trained (" in text
    gradients = re.search(r"gradients (\d+) MB", text)
    assert gradients
    assert int(gradients[1]) < 300
    assert re.search(r"disk [\d.]+ GB a checkpoint, \d+ MB the export", text)
    code, _, err = run("zero3_ep2.json", 2, "--use_peft")
    assert code == 2
    assert "--gradient_checkpointing with --use_peft and ZeRO stage 3" in err
