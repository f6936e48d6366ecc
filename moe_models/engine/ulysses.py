"""Ulysses sequence parallelism at run time: every rank of a group takes its part of each sequence.

The ranks of an SP group read the same rows. Each keeps its run of tokens through embeddings, routers, experts and loss.
Inside attention, queries, keys and values are exchanged (DeepSpeed's ``UlyssesSPAttentionHF``, arXiv 2309.14509), so
that a rank has the whole sequence for its share of the heads. Evaluation and generation are not split: there each rank
attends alone.

DeepSpeed 0.19.8 sums gradients over SP and averages them over DP, so each rank must return only its share of the loss:
the sum over its own tokens, divided by the token count of the whole group. transformers 5.20.2 hands every rank the
whole loss instead, through a differentiable all-gather, and gradients come out SP times too large: a norm of 12.06
instead of 6.03 on the tiny Mixtral at SP 2, and clipping to match. TRL 1.16 takes that path too; it is not taken here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad

IGNORED = -100
"""Label of a token that is no target."""


class Ulysses:
    """Sequence parallelism over ``size`` neighbouring ranks, switched on for ``model`` and for the rest of the process.

    Create it before ``deepspeed.initialize`` and before a data loader is prepared; the process group must exist.

    Args:
        model: the Hugging Face model; its attention is replaced in training.
        size: ranks of one group (SP).
        micro_batch: rows of a training batch.
        accelerator: the Trainer's; it learns that the ranks of a group read the same rows.

    Raises:
        ValueError: for a kind of attention that cannot be split.
    """

    def __init__(self, model: Any, size: int, micro_batch: int, accelerator: Any) -> None:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp

        kind = model.config._attn_implementation
        if kind in ("eager", "flex_attention"):
            raise ValueError(
                f"attn_implementation = {kind}: not with sequence parallelism; use sdpa or flash attention"
            )
        if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
            parallel_state_sp.initialize_sequence_parallel(size)
        self.size = size
        self.group = parallel_state_sp.get_sequence_parallel_group()
        self._rank = dist.get_rank(self.group)
        share_the_groups(size, accelerator)
        exchange_in_attention(model, kind, micro_batch, self.group)
        model.register_forward_pre_hook(without_mask, with_kwargs=True)

    def shard(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """This rank's run of tokens of a padded training batch [B, S]; S is padded to a multiple of the group."""
        # 1. The whole batch, padded so that it can be cut into equal runs.
        ids_BS = inputs["input_ids"]
        batch, length = ids_BS.shape
        missing = -length % self.size
        mask_BS = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_BS)
        positions_BS = torch.arange(length + missing, device=ids_BS.device).expand(batch, -1)

        # 2. Labels are shifted before they are cut: the target of a rank's last token is its neighbour's first.
        shifted_BS = pad(inputs["labels"][:, 1:], (0, 1 + missing), value=IGNORED)

        # 3. This rank's run of each.
        whole = {
            "input_ids": pad(ids_BS, (0, missing)),
            "attention_mask": pad(mask_BS, (0, missing)),
            "position_ids": positions_BS,
            "shift_labels": shifted_BS,
        }
        return {name: x_BS.chunk(self.size, dim=1)[self._rank].contiguous() for name, x_BS in whole.items()}


def share_the_groups(size: int, accelerator: Any) -> None:
    """Tell DeepSpeed, accelerate and transformers which ranks work on the same sequence."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from torch.distributed.device_mesh import init_device_mesh

    # upstream: deepspeed 0.19.8: AutoEP takes an mpu that deepspeed.initialize is given, as accelerate gives it, for
    # tensor parallelism, and refuses. Where an engine has no mpu of its own, DeepSpeed asks this one for SP alone.
    # Remove when: AutoEP accepts an mpu with sequence parallelism only.
    groups.mpu = parallel_state_sp

    # upstream: accelerate 1.15.0: the mesh axis "tp" is its only name for ranks that read the same rows.
    # Remove when: its data loaders take the axis "sp" for DeepSpeed, too.
    mesh = init_device_mesh(accelerator.device.type, (size,), mesh_dim_names=("tp",))
    accelerator.state.ds_device_mesh = mesh

    # upstream: transformers 5.20.2: fills in a train_batch_size that counts the ranks of a group as if they read
    # different rows. DeepSpeed computes the right one. Remove when: transformers divides by the group's size.
    accelerator.state.deepspeed_plugin.deepspeed_config.pop("train_batch_size", None)


def exchange_in_attention(model: Any, kind: str, micro_batch: int, group: Any) -> None:
    """Replace transformers' attention function ``kind`` by one that has the whole sequence in training."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config
    heads = config.num_attention_heads
    alone = ALL_ATTENTION_FUNCTIONS[kind]
    alone = getattr(alone, "alone", alone)  # an earlier model of this process has replaced it
    together = UlyssesSPAttentionHF(
        attn=alone,
        batch_size=micro_batch,
        attn_head_count=heads,
        attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        kv_head_count=config.num_key_value_heads,
        num_hidden_layers=config.num_hidden_layers,
        process_group=group,
        seq_length_is_variable=True,
    )

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        if not module.training:
            return alone(module, query, key, value, mask, *args, **kwargs)
        # upstream: deepspeed 0.19.8: with fewer key-value heads than ranks it repeats them and leaves another
        # num_key_value_groups on the module, which evaluation would read. Remove when: it restores the number.
        repeats = getattr(module, "num_key_value_groups", 1)
        try:
            return together(module, query, key, value, None, *args, **kwargs)
        finally:
            module.num_key_value_groups = repeats

    attend.alone = alone  # type: ignore[attr-defined]
    # upstream: transformers 5.20.2: models look their attention up in this table, by kind, at every call.
    # Remove when: one model can be given an attention function of its own.
    ALL_ATTENTION_FUNCTIONS[kind] = attend


def without_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook: in training no mask is built, which would be quadratic and of this rank's tokens only.

    Rows are padded on the right, where no token that counts can see it.
    """
    if not model.training:
        return None
    return args, {**kwargs, "attention_mask": None}
