"""PNGs for slides and papers: load per expert and layer, and how evenly a run spread its tokens over its steps."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from moe_models.report.history import History


def plot_load(file: Path, load_LE: list[list[int]], title: str) -> None:
    """Heat map of load over mean, layers x experts, beside the fullest expert of each layer."""
    ratio_LE = [_over_mean(load_E) for load_E in load_LE]
    height = max(3.0, min(9.0, 1.6 + 0.16 * len(ratio_LE)))
    figure = Figure(figsize=(9, height), layout="constrained")
    heat, worst = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    # Left: every expert. The colours end at twice the mean.
    image = heat.imshow(ratio_LE, aspect="auto", cmap="viridis", vmin=0, vmax=2, interpolation="nearest")
    heat.set(xlabel="expert", ylabel="MoE layer", title=title)
    figure.colorbar(image, ax=heat, label="load / mean", extend="max")
    # Right: the fullest expert, beside a line at the mean.
    worst.barh(range(len(ratio_LE)), [max(ratio_E) for ratio_E in ratio_LE], color="#3b7a9e")
    worst.axvline(1, color="black", linewidth=1)
    worst.set(xlabel="fullest expert / mean")
    for axis in (heat, worst):
        axis.xaxis.get_major_locator().set_params(integer=True)
    heat.yaxis.get_major_locator().set_params(integer=True)
    _save(figure, file)


def plot_history(file: Path, history: History, title: str) -> None:
    """Fullest expert over the mean: a heat map layers x steps, and mean and worst layer above it."""
    steps = history.steps
    fullest_SL = [[max(_over_mean(tokens_E)) for tokens_E in tokens_LE] for tokens_LE in history.tokens_SLE]
    fullest_LS = [list(fullest_S) for fullest_S in zip(*fullest_SL, strict=True)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    line, heat = figure.subplots(2, 1, height_ratios=[2, 3])
    # Above: one number for each step.
    line.plot(steps, [max(layers) for layers in fullest_SL], color="#b5532a", label="fullest expert, worst layer")
    line.plot(steps, [_mean(layers) for layers in fullest_SL], color="#3b7a9e", label="fullest expert, mean")
    ranks = [_mean(layers) for layers in history.rank_max_mean_SL]
    line.plot(steps, ranks, color="#4c8c4a", linestyle="--", label="fullest EP rank, mean")
    line.set(title=title, ylabel="load / mean", ylim=(0.95, None), xlabel="step")
    line.xaxis.get_major_locator().set_params(integer=True)
    line.legend(frameon=False, fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    # Below: every layer. Columns are logged steps, so that about eight of them get their number.
    image = heat.imshow(fullest_LS, aspect="auto", cmap="viridis", vmin=1, interpolation="nearest")
    every = max(1, len(steps) // 8)
    heat.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
    heat.yaxis.get_major_locator().set_params(integer=True)
    heat.set(xlabel="step", ylabel="MoE layer")
    figure.colorbar(image, ax=heat, label="fullest expert / mean")
    _save(figure, file)


def _over_mean(counts: list[int]) -> list[float]:
    """Each count over the mean of all; zeros where nothing was counted."""
    total = sum(counts) or 1
    return [count * len(counts) / total for count in counts]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _save(figure: Figure, file: Path) -> None:
    # A title is shown as it is: a folder named "$x" is no formula.
    for axis in figure.axes:
        axis.title.set_parse_math(False)
    figure.savefig(file, dpi=150, format="png")
