"""Which rank does what: integer arithmetic only, so that 1,024 ranks can be checked on a laptop.

Two partitions of the same ranks live side by side (DeepSpeed 0.19.8, ``module_inject/auto_ep_folding.py`` and
``utils/groups.py``): the dense part is split by tensor (TP) or sequence (SP) parallelism and replicated over data
parallelism (DP), the experts are split by expert parallelism (EP) and replicated over expert data parallelism (EDP).
An EP group is a run of neighbouring ranks, so that dispatch and combine stay inside a node as long as EP fits one.

Example, 4 ranks, EP 2: EP groups (0, 1) (2, 3) exchange tokens; EDP groups (0, 2) (1, 3) hold the same experts and
average their gradients; all four average the gradients of everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_models.errors import UserError

Groups = tuple[tuple[int, ...], ...]
"""Rank lists, one for each group."""


def divisors(n: int) -> list[int]:
    """All positive divisors of ``n``, ascending."""
    return [candidate for candidate in range(1, n + 1) if n % candidate == 0]


def size_problems(
    world_size: int,
    ep_size: int,
    tp_size: int = 1,
    sp_size: int = 1,
    pp: int = 1,
    *,
    names: dict[str, str] | None = None,
) -> list[str]:
    """One line for each size that does not fit, listing those that do; ``names`` maps a size to its JSON key."""
    names = names or {}

    # 1. Sizes that are none. Nothing else can be said of them.
    sizes = {"world_size": world_size, "ep_size": ep_size, "tp_size": tp_size, "sp_size": sp_size, "pp": pp}
    problems = [
        f"{names.get(name, name)} = {size}: must be at least 1; set it to 1 to switch it off"
        for name, size in sizes.items()
        if size < 1
    ]
    if problems:
        return problems

    # 2. Each pipeline stage must have as many ranks, and each kind of group must divide a stage.
    if tp_size > 1 and sp_size > 1:
        problems.append(
            f"{names.get('tp_size', 'tp_size')} = {tp_size} and {names.get('sp_size', 'sp_size')} = {sp_size}: "
            "DeepSpeed takes tensor or sequence parallelism, not both; set one of them to 1"
        )
    ranks = f"world size {world_size}"
    if world_size % pp:
        return [*problems, f"{names.get('pp', 'pp')} = {pp} does not divide the {ranks}; use {divisors(world_size)}"]
    stage = world_size // pp
    if pp > 1:
        ranks = f"{stage} ranks of a pipeline stage"
    for name in ("tp_size", "sp_size", "ep_size"):
        if stage % sizes[name]:
            problems.append(
                f"{names.get(name, name)} = {sizes[name]} does not divide the {ranks}; use one of {divisors(stage)}, "
                f"or start a multiple of {sizes[name]} ranks"
            )
    return problems


def autoep_section(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``"expert_parallel"`` of a ds_config where it is switched on, else None."""
    section = raw.get("expert_parallel") or {}
    return section if section.get("enabled") else None


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """How many ranks each kind of parallelism takes, as a ds_config says; 1 is off."""

    ep: int = 1
    """Ranks that share one copy of the experts, by AutoEP or by native layers."""
    tp: int = 1
    """Ranks that split each dense matrix."""
    sp: int = 1
    """Ranks that split each sequence."""
    pp: int = 1
    """Stages that the layers are cut into."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Degrees:
        """The sizes in a ds_config that has been checked: the JSON as written, or the dict that DeepSpeed gets."""
        native = (raw.get("moe") or {}).get("layer")
        autoep = autoep_section(raw)
        ep = 1
        if native is not None:
            ep = native.get("ep_size", 1)
        elif autoep is not None:
            ep = autoep.get("autoep_size", 1)
        tensor = raw.get("tensor_parallel") or {}
        return cls(
            ep=int(ep),
            tp=max(1, int(tensor.get("autotp_size", 1))),  # DeepSpeed's own word for "off" is 0
            sp=int(raw.get("sequence_parallel_size", 1)),
            pp=int((raw.get("pipeline") or {}).get("stages", 1)),
        )


@dataclass(frozen=True)
class Coordinates:
    """Where one rank is; each index counts from 0 inside its group."""

    rank: int
    pp: int
    dp: int
    tp: int
    sp: int
    edp: int
    ep: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; ``world_size`` ranks in all. Raises UserError for sizes that do not fit."""

    world_size: int
    ep_size: int
    tp_size: int = 1
    sp_size: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        problems = size_problems(self.world_size, self.ep_size, self.tp_size, self.sp_size, self.pp)
        if problems:
            raise UserError(problems)

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.world_size // self.pp

    @property
    def dp_size(self) -> int:
        """Ranks that read different data: replicas of the dense part, without TP and SP peers."""
        return self.stage_size // (self.tp_size * self.sp_size)

    @property
    def zero_size(self) -> int:
        """Ranks over which ZeRO shards the dense part (SP peers hold the same weights, so they count)."""
        return self.stage_size // self.tp_size

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts: their gradients are averaged and their ZeRO shards are split over these."""
        return self.stage_size // self.ep_size

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` is in each group."""
        if not 0 <= rank < self.world_size:
            raise UserError(f"rank = {rank}: must be 0 to {self.world_size - 1}")
        stage, local = divmod(rank, self.stage_size)
        return Coordinates(
            rank=rank,
            pp=stage,
            dp=local // (self.tp_size * self.sp_size),
            tp=local % self.tp_size,
            sp=local % self.sp_size,
            edp=local // self.ep_size,
            ep=local % self.ep_size,
        )

    def tp_groups(self) -> Groups:
        """Groups that split each dense matrix: neighbouring ranks."""
        return self._blocks(self.tp_size)

    def sp_groups(self) -> Groups:
        """Groups that split each sequence: neighbouring ranks."""
        return self._blocks(self.sp_size)

    def dp_groups(self) -> Groups:
        """Groups whose ranks read different data: every tp_size-th (or sp_size-th) rank."""
        return self._strides(self.tp_size * self.sp_size)

    def zero_groups(self) -> Groups:
        """Groups that average dense gradients and over which ZeRO shards the dense part: every tp_size-th rank.

        They differ from ``dp_groups`` under sequence parallelism only, whose peers hold the same weights.
        """
        return self._strides(self.tp_size)

    def ep_groups(self) -> Groups:
        """Groups that share one copy of the experts and exchange tokens: neighbouring ranks."""
        return self._blocks(self.ep_size)

    def edp_groups(self) -> Groups:
        """Groups that hold the same experts: every ep_size-th rank."""
        return self._strides(self.ep_size)

    def experts_of(self, rank: int, num_experts: int) -> range:
        """Experts that ``rank`` holds: one contiguous block of each MoE layer's ``num_experts``."""
        local = self._experts_per_rank(num_experts)
        ep = self.coordinates(rank).ep
        return range(ep * local, (ep + 1) * local)

    def ep_rank_of(self, expert: int, num_experts: int) -> int:
        """Index inside every EP group of the rank that holds ``expert``."""
        if not 0 <= expert < num_experts:
            raise UserError(f"expert = {expert}: must be 0 to {num_experts - 1}")
        return expert // self._experts_per_rank(num_experts)

    def nodes_of_a_token(
        self, per_node: int, num_experts: int, top_k: int, groups: int = 1, limited: int = 1
    ) -> tuple[int, int]:
        """(nodes that one token's experts can be on at most, nodes of an EP group), in the first EP group.

        ``groups`` and ``limited`` are the routing's: a token's experts come from ``limited`` of ``groups`` runs of
        neighbouring experts (DeepSeek's ``n_group`` and ``topk_group``). Experts are dealt to ranks in runs too, so
        that where a run is what a node holds, a token stays on ``limited`` nodes.
        """
        # 1. The node of each expert, in the first EP group.
        ranks = self.ep_groups()[0]
        node_of = [ranks[self.ep_rank_of(expert, num_experts)] // per_node for expert in range(num_experts)]
        nodes = len(set(node_of))

        # 2. The nodes that each routing group touches.
        size = num_experts // groups
        nodes_of_group = [set(node_of[start : start + size]) for start in range(0, num_experts, size)]

        # 3. Groups are alike except where node borders cut them, so the widest ones bound what a token can reach.
        widest = sorted(map(len, nodes_of_group), reverse=True)[:limited]
        reached = sum(widest)
        return min(top_k, reached, nodes), nodes

    def describe(self, zero_stage: int) -> str:
        """One line, e.g. ``2 ranks: EP 2 x EDP 1, ZeRO-1``."""
        parts = [f"EP {self.ep_size} x EDP {self.edp_size}"]
        if self.tp_size > 1:
            parts.append(f"TP {self.tp_size} x DP {self.dp_size}")
        if self.sp_size > 1:
            parts.append(f"SP {self.sp_size} x DP {self.dp_size}")
        if self.pp > 1:
            parts.append(f"PP {self.pp}")
        ranks = "rank" if self.world_size == 1 else "ranks"
        return f"{self.world_size} {ranks}: {', '.join(parts)}, ZeRO-{zero_stage}"

    def pp_groups(self) -> Groups:
        """Groups that hold the stages of one replica, called lanes: a rank of each stage, which read the same rows."""
        return tuple(tuple(range(lane, self.world_size, self.stage_size)) for lane in range(self.stage_size))

    def _experts_per_rank(self, num_experts: int) -> int:
        if num_experts % self.ep_size:
            raise UserError(
                f"ep_size = {self.ep_size} does not divide {num_experts} experts; use one of {divisors(num_experts)}"
            )
        return num_experts // self.ep_size

    def _blocks(self, size: int) -> Groups:
        return tuple(tuple(range(start, start + size)) for start in range(0, self.world_size, size))

    def _strides(self, step: int) -> Groups:
        return tuple(
            tuple(range(stage + first, stage + self.stage_size, step))
            for stage in range(0, self.world_size, self.stage_size)
            for first in range(step)
        )
