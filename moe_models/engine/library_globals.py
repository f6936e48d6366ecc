"""What accelerate, transformers and DeepSpeed keep of an engine in their globals; for a process that builds several."""

from __future__ import annotations

import os
import sys

_GROUPS = ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device")
"""Globals of ``deepspeed.utils.groups`` that an engine with tensor parallelism sets."""

_EXPERT_GROUPS = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)
"""Those that have the groups of experts, by the name of their size."""


_stages = 1
"""Stages of the grid that DeepSpeed's groups of experts are of."""


# upstream: deepspeed 0.19.8: it keeps the groups of an EP size for the next engine, which may have another number of
# pipeline stages: gradients of experts would be averaged over the wrong ranks (the norm was 0.13% off).
# Remove when: the groups are kept by their ranks, or go with their engine.
def expert_groups_of(stages: int) -> None:
    """Call it before an engine of ``stages`` is built: groups of experts of another grid are forgotten."""
    global _stages
    if stages == _stages:
        return
    _stages = stages
    from deepspeed.utils import groups

    for name in _EXPERT_GROUPS:
        getattr(groups, name).clear()


# upstream: accelerate 1.15.0, transformers 5.20.2, deepspeed 0.19.8: an engine leaves its settings in globals of the
# process, destroy() does not take them back, and the next engine inherits them.
# Remove when: the libraries clear them with the engine.
def forget_engines() -> None:
    """Forget the last engine, its tensor and sequence parallelism too; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # 1. accelerate, and what --torch_compile left in the environment for it.
    for name in list(os.environ):
        if name.startswith("ACCELERATE_DYNAMO"):
            del os.environ[name]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()

    # 2. transformers.
    unset_hf_deepspeed_config()

    # 3. DeepSpeed: tensor and sequence parallelism, and the attention that Ulysses replaced.
    if "deepspeed" in sys.modules:
        from deepspeed.module_inject.layers import set_autotp_mode
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.tensor_parallel import init_utils
        from deepspeed.utils import groups

        init_utils._TP_MODEL_INIT_ARGS = None
        set_autotp_mode(training=False)
        for name in _GROUPS:
            setattr(groups, name, None)
        groups.mpu = None
        parallel_state_sp._release_sequence_parallel_groups()
        for kind, attend in list(ALL_ATTENTION_FUNCTIONS.items()):
            ALL_ATTENTION_FUNCTIONS[kind] = getattr(attend, "alone", attend)
