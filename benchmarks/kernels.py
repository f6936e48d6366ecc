"""One MoE layer, forward and backward: AutoEP as it is, as the presets set it, with fused kernels, and transformers'.

    python -m benchmarks.kernels                          # one GPU, bf16; about two minutes
    python -m benchmarks.kernels --shapes fine --tokens 4096 --top 12
    python -m benchmarks.kernels --cpu                    # tiny shapes in fp32: does the script run?

Each layer is first held to a loop over experts in fp32, on few tokens, one of its experts without any. The table has
medians: milliseconds of forward and backward between CUDA events; milliseconds until both calls have returned to the
host, with an idle GPU at the start. And the kernels launched, their milliseconds together, and the MiB that the forward
pass leaves for the backward pass. The router is skewed, as one that has learned. `EP 2` layers see the tokens of a
second rank that are a copy of their own with the experts rotated, so that no load differs. The exchange is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_models.engine.fused import exchange
from moe_models.engine.fused.layer import fuse
from moe_models.errors import run
from tests.support.moe_layer import autoep_layer, loop


class Shape(NamedTuple):
    """A layer, and how far the mean of its tokens pulls the router to some experts."""

    D: int
    F: int
    E: int
    K: int
    skew: float


SHAPES = {
    "fine": Shape(2048, 768, 128, 8, 0.45),
    "mixtral": Shape(4096, 14336, 8, 2, 0.15),
    "tiny": Shape(64, 32, 16, 4, 0.3),
}
CHECKED_TOKENS = 768
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5}
"""Norm of the difference over the norm, against fp32; the router's gradient may be three times as far."""


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """The layer of this name: the same weights in each."""
    sizes = shape._asdict()
    del sizes["skew"]
    on_gpu = device.type == "cuda"
    ep_size = 2 if name.endswith("EP 2") else 1
    # As in the presets, unless it is AutoEP's own default.
    options = {"combine_impl": "fused_weighted_sum"} if on_gpu and not name.startswith("AutoEP") else {}
    layer = autoep_layer(**sizes, ep_size=ep_size, device=device, dtype=dtype, **options)
    if name.startswith("transformers"):
        return transformers_block(layer, shape)
    if name.startswith("fused"):
        exchange.Lengths = AloneLengths  # type: ignore[misc]
        lines = fuse(nn.ModuleList([layer]), "all_gather")
        assert not lines, lines
    return layer


def transformers_block(layer: Any, shape: Shape) -> Any:
    """transformers' own block, by its grouped products, with the layer's weights."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E,
        num_experts_per_tok=shape.K, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    experts = layer.experts
    block.gate.weight = nn.Parameter(layer.router.gate.weight.data)
    block.experts.gate_up_proj = nn.Parameter(torch.cat([experts.w1.data, experts.w3.data], dim=1))
    block.experts.down_proj = nn.Parameter(experts.w2.data)
    return block


class AloneLengths:
    """:class:`moe_models.engine.fused.exchange.Lengths` of ranks that all have as many tokens."""

    def __init__(self, group: Any) -> None:
        self.longest = 0

    def exchange(self, tokens: int) -> None:
        """Nothing to tell."""
        self.longest = tokens


@contextmanager
def mirrored_peer(E: int) -> Iterator[None]:
    """One rank as if it were two: what it would get from the other is its own, with the experts rotated."""
    from deepspeed import comm

    def all_to_all(output: torch.Tensor, tensor: torch.Tensor, **kwargs: Any) -> None:
        output.copy_(tensor)

    def all_gather(output: torch.Tensor, tensor: torch.Tensor, **kwargs: Any) -> None:
        own, other = output.chunk(2)
        own.copy_(tensor)
        other.copy_(tensor)
        if not tensor.is_floating_point():
            other.add_(E // 2).remainder_(E)

    def reduce_scatter(output: torch.Tensor, tensor: torch.Tensor, **kwargs: Any) -> None:
        own, other = tensor.chunk(2)
        torch.add(own, other, out=output)

    replaced = {
        "all_to_all_single": all_to_all,
        "all_gather_into_tensor": all_gather,
        "reduce_scatter_tensor": reduce_scatter,
        "get_world_size": lambda group=None: 2,
    }
    kept = {name: getattr(comm, name) for name in replaced}
    try:
        for name, function in replaced.items():
            setattr(comm, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(comm, name, function)


def make_tokens(shape: Shape, count: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[1, T, D], with a mean that favours some experts."""
    x_TD = torch.randn(count, shape.D, generator=torch.Generator().manual_seed(seed))
    mean_D = torch.randn(shape.D, generator=torch.Generator().manual_seed(99))
    x_TD = (x_TD + shape.skew * mean_D) / (1 + shape.skew**2) ** 0.5
    return x_TD.to(device, dtype)[None]


def output_of(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output; some blocks return more."""
    y = layer(x)
    first: torch.Tensor = y[0] if isinstance(y, tuple) else y
    return first


def check(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """The largest deviation of output and gradients from an fp32 loop; under EP 2 from DeepSpeed's layer."""
    count = min(CHECKED_TOKENS, 12 * shape.E)
    x = make_tokens(shape, count, device, dtype, seed=7)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)

    # 1. The reference.
    if name.endswith("EP 2"):
        layer = build("AutoEP, EP 2", shape, device, dtype)
        starve(layer, x)
        reference = gradients(layer, x, dy, partial(output_of, layer))
    else:
        layer = build("AutoEP", shape, device, dtype)
        starve(layer, x)
        layer = layer.float()
        layer.router.gate = AsIn(layer.router.gate, dtype)
        reference = gradients(layer, x.float(), dy, lambda x: loop(layer, x[0]))

    # 2. The layer.
    layer = build(name, shape, device, dtype)
    starve(layer, x)
    ours = gradients(layer, x, dy, partial(output_of, layer))

    # 3. How far it is off.
    worst = 0.0
    for part, value in reference.items():
        off = float((ours[part] - value).norm() / value.norm())
        if part == "router":
            off /= 3
        if not off < TOLERANCE[dtype]:
            raise AssertionError(f"{name}: {part} is {off:.1e} from the reference")
        worst = max(worst, off)
    return f"{worst:.0e}"


def starve(layer: Any, x: torch.Tensor) -> None:
    """Let the second expert have no token."""
    gate = layer.gate if hasattr(layer, "gate") else layer.router.gate
    mean_D = x[0].float().mean(0)
    with torch.no_grad():
        gate.weight[1] = (-4 * mean_D / mean_D.norm()).to(gate.weight.dtype)


def gradients(
    layer: Any, x: torch.Tensor, dy: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Output and gradients by name, fp32."""
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(dy.to(y.dtype).view(y.shape))
    gate = layer.gate if hasattr(layer, "gate") else layer.router.gate
    experts = layer.experts
    if hasattr(experts, "w1"):
        weights = {"gate and up": torch.cat([experts.w1.grad, experts.w3.grad], 1), "down": experts.w2.grad}
    else:
        weights = {"gate and up": experts.gate_up_proj.grad, "down": experts.down_proj.grad}
    found = {"output": y.detach(), "input": x.grad, "router": gate.weight.grad, **weights}
    return {part: value.float().view(-1, value.shape[-1]) for part, value in found.items()}


class AsIn(nn.Module):
    """A router's gate in fp32 whose logits are rounded as those of the layer that is checked: it must choose alike."""

    def __init__(self, gate: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = gate.weight
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits in fp32."""
        return (x.to(self.dtype) @ self.weight.to(self.dtype).T).float()


def measure(name: str, shape: Shape, count: int, device: torch.device, dtype: torch.dtype, top: int) -> dict[str, Any]:
    """One row of the table."""
    layer = build(name, shape, device, dtype)
    x = make_tokens(shape, count, device, dtype).requires_grad_()
    dy = torch.randn_like(x)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y = output_of(layer, x)
        y.backward(dy.view(y.shape))

    if device.type == "cpu":
        began = time.perf_counter()
        step()
        return {"ms": (time.perf_counter() - began) * 1e3, "host_ms": 0.0, "launches": 0, "saved_mib": 0.0}

    # 1. What stays for the backward pass, after one step that compiles.
    step()
    layer.zero_grad(set_to_none=True)
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = output_of(layer, x)
    torch.cuda.synchronize()
    saved = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    y.backward(dy.view(y.shape))
    del y

    # 2. Time.
    for _ in range(3):
        step()
    gpu_ms = []
    host_ms = []
    for _ in range(15):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        begin.record()
        step()
        end.record()
        host_ms.append((time.perf_counter() - began) * 1e3)
        torch.cuda.synchronize()
        gpu_ms.append(begin.elapsed_time(end))

    # 3. Kernels.
    launches, busy_ms, longest = kernels_of(step, top)
    return {
        "ms": median(gpu_ms), "host_ms": median(host_ms), "launches": launches, "busy_ms": busy_ms,
        "saved_mib": saved / 2**20, "top": longest,
    }  # fmt: skip


def kernels_of(step: Callable[[], None], top: int) -> tuple[int, float, list[str]]:
    """Kernels of one step, their milliseconds, and the longest ones by name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e3)
    longest = sorted(((sum(each), len(each), name) for name, each in times.items()), reverse=True)[:top]
    launches = sum(len(each) for each in times.values())
    busy = sum(sum(each) for each in times.values())
    return launches, busy, [f"{total:7.3f} ms  {number:3} x  {name[:100]}" for total, number, name in longest]


def machine(device: torch.device) -> str:
    """What was measured on, and what it reaches."""
    from moe_models.bench.machine import matmul_tflops

    if device.type == "cpu":
        return "cpu"
    one = torch.empty(2**30, dtype=torch.int8, device=device)
    other = torch.empty_like(one)
    times = []
    for _ in range(10):
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        other.copy_(one)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    copied = 2 * 2**30 / median(times) / 1e9
    return (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {matmul_tflops(device):.0f} TFLOP/s in bf16 "
        f"products, {copied:.2f} TB/s copied"
    )


def load_line(name: str, shape: Shape, count: int, device: torch.device, dtype: torch.dtype) -> str:
    """How uneven the router is."""
    layer = build("AutoEP", shape, device, dtype)
    with torch.no_grad():
        counts_E = layer.router(make_tokens(shape, count, device, dtype)[0], None)[2].float()
    fullest = float(counts_E.max() / counts_E.mean())
    sizes = f"{shape.E} experts, top-{shape.K}, hidden {shape.D}, expert FFN {shape.F}"
    return f"{name}: {sizes}; the fullest has {fullest:.1f} x the mean"


LAYERS = ("AutoEP", "presets", "fused", "transformers", "presets, EP 2", "fused, EP 2")


def main(words: list[str]) -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["fine", "mixtral"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--top", type=int, default=0, help="longest kernels of each row (0)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after so many")
    parser.add_argument("--cpu", action="store_true", help="tiny shapes in fp32")
    parser.add_argument("--json", help="write the rows there")
    given = parser.parse_args(words)
    began = time.perf_counter()
    device = torch.device("cuda")
    dtype = torch.bfloat16
    if given.cpu:
        device = torch.device("cpu")
        dtype = torch.float32
        given.shapes = ["tiny"]
        given.tokens = [64]
    print(machine(device), flush=True)

    for name in given.shapes:
        print(load_line(name, SHAPES[name], max(given.tokens), device, dtype))
    rows = []
    print("| shape | tokens | layer | ms | host ms | GPU busy ms | launches | saved MiB | from fp32 |")
    print("|---" * 9 + "|")
    for shape_name in given.shapes:
        shape = SHAPES[shape_name]
        for name in given.layers:
            with mirrored_peer(shape.E):
                off = check(name, shape, device, dtype)
            for count in given.tokens:
                if time.perf_counter() - began > given.seconds:
                    print(f"left out: {shape_name} {count} {name}")
                    continue
                with mirrored_peer(shape.E):
                    row = measure(name, shape, count, device, dtype, given.top)
                rows.append({"shape": shape_name, "tokens": count, "layer": name, "off": off, **row})
                print(
                    f"| {shape_name} | {count:,} | {name} | {row['ms']:.2f} | {row['host_ms']:.2f} | "
                    f"{row.get('busy_ms', 0):.2f} | {row['launches']} | {row['saved_mib']:,.0f} | {off} |",
                    flush=True,
                )
                for line in row.get("top", []):
                    print("      ", line)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if given.json:
        Path(given.json).write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    run(main)
