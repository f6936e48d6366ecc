"""PNGs for slides and papers: load per expert and layer, and how evenly a run spread its tokens over its steps."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from moe_models.report.history import History


def plot_load(file: Path, load_LE: list[list[int]], title: str) -> None:
    """Heat map of load over mean, layers x experts, beside the fullest expert of each layer."""
    ratio = [[count * len(row) / (sum(row) or 1) for count in row] for row in load_LE]
    figure = Figure(figsize=(9, max(3.0, min(9.0, 1.6 + 0.16 * len(ratio)))), layout="constrained")
    heat, worst = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    image = heat.imshow(ratio, aspect="auto", cmap="viridis", vmin=0, vmax=2, interpolation="nearest")
    heat.set(xlabel="expert", ylabel="MoE layer", title=title)
    figure.colorbar(image, ax=heat, label="load / mean", extend="max")
    worst.barh(range(len(ratio)), [max(row) for row in ratio], color="#3b7a9e")
    worst.axvline(1, color="black", linewidth=1)
    worst.set(xlabel="fullest expert / mean")
    for axis in (heat, worst):
        axis.xaxis.get_major_locator().set_params(integer=True)
    heat.yaxis.get_major_locator().set_params(integer=True)
    _save(figure, file)


def plot_history(file: Path, history: History, title: str) -> None:
    """Fullest expert over the mean: a heat map layers x steps, and mean and worst layer above it."""
    ratio = [[max(row) * len(row) / (sum(row) or 1) for row in layers] for layers in history.tokens_SLE]
    figure = Figure(figsize=(9, 6), layout="constrained")
    line, heat = figure.subplots(2, 1, height_ratios=[2, 3])
    line.plot(history.steps, [max(row) for row in ratio], color="#b5532a", label="fullest expert, worst layer")
    line.plot(history.steps, [sum(row) / len(row) for row in ratio], color="#3b7a9e", label="fullest expert, mean")
    ranks = [sum(row) / len(row) for row in history.rank_max_mean_SL]
    line.plot(history.steps, ranks, color="#4c8c4a", linestyle="--", label="fullest EP rank, mean")
    line.set(title=title, ylabel="load / mean", ylim=(0.95, None), xlabel="step")
    line.xaxis.get_major_locator().set_params(integer=True)
    line.legend(frameon=False, fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.1))
    image = heat.imshow(
        [list(row) for row in zip(*ratio, strict=True)],
        aspect="auto", cmap="viridis", vmin=1, interpolation="nearest",
    )  # fmt: skip
    every = max(1, len(history.steps) // 8)
    heat.set_xticks(range(0, len(history.steps), every), [str(step) for step in history.steps[::every]])
    heat.yaxis.get_major_locator().set_params(integer=True)
    heat.set(xlabel="step", ylabel="MoE layer")
    figure.colorbar(image, ax=heat, label="fullest expert / mean")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    # A title is shown as it is: a folder named "$x" is no formula.
    for axis in figure.axes:
        axis.title.set_parse_math(False)
    figure.savefig(file, dpi=150, format="png")
