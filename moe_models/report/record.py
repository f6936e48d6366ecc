"""Text through the model, and what its routers chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_models.engine.blocks import find_blocks, plain_routing

ROW = 480
"""Most tokens of one forward pass; a longer document is cut into several."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """The routers' choices for N tokens."""

    blocks: list[str]
    """Module path of each MoE block, in order."""
    rows: list[list[int]]
    """Token ids, as they went through the model: N in all."""
    choices_LNK: torch.Tensor
    """Expert ids, the heaviest first; int16, CPU."""
    weights_LNK: torch.Tensor
    """The weight of each of them in the sum that leaves the block; fp32, CPU."""


def cut(documents: list[list[int]], row: int, max_tokens: int) -> list[list[int]]:
    """Documents of token ids -> rows of at most ``row`` tokens, ``max_tokens`` in all, from the first document on."""
    rows: list[list[int]] = []
    left = max_tokens
    for ids in documents:
        kept = min(len(ids), left)
        for start in range(0, kept, row):
            rows.append(ids[start : min(start + row, kept)])
        left -= kept
    return rows


@torch.no_grad()
def record(
    model: nn.Module,
    rows: list[list[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Route ``rows`` through a Hugging Face model in evaluation mode; ``progress`` gets (rows done, rows)."""
    # 1. Listen at every router: the weights and expert ids of each forward pass, the heaviest expert first.
    blocks = find_blocks(model)
    weights_of_layer: list[list[torch.Tensor]] = [[] for _ in blocks]
    choices_of_layer: list[list[torch.Tensor]] = [[] for _ in blocks]

    def listen(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            _, weights_TK, choices_TK = plain_routing(output)
            weights_TK, order_TK = weights_TK.float().sort(-1, descending=True)  # DeepSeek's come unsorted
            choices_TK = choices_TK.gather(-1, order_TK)
            weights_of_layer[layer].append(weights_TK.cpu())
            choices_of_layer[layer].append(choices_TK.short().cpu())

        return hook

    handles = [block.router.register_forward_hook(listen(layer)) for layer, block in enumerate(blocks)]
    # 2. One forward pass for each row, without the head: its logits are not needed.
    base: Any = model.base_model
    device = base.get_input_embeddings().weight.device
    try:
        for done, row in enumerate(rows, start=1):
            base(input_ids=torch.tensor([row], device=device), use_cache=False)
            if progress is not None:
                progress(done, len(rows))
    finally:
        for handle in handles:
            handle.remove()
    # 3. The rows of each layer one after the other.
    return Recording(
        blocks=[block.path for block in blocks],
        rows=rows,
        choices_LNK=torch.stack([torch.cat(choices) for choices in choices_of_layer]),
        weights_LNK=torch.stack([torch.cat(weights) for weights in weights_of_layer]),
    )
