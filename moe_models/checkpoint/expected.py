"""The tensors that a checkpoint of a config must hold, from the model class on the meta device."""

from __future__ import annotations

import re
from typing import Any

import torch

from moe_models.engine.plain_transformers import as_shipped, without_zero3


def expected_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Module-layout name -> shape of every tensor a checkpoint of this config holds, in model order.

    Built on the meta device: no memory, no weights. Tied tensors appear once, as ``save_pretrained`` writes them.
    """
    model = _meta_model(config)
    tied = _tied(model)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def tied_names(config: Any) -> set[str]:
    """Module-layout names of the tensors that share the memory of another one, and so are not part of a checkpoint."""
    return _tied(_meta_model(config))


def kept_in_fp32(config: Any) -> re.Pattern[str] | None:
    """Matches the names of tensors that transformers holds in fp32 in a model of any dtype: selection biases."""
    model = _meta_model(config, dtype=torch.bfloat16)
    patterns = {pattern.replace("*", ".*") for pattern in _strict(type(model)) | made_in_fp32(model)}
    if not patterns:
        return None
    return re.compile("|".join(sorted(patterns)))


# upstream: transformers 5.20.2: LFM2 makes its selection bias in fp32; under ZeRO-3 from_pretrained makes it bf16.
# Remove when: the class has it in _keep_in_fp32_modules_strict.
def keep_in_fp32(config: Any) -> None:
    """Let ``from_pretrained`` keep in fp32 what the class of ``config`` makes in fp32, under any ZeRO stage."""
    model = _meta_model(config, dtype=torch.bfloat16)
    made = made_in_fp32(model)
    if made:
        type(model)._keep_in_fp32_modules_strict = sorted(_strict(type(model)) | made)


def made_in_fp32(model: Any) -> set[str]:
    """The last parts of the names of what a class makes in fp32 in a bf16 model."""
    return {name.rpartition(".")[2] for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}


def _strict(kind: Any) -> set[str]:
    return set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())


def _tied(model: Any) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _meta_model(config: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with without_zero3(), as_shipped(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options)
