"""The two sides of every parity test: MoETrainer on N ranks, and single-process Hugging Face on the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STEPS = 5
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.3  # moves a weight by 1.5e-3 of itself in STEPS steps: decaying what must be spared cannot pass
ADAM_EPS = 1e-6
"""AdamW divides by the gradient's own size, so at the usual 1e-8 an element whose gradient is rounding noise (about
1e-9 here) moves by the full learning rate in a random direction. 1e-6 makes the step a continuous function of it."""
CLIP = 0.5  # below the norms seen (1 to 6), so that clipping is always active


def ds_config(stage: int, ep_size: int | None, **extra: Any) -> dict[str, Any]:
    """The smallest ds_config of a layout, fp32 and CPU; ``ep_size`` None means no expert parallelism."""
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True,
            },
        },
    }  # fmt: skip
    if ep_size is not None:
        config["expert_parallel"] = {"enabled": True, "autoep_size": ep_size}
    return {**config, **extra}


@contextmanager
def planted(owner: Any, name: str, wrong: Any) -> Iterator[None]:
    """A fault in this process, for as long as the block runs: ``owner.name`` is ``wrong``."""
    right = getattr(owner, name)
    setattr(owner, name, wrong)
    try:
        yield
    finally:
        setattr(owner, name, right)


def daily(cases: Sequence[Sequence[Any]], chosen: set[int]) -> list[Any]:
    """All cases for `-m conformance`; those with the ``chosen`` positions also for the default run."""
    import pytest

    marks = [[pytest.mark.conformance] + [pytest.mark.daily] * (i in chosen) for i in range(len(cases))]
    return [pytest.param(*case, marks=mark) for case, mark in zip(cases, marks, strict=True)]


def rows(count: int, seed: int = 0, vocab: int = 64) -> list[dict[str, list[int]]]:
    """Tokenised rows of unequal length, so that ranks and micro-batches hold unequal token counts."""
    import random

    rng = random.Random(seed)
    return [{"input_ids": [rng.randrange(3, vocab) for _ in range(rng.randrange(6, 25))]} for _ in range(count)]


def tokenizer() -> Any:
    """A tokenizer with one word per id; the rows are tokenised already, so only its special tokens matter."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<bos>", "<eos>"] + [f"w{i}" for i in range(3, 64)]
    core = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def build_trainer(
    source: str, output_dir: str, config: dict[str, Any], *, accumulation: int = 1, model: Any = None,
    trainer_class: Any = None, train_rows: Any = None, eval_rows: Any = None,
    balance: dict[str, Any] | None = None, check_conversion: str = "auto", **options: Any,
) -> Any:  # fmt: skip
    """A MoETrainer on this rank, as recipes/finetune.py builds it, that records the batches it consumes."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig

    from moe_models.checkpoint.expected import keep_in_fp32
    from moe_models.config.moe_section import Balance
    from moe_models.engine.cpu import join_cpu_ranks
    from moe_models.engine.library_globals import forget_engines
    from moe_models.trainer import MoETrainer

    class RecordingTrainer(trainer_class or MoETrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            kept = ("input_ids", "attention_mask", "labels")
            self.batches.append({k: inputs[k].tolist() for k in kept if k in inputs})
            return super().training_step(model, inputs, *args, **kwargs)

    forget_engines()
    config = copy.deepcopy(config)
    moe = config.pop("moe", {})
    args = SFTConfig(
        output_dir=output_dir,
        **{
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "max_steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "adam_epsilon": ADAM_EPS,
            "max_grad_norm": CLIP,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": 32,
            "disable_tqdm": True,
            "dataset_num_proc": None,
            **options,
        },
        deepspeed=config,
        accelerator_config=join_cpu_ranks(),
    )
    if model is None:
        keep_in_fp32(AutoConfig.from_pretrained(source))
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16 if args.bf16 else torch.float32)
    if "layer" in moe:
        from moe_models.config.moe_section import MoeLayer
        from moe_models.engine.native import register_deepspeed_moe
        from moe_models.families.table import FAMILIES

        register_deepspeed_moe(model, MoeLayer(**moe["layer"]), FAMILIES[model.config.model_type], check_conversion)
    trainer = RecordingTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(train_rows or rows(64)),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=tokenizer(),
        balance=None if balance is None else Balance(**balance),
        kernels=moe.get("kernels", "deepspeed"),
        dispatch=moe.get("dispatch", "auto"),
        check_conversion=check_conversion,
    )
    trainer.batches = []
    return trainer


def train_case(
    source: str, output_dir: str, config: dict[str, Any], accumulation: int = 1, **options: Any
) -> dict[str, Any]:
    """Train STEPS steps and export; runs on every rank of a cluster."""
    trainer = build_trainer(source, output_dir, config, accumulation=accumulation, **options)
    trainer.train()
    trainer.save_model()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "loss": [entry["loss"] for entry in history],
        "aux_loss": [entry.get("aux_loss") for entry in history],
        "grad_norm": [entry["grad_norm"] for entry in history],
        "z_loss": [entry.get("z_loss") for entry in history],
        "batches": trainer.batches,
        "proof": trainer.last_proof,
        "folder": f"{output_dir}/model",
    }


def adamw(model: Any) -> Any:
    """Plain torch; as in HF's Trainer, norms and biases do not decay."""
    import torch

    spared = [p for name, p in model.named_parameters() if "norm" in name or name.endswith("bias")]
    decayed = [p for name, p in model.named_parameters() if not ("norm" in name or name.endswith("bias"))]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, eps=ADAM_EPS, weight_decay=WEIGHT_DECAY)


def reference(
    source: Path, batches_by_rank: list[list[dict]], accumulation: int, out: Path, aux_loss_of: Any = None
) -> dict[str, Any]:
    """Single-process Hugging Face on the same micro-batches: plain torch loop, plain AdamW, plain clipping.

    Cross-entropy is averaged over all target tokens of the optimizer step. The auxiliary loss is a function of the
    micro-batch (it multiplies two averages over its tokens), so the reference computes it per micro-batch and averages:
    that is what the ranks do. ``aux_loss_of`` makes another one of the model's output. Weights go through
    ``save_pretrained``, hence in the hub layout.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    has_aux = hasattr(model.config, "router_aux_loss_coef")
    coefficient = getattr(model.config, "router_aux_loss_coef", 0.0)
    optimizer = adamw(model)
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
            loss = (
                torch.nn.functional.cross_entropy(
                    output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
                )
                / targets
            )
            if has_aux:
                aux_loss = aux_loss_of(output) if aux_loss_of else output.aux_loss
                loss = loss + coefficient * aux_loss / len(micro)
                aux_values.append(aux_loss.item())
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        result["loss"].append(total)
        result["aux_loss"].append(sum(aux_values) / len(aux_values) if has_aux else None)
        result["grad_norm"].append(norm.item())
    model.save_pretrained(out)
    result["folder"] = str(out)
    return result
