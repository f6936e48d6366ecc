"""The gradient norm by which DeepSpeed clips: all experts counted, and under ZeRO 1 and 2 taken in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def norm_in_one_pass(optimizer: Any) -> None:
    """Let a ZeRO 1 or 2 optimizer take the norm of all gradients with one fused call, one sum over the ranks, one wait.

    Left as it is: any other optimizer (DeepSpeed takes ``BF16_Optimizer`` for ZeRO 1 with fp32 accumulation), offload
    to the CPU, tensor parallelism, and Muon, whose updates need another scale. All ranks decide alike.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload:
        return
    is_muon = "muon" in type(optimizer.optimizer).__name__.lower()
    if optimizer.model_parallel_group is not None or is_muon:
        return

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        assert norm_type == 2, "only L2 norm supported"  # as in DeepSpeed
        # 1. This rank's gradients. Every element is on one rank of the data-parallel group: experts on the ranks that
        #    hold them, and of what several ranks hold, each its partition.
        gradients = []
        for group in optimizer.averaged_gradients.values():
            for gradient in group or []:
                if not getattr(gradient, "_zero_padding", False):
                    gradients.append(gradient)

        # 2. One sum of squares here, one sum over the ranks.
        square = local_square(gradients, optimizer.device)
        dist.all_reduce(square, group=optimizer.dp_process_group)

        # 3. The one wait; from here on the host runs ahead of the GPU.
        norm = square.sqrt().float().cpu()
        return norm if torch.isfinite(norm) else torch.tensor(float("inf"))

    # upstream: deepspeed 0.19.8: scaled_global_norm copies each gradient to fp64 by itself, sums each of its many
    # parameter groups over the ranks on its own (those of experts twice), and leaves the norm on the GPU, where the
    # host asks for it in every group before that is updated. Cost on GPUs: benchmarks/speed.md.
    # Remove when: DeepSpeed takes the norm over all groups at once.
    optimizer.scaled_global_norm = scaled_global_norm


def norm_over_stages(optimizer: Any) -> None:
    """Let the ZeRO-1 optimizer of a pipeline take the norm over all stages with one sum over all ranks.

    Left as it is: any other optimizer (DeepSpeed's ``BF16_Optimizer``), and offload to the CPU. All ranks decide alike.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    is_muon = "muon" in type(optimizer.optimizer).__name__.lower()
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or is_muon:
        return

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        assert norm_type == 2, "only L2 norm supported"  # as in DeepSpeed
        # 1. This rank's gradients. Every element is on one rank of the world, but for a tied head's: that is on the
        #    first stage, too, and counts there.
        gradients = []
        for index, group in optimizer.averaged_gradients.items():
            real = [gradient for gradient in group or [] if not getattr(gradient, "_zero_padding", False)]
            for gradient, parameter in zip(real, optimizer.params_in_partition[index], strict=False):
                if not getattr(parameter, "ds_pipe_replicated", False):
                    gradients.append(gradient)

        # 2. One sum of squares here, one sum over all ranks.
        square = local_square(gradients, optimizer.device)
        dist.all_reduce(square)
        norm = square.sqrt().float().cpu()
        return norm if torch.isfinite(norm) else torch.tensor(float("inf"))

    # upstream: deepspeed 0.19.8: as above; and a stage with another number of parameter groups than its neighbours
    # would wait for sums that they do not make. Remove when: DeepSpeed takes the norm over all groups at once.
    optimizer.scaled_global_norm = scaled_global_norm


def local_square(gradients: list[torch.Tensor], device: Any) -> torch.Tensor:
    """The sum of squares of all elements, fp64 on ``device``.

    CUDA's fused kernels add up in a tree, for which fp32 is enough (1e-6); the CPU's adds up in a row and takes fp64.
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    dtype = torch.float32 if gradients[0].is_cuda else torch.float64
    norms = torch._foreach_norm(gradients, 2, dtype=dtype)
    return torch.stack(norms).double().square().sum()


def count_every_expert_in_the_norm(optimizer: Any) -> None:
    """Make a ZeRO 1 or 2 optimizer count the gradients of all experts when it clips, under tensor parallelism."""
    original = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        params = list(params)
        rank = optimizer.model_parallel_rank
        holds_experts = bool(params) and not getattr(params[0], "allreduce", True)  # experts only, or none
        if holds_experts:
            optimizer.model_parallel_rank = 0
        try:
            return original(gradients, params, *args, **kwargs)
        finally:
            optimizer.model_parallel_rank = rank

    # upstream: deepspeed 0.19.8: what AutoTP did not split is counted from the first peer of each group only, because
    # the others hold the same. Experts are not split, but an EP group runs over the peers and each holds other experts:
    # theirs are lost (3.9% of the norm of the tiny Mixtral at TP 2 x EP 2), and clipping is too weak.
    # Remove when: get_grad_norm_direct counts expert groups on every peer.
    optimizer.get_grad_norm_direct = get_grad_norm_direct
