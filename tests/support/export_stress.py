"""Exports in processes of their own: killed at every step, or watched for memory."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# --------------------------------------------------------------------------------------------------- killed at any time


def read(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def die_at(event: int) -> None:
    """Kill this process with SIGKILL at the ``event``-th step that changes the disk, counted from 0."""
    count = -1

    def wrap(name: str) -> None:
        original = getattr(os, name)

        def stepping(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, stepping)

    for name in ("replace", "unlink", "rmdir", "mkdir", "fsync", "ftruncate", "pwrite"):
        wrap(name)


def export_in_child(checkpoint: Path, out: Path, event: int | None, seconds: float | None) -> bool:
    """Export in a forked child that dies at ``event`` or is killed after ``seconds``; whether it finished."""
    from recipes.export import export_checkpoint

    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if event is not None:
            die_at(event)
        try:
            export_checkpoint(checkpoint, out, "20KB")
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the export failed instead of being killed"
    return not os.WIFSIGNALED(status)


def kill(first: str, second: str, work: str, random_kills: str) -> None:
    """Overwrite the export of one checkpoint by that of another, and die on the way, again and again."""
    import torch

    from recipes.export import export_checkpoint

    torch.set_num_threads(1)  # a forked child must not wait for threads that were not forked
    export_checkpoint(Path(first), Path(work) / "warm", "20KB")  # and must not import for ten seconds
    shutil.rmtree(Path(work) / "warm")
    out, previous = Path(work) / "model", Path(work) / ".model.previous"
    whole = []
    for checkpoint in (first, second):
        assert export_in_child(Path(checkpoint), Path(work) / "whole", None, None)
        whole.append(read(Path(work) / "whole"))
        shutil.rmtree(Path(work) / "whole")
    assert whole[0] != whole[1]
    assert export_in_child(Path(first), out, None, None)

    report = {"events": 0, "random": 0, "old": 0, "new": 0, "moved": 0}
    rng = random.Random(0)
    plans = [("events", event, None) for event in range(10_000)]
    plans += [("random", None, rng.uniform(0.0, 0.25)) for _ in range(int(random_kills))]
    turn, events_done = 1, False
    for kind, event, seconds in plans:
        if kind == "events" and events_done:
            continue
        target = (first, second)[turn]
        finished = export_in_child(Path(target), out, event, seconds)
        report[kind] += 1
        if out.exists():
            state = read(out)
            assert state in whole, f"{kind} {event} {seconds}: neither the old nor the new export is whole"
            report["new" if state == whole[turn] else "old"] += 1
        else:
            assert read(previous) in whole, f"{kind} {event} {seconds}: no whole export is left"
            report["moved"] += 1
        if finished:
            assert state == whole[turn]
            assert sorted(p.name for p in Path(work).iterdir()) == ["model"], "something was left behind"
            events_done = events_done or kind == "events"
        if finished or state == whole[turn]:
            turn = 1 - turn
    assert export_in_child(Path(first), out, None, None)
    assert read(out) == whole[0]
    assert sorted(p.name for p in Path(work).iterdir()) == ["model"], "something was left behind"
    print(json.dumps(report))


# --------------------------------------------------------------------------------------------------- watched for memory


def anonymous_bytes() -> int:
    """Memory of this process that the kernel cannot drop (pages of mapped files it can)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def give_freed_memory_back(threshold: int = 32 * 1024) -> None:
    """Let glibc return every block above ``threshold`` to the kernel when it is freed.

    Left to itself it keeps freed blocks of up to 32 MB for later, and the measurement would see those.
    """
    import ctypes

    m_mmap_threshold = -3
    ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, threshold)


@contextmanager
def peak_memory() -> Any:
    """Yields a dict whose ``growth`` is the largest growth of anonymous memory in here, sampled every millisecond."""
    gc.collect()
    result, stop, start = {"growth": 0}, threading.Event(), anonymous_bytes()

    def sample() -> None:
        while not stop.is_set():
            result["growth"] = max(result["growth"], anonymous_bytes() - start)
            time.sleep(0.001)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield result
    finally:
        stop.set()
        thread.join()


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8, "vocab_size": 1024}


def write_checkpoint(folder: Path, stage: int, layers: int) -> None:
    """A random bf16 Mixtral checkpoint as DeepSpeed writes it on two ranks with EP 2, one layer at a time."""
    import torch
    from transformers import MixtralConfig

    from moe_models.checkpoint.expected import expected_tensors

    config = MixtralConfig(num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **SIZES)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    step = folder / "global_step1"
    step.mkdir()
    (folder / "latest").write_text("global_step1")
    dense = {
        name.replace(".mlp.gate.", ".mlp.router.gate."): shape
        for name, shape in expected_tensors(config).items()
        if ".experts." not in name
    }
    E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
    experts = {"w1": (F, D), "w2": (D, F), "w3": (F, D)}
    entries = [
        {
            "module_path": f"model.layers.{i}.mlp", "moe_layer_id": i, "num_experts": E, "ep_size": 2,
            "expert_key_prefix": f"model.layers.{i}.mlp.experts",
        }
        for i in range(layers)
    ]  # fmt: skip
    if stage < 3:
        module = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in dense.items()}
        torch.save({"module": module, "ds_autoep_layers": entries}, step / "mp_rank_00_model_states.pt")
        for entry in entries:
            for e in range(E):
                states = {
                    f"{entry['expert_key_prefix']}.{name}.{e}": torch.randn(shape, dtype=torch.bfloat16)
                    for name, shape in experts.items()
                }
                torch.save(states, step / f"layer_{entry['moe_layer_id']}_expert_{e}_mp_rank_00_model_states.pt")
        return
    stacked = {
        f"{entry['expert_key_prefix']}.{name}": (E // 2, *shape) for entry in entries for name, shape in experts.items()
    }
    for rank in range(2):
        shapes = [OrderedDict((n, torch.Size(s)) for n, s in part.items()) for part in (dense, stacked)]
        model = {
            "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in dense},
            "param_shapes": shapes,
            "dp_world_size": 2,
            "ds_autoep_layers": [{**entry, "ep_rank": rank} for entry in entries],
        }
        torch.save(model, step / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        flat = [torch.randn(sum(-(-shape.numel() // 2) for shape in shapes[0].values()))]
        flat.append(torch.randn(sum(shape.numel() for shape in shapes[1].values())))
        optimizer = {
            "fp32_flat_groups": flat,
            "ds_zero_partition_groups": [{"partition_ranks": [0, 1]}, {"partition_ranks": [rank]}],
        }
        torch.save({"optimizer_state_dict": optimizer}, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def memory(work: str, stage: str, layers: str) -> None:
    """Peak growth of anonymous memory while a checkpoint of this size is exported with shards of 5 MB."""
    import torch

    from recipes.export import export_checkpoint

    give_freed_memory_back()
    folder = Path(work) / "checkpoint-1"
    folder.mkdir()
    write_checkpoint(folder, int(stage), int(layers))
    # The first export pays for everything that is imported or set up once.
    (Path(work) / "small").mkdir()
    write_checkpoint(Path(work) / "small", int(stage), 1)
    export_checkpoint(Path(work) / "small", Path(work) / "small-out", "5MB")
    torch.set_num_threads(1)
    with peak_memory() as peak:
        export_checkpoint(folder, Path(work) / "out", "5MB")
    size = sum(p.stat().st_size for p in (Path(work) / "out").glob("*.safetensors"))
    print(json.dumps({"growth": peak["growth"], "size": size}))


def live_memory(source: str, out: str, stage: int) -> int:
    """Runs on the ranks: peak growth of anonymous memory while a live engine is exported with shards of 5 MB."""
    from tests.support import roundtrip

    give_freed_memory_back()
    engine = roundtrip.make_engine(source, stage, 2, "bfloat16")
    roundtrip.export_engine(engine, source, f"{out}-warm", max_shard_bytes=5 * 10**6)
    shutil.rmtree(f"{out}-warm", ignore_errors=True)
    with peak_memory() as peak:
        roundtrip.export_engine(engine, source, out, max_shard_bytes=5 * 10**6)
    engine.destroy()
    give_freed_memory_back(threshold=32 * 1024 * 1024)
    return int(peak["growth"])


if __name__ == "__main__":
    {"kill": kill, "memory": memory}[sys.argv[1]](*sys.argv[2:])
