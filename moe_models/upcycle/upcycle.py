"""Sparse upcycling: a dense checkpoint folder becomes a Mixture-of-Experts checkpoint folder that computes the same.

Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv 2212.05055):
every expert starts as a copy of the dense MLP, the router starts fresh, everything else is copied. All targets scale a
token's top-k routing weights to sum to 1, so K equal experts give what the one dense MLP gave: same logits, same loss.

    llama, mistral -> mixtral     same attention, norms and SwiGLU
    qwen2          -> qwen2_moe   Qwen2 has biases on q, k, v; Mixtral has none. Qwen2-MoE always has a shared expert: a
                                  small one whose down projection is zero adds exactly 0 at first, and can still learn
    qwen3          -> qwen3_moe   keeps Qwen3's q and k norms; no shared expert

Tensors stream from shard to shard: peak memory is one output shard plus one tensor, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moe_models.errors import UserError
from moe_models.families.table import FAMILIES, Family
from moe_models.upcycle.dense_folder import Header, count_parameters, read_dense, read_headers

RouterInit = Literal["normal", "zeros"]
Progress = Callable[[int, int], None]
"""Called after each tensor with (bytes done, bytes in all)."""

SHARED_EXPERT_SIZE = 128
_MLP = re.compile(r"(model\.layers\.\d+\.)mlp\.(gate|up|down)_proj\.weight")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_SIDE_FILES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
_DENSE_KEYS = {"architectures", "attention_bias", "dtype", "layer_types", "max_window_layers", "mlp_bias", "model_type"}
_DENSE_KEYS |= {"pretraining_tp", "transformers_version", "use_sliding_window", "_name_or_path"}


TARGETS = {source: family for family in FAMILIES.values() for source in family.dense_sources}
"""Dense `model_type` -> the family that it becomes."""


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How an output tensor is made: `source` with noise of `noise` times its deviation, or drawn from N(0, `std`)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str | None = None
    noise: float = 0.0
    std: float = 0.0

    @property
    def nbytes(self) -> int:
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
    progress: Progress | None = None,
) -> UpcycleReport:
    """Write the MoE checkpoint of the dense checkpoint in `dense_dir` to `output_dir`, in the target's hub layout.

    In each layer the MLP (gate and up [F, D], down [D, F]) becomes E experts of the same shapes and dtype and a router
    [E, D]. Tokenizer, generation config and licence files are copied. The folder appears complete or not at all.

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
        progress: see `Progress`.

    Raises:
        UserError: all wrong inputs together, before any weight is read; or a disk that cannot take the output.
    """
    dense, output = Path(dense_dir), Path(output_dir)
    shard_size = _parse_size(max_shard_size)
    config, headers, problems = read_dense(dense, TARGETS)
    problems += _argument_problems(num_experts, num_experts_per_tok, router_init, noise)
    if not shard_size:
        problems.append(f"max_shard_size={max_shard_size!r}: must be a size above 0, such as 5GB or 500MiB")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        problems.append(f"output_dir={output}: exists and is not an empty folder; name another, or remove this one")
    if problems:
        raise UserError(problems)

    target = TARGETS[config.model_type]
    moe_config = _moe_config(config, target, num_experts, num_experts_per_tok, headers)
    plan = _plan(config, headers, target, num_experts, router_init, noise)
    nbytes = sum(recipe.nbytes for recipe in plan.values())
    scratch = output.parent / f".{output.name}.upcycling-{os.getpid()}"
    try:
        scratch.mkdir(parents=True)
        if (free := shutil.disk_usage(scratch).free) < nbytes:
            raise UserError(
                f"output_dir={output}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f}; free some"
            )
        shards = _write(scratch, plan, headers, shard_size, seed, progress)
        moe_config.save_pretrained(scratch)
        for file in dense.iterdir():
            if _is_side_file(file):
                shutil.copyfile(file, scratch / file.name)
        _check(scratch, plan)
        scratch.rename(output)  # onto nothing or an empty folder, in one step: nobody ever sees half a checkpoint
    except (OSError, SafetensorError) as error:
        raise UserError(f"output_dir={output}: {error}; name a folder that can be written") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

    total = count_parameters(moe_config)
    idle = config.num_hidden_layers * (num_experts - num_experts_per_tok) * 3 * config.hidden_size
    return UpcycleReport(
        output_dir=output,
        model_type=target.model_type,
        dense_parameters=count_parameters(config),
        total_parameters=total,
        active_parameters=total - idle * config.intermediate_size,
        shards=shards,
        nbytes=nbytes,
    )


def _parse_size(size: int | str) -> int:
    """5000000000, "5GB" (powers of 1000) or "5GiB" (powers of 1024) -> bytes; 0 if it cannot be read."""
    match = _SIZE.fullmatch(str(size).strip())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) if match else 0


def _argument_problems(num_experts: int, top_k: int, router_init: str, noise: float) -> list[str]:
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
    """The dense config under the target's class; every key is carried over but those that only dense models have."""
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
) -> dict[str, _Recipe]:
    """Output tensor name -> how it is made, layer by layer, so that a layer's experts lie together in a shard."""
    D, S, std = config.hidden_size, SHARED_EXPERT_SIZE, config.initializer_range
    fresh = {"gate.weight": ((num_experts, D), std if router_init == "normal" else 0.0)}
    if target.shared is not None:
        fresh |= {f"{target.shared.name}.{name}_proj.weight": ((S, D), std) for name in ("gate", "up")}
        fresh |= {f"{target.shared.name}.down_proj.weight": ((D, S), 0.0)}
        fresh |= {f"{target.shared.gate}.weight": ((1, D), 0.0)}
    plan: dict[str, _Recipe] = {}
    for name in sorted(headers, key=lambda n: [int(part) if part.isdigit() else part for part in n.split(".")]):
        shape, dtype = headers[name].shape, headers[name].dtype
        if mlp := _MLP.fullmatch(name):
            block = mlp[1] + target.hub_block
            projection = target.hub_expert_names[mlp[2]]
            expert = _Recipe(shape=shape, dtype=dtype, source=name, noise=noise)
            plan |= {f"{block}.experts.{e}.{projection}.weight": expert for e in range(num_experts)}
            if mlp[2] == "gate":  # once per layer
                plan |= {f"{block}.{n}": _Recipe(shape=s, dtype=dtype, std=scale) for n, (s, scale) in fresh.items()}
        elif not name.endswith("rotary_emb.inv_freq"):  # old checkpoints hold it; it follows from the config
            plan[name] = _Recipe(shape=shape, dtype=dtype, source=name)
    return plan


def _make(name: str, recipe: _Recipe, source: torch.Tensor | None, seed: int) -> torch.Tensor:
    """One output tensor; what is random comes in float32 from a stream that only (seed, name) decides."""
    if source is not None and not recipe.noise:
        return source.clone()  # safetensors refuses to write one storage under two names
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    random = torch.randn(recipe.shape, generator=torch.Generator().manual_seed(stream))
    if source is None:
        return random.mul_(recipe.std).to(recipe.dtype)
    return random.mul_(recipe.noise * source.float().std()).add_(source).to(recipe.dtype)


def _split(plan: dict[str, _Recipe], shard_size: int) -> list[list[str]]:
    """Names of each shard, in order; a shard passes `shard_size` only if its one tensor does."""
    shards, filled = [list[str]()], 0
    for name, recipe in plan.items():
        if shards[-1] and filled + recipe.nbytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += recipe.nbytes
    return shards


def _write(
    folder: Path, plan: dict[str, _Recipe], headers: dict[str, Header], size: int, seed: int, progress: Progress | None
) -> int:
    """Fill and write shard after shard, only one of them in memory; returns how many."""
    shards, weight_map = _split(plan, size), dict[str, str]()
    total, done = sum(recipe.nbytes for recipe in plan.values()), 0
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(safe_open(file, "pt")) for file in {h.file for h in headers.values()}}
        for i, names in enumerate(shards, start=1):
            file = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name in names:
                recipe = plan[name]
                source = files[headers[recipe.source].file].get_tensor(recipe.source) if recipe.source else None
                tensors[name] = _make(name, recipe, source, seed)
                done += recipe.nbytes
                if progress:
                    progress(done, total)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(shards)


def _is_side_file(file: Path) -> bool:
    """Tokenizer, generation config, licence: what belongs to the weights but is neither weights nor their config."""
    skipped = file.name == "config.json" or file.name.endswith(".index.json")
    known = file.suffix in _SIDE_FILES or file.stem.upper() in {"LICENSE", "LICENCE", "NOTICE"}
    return known and not skipped and file.is_file()


def _check(folder: Path, plan: dict[str, _Recipe]) -> None:
    """Read the written folder back: each planned tensor is there, with its shape and dtype, and nothing else."""
    headers, problems = read_headers(folder)
    found = {name: (header.shape, header.dtype) for name, header in headers.items()}
    if problems or found != {name: (recipe.shape, recipe.dtype) for name, recipe in plan.items()}:
        raise UserError([f"{folder}: what was written is not what was planned; is the disk full?", *problems])
