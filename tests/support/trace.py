"""Recording what DeepSpeed hands to torch.distributed during one optimizer step of MoETrainer."""

from __future__ import annotations

from collections import Counter
from typing import Any

LENGTH = 32
MICRO_BATCH = 2


def traced_step(source: str, out: str, config: dict[str, Any], accumulation: int, recompute: bool) -> dict[str, Any]:
    """Runs on every rank: train two steps on full rows and record the second.

    Returns ``flows``, {(collective, ranks of the group): bytes of floating-point matrices}, and ``groups``, the
    process groups that DeepSpeed made, by name.
    """
    import torch
    import torch.distributed as dist
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import groups as ds_groups
    from transformers import TrainerCallback

    from tests.support import parity

    flows: Counter[tuple[str, tuple[int, ...]]] = Counter()
    recording = [False]

    def note(kind: str, tensors: Any, group: Any) -> None:
        tensors = tensors if isinstance(tensors, list | tuple) else [tensors]
        ranks = tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))
        size = sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point() and t.numel() > 8)
        if recording[0] and len(ranks) > 1 and size:
            flows[kind, ranks] += size

    # method of DeepSpeed's backend -> (collective, which argument is the payload)
    watched = {
        "all_reduce": ("all-reduce", 0),
        "all_to_all_single": ("all-to-all", 1),
        "all_gather_into_tensor": ("all-gather", 0),
        "all_gather": ("all-gather", 0),
        "all_gather_coalesced": ("all-gather", 0),
        "reduce_scatter_tensor": ("reduce-scatter", 1),
        "reduce": ("reduce", 0),
    }
    originals = {name: getattr(TorchBackend, name) for name in watched}

    def watch(name: str) -> Any:
        kind, place = watched[name]

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            payload = args[place] if len(args) > place else list(kwargs.values())[place]
            group = kwargs.get("group", next((a for a in args if isinstance(a, dist.ProcessGroup)), None))
            note(kind, payload, group)
            return originals[name](self, *args, **kwargs)

        return method

    class Record(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recording[0] = state.global_step == 1

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recording[0] = False

    for name in watched:
        setattr(TorchBackend, name, watch(name))
    try:
        rows = [{"input_ids": [3 + (7 * i + j) % 60 for j in range(LENGTH)]} for i in range(64)]
        trainer = parity.build_trainer(
            source, out, config, accumulation=accumulation, train_rows=rows, max_steps=2, max_length=LENGTH,
            per_device_train_batch_size=MICRO_BATCH, gradient_checkpointing=recompute,
        )  # fmt: skip
        trainer.add_callback(Record())
        trainer.train()
    finally:
        for name, method in originals.items():
            setattr(TorchBackend, name, method)

    def ranks_of(group: Any) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(group if group is not None else dist.group.WORLD))

    made = {"DP": ranks_of(trainer.model_wrapped.optimizer.dp_process_group)}
    ep = config.get("expert_parallel", {}).get("autoep_size")
    if ep is not None:
        made["EP"] = ranks_of(ds_groups._get_expert_parallel_group(f"ep_size_{ep}"))
        made["EDP"] = ranks_of(ds_groups._get_expert_data_parallel_group(f"ep_size_{ep}"))
    if config.get("tensor_parallel"):
        made["TP"] = ranks_of(ds_groups.get_tensor_model_parallel_group())
    if config.get("sequence_parallel_size", 1) > 1:
        made["SP"] = ranks_of(ds_groups._get_sequence_parallel_group())
    torch.manual_seed(0)
    return {"flows": dict(flows), "groups": made}
