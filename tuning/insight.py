"""What a search teaches about its knobs: which of them matter, how each one moves a metric, and what each loss term had to say.

Derived from the ledger alone. numpy and scikit-learn are imported where they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from tuning.config import QUALITY, Choice, KnobConfig, LogUniform
from tuning.ledger import Search, Trial
from tuning.pareto import decide, interval
from tuning.space import identity
from tuning.wording import plain

if TYPE_CHECKING:
    import numpy as np

LEAST = 8
"""Finished trials without which nothing is said about importance."""

BINS = 8
"""Points of a marginal curve of numbers at most."""

IN_A_BIN = 4
"""Trials at least, where a point of a marginal curve stands for several values."""

TREES = 100
DEALS = 4
"""Times that the values of a knob are dealt out anew."""


def summary(search: Search) -> dict[str, Any]:
    """All of it for the report, JSON-able: importance by metric and knob, marginals by knob and metric, shares by number for the front.

    The metrics are the qualities among objectives and constraints: what a student costs is known before it is trained.
    """
    config = search.config
    metrics = [name for name in dict.fromkeys([*config.objectives, *config.keep]) if name in QUALITY]
    return {
        "importance": {metric: importance(search, metric) for metric in metrics},
        "marginals": {knob: {metric: marginal(search, knob, metric) for metric in metrics} for knob in knobs(search)},
        "shares": {number: shares(search.trials[number]) for number in decide(search).front},
    }


def knobs(search: Search) -> dict[str, KnobConfig]:
    """By path: what points have that the space does not say, as the choice among several students of a job; then the space."""
    space = search.config.space
    extra: dict[str, dict[Hashable, Any]] = {}
    for trial in search.of_role("trial"):
        for path in trial.task.point.keys() - space.keys():
            extra.setdefault(path, {}).setdefault(identity(trial.task.point[path]), trial.task.point[path])
    return {**{path: Choice(choice=tuple(extra[path].values())) for path in sorted(extra)}, **space}


def _seen(search: Search, metric: str) -> list[tuple[Trial, float]]:
    """Every finished trial that has the metric, with its value."""
    known = ((trial, search.values(trial).get(metric)) for trial in search.of_role("trial") if trial.state == "finished")
    return [(trial, value) for trial, value in known if value is not None]


# ------------------------------------------------------------------------------------------------------------ importance


def importance(search: Search, metric: str) -> dict[str, float]:
    """Share of each knob in what the knobs tell about a metric, over the finished trials; they sum to 1.

    Permutation importance of a random forest (Breiman 2001): by how much the squared error on trials that a tree has not seen grows when the
    values of a knob are dealt out anew among the trials. All are 0 where the forest does not beat the mean by more than a
    standard error, as of a metric that is constant or nothing but noise. {} for fewer than 8 trials.

    Whether a knob exists (`when`) follows from other knobs and counts for them.
    """
    import numpy as np

    seen, space = _seen(search, metric), knobs(search)
    if len(seen) < LEAST:
        return {}
    points = [trial.task.point for trial, _ in seen]
    columns = np.stack([_encoded(path, knob, points) for path, knob in space.items()], axis=1)
    growth = _growth(columns, np.array([value for _, value in seen], float))
    total = float(growth.sum())
    return {path: float(each) / total if total > 0 else 0.0 for path, each in zip(space, growth, strict=True)}


def _encoded(path: str, knob: KnobConfig, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A column: numbers as they are or their logarithms, choices by their place. [trials]

    A trial without the knob borrows the value of one that has it, by lot: else the column would say which trials have none, and take the
    credit for that from the knobs that decide it.
    """
    import numpy as np

    there = [path in point for point in points]
    values = [point[path] for point in points if path in point]
    if isinstance(knob, Choice):
        places = {option: float(i) for i, option in enumerate(dict.fromkeys(map(identity, knob.choice)))}
        numbers = [places[identity(value)] for value in values]
    else:
        numbers = [math.log(value) if isinstance(knob, LogUniform) else float(value) for value in values]
    column = np.random.default_rng(0).choice(numbers or [0.0], len(points))
    column[there] = numbers
    return column


def _growth(columns: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Growth of the squared error out of bag as each column is dealt out anew; 0 where it does not grow. [knobs]

    columns: [trials, knobs]. values: [trials].
    """
    import numpy as np
    from sklearn.ensemble import RandomForestRegressor

    spread, growth = np.ptp(values), np.zeros(columns.shape[1])
    if spread <= 1e-9 * np.abs(values).max():
        return growth
    values, columns = (values - values.mean()) / spread, columns.astype(np.float32)
    forest = RandomForestRegressor(TREES, min_samples_leaf=2, random_state=0, n_jobs=1).fit(columns, values)
    unseen = [np.setdiff1d(np.arange(len(values)), drawn) for drawn in forest.estimators_samples_]
    votes = np.bincount(np.concatenate(unseen), minlength=len(values))

    def errors(columns: np.ndarray) -> np.ndarray:
        answers = np.zeros(len(values))
        for tree, rows in zip(forest.estimators_, unseen, strict=True):
            answers[rows] += tree.predict(columns[rows], check_input=False)
        return (values - answers / votes) ** 2

    as_it_is, generator = errors(columns), np.random.default_rng(0)
    better = values**2 - as_it_is
    if better.mean() <= better.std(ddof=1) / math.sqrt(len(better)):
        return growth
    for k in range(len(growth)):
        dealt = columns.copy()
        for _ in range(DEALS):
            dealt[:, k] = generator.permutation(columns[:, k])
            growth[k] += errors(dealt).mean() - as_it_is.mean()
    return np.maximum(growth, 0.0)


# -------------------------------------------------------------------------------------------------------------- marginals


def marginal(search: Search, knob: str, metric: str) -> list[dict[str, Any]]:
    """Mean of a metric over the finished trials along one knob, whatever the others were. No model.

    A choice: one dict for each option that a trial has, in the order of the file, with `value` and `label`. A number: one for each value, or
    where there are more than 8 or hardly any trial has the same, for each of up to 8 quantile bins of four trials or more: `value` is the
    median of the bin, `from` and `to` its ends. Besides: `mean`, and `low`, `high`, `count` as `interval` has them.
    """
    seen = [(trial, value) for trial, value in _seen(search, metric) if knob in trial.task.point]
    domain = knobs(search)[knob]
    if isinstance(domain, Choice):
        groups: dict[Hashable, list[tuple[Trial, float]]] = {identity(option): [] for option in domain.choice}
        for trial, result in seen:
            groups[identity(trial.task.point[knob])].append((trial, result))
        return [_option(knob, group) for group in groups.values() if group]
    bins = [sorted(group) for group in _binned([(trial.task.point[knob], result) for trial, result in seen]) if group]
    return [
        {"value": median(v for v, _ in group), "from": group[0][0], "to": group[-1][0], **interval([result for _, result in group])}
        for group in bins
    ]


def _option(knob: str, group: Sequence[tuple[Trial, float]]) -> dict[str, Any]:
    trial = group[0][0]
    value = trial.task.point[knob]
    label = trial.task.student if knob == "student" else plain(value)
    return {"value": value, "label": label, **interval([result for _, result in group])}


def _binned(pairs: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """Pairs by their first number: one value each, or about the same number of pairs in each. Equal numbers stay together; may be empty."""
    import numpy as np

    numbers = np.array([number for number, _ in pairs])
    edges = np.unique(numbers)[1:]
    if len(edges) >= BINS or 2 * (len(edges) + 1) > len(pairs):
        count = min(BINS, max(1, len(pairs) // IN_A_BIN))
        edges = np.quantile(numbers, np.arange(1, count) / count) if len(pairs) else edges
    groups: list[list[tuple[float, float]]] = [[] for _ in range(len(edges) + 1)]
    for pair, place in zip(pairs, np.searchsorted(edges, numbers, side="right"), strict=True):
        groups[place].append(pair)
    return groups


# ------------------------------------------------------------------------------------------------------------ loss terms

KINDS = {"raw": "train/loss/", "weighted": "train/weighted/", "gradient": "train/gradient/"}


def shares(trial: Trial) -> dict[str, dict[str, float]]:
    """By loss term, over the points of the learning curve: the mean of the term itself (raw), of its weighted part of the loss (weighted) and
    of the norm of its gradient (gradient); and weighted_share, gradient_share: the last two as parts of their sums over all terms.

    What a curve does not have is left out.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for _, metrics in trial.curve:
        for name, value in metrics.items():
            for kind, start in KINDS.items():
                if name.startswith(start):
                    found.setdefault(name.removeprefix(start), {}).setdefault(kind, []).append(value)
    means = {term: {kind: mean(series) for kind, series in kinds.items()} for term, kinds in found.items()}
    for kind in ("weighted", "gradient"):
        total = math.fsum(kinds.get(kind, 0.0) for kinds in means.values())
        for kinds in means.values():
            if kind in kinds:
                kinds[f"{kind}_share"] = kinds[kind] / total if total > 0 else 0.0
    return means
