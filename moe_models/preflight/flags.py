"""Flags of a command line that cannot be honoured, contradict each other, or do not fit the JSON or the model.

``given`` is what TRL's parser understood: one attribute for each flag of SFTConfig, ModelConfig, ScriptArguments and
ours. What a value must look like is the parser's to say, and it was asked before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from moe_models.config.ds_config import DsConfig
from moe_models.families.config_json import HUB_ID
from moe_models.files import parse_size
from moe_models.preflight.adapters import adapter_problems
from moe_models.preflight.combinations import muon_clips
from moe_models.preflight.liger import cannot_run, no_kernels
from moe_models.preflight.sequence_parallel import sequence_parallel_flags
from moe_models.preflight.torch_compile import compile_problems


def flag_problems(given: Any, model_config: Mapping[str, Any], ds: DsConfig | None, *, on_gpu: bool) -> Iterator[str]:
    """One line for each flag that the recipes cannot honour; ``ds`` is None where the JSON itself is wrong."""
    if ds is not None:
        torch_compile = bool(given.torch_compile or given.torch_compile_backend or given.torch_compile_mode)
        yield from sequence_parallel_flags(given, ds)
        yield from compile_problems(ds, torch_compile, given.use_liger_kernel)
    if given.use_liger_kernel:
        yield from no_kernels(model_config, "--use_liger_kernel")
        yield from cannot_run("--use_liger_kernel", on_gpu=on_gpu)
    if given.load_in_4bit or given.load_in_8bit:
        yield "--load_in_4bit, --load_in_8bit: not supported; weights are held in the precision of the JSON"
    yield from adapter_problems(given, model_config, ds)
    if given.trust_remote_code:
        yield (
            "--trust_remote_code: not supported; every family of this recipe is part of transformers or of this package"
        )
    if given.enable_jit_checkpoint:
        yield (
            "--enable_jit_checkpoint: each rank would stop at a step of its own; drop it, SIGTERM and SIGUSR1 save the "
            "step without it"
        )
    yield from report_problems(given.report_to)
    yield from hub_problems(given)
    yield from length_problems(given.max_length, model_config)
    coefficient = given.router_aux_loss_coef
    if coefficient is None:
        coefficient = model_config.get("router_aux_loss_coef")
    yield from reentrant_problems(given, bool(coefficient))
    yield from _precision_problems(given, ds)
    yield from muon_flag_problems(given, ds)
    if given.dataset_streaming and given.max_steps <= 0:
        yield "--dataset_streaming: the number of rows is not known then; set --max_steps"
    if given.dataset_streaming and ds is not None and ds.tp_size * ds.sp_size > 1:
        yield (
            "--dataset_streaming: with tensor or sequence parallelism accelerate would give all ranks the same rows; "
            "drop it"
        )
    try:
        parse_size(given.export_max_shard_size)
    except ValueError as error:
        yield f"--export_max_shard_size {error}"


def muon_flag_problems(given: Any, ds: DsConfig | None) -> Iterator[str]:
    """``--max_grad_norm`` that DeepSpeed would apply to Muon's updates."""
    if ds is None or ds.zero_stage == 0 or ds.raw.get("gradient_clipping") != "auto" or not given.max_grad_norm:
        return
    optimizer = ds.raw.get("optimizer")
    if isinstance(optimizer, dict) and str(optimizer.get("type")).lower() == "muon":
        yield muon_clips(f"--max_grad_norm {given.max_grad_norm:g}", "give --max_grad_norm 0")


REPORTERS = {
    "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml", "dvclive": "dvclive", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""What ``--report_to`` may name -> the module that it needs. Others are left to transformers."""


def report_problems(report_to: str | Iterable[str] | None) -> Iterator[str]:
    """A line for each reporter that is not installed. transformers would say so after the weights are read."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    for name in names:
        module = REPORTERS.get(name)
        if module is None or find_spec(module) is not None:
            continue
        extra = " (wandb and trackio: pip install 'moe-recipes[report]')" if name in ("wandb", "trackio") else ""
        yield f"--report_to {name}: {module} is not installed{extra}; install it, or use tensorboard or none"


def hub_problems(given: Any) -> Iterator[str]:
    """What keeps ``--push_to_hub`` from uploading at the end."""
    if not given.push_to_hub:
        return
    from huggingface_hub import constants, get_token

    name = given.hub_model_id
    if constants.HF_HUB_OFFLINE:
        yield (
            "--push_to_hub: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or drop the flag and upload "
            "later with: hf upload NAME OUTPUT_DIR/model"
        )
    elif not (given.hub_token or get_token()):
        yield "--push_to_hub: no token for the hub; log in with `hf auth login`, or set HF_TOKEN"
    if name is not None and not HUB_ID.fullmatch(name):
        yield f"--hub_model_id {name}: is no name on the hub; write it as owner/name"
    strategy = getattr(given.hub_strategy, "value", given.hub_strategy)
    if strategy not in ("every_save", "end"):
        yield (
            f"--hub_strategy {strategy}: checkpoints are not uploaded, only the proven folder at the end; drop it, or "
            "write end"
        )


def length_problems(max_length: int | None, model_config: Mapping[str, Any]) -> list[str]:
    """A line if ``--max_length`` is longer than the model's context."""
    context = model_config.get("max_position_embeddings")
    if max_length and context and max_length > context:
        return [f"--max_length {max_length}: longer than the model's context; use at most {context}"]
    return []


def reentrant_problems(args: Any, aux_loss: bool) -> list[str]:
    """A line if activation checkpointing would silently deprive the auxiliary loss of its gradient.

    Reentrant checkpointing runs the layers without gradients first, and that is when transformers 5.20.2 takes the
    router's logits for the loss. ``args`` are TrainingArguments, or the flags they are made of; ``aux_loss`` says
    whether there is such a loss.
    """
    options = args.gradient_checkpointing_kwargs or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:  # TrainingArguments will report it
            return []
    if aux_loss and args.gradient_checkpointing and options.get("use_reentrant"):
        return [
            '--gradient_checkpointing_kwargs {"use_reentrant": true}: the auxiliary loss would have no gradient; set '
            "it to false, which is the default, or --router_aux_loss_coef 0"
        ]
    return []


def mismatch_problems(ds: DsConfig, mismatches: Iterable[str]) -> list[str]:
    """A line for each number that flags and JSON both say, differently; ``mismatches`` is transformers' list."""
    return [f'{ds.path}: {line.strip(" -")}; make them equal, or write "auto"' for line in mismatches]


def _precision_problems(given: Any, ds: DsConfig | None) -> Iterator[str]:
    """``--bf16`` and ``--fp16``, beside each other and beside the JSON."""
    if given.bf16 and given.fp16:
        yield "--bf16 and --fp16: a run has one precision; drop one of them"
    if ds is None:
        return
    for name in ("bf16", "fp16"):
        if not getattr(given, name):
            continue
        if ds.precision not in ("auto", name):
            yield (
                f'--{name}: the precision of {ds.path} is {ds.precision}; set {name}.enabled to true or "auto" there, '
                f"or drop --{name}"
            )
        elif ds.precision == "auto" and name not in ds.raw:
            yield f'--{name}: {ds.path} has no {name} section; add "{name}": {{"enabled": "auto"}}'
