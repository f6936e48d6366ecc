"""Train a Hugging Face MoE model from scratch: the architecture is one JSON, the parallel layout another.

    # 8 GPUs; the model is a config.json, the tokenizer any folder or hub id that fits it
    deepspeed --num_gpus 8 recipes/pretrain.py --config_name model_configs/mixtral-tiny.json \\
        --tokenizer_name my-tokenizer --dataset_name text/ --deepspeed ds_configs/zero1_ep8.json --output_dir out/new

    # go on after an interruption; afterwards, go on from the finished folder with recipes/finetune.py
    deepspeed --num_gpus 8 recipes/pretrain.py ... --resume_from_checkpoint true

    # no GPU: two CPU processes; a PR-MoE (residual experts, more of them in later layers) with DeepSpeed's own layers
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/pretrain.py --config_name model_configs/prmoe-tiny.json ... \\
        --deepspeed ds_configs/zero1_ep2_native.json

Data, flags, results and more than one machine are as in recipes/finetune.py. Other defaults: text is packed to
--max_length tokens, learning rate 3e-4 with cosine decay, beta2 0.95, weight decay 0.1. All ranks draw the same weights
from --seed, in every layout; each has the whole model in host memory for that. The ids of special tokens come from the
tokenizer.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import ModelFlags, RecipeArguments
from finetune import main
from moe_models.errors import UserError
from moe_models.ranks import RANK


@dataclass
class PretrainArguments(RecipeArguments):
    """What this recipe adds to TRL's flags."""

    config_name: str | None = field(default=None, metadata={"help": "The architecture: a config.json, or its folder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder or hub id of the tokenizer."})


def read_config(name: str) -> dict[str, Any]:
    """The architecture, from a file in the form of config.json or a folder that holds one."""
    from moe_models.families.config_json import read_model_config
    from moe_models.files import read_json

    return read_json(name) if Path(name).is_file() else read_model_config(name)


def new_model(recipe: Any, args: Any, model_args: Any, train_rows: Any) -> tuple[Any, Any]:
    """(model with random weights, tokenizer). Raises UserError if one of them cannot be had, or they do not fit."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.data import check_chat_template
    from moe_models.engine.plain_transformers import without_zero3
    from moe_models.errors import unknown_key

    given = read_config(recipe.config_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_name)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(**{**given, **special})
    except Exception as error:  # whatever transformers says of values, files and names that it cannot use
        raise UserError(f"{recipe.config_name} or {recipe.tokenizer_name}: {' '.join(str(error).split())}") from error
    known = {*type(config)().to_dict(), *type(config).attribute_map, "torch_dtype", "rope_theta", "rope_scaling"}
    for key in sorted(set(given) - known) if RANK == 0 else ():
        print(f"warning: {recipe.config_name}: {unknown_key('', key, given[key], known)}", flush=True)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--tokenizer_name {recipe.tokenizer_name}: has {len(tokenizer)} tokens, and vocab_size = "
            f"{config.vocab_size} in {recipe.config_name}; set it to {len(tokenizer)} or more"
        )
    if not args.chat_template_path:
        check_chat_template(tokenizer, train_rows, recipe.tokenizer_name)
    set_seed(args.seed)
    with without_zero3():  # there transformers would draw other numbers, and the layout would change the model
        model = AutoModelForCausalLM.from_config(
            config,
            attn_implementation=model_args.attn_implementation,
            dtype=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32,
        )
    if RANK == 0:
        size = model.num_parameters() / 1e6
        print(f"model: {config.model_type}, {size:,.1f} million parameters, drawn with seed {args.seed}")
    return model, tokenizer


FROM_CONFIG = ModelFlags(
    recipe="recipes/pretrain.py",
    required=("config_name", "tokenizer_name"),
    read_config=read_config,
    arguments=PretrainArguments,
    defaults={
        "packing": True,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
    },
)

if __name__ == "__main__":
    sys.exit(main(__doc__ or "", FROM_CONFIG, new_model))
