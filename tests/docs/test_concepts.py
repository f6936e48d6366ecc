"""Every number that a lesson states is asked of the code, or of the page in ``benchmarks/`` that has it measured.

A fact is a sentence with holes, and what fills them. The filled sentence must be in the page. A number in a page's
prose that no fact covers fails, so a new statement needs a new fact.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from docs.tools.figures import (
    CHOICES,
    EXAMPLE,
    EXPERTS,
    FEW,
    TOKENS,
    TWO,
    arrived,
    flows_of,
    link_points,
    packed,
    sent_gb,
)
from docs.tools.models import HUB, model
from docs.tools.tables import BF16, DEEPSEEK, GLM, LENGTH, MIXTRAL, QWEN3
from moe_models.config.ds_config import load_ds_config
from moe_models.config.layout import Layout
from moe_models.config.work import Work
from moe_models.planner.case import Case
from moe_models.planner.devices import GIB, read_device
from moe_models.planner.predict import predict
from moe_models.planner.shares import state_bytes
from moe_models.planner.traffic import traffic
from tests.docs.lessons import LESSONS, joined, unexplained

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fact:
    """A sentence of a page, ``{}`` for each number, and the function that has them in this order."""

    page: str
    sentence: str
    values: Callable[[], tuple[Any, ...]] = tuple

    def filled(self) -> str:
        """The sentence as the page must have it."""
        return joined(self.sentence.format(*self.values()))


def measured(page: str, pattern: str) -> tuple[str, ...]:
    """The groups of a pattern in a page of benchmarks/, which must be there once."""
    text = joined((ROOT / "benchmarks" / page).read_text())
    found = re.findall(pattern, text)
    assert len(found) == 1, f"benchmarks/{page}: {pattern}: {len(found)} times"
    return found[0] if isinstance(found[0], tuple) else (found[0],)


def used(hub_id: str) -> tuple[str, str, str]:
    """(billions of parameters that a token uses, of all, percent)."""
    sizes = model(hub_id).sizes
    everything = sizes.dense_params + sizes.expert_params
    share = 100 * sizes.active_params / everything
    return three(sizes.active_params / 1e9), three(everything / 1e9), f"{share:.0f}" if share > 10 else f"{share:.1f}"


def three(number: float) -> str:
    """Three digits or, below 10, two."""
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def everything(hub_id: str) -> int:
    """Parameters of a model."""
    sizes = model(hub_id).sizes
    return sizes.dense_params + sizes.expert_params


@cache
def sent(hub_id: str, preset: str) -> dict[str, float]:
    """GB by kind of group in the bytes figure."""
    return sent_gb(flows_of(hub_id, preset))


@cache
def held(preset: str, gpus: int = 8) -> float:
    """GB of Mixtral's weights, gradients and optimizer states on one of 8 GPUs."""
    ds = load_ds_config(ROOT / "ds_configs" / preset)
    return sum(state_bytes(ds, model(MIXTRAL).sizes, ds.layout(gpus), BF16).values()) / 1e9


def all_to_alls(recompute: bool) -> int:
    """All-to-alls of one MoE layer in one micro-batch, by the bytes that the planner counts."""
    ds = load_ds_config(ROOT / "ds_configs" / "zero1_ep8.json")
    case = Case.of(ds, model(MIXTRAL), 8, replace(EXAMPLE, accumulation=1, recompute=recompute), 8)
    payload = sum(flow.payload for flow in traffic(case) if flow.group == "EP")
    sizes = case.sizes
    one_way = case.tokens * sizes.hidden * sizes.top_k * BF16 * sizes.moe_layers
    assert payload % one_way == 0
    return payload // one_way


def volume(hub_id: str) -> int:
    """Bytes that one rank dispatches in one layer."""
    sizes = model(hub_id).sizes
    return LENGTH * sizes.hidden * sizes.top_k * BF16


def reached(mib: int) -> tuple[str, str]:
    """(GB/s, percent of the link) of an all-to-all of that size, as measured."""
    rate = dict(link_points()["all_to_all"])[mib]
    link = json.loads((ROOT / "moe_models/planner/devices.json").read_text())["devices"]["h200"]["link_gb_per_s"][
        "value"
    ]
    return f"{rate:.1f}", f"{100 * rate / link:.0f}"


def network() -> tuple[int, int, int, int]:
    """(GB/s of NVLink, Gb/s of a card, GB/s of it, times less)."""
    devices = json.loads((ROOT / "moe_models/planner/devices.json").read_text())["devices"]
    links = {devices[name]["link_gb_per_s"]["value"] for name in ("h100-80g", "h200")}
    assert len(links) == 1
    (link,) = links
    (card,) = {int(devices[name]["network"]["$like"].split()[0]) for name in ("h100-80g", "h200")}
    return link, card, card // 8, link * 8 // card


def node_limited() -> tuple[int, ...]:
    """What the paragraph says of DeepSeek-V3 on 8 nodes of 8 GPUs."""
    config = HUB[DEEPSEEK]
    experts, top_k, groups, limited = (
        config[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    )
    layout = Layout(64, ep_size=64)
    free, nodes = layout.nodes_of_a_token(8, experts, top_k)
    at_most, _ = layout.nodes_of_a_token(8, experts, top_k, groups, limited)
    assert at_most == limited
    return experts, top_k, free, nodes, groups, limited, top_k, at_most


def copies(ep_size: int) -> tuple[int, int]:
    """(copies of the experts on 4 GPUs, experts on each)."""
    layout = Layout(4, ep_size=ep_size)
    return layout.edp_size, len(layout.experts_of(0, EXPERTS))


def shape(hub_id: str) -> tuple[int, int, int]:
    """(experts of a layer, layers, experts of a token)."""
    sizes = model(hub_id).sizes
    return sizes.num_experts, sizes.moe_layers, sizes.top_k


def defaults_of_pretrain() -> tuple[float, float]:
    """(beta2, weight decay) of recipes/pretrain.py."""
    from docs.tools.reference import training_parser

    parser = training_parser("pretrain")
    return parser.get_default("adam_beta2"), parser.get_default("weight_decay")


FACTS = (
    # --- dense and MoE
    Fact("dense-and-moe.md", "D x F x 3 in the MLP", lambda: ()),
    Fact(
        "dense-and-moe.md",
        "In Mixtral-8x7B a token uses {} of {} billion parameters, which is {}%.",
        lambda: used(MIXTRAL),
    ),
    Fact("dense-and-moe.md", "In Qwen3-30B-A3B it uses {} of {} billion, which is {}%.", lambda: used(QWEN3)),
    Fact("dense-and-moe.md", "In DeepSeek-V3 it uses {} of {} billion, which is {}%.", lambda: used(DEEPSEEK)),
    Fact(
        "dense-and-moe.md",
        "At {} bytes for each parameter Mixtral-8x7B needs {:.0f} GB to train.",
        lambda: (round(8 * held("zero3.json") * 1e9 / everything(MIXTRAL)), 8 * held("zero3.json")),
    ),
    # --- the two all-to-alls
    Fact(
        "two-all-to-alls.md",
        "The figure has {} tokens on each of {} ranks, {} experts and top-{}.",
        lambda: (len(TOKENS[0]), TWO.world_size, FEW, len(CHOICES[0][0])),
    ),
    Fact(
        "two-all-to-alls.md",
        "in the figure {} and {} rows instead of {} and {}.",
        lambda: (*(len(arrived(rank)) for rank in range(2)), *(len(packed(rank)) for rank in range(2))),
    ),
    Fact("two-all-to-alls.md", "That makes {} instead of {}.", lambda: (all_to_alls(True), all_to_alls(False))),
    Fact("two-all-to-alls.md", "One layer of Mixtral-8x7B on one of 8 GPUs, T = {:,} tokens, bf16:", lambda: (LENGTH,)),
    Fact(
        "two-all-to-alls.md",
        "With EP 8, 7 of 8 rows leave the GPU: {} MiB in each direction of each layer.",
        lambda: (volume(MIXTRAL) * 7 // 8 // 2**20,),
    ),
    Fact(
        "two-all-to-alls.md",
        "all {} experts, {:,} MiB.",
        lambda: (
            model(MIXTRAL).sizes.num_experts,
            model(MIXTRAL).sizes.num_experts * model(MIXTRAL).sizes.expert_size * BF16 // 2**20,
        ),
    ),
    # --- the five dimensions
    Fact("five-dimensions.md", "| **+ ZeRO** 1, 2, 3 |"),
    Fact("five-dimensions.md", "all-gather of weights; at 3 reduce-scatter of gradients | after the step; at 3 before"),
    Fact("five-dimensions.md", "{} GPUs and {} experts: EP 4, and EP 2 with two copies", lambda: (4, EXPERTS)),
    Fact(
        "five-dimensions.md",
        "**EP 4**: one copy of the experts, {} on each GPU. Expert gradients need no averaging. Each token may go to "
        "any of the {} GPUs.",
        lambda: (copies(4)[1], Layout(4, ep_size=4).ep_size),
    ),
    Fact("five-dimensions.md", "two copies, {} experts on each GPU.", lambda: (copies(2)[1],)),
    Fact("five-dimensions.md", "8 GPUs as TP pairs, EP groups and replicas"),
    Fact("five-dimensions.md", "| 1 | 4 + 12/N | 4/EP + 12/N | | 2 | 2 + 14/N | 2/EP + 14/N | | 3 | 16/N | 16/N |"),
    Fact("five-dimensions.md", "(S - 1) / (M + S - 1)"),
    # --- load balance
    Fact(
        "load-balance.md",
        "Even is 1. The worst is E / K: K experts get everything. For Mixtral that is {}, for Qwen3-30B-A3B {}.",
        lambda: tuple(model(name).sizes.num_experts // model(name).sizes.top_k for name in (MIXTRAL, QWEN3)),
    ),
    Fact("load-balance.md", "Counting costs {}% of a step or less", lambda: (f"{largest_share_of_counting():.1f}",)),
    Fact(
        "load-balance.md",
        "A model of {} layers with {} experts each, routers bent so that two experts of each layer get everything "
        "(2.00 of at most 2). {} steps on {} GPUs:",
        lambda: (
            *measured("balance.md", r"SmolLM2 \((\d+) layers, (\d) experts, top-2\)"),
            *measured("balance.md", r"Data: (\d+) steps"),
            *measured("balance.md", r"14 runs of (\d) GPUs each"),
        ),
    ),
    Fact(
        "load-balance.md",
        "bring the worst layer below {} within {} steps.",
        lambda: measured(
            "balance.md", r"All four methods bring the worst of 30 layers below ([\d.]+) within (\d+) steps"
        ),
    ),
    Fact(
        "load-balance.md",
        "The language loss ends the same, to {}%.",
        lambda: measured("balance.md", r"The language loss is the same to ([\d.]+)%"),
    ),
    Fact(
        "load-balance.md",
        "The pooled loss has no effect here: {} to the end.",
        lambda: measured("balance.md", r"\| micro_batch \(layers pooled\) \| 0 \| 2.00, ([\d.]+) \| never"),
    ),
    # --- the communication trade-off
    Fact("communication.md", "the share (EP - 1) / EP of it leaves the GPU."),
    Fact(
        "communication.md",
        "In a step it is sent {} times in each layer: there and back, forward and backward. With activation "
        "checkpointing {} times.",
        lambda: (all_to_alls(False), all_to_alls(True)),
    ),
    Fact("communication.md", "For T = {:,} tokens in bf16:", lambda: (LENGTH,)),
    Fact(
        "communication.md",
        "What each of 8 GPUs sends in one step of {} micro-batches:",
        lambda: (EXAMPLE.accumulation,),
    ),
    Fact(
        "communication.md",
        "four copies of the experts average their gradients and gather new weights: {:.0f} GB for Mixtral-8x7B.",
        lambda: (sent(MIXTRAL, "zero1_ep2.json")["EDP"],),
    ),
    Fact(
        "communication.md",
        "but only from 1/2 to 7/8 of the volume: {:.0f} GB at EP 2, {:.0f} GB at EP 8.",
        lambda: (sent(MIXTRAL, "zero1_ep2.json")["EP"], sent(MIXTRAL, "zero1_ep8.json")["EP"]),
    ),
    Fact(
        "communication.md",
        "{:.0f} GB in Mixtral-8x7B, {:.0f} times as much as EP 8.",
        lambda: (
            sum(sent(MIXTRAL, "zero3.json").values()),
            sum(sent(MIXTRAL, "zero3.json").values()) / sum(sent(MIXTRAL, "zero1_ep8.json").values()),
        ),
    ),
    Fact("communication.md", "A message of 2 MiB reaches {} GB/s, {}% of the link.", lambda: reached(2)),
    Fact("communication.md", "One of 128 MiB reaches {} GB/s, {}%.", lambda: reached(128)),
    Fact(
        "communication.md",
        "No size reached more than {}%.",
        lambda: measured("alltoall.md", r"No size reached more than (\d+)%"),
    ),
    Fact(
        "communication.md",
        "Below {} MiB the latency of {} to {} microseconds sets the time.",
        lambda: measured(
            "alltoall.md", r"For messages below (\d) MiB the latency \((\d+) to (\d+) microseconds a call\)"
        ),
    ),
    Fact(
        "communication.md",
        "Dispatch of {} rows of Mixtral's shape at EP 2: {} MiB leave the GPU in {} ms.",
        lambda: measured("alltoall.md", r"Mixtral: ([\d,]+) rows of 4,096 \| uniform \| 1.00 \| (\d+) \| ([\d.]+)"),
    ),
    Fact(
        "communication.md",
        "With routing twice as full on one rank (2.00), the same takes {} ms",
        lambda: measured("alltoall.md", r"\| skewed \| 2.00 \| 32 \| ([\d.]+)"),
    ),
    Fact(
        "communication.md",
        "Inside a node there is NVLink: {} GB/s in each direction on H100 and H200. Across nodes a GPU often has one "
        "network card of {} Gb/s, which is {} GB/s: {} times less.",
        network,
    ),
    Fact(
        "communication.md",
        "DeepSeek-V3 has {} experts, {} for each token, and EP across nodes. A token's experts could be on {} of {} "
        "nodes. Its router therefore works in two steps: the experts form {} groups, the token picks the best "
        "{} groups, and then its {} experts among those. If a group is what a node holds, a token reaches at most {} "
        "nodes.",
        node_limited,
    ),
    Fact("communication.md", "{} instead of {} |", lambda: (all_to_alls(False), all_to_alls(True))),
    # --- choosing
    Fact("choosing.md", "on each of 8 GPUs, bf16 and AdamW:"),
    Fact(
        "choosing.md",
        "For Mixtral-8x7B going from EP 2 to EP 8 saves {:.0f} GB on each GPU. TP 2 beside EP 4 saves {:.0f} GB.",
        lambda: (held("zero1_ep2.json") - held("zero1_ep8.json"), held("zero1_ep4.json") - held("zero1_ep4_tp2.json")),
    ),
    Fact(
        "choosing.md",
        "{} of its {} billion parameters are outside the experts.",
        lambda: (three(model(MIXTRAL).sizes.dense_params / 1e9), three(everything(MIXTRAL) / 1e9)),
    ),
    Fact(
        "choosing.md",
        "{:.0f}% and {:.0f}% of the parameters are outside the experts.",
        lambda: tuple(100 * model(name).sizes.dense_params / everything(name) for name in (MIXTRAL, QWEN3)),
    ),
    Fact("choosing.md", "`zero1_ep8.json` on 8 GPUs. - More nodes: the same file. EP stays 8, and EDP grows."),
    Fact(
        "choosing.md",
        "At ZeRO-1 each rank keeps 4 bytes for each of its parameters. DeepSeek-V3 has {} billion parameters outside "
        "the experts: {:.0f} GB on every GPU",
        lambda: (three(model(DEEPSEEK).sizes.dense_params / 1e9), 4 * model(DEEPSEEK).sizes.dense_params / 1e9),
    ),
    Fact(
        "choosing.md",
        "On the fine-grained shape with 4 sequences for each GPU it reached {} tokens/s, more than AutoEP as DeepSpeed "
        "ships it ({}). With our presets and Liger's kernels EP reached {} (",
        lambda: (
            *measured("speed.md", r"\| `hf_zero3` \| 4 \| ([\d,]+) \|"),
            *measured("speed.md", r"\| `autoep_stock` \| 4 \| ([\d,]+) \| 0.93"),
            *measured("speed.md", r"\| `zero1_ep2\+liger` \| 4 \| ([\d,]+) \| 1.40"),
        ),
    ),
    Fact("choosing.md", "| 2 or 4 GPUs, a model that fits |"),
    Fact("choosing.md", "| one node of 8, or several such nodes |"),
    # --- the cookbook
    Fact(
        "mixtral-8x7b.md",
        "{} experts in each of {} layers, {} for each token. {} billion parameters need {:.0f} GB to train: eight GPUs "
        "of 141 GB, or 80 GB with the optimizer in host memory.",
        lambda: (*shape(MIXTRAL), three(everything(MIXTRAL) / 1e9), 16 * everything(MIXTRAL) / 1e9),
    ),
    Fact("mixtral-8x7b.md", "| 8 of 141 GB | `zero1_ep8.json` |"),
    Fact(
        "mixtral-8x7b.md",
        "| 8 of 80 GB | `zero1_ep8_offload.json`: the host needs {:.0f} GB for the optimizer |",
        lambda: (12 * everything(MIXTRAL) / 1e9,),
    ),
    Fact("mixtral-8x7b.md", "| 16 of 80 GB | `zero3_ep8.json` |"),
    Fact("mixtral-8x7b.md", "fills each row of 4,096 tokens with several texts."),
    Fact("mixtral-8x7b.md", "On 80 GB GPUs the JSON is the only change:"),
    Fact(
        "qwen3-30b-a3b.md",
        "{} small experts in each of {} layers, {} for each token. A token uses {} of {} billion parameters.",
        lambda: (*shape(QWEN3), *used(QWEN3)[:2]),
    ),
    Fact("qwen3-30b-a3b.md", "On 8 GPUs of 80 GB take `zero3_ep8.json`; on 141 GB `zero1_ep8.json`."),
    Fact(
        "qwen3-30b-a3b.md",
        "Liger's kernels pay most here: {} times the best baseline",
        lambda: measured("speed.md", r"\| `zero1_ep2\+liger` \| 4 \| 73,973 \| ([\d.]+)"),
    ),
    Fact(
        "glm-4.md",
        "{} experts in each of {} of its {} layers, {} for each token, and a shared expert. A token uses {} of {} "
        "billion parameters. GLM-4.5, 4.6 and 4.7 are the same class",
        lambda: (shape(GLM)[0], shape(GLM)[1], model(GLM).sizes.layers, shape(GLM)[2], *used(GLM)[:2]),
    ),
    Fact(
        "glm-4.md",
        "At 16 bytes for each parameter it needs {:,.0f} GB to train: two nodes of 8 GPUs with 141 GB, or four with "
        "80 GB.",
        lambda: (16 * everything(GLM) / 1e9,),
    ),
    Fact("several-machines.md", "on machines of 8 GPUs."),
    Fact(
        "upcycling.md",
        "the held-out loss is {} before and after",
        lambda: measured("quickstart.md", r"\| 2 x H200, bf16, zero1_ep2 \| 03da338 \| ([\d.]+), \1"),
    ),
    Fact("from-scratch.md", "beta2 {} and weight decay {} are the defaults here.", defaults_of_pretrain),
    Fact("serving.md", "With vLLM, on 8 GPUs:"),
)


def largest_share_of_counting() -> float:
    """Percent of a step, in the worst of the measured rows."""
    text = (ROOT / "benchmarks" / "balance.md").read_text()
    shares = re.findall(r"^\| [\d, ]+ \| \d+ ms \| [\d.]+ ms \| ([\d.]+)% \|$", text, re.MULTILINE)
    assert len(shares) == 3
    on_gpus = re.search(r"That is ([\d.]+)%, less than", joined(text))
    assert on_gpus is not None
    return max(float(share) for share in [*shares, on_gpus[1]])


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: f"{fact.page}: {fact.sentence[:40]}")
def test_what_a_lesson_states_is_so(fact: Fact) -> None:
    (page,) = (page for page in LESSONS if page.name == fact.page)
    assert fact.filled() in joined(page.read_text())


@pytest.mark.parametrize("page", LESSONS, ids=lambda page: f"{page.parent.name}-{page.name}")
def test_no_number_without_a_fact(page: Path) -> None:
    assert unexplained(page, [fact.filled() for fact in FACTS if fact.page == page.name]) == []


def test_a_number_without_a_fact_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "lesson.md"
    page.write_text("# Lesson 7\n\n1. With `4` of EP 8 and top-2\n   it takes 31 GB, and then\n   12.5 more.\n")
    assert [line.split(": ")[1] for line in unexplained(page, [])] == ["31", "12.5"]
    assert unexplained(page, ["it takes 31 GB, and then 12.5 more."]) == []


def test_zero_bytes_are_those_of_the_planner() -> None:
    """The table of bytes for one parameter (five-dimensions.md), for one layout."""
    sizes = model(MIXTRAL).sizes
    ranks, ep_size = 8, 4
    for stage, (dense, experts) in {
        1: (4 + 12 / ranks, 4 / ep_size + 12 / ranks),
        2: (2 + 14 / ranks, 2 / ep_size + 14 / ranks),
        3: (16 / ranks, 16 / ranks),
    }.items():
        expected = (dense * sizes.dense_params + experts * sizes.expert_params) / 1e9
        assert held(f"zero{stage}_ep{ep_size}.json", ranks) == pytest.approx(expected, rel=1e-9)


def test_shapes_are_those_of_the_published_models() -> None:
    """transformers' defaults are the shapes of these models, layers aside."""
    from transformers import AutoConfig

    for hub_id, config in HUB.items():
        theirs = AutoConfig.for_model(config["model_type"]).to_dict()
        ours = AutoConfig.for_model(**config).to_dict()
        other = {key for key in config if theirs.get(key) != ours.get(key)}
        expected = {
            MIXTRAL: {"max_position_embeddings", "router_aux_loss_coef"},
            GLM: {"attention_bias", "head_dim"},
            QWEN3: {"num_hidden_layers", "norm_topk_prob", "head_dim"},
        }
        assert other <= expected.get(hub_id, set()), hub_id


@pytest.mark.parametrize(
    ("hub_id", "preset", "gpus", "device"),
    [
        (MIXTRAL, "zero1_ep8.json", 8, "h200"),
        (MIXTRAL, "zero1_ep8_offload.json", 8, "h100-80g"),
        (MIXTRAL, "zero3_ep8.json", 16, "h100-80g"),
        (QWEN3, "zero3_ep8.json", 8, "h100-80g"),
        (QWEN3, "zero1_ep8.json", 8, "h200"),
        (GLM, "zero3_ep8.json", 16, "h200"),
        (GLM, "zero3_ep8.json", 32, "h100-80g"),
    ],
)
def test_layouts_of_the_cookbook_fit(hub_id: str, preset: str, gpus: int, device: str) -> None:
    """With 9% to spare, by which the planner's memory was off at most (benchmarks/plan.md)."""
    (off,) = measured("plan.md", r"\*\*Memory\*\*: within (\d)% in all rows")
    gpu = read_device(device, [])
    work = Work(micro_batch=1, length=LENGTH, accumulation=4, recompute=True)
    case = Case.of(load_ds_config(ROOT / "ds_configs" / preset), model(hub_id), gpus, work, 8)
    assert predict(case, gpu).memory.needed * (1 + int(off) / 100) <= gpu.usable_gib * GIB
