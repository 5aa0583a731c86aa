"""The decision of a search: the front of its trials, the finalists that are trained again, and the student that is shipped.

Imports nothing heavy: the leaderboard shows the front while the search runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from distillation.errors import InputError
from tuning.config import QUALITY, RATIOS, Constraint, SearchConfig
from tuning.ledger import Search, Trial

MARGIN = 0.1
"""The reference point of a hypervolume lies this share of an objective's range beyond its worst value (Ishibuchi et al. 2018)."""

ROUNDING = 1e-9
"""Numbers closer than this are equal: means and differences of metrics are rounded."""

# -------------------------------------------------------------------------------------------------------------- geometry


def _higher(points: Iterable[Sequence[float]], maximise: Sequence[bool]) -> list[tuple[float, ...]]:
    """The same points, where more is better in everything."""
    return [tuple(value if up else -value for value, up in zip(point, maximise, strict=True)) for point in points]


def non_dominated(points: Sequence[Sequence[float]], maximise: Sequence[bool]) -> list[int]:
    """Positions, rising, of the points that no other one beats or equals in everything; of equal points the first.

    points: one value per objective each; maximise: whether more of that objective is better.
    """
    higher = _higher(points, maximise)
    front: list[int] = []
    for i in sorted(range(len(higher)), key=higher.__getitem__, reverse=True):
        # Only what sorts before a point can beat it; with two objectives whatever does, the last one kept does, too.
        rivals = front if len(maximise) > 2 else front[-1:]
        if not any(all(a >= b for a, b in zip(higher[j], higher[i], strict=True)) for j in rivals):
            front.append(i)
    return sorted(front)


def hypervolume(points: Sequence[Sequence[float]], maximise: Sequence[bool], reference: Sequence[float]) -> float:
    """Volume between the points and a reference that is worse than they are, in the product of the objectives' units (Zitzler, Thiele 1999).

    A point that is not better than the reference in everything adds nothing.
    """
    (base,) = _higher([reference], maximise)
    boxes = [tuple(a - b for a, b in zip(point, base, strict=True)) for point in _higher(points, maximise)]
    return _volume([box for box in boxes if min(box) > 0])


def _volume(boxes: list[tuple[float, ...]]) -> float:
    """Of the union of the boxes that reach from 0 to these corners: a staircase; or what each box adds to those that come after it, where
    their overlap is such a union with one objective less (While, Bradstreet, Barone 2012).
    """
    if not boxes:
        return 0.0
    if len(boxes[0]) == 1:
        return max(boxes)[0]
    # By the last objective, rising: the later boxes are at least as high, so the overlap with them has the height of the box.
    front = sorted((boxes[i] for i in non_dominated(boxes, [True] * len(boxes[0]))), key=lambda box: box[-1])
    if len(boxes[0]) == 2:
        return math.fsum((high - low) * width for (width, high), low in zip(front, [0.0, *(box[1] for box in front)], strict=False))
    overlaps = ([tuple(map(min, box[:-1], later)) for later in front[i + 1 :]] for i, box in enumerate(front))
    return math.fsum(box[-1] * (math.prod(box[:-1]) - _volume(overlap)) for box, overlap in zip(front, overlaps, strict=True))


def knee(points: Sequence[Sequence[float]], maximise: Sequence[bool]) -> int | None:
    """Position of the point of the front where giving up a little of one objective stops buying much of another.

    Each objective is scaled to 0..1 over the front. Two objectives: the point farthest from the straight line between the ends of the
    front, on the side of the ideal point (Das 1999; Branke et al. 2004); an end where nothing lies on that side, as in a front of two.
    More objectives: the point nearest the ideal one. Of equals the first; the only point of a front is its knee; None without any point.
    """
    front = non_dominated(points, maximise)
    bulges = [_bulge(point) for point in _scaled([points[i] for i in front], maximise)]
    return front[bulges.index(max(bulges))] if front else None


def _bulge(scaled: tuple[float, ...]) -> float:
    """Two objectives: the ends of the front are (0, 1) and (1, 0), so the sum grows with the distance from the line between them."""
    return round(math.fsum(scaled) if len(scaled) == 2 else -math.dist(scaled, [1.0] * len(scaled)), 9)


def _scaled(points: Sequence[Sequence[float]], maximise: Sequence[bool]) -> list[tuple[float, ...]]:
    """1 is the best value of an objective among the points, 0 the worst; 1 where all are equal."""
    higher = _higher(points, maximise)
    columns = list(zip(*higher, strict=True))
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    return [
        tuple((value - low) / (high - low) if high > low else 1.0 for value, low, high in zip(point, lows, highs, strict=True))
        for point in higher
    ]


# -------------------------------------------------------------------------------------------------------------- decision


@dataclass(frozen=True)
class Decision:
    """What the finished trials of a search say. Trials by their numbers, smallest student first; of one size the better first."""

    front: list[int]
    """Those that no other one beats in all objectives."""
    knee: int | None
    feasible: list[int]
    """Those that keep everything that was asked for; all of them where nothing was."""
    nearest: list[int]
    """All of them, where none is feasible: what misses least, as a share of the bounds, comes first."""
    finalists: list[int]
    """Those to train again in full, each of another student, the first one preferred."""
    hypervolume: float
    """Of the front, before `reference`; 0 without a finished trial."""
    reference: dict[str, float]
    """By objective: a tenth of its range beyond the worst value of all finished trials."""
    why: str
    """How the finalists were found, for people."""


def decide(search: Search) -> Decision:
    """From finished trials that have all objectives; a trial without a metric that has to be kept, such as a latency, is not feasible."""
    config = search.config
    values = {trial.number: search.values(trial) for trial in search.of_role("trial") if trial.state == "finished"}
    values = {number: known for number, known in values.items() if known.keys() >= config.objectives.keys()}
    numbers = sorted(values, key=lambda n: (values[n][config.size], -merit(config, values[n]), n))
    points = [[values[n][name] for name in config.objectives] for n in numbers]
    maximise = [direction == "max" for direction in config.objectives.values()]
    front, best = non_dominated(points, maximise), knee(points, maximise)
    misses = {n: missing(config.constraints, values[n]) for n in numbers}
    feasible = [n for n in numbers if _keeps(config, values[n])]
    nearest = [] if feasible else sorted(numbers, key=misses.__getitem__)
    if config.keep:
        preferred = nearest or sorted(feasible, key=lambda n: (-merit(config, values[n]), n))
    else:
        preferred = [numbers[i] for i in _from_knee(points, maximise, front, best)]
    finalists = _one_each(search, preferred)
    if config.keep and feasible:
        finalists.sort(key=numbers.index)
    reference = _reference(points, maximise)
    return Decision(
        front=[numbers[i] for i in front],
        knee=None if best is None else numbers[best],
        feasible=feasible,
        nearest=nearest,
        finalists=finalists[: _how_many(search, config, finalists if feasible else [])],
        hypervolume=hypervolume([points[i] for i in front], maximise, reference) if points else 0.0,
        reference=dict(zip(config.objectives, reference, strict=False)),
        why=_why(config, len(numbers), len(feasible)),
    )


def _how_many(search: Search, config: SearchConfig, candidates: Sequence[int]) -> int:
    """As many finalists as were asked for; one more for as long as all of them were trained again and none keeps what was asked for."""
    count = config.finalists
    while config.keep and count < len(candidates) and all(_fell_short(search, config, number) for number in candidates[:count]):
        count += 1
    return count


def _fell_short(search: Search, config: SearchConfig, number: int) -> bool:
    refits = [trial for trial in search.of_role("refit") if trial.confirms(number)]
    if len(refits) < config.seeds or any(trial.state == "running" for trial in refits):
        return False
    means = {name: mean(values) for name, values in _by_metric(t for t in refits if t.state == "finished").items()}
    return not _keeps(config, {**search.values(search.trials[number]), **means})


def _keeps(config: SearchConfig, values: Mapping[str, float]) -> bool:
    lacking, misses = missing(config.constraints, values)
    return lacking == 0 and misses <= ROUNDING


def _from_knee(points: Sequence[Sequence[float]], maximise: Sequence[bool], front: Sequence[int], best: int | None) -> list[int]:
    """Positions of the front, the knee first, then by distance to it where each objective is scaled to 0..1."""
    scaled = dict(zip(front, _scaled([points[i] for i in front], maximise), strict=True))
    return sorted(front, key=lambda i: round(math.dist(scaled[i], scaled[best if best is not None else i]), 9))


def _one_each(search: Search, numbers: Iterable[int]) -> list[int]:
    """The first trial of each student."""
    firsts: dict[str, int] = {}
    for number in numbers:
        firsts.setdefault(search.trials[number].task.student_key, number)
    return list(firsts.values())


def missing(constraints: Iterable[Constraint], values: Mapping[str, float]) -> tuple[int, float]:
    """How far a student is from what it must keep: metrics it lacks, and the sum of what it misses of the others. (0, 0.0): it keeps all."""
    known = [c.missing(values[c.metric]) if c.metric in values else None for c in constraints]
    return sum(share is None for share in known), math.fsum(share for share in known if share is not None)


def merit(config: SearchConfig, values: Mapping[str, float]) -> float:
    """The quality that trials are compared by, where more is better."""
    return values[config.quality] * (1 if QUALITY[config.quality] == "max" else -1)


def _reference(points: Sequence[Sequence[float]], maximise: Sequence[bool]) -> list[float]:
    columns = list(zip(*_higher(points, maximise), strict=True))
    beyond = [min(column) - MARGIN * ((max(column) - min(column)) or abs(min(column)) or 1.0) for column in columns]
    return [value if up else -value for value, up in zip(beyond, maximise, strict=False)]


def _why(config: SearchConfig, finished: int, feasible: int) -> str:
    wishes = _wishes(config)
    if not finished:
        return "No trial has finished with all objectives measured."
    if not wishes:
        return f"Nothing was asked to be kept: the finalists are the knee of the front of {finished} finished trials and what lies nearest to it."
    if not feasible:
        return f"None of {finished} finished trials keeps {wishes}: the finalists are the students that come nearest."
    return f"{feasible} of {finished} finished trials keep {wishes}: the finalists are the smallest students among them, each at its best."


def _wishes(config: SearchConfig) -> str:
    return " and ".join(map(str, config.constraints))


# ---------------------------------------------------------------------------------------------------------------- choice


def interval(values: Sequence[float]) -> dict[str, Any]:
    """mean, low, high, count: of one value or more, with the 95 % interval of the mean by Student's t (1908); None for fewer than two."""
    middle, count = mean(values), len(values)
    if count < 2:
        return {"mean": middle, "low": None, "high": None, "count": count}
    from scipy.stats import t

    half = float(t.ppf(0.975, count - 1)) * stdev(values) / math.sqrt(count)
    return {"mean": middle, "low": middle - half, "high": middle + half, "count": count}


def paired_p(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test of "no difference". All differences 0: 1. All equal otherwise, or only one: None, no spread to test."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    if max(map(abs, differences), default=0.0) <= ROUNDING and len(differences) > 1:
        return 1.0
    if len(differences) < 2 or max(differences) - min(differences) <= ROUNDING:
        return None
    from scipy.stats import ttest_rel

    return float(ttest_rel(ours, theirs).pvalue)


def choose(search: Search, decision: Decision) -> dict[str, Any]:
    """The student to ship, after the finalists were trained again with several seeds: the smallest one that keeps, in the mean over them, what
    was asked for (the first finalist, if nothing was); else the one that misses least. Of its refits, the one that validates best.

    Intervals are over seeds: they say nothing of the rows of the validation split, which are the same for all. JSON-able.
    Raises InputError (DST-3502) if no refit finished.
    """
    config = search.config
    finalists = [_finalist(search, config, search.trials[number]) for number in decision.finalists]
    failed = [each for finalist in finalists for each in finalist["failed"]]
    ready = [finalist for finalist in finalists if finalist["refits"]]
    if not ready:
        raise InputError(
            "DST-3502", "no refit of a finalist finished", where=search.name, expected="at least one",
            found=next((t.cause for t in [*search.of_role("refit"), *search.of_role("trial")] if t.state == "failed"), "none"),
            do="Remove the cause and run the search again: it goes on where it stopped",
        )  # fmt: skip
    if config.keep:
        ready.sort(key=lambda finalist: finalist["values"][config.size])
    kept = [finalist for finalist in ready if finalist["kept"]]
    chosen = kept[0] if kept else min(ready, key=lambda finalist: missing(config.constraints, finalist["values"]))
    refits = [search.trials[number] for number in chosen["refits"]]
    refit = min(refits, key=lambda trial: (-merit(config, trial.metrics), trial.task.seed))
    return {
        "trial": chosen["trial"],
        "refit": refit.number,
        "seed": refit.task.seed,
        "name": chosen["name"],
        "kept": chosen["kept"],
        "reason": _reason(search, decision, ready, chosen)
        + (f"; failed: {_count(len(failed), 'training')} of the finalists" if failed else ""),
        "finalists": finalists,
        "front": decision.front,
        "knee": decision.knee,
        "hypervolume": decision.hypervolume,
        "reference": decision.reference,
    }


def _finalist(search: Search, config: SearchConfig, trial: Trial) -> dict[str, Any]:
    """A finalist beside the same student without distillation, each over its seeds."""
    trained = [other for other in search.of_role("refit", "refit-baseline") if other.confirms(trial.number)]
    done = {(t.task.role, t.task.seed): t for t in trained if t.state == "finished" and config.quality in t.metrics}
    refits = {seed: t for (role, seed), t in sorted(done.items()) if role == "refit"}
    baselines = {seed: t for (role, seed), t in sorted(done.items()) if role == "refit-baseline"}
    quality = _over_seeds(refits.values())
    means = {name: each["mean"] for name, each in quality.items()}
    values = {**{name: value for name, value in search.values(trial).items() if name not in QUALITY}, **means}
    return {
        "trial": trial.number,
        "name": trial.task.name,
        "student": trial.task.student,
        "values": values,
        "refits": [t.number for t in refits.values()],
        "baselines": [t.number for t in baselines.values()],
        "failed": [
            {"number": t.number, "role": t.task.role, "seed": t.task.seed, "cause": t.cause} for t in trained if t.state == "failed"
        ],
        "quality": quality,
        "baseline": _over_seeds(baselines.values()),
        "gain": _gain(config, [(t, baselines[seed]) for seed, t in refits.items() if seed in baselines]),
        "kept": bool(refits) and _keeps(config, values),
    }


def _over_seeds(trials: Iterable[Trial]) -> dict[str, dict[str, Any]]:
    return {name: interval(values) for name, values in _by_metric(trials).items()}


def _by_metric(trials: Iterable[Trial]) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}
    for trial in trials:
        for name in QUALITY.keys() & trial.metrics.keys():
            seen.setdefault(name, []).append(trial.metrics[name])
    return {name: seen[name] for name in QUALITY if name in seen}


def _gain(config: SearchConfig, pairs: Sequence[tuple[Trial, Trial]]) -> dict[str, Any] | None:
    found = gain(config.quality, [(a.metrics[config.quality], b.metrics[config.quality]) for a, b in pairs])
    return {"metric": config.quality, **found} if found is not None else None


def gain(metric: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
    """What distillation brought to a quality, of pairs (with it, without it), one a seed: `interval` of the gains, and `p`, see `paired_p`.

    More is better: a difference in the metric's own unit, with its sign; for those in RATIOS 1 - with / without.
    """
    if not pairs:
        return None
    sign = 1 if QUALITY[metric] == "max" else -1
    gains = [1 - ours / theirs if metric in RATIOS else sign * (ours - theirs) for ours, theirs in pairs]
    return {**interval(gains), "p": paired_p(gains, [0.0] * len(gains))}


# --------------------------------------------------------------------------------------------------------- for people


def _reason(search: Search, decision: Decision, finalists: Sequence[dict[str, Any]], chosen: Mapping[str, Any]) -> str:
    """One sentence: why this student. finalists: those that were trained again, the smallest first where something had to be kept."""
    config, name = search.config, chosen["name"]
    if not config.keep:
        where = "the knee of the front" if chosen["trial"] == decision.knee else "near the knee of the front"
        where = "better than all others" if len(decision.front) == 1 else where
        return f"{name}: {where}, as nothing was asked to be kept: {config.quality} {_shown(chosen, config.quality)}"
    if not chosen["kept"]:
        return f"{name}: nearest of {_count(len(finalists), 'finalist')}, none keeps {_wishes(config)}: {_kept(config, chosen)}"
    sizes = {search.values(trial).get(config.size) for trial in search.of_role("trial") if trial.state == "finished"}
    before = finalists[: [finalist["trial"] for finalist in finalists].index(chosen["trial"])]
    return f"{name}: the smallest of {_count(len(sizes), 'size')} that keeps {_kept(config, chosen)}" + "".join(
        f"; {other['name']} comes before it and does not: {_kept(config, other)}" for other in before
    )


def _kept(config: SearchConfig, finalist: Mapping[str, Any]) -> str:
    return " and ".join(f"{wish}: {_shown(finalist, wish.metric)}" for wish in config.constraints)


def _shown(finalist: Mapping[str, Any], metric: str) -> str:
    """0.981 (0.975 to 0.987) over 3 seeds; a cost is one number."""
    if metric not in finalist["values"]:
        return "not measured"
    value, over = finalist["values"][metric], finalist["quality"].get(metric)
    if over is None:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    bounds = "" if over["low"] is None else f" ({over['low']:.4g} to {over['high']:.4g})"
    return f"{value:.4g}{bounds} over {_count(over['count'], 'seed')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
