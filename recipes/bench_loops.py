"""The three ways in which recipes/bench.py trains: MoETrainer, a bare deepspeed.initialize loop, transformers' own EP.

All take the same model (random weights from one seed), the same tokens, AdamW with fp32 master weights, clipping at 1,
and the auxiliary loss of the model's config. A row is run by all ranks; each function returns the figures that only it
knows (loss, load of the experts).
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from bench_clock import Clock
from moe_models.load_stats import LoadStats, overall

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-5, (0.9, 0.95), 1e-8, 0.1, 1.0


def build_model(job: dict[str, Any], device: torch.device) -> Any:
    """The model of the row with random weights, whole, on the device of each rank; the same in every layout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.hf_folder import without_zero3

    config = AutoConfig.for_model(**job["model_config"])
    if hasattr(config, "router_aux_loss_coef"):
        config.output_router_logits = True
    torch.manual_seed(job["seed"])
    with without_zero3(), device:
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=job["attn_implementation"],
            dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        )
    return model.to(device).train()


def make_rows(job: dict[str, Any], steps: int) -> torch.Tensor:
    """Token ids [sequences, length] of all ranks and optimizer steps."""
    generator = torch.Generator().manual_seed(job["seed"])
    vocab = job["model_config"]["vocab_size"]
    count = steps * job["micro_batch"] * job["accumulation"] * dist.get_world_size()
    if job["tokens"] == "uniform":
        return torch.randint(0, vocab, (count, job["seq_length"]), generator=generator)
    weights = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
    drawn = torch.multinomial(weights, count * job["seq_length"], replacement=True, generator=generator)
    return drawn.view(count, job["seq_length"])


# ------------------------------------------------------------------------------------------------------ MoETrainer


class _ClockCallback(TrainerCallback):  # type: ignore[misc]
    """Drives the clock from where HF calls its callbacks; reads the load before the Trainer resets it."""

    def __init__(self, clock: Clock, trainer: Any) -> None:
        self.clock, self.trainer = clock, trainer
        self.load: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Everything is prepared."""
        self.clock.begin(self.trainer.model_wrapped.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step."""
        self.clock.step_end()
        if state.global_step == self.clock.total:
            routing = self.trainer.routing
            self.load = _load(routing.stats, routing._group)


def run_trainer(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """The layout as users run it: MoETrainer with the flags of recipes/finetune.py."""
    from datasets import Dataset
    from trl import SFTConfig

    from moe_models.config import adapt_for_cpu, load_ds_config
    from moe_models.cpu import join_cpu_ranks
    from moe_models.families import FAMILIES
    from moe_models.native import register_deepspeed_moe
    from moe_models.trainer import MoETrainer

    ds = load_ds_config(job["json_path"])
    on_gpu = device.type == "cuda"
    rows = make_rows(job, clock.total)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=clock.total,
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["accumulation"],
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",  # the tokens of each step are those of the other loops
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            max_length=job["seq_length"],
            gradient_checkpointing=job["checkpointing"],
            use_liger_kernel=job["liger"],
            bf16=on_gpu and ds.precision == "bf16",
            fp16=on_gpu and ds.precision == "fp16",
            seed=job["seed"],
            deepspeed=ds.deepspeed if on_gpu else adapt_for_cpu(ds.deepspeed)[0],
            **({} if on_gpu else {"accelerator_config": join_cpu_ranks(), "dataloader_pin_memory": False}),
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
        )
        callback = _ClockCallback(clock, trainer)
        trainer.add_callback(callback)
        trainer.train()
        mine = [entry["train_loss"] for entry in trainer.state.log_history if "train_loss" in entry][-1]
        loss = mean_of_ranks(torch.tensor(mine, device=device))  # HF's is this rank's where nothing was logged
        _destroy(trainer.model_wrapped)
    return {"loss": loss, **callback.load}


def _tokenizer() -> Any:
    """SFTTrainer asks for one; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


# ---------------------------------------------------------------------------------------------------- the baselines


def run_bare(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """A deepspeed.initialize loop as DeepSpeed's documentation writes it, on the model's own loss."""
    import deepspeed

    from moe_models.autoep import register_presets
    from moe_models.config import adapt_for_cpu, load_ds_config

    config = copy.deepcopy(load_ds_config(job["json_path"]).deepspeed)
    if device.type != "cuda":
        config = adapt_for_cpu(config)[0]
    values = {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": WEIGHT_DECAY}
    params = config.get("optimizer", {}).get("params", {})
    params.update({key: values[key] for key, value in params.items() if value == "auto"})
    config |= {
        "train_micro_batch_size_per_gpu": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "gradient_clipping": CLIP,
    }
    config.pop("train_batch_size", None)
    register_presets()
    model = build_model(job, device)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tap = _Tap(engine.module, job, device)
    clock.on_profile = tap.attach
    clock.begin(engine.optimizer)
    loss = torch.zeros((), device=device)
    for step in _batches(job, clock, device):
        tap.new_step()
        for batch in step:
            output = engine(**batch)
            engine.backward(output.loss)
            engine.step()
            loss += output.loss.detach() / (len(step) * clock.total)
        clock.step_end()
    figures = {"loss": mean_of_ranks(loss), **tap.read()}
    _destroy(engine)
    return figures


def run_transformers_ep(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """transformers' expert parallelism: FSDP2 on one mesh, the experts on another; fp32 weights, bf16 computation.

    torch's clip_grad_norm_ refuses gradients on two meshes, so the norm is the sum over every rank's shards: no two
    ranks hold the same element.
    """
    from transformers.distributed import DistributedConfig

    world = dist.get_world_size()
    model = build_model(job, device)
    if device.type == "cuda":
        model = model.float()
    layout = DistributedConfig(ep_size=job["ep_size"], fsdp_size=world, fsdp_mixed_precision=device.type == "cuda")
    layout, _, meshes = type(model).prepare_distribute_model(layout)
    model = type(model).maybe_distribute_model(model, layout, meshes)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY,
        fused=device.type == "cuda",
    )  # fmt: skip
    tap = _Tap(model, job, device)
    clock.on_profile = tap.attach
    clock.begin(optimizer)
    loss = torch.zeros((), device=device)
    for step in _batches(job, clock, device):
        tap.new_step()
        for index, batch in enumerate(step):
            model.set_requires_gradient_sync(index == len(step) - 1)
            output = model(**batch)
            (output.loss / len(step)).backward()
            loss += output.loss.detach() / (len(step) * clock.total)
        clip_shards(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_end()
    return {"loss": mean_of_ranks(loss), **tap.read()}


def mean_of_ranks(loss: torch.Tensor) -> float:
    """As HF's Trainer reports it; collective."""
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


@torch.no_grad()
def clip_shards(parameters: Any, limit: float) -> torch.Tensor:
    """Scale gradients that are DTensors without replicas to a norm of at most ``limit``; returns the norm."""
    shards = [p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm([shard for shard in shards if shard.numel()])
    squares = torch.stack(norms).float().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    torch._foreach_mul_(shards, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _batches(job: dict[str, Any], clock: Clock, device: torch.device) -> Any:
    """For each optimizer step the micro-batches of this rank, as a data collator makes them."""
    rows = make_rows(job, clock.total)
    shape = (clock.total, job["accumulation"], dist.get_world_size(), job["micro_batch"], job["seq_length"])
    for step in rows.view(shape):
        ids = step[:, dist.get_rank()].to(device)
        yield [
            {"input_ids": x, "labels": x, "attention_mask": torch.ones_like(x), "use_cache": False}
            for x in ids.unbind()
        ]


class _Tap:
    """Counts the routers' choices in the profiled steps of a loop that has no MoETrainer."""

    def __init__(self, model: Any, job: dict[str, Any], device: torch.device) -> None:
        self._model, self._job, self._device = model, job, device
        self._stats: LoadStats | None = None

    def attach(self) -> None:
        """Put the hooks in."""
        from moe_models.families import FAMILIES
        from moe_models.router_tap import RouterTap, find_routers

        config = self._job["model_config"]
        family = FAMILIES[config["model_type"]]
        routers = find_routers(self._model, family, config)
        blocks, experts = [router.block for router in routers], family.expert_counts(config)
        self._stats = LoadStats(blocks, experts, self._job["ep_size"], routers[0].score_func, self._device)
        RouterTap(self._model, routers, self._stats)

    def new_step(self) -> None:
        """Count the coming optimizer step alone."""
        if self._stats is not None:
            self._stats.reset(training=True)

    def read(self) -> dict[str, float]:
        """The load of the last step."""
        return _load(self._stats)


def _load(stats: LoadStats | None, group: Any = None) -> dict[str, float]:
    layers = stats.read(True, group) if stats is not None else []
    if not layers:
        return {}
    figures = overall(layers)
    return {name: figures[name] for name in ("expert_load_max", "expert_load_worst", "rank_load_max")}


def _destroy(engine: Any) -> None:
    """End an engine and empty its tensors.

    DeepSpeed 0.19.8 leaves ZeRO-3's engine in a cycle through autograd that Python's collector does not see, and the
    next row would start with a full GPU.
    """
    optimizer = engine.optimizer
    engine.destroy()
    for parameter in engine.module.parameters():
        parameter.grad = None
        for held in (parameter, getattr(parameter, "ds_tensor", parameter)):
            held.data = torch.empty(0, dtype=held.dtype, device=held.device)
    for holder in (getattr(optimizer, "optimizer", None), optimizer):
        if holder is not None:
            holder.__dict__.clear()


LOOPS = {"trainer": run_trainer, "bare": run_bare, "transformers_ep": run_transformers_ep}
