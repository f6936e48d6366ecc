"""Keeping the experts evenly loaded: the auxiliary loss in three scopes, and the z-loss.

The auxiliary loss is the one of Switch Transformers (arXiv 2101.03961) as Hugging Face normalises it:

    aux = E * sum_e f_e P_e

f_e is the share of tokens that were sent to expert e (the shares sum to K), P_e the mean router probability of e.
Balanced, aux is K. Only P has a gradient: it lowers the probability of the experts that got many tokens. Hugging Face
pools all layers before it multiplies, so that the layers can cancel each other; ``per_layer`` multiplies within each.

A scope is the set of tokens that f and P are taken over:

- ``micro_batch``: one micro-batch of one rank, as in Hugging Face;
- ``sequence``: each sequence alone, then the mean over sequences (DeepSeek-V3, arXiv 2412.19437, section 2.1.2);
- ``global_batch``: all ranks of the data-parallel group (arXiv 2501.11873).

``global_batch`` over W ranks needs no more than a sum of counts, because f has no gradient. Rank r takes

    aux_r = W * E * sum_e f_e P_e^r

where f_e counts the tokens of all ranks and P_e^r is rank r's own sum of probabilities over the number of tokens of
*all* ranks. Data parallelism averages values and gradients over ranks, and the mean of aux_r is exactly the loss of the
whole batch. With gradient accumulation the later micro-batches are not known when the first one runs backward: f is
taken over the micro-batches of the optimizer step that were seen so far.

With sequence parallelism the ranks of one SP group hold parts of the same sequences. f is taken over all tokens of the
group, and each rank takes its own share of P. DeepSpeed sums gradients over the group, and the sum of the shares is the
loss of the whole sequence.

With pipeline stages the layers of one token are on several ranks. Each stage adds its layers' sums to what the stage
before has sent (:meth:`AuxLoss.carried`), and the last one makes the loss of them (:meth:`AuxLoss.terms_of_stages`).
The sums of probabilities carry their gradient back the same way, so that the loss is that of the whole model.

All losses leave padding out, as Hugging Face does.

Shapes, besides the legend of ``moe_models``: S token sets (one, or one for each sequence).
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
    """The mean over S token sets of E * sum_e f_e P_e, a scalar.

    Args:
        counts_SLE: how often each expert was chosen, per set and layer.
        sums_SLE: sum of its router probabilities, with gradient.
        tokens_S: tokens of each set; a set without any is left out.
        per_layer: multiply in each layer and average, instead of pooling the layers first.
        experts: those of each layer, if they are not all E; the others' columns are 0.
    """
    # 1. Hugging Face's form has one layer: the mean of all.
    E_L = torch.tensor(experts or [counts_SLE.shape[-1]], device=counts_SLE.device)
    if not per_layer:
        counts_SLE = counts_SLE.mean(1, keepdim=True)
        sums_SLE = sums_SLE.mean(1, keepdim=True)
        E_L = E_L[:1]

    # 2. f and P: from sums over tokens to means. An empty set divides 0 by 1.
    tokens_S11 = tokens_S.clamp_min(1.0)[:, None, None]
    f_SLE = counts_SLE / tokens_S11
    P_SLE = sums_SLE / tokens_S11

    # 3. E * sum_e f_e P_e of each set and layer, and its mean over layers.
    loss_SL = E_L * (f_SLE * P_SLE).sum(-1)
    loss_S = loss_SL.mean(-1)

    # 4. The mean over sets that hold a token.
    filled_S = tokens_S > 0
    loss: torch.Tensor = (loss_S * filled_S).sum() / filled_S.sum().clamp_min(1)
    return loss


def z_loss(logits_LTE: Sequence[torch.Tensor], weight_T: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (ST-MoE, arXiv 2202.08906): keeps router logits small.

    ``tokens`` is the sum of ``weight_T``, or more where other ranks hold the rest of the tokens.
    """
    of_layers = []
    for logits_TE in logits_LTE:
        squared_T = logits_TE.float().logsumexp(-1) ** 2  # in fp32: bf16 has 3 digits, and a square doubles the error
        of_layers.append((squared_T * weight_T).sum())
    return torch.stack(of_layers).mean() / tokens.clamp_min(1.0)


def token_sets(inputs: Mapping[str, Any], by_sequence: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(set of each token [T], 1 for a token and 0 for padding [T], number of sets) of a batch as the model gets it.

    A row is a sequence, unless the batch is packed: then a sequence starts wherever ``position_ids`` is 0.
    """
    ids_BT = inputs["input_ids"]
    mask_BT = inputs.get("attention_mask")
    if mask_BT is None:
        weight_T = torch.ones_like(ids_BT, dtype=torch.float32).reshape(-1)
    else:
        weight_T = mask_BT.float().reshape(-1)

    # 1. One set: all tokens of the batch.
    if not by_sequence:
        return torch.zeros_like(ids_BT).reshape(-1), weight_T, 1

    # 2. A packed batch: count the starts of sequences up to each token. A row may begin inside a sequence.
    if mask_BT is None and inputs.get("position_ids") is not None:
        starts_BT = inputs["position_ids"] == 0
        starts_BT[:, 0] = True
        set_T = starts_BT.reshape(-1).cumsum(0) - 1
        return set_T, weight_T, int(set_T[-1]) + 1

    # 3. A padded batch: the row of each token.
    rows, length = ids_BT.shape
    set_T = torch.arange(rows, device=ids_BT.device).repeat_interleave(length)
    return set_T, weight_T, rows


class AuxLoss:
    """The balance terms of one training run; an observer of :class:`~moe_models.routing.tap.RouterTap`.

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
        here: range | None = None,
        training: bool = True,
    ) -> None:
        """Begin a run.

        Args:
            experts: number of experts of each MoE layer.
            score_func: ``softmax`` or ``sigmoid``, see :func:`~moe_models.routing.tap.scores`.
            scope: ``micro_batch``, ``sequence`` or ``global_batch``.
            per_layer: see :func:`load_balancing_loss`.
            group: the data-parallel process group; None for all ranks.
            peers: the SP group, or None without sequence parallelism.
            here: the MoE layers of this rank's pipeline stage; None for all.
            training: whether it keeps the passes of training, or those of evaluation.
        """
        self._experts = experts
        self._here = range(len(experts)) if here is None else here
        self._training = training
        self._score_func = score_func
        self._scope = scope
        self._per_layer = per_layer
        self._group = group
        self._peers = peers
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # layer -> (logits [T, E], choices [T, K])
        self.new_step()

    def new_step(self) -> None:
        """A new optimizer step begins: forget the frequencies of its predecessor."""
        self._step_counts_LE: torch.Tensor | float = 0.0
        self._step_tokens: torch.Tensor | float = 0.0

    def observe(
        self, layer: int, training: bool, logits_TE: torch.Tensor, choices_TK: torch.Tensor, counted_2E: Any = None
    ) -> None:
        """Keep one layer of the forward pass in progress."""
        if training == self._training:
            self._seen[layer] = (logits_TE, choices_TK)

    def terms(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``aux_loss`` and ``z_loss`` of the forward pass that just ended, both scalars with gradient.

        Collective in scope ``global_batch`` and with sequence parallelism. Raises RuntimeError if a layer did not
        report, or if no gradient can flow.
        """
        # 1. What the tap handed over, in layer order.
        routed = self._take_seen()

        # 2. Per token set, layer and expert: choices (no gradient) and sums of probabilities (with gradient).
        set_T, weight_T, S = token_sets(inputs, self._scope == "sequence")
        counts = []
        sums = []
        for logits_TE, choices_TK in routed:
            counts_SE, sums_SE = self._count(logits_TE, choices_TK, set_T, weight_T, S)
            counts.append(counts_SE)
            sums.append(sums_SE)
        counts_SLE = torch.stack(counts, 1)
        sums_SLE = torch.stack(sums, 1)
        tokens_S = torch.zeros(S, device=weight_T.device).index_add(0, set_T, weight_T)

        # 3. Sequence parallelism: choices and tokens of the whole sequences, in one all-reduce. The sums stay this
        # rank's own share.
        if self._peers is not None:
            packed = torch.cat([counts_SLE.reshape(-1), tokens_S])
            dist.all_reduce(packed, group=self._peers)
            counts_SLE = packed[:-S].view_as(counts_SLE)
            tokens_S = packed[-S:]

        # 4. The losses.
        if self._scope == "global_batch":
            aux_loss = self._global(counts_SLE, sums_SLE, tokens_S)
        else:
            aux_loss = load_balancing_loss(counts_SLE, sums_SLE, tokens_S, self._per_layer, self._experts)
        logits_LTE = [logits_TE for logits_TE, _ in routed]
        return {"aux_loss": aux_loss, "z_loss": z_loss(logits_LTE, weight_T, tokens_S.sum())}

    def carried(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """This stage's sums of the forward pass that just ended: what the next stage gets, [S, L, 2E + 1] in fp32.

        Of each MoE layer: how often each expert was chosen, the sums of their probabilities (with gradient) and the sum
        of logsumexp(logits)^2. Other stages' layers are 0, so that stages are added up.
        """
        # 1. One row for each layer of this stage.
        set_T, weight_T, S = token_sets(inputs, self._scope == "sequence")
        rows = []
        for logits_TE, choices_TK in self._take_seen():
            counts_SE, sums_SE = self._count(logits_TE, choices_TK, set_T, weight_T, S)
            squared_T = logits_TE.float().logsumexp(-1) ** 2 * weight_T
            squared_S = torch.zeros(S, device=weight_T.device).index_add(0, set_T, squared_T)
            rows.append(torch.cat([counts_SE, sums_SE, squared_S[:, None]], dim=-1))
        # 2. Their places among all layers.
        before = self._here.start
        after = len(self._experts) - self._here.stop
        return pad(torch.stack(rows, 1), (0, 0, before, after))

    def terms_of_stages(self, inputs: Mapping[str, Any], arrived: torch.Tensor) -> dict[str, torch.Tensor]:
        """:meth:`terms` on the last stage of a pipeline; ``arrived`` is the sum of the other stages' :meth:`carried`.

        Collective in scope ``global_batch``.
        """
        # 1. The sums of all layers.
        E = max(self._experts)
        both = arrived + self.carried(inputs)
        counts_SLE = both[..., :E].detach()
        sums_SLE = both[..., E : 2 * E]
        squared_SL = both[..., 2 * E]
        set_T, weight_T, S = token_sets(inputs, self._scope == "sequence")
        tokens_S = torch.zeros(S, device=weight_T.device).index_add(0, set_T, weight_T)
        # 2. The losses, as without stages.
        if self._scope == "global_batch":
            aux_loss = self._global(counts_SLE, sums_SLE, tokens_S)
        else:
            aux_loss = load_balancing_loss(counts_SLE, sums_SLE, tokens_S, self._per_layer, self._experts)
        return {"aux_loss": aux_loss, "z_loss": squared_SL.sum(0).mean() / tokens_S.sum().clamp_min(1.0)}

    def _take_seen(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(logits, choices) of every layer, in order; forgets them."""
        if sorted(self._seen) != list(self._here):
            L = len(self._here)
            raise RuntimeError(f"router logits of layers {sorted(self._seen)} arrived, the model has {L} MoE layers")
        routed = [self._seen[layer] for layer in self._here]
        self._seen.clear()
        if self._training and not any(logits_TE.requires_grad for logits_TE, _ in routed):
            raise RuntimeError(
                "the router logits carry no gradient, so no balancing loss can act; with gradient checkpointing set "
                "--gradient_checkpointing_kwargs '{\"use_reentrant\": false}'"
            )
        return routed

    def _count(
        self, logits_TE: torch.Tensor, choices_TK: torch.Tensor, set_T: torch.Tensor, weight_T: torch.Tensor, S: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(how often each expert was chosen, sum of its probabilities) of one layer, both [S, E] and without padding.

        E is that of the widest layer: the layers of a pyramid get columns of zeros, so that they can be stacked.
        """
        layer_E = logits_TE.shape[1]
        missing_columns = (0, max(self._experts) - layer_E)
        zeros_SE = torch.zeros(S, layer_E, device=logits_TE.device)
        with torch.no_grad():
            chosen_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter_(1, choices_TK.long(), 1.0)
            counts_SE = zeros_SE.index_add(0, set_T, chosen_TE * weight_T[:, None])
        probabilities_TE = scores(logits_TE, self._score_func) * weight_T[:, None]
        sums_SE = zeros_SE.index_add(0, set_T, probabilities_TE)
        return pad(counts_SE, missing_columns), pad(sums_SE, missing_columns)

    def _global(self, counts_1LE: torch.Tensor, sums_1LE: torch.Tensor, tokens_1: torch.Tensor) -> torch.Tensor:
        """This rank's ``aux_loss`` in scope ``global_batch``; the mean over ranks is that of the whole batch."""
        # 1. Choices and tokens of this micro-batch on all ranks, in one all-reduce.
        counts_LE = counts_1LE[0]
        tokens = tokens_1[0]
        world = 1
        if dist.is_initialized():
            packed = torch.cat([counts_LE.reshape(-1), tokens_1])
            dist.all_reduce(packed, group=self._group)
            counts_LE = packed[:-1].view_as(counts_LE)
            tokens = packed[-1]
            world = dist.get_world_size(self._group)

        # 2. f over the micro-batches of this optimizer step so far.
        self._step_counts_LE = self._step_counts_LE + counts_LE
        self._step_tokens = self._step_tokens + tokens
        f_LE = self._step_counts_LE / self._step_tokens

        # 3. P over this micro-batch of all ranks: W times this rank's share, divided by the tokens of all. As
        # load_balancing_loss divides counts by tokens too, it gets f * tokens. (SP peers counted their tokens together:
        # `tokens` is SP times too large, which makes the factor W / SP, and the shares of peers are summed.)
        counts_1LE = (f_LE * tokens)[None]
        return load_balancing_loss(counts_1LE, world * sums_1LE, tokens[None], self._per_layer, self._experts)
