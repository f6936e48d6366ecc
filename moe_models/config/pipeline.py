"""DeepSpeed's ``"pipeline"`` section as a type."""

from __future__ import annotations

from pydantic import Field

from moe_models.config.section import Section


class Pipeline(Section):
    """``"pipeline": {"stages": 2}``: cut the decoder layers into stages, each on its own ranks.

    DeepSpeed's other keys of this section say how it cuts and recomputes a list of layers. Here the cut follows from
    the model (``families/stages.py``), and recomputation is ``--gradient_checkpointing``.
    """

    stages: int = Field(1, ge=1)
    """Stages of the pipeline; it must divide the world size. 1 is off."""
