"""Pictures of an evaluation, as PNG files. matplotlib's object interface without its global state: safe in any process and thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from distillation.cards import METRICS
from distillation.evaluate import Evaluation
from tuning.ledger import Search, Trial
from tuning.pareto import Decision

Curves = Mapping[str, Sequence[tuple[int, Mapping[str, float]]]]
"""Run name -> (step, metrics) in the order of steps."""

TEACHER, INK, GRID = "#667085", "#1d2939", "#e4e7ec"
STUDENTS = ("#2e6fdb", "#0e9384", "#9e4ad1", "#dc6803", "#c11574", "#4a7a1e")
ANNOTATED = 12
"""Most classes for which the cells of a confusion matrix carry their number."""


def figures(evaluations: Sequence[Evaluation], curves: Curves, folder: Path) -> list[Path]:
    """Write learning_curves, size_quality, reliability and confusion as PNG; those that have nothing to show are left out.

    evaluations: the teacher first, every student after its baseline (`jobs.report.ordered`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(evaluations)
    drawn = {
        "learning_curves": _learning_curves(curves, colours),
        "size_quality": _size_quality(evaluations, colours),
        "reliability": _reliability([e for e in evaluations if e.reliability], colours),
        "confusion": _confusion([e for e in evaluations if e.role != "baseline" and e.confusion]),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            FigureCanvasAgg(figure)
            figure.savefig(paths[-1], format="png")
    return paths


def _colours(evaluations: Sequence[Evaluation]) -> dict[str, dict[str, Any]]:
    """Line style of each model: a baseline has its student's colour, dashed."""
    styles: dict[str, dict[str, Any]] = {e.name: {"color": TEACHER} for e in evaluations}
    for i, student in enumerate(e for e in evaluations if e.role == "student"):
        styles[student.name] = {"color": STUDENTS[i % len(STUDENTS)]}
        if student.baseline is not None:
            styles[student.baseline] = {"color": STUDENTS[i % len(STUDENTS)], "linestyle": (0, (4, 2))}
    return styles


def _canvas(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(
        figsize=(width * columns, height * rows), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08), facecolor="white"
    )
    axes: list[Axes] = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#98a2b3")
        axis.tick_params(colors=INK, labelsize=8.5)
        axis.set_axisbelow(True)
        axis.grid(color=GRID, linewidth=0.8)
    return figure, axes


def _title(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)


def _learning_curves(curves: Curves, styles: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """One panel each for train/loss and every validation metric that some run reported."""
    names = {key for points in curves.values() for _, metrics in points for key in metrics}
    panels = [key for key in sorted(names) if key == "train/loss" or key.startswith("validation/")]
    if not panels:
        return None
    columns = min(3, len(panels))
    figure, axes = _canvas(-(-len(panels) // columns), columns, 4.4, 3.2)
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, key in zip(axes, panels, strict=False):
        for name, points in curves.items():
            line = [(step, metrics[key]) for step, metrics in points if key in metrics]
            if line:
                steps, values = zip(*line, strict=True)
                style = {"color": TEACHER, "linewidth": 1.6, **styles.get(name, {})}
                axis.plot(steps, values, label=name, marker="o" if len(line) < 12 else "", markersize=3.5, **style)
        _title(axis, key)
        axis.set_xlabel("step", fontsize=8.5, color=INK)
    _legend(figure, axes[: len(panels)])
    return figure


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    entries = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8.5, handlelength=3)


def _size_quality(evaluations: Sequence[Evaluation], styles: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The headline with its interval over parameters; an arrow from each baseline to its student is what distillation brought."""
    headline, lower = METRICS[evaluations[0].headline], evaluations[0].better == "min"
    unit = 100 if headline.share else 1
    figure, (axis,) = _canvas(1, 1, 10.0, 4.2)
    # A student and its baseline have one size: drawn a little apart, their intervals can both be read.
    nudge = {"teacher": 1.0, "baseline": 0.985, "student": 1.015}
    places = {e.name: (e.cost["parameters"] * nudge[e.role], unit * e.quality[e.headline]) for e in evaluations}
    for e in evaluations:
        (x, y), colour, hollow = places[e.name], styles[e.name]["color"], e.role == "baseline"
        low, high = (unit * e.quality[f"{e.headline}_{end}"] for end in ("low", "high"))
        interval = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axis.errorbar(
            x, y, yerr=interval, fmt="s" if e.role == "teacher" else "o", color=colour, markersize=8, capsize=3, elinewidth=1,
            markerfacecolor="white" if hollow else colour, markeredgewidth=1.6,
        )  # fmt: skip
        axis.annotate(
            e.name,
            (x, y),
            xytext=(-9 if hollow else 9, -3),
            textcoords="offset points",
            ha="right" if hollow else "left",
            fontsize=8.5,
            color=INK,
        )
        if e.baseline is not None:
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.4, "shrinkA": 6, "shrinkB": 6}
            axis.annotate("", (x, y), places[e.baseline], arrowprops=arrow)
    sizes = sorted({e.cost["parameters"] for e in evaluations})
    axis.set_xscale("log")
    axis.set_xlim(sizes[0] / 1.35, sizes[-1] * 1.2)
    axis.set_xticks(sizes, [f"{size / 1e6:.3g} M" for size in sizes])
    axis.minorticks_off()
    if headline.share:
        axis.yaxis.set_major_formatter(PercentFormatter(decimals=0 if axis.get_ylim()[1] - axis.get_ylim()[0] > 5 else 1))
    axis.set_xlabel("parameters (log scale)", fontsize=8.5, color=INK)
    axis.set_ylabel(f"{headline.title}, with 95 % interval{'; lower is better' if lower else ''}", fontsize=8.5, color=INK)
    _title(axis, "size against quality")
    return figure


def _reliability(evaluations: Sequence[Evaluation], styles: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Accuracy in each bin of confidence; on the diagonal a model is as sure as it is right."""
    if not evaluations:
        return None
    columns = min(3, len(evaluations))
    figure, axes = _canvas(-(-len(evaluations) // columns), columns, 3.4, 3.4, sharex=True, sharey=True)
    for axis in axes[len(evaluations) :]:
        axis.remove()
    for axis, e in zip(axes, evaluations, strict=False):
        edges = np.linspace(0, 1, len(e.reliability) + 1)
        heights = [b.accuracy for b in e.reliability]
        # Bins with few rows are noise: they are drawn pale.
        shade = [0.25 + 0.75 * min(1.0, b.rows / (0.02 * max(1, e.labelled))) for b in e.reliability]
        colour = styles[e.name]["color"]
        look = {"color": "white", "edgecolor": colour, "hatch": "////"} if e.role == "baseline" else {"color": colour, "edgecolor": "white"}
        bars = axis.bar(edges[:-1], heights, width=np.diff(edges), align="edge", **look)
        for bar, alpha in zip(bars, shade, strict=True):
            bar.set_alpha(alpha)
        axis.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
        axis.set_xlim(0, 1)
        axis.set_ylim(0, 1)
        axis.set_xlabel("confidence", fontsize=8.5, color=INK)
        axis.set_ylabel("accuracy", fontsize=8.5, color=INK)
        axis.text(0.04, 0.92, f"ECE {e.quality['ece']:.3f}", transform=axis.transAxes, fontsize=8.5, color=INK)
        _title(axis, e.name)
    return figure


def _confusion(evaluations: Sequence[Evaluation]) -> Figure | None:
    """Share of each true class that got each answer."""
    if not evaluations:
        return None
    classes = len(evaluations[0].labels)
    columns = min(3, len(evaluations))
    side = min(7.0, max(3.6, 0.42 * classes + 1.4))
    figure, axes = _canvas(-(-len(evaluations) // columns), columns, side, side)
    for axis in axes[len(evaluations) :]:
        axis.remove()
    for axis, e in zip(axes, evaluations, strict=False):
        counts = np.array(e.confusion, dtype=float)
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.grid(visible=False)
        names = [label if len(label) < 15 else f"{label[:13]}…" for label in e.labels]
        axis.set_xticks(range(classes), names, rotation=90 if classes > 4 else 0, fontsize=7.5)
        axis.set_yticks(range(classes), names, fontsize=7.5)
        if classes <= ANNOTATED:
            for (i, j), value in np.ndenumerate(share):
                if counts[i, j]:
                    colour = "white" if value > 0.55 else INK
                    axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7.5, color=colour)
        axis.set_xlabel("answer", fontsize=8.5, color=INK)
        axis.set_ylabel("label", fontsize=8.5, color=INK)
        _title(axis, f"{e.name} (% of label)" if classes <= ANNOTATED else e.name)
    return figure


def front_picture(search: Search, decision: Decision, path: Path) -> Path:
    """Size against quality of a search's trials, with its front and its choice, as PNG."""
    config = search.config
    figure, (axis,) = _canvas(1, 1, 7.2, 4.2)
    groups = {
        "stopped early": (search.of_role("trial"), "stopped", {"facecolors": "none", "edgecolors": TEACHER, "s": 16, "linewidths": 0.8}),
        "trial": (search.of_role("trial"), "finished", {"color": STUDENTS[0], "s": 26, "alpha": 0.55}),
        "without distillation": (search.of_role("baseline"), "finished", {"facecolors": "none", "edgecolors": STUDENTS[3], "s": 40, "marker": "s"}),
    }  # fmt: skip
    for title, (trials, state, style) in groups.items():
        places = [_place(search, trial) for trial in trials if trial.state == state]
        if found := [place for place in places if place is not None]:
            axis.scatter(*zip(*found, strict=True), label=title, **style)
    front = [place for number in decision.front if (place := _place(search, search.trials[number])) is not None]
    if front:
        axis.step(*zip(*front, strict=True), where="post", color=STUDENTS[0], linewidth=1.6, label="front")
    if search.choice and (chosen := _place(search, search.trials[search.choice["trial"]])):
        axis.scatter(*chosen, marker="*", s=220, color=STUDENTS[4], zorder=3, label=f"chosen: {search.choice['name']}")
    if (teacher := search.teacher.get(config.quality)) is not None:
        axis.axhline(teacher, color=INK, linewidth=1, linestyle=(0, (2, 3)), label="teacher")
    axis.set_xlabel(config.size, fontsize=8.5, color=INK)
    _title(axis, config.quality)
    _legend(figure, [axis])
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
    return path


def _place(search: Search, trial: Trial) -> tuple[float, float] | None:
    values, config = search.values(trial), search.config
    return (values[config.size], values[config.quality]) if config.size in values and config.quality in values else None
