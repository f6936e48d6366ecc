"""The conversion's check: a converted MoE block computes what Hugging Face's block computed before.

AutoEP and the native layers build each block anew from what they know of its family. Where they know less than the
model does (a router's bias, a clamp, a shared expert), training starts, runs and learns another function. So before
the first step each block is asked twice, with the same hidden states: as it came, and as it will be trained.

- *Before* the conversion (:func:`ask_before`). Experts may be still on disk. One block at a time gets its values, on
  the device where it will train, answers and loses them again. Block i is asked by rank i modulo the number of ranks,
  so the ranks together read each block once; the conversion then finds it in the page cache. With pipeline stages
  these are the ranks of a stage and its blocks.
- *After* it (:func:`require_same_function`), in one forward pass of the engine. A hook gives each block the hidden
  states of the question. So every layout runs as it trains: dispatch over ranks, gathering under ZeRO-3, and the rank's
  own weights. All else in the model is the same module as before, so equal blocks mean equal logits.

A token whose two best experts nearly tie may take the other one when sums are rounded differently. Each token is
therefore asked several times, with hidden states that differ by a rounding error. Where the answers before the
conversion differ by more than the tolerance, the token is left out. All others must agree, and not only on average. In
16 bit a router's scores are coarse, and a tie of the rounded scores may be none of the exact ones. There a token is
left out as well where the answers after the conversion differ among themselves, unless that is so for most tokens.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from moe_models.engine.blocks import hf_model
from moe_models.engine.pipeline.cut import stage_kept
from moe_models.errors import RunError, warn
from moe_models.ranks import rank

How = Literal["auto", "all", "none"]
"""Which blocks are asked: as many as :data:`MOST_BYTES` allow, all, or none."""

MOST_BYTES = 32 * 10**9
"""Bytes that ``auto`` reads a second time, by all ranks together. Larger models: some layers, evenly spread."""

PROBE_SHAPE = (5, 128)
"""Each of 128 tokens as it is, and with four rounding errors of its hidden states; enough to reach most experts."""

STEADY_SHARE = 1 / 8
"""With fewer steady tokens a block is not judged: its router cannot decide."""

# Largest |difference| of a token's answer over its largest value. In fp32 only the order of summation differs: 1e-6 was
# seen. In 16 bit each of the expert's three products is rounded (2^-8 for bf16) and their sum again: 1e-2 was seen. A
# dropped bias, exchanged matrices or another normalisation move tokens by their own size.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TOLERANCE_TF32 = 1e-2
"""In fp32 on a GPU, whose matrix products may have 10 bits (TF32)."""


@dataclass(frozen=True, kw_only=True)
class Askers:
    """The ranks that have the same blocks and share the asking: all, or those of a pipeline stage."""

    ranks: tuple[int, ...]
    group: Any = None
    """Their process group; None for all ranks."""

    def rank_for(self, number: int) -> int:
        """Which of them asks block ``number``."""
        return self.ranks[number % len(self.ranks)]


def askers_of(model: nn.Module) -> Askers:
    """The ranks that have the blocks of ``model``. Without their group, which the run's pipeline makes."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    stage = stage_kept(model)
    if stage is None:
        return Askers(ranks=tuple(range(world_size)))
    size = world_size // stage.count
    return Askers(ranks=tuple(range(stage.index * size, (stage.index + 1) * size)))


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a run's blocks are asked, and what they answered before the conversion."""

    blocks: int
    """MoE blocks that the model has."""
    asked: tuple[str, ...]
    """Module paths of those that are asked, in order."""
    answers: dict[str, torch.Tensor] = field(default_factory=dict)
    """Path -> [B, T, D] in fp32 on the CPU; those that this rank asked."""
    dtype: torch.dtype | None = None
    """In which they were computed; None where nothing was asked."""
    askers: Askers | None = None
    """The ranks of this pipeline stage; None for all ranks."""


# ------------------------------------------------------------------------------------------------------ before


def chosen(paths: Sequence[str], sizes: Sequence[int], how: How) -> list[str]:
    """The blocks to ask: all, or as many as :data:`MOST_BYTES` allow, evenly spread, the first and the last with them.

    ``sizes``: bytes of each block.
    """
    if how == "none":
        return []
    count = len(paths)
    if how == "auto" and sum(sizes) > MOST_BYTES:
        count = min(count, max(2, MOST_BYTES // max(sizes)))
    if count < 2:
        return list(paths[:count])
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def ask_before(
    model: nn.Module,
    paths: Sequence[str],
    how: How = "auto",
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    askers: Askers | None = None,
) -> Question:
    """Ask the blocks at ``paths`` while they are Hugging Face's; call it on every rank.

    Native blocks were asked when they were made (``register_deepspeed_moe``).

    Args:
        model: not converted yet; PEFT may have wrapped it.
        paths: module paths of its MoE blocks.
        how: which of them.
        device: where they will train; None: where they are.
        dtype: in which they will train; None: as they are.
        askers: the ranks that have these blocks; None for all ranks.
    """
    model = hf_model(model)
    native: dict[str, Any] = {path: m for path, m in model.named_modules() if getattr(m, "is_native_layer", False)}
    if native:
        told = {path: block.answer_before for path, block in native.items() if block.answer_before is not None}
        asked = tuple(path for path, block in native.items() if block.was_asked)
        asked_in = next(iter(native.values())).asked_in
        return Question(blocks=len(native), asked=asked, answers=told, dtype=asked_in, askers=askers)
    blocks = [model.get_submodule(path) for path in paths]
    asked = tuple(chosen(paths, [block_bytes(block) for block in blocks], how))
    dtype = dtype or main_dtype(model)
    question = Question(blocks=len(paths), asked=asked, dtype=dtype, askers=askers)
    config: Any = model.config
    D = config.get_text_config().hidden_size
    for number, path in enumerate(asked):
        answer = answer_of_one_rank(model.get_submodule(path), D, number, device=device, dtype=dtype, askers=askers)
        if answer is not None:
            question.answers[path] = answer
    return question


def block_bytes(block: nn.Module) -> int:
    """Bytes of a block's weights, on disk, in memory or cut by ZeRO-3."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()  # type: ignore[operator]
        for parameter in block.parameters()
    )


@torch.no_grad()
def answer_of_one_rank(
    block: nn.Module, D: int, number: int, *, device: Any = None, dtype: torch.dtype, askers: Askers | None = None
) -> torch.Tensor | None:
    """The answer of Hugging Face's ``block``, [B, T, D]; None on the ranks that leave block ``number`` to another."""
    partitioned = [parameter for parameter in block.parameters() if hasattr(parameter, "ds_id")]
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    askers = askers or Askers(ranks=tuple(range(world_size)))
    mine = askers.rank_for(number) == rank_of_group()
    if not mine and not partitioned:
        return None
    with ExitStack() as stack:
        # 1. Under ZeRO-3 a model that came whole is cut already; gathering needs every rank.
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        if not mine:
            return None
        # 2. A copy of the block, for this one call. A tensor that is on disk is read here. What transformers keeps in
        #    fp32 beside weights of another dtype stays so.
        held_in = main_dtype(block)
        device = device or next(block.parameters()).device
        copies: dict[int, Any] = {}
        for tensor in [*block.parameters(), *block.buffers()]:
            casts_to = dtype if tensor.dtype == held_in else tensor.dtype
            values = tensor.detach().clone().to(device, casts_to)
            is_parameter = isinstance(tensor, nn.Parameter)
            copies[id(tensor)] = nn.Parameter(values, requires_grad=False) if is_parameter else values
        copied: nn.Module = copy.deepcopy(block, copies)
        # 3. The answer. PEFT's wrappers add their adapter to the weights meanwhile.
        copied.eval()
        x_BTD = hidden_states(D, torch.empty(0, dtype=dtype, device=device))
        output = copied(x_BTD)
    return first(output).float().reshape(x_BTD.shape).cpu()


def main_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's matrices. Some families keep vectors in fp32."""
    floating = [tensor for tensor in module.parameters() if tensor.is_floating_point()]
    matrices = (tensor for tensor in floating if len(getattr(tensor, "ds_shape", tensor.shape)) > 1)
    return next(matrices, floating[0]).dtype


def rank_of_group() -> int:
    """This rank in the process group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def hidden_states(D: int, like: torch.Tensor) -> torch.Tensor:
    """[B, T, D] in the dtype and on the device of ``like``: normal numbers, the same on every rank and each time."""
    B, T = PROBE_SHAPE
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn((T, D), generator=generator)
    error_BTD = torch.randn((B, T, D), generator=generator) * torch.finfo(like.dtype).eps
    error_BTD[0] = 0
    return (x_TD * (1 + error_BTD)).to(like.device, like.dtype)


def first(output: Any) -> torch.Tensor:
    """The hidden states that a block returns, with or without router logits beside them."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is in evaluation: no dropout, no noise of routers."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


# ------------------------------------------------------------------------------------------------------- after


@dataclass(frozen=True, kw_only=True)
class SameFunction:
    """What was compared on this rank."""

    asked: int
    blocks: int
    judged: int
    """Blocks with enough steady tokens."""
    difference: float
    """The largest one of a steady token, relative to its answer."""
    allowed: float
    seconds: float

    def __str__(self) -> str:
        unsure = ""
        if self.judged < self.asked:
            unsure = f"; {self.asked - self.judged} could not be judged, because nearly all tokens tie in their routers"
        return (
            f"conversion: {self.judged} of {self.blocks} MoE blocks compared, each computes what it did before (within "
            f"{self.difference:.1e} of its answer, {self.allowed:.0e} allowed; {self.seconds:.1f} s){unsure}"
        )


@torch.no_grad()
def require_same_function(engine: Any, question: Question, conversion: str) -> SameFunction | None:
    """Ask the converted blocks of ``engine`` the same, and compare; collective. None if nothing was asked.

    Native layers must route as Hugging Face's blocks meanwhile (``engine/native.py``: ``exact_routing``).

    Args:
        engine: the DeepSpeed engine, before the first step and before a checkpoint is loaded.
        question: of :func:`ask_before`.
        conversion: what converted the blocks, for the message.

    Raises:
        RunError: on every rank, with the first block that departs.
    """
    if not question.asked:
        return None
    module = hf_model(engine.module)
    if question.dtype != main_dtype(module):  # native layers that were made of a model in another dtype
        warn([f"conversion: not compared; asked in {question.dtype}, trained in {main_dtype(module)}"], rank=rank())
        return None
    began = time.perf_counter()
    converted, failed = converted_answers(engine, question.asked)
    answers = shared_answers(question, converted)
    converted = {path: answer for path, answer in converted.items() if path in answers}
    # 1. Each rank judges what it computed with its own weights.
    departed: tuple[str, float] | None = None
    largest = 0.0
    judged = 0
    allowed = tolerance(module)
    coarse = allowed > TOLERANCE[torch.float32]
    for path in converted:
        difference = departure(answers[path], converted[path], allowed, coarse=coarse)
        if difference is None:
            continue
        judged += 1
        largest = max(largest, difference)
        if departed is None and not difference <= allowed:  # NaN departs, too
            departed = (path, difference)
    # 2. One rank's finding ends all of them.
    found: list[tuple[str, float] | None] = [departed]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, departed)
    seen = [each for each in found if each is not None]
    if seen:
        path, difference = min(seen, key=lambda each: [int(part) for part in each[0].split(".") if part.isdigit()])
        raise RunError(
            f"{path}: {conversion} made another function of this block: its answers to the same hidden states differ "
            f"by {difference:.1e} of their size, {allowed:.0e} allowed (the first of {len(question.asked)} blocks "
            "that were compared). Nothing was trained. Please report it with config.json and the ds_config JSON; "
            "without expert_parallel and moe.layer (ds_configs/zero3.json) nothing is converted"
        )
    if failed is not None:
        raise failed
    return SameFunction(
        asked=len(question.asked),
        blocks=question.blocks,
        judged=judged,
        difference=largest,
        allowed=allowed,
        seconds=time.perf_counter() - began,
    )


def converted_answers(engine: Any, paths: Sequence[str]) -> tuple[dict[str, torch.Tensor], Exception | None]:
    """(path -> what the converted block answers, [B, T, D] in fp32 on the CPU; how the forward pass ended, if it did).

    Collective. One forward pass of the whole model, in which hooks give these blocks the hidden states of the question.
    A block that returns something else than before can end it (gpt_oss: no tuple); what was answered until then is
    judged.
    """
    failed: Exception | None = None
    module = hf_model(engine.module)
    answers: dict[str, torch.Tensor] = {}
    handles = []
    for path in paths:

        def ask(block: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            (came_BTD,) = inputs
            return (hidden_states(came_BTD.shape[-1], came_BTD),)

        def keep(block: Any, inputs: Any, output: Any, path: str = path) -> None:
            answers[path] = first(output).float().reshape(*PROBE_SHAPE, -1).cpu()

        block = module.get_submodule(path)
        handles += [block.register_forward_pre_hook(ask), block.register_forward_hook(keep)]
    ids_BT = torch.zeros(PROBE_SHAPE, dtype=torch.long, device=next(module.parameters()).device)
    try:
        # Compiled code would be compiled for this shape, and again for that of training.
        with evaluating(module), torch.compiler.set_stance("force_eager"):
            engine(input_ids=ids_BT, use_cache=False, logits_to_keep=1)
    except Exception as error:
        if not answers:
            raise
        failed = error
    finally:
        for handle in handles:
            handle.remove()
        _forget_trace(engine)
    return answers, failed


# upstream: deepspeed 0.19.8: ZeRO-3 takes a forward pass before the first step for a whole step. In the backward pass
# of that step it finds more modules than it recorded, and releases weights that are in use (RuntimeError: size 0).
# Remove when: a forward pass without gradients is not recorded.
def _forget_trace(engine: Any) -> None:
    """Let ZeRO-3 record the first step of training as if there had been no forward pass before."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:
        return
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


def shared_answers(question: Question, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The answers from before the conversion, of all ranks on each rank; collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return question.answers
    askers = question.askers or Askers(ranks=tuple(range(dist.get_world_size())))
    absent = blocks_without_answer(question, askers)
    device = "cpu"
    if dist.get_backend() == "nccl":
        device = f"cuda:{torch.cuda.current_device()}"
    answers = {}
    for number, path in enumerate(question.asked):
        if path not in like:  # the forward pass ended before it, on every rank
            continue
        if path in absent:
            continue
        answer = question.answers.get(path, torch.empty_like(like[path])).to(device)
        dist.broadcast(answer, src=askers.rank_for(number), group=askers.group)
        answers[path] = answer.cpu()
    return answers


def blocks_without_answer(question: Question, askers: Askers) -> set[str]:
    """Blocks of a pipeline stage that no rank of it has asked; collective over its ranks.

    Native layers that were made of a whole model, before it was cut into stages, were asked by all ranks. The recipes
    cut first.
    """
    if question.askers is None:
        return set()
    told: list[list[str]] = [[] for _ in askers.ranks]
    dist.all_gather_object(told, list(question.answers), group=askers.group)
    absent = set()
    for number, path in enumerate(question.asked):
        if path not in told[askers.ranks.index(askers.rank_for(number))]:
            absent.add(path)
    return absent


def tolerance(module: nn.Module) -> float:
    """What the dtype of the model explains."""
    dtype = main_dtype(module)
    on_cpu = next(module.parameters()).device.type == "cpu"
    if dtype == torch.float32 and not on_cpu:
        return TOLERANCE_TF32
    return TOLERANCE[dtype]


def departure(
    before_BTD: torch.Tensor, after_BTD: torch.Tensor, allowed: float, *, coarse: bool = False
) -> float | None:
    """The largest difference of a steady token, relative to its answer; None where too few tokens are steady.

    ``coarse``: products are rounded to 16 bit or TF32.
    """
    size_T = before_BTD[0].abs().amax(-1).clamp_min(1e-20)
    # 1. Tokens whose answer does not hang on a rounding error.
    steady_T = (before_BTD - before_BTD[0]).abs().amax(-1).amax(0) / size_T <= allowed
    if steady_T.float().mean() < STEADY_SHARE:
        return None
    # 2. Where the converted router ties and the other one does not. Half of the tokens are more than ties, and NaN is
    #    no tie.
    if coarse:
        spread_T = (after_BTD - after_BTD[0]).abs().amax(-1).amax(0) / size_T
        steady_too_T = steady_T & ~(spread_T > allowed)
        if steady_too_T.sum() > steady_T.sum() / 2:
            steady_T = steady_too_T
    # 3. The others must have the same answer.
    difference_T = (after_BTD - before_BTD).abs().amax(-1).amax(0) / size_T
    return difference_T[steady_T].max().item()


def report(compared: SameFunction | None) -> None:
    """One line on rank 0."""
    if compared is not None and rank() == 0:
        print(compared, flush=True)
