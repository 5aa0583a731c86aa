"""Names and numbers of a search as people read them, and what is said of its result. Nothing heavy is imported before it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tuning.config import QUALITY, RATIOS, SHARES, Constraint
from tuning.ledger import Search, Trial
from tuning.pareto import gain, interval, missing

LABELS = {
    "validation/accuracy": "accuracy", "validation/f1": "F1", "validation/exact_match": "exact match", "validation/perplexity": "perplexity",
    "validation/bits_per_byte": "bits per byte", "validation/pearson": "Pearson r", "validation/mse": "MSE", "validation/mae": "MAE",
    "validation/cosine": "cosine", "validation/nll": "NLL", "validation/agreement": "agreement",
    "validation/kl_to_teacher": "KL to teacher", "validation/mse_to_teacher": "MSE to teacher", "validation/retention": "retention",
    "cost/parameters": "parameters", "cost/bytes": "bytes", "cost/flops": "FLOPs", "cost/latency_ms_p50": "p50 ms",
    "cost/latency_ms_p95": "p95 ms",
}  # fmt: skip
"""What people call a metric, in the order of columns."""

COUNTS = {"cost/parameters", "cost/bytes", "cost/flops"}


def shown(metric: str, value: float | None) -> str:
    """A value of a metric for people; empty where there is none."""
    if value is None:
        return ""
    if metric in SHARES:
        return f"{100 * value:.1f} %"
    if metric == "validation/perplexity":
        return f"{value:,.{2 if value < 100 else 1 if value < 1000 else 0}f}"
    if metric in COUNTS:
        return counted(value)
    return f"{value:.1f}" if metric.startswith("cost/latency") else plain(value)


def plain(value: Any) -> str:
    """A value of a knob: numbers to three digits, a sub-object by its type and what it sets besides."""
    if isinstance(value, Mapping):
        rest = [f"{key}={plain(inner)}" for key, inner in value.items() if key != "type" and inner is not None]
        return " ".join([str(value["type"]), *rest]) if "type" in value else " ".join(rest)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(plain(inner) for inner in value) + "]"
    if isinstance(value, float):
        text = f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"
        mantissa, _, exponent = text.partition("e")
        return f"{float(mantissa):g}e{int(exponent)}" if exponent else text
    return "none" if value is None else str(value)


def counted(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return (
        f"{minutes} min"
        if minutes < 90
        else f"{minutes // 60} h {minutes % 60:02d} min"
        if hours < 48
        else f"{hours // 24} d {hours % 24} h"
    )


def many(count: int, noun: str, nouns: str = "") -> str:
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"


def spread(metric: str, found: Mapping[str, Any]) -> str:
    """A mean over seeds with its interval: 74.2 % (73.1 to 75.3)."""
    inside = bounds(metric, found)
    return shown(metric, found["mean"]) + (f" ({inside})" if inside else "")


def bounds(metric: str, found: Mapping[str, Any]) -> str:
    """73.1 to 75.3; empty where there is nothing to tell a spread from."""
    return "" if found["low"] is None else " to ".join(shown(metric, found[key]).removesuffix(" %") for key in ("low", "high"))


def p_value(p: float | None) -> str:
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p {p:.2g}"


# ---------------------------------------------------------------------------------------------------------------- result


class Finding(NamedTuple):
    """A finalist on the test split. Intervals as `pareto.interval` gives them, over seeds; evaluations as `Evaluation` dumps them."""

    trial: int
    name: str
    student: str
    headline: str
    """validation/... of the task, without that a key of the two below."""
    quality: dict[str, dict[str, Any]]
    """The headline; retention, agreement and mse_to_teacher where all have it."""
    baseline: dict[str, dict[str, Any]]
    """The same of the student without distillation; empty where there is none."""
    gain: dict[str, Any] | None
    """In the headline, seed by seed, as `pareto.gain` gives it."""
    evaluation: dict[str, Any]
    """Of the refit that is shipped, or of the first one."""
    shipped: bool


def on_test_split(search: Search) -> list[Finding]:
    """What the test split says of the finalists. An evaluation carries the name that its training has in the ledger."""
    choice, by_name = search.choice, {one["name"]: one for one in search.evaluations or ()}
    headline = search.headline
    name = headline.removeprefix("validation/")

    def of(numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
        tasks = [search.trials[number].task for number in numbers]
        return {task.seed: by_name[task.name] for task in tasks if task.name in by_name}

    found = []
    for one in choice["finalists"] if choice else ():
        ours, theirs = of(one["refits"]), of(one["baselines"])
        if choice and ours:
            pairs = [(e["quality"][name], theirs[seed]["quality"][name]) for seed, e in ours.items() if seed in theirs]
            shipped = by_name.get(search.trials[choice["refit"]].task.name) if one["trial"] == choice["trial"] else None
            quality, baseline = _over_seeds(ours.values(), name), _over_seeds(theirs.values(), name)
            evaluation = shipped or next(iter(ours.values()))
            found.append(
                Finding(
                    one["trial"], one["name"], one["student"], headline, quality, baseline, gain(headline, pairs), evaluation,
                    shipped is not None,
                )
            )  # fmt: skip
    return found


def _over_seeds(evaluations: Iterable[Mapping[str, Any]], headline: str) -> dict[str, dict[str, Any]]:
    both = [{**one["quality"], **one["against"]} for one in evaluations]
    names = (headline, "retention", "agreement", "mse_to_teacher")
    return {name: interval([one[name] for one in both]) for name in names if both and all(name in one for one in both)}


def sentence_of(one: Finding) -> str:
    found = one.quality[one.headline.removeprefix("validation/")]
    seeds = found["count"]
    text = f"On the test split, {f'mean of {seeds} seeds' if seeds > 1 else 'one seed'}: "
    text += f"{LABELS[one.headline]} {spread(one.headline, found)}"
    if "retention" in one.quality:
        text += f", {spread('validation/retention', one.quality['retention'])} of the teacher's"
        text += " quality" if QUALITY[one.headline] == "min" else ""
    if one.gain is None:
        return f"{text}; nothing was trained without distillation to compare it with."
    mean, inside = gain_text(one.gain, one.headline)
    return f"{text}; {mean}{f' ({inside})' if inside else ''} over the same student without distillation."


def of_teacher(headline: str) -> str:
    """What retention is a share of. Of a perplexity a share would be a better one."""
    return f"the teacher's {'quality in ' if QUALITY[headline] == 'min' else ''}{LABELS[headline]}"


def gain_text(gain: Mapping[str, Any], metric: str = "validation/accuracy") -> tuple[str, str]:
    """+1.3 points; +0.2 to +2.4, p 0.03. As `pareto.gain` gives it: of shares in points, of perplexity in percent, else in its own unit."""
    mean, *ends = (gained(100 * value, metric) for value in (gain["mean"], gain["low"], gain["high"]) if value is not None)
    inside = [" to ".join(ends), p_value(gain["p"])]
    return mean + unit_of_gain(metric), ", ".join(part for part in inside if part)


def gained(hundredths: float, metric: str) -> str:
    """A gain as an evaluation has it, in hundredths of its unit: +1.3."""
    return f"{hundredths:+.1f}" if metric in SHARES | RATIOS else f"{hundredths / 100:+.3f}"


def unit_of_gain(metric: str) -> str:
    return " points" if metric in SHARES else " %" if metric in RATIOS else ""


def misses(search: Search, trial: Trial) -> list[str]:
    """What a trial does not keep, one text each, with what it has."""
    values, found = search.values(trial), []
    for wish in search.config.constraints:
        if missing([wish], values) != (0, 0.0):
            has = shown(wish.metric, values.get(wish.metric)) or "not measured"
            found.append(f"{LABELS[wish.metric]} {has} instead of {wished(wish)}")
    return found


def wished(wish: Constraint) -> str:
    """≥ 97.0 %"""
    return f"{'≥' if wish.at_least else '≤'} {shown(wish.metric, wish.bound)}"
