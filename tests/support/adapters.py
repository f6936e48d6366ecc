"""The two sides of the adapters' tests: MoETrainer with PEFT's config on N ranks, and single-process PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tests.support import parity

LEARNING_RATE = 2e-2
"""B starts at zero. With this rate five steps move it far enough that the adapter is half of the logits."""

CLIP = 0.3
"""Below the norms seen: with adapters on experts alone they are 0.4 to 0.6."""

ADAM_EPS = 1e-5
"""As parity.ADAM_EPS, for a learning rate that is twenty times higher: rounding noise of 1e-9 in a gradient then moves
a factor by 2e-6 in a step, not by 2e-5."""

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SEED = 42


def lora(model_type: str, which: str = "both", **options: Any) -> Any:
    """PEFT's config for a tiny model of the family: ``attention``, ``experts``, ``both``, ``gate_up``, ``down``,
    ``shared``."""
    from peft import LoraConfig

    from moe_models.families.adapters import attention_targets
    from moe_models.families.table import FAMILIES
    from tests.support.tiny import TINY

    attention = list(attention_targets(FAMILIES[model_type], TINY[model_type]))
    shared = ["gate_proj", "up_proj", "down_proj"]
    modules, parameters = {
        "attention": (attention, None),
        "experts": ([], EXPERTS),
        "both": (attention, EXPERTS),
        "gate_up": ([], EXPERTS[:1]),
        "down": (attention, EXPERTS[1:]),
        "shared": (attention + shared, EXPERTS),
    }[which]
    return LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=modules, target_parameters=parameters, **options
    )


def build(source: str, out: str, config: dict[str, Any], which: str = "both", **options: Any) -> Any:
    """A trainer of adapters on this rank."""
    import json

    from moe_models.trainer import MoETrainer

    model_type = json.loads((Path(source) / "config.json").read_text())["model_type"]
    peft_config = options.pop("peft_config", None) or lora(model_type, which)

    class AdapterTrainer(MoETrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, peft_config=peft_config, **kwargs)

    return parity.build_trainer(
        source,
        out,
        config,
        trainer_class=AdapterTrainer,
        **{"learning_rate": LEARNING_RATE, "seed": SEED, "adam_epsilon": ADAM_EPS, "max_grad_norm": CLIP, **options},
    )


def train_case(
    source: str, out: str, config: dict[str, Any], which: str = "both", accumulation: int = 1, **options: Any
) -> dict[str, Any]:
    """Train five steps and export; runs on every rank of a cluster."""
    trainer = build(source, out, config, which, accumulation=accumulation, **options)
    trainer.train()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in history],
        "aux_loss": [entry.get("aux_loss") for entry in history],
        "grad_norm": [entry["grad_norm"] for entry in history],
        "batches": trainer.batches,
        "proof": trainer.last_proof,
        "folder": f"{out}/adapter",
    }


def reference(
    source: Path, model_type: str, which: str, batches_by_rank: list[list[dict]], accumulation: int, out: Path
) -> dict[str, Any]:
    """Single-process PEFT on the same micro-batches: ``get_peft_model``, a plain torch loop, plain AdamW."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    set_seed(SEED)  # as TRL does before it draws the first values
    model = get_peft_model(model, copy.deepcopy(lora(model_type, which)))
    has_aux = hasattr(model.config, "router_aux_loss_coef")
    coefficient = getattr(model.config, "router_aux_loss_coef", 0.0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=parity.WEIGHT_DECAY)
    result: dict[str, Any] = {"loss": [], "aux_loss": [], "grad_norm": []}
    model.train()
    for step in range(len(batches_by_rank[0]) // accumulation):
        micro = [b for per_rank in batches_by_rank for b in per_rank[step * accumulation : (step + 1) * accumulation]]
        targets = sum(label != -100 for b in micro for row in b["labels"] for label in row[1:])
        total, aux_values = 0.0, []
        for batch in micro:
            tensors = {k: torch.tensor(v) for k, v in batch.items()}
            labels = tensors.pop("labels")
            output = model(**tensors, **({"output_router_logits": True} if has_aux else {}))
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            loss = loss / targets
            if has_aux:
                loss = loss + coefficient * output.aux_loss / len(micro)
                aux_values.append(output.aux_loss.item())
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        result["loss"].append(total)
        result["aux_loss"].append(sum(aux_values) / len(aux_values) if has_aux else None)
        result["grad_norm"].append(norm.item())
    model.save_pretrained(out)
    return {**result, "folder": str(out)}


def file_of(folder: str | Path) -> dict[str, Any]:
    """The tensors of an adapter's folder."""
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")
