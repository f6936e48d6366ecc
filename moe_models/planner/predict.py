"""Peak memory and step time of one layout on one kind of GPU, before anything runs. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.errors import UserError
from moe_models.families.flops import train_flops
from moe_models.families.sizes import model_sizes
from moe_models.planner.devices import Device
from moe_models.planner.memory import Loss, Memory, host_bytes, memory_moments
from moe_models.planner.step_time import StepTime, step_time
from moe_models.planner.zero_states import StateBytes

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one GPU is expected to do in one optimizer step."""

    memory: Memory
    time: StepTime
    tokens: int
    """Of the step, for each GPU (sequence and tensor-parallel peers share theirs)."""
    flops: float
    """That the mathematics of these tokens asks for."""
    host: int
    """Bytes of host memory for each GPU."""
    device: Device

    @property
    def fits(self) -> bool:
        """Whether the memory it needs is there."""
        return self.memory.needed <= self.device.usable_gib * GIB

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second and GPU."""
        return self.tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOP utilisation against the device's matmul rate (not against its data sheet)."""
        return self.flops / self.time.total / (self.device.matmul_tflops * 1e12)


def predict(
    config: Mapping[str, Any],
    ds: DsConfig,
    world_size: int,
    gpus_per_node: int,
    work: Work,
    device: Device,
    *,
    skew: float = 1.3,
    liger: bool = False,
    loss: Loss = "chunked",
    one_pass_norm: bool = True,
    states: StateBytes | None = None,
) -> Prediction:
    """Memory and time of a model (its ``config.json``) in a layout.

    ``skew``: tokens of the fullest expert over the mean, as a run logs them. ``loss``: "chunked" for TRL's trainer,
    "full" for a loop that takes the model's own loss. ``one_pass_norm``: MoETrainer's under ZeRO 1 and 2; False for
    DeepSpeed's own. ``states``: those of the layout, where many batches are compared.

    Raises UserError for a model without known sizes, for native layers, and for fp32 or fp16.
    """
    if ds.moe.layer is not None:
        raise UserError("moe.layer: there is no prediction for native layers; use expert_parallel")
    if ds.precision not in ("bf16", "auto"):
        raise UserError(f"precision {ds.precision}: predictions are for bf16; set bf16.enabled to true")
    layout = Layout(world_size, ds.ep_size, ds.tp_size, ds.sp_size)
    if states is None:
        states = StateBytes(ds, model_sizes(config), layout)
    moments = memory_moments(
        ds, states, layout, work, reserved_gib=device.reserved_gib, loss=loss, skew=skew, liger=liger
    )
    time = step_time(
        ds, states, layout, work, device, gpus_per_node,
        skew=skew, liger=liger, chunked=loss == "chunked", one_pass_norm=one_pass_norm,
    )  # fmt: skip
    tokens = work.micro_batch * work.length * work.accumulation // (ds.tp_size * ds.sp_size)
    return Prediction(
        memory=max(moments, key=lambda moment: moment.needed),
        time=time,
        tokens=tokens,
        flops=tokens * sum(train_flops(states.sizes, work.length)),
        host=host_bytes(ds, states),
        device=device,
    )
