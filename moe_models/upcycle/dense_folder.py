"""A dense checkpoint folder, read without its weights: config, tensor headers, and everything that is wrong with it.

Used by `upcycle`, which must refuse before it writes. Covers the pre-norm SwiGLU family: Llama, Mistral, Qwen2, Qwen3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from moe_models.errors import one_line
from moe_models.families.table import Family

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names in safetensors headers -> the dtypes that experts can be made of."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says of one tensor, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_dense(folder: Path, targets: Mapping[str, Family]) -> tuple[Any, dict[str, Header], list[str]]:
    """Config, headers by tensor name, and one line for each thing that is broken or that a MoE twin cannot express.

    ``targets`` says which dense ``model_type`` becomes which family. Config and headers mean something only if there
    are no problems.
    """
    if not folder.is_dir():
        return None, {}, [f"{folder}: is not a folder; name the folder of a dense Hugging Face checkpoint"]
    config, problems = _read_config(folder / "config.json", targets)
    headers, header_problems = read_headers(folder)
    problems += header_problems
    if config is not None and headers:
        problems += _tensor_problems(folder, config, headers)
    return config, headers, problems


def _read_config(file: Path, targets: Mapping[str, Family]) -> tuple[Any, list[str]]:
    """The config of the stock class, or None where it cannot be had; and a line for each thing that is wrong."""
    # 1. A file that cannot be read, or a model that has no MoE twin: nothing else can be said about it.
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        return None, [f"{file}: is missing; name the folder of a dense Hugging Face checkpoint"]
    except ValueError as error:
        return None, [f"{file}: is not JSON ({error}); download it again"]
    model_type = raw.get("model_type")
    if model_type not in targets:
        return None, [f"{file}: model_type={model_type!r}: must be one of {', '.join(targets)}"]

    # 2. What the MoE class would compute differently.
    problems = [f"{file}: {line}" for line in _not_expressible(raw, targets[model_type])]

    # 3. What transformers itself refuses.
    try:
        config = AutoConfig.from_pretrained(file.parent)
    except Exception as error:  # huggingface_hub's strict dataclasses raise their own types
        return None, [*problems, f"{file}: transformers refuses it: {one_line(error)}"]
    return config, problems


def _not_expressible(raw: dict[str, Any], target: Family) -> list[str]:
    """One line for each key of config.json that no supported MoE class has."""
    wrong = []
    if "auto_map" in raw:
        wrong.append("auto_map: the checkpoint brings its own modelling code; only stock classes can be translated")
    if raw.get("quantization_config"):
        wrong.append("quantization_config: the weights are quantized; dequantize them first (to bf16, say)")
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        wrong.append(f"hidden_act={activation!r}: must be 'silu'; experts are SwiGLU")
    if raw.get("mlp_bias"):
        wrong.append("mlp_bias=true: must be false; experts have no bias")
    if raw.get("attention_bias") and not target.attention.output_bias:
        wrong.append("attention_bias=true: must be false; no supported MoE class has this bias on o_proj")
    if raw.get("use_sliding_window"):
        wrong.append("use_sliding_window=true: must be false; the MoE class has another pattern of layers")
    other_kinds = sorted(set(raw.get("layer_types") or ()) - {"full_attention"})
    if other_kinds:
        wrong.append(f"layer_types has {', '.join(other_kinds)}: must be full_attention in every layer")
    return wrong


def read_headers(folder: Path) -> tuple[dict[str, Header], list[str]]:
    """Shape and dtype of every tensor of a sharded or single safetensors checkpoint, and what cannot be read."""
    # 1. Which files: a single one comes first, as in transformers.
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = [folder / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return {}, [f"{index}: has no readable weight_map ({error}); download it again"]
    else:
        return {}, [f"{folder}: has no {single.name} and no {index.name}; write it with save_pretrained first"]

    # 2. Their headers. One bad file makes the set useless: what its tensors are is not known.
    headers: dict[str, Header] = {}
    problems = []
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (this handle is no dict)
                    part = shard.get_slice(name)
                    dtype = part.get_dtype()
                    if dtype not in DTYPES:
                        problems.append(f"{file}: {name} is {dtype}: must be one of {', '.join(DTYPES)}; dequantize it")
                        continue
                    headers[name] = Header(file=file, shape=tuple(part.get_shape()), dtype=DTYPES[dtype])
        except FileNotFoundError:
            problems.append(f"{file}: is missing, but {index.name} names it; download it again")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: cannot be read ({error}); download it again")
    if problems:
        return {}, problems
    return headers, []


def meta_model(config: Any) -> torch.nn.Module:
    """The stock model class of a config without memory: names and shapes only."""
    with torch.device("meta"):
        model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def count_parameters(config: Any) -> int:
    """Parameters of the stock model class; tied embeddings count once."""
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def _tensor_problems(folder: Path, config: Any, headers: dict[str, Header]) -> list[str]:
    """Compare the files with what the dense class expects: nothing missing, nothing left over, every shape right."""
    state = meta_model(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = []

    missing = sorted(expected.keys() - headers.keys() - optional)
    if missing:
        problems.append(f"{folder}: lacks {len(missing)} tensors, such as {missing[0]}; download it again")

    unknown = headers.keys() - expected.keys()
    extra = sorted(name for name in unknown if not name.endswith("rotary_emb.inv_freq"))  # of old checkpoints
    if extra:
        problems.append(
            f"{folder}: {config.model_type} does not know {len(extra)} tensors, such as {extra[0]}; remove them"
        )

    shared = expected.keys() & headers.keys()
    misshapen = sorted(name for name in shared if headers[name].shape != expected[name])
    if misshapen:
        name = misshapen[0]
        example = f"{name} is {headers[name].shape}: must be {expected[name]} by its config.json"
        problems.append(f"{folder}: {len(misshapen)} tensors have a wrong shape, such as {example}")
    return problems
