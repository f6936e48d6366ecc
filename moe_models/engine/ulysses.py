"""Ulysses sequence parallelism at run time: every rank of a group takes its part of each sequence.

The ranks of an SP group read the same rows. Each keeps its run of tokens through embeddings, routers, experts and loss;
inside attention queries, keys and values are exchanged (DeepSpeed's ``UlyssesSPAttentionHF``), so that a rank has the
whole sequence for its share of the heads. Evaluation and generation are not split: there each rank attends alone.

DeepSpeed 0.19.8 sums gradients over SP and averages them over DP, so a loss that is to be right is this rank's own
share of it: the sum over its tokens, divided by the tokens of all. (transformers 5.20.2 hands every rank the whole loss
through a differentiable all-gather instead, and gradients come out SP times too large: a norm of 12.06 for 6.03 on the
tiny Mixtral at SP 2, and clipping to match. TRL 1.16 takes that path too; it is not taken here.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import pad
from trl import SFTTrainer

IGNORED = -100
"""Label of a token that is no target."""


class Ulysses:
    """Sequence parallelism over ``size`` neighbouring ranks, switched on for ``model`` and for the rest of the process.

    Call it before ``deepspeed.initialize`` and before a data loader is prepared; the process group must be there.
    """

    def __init__(self, model: Any, size: int, micro_batch: int, accelerator: Any) -> None:
        """``micro_batch`` is the number of rows of a training batch. Raises ValueError for other attention kinds."""
        import deepspeed.runtime.sequence_parallel.parallel_state_sp as sp_groups
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from deepspeed.utils import groups
        from torch.distributed.device_mesh import init_device_mesh
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        kind = model.config._attn_implementation
        if kind in ("eager", "flex_attention"):
            raise ValueError(
                f"attn_implementation = {kind}: not with sequence parallelism; use sdpa or flash attention"
            )
        if sp_groups._SEQUENCE_PARALLEL_GROUP is None:
            sp_groups.initialize_sequence_parallel(size)
        # Where the engine has no mpu of its own, DeepSpeed asks this one for SP, and takes tensor parallelism as off.
        # Given to deepspeed.initialize, as accelerate does, AutoEP would take its SP for tensor parallelism and refuse.
        groups.mpu = sp_groups
        self.size, self.group = size, sp_groups.get_sequence_parallel_group()
        self._rank = dist.get_rank(self.group)
        # accelerate's name for ranks that read the same rows
        mesh = init_device_mesh(accelerator.device.type, (size,), mesh_dim_names=("tp",))
        accelerator.state.ds_device_mesh = mesh
        # transformers fills in one that counts the ranks of a group as if they read different rows; DeepSpeed knows.
        accelerator.state.deepspeed_plugin.deepspeed_config.pop("train_batch_size", None)
        config = model.config
        heads = config.num_attention_heads
        core = getattr(ALL_ATTENTION_FUNCTIONS[kind], "alone", ALL_ATTENTION_FUNCTIONS[kind])
        together = UlyssesSPAttentionHF(
            attn=core,
            batch_size=micro_batch,
            attn_head_count=heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self.group,
            seq_length_is_variable=True,
        )

        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            if not module.training:
                return core(module, query, key, value, mask, *args, **kwargs)
            repeats = getattr(module, "num_key_value_groups", 1)
            try:  # fewer key-value heads than ranks: DeepSpeed repeats them and sets another number
                return together(module, query, key, value, None, *args, **kwargs)
            finally:
                module.num_key_value_groups = repeats

        attend.alone = core  # type: ignore[attr-defined]
        ALL_ATTENTION_FUNCTIONS[kind] = attend
        model.register_forward_pre_hook(without_mask, with_kwargs=True)

    def shard(self, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """This rank's run of tokens of a padded training batch [B, S]; S is padded to a multiple of the group.

        Labels are shifted before they are cut, because the target of a rank's last token is its neighbour's first.
        """
        ids_BS = inputs["input_ids"]
        missing = -ids_BS.shape[1] % self.size
        positions_BS = torch.arange(ids_BS.shape[1] + missing, device=ids_BS.device).expand(ids_BS.shape[0], -1)
        mask_BS = inputs["attention_mask"] if "attention_mask" in inputs else torch.ones_like(ids_BS)
        whole = {
            "input_ids": pad(ids_BS, (0, missing)),
            "attention_mask": pad(mask_BS, (0, missing)),
            "position_ids": positions_BS,
            "shift_labels": pad(inputs["labels"][:, 1:], (0, 1 + missing), value=IGNORED),
        }
        return {name: x_BS.chunk(self.size, dim=1)[self._rank].contiguous() for name, x_BS in whole.items()}


def without_mask(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook: in training no mask is built, which would be quadratic and of this rank's tokens only.

    Rows are padded on the right, where no token that counts can see it.
    """
    return (args, {**kwargs, "attention_mask": None}) if model.training else None


class UlyssesTrainer(SFTTrainer):
    """SFTTrainer that reads ``sequence_parallel_size`` from the ds_config; without the key it is SFTTrainer.

    The auxiliary loss is a function of all tokens of a sequence, so the training forward must not add TRL's: whoever
    takes another one sets ``aux_loss_in_evaluation`` to let evaluation, which is not split, keep it.
    """

    ulysses: Ulysses | None = None
    aux_loss_enabled: bool
    aux_loss_in_evaluation = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError for batches without padding, whose documents would attend to each other."""
        super().__init__(model, *args, **kwargs)
        config = self.args.hf_deepspeed_config.config if self.args.deepspeed else {}
        size = config.get("sequence_parallel_size", 1)
        if size > 1:
            if self.padding_free:
                raise ValueError("padding-free batches and packing by documents: not with sequence_parallel_size")
            self.ulysses = Ulysses(model, size, self.args.per_device_train_batch_size, self.accelerator)

    def get_tp_size(self) -> int:
        """Ranks that read the same rows, which is what transformers and TRL ask for: sequence-parallel peers too."""
        return int(super().get_tp_size()) * (self.ulysses.size if self.ulysses else 1)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        return self.ulysses.shard(prepared) if self.ulysses and self.model.training else prepared

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, in training this rank's share of it."""
        in_training = self.aux_loss_enabled
        self.aux_loss_enabled = in_training or (self.aux_loss_in_evaluation and not self.model.training)
        try:
            return super().compute_loss(*args, **kwargs)
        finally:
            self.aux_loss_enabled = in_training

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch; returns a loss whose mean over all ranks is the loss, for the log."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss * self.ulysses.size if self.ulysses else loss
