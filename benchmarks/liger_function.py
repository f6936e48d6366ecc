"""Does Liger keep the function? Loss and gradient norm with and without each of its kernels, in fp32 and bf16.

    python -m benchmarks.liger_function                  # one GPU; about a minute
    python -m benchmarks.liger_function --model qwen3_moe --steps 10

Plain PyTorch, plain AdamW, one process, no DeepSpeed: only the kernel differs. In fp32 a kernel that computes the same
function stays within the rounding of fp32. In bf16 two right implementations round differently, and training amplifies
that. So every bf16 run is compared with fp32, and beside Liger's kernels there is a yardstick, `eager attention`: a
change of rounding and nothing else. Which kernels act where: docs/faster.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moe_models.errors import UserError, run

SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 1792},
    "qwen3_moe": {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384, "head_dim": 64,
                  "norm_topk_prob": True, "intermediate_size": 1792},
}  # fmt: skip
COMMON = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
    "max_position_embeddings": 4096, "output_router_logits": True, "router_aux_loss_coef": 0.02,
    "tie_word_embeddings": False,
}  # fmt: skip
KERNELS = ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "eager attention": {},
    **{kernel: {name: name == kernel for name in KERNELS} for kernel in KERNELS},
    "as in TRL (all but the loss)": {name: name != "fused_linear_cross_entropy" for name in KERNELS},
    "all": dict.fromkeys(KERNELS, True),
}


@contextmanager
def patched(model: Any, options: dict[str, bool]) -> Iterator[None]:
    """Liger's kernels in this model; what it puts into the modelling module is taken out afterwards."""
    module = importlib.import_module(type(model).__module__)
    kept = dict(vars(module))
    forward = type(model).forward
    if options:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, **options)
    try:
        yield
    finally:
        vars(module).update(kept)
        type(model).forward = forward


def train(model_type: str, variant: str, dtype: torch.dtype, steps: int, device: str) -> dict[str, list[float]]:
    """Loss, auxiliary loss and gradient norm of some steps from one seed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON, **SHAPES[model_type])
    # The weights of all runs are the same bf16 numbers.
    attention = "eager" if variant == "eager attention" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    model = model.to(device=device, dtype=dtype).train()
    for module in model.modules():  # positions stay fp32, as from_pretrained leaves them
        if "inv_freq" in module._buffers and hasattr(module, "config"):
            module.inv_freq = type(module)(module.config).inv_freq.to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 8192, (2, 512), generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen: dict[str, list[float]] = {"loss": [], "aux_loss": [], "grad_norm": []}
    with patched(model, VARIANTS[variant]):
        for _ in range(steps):  # the same tokens again and again, so that there is something to learn
            output = model(input_ids=x, labels=x, use_cache=False)
            output.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            for name, value in (("loss", output.loss), ("aux_loss", output.aux_loss), ("grad_norm", norm)):
                seen[name].append(float(value.detach()))
    return seen


def deviation(figures: dict[str, list[float]], truth: dict[str, list[float]], name: str) -> tuple[float, float]:
    """(first step, largest) relative difference."""
    each = [abs(ours - true) / abs(true) for ours, true in zip(figures[name], truth[name], strict=True)]
    return each[0], max(each)


def main(words: list[str]) -> int:
    """Train every variant, print the table, keep the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", choices=[*SHAPES, "both"], default="both")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", default="out/liger_function.json")
    args = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and any(VARIANTS[variant] for variant in args.variants):
        raise UserError("--variants: Liger's kernels need a GPU; without one: plain, eager attention")
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    print("| model | dtype | variant | loss, first step | loss, worst | gradient norm, first | aux loss, worst |")
    print("|---|---|---|---|---|---|---|")
    for model_type in SHAPES if args.model == "both" else (args.model,):
        truth = train(model_type, "plain", torch.float32, args.steps, device)
        for dtype in (torch.float32, torch.bfloat16):
            for variant in args.variants:
                figures = train(model_type, variant, dtype, args.steps, device)
                results[f"{model_type} {dtype} {variant}"] = figures
                first, worst = deviation(figures, truth, "loss")
                norm, _ = deviation(figures, truth, "grad_norm")
                _, aux = deviation(figures, truth, "aux_loss")
                short = str(dtype).removeprefix("torch.")
                cells = f"{first:.1e} | {worst:.1e} | {norm:.1e} | {aux:.1e}"
                print(f"| {model_type} | {short} | {variant} | {cells} |", flush=True)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
