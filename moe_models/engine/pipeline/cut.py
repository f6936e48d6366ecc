"""One stage of a Hugging Face model: the other stages' parts are taken out, and what is left keeps its names.

``model.layers.3.mlp`` is the same module in every layout. So AutoEP, native layers, the router's hooks, checkpoints and
the export find what they always find, and Hugging Face's own forward pass builds masks and rotary positions and
recomputes activations in each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from moe_models.engine.blocks import hf_model
from moe_models.families.stages import EMBEDDING, HEAD, Stage
from moe_models.families.table import FAMILIES


class Elsewhere(nn.Module):
    """Instead of a module that another stage holds: hands on what it is given."""

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """The first argument."""
        return hidden


def keep_stage(model: Any, stage: Stage) -> None:
    """Take everything out of ``model`` that ``stage`` does not hold; does no harm twice.

    With tied embeddings the first stage keeps the weight as embedding and the last one as head.
    """
    model.pipeline_stage = stage
    base = model.model
    for layer in range(len(base.layers)):
        if layer not in stage.layers:
            base.layers[layer] = Elsewhere()
    if not stage.first:
        base.embed_tokens = Elsewhere()
        if hasattr(base, "embedding_multiplier"):  # GraniteMoE scales hidden states that it is given, too
            base.embedding_multiplier = 1.0
    if not stage.last:
        setattr(base, FAMILIES[model.config.model_type].layer_names.final, Elsewhere())
        model.lm_head = Elsewhere()


def stage_kept(model: Any) -> Stage | None:
    """The stage that :func:`keep_stage` left of a Hugging Face model; None where it is whole."""
    stage: Stage | None = getattr(hf_model(model), "pipeline_stage", None)
    return stage


def is_elsewhere(model: nn.Module, path: str) -> bool:
    """Whether the module at ``path`` of the Hugging Face model is in another stage."""
    module: Any = hf_model(model)
    for name in path.split("."):
        module = getattr(module, name, None)
        if isinstance(module, Elsewhere):
            return True
    return False


def stage_held(engine: Any) -> Stage | None:
    """The stage that this rank's engine holds; None where it has the whole model."""
    stage: Stage | None = getattr(engine.module, "stage", None)
    return stage


def tied_names(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """Name of a parameter of this stage -> the name that a checkpoint has for it, where they differ.

    A tied head is saved as the embedding, and only the stage that has both knows that they are one.
    """
    if not config.get("tie_word_embeddings"):
        return {}
    held = dict(model.named_parameters())
    if HEAD in held and EMBEDDING not in held:
        return {HEAD: EMBEDDING}
    return {}
