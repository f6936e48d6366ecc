"""What accelerate, transformers and DeepSpeed keep of an engine in their globals; for a process that builds several."""

from __future__ import annotations

import sys


def forget_engines() -> None:
    """Forget their notes of the last engine; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    unset_hf_deepspeed_config()
    # An engine with tensor parallelism leaves itself in these, and the next engine would be one too.
    if "deepspeed" in sys.modules:
        from deepspeed.module_inject.layers import set_autotp_mode
        from deepspeed.runtime.tensor_parallel import init_utils
        from deepspeed.utils import groups

        init_utils._TP_MODEL_INIT_ARGS = None
        set_autotp_mode(training=False)
        for name in ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP", "mesh_device"):
            setattr(groups, name, None)
        groups.mpu = None
