"""Memory and time of the proof of an export: one layer at a time, and the whole model.

    python -m benchmarks.proof_memory FOLDER

FOLDER gets a random checkpoint of Mixtral's shape (8 layers, hidden 1024, FFN 3584, 8 experts; bf16, 1.48 GB), if it
holds none. Each way runs in a process of its own, twice; the first run has the file in the page cache as the second.
Memory is the anonymous part of the proportional set size, sampled every 20 ms, above that of the idle process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from moe_models.errors import run

PROBE = (2, 48)


def make(folder: Path) -> None:
    """A random checkpoint, written tensor by tensor."""
    from transformers import AutoConfig

    from moe_models.checkpoint.export import _expected_on_disk, hub_plan
    from moe_models.checkpoint.hf_folder import HFFolderWriter, save_companions
    from moe_models.families.table import FAMILIES

    config = AutoConfig.for_model(
        "mixtral", num_hidden_layers=8, hidden_size=1024, intermediate_size=3584, num_local_experts=8,
        num_attention_heads=8, num_key_value_heads=2, vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    plan = hub_plan(FAMILIES["mixtral"], config)
    expected = _expected_on_disk(plan, config, torch.bfloat16)
    writer = HFFolderWriter(folder, expected, max_shard_bytes=200_000_000)
    generator = torch.Generator().manual_seed(0)
    for name, (shape, dtype) in expected.items():
        values = torch.randn(shape, generator=generator).mul_(0.02)
        if name.endswith("norm.weight"):
            values += 1
        writer.add(name, values.to(dtype))
    writer.close_weights()
    save_companions(writer.staging, config, torch.bfloat16)
    writer.finish()


def anonymous() -> int:
    """Bytes of this process that are no file's."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no Pss_Anon")


def prove(folder: Path, way: str) -> None:
    """Run one way and print its time, memory and a digest of its logits and checksums."""
    from transformers import AutoModelForCausalLM

    from moe_models.checkpoint.proof import model_fingerprints, tensor_fingerprints, tied_in
    from moe_models.checkpoint.unread import OnePartAtATime, unread_tensors

    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    ids_BT = torch.randint(0, 32000, PROBE, generator=torch.Generator().manual_seed(0))
    AutoModelForCausalLM  # noqa: B018 (its import is part of the idle process)
    idle = anonymous()
    peak = [idle]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    prints: dict[str, int] = {}
    with torch.no_grad():
        if way == "whole":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            prints.update(model_fingerprints(model))
            logits = model(input_ids=ids_BT, use_cache=False).logits.float()
        else:
            with unread_tensors():
                model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
            tied = tied_in(model)

            def take(name: str, values: torch.Tensor) -> None:
                if name not in tied:
                    prints.update(tensor_fingerprints(name, values))

            parts = OnePartAtATime(model, take)
            logits = model(input_ids=ids_BT, use_cache=False).logits.float()
            parts.read_the_rest()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    above = peak[0] - idle
    digest = (hash(tuple(sorted(prints.items()))), logits.double().sum().item(), logits.abs().max().item())
    print(
        f"{way:9} {seconds:6.1f} s  {above / 1e9:5.2f} GB = {above / size:4.2f} x checkpoint of {size / 1e9:.2f} GB  "
        f"{len(prints)} checksums  {digest}"
    )


def main(words: list[str]) -> int:
    """Both ways, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the random checkpoint is, or is to be")
    parser.add_argument("way", nargs="?", choices=("whole", "streamed"), help="run one way in this process")
    arguments = parser.parse_args(words)
    folder = arguments.folder
    if arguments.way:
        prove(folder, arguments.way)
        return 0
    if not folder.exists():
        make(folder)
    environment = {**os.environ, "PYTHONHASHSEED": "0"}  # digests are compared across processes
    for _ in range(2):
        for way in ("whole", "streamed"):
            command = [sys.executable, "-m", "benchmarks.proof_memory", str(folder), way]
            subprocess.run(command, check=True, env=environment)
    return 0


if __name__ == "__main__":
    run(main)
