"""One thing that is planned: a model under a ds_config, on so many ranks, with so much work in a step. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log, sqrt
from typing import Any, Literal

from moe_models.config.ds_config import DsConfig
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.families.adapters import AdapterSizes
from moe_models.families.model import Model
from moe_models.families.sizes import ModelSizes
from moe_models.planner.zero_states import ZeroStates

Loss = Literal["chunked", "full"]
"""How the loss is taken: TRL's fused head, or all logits at once as the model's own ``loss``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One layout with one batch. The device that it is planned for is an argument of what needs one.

    :meth:`of` fills in what follows from the rest. ``dataclasses.replace(case, work=...)`` is the same layout with
    another batch, which shares ``states``.
    """

    ds: DsConfig
    """Which kinds of parallelism, which ZeRO stage, which switches."""
    model: Model
    """What is trained."""
    layout: Layout
    """Which rank does what."""
    states: ZeroStates
    """What ZeRO keeps of one rank's parameters."""
    work: Work
    """What one rank computes in one optimizer step."""
    gpus_per_node: int
    """Neighbouring ranks that share a node; as many as there are ranks for one node."""
    skew: float = 1.0
    """Rows of the fullest expert over the mean, as a run logs them; 1 is even routing."""
    liger: bool = False
    """Whether Liger's kernels replace the eager ones."""
    loss: Loss = "chunked"
    """As TRL's trainer takes it ("chunked"), or a loop that takes the model's own loss ("full")."""
    safetensors: bool = True
    """Whether the model's files are safetensors, of which a rank can read a part."""
    one_pass_norm: bool = True
    """MoETrainer's gradient norm under ZeRO 1 and 2 (``engine/grad_norm.py``); False for DeepSpeed's own."""
    adapter: AdapterSizes | None = None
    """What is trained instead of all weights; the model is frozen then."""
    part: ModelSizes | None = None
    """The sizes of one pipeline stage, of which this is the case; ``layout`` is that of its ranks then."""
    stages: int = 1
    """Stages of the pipeline that it is a stage of."""
    in_flight: int = 1
    """Micro-batches whose activations are there together: more than one on the early stages of a pipeline."""

    @classmethod
    def of(cls, ds: DsConfig, model: Model, world_size: int, work: Work, gpus_per_node: int, **more: Any) -> Case:
        """A case with its layout and states. ``more`` are the fields that have defaults.

        Raises UserError for a model without known sizes and for sizes of groups that do not fit.
        """
        layout = ds.layout(world_size)
        states = ZeroStates(ds=ds, sizes=model.sizes, layout=layout)
        return cls(
            ds=ds,
            model=model,
            layout=layout,
            states=states,
            work=work,
            gpus_per_node=gpus_per_node,
            **more,
        )

    @property
    def sizes(self) -> ModelSizes:
        """The sizes of the model, or of the stage of it."""
        return self.model.sizes if self.part is None else self.part

    @cached_property
    def trained(self) -> ZeroStates:
        """What ZeRO keeps of what one rank trains: of its parameters, or of its adapter."""
        if self.adapter is None:
            return self.states
        return ZeroStates(ds=self.ds, sizes=self.sizes, layout=self.layout, adapter=self.adapter)

    @property
    def spread(self) -> bool:
        """Whether AutoEP or native layers spread the experts; else every rank has them all."""
        return self.ds.spreads_experts

    @property
    def tokens(self) -> int:
        """Tokens T that one rank has in one forward pass: sequence-parallel peers have a part of a sequence each."""
        return self.work.micro_batch * self.work.length // self.layout.sp_size

    @property
    def rows(self) -> int:
        """Routed rows [D] of one rank in one MoE layer, evenly routed: T x K, divided among tensor-parallel peers."""
        return self.tokens * self.sizes.top_k // self.layout.tp_size

    @property
    def fullest_rank(self) -> float:
        """Rows that the experts of the fullest EP rank get over the mean."""
        if not self.spread:
            return 1.0
        return rank_load(self.skew, self.sizes.num_experts, self.layout.ep_size)

    def zero_number(self, key: str, *, default: int, auto: int) -> int:
        """A number of ``zero_optimization``; ``auto`` is what the HF Trainer writes for "auto"."""
        value = self.ds.zero(key, default)
        return auto if value == "auto" else int(value)

    @property
    def tiled_loss(self) -> bool:
        """Whether the loss is taken tile by tile, so that the logits of all tokens never exist together."""
        return self.loss == "chunked" or self.liger


def rank_load(skew: float, num_experts: int, ep_size: int) -> float:
    """Rows of the fullest EP rank over the mean, where the fullest of all experts has ``skew`` times the mean.

    EP = 1 is even: the rank has all experts. EP = E is ``skew``: the rank has one. Between them experts are taken to
    vary independently, with n experts in all and E/EP of them on a rank.
    """
    if ep_size == 1 or num_experts == 1:
        return 1.0
    # 1. The largest of n independent deviations is about sqrt(2 ln n) standard deviations.
    fewer = sqrt(log(ep_size) / log(num_experts))
    # 2. The mean of the experts of one rank deviates 1/sqrt(experts) as much as one expert.
    averaged = sqrt(num_experts / ep_size)
    return 1 + (skew - 1) * (fewer / averaged)
