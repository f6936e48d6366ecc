"""The gradient norm by which DeepSpeed clips: all experts counted, and under ZeRO 1 and 2 taken in one pass.

deepspeed 0.19.8 (``DeepSpeedZeroOptimizer.scaled_global_norm``) copies each gradient to fp64 by itself, sums each of
its many parameter groups over the ranks on its own (those of experts twice), and leaves the norm on the GPU, where the
host asks for it in every group before that is updated. What that costs on GPUs: benchmarks/speed.md.
"""

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
    if optimizer.model_parallel_group is not None or "muon" in type(optimizer.optimizer).__name__.lower():
        return

    def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
        assert norm_type == 2, "only L2 norm supported"  # as in DeepSpeed
        # Every element lies on one rank of the data-parallel group: experts on the ranks that hold them, and of what
        # several ranks hold each its partition.
        groups = optimizer.averaged_gradients.values()
        gradients = [g for group in groups for g in group or [] if not getattr(g, "_zero_padding", False)]
        square = local_square(gradients, optimizer.device)
        dist.all_reduce(square, group=optimizer.dp_process_group)
        norm = square.sqrt().float().cpu()  # the one wait; from here on the host runs ahead of the GPU
        return norm if torch.isfinite(norm) else torch.tensor(float("inf"))

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
    """Make a ZeRO 1 or 2 optimizer count the gradients of all experts when it clips, under tensor parallelism.

    There DeepSpeed takes what AutoTP did not split from the first peer of each group only, because the others hold
    the same. Experts are not split, but an EP group runs over the peers and each holds other experts: deepspeed 0.19.8
    loses theirs (3.9% of the norm of the tiny Mixtral at TP 2 x EP 2), and clips too little.
    """
    original = optimizer.get_grad_norm_direct

    def get_grad_norm_direct(gradients: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        params, rank = list(params), optimizer.model_parallel_rank
        if params and not getattr(params[0], "allreduce", True):  # a group holds experts only, or none
            optimizer.model_parallel_rank = 0
        try:
            return original(gradients, params, *args, **kwargs)
        finally:
            optimizer.model_parallel_rank = rank

    optimizer.get_grad_norm_direct = get_grad_norm_direct
