"""One view of an MoE block, whatever holds its experts: DeepSpeed's AutoEP, a native layer or Hugging Face's own class.

:func:`find_blocks` looks at a model and returns its blocks in layer order. What differs between the three kinds is in
here and nowhere else: where the experts are, what their parameters are called, how they are spread over ranks, where
the router is and in which order it says what it decided. The four layouts of an expert's weight are described in
``moe_models/families/table.py``.

A new kind of block is one more class that fits :class:`Block` and one more entry of ``_KINDS``. This module imports no
DeepSpeed, so that a model of plain Hugging Face blocks needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import torch.distributed as dist
from torch import nn

from moe_models.families.table import AUTOEP_EXPERT_NAMES, EXPERT_PROJECTIONS, NATIVE_EXPERTS

Kind = Literal["autoep", "native", "plain"]
"""What holds a block's experts."""


class RoutingObserver(Protocol):
    """What :meth:`Block.watch` calls once for each forward pass that counts."""

    def __call__(
        self, logits_TE: torch.Tensor, choices_TK: torch.Tensor, counted_2E: torch.Tensor | None = None
    ) -> None:
        """Raw router logits (part of the autograd graph), and the experts that each token was sent to.

        A native layer may choose with noise and drop: there ``choices_TK`` are those without noise, and ``counted_2E``
        says how often each expert was chosen, and how many of these choices were dropped.
        """


@dataclass(frozen=True)
class ExpertParameter:
    """One parameter of a block that holds expert weights, and what it is made of."""

    name: str
    """Its name in the model."""
    projections: tuple[str, ...]
    """``("gate",)``, or ``("gate", "up")`` where both are one tensor, gate rows first."""
    experts: range
    """Which of the block's E experts it holds."""
    stacked: bool = True
    """Whether its first dimension counts experts. Otherwise it is the matrix of a single one."""

    def build(self, read: Callable[[str, int], torch.Tensor]) -> torch.Tensor:
        """The parameter's value, from ``read(projection, expert)``: [F, D] for gate and up, [D, F] for down."""
        stacks = [torch.stack([read(projection, expert) for expert in self.experts]) for projection in self.projections]
        whole = stacks[0]
        if len(stacks) == 2:
            whole = fuse_gate_up(*stacks)
        if self.stacked:
            return whole
        return whole[0]


class Block(Protocol):
    """One MoE block of a model, as this rank sees it."""

    kind: ClassVar[Kind]

    @property
    def path(self) -> str:
        """Module path, e.g. ``model.layers.3.mlp``."""

    @property
    def module(self) -> Any:
        """The block itself."""

    @property
    def router(self) -> Any:
        """The module that computes router logits, a part of the block."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def local(self) -> range:
        """The experts that this rank holds, E_local of E."""

    @property
    def ep_size(self) -> int:
        """Ranks that hold one copy of the experts together."""

    @property
    def ep_group(self) -> Any:
        """The process group of these ranks; None where one rank holds all experts."""

    def experts(self, projection: str) -> torch.Tensor:
        """This rank's experts stacked, detached: [E_local, F, D] (gate, up) or [E_local, D, F] (down).

        Under ZeRO-3 the parameters that :func:`parameter_names` lists must be gathered meanwhile.
        """

    def parameters(self) -> list[ExpertParameter]:
        """The parameters that hold this rank's experts."""

    def watch(self, counts: Callable[[], bool], report: RoutingObserver) -> list[Any]:
        """Hooks that call ``report`` for each forward pass in which ``counts()``; returns their handles."""

    def set_bias(self, bias_E: torch.Tensor | None) -> None:
        """Let the router choose with this selection bias. Raises ValueError if it has no place for one."""


def hf_model(model: Any) -> Any:
    """The Hugging Face model: inside the wrapper of an adapter (PEFT), or ``model`` itself."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def find_blocks(model: nn.Module) -> list[Block]:
    """The MoE blocks of ``model`` in layer order, by their paths in the Hugging Face model.

    Call it after ``deepspeed.initialize``: before, the process groups of expert parallelism are not known.
    """
    blocks: list[Block] = []
    for path, module in hf_model(model).named_modules():
        for kind in _KINDS:
            if kind.matches(module):
                blocks.append(kind.of(path, module))
                break
    return blocks


def parameter_names(block: Block, projection: str) -> list[str]:
    """The names of the parameters that hold this rank's experts for one projection."""
    return [parameter.name for parameter in block.parameters() if projection in parameter.projections]


def own_bias(block: Block) -> torch.Tensor | None:
    """The selection bias that is part of the model itself, [E]; None where its architecture has none."""
    place = _place_of_bias(block)
    if place is None:
        return None
    owner, name = place
    bias: torch.Tensor = getattr(owner, name)
    return bias


def _place_of_bias(block: Block) -> tuple[Any, str] | None:
    """(the module that has it, its name there) of a block's own selection bias."""
    places = [(block.router, OWN_BIAS)]
    if block.kind == "plain":
        places += [(block.module, name) for name in (OWN_BIAS, *OTHER_BIASES)]
    for owner, name in places:
        if getattr(owner, name, None) is not None:
            return owner, name
    return None


# ------------------------------------------------------------------------------------ names and fused pairs, once


OWN_BIAS = "e_score_correction_bias"
"""What DeepSeek-V3's router calls its selection bias, in Hugging Face's class and in AutoEP's. MiniMax-M2 has it
under the same name in its block."""

OTHER_BIASES = ("expert_bias",)
"""What blocks of other classes call it (LFM2)."""

_PLAIN_EXPERTS = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


def autoep_parameter(path: str, projection: str) -> str:
    """Name of AutoEP's stacked weight for one projection."""
    return f"{path}.experts.{AUTOEP_EXPERT_NAMES[projection]}"


def native_parameter(path: str, expert: int, projection: str) -> str:
    """Name of one native expert's weight; ``expert`` counts the experts of its rank."""
    return f"{path}.{NATIVE_EXPERTS}.{expert}.{projection}_proj.weight"


def plain_parameter(path: str, projection: str, inside: str = "") -> str:
    """Name of Hugging Face's own tensor that holds one projection of all experts; gate and up share one.

    ``inside`` is the path from an adapter's wrapper around the experts to the experts.
    """
    return f"{path}.experts{inside}.{_PLAIN_EXPERTS[projection]}"


def _unwrapped(experts: Any) -> tuple[Any, str]:
    """Hugging Face's experts inside the wrappers of an adapter (PEFT), and the path to them."""
    inside = ""
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
        inside += ".base_layer"
    return experts, inside


def fuse_gate_up(gate_FD: torch.Tensor, up_FD: torch.Tensor) -> torch.Tensor:
    """[..., F, D] twice -> [..., 2F, D], gate rows first, as Hugging Face keeps them."""
    return torch.cat([gate_FD, up_FD], dim=-2)


def split_gate_up(gate_up_2FD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., 2F, D] -> gate and up, each [..., F, D]; views."""
    gate_FD, up_FD = gate_up_2FD.chunk(2, dim=-2)
    return gate_FD, up_FD


def take_projection(fused: torch.Tensor, projection: str) -> torch.Tensor:
    """One projection out of the tensor that :func:`plain_parameter` names; a view."""
    if projection == "down":
        return fused
    gate_FD, up_FD = split_gate_up(fused)
    if projection == "gate":
        return gate_FD
    return up_FD


def plain_routing(output: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [T, E], weights [T, K], choices [T, K]) that a Hugging Face router returned: so, or the other way round
    (GraniteMoE)."""
    first, weights_TK, last = output
    if first.is_floating_point():
        return first, weights_TK, last
    return last, weights_TK, first


def whole_shape(parameter: Any) -> torch.Size:
    """The shape of a parameter before ZeRO-3 cut it into shares."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


# --------------------------------------------------------------------------------------------------- the three kinds


@dataclass(frozen=True, kw_only=True)
class AutoEPBlock:
    """A block that AutoEP built: this rank's experts in three stacked tensors. Any ZeRO stage."""

    kind: ClassVar[Kind] = "autoep"
    path: str
    module: Any
    router: Any
    num_experts: int
    local: range
    ep_size: int
    ep_group: Any

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether ``module`` is such a block, by DeepSpeed's own mark."""
        return bool(getattr(module, "_is_autoep_layer", False))

    @classmethod
    def of(cls, path: str, module: Any) -> AutoEPBlock:
        """The block at ``path``."""
        E_local = whole_shape(module.experts.w1)[0]
        ep_group = module.ep_group if module.ep_size > 1 else None
        return cls(
            path=path,
            module=module,
            router=module.router,
            num_experts=E_local * module.ep_size,
            local=_own_run(E_local, ep_group),
            ep_size=module.ep_size,
            ep_group=ep_group,
        )

    def experts(self, projection: str) -> torch.Tensor:
        """See :class:`Block`."""
        stacked: torch.Tensor = getattr(self.module.experts, AUTOEP_EXPERT_NAMES[projection])
        return stacked.detach()

    def parameters(self) -> list[ExpertParameter]:
        """See :class:`Block`."""
        return [
            ExpertParameter(autoep_parameter(self.path, projection), (projection,), self.local)
            for projection in EXPERT_PROJECTIONS
        ]

    def watch(self, counts: Callable[[], bool], report: RoutingObserver) -> list[Any]:
        """See :class:`Block`."""
        kept: list[torch.Tensor] = []

        # The router's output is (weights, choices, counts). The linear layer inside it has the logits, and runs first.
        def keep_logits(gate: Any, inputs: Any, logits_TE: torch.Tensor) -> None:
            if counts():
                kept[:] = [logits_TE]

        def report_choices(router: Any, inputs: Any, output: Sequence[torch.Tensor]) -> None:
            if counts():
                report(kept.pop(), output[1])

        return [
            self.router.gate.register_forward_hook(keep_logits),
            self.router.register_forward_hook(report_choices),
        ]

    def set_bias(self, bias_E: torch.Tensor | None) -> None:
        """See :class:`Block`."""
        if own_bias(self) is not None:
            self.router._buffers[OWN_BIAS] = bias_E
        else:
            self.module.expert_bias = bias_E


@dataclass(frozen=True, kw_only=True)
class NativeBlock:
    """A :class:`~moe_models.engine.native.NativeMoEBlock`: each of this rank's experts is a module. ZeRO 1 and 2."""

    kind: ClassVar[Kind] = "native"
    path: str
    module: Any
    router: Any
    num_experts: int
    local: range
    ep_size: int
    ep_group: Any

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether ``module`` is such a block; it has a mark, as AutoEP's have."""
        return bool(getattr(module, "is_native_layer", False))

    @classmethod
    def of(cls, path: str, module: Any) -> NativeBlock:
        """The block at ``path``."""
        moe = module.moe
        ep_group = moe.deepspeed_moe.ep_group if moe.ep_size > 1 else None
        return cls(
            path=path,
            module=module,
            router=moe.deepspeed_moe.gate.wg,
            num_experts=moe.num_experts,
            local=_own_run(moe.num_local_experts, ep_group),
            ep_size=moe.ep_size,
            ep_group=ep_group,
        )

    def experts(self, projection: str) -> torch.Tensor:
        """See :class:`Block`."""
        experts = self.module.moe.deepspeed_moe.experts.deepspeed_experts
        return torch.stack([expert.get_submodule(f"{projection}_proj").weight.detach() for expert in experts])

    def parameters(self) -> list[ExpertParameter]:
        """See :class:`Block`."""
        return [
            ExpertParameter(
                native_parameter(self.path, index, projection), (projection,), range(expert, expert + 1), stacked=False
            )
            for index, expert in enumerate(self.local)
            for projection in EXPERT_PROJECTIONS
        ]

    def watch(self, counts: Callable[[], bool], report: RoutingObserver) -> list[Any]:
        """See :class:`Block`."""
        gate = self.module.moe.deepspeed_moe.gate
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        # DeepSpeed's gate knows what was chosen and dropped, but hands out no logits. Before it runs, the block shows
        # its input to the router (NativeMoEBlock.forward), whose output is (logits, weights, choices).
        def keep_logits(router: Any, inputs: Any, output: Sequence[torch.Tensor]) -> None:
            if counts():
                kept[:] = [(output[0], output[2])]

        def report_routing(gate: Any, inputs: Any, routing: Sequence[Any]) -> None:
            if not counts():
                return
            # 1. How often each expert was chosen, drops included; and the expert of each choice, -1 if it was dropped.
            chosen_E = routing[-1]
            indices_KT = routing[3]
            # 2. How many choices each expert kept.
            kept_KT = indices_KT >= 0
            kept_E = torch.zeros_like(chosen_E)
            kept_E.scatter_add_(0, indices_KT.clamp_min(0).flatten().long(), kept_KT.flatten().to(kept_E))
            # 3. The rest was dropped.
            logits_TE, choices_TK = kept.pop()
            report(logits_TE, choices_TK, torch.stack([chosen_E, chosen_E - kept_E]))

        return [gate.register_forward_hook(report_routing), self.router.register_forward_hook(keep_logits)]

    def set_bias(self, bias_E: torch.Tensor | None) -> None:
        """See :class:`Block`."""
        raise ValueError(f"{self.path}: its router has no place for a selection bias")


@dataclass(frozen=True, kw_only=True)
class PlainBlock:
    """Hugging Face's own block: every rank holds all experts, gate and up in one tensor. Any ZeRO stage."""

    kind: ClassVar[Kind] = "plain"
    ep_size: ClassVar[int] = 1
    ep_group: ClassVar[None] = None
    path: str
    module: Any
    router: Any
    num_experts: int
    local: range

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether ``module`` is such a block: its child ``experts`` holds them stacked."""
        return hasattr(_unwrapped(getattr(module, "experts", None))[0], "gate_up_proj")

    @classmethod
    def of(cls, path: str, module: Any) -> PlainBlock:
        """The block at ``path``."""
        E = whole_shape(_unwrapped(module.experts)[0].down_proj)[0]
        router = module.gate if hasattr(module, "gate") else module.router
        return cls(path=path, module=module, router=router, num_experts=E, local=range(E))

    def experts(self, projection: str) -> torch.Tensor:
        """See :class:`Block`."""
        fused: torch.Tensor = getattr(_unwrapped(self.module.experts)[0], _PLAIN_EXPERTS[projection])
        return take_projection(fused.detach(), projection)

    def parameters(self) -> list[ExpertParameter]:
        """See :class:`Block`."""
        inside = _unwrapped(self.module.experts)[1]
        return [
            ExpertParameter(plain_parameter(self.path, "gate", inside), ("gate", "up"), self.local),
            ExpertParameter(plain_parameter(self.path, "down", inside), ("down",), self.local),
        ]

    def watch(self, counts: Callable[[], bool], report: RoutingObserver) -> list[Any]:
        """See :class:`Block`."""

        def report_choices(router: Any, inputs: Any, output: Sequence[torch.Tensor]) -> None:
            if counts():
                logits_TE, _, choices_TK = plain_routing(output)
                report(logits_TE, choices_TK)

        return [self.router.register_forward_hook(report_choices)]

    def set_bias(self, bias_E: torch.Tensor | None) -> None:
        """See :class:`Block`."""
        place = _place_of_bias(self)
        if place is None:
            raise ValueError(f"{self.path}: its router has no place for a selection bias")
        owner, name = place
        owner._buffers[name] = bias_E


_KINDS: tuple[type[AutoEPBlock] | type[NativeBlock] | type[PlainBlock], ...] = (AutoEPBlock, NativeBlock, PlainBlock)


def _own_run(E_local: int, ep_group: Any) -> range:
    """The experts of this rank: they are dealt to the ranks of an EP group in equal runs."""
    if ep_group is None:
        return range(E_local)
    first = E_local * dist.get_rank(ep_group)
    return range(first, first + E_local)
