"""What accelerate, transformers and DeepSpeed keep of an engine in their globals; for a process that builds several."""

from __future__ import annotations

import os
import sys


def forget_engines() -> None:
    """Forget their notes of the last engine, its tensor and sequence parallelism too; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in [name for name in os.environ if name.startswith("ACCELERATE_DYNAMO")]:  # left by --torch_compile
        del os.environ[name]
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    # An engine with tensor parallelism leaves itself in these, and the next engine would be one too.
    if "deepspeed" in sys.modules:
        from deepspeed.module_inject.layers import set_autotp_mode
        from deepspeed.runtime.sequence_parallel import parallel_state_sp
        from deepspeed.runtime.tensor_parallel import init_utils
        from deepspeed.utils import groups

        init_utils._TP_MODEL_INIT_ARGS = None
        set_autotp_mode(training=False)
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device"):
            setattr(groups, name, None)
        groups.mpu = None
        parallel_state_sp._release_sequence_parallel_groups()
        for kind, attend in list(ALL_ATTENTION_FUNCTIONS.items()):
            ALL_ATTENTION_FUNCTIONS[kind] = getattr(attend, "alone", attend)
