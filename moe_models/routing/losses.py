"""Keeping the experts evenly loaded: the auxiliary loss in three scopes, the z-loss, and the selection bias.

The auxiliary loss is the one of Switch Transformers as Hugging Face normalises it: E * sum_e f_e P_e, where f_e is the
share of tokens sent to expert e (it sums to K) and P_e the mean router probability; balanced, it is K. Hugging Face
pools all layers before it multiplies, so that the layers can cancel each other; ``per_layer`` multiplies within each.

What a scope changes is the set of tokens that f and P are taken over:

- ``micro_batch``: one micro-batch of one rank, Hugging Face's function;
- ``sequence``: each sequence alone, then the mean over sequences (DeepSeek-V3, arXiv 2412.19437, section 2.1.2);
- ``global_batch``: all ranks of the data-parallel group (arXiv 2501.11873). f has no gradient, so summing counts over
  the ranks is enough: with W ranks, rank r takes W * E * sum_e f_e P_e^r, where P_e^r is its own sum of probabilities
  over the tokens of *all* ranks. The mean over ranks, which is what data parallelism makes of value and gradient, is
  then the loss of the whole batch, exactly. With gradient accumulation the later micro-batches are not known when the
  first one runs backward; f is taken over those seen so far in the optimizer step.

With sequence parallelism a sequence lies on the ranks of one SP group: f is taken over all its tokens, and each rank
takes its own share of P, so that the sum over the group, which is what DeepSpeed makes of the gradients, is the term of
the whole sequence.

Padding is left out of all losses, as in Hugging Face.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from moe_models.routing.tap import scores


def load_balancing_loss(
    counts_SLE: torch.Tensor,
    sums_SLE: torch.Tensor,
    tokens_S: torch.Tensor,
    per_layer: bool,
    experts: Sequence[int] | None = None,
) -> torch.Tensor:
    """The mean over S token sets of E * sum_e f_e P_e.

    Args:
        counts_SLE: how often each expert was chosen, per set and layer.
        sums_SLE: sum of its router probabilities, with gradient.
        tokens_S: tokens of each set; a set without any is left out.
        per_layer: multiply in each layer and average, instead of pooling the layers first.
        experts: those of each layer, if they are not all E; the others' columns are 0.
    """
    E_L = torch.tensor(experts or [counts_SLE.shape[-1]], device=counts_SLE.device)
    if not per_layer:
        counts_SLE, sums_SLE, E_L = counts_SLE.mean(1, keepdim=True), sums_SLE.mean(1, keepdim=True), E_L[:1]
    tokens_S11 = tokens_S.clamp_min(1.0)[:, None, None]
    loss_S = (E_L * (counts_SLE / tokens_S11 * (sums_SLE / tokens_S11)).sum(-1)).mean(-1)
    loss: torch.Tensor = (loss_S * (tokens_S > 0)).sum() / (tokens_S > 0).sum().clamp_min(1)
    return loss


def z_loss(logits_LTE: Sequence[torch.Tensor], weight_T: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (ST-MoE, arXiv 2202.08906): keeps router logits small.

    ``tokens`` is the sum of ``weight_T``, or more where other ranks hold the rest of the tokens.
    """
    per_layer = [(logits_TE.float().logsumexp(-1) ** 2 * weight_T).sum() for logits_TE in logits_LTE]
    return torch.stack(per_layer).mean() / tokens.clamp_min(1.0)


def token_sets(inputs: Mapping[str, Any], by_sequence: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(set of each token [T], 1 for a token and 0 for padding [T], number of sets) of a batch as the model gets it.

    A row is a sequence, unless the batch is packed: then a sequence starts wherever ``position_ids`` is 0.
    """
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask")
    weight_T = torch.ones_like(ids_BT, dtype=torch.float32) if mask_BT is None else mask_BT.float()
    if not by_sequence:
        return torch.zeros_like(ids_BT).reshape(-1), weight_T.reshape(-1), 1
    if mask_BT is None and inputs.get("position_ids") is not None:
        starts_BT = inputs["position_ids"] == 0
        starts_BT[:, 0] = True
        set_T = starts_BT.reshape(-1).cumsum(0) - 1
        return set_T, weight_T.reshape(-1), int(set_T[-1]) + 1
    rows = torch.arange(ids_BT.shape[0], device=ids_BT.device)
    return rows.repeat_interleave(ids_BT.shape[1]), weight_T.reshape(-1), ids_BT.shape[0]


class AuxLoss:
    """The terms of one training run; an observer of :class:`~moe_models.routing.tap.RouterTap`.

    The tap hands over every layer's logits during the forward pass; :meth:`terms` makes losses of them.
    """

    def __init__(
        self,
        experts: Sequence[int],
        score_func: str,
        scope: str,
        per_layer: bool,
        group: Any = None,
        peers: Any = None,
    ) -> None:
        """``experts`` has those of each layer; ``peers`` is the SP group."""
        self._score_func, self._scope, self._per_layer = score_func, scope, per_layer
        self._group, self._peers = group, peers
        self._experts = experts
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.new_step()

    def new_step(self) -> None:
        """A new optimizer step begins: forget the frequencies of its predecessor."""
        self._step_counts_LE: torch.Tensor | float = 0.0
        self._step_tokens: torch.Tensor | float = 0.0

    def observe(
        self, layer: int, training: bool, logits_TE: torch.Tensor, choices_TK: torch.Tensor, counted_2E: Any = None
    ) -> None:
        """Keep one layer of the forward pass in progress."""
        if training:
            self._seen[layer] = (logits_TE, choices_TK)

    def terms(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``aux_loss`` and ``z_loss`` of the forward pass that just ended; collective in scope ``global_batch``."""
        L, E = len(self._experts), max(self._experts)
        if sorted(self._seen) != list(range(L)):
            raise RuntimeError(f"router logits of layers {sorted(self._seen)} arrived, the model has {L} MoE layers")
        seen = [self._seen[layer] for layer in range(L)]
        self._seen.clear()
        if not any(logits_TE.requires_grad for logits_TE, _ in seen):
            raise RuntimeError(
                "the router logits carry no gradient, so no balancing loss can act; with gradient checkpointing set "
                "--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'"
            )
        set_T, weight_T, S = token_sets(inputs, self._scope == "sequence")
        counts, sums = [], []
        for logits_TE, choices_TK in seen:
            zeros_SE = torch.zeros(S, logits_TE.shape[1], device=logits_TE.device)
            missing = (0, E - logits_TE.shape[1])  # in a pyramid
            with torch.no_grad():
                chosen_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter_(1, choices_TK.long(), 1.0)
                counts.append(pad(zeros_SE.index_add(0, set_T, chosen_TE * weight_T[:, None]), missing))
            weighted_TE = scores(logits_TE, self._score_func) * weight_T[:, None]
            sums.append(pad(zeros_SE.index_add(0, set_T, weighted_TE), missing))
        counts_SLE, sums_SLE = torch.stack(counts, 1), torch.stack(sums, 1)
        tokens_S = torch.zeros(S, device=weight_T.device).index_add(0, set_T, weight_T)
        if self._peers is not None:
            packed = torch.cat([counts_SLE.reshape(-1), tokens_S])
            dist.all_reduce(packed, group=self._peers)
            counts_SLE, tokens_S = packed[:-S].view_as(counts_SLE), packed[-S:]
        if self._scope == "global_batch":
            aux = self._global(counts_SLE, sums_SLE, tokens_S)
        else:
            aux = load_balancing_loss(counts_SLE, sums_SLE, tokens_S, self._per_layer, self._experts)
        return {"aux_loss": aux, "z_loss": z_loss([logits_TE for logits_TE, _ in seen], weight_T, tokens_S.sum())}

    def _global(self, counts_1LE: torch.Tensor, sums_1LE: torch.Tensor, tokens_1: torch.Tensor) -> torch.Tensor:
        counts_LE, tokens, world = counts_1LE[0], tokens_1[0], 1
        if dist.is_initialized():
            packed = torch.cat([counts_LE.reshape(-1), tokens_1])
            dist.all_reduce(packed, group=self._group)
            counts_LE, tokens = packed[:-1].view_as(counts_LE), packed[-1]
            world = dist.get_world_size(self._group)
        self._step_counts_LE = self._step_counts_LE + counts_LE
        self._step_tokens = self._step_tokens + tokens
        frequencies_LE = self._step_counts_LE / self._step_tokens
        # f over the step's tokens, P over this micro-batch's of all ranks, this rank's share of it W times. (SP peers
        # counted their tokens together: SP times too many here, which makes it W / SP times, and SP shares are summed.)
        counts_1LE = (frequencies_LE * tokens)[None]
        return load_balancing_loss(counts_1LE, world * sums_1LE, tokens[None], self._per_layer, self._experts)
