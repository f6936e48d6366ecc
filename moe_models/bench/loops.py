"""The three ways in which recipes/bench.py trains: MoETrainer here, and the two of ``baselines.py``.

All take the same model (random weights from one seed), the same tokens, AdamW with fp32 master weights, clipping at 1,
and the auxiliary loss of the model's config. All ranks run a row together. Each function returns the figures that the
clock does not have: loss, load of the experts.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import TrainerCallback

from moe_models.bench.baselines import run_bare, run_transformers_ep
from moe_models.bench.clock import Clock
from moe_models.bench.model import ADAMW, CLIP, build_model, destroy, load_figures, make_rows, mean_of_ranks


class _ClockCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the clock from where HF calls its callbacks; reads the load before the Trainer resets it."""

    def __init__(self, clock: Clock, trainer: Any) -> None:
        self.clock = clock
        self.trainer = trainer
        self.load: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Everything is prepared."""
        self.clock.begin(self.trainer.model_wrapped.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step."""
        self.clock.step_end()
        if state.global_step == self.clock.total:
            routing = self.trainer.routing
            self.load = load_figures(routing.stats, routing._group)


def run_trainer(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """The layout as users run it: MoETrainer with the flags of recipes/finetune.py."""
    from datasets import Dataset
    from trl import SFTConfig

    from moe_models.config.ds_config import load_ds_config
    from moe_models.data import GPU_LOADER
    from moe_models.engine.cpu import adapt_for_cpu, join_cpu_ranks
    from moe_models.engine.native import register_deepspeed_moe
    from moe_models.families.table import FAMILIES
    from moe_models.trainer import MoETrainer

    # 1. The JSON, and what differs without a GPU.
    ds = load_ds_config(job["json_path"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        deepspeed = ds.deepspeed
        loader = GPU_LOADER
    else:
        deepspeed, _ = adapt_for_cpu(ds.deepspeed)
        loader = {"accelerator_config": join_cpu_ranks(), "dataloader_pin_memory": False}
    # 2. The rows, and those of the first step again: at the end of its rows a loader stops its workers, which took
    #    25 ms of the last step.
    rows = make_rows(job, clock.total)
    rows = torch.cat([rows, rows[: len(rows) // clock.total]])
    # 3. The trainer.
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=clock.total,
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["accumulation"],
            learning_rate=ADAMW["lr"],
            adam_beta1=ADAMW["betas"][0],
            adam_beta2=ADAMW["betas"][1],
            adam_epsilon=ADAMW["eps"],
            weight_decay=ADAMW["weight_decay"],
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",  # the tokens of each step are those of the other loops
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=job["seq_length"],
            gradient_checkpointing=job["checkpointing"],
            use_liger_kernel=job["liger"],
            torch_compile=job["compile"],
            bf16=on_gpu and ds.precision == "bf16",
            fp16=on_gpu and ds.precision == "fp16",
            seed=job["seed"],
            deepspeed=deepspeed,
            **loader,
        )
        model = build_model(job, device)
        if ds.moe.layer is not None:
            model = register_deepspeed_moe(model, ds.moe.layer, FAMILIES[model.config.model_type])
        trainer = MoETrainer(
            model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": rows.numpy()}),
            processing_class=_tokenizer(),
            balance=ds.moe.balance,
            kernels=ds.moe.kernels,
            dispatch=ds.moe.dispatch,
        )
        callback = _ClockCallback(clock, trainer)
        trainer.add_callback(callback)
        trainer.train()
        # 4. The loss over all steps. HF's is this rank's where nothing was logged.
        logged = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry]
        loss = mean_of_ranks(torch.tensor(logged[-1], device=device))
        destroy(trainer.model_wrapped)
    return {"loss": loss, **callback.load}


def _tokenizer() -> Any:
    """A tokenizer, because SFTTrainer asks for one; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


LOOPS = {"trainer": run_trainer, "bare": run_bare, "transformers_ep": run_transformers_ep}
"""``BenchLayout.kind`` -> the loop."""
