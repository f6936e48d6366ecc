"""The loops that recipes/bench.py compares MoETrainer with: a bare deepspeed.initialize, and transformers' own EP.

Model, tokens, optimizer and clipping are those of ``loops.py``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

from moe_models.bench.clock import Clock
from moe_models.bench.model import ADAMW, CLIP, build_model, destroy, load_figures, make_rows, mean_of_ranks
from moe_models.routing.load import LoadStats


def run_bare(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """A deepspeed.initialize loop as DeepSpeed's documentation writes it, on the model's own loss."""
    import deepspeed

    from moe_models.config.ds_config import load_ds_config
    from moe_models.engine.autoep import register_presets
    from moe_models.engine.cpu import adapt_for_cpu

    # 1. The JSON, with numbers for what HF's Trainer would fill in.
    config = copy.deepcopy(load_ds_config(job["json_path"]).deepspeed)
    if device.type != "cuda":
        config = adapt_for_cpu(config)[0]
    params = config.get("optimizer", {}).get("params", {})
    for key, value in params.items():
        if value == "auto":
            params[key] = ADAMW[key]
    config |= {
        "train_micro_batch_size_per_gpu": job["micro_batch"],
        "gradient_accumulation_steps": job["accumulation"],
        "gradient_clipping": CLIP,
    }
    config.pop("train_batch_size", None)
    # 2. Model and engine.
    register_presets()
    model = build_model(job, device)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    # 3. The loop. The loss is summed on the device: reading it would make the host wait.
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
    destroy(engine)
    return figures


def run_transformers_ep(job: dict[str, Any], clock: Clock, device: torch.device) -> dict[str, Any]:
    """transformers' expert parallelism: FSDP2 on one mesh, the experts on another; fp32 weights, bf16 computation."""
    from transformers.distributed import DistributedConfig

    # 1. The model, spread over the ranks.
    world = dist.get_world_size()
    on_gpu = device.type == "cuda"
    model = build_model(job, device)
    if on_gpu:
        model = model.float()
    layout = DistributedConfig(ep_size=job["ep_size"], fsdp_size=world, fsdp_mixed_precision=on_gpu)
    layout, _, meshes = type(model).prepare_distribute_model(layout)
    model = type(model).maybe_distribute_model(model, layout, meshes)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW, fused=on_gpu)
    # 2. The loop: gradients are exchanged in the last micro-batch of a step only.
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


@torch.no_grad()
def clip_shards(parameters: Any, limit: float) -> torch.Tensor:
    """Scale gradients that are DTensors without replicas to a norm of at most ``limit``; returns the norm. Collective.

    torch's clip_grad_norm_ refuses gradients on two meshes.
    """
    # 1. This rank's shards.
    shards = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            shards.append(gradient.to_local() if hasattr(gradient, "to_local") else gradient)
    # 2. The norm over all ranks: no two of them hold the same element, so squares add up.
    norms = torch._foreach_norm([shard for shard in shards if shard.numel()])
    squares = torch.stack(norms).float().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    # 3. Scaled in place, as torch does it.
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(shards, factor)
    return norm


def _batches(job: dict[str, Any], clock: Clock, device: torch.device) -> Any:
    """For each optimizer step the micro-batches of this rank, as a data collator makes them."""
    # Rows lie as HF's sampler deals them out: by step, then micro-batch, then rank.
    rows = make_rows(job, clock.total)
    shape = (clock.total, job["accumulation"], dist.get_world_size(), job["micro_batch"], job["seq_length"])
    for step in rows.view(shape):
        batches = []
        for ids in step[:, dist.get_rank()].to(device).unbind():
            mask = torch.ones_like(ids)
            batches.append({"input_ids": ids, "labels": ids, "attention_mask": mask, "use_cache": False})
        yield batches


class _Tap:
    """Counts the routers' choices in the profiled steps of a loop that has no MoETrainer."""

    def __init__(self, model: Any, job: dict[str, Any], device: torch.device) -> None:
        self._model = model
        self._job = job
        self._device = device
        self._stats: LoadStats | None = None

    def attach(self) -> None:
        """Put the hooks in."""
        from moe_models.engine.blocks import find_blocks
        from moe_models.families.table import FAMILIES
        from moe_models.routing.tap import RouterTap

        config = self._job["model_config"]
        family = FAMILIES[config["model_type"]]
        found = find_blocks(self._model)
        paths = [block.path for block in found]
        experts = family.expert_counts(config)
        self._stats = LoadStats(paths, experts, self._job["ep_size"], family.router.score, self._device)
        RouterTap(self._model, found, self._stats)

    def new_step(self) -> None:
        """Forget what was counted: only the coming optimizer step counts."""
        if self._stats is not None:
            self._stats.reset(training=True)

    def read(self) -> dict[str, float]:
        """The load of the last step."""
        return load_figures(self._stats)
