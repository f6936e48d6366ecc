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
    """Matches the names of tensors that transformers holds in fp32 in a model of any dtype (DeepSeek-V3's bias)."""
    patterns = getattr(_meta_model(config), "_keep_in_fp32_modules_strict", None)
    if not patterns:
        return None
    return re.compile("|".join(sorted(pattern.replace("*", ".*") for pattern in patterns)))


def _tied(model: Any) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _meta_model(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with without_zero3(), as_shipped(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
