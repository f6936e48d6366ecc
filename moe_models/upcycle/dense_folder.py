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

from moe_models.families.table import Family

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a safetensors file says of one tensor, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_dense(folder: Path, targets: Mapping[str, Family]) -> tuple[Any, dict[str, Header], list[str]]:
    """Config, headers by tensor name, and one line for each thing that a MoE twin cannot express or that is broken.

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
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        return None, [f"{file}: is missing; name the folder of a dense Hugging Face checkpoint"]
    except ValueError as error:
        return None, [f"{file}: is not JSON ({error}); download it again"]
    model_type = raw.get("model_type")
    if model_type not in targets:
        return None, [f"{file}: model_type={model_type!r}: must be one of {', '.join(targets)}"]
    wrong = []
    if "auto_map" in raw:
        wrong.append("auto_map: the checkpoint brings its own modelling code; only stock classes can be translated")
    if raw.get("quantization_config"):
        wrong.append("quantization_config: the weights are quantized; dequantize them first (to bf16, say)")
    if (act := raw.get("hidden_act", "silu")) != "silu":
        wrong.append(f"hidden_act={act!r}: must be 'silu'; experts are SwiGLU")
    if raw.get("mlp_bias"):
        wrong.append("mlp_bias=true: must be false; experts have no bias")
    if raw.get("attention_bias") and not targets[model_type].attention.output_bias:
        wrong.append("attention_bias=true: must be false; no supported MoE class has this bias on o_proj")
    if raw.get("use_sliding_window"):
        wrong.append("use_sliding_window=true: must be false; the MoE class has another pattern of layers")
    if kinds := sorted(set(raw.get("layer_types") or ()) - {"full_attention"}):
        wrong.append(f"layer_types has {', '.join(kinds)}: must be full_attention in every layer")
    problems = [f"{file}: {line}" for line in wrong]
    try:
        return AutoConfig.from_pretrained(file.parent), problems
    except Exception as error:  # huggingface_hub's strict dataclasses raise their own types
        return None, [*problems, f"{file}: transformers refuses it: {' '.join(str(error).split())}"]


def read_headers(folder: Path) -> tuple[dict[str, Header], list[str]]:
    """Shape and dtype of every tensor of a sharded or single safetensors checkpoint, and what cannot be read."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():  # first, as transformers does
        files = [single]
    elif index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return {}, [f"{index}: has no readable weight_map ({error}); download it again"]
    else:
        return {}, [f"{folder}: has no {single.name} and no {index.name}; write it with save_pretrained first"]
    headers: dict[str, Header] = {}
    problems = []
    for file in files:
        try:
            with safe_open(file, "pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (this handle is no dict)
                    part = shard.get_slice(name)
                    if (dtype := part.get_dtype()) in DTYPES:
                        headers[name] = Header(file=file, shape=tuple(part.get_shape()), dtype=DTYPES[dtype])
                    else:
                        problems.append(f"{file}: {name} is {dtype}: must be one of {', '.join(DTYPES)}; dequantize it")
        except FileNotFoundError:
            problems.append(f"{file}: is missing, but {index.name} names it; download it again")
        except (SafetensorError, OSError) as error:
            problems.append(f"{file}: cannot be read ({error}); download it again")
    return ({} if problems else headers), problems


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
    expected = {name: tuple(p.shape) for name, p in meta_model(config).state_dict().items()}
    optional = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = []
    if missing := sorted(expected.keys() - headers.keys() - optional):
        problems.append(f"{folder}: lacks {len(missing)} tensors, such as {missing[0]}; download it again")
    if extra := sorted(n for n in headers.keys() - expected.keys() if not n.endswith("rotary_emb.inv_freq")):
        problems.append(
            f"{folder}: {config.model_type} does not know {len(extra)} tensors, such as {extra[0]}; remove them"
        )
    if wrong := sorted(n for n in expected.keys() & headers.keys() if headers[n].shape != expected[n]):
        shapes = f"{wrong[0]} is {headers[wrong[0]].shape}: must be {expected[wrong[0]]} by its config.json"
        problems.append(f"{folder}: {len(wrong)} tensors have a wrong shape, such as {shapes}")
    return problems
