"""Train a Hugging Face MoE model from scratch: the architecture is one JSON, the parallel layout another.

    # 8 GPUs; the model is a config.json, the tokenizer any folder or hub id that fits it
    deepspeed --num_gpus 8 recipes/pretrain.py --config_name model_configs/mixtral-tiny.json \\
        --tokenizer_name my-tokenizer --dataset_name text/ --deepspeed ds_configs/zero1_ep8.json --output_dir out/new

    # go on after an interruption; afterwards, go on from the finished folder with recipes/finetune.py
    deepspeed --num_gpus 8 recipes/pretrain.py ... --resume_from_checkpoint true

    # no GPU: two CPU processes; a PR-MoE (residual experts, more of them in later layers) with DeepSpeed's own layers
    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 recipes/pretrain.py --config_name model_configs/prmoe-tiny.json ... \\
        --deepspeed ds_configs/zero1_ep2_native.json

Data, flags, results, exit codes and more than one machine are as in recipes/finetune.py. These defaults differ: text is
packed to --max_length tokens, learning rate 3e-4 with cosine decay, beta2 0.95, weight decay 0.1.

All layouts start from the same weights, drawn from --seed. The first rank of each machine draws them into the machine's
temporary folder (TMPDIR; for a moment it needs twice the size of the model), and each rank reads its share from there.
The ids of special tokens come from the tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from command_line import ModelFlags, RecipeArguments
from finetune import train, weights_dtype
from moe_models.errors import UserError, one_line, run, unknown_key, warn
from moe_models.nodes.watch import end_with
from moe_models.ranks import rank


def main(words: list[str]) -> int:
    """Train a model that starts from random weights."""
    return train(words, __doc__ or "", FROM_CONFIG, new_model)


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


def new_model(recipe: Any, args: Any, model_args: Any, train_rows: Any, ds: Any) -> tuple[Any, Any]:
    """(model with random weights, tokenizer); experts that the layout spreads are still on disk.

    Raises UserError if config or tokenizer cannot be read, or if they do not fit together or to the data.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    import moe_models.prmoe  # noqa: F401 (for AutoConfig)
    from moe_models.checkpoint import drawing, reading
    from moe_models.data import check_assistant_marks, check_chat_template

    # 1. The config, with the special tokens of the tokenizer.
    given = read_config(recipe.config_name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer_name)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(**{**given, **special})
    except Exception as error:  # whatever transformers says of values, files and names that it cannot use
        raise UserError(f"{recipe.config_name} or {recipe.tokenizer_name}: {one_line(error)}") from error

    # 2. transformers keeps keys that it does not know; the user who mistyped one should hear of it.
    known = {*type(config)().to_dict(), *type(config).attribute_map, "torch_dtype", "rope_theta", "rope_scaling"}
    unknown = sorted(set(given) - known)
    warn([f"{recipe.config_name}: {unknown_key('', key, given[key], known)}" for key in unknown], rank=rank())

    # 3. Does the tokenizer fit the model, and the data the tokenizer?
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"--tokenizer_name {recipe.tokenizer_name}: has {len(tokenizer)} tokens, and vocab_size = "
            f"{config.vocab_size} in {recipe.config_name}; set it to {len(tokenizer)} or more"
        )
    if not args.chat_template_path:
        check_chat_template(tokenizer, train_rows, recipe.tokenizer_name)
    if args.assistant_only_loss:
        check_assistant_marks(tokenizer, recipe.tokenizer_name, args.chat_template_path)

    # 4. The weights: drawn once on each machine, then read like those of any model.
    dtype = weights_dtype(args)
    attention = model_args.attn_implementation
    with drawing.drawn_model(config, args.seed, dtype, attention) as folder:
        model = reading.read_model(
            str(folder), ds, dtype=dtype, device=args.device, config=config, attn_implementation=attention
        )
    # Nothing should name that folder, which is gone.
    model.config.name_or_path = ""
    model.name_or_path = ""
    model.generation_config = GenerationConfig.from_model_config(model.config)
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
    run(main, end=end_with)
