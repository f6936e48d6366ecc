"""``--torch_compile``: where it is refused. Where it keeps the function is measured in
``tests/training/test_compile.py``."""

from __future__ import annotations

from collections.abc import Iterator

from moe_models.config.ds_config import DsConfig


def compile_problems(ds: DsConfig, torch_compile: bool, liger: bool = False) -> Iterator[str]:
    """What ``--torch_compile`` cannot do with this ds_config or with Liger's kernels.

    Also what ``"compile": {"autoep_non_moe": true}`` cannot do without the flag.
    """
    around = ds.compiles_around_experts
    if around and not torch_compile:
        yield "compile.autoep_non_moe = true: does nothing without --torch_compile; add the flag, or remove the key"
    if around and ds.expert_parallel is None:
        yield "compile.autoep_non_moe = true: there are no AutoEP layers without expert_parallel; remove the key"
    if not torch_compile:
        return
    if liger:
        yield (
            "--torch_compile with --use_liger_kernel: the compiler gets the shapes of Liger's norms wrong, and the "
            "first forward pass fails (liger-kernel 0.8.5, torch 2.11); drop one of them"
        )
    if ds.zero_stage == 3:
        yield (
            "--torch_compile with ZeRO stage 3: weights are freed while the compiled backward pass still holds them, "
            "and it fails; use stage 1 or 2, or drop --torch_compile"
        )
    elif ds.expert_parallel is not None and not around:
        yield (
            "--torch_compile with expert_parallel: the experts' grouped product cannot be traced on CPU processes, and "
            'nobody has tried it on GPUs here; set "compile": {"autoep_non_moe": true}, by which DeepSpeed compiles '
            "what is around the MoE layers, or drop --torch_compile"
        )
