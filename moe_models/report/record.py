"""Text through the model, and what its routers chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_models.engine.blocks import find_blocks

ROW = 480
"""Tokens of one forward pass at most; a document longer than that is cut."""


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
        for start in range(0, min(len(ids), left), row):
            rows.append(ids[start : min(start + row, left)])
        left -= min(len(ids), left)
    return rows


@torch.no_grad()
def record(
    model: nn.Module,
    rows: list[list[int]],
    progress: Callable[[int, int], None] | None = None,
) -> Recording:
    """Route ``rows`` through a Hugging Face model in evaluation mode; ``progress`` gets (rows done, rows)."""
    blocks = find_blocks(model)
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in blocks]

    def listen(layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            _, weights_TK, choices_TK = output
            weights_TK, order_TK = weights_TK.float().sort(-1, descending=True)  # DeepSeek's come unsorted
            seen[layer].append((choices_TK.gather(-1, order_TK).short().cpu(), weights_TK.cpu()))

        return hook

    handles = [block.router.register_forward_hook(listen(layer)) for layer, block in enumerate(blocks)]
    base: Any = model.base_model  # without the head: its logits are not needed
    device = base.get_input_embeddings().weight.device
    try:
        for done, row in enumerate(rows, start=1):
            base(input_ids=torch.tensor([row], device=device), use_cache=False)
            if progress is not None:
                progress(done, len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return Recording(
        blocks=[block.path for block in blocks],
        rows=rows,
        choices_LNK=torch.stack([torch.cat([choices for choices, _ in layer]) for layer in seen]),
        weights_LNK=torch.stack([torch.cat([weights for _, weights in layer]) for layer in seen]),
    )
