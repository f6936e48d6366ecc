"""Host memory and time of reading a model, each rank its own share, beside each rank the whole.

    python -m benchmarks.loading --folder /tmp/loading            # a 1.5 GB Mixtral shape, 2 and 4 CPU ranks
    python -m benchmarks.loading --folder /tmp/loading --ranks 2 --repeat 3

A random checkpoint in bf16 is written first (kept in the folder for the next call). Then ranks read it and build the
engine, up to where DeepSpeed would make the optimizer. Memory is anonymous memory (Pss_Anon) over the rank's own, the
sum of the ranks' peaks, in multiples of the checkpoint. Files are evicted from the page cache before each run. A first
reading, of a tiny model, pays for imports and process groups. It is not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from moe_models.errors import run
from tests.support import reading_memory
from tests.support.cluster import Cluster

SHAPE = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 8, "max_position_embeddings": 4096,
}  # fmt: skip
"""Mixtral-8x7B's proportions: 1.5 GB in bf16."""
SMALL = {**SHAPE, "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}

LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "ZeRO-1, EP 2": {"stage": 1, "ep": 2},
        "ZeRO-2, EP 2": {"stage": 2, "ep": 2},
        "ZeRO-3, EP 2": {"stage": 3, "ep": 2},
        "ZeRO-3": {"stage": 3},
        "ZeRO-3, offload_param cpu": {"stage": 3, "zero": {"offload_param": {"device": "cpu"}}},
        "native, EP 2": {"stage": 1, "native": 2},
    },
    4: {
        "ZeRO-1, EP 4": {"stage": 1, "ep": 4},
        "ZeRO-1, EP 2 x EDP 2": {"stage": 1, "ep": 2},
        "ZeRO-1, EP 2, TP 2": {"stage": 1, "ep": 2, "tensor_parallel": reading_memory.TENSOR_PARALLEL},
        "ZeRO-3, EP 4": {"stage": 3, "ep": 4},
        "ZeRO-3": {"stage": 3},
        "native, EP 4": {"stage": 1, "native": 4},
    },
}


def main(words: list[str]) -> int:
    """Measure every layout in both ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoints are, or are written to")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=[2, 4])
    parser.add_argument("--repeat", type=int, default=1, help="the table has medians")
    given = parser.parse_args(words)

    small, large = given.folder / "small", given.folder / "large"
    for folder, shape in ((small, SMALL), (large, SHAPE)):
        if not folder.exists():
            reading_memory.write_checkpoint(folder, **shape)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    print(f"checkpoint: {size / 1e9:.3f} GB\n")
    print("| layout | ranks | memory, whole | memory, own share | seconds, whole | seconds, own share |")
    print("|---|---|---|---|---|---|")
    for ranks in given.ranks:
        cluster = Cluster(ranks)
        try:
            for name, layout in LAYOUTS[ranks].items():
                whole, share = (
                    [once(cluster, small, large, layout, size, ordinary) for _ in range(given.repeat)]
                    for ordinary in (True, False)
                )
                cells = [f"{median(held for held, _ in runs):.2f}" for runs in (whole, share)]
                cells += [f"{median(seconds for _, seconds in runs):.1f}" for runs in (whole, share)]
                print(f"| {name} | {ranks} | {' | '.join(cells)} |", flush=True)
        finally:
            cluster.stop()
    return 0


def once(
    cluster: Cluster, small: Path, large: Path, layout: dict[str, Any], size: int, ordinary: bool
) -> tuple[float, float]:
    """(memory of all ranks in multiples of the checkpoint, seconds to read and build)."""
    reading_memory.evict(str(large))
    measured = cluster.run(reading_memory.measure, str(small), str(large), layout, ordinary, timeout=600)
    return sum(rank["bytes"] for rank in measured) / size, max(rank["built"] for rank in measured)


if __name__ == "__main__":
    run(main)
