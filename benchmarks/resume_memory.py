"""Memory and time of a resume in the same layout: the project's way of reading, and DeepSpeed's own.

    python -m benchmarks.resume_memory FOLDER STAGE

FOLDER gets the checkpoint of a random Mixtral (4 layers, hidden 512, FFN 1792, 8 experts; 2 CPU ranks, EP 2, bf16)
after one step. Each way loads it in fresh processes, twice. Memory is the anonymous part of the proportional set size
of both ranks, sampled every 20 ms, above that before the load.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from moe_models.errors import run

RANKS = 2


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss_Anon")


def build(stage: int) -> Any:
    """An engine on this rank, after one step."""
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_models.engine.autoep import register_presets, restore_rotary_buffers

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    config = AutoConfig.for_model(
        "mixtral", num_hidden_layers=4, hidden_size=512, intermediate_size=1792, num_local_experts=8,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=8000,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    restore_rotary_buffers(model)
    register_presets()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "bf16": {"enabled": True},
            "expert_parallel": {"enabled": True, "autoep_size": RANKS},
        },
    )
    ids_BT = torch.arange(32)[None]
    engine.backward(engine(input_ids=ids_BT, labels=ids_BT).loss)
    engine.step()
    return engine


def run_rank(folder: Path, stage: int, way: str) -> None:
    """Save, or load in one way and write down what it took."""
    import torch.distributed as dist

    from moe_models.checkpoint.from_folder import load_states
    from moe_models.engine.plain_checkpoints import reads_with

    engine = build(stage)
    rank = dist.get_rank()
    if way == "save":
        engine.save_checkpoint(str(folder))
        os._exit(0)
    before = anonymous()
    peak = [before]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    start = time.perf_counter()
    with reads_with(engine, load_states) if way == "mapped" else nullcontext():
        engine.load_checkpoint(str(folder))
    dist.barrier()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    crc = 0
    for state in engine.optimizer.optimizer.state.values():
        crc = zlib.crc32(state["exp_avg"].numpy(), crc)
    for parameter in engine.module.parameters():
        held = getattr(parameter, "ds_tensor", parameter).detach().float()
        crc = zlib.crc32(held.contiguous().numpy(), crc)
    told = {"seconds": seconds, "above": peak[0] - before, "crc": crc}
    (folder / f"{way}-{rank}.json").write_text(json.dumps(told))
    os._exit(0)


def start(folder: Path, stage: int, way: str) -> list[dict[str, Any]]:
    """All ranks, to the end; what they wrote."""
    processes = []
    for rank in range(RANKS):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [sys.executable, "-m", "benchmarks.resume_memory", str(folder), str(stage), way]
        processes.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL))
    for process in processes:
        process.wait()
    if way == "save":
        return []
    return [json.loads((folder / f"{way}-{rank}.json").read_text()) for rank in range(RANKS)]


def main(words: list[str]) -> int:
    """Save once, load twice in both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is to be")
    parser.add_argument("stage", type=int, choices=(1, 2, 3), help="ZeRO stage")
    parser.add_argument("way", nargs="?", choices=("save", "deepspeed", "mapped"), help="be one rank, in one way")
    arguments = parser.parse_args(words)
    folder: Path = arguments.folder
    stage: int = arguments.stage
    if arguments.way:
        run_rank(folder, stage, arguments.way)
    folder.mkdir(parents=True, exist_ok=True)
    start(folder, stage, "save")
    size = sum(file.stat().st_size for file in folder.rglob("*.pt"))
    for _ in range(2):
        for way in ("deepspeed", "mapped"):
            told = start(folder, stage, way)
            above = sum(rank["above"] for rank in told)
            seconds = max(rank["seconds"] for rank in told)
            crcs = [rank["crc"] for rank in told]
            print(f"ZeRO-{stage} {way:9} {seconds:5.2f} s  {above / 1e9:5.2f} GB of {size / 1e9:.2f} GB  {crcs}")
    return 0


if __name__ == "__main__":
    run(main)
