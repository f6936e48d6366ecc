"""Sparse upcycling: a dense checkpoint folder becomes a Mixture-of-Experts checkpoint folder that computes the same.

Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv 2212.05055):
every expert starts as a copy of the dense MLP, the router starts fresh, everything else is copied.

Why the function stays the same: a MoE layer computes y = sum_k w_k expert_k(x) over the K experts of a token. All
targets scale the weights w_k to sum to 1, so K equal experts give what the one dense MLP gave: same logits, same loss.

    llama, mistral -> mixtral     same attention, norms and SwiGLU
    qwen2          -> qwen2_moe   Qwen2 has biases on q, k, v; Mixtral has none. Qwen2-MoE always has a shared expert: a
                                  small one whose down projection is zero adds exactly 0 at first, and can still learn
    qwen3          -> qwen3_moe   keeps Qwen3's q and k norms; no shared expert

Tensors stream from shard to shard: peak memory is one output shard plus one tensor, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_models.checkpoint.card import Measured, RunFacts, facts_of_base, versions, write_card
from moe_models.checkpoint.hf_folder import ExportError, HFFolderWriter
from moe_models.disk import ends_if_full, is_full
from moe_models.errors import Problems, UserError
from moe_models.families.table import FAMILIES, Family
from moe_models.files import restore_previous
from moe_models.upcycle.dense_folder import Header, count_parameters, read_dense, read_headers

RouterInit = Literal["normal", "zeros"]
Progress = Callable[[int, int], None]
"""Called after each tensor with (bytes done, bytes in all)."""

SHARED_EXPERT_SIZE = 128
"""F of the shared expert that Qwen2-MoE must have. It starts silent, so it only needs room to learn."""

_MLP = re.compile(r"(model\.layers\.\d+\.)mlp\.(gate|up|down)_proj\.weight")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_SIDE_FILES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_DENSE_KEYS = {"architectures", "attention_bias", "dtype", "layer_types", "max_window_layers", "mlp_bias", "model_type"}
_DENSE_KEYS |= {"pretraining_tp", "transformers_version", "use_sliding_window", "_name_or_path"}


TARGETS = {source: family for family in FAMILIES.values() for source in family.dense_sources}
"""Dense `model_type` -> the family that it becomes."""


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """How one output tensor is made: a copy of ``source``, perhaps with noise, or numbers drawn from N(0, ``std``)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None = None
    """Name of the dense tensor; None draws fresh numbers."""
    noise: float = 0.0
    """Deviation of the noise on a copy, as a fraction of the source's own deviation."""
    std: float = 0.0
    """Deviation of fresh numbers; 0 gives zeros."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor on disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class UpcycleReport:
    """What was written. Parameters are counted once where embeddings are tied."""

    output_dir: Path
    model_type: str
    dense_parameters: int
    total_parameters: int
    active_parameters: int
    """Parameters that one token passes through: K of the E experts, and everything else."""
    shards: int
    nbytes: int


def upcycle(
    dense_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    router_init: RouterInit = "normal",
    noise: float = 0.0,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    dense_name: str | None = None,
    progress: Progress | None = None,
) -> UpcycleReport:
    """Write the MoE checkpoint of the dense checkpoint in `dense_dir` to `output_dir`, under the target's hub names.

    In each layer the MLP (gate and up [F, D], down [D, F]) becomes E experts of the same shapes and dtype and a router
    [E, D]. Tokenizer, generation config and licence files are copied, and a model card is written. The folder appears
    complete or not at all.

    Args:
        dense_dir: folder with `config.json` and `model.safetensors`, or shards and `model.safetensors.index.json`.
        output_dir: must not exist, or be empty.
        num_experts: E.
        num_experts_per_tok: K. With K = 1 the routing weight is always 1: then only a balance loss teaches the router.
        router_init: "normal" draws with the config's `initializer_range`. "zeros" scores all experts alike, and top-k
            breaks the tie the same way every time: all tokens go to the same K experts, which get equal gradients and
            so stay equal. Useful as a worst case, not to train from.
        noise: deviation of the Gaussian noise added to every expert tensor, as a fraction of that tensor's own
            deviation; 0 keeps the dense function. Experts drift apart without it, since each sees other tokens.
        seed: fixes router and noise. Each tensor draws from its own stream: the shard size does not change the numbers.
        max_shard_size: bytes, or "5GB" / "500MiB". A single tensor may exceed it.
        dense_name: what the model card calls the dense model: its hub id, if that is not the folder.
        progress: see `Progress`.

    Raises:
        UserError: all wrong inputs together, before any weight is read. Later: a dense weight that is not finite, or a
            folder that cannot be written; nothing is left behind then.
        ExportError: a disk that fills meanwhile; nothing is left behind then either.
    """
    dense = Path(dense_dir)
    output = Path(output_dir)

    # 1. Config, tensor headers and arguments tell all that is wrong, without reading a weight.
    config, headers, found = read_dense(dense, TARGETS)
    problems = Problems(found)
    problems.add(*_argument_problems(num_experts, num_experts_per_tok, router_init, noise))
    shard_size = _parse_size(max_shard_size)
    if not shard_size:
        problems.add(f"max_shard_size={max_shard_size!r}: must be a size above 0, such as 5GB or 500MiB")
    if not output.exists():
        restore_previous(output.absolute())  # an export that died between its two renames is not to be written over
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        problems.add(f"output_dir={output}: exists and is not an empty folder; name another, or remove this one")
    problems.refuse()

    # 2. What will be written: the target's config, and for each tensor of it how it is made.
    target = TARGETS[config.model_type]
    moe_config = _moe_config(config, target, num_experts, num_experts_per_tok, headers)
    plan = _plan(config, headers, target, num_experts, router_init, noise)

    # 3. Write it to a hidden folder, which gets its name at the end.
    settings = {"experts": str(num_experts), "experts of a token": str(num_experts_per_tok), "router": router_init}
    settings |= {"noise": str(noise), "seed": str(seed)}
    facts = RunFacts(settings=settings, versions=versions(), **facts_of_base(dense_name or str(dense)))
    try:
        shards = _write_folder(dense, output, moe_config, plan, headers, shard_size, seed, facts, progress)
    except ExportError as error:
        if is_full(error):
            raise
        raise UserError(f"output_dir={output}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir={output}: {error}; name a folder that can be written") from error

    # 4. A token leaves E - K experts of each layer idle; an expert has three matrices of F x D.
    total = count_parameters(moe_config)
    expert_parameters = 3 * config.hidden_size * config.intermediate_size
    idle_experts = config.num_hidden_layers * (num_experts - num_experts_per_tok)
    return UpcycleReport(
        output_dir=output,
        model_type=target.model_type,
        dense_parameters=count_parameters(config),
        total_parameters=total,
        active_parameters=total - idle_experts * expert_parameters,
        shards=shards,
        nbytes=_nbytes(plan),
    )


def _parse_size(size: int | str) -> int:
    """5000000000, "5GB" (powers of 1000) or "5GiB" (powers of 1024) -> bytes; 0 if it cannot be read."""
    match = _SIZE.fullmatch(str(size).strip())
    if match is None:
        return 0
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    exponent = " KMGT".index(prefix.upper() or " ")
    return int(float(number) * base**exponent)


def _argument_problems(num_experts: int, top_k: int, router_init: str, noise: float) -> list[str]:
    """One line for each argument that cannot be."""
    problems = []
    if num_experts < 2:
        problems.append(f"num_experts={num_experts}: must be 2 or more; 1 would be the dense model again")
    elif not 1 <= top_k <= num_experts:
        problems.append(f"num_experts_per_tok={top_k}: must be from 1 to num_experts={num_experts}")
    if router_init not in get_args(RouterInit):
        problems.append(f"router_init={router_init!r}: must be one of {', '.join(get_args(RouterInit))}")
    if not 0.0 <= noise <= 1.0:
        problems.append(f"noise={noise}: must be from 0 to 1 (1 is as loud as the weights themselves); try 0.01")
    return problems


def _moe_config(config: Any, target: Family, num_experts: int, top_k: int, headers: dict[str, Header]) -> Any:
    """The dense config under the target's class. Every key is carried over except those that only dense models have."""
    keys = {key: value for key, value in config.to_dict().items() if key not in _DENSE_KEYS}
    keys |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target.model_type]], "num_experts_per_tok": top_k}
    keys["dtype"] = config.dtype or headers["model.norm.weight"].dtype
    if getattr(config, "attention_bias", False):  # only Qwen3 gets here with one
        keys["attention_bias"] = True
    keys |= {target.num_experts_key: num_experts, target.expert_size_key: config.intermediate_size}
    if isinstance(target.router.normalise, str):
        keys[target.router.normalise] = True
    if target.shared is not None:
        keys[target.shared.size_key] = SHARED_EXPERT_SIZE
    return AutoConfig.for_model(target.model_type, **keys)


def _plan(
    config: Any, headers: dict[str, Header], target: Family, num_experts: int, router_init: RouterInit, noise: float
) -> dict[str, TensorPlan]:
    """Output tensor name -> how it is made, layer by layer, so that a layer's experts lie together in a shard."""
    # 1. What a MoE block has and a dense MLP has not: name in the block -> (shape, deviation of its random numbers).
    D = config.hidden_size
    S = SHARED_EXPERT_SIZE
    std = config.initializer_range
    router_std = std if router_init == "normal" else 0.0
    fresh: dict[str, tuple[tuple[int, int], float]] = {"gate.weight": ((num_experts, D), router_std)}
    if target.shared is not None:
        # Only the down projection is zero: the shared expert adds 0 at first, and its gradient is not 0.
        shared = target.shared.name
        fresh[f"{shared}.gate_proj.weight"] = ((S, D), std)
        fresh[f"{shared}.up_proj.weight"] = ((S, D), std)
        fresh[f"{shared}.down_proj.weight"] = ((D, S), 0.0)
        fresh[f"{target.shared.gate}.weight"] = ((1, D), 0.0)

    plan: dict[str, TensorPlan] = {}
    for name in sorted(headers, key=_by_layer_number):
        header = headers[name]
        mlp = _MLP.fullmatch(name)
        if mlp is not None:
            # 2. A projection of the dense MLP: every expert gets a copy of it.
            layer, projection = mlp.groups()
            block = layer + target.hub_block
            hub_projection = target.hub_expert_names[projection]
            expert = TensorPlan(shape=header.shape, dtype=header.dtype, source=name, noise=noise)
            for e in range(num_experts):
                plan[f"{block}.experts.{e}.{hub_projection}.weight"] = expert
            if projection == "gate":  # once per layer
                for own_name, (shape, deviation) in fresh.items():
                    plan[f"{block}.{own_name}"] = TensorPlan(shape=shape, dtype=header.dtype, std=deviation)
        elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold it; it follows from the config
            # 3. Everything else (attention, norms, embeddings) is copied.
            plan[name] = TensorPlan(shape=header.shape, dtype=header.dtype, source=name)
    return plan


def _by_layer_number(name: str) -> list[int | str]:
    """A sort key that puts layer 2 before layer 10."""
    return [int(part) if part.isdigit() else part for part in name.split(".")]


def _nbytes(plan: dict[str, TensorPlan]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in plan.values())


def _make(name: str, plan: TensorPlan, source: torch.Tensor | None, seed: int) -> torch.Tensor:
    """One output tensor. Random numbers are float32, from a stream that only (seed, name) decides."""
    # 1. A plain copy. It owns its memory: the source is a view of the mapped file.
    if source is not None and not plan.noise:
        return source.clone()

    # 2. A stream of its own for each tensor: neither the order of writing nor the shard size changes a number.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    random = torch.randn(plan.shape, generator=generator)

    # 3. Fresh: N(0, std). Noisy copy: source + N(0, noise x deviation of the source). Both rounded to dtype once.
    if source is None:
        return random.mul_(plan.std).to(plan.dtype)
    return random.mul_(plan.noise * source.float().std()).add_(source).to(plan.dtype)


def _write_folder(
    dense: Path,
    output: Path,
    moe_config: Any,
    plan: dict[str, TensorPlan],
    headers: dict[str, Header],
    shard_size: int,
    seed: int,
    facts: RunFacts,
    progress: Progress | None,
) -> int:
    """Write weights, config, side files and card, check them, and name the folder. Returns the number of shards.

    Raises UserError for a disk without room and for a folder that does not hold what was planned; ExportError, OSError
    or SafetensorError where reading or writing fails. The hidden folder is removed then.
    """
    nbytes = _nbytes(plan)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in plan.items()}
    writer = HFFolderWriter(output, expected, shard_size)
    try:
        free = shutil.disk_usage(writer.staging).free
        if free < nbytes:
            raise UserError(
                f"output_dir={output}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f}; free some"
            )
        with ends_if_full(output, ExportError, nbytes):
            _write_weights(writer, plan, headers, seed, progress)
            moe_config.save_pretrained(writer.staging)
            for file in dense.iterdir():
                if _is_side_file(file):
                    shutil.copyfile(file, writer.staging / file.name)
            write_card(writer.staging, "upcycled", facts, Measured())
        _check(writer.staging, plan)
        shards = len(list(writer.staging.glob("*.safetensors")))
        with ends_if_full(output, ExportError, nbytes):
            writer.finish()
    except BaseException:
        writer.discard()
        raise
    return shards


def _write_weights(
    writer: HFFolderWriter,
    plan: dict[str, TensorPlan],
    headers: dict[str, Header],
    seed: int,
    progress: Progress | None,
) -> None:
    """Make tensor after tensor and hand it to the writer, which holds one shard in memory."""
    total = _nbytes(plan)
    done = 0
    with contextlib.ExitStack() as stack:
        dense_files = {}
        for file in {header.file for header in headers.values()}:
            dense_files[file] = stack.enter_context(safe_open(file, "pt"))
        for name, tensor_plan in plan.items():
            source = None
            if tensor_plan.source is not None:
                source = dense_files[headers[tensor_plan.source].file].get_tensor(tensor_plan.source)
            writer.add(name, _make(name, tensor_plan, source, seed))
            done += tensor_plan.nbytes
            if progress is not None:
                progress(done, total)
    writer.close_weights()


def _is_side_file(file: Path) -> bool:
    """Tokenizer, generation config, licence: what belongs to the weights but is neither weights nor their config."""
    skipped = file.name == "config.json" or file.name.endswith(".index.json")
    known = file.suffix in _SIDE_FILES or file.stem.upper() in {"LICENSE", "LICENCE", "NOTICE"}
    return known and not skipped and file.is_file()


def _check(folder: Path, plan: dict[str, TensorPlan]) -> None:
    """Read the written headers back: each planned tensor is there, with its shape and dtype, and nothing else."""
    headers, problems = read_headers(folder)
    found = {name: (header.shape, header.dtype) for name, header in headers.items()}
    planned = {name: (tensor.shape, tensor.dtype) for name, tensor in plan.items()}
    if problems or found != planned:
        raise UserError([f"{folder}: what was written is not what was planned; is the disk full?", *problems])
