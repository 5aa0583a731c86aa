"""What the charts of a search's page show, as JSON for `page.js`: numbers only as exact as a picture can be, curves no finer than it needs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tuning.config import COSTS, METRICS, QUALITY, SHARES, Choice, KnobConfig, LogUniform
from tuning.insight import knobs
from tuning.ledger import Search, Trial
from tuning.pareto import Decision
from tuning.space import identity
from tuning.views import columns
from tuning.wording import COUNTS, LABELS, plain, wished

CURVE_POINTS = 24
"""Of a curve that are drawn."""


def charts(search: Search, decision: Decision, marginals: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Everything that is drawn. Trials are those of which a quality is known; `m` follows `metrics`, `x` follows `knobs`."""
    config = search.config
    trials = [trial for trial in search.of_role("trial") if config.quality in trial.metrics]
    baselines = [trial for trial in search.of_role("baseline") if config.quality in trial.metrics]
    students = sizes(search, [*trials, *baselines])
    scales = {path: Scale.of(path, knob, trials, students) for path, knob in knobs(search).items()}
    metrics = columns(config, [search.values(trial) for trial in trials])
    return {
        "quality": {**_metric(config.quality), "up": QUALITY[config.quality] == "max"},
        "size": _metric(config.size),
        "metrics": [{**_metric(name), "up": METRICS[name] == "max", "cost": name in COSTS} for name in metrics],
        "axes": [metrics.index(name) for name in config.objectives if name in metrics],
        "knobs": [
            {"path": path, "label": label, "scale": scale.kind, "values": scale.labels}
            for (path, scale), label in zip(scales.items(), short_paths(list(scales)), strict=True)
        ],
        "students": [{"label": label} for label in students],
        "rows": max((trial.task.rows for trial in [*trials, *baselines]), default=1),
        "trials": [
            {
                "n": trial.number, "name": trial.task.name, "s": trial.state, "l": students.index(trial.task.student),
                "x": [scale.place(trial.task.point.get(path)) for path, scale in scales.items()],
                "m": [_rounded(search.values(trial).get(name)) for name in metrics],
                "q": _rounded(trial.metrics[config.quality]), "z": _rounded(search.values(trial).get(config.size)), "rows": trial.rows,
                "front": trial.number in decision.front, "ok": trial.number in decision.feasible, "c": curve(trial, config.quality),
            }
            for trial in trials
        ],
        "baselines": [
            {
                "name": trial.task.name, "l": students.index(trial.task.student), "q": _rounded(trial.metrics[config.quality]),
                "z": _rounded(search.values(trial).get(config.size)), "c": curve(trial, config.quality),
            }
            for trial in baselines
        ],
        "choice": search.choice["trial"] if search.choice is not None else None,
        "teacher": search.teacher.get(config.quality),
        "bounds": bounds(search),
        "marginals": [
            [{"x": scale.place(one["value"]), **{name: _rounded(one[name]) for name in ("mean", "low", "high")}} for one in bins]
            for scale, bins in ((scale, marginals.get(path, {}).get(config.quality, ())) for path, scale in scales.items())
        ],
    }  # fmt: skip


def sizes(search: Search, trials: Iterable[Trial]) -> list[str]:
    """Labels of students, the cheapest first."""
    cost = {trial.task.student: search.values(trial).get(search.config.size, 0.0) for trial in trials}
    return sorted(cost, key=lambda label: (cost[label], label))


def bounds(search: Search) -> list[dict[str, Any]]:
    """What must be kept, where the front can show it. Retention is a bound on the headline, too, where the teacher's is known."""
    config, found = search.config, []
    for wish in config.constraints:
        text, at, above = f"{LABELS[wish.metric]} {wished(wish)}", wish.bound, wish.at_least
        metric = wish.metric
        if metric == "validation/retention" and config.quality == search.headline and search.headline in search.teacher and at > 0:
            metric, teacher = config.quality, search.teacher[search.headline]
            at, above = (at * teacher, above) if QUALITY[metric] == "max" else (teacher / at, not above)
        if metric in (config.quality, config.size):
            found.append({"axis": "quality" if metric == config.quality else "size", "above": above, "at": at, "label": text})
    return found


def short_paths(paths: Sequence[str]) -> list[str]:
    """Each path by as many of its last names as tell it from the others."""

    def tail(path: str, count: int) -> str:
        return ".".join(path.split(".")[-count:])

    found = []
    for path in paths:
        count = 1 if path.split(".")[0] in ("training", "student") else 2
        while count <= path.count(".") and sum(tail(other, count) == tail(path, count) for other in paths) > 1:
            count += 1
        found.append(tail(path, count))
    return found


def curve(trial: Trial, metric: str) -> list[list[float]] | None:
    """Rows seen and values of a metric, thinned evenly to `CURVE_POINTS`; None where there are none. The last point stays."""
    points = [(metrics["train/rows"], metrics[metric]) for _, metrics in trial.curve if metric in metrics and "train/rows" in metrics]
    if not points:
        return None
    if len(points) > CURVE_POINTS:
        step = (len(points) - 1) / (CURVE_POINTS - 1)
        points = [points[round(i * step)] for i in range(CURVE_POINTS)]
    return [[rows for rows, _ in points], [_rounded(value) or 0.0 for _, value in points]]


def _metric(name: str) -> dict[str, Any]:
    kind = "percent" if name in SHARES else "ms" if name.startswith("cost/latency") else "number"
    kind = "bytes" if name == "cost/bytes" else "count" if name in COUNTS else kind
    return {
        "label": {"cost/bytes": "size", "cost/latency_ms_p50": "p50", "cost/latency_ms_p95": "p95"}.get(name, LABELS[name]),
        "format": kind,
    }


class Scale(NamedTuple):
    """How a knob is drawn: on a number line, or with one place for each of its values."""

    kind: Literal["linear", "log", "category"]
    known: tuple[Hashable, ...] = ()
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, path: str, knob: KnobConfig, trials: Sequence[Trial], students: Sequence[str]) -> Scale:
        """students: labels, the cheapest first."""
        if not isinstance(knob, Choice):
            return cls("log" if isinstance(knob, LogUniform) else "linear")
        labels = {identity(value): plain(value) for value in knob.choice}
        if path == "student":
            known = {identity(trial.task.point[path]): trial.task.student for trial in trials if path in trial.task.point}
            labels = {key: known[key] for key in sorted(known, key=lambda key: students.index(known[key]))} | {**labels, **known}
        return cls("category", tuple(labels), tuple(labels.values()))

    def place(self, value: Any) -> float | None:
        if value is None or self.kind != "category":
            return _rounded(value)
        return self.known.index(identity(value))


def _rounded(value: float | None) -> float | None:
    """To 5 digits, which is finer than a pixel."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
