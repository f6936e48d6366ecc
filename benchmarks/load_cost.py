"""Processor time that counting the routers' choices takes of a training step; the figures of benchmarks/balance.md.

    OMP_NUM_THREADS=1 python -m benchmarks.load_cost

Forward and backward passes of small Mixtrals on the CPU, one line for each size.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_models.engine.blocks import find_blocks
from moe_models.errors import run
from moe_models.routing.load import LoadStats
from moe_models.routing.tap import RouterTap

STEPS = 5
SIZES = ((256, 512, 8, 512), (512, 1024, 8, 1024), (512, 256, 64, 512))
"""(hidden size, expert FFN size, experts, tokens)"""


class Timed:
    """LoadStats with a clock."""

    def __init__(self, stats: LoadStats) -> None:
        self.stats = stats
        self.spent = 0.0

    def observe(self, *args: Any) -> None:
        """Count, and say how long it took."""
        start = time.process_time()
        self.stats.observe(*args)
        self.spent += time.process_time() - start


def measure(width: int, expert_width: int, experts: int, tokens: int) -> None:
    """Forward and backward passes of a two-layer Mixtral of this size."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=1000, hidden_size=width, intermediate_size=expert_width, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, num_local_experts=experts, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    found = find_blocks(model)
    timed = Timed(LoadStats([block.path for block in found], [experts] * len(found), 1, "softmax", "cpu"))
    RouterTap(model, found, timed)
    ids = torch.randint(0, 1000, (1, tokens))
    for step in range(STEPS + 1):
        if step == 1:  # the first warms up
            timed.spent = 0.0
            start = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
    total = time.process_time() - start
    print(
        f"| {width}, {expert_width}, {experts}, {tokens} | {total / STEPS * 1e3:.0f} ms | "
        f"{timed.spent / STEPS * 1e3:.2f} ms | {timed.spent / total:.2%} |",
        flush=True,
    )


def main(words: list[str]) -> int:
    """Measure every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(words)
    torch.manual_seed(0)
    for sizes in SIZES:
        measure(*sizes)
    return 0


if __name__ == "__main__":
    run(main)
