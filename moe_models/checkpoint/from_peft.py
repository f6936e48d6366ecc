"""PEFT's folder and its base model, on disk, as the source of an export: any plain LoRA, merged without a GPU.

Plain transformers and plain PEFT say which factors belong to which weight. The base model's tensors stay on disk until
they are asked for (:mod:`moe_models.checkpoint.unread`), one of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moe_models.checkpoint.merged import merged
from moe_models.checkpoint.proof import PROBE_SHAPE, tensor_fingerprints
from moe_models.checkpoint.source import fingerprint
from moe_models.checkpoint.unread import OnePartAtATime, Unread, unread_tensors
from moe_models.engine.blocks import take_projection
from moe_models.engine.lora import ADAPTER
from moe_models.engine.plain_transformers import as_shipped, without_zero3
from moe_models.errors import Problems, UserError, one_line
from moe_models.files import read_json
from moe_models.preflight.adapters import ADAPTER_CONFIG, plain_lora_problems


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` of a plain LoRA. Raises UserError, all problems at once, for any other."""
    config = read_json(folder / ADAPTER_CONFIG)
    Problems(plain_lora_problems(folder, config)).refuse()
    return config


def load_adapted(folder: Path, base: str, revision: str | None, dtype: Any = "auto") -> Any:
    """A PeftModel whose base model is still on disk, in ``eval`` mode on the CPU.

    Raises UserError if either cannot be read, or if the adapter does not fit the model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401 (for AutoModelForCausalLM)

    try:
        with without_zero3(), as_shipped(), unread_tensors():
            model, info = AutoModelForCausalLM.from_pretrained(
                base, revision=revision, dtype=dtype, output_loading_info=True
            )
            if info["missing_keys"]:
                raise UserError(f"{base}: {len(info['missing_keys'])} weights are missing; give the whole model")
            return PeftModel.from_pretrained(model, str(folder), torch_device="cpu").eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} on {base}: {one_line(error)}") from error


@as_shipped()
@torch.no_grad()
def answer(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What plain PEFT answers to the probe of a proof: (ids [B, T], logits [B, T, V] in fp32)."""
    base = model.get_base_model()
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, base.config.vocab_size, PROBE_SHAPE, generator=generator)
    OnePartAtATime(base, lambda name, values: None)
    return ids_BT, model(input_ids=ids_BT, use_cache=False).logits.float()


class PeftSource:
    """See :class:`~moe_models.checkpoint.source.TensorSource`: the base model's tensors, the adapter added.

    ``model`` is that of :func:`load_adapted`. :attr:`fingerprints` are those of what was handed out.
    """

    spread = False

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        self.dtype: torch.dtype = base.dtype
        self.fingerprints: dict[str, int] = {}
        self._tensors: dict[str, Any] = {}
        for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
            if "lora_" not in name:
                self._tensors[name.replace(".base_layer", "")] = tensor
        # Name of the weight -> PEFT's layer around it.
        self._layers: dict[str, Any] = {}
        for path, module in base.named_modules():
            if ADAPTER in getattr(module, "lora_A", ()):
                path = path.replace(".base_layer", "")
                self._layers[f"{path}.{getattr(module, 'parameter_name', 'weight')}"] = module
        self._unused = dict.fromkeys(self._layers)

    def writers(self) -> list[int]:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        return [0]

    def unasked(self) -> Iterable[str]:
        """Weights with an adapter that were not asked for."""
        return self._unused

    def dense(self, name: str) -> torch.Tensor | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        whole = self._merged(name)
        self.fingerprints[name] = fingerprint(whole)
        return whole

    def experts(self, block: str, projection: str) -> tuple[torch.Tensor, range] | None:
        """See :class:`~moe_models.checkpoint.source.TensorSource`."""
        name = f"{block}.experts.{'down_proj' if projection == 'down' else 'gate_up_proj'}"
        fused = self._merged(name)
        prints = dict(tensor_fingerprints(name, fused))
        self.fingerprints.update({key: value for key, value in prints.items() if key.endswith(f".{projection}")})
        return take_projection(fused, projection), range(len(fused))

    @torch.no_grad()
    def _merged(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if isinstance(tensor, Unread):
            tensor = tensor.get()
        layer = self._layers.get(name)
        if layer is None:
            return torch.as_tensor(tensor.detach())
        self._unused.pop(name, None)
        if hasattr(layer, "parameter_name"):
            B, A, scaling = layer.get_delta_factors(ADAPTER)
        else:
            A, B, scaling = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
        return merged(tensor.detach(), A, B, scaling)
