"""The tables of a search's page: finalists, leaderboard, failures. Every text from data is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from tuning.config import reported
from tuning.ledger import Search, Trial
from tuning.pareto import Decision
from tuning.views import columns, keeps, mark, ranked, seen
from tuning.wording import LABELS, Finding, bounds, counted, gain_text, gained, many, on_test_split, plain, shown, unit_of_gain

TOP = 50
"""Trials of the leaderboard that are not folded away."""
WORDS = {"name", "state", "cause", "node", "reason", "trial of the front", "raw", "weighted", "gradient norm"}
"""Columns that start at the left."""


def table(head: Sequence[str], rows: Iterable[str]) -> str:
    kinds = ["text" if name in WORDS else "number" for name in head]
    cells = "".join(f'<th class="{kind}">{escape(name)}</th>' for name, kind in zip(head, kinds, strict=True))
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def loss_shares(search: Search, shares: Mapping[int, Mapping[str, Mapping[str, float | None]]]) -> str:
    """What each term of the loss had to say in the trials of the front."""
    terms = sorted({term for one in shares.values() for term in one})
    if not terms:
        return ""
    swatches = "".join(
        f'<span><i class="swatch" style="background:var(--term-{i % 6})"></i>{escape(term)}</span>' for i, term in enumerate(terms)
    )
    rows = []
    for number, one in shares.items():
        raw = ", ".join(f"{term} {plain(one[term]['raw'])}" for term in terms if term in one and one[term].get("raw") is not None)
        bars = "".join(f"<td>{_stack(terms, one, f'{kind}_share')}</td>" for kind in ("weighted", "gradient"))
        trial = search.trials[int(number)]
        rows.append(
            f"<tr><td>{trial.number}</td><td class='text name'>{escape(trial.task.name)}</td><td class='text'>{escape(raw)}</td>{bars}</tr>"
        )
    said = table(["#", "trial of the front", "raw", "weighted", "gradient norm"], rows)
    return f'<h2>What each loss term had to say</h2><div class="legend">{swatches}</div>{said}'


def _stack(terms: Sequence[str], one: Mapping[str, Mapping[str, float | None]], key: str) -> str:
    known = [(i, term, one[term].get(key)) for i, term in enumerate(terms) if term in one]
    if not any(share for _, _, share in known):
        return '<span class="soft">not recorded</span>'
    title = ", ".join(f"{term} {100 * share:.0f} %" for _, term, share in known if share is not None)
    parts = "".join(f'<i style="width:{100 * share:.1f}%;background:var(--term-{i % 6})"></i>' for i, _, share in known if share)
    return f'<div class="stack" role="img" aria-label="{escape(title)}" title="{escape(title)}">{parts}</div>'


def finalists(search: Search) -> str:
    """Finalists in full over their seeds, on both splits, and what they cost."""
    if search.choice is None:
        return ""
    test, rows, costs = {one.trial: one for one in on_test_split(search)}, [], []
    for one in search.choice["finalists"]:
        kind = "choice front" if one["trial"] == search.choice["trial"] else ""
        title = f'<tr class="group {kind}"><th colspan="6">{escape(one["name"])}</th></tr>'
        lines = [
            _split(
                search,
                f"validation, {many(len(one['refits']), 'seed')}",
                one["quality"],
                one["baseline"],
                one["gain"],
                search.config.quality,
            )
        ]
        if (found := test.get(one["trial"])) is not None:
            ours, theirs = ({f"validation/{name}": value for name, value in side.items()} for side in (found.quality, found.baseline))
            seeds = many(ours[search.headline]["count"], "seed")
            lines.append(_split(search, f"test, {seeds}", ours, theirs, found.gain, search.headline))
            if found.shipped:
                lines.append(_exported(search, found.evaluation))
        rows += [title, *lines]
        costs.append(_cost(one, found, kind))
    head = ["", *(LABELS[name] for name in _shown_of(search)), "without distillation", "gain"]
    teacher = next((e for e in search.evaluations or () if e["role"] == "teacher"), None)
    costs += [_cost_of("teacher", teacher["cost"], {}, "minor")] if teacher else []
    note = (
        "Under a mean over seeds is its 95 % interval over seeds (Student's t), which says nothing of the rows of the split; that of the "
        f"exported model is over rows ({'Wilson; ' if search.headline == 'validation/accuracy' else ''}paired bootstrap). "
        "Without distillation: the same student, start and rows, labels only. p: paired t-test over seeds."
    )
    conditions = f" Test split: {teacher['rows']:,} rows, {teacher['device']}, {teacher['precision']}." if teacher else ""
    cost = table(["", "parameters", "FLOPs", "p50 / p95 ms", "MB"], costs)
    said = f'<p class="soft">{note}{escape(conditions)}</p>'
    return f"<h2>Finalists, trained in full</h2>{table(head, rows)}{said}<h3>What they cost</h3>{cost}"


def _shown_of(search: Search) -> list[str]:
    """The headline, what it keeps of the teacher's, and how alike the answers are."""
    alike = next(name for name in ("validation/agreement", "validation/mse_to_teacher") if name in reported(search.job["task"]["type"]))
    return [search.headline, "validation/retention", alike]


def _split(
    search: Search, title: str, quality: Mapping[str, Any], baseline: Mapping[str, Any], gain: Mapping[str, Any] | None, metric: str
) -> str:
    names = _shown_of(search)
    cells = [(shown(name, quality[name]["mean"]), bounds(name, quality[name])) if name in quality else ("", "") for name in names]
    cells += [(shown(metric, baseline[metric]["mean"]), bounds(metric, baseline[metric])) if metric in baseline else ("", "")]
    return _row(title, [*cells, gain_text(gain, metric) if gain else ("", "")])


def _exported(search: Search, e: Mapping[str, Any]) -> str:
    """One evaluation, with its intervals over rows."""
    found, metric = {f"validation/{name}": value for name, value in {**e["quality"], **e["against"]}.items()}, search.headline
    cells = [
        (shown(name, found.get(name)), bounds(name, {end: found.get(f"{name}_{end}") for end in ("low", "high")}))
        for name in _shown_of(search)
    ]
    gain = ("", "")
    if "gain" in e["against"]:
        mean, *ends = (gained(e["against"][key], metric) for key in ("gain", "gain_low", "gain_high"))
        gain = mean + unit_of_gain(metric), " to ".join(ends)
    return _row("test, the exported model", [*cells, ("", ""), gain])


def _row(title: str, cells: Iterable[tuple[str, str]]) -> str:
    inner = (f"<td>{escape(value)}{f'<small>{escape(inside)}</small>' if inside else ''}</td>" for value, inside in cells)
    return f"<tr><td>{escape(title)}</td>{''.join(inner)}</tr>"


def _cost(finalist: Mapping[str, Any], test: Finding | None, kind: str) -> str:
    if test is not None:
        return _cost_of(finalist["name"], test.evaluation["cost"], test.evaluation["ratios"], kind)
    return _cost_of(finalist["name"], {name.removeprefix("cost/"): value for name, value in finalist["values"].items()}, {}, kind)


def _cost_of(name: str, cost: Mapping[str, float], ratios: Mapping[str, float], kind: str) -> str:
    times = [f"{cost[key]:.1f}" for key in ("latency_ms_p50", "latency_ms_p95") if key in cost]
    cells = [
        counted(cost["parameters"]) + (f" ({ratios['parameter_ratio']:.2f}x)" if ratios else ""),
        counted(cost["flops"]) + (f" ({ratios['flops_ratio']:.2f}x)" if ratios else ""),
        " / ".join(times) or "not measured",
        f"{cost['bytes'] / 1e6:.1f}",
    ]
    return f'<tr class="{kind}"><td>{escape(name)}</td>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def leaderboard(search: Search, decision: Decision) -> str:
    trials = ranked(search, decision)
    if not trials:
        return ""
    values = {trial.number: search.values(trial) for trial in trials}
    names, asked = columns(search.config, values.values()), bool(search.config.keep)
    head = ["#", "name", *(LABELS[name] for name in names), "rows", *(["keeps"] if asked else []), "state", ""]

    def row(trial: Trial) -> str:
        marked = mark(trial, search, decision)
        kind = "choice front" if marked == "choice" else marked or ("" if trial.state == "finished" else "minor")
        cells = [
            *(shown(name, values[trial.number].get(name)) for name in names),
            seen(trial),
            *([keeps(trial, decision)] if asked else []),
        ]
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        start = f'<td>{trial.number}</td><td class="text name">{escape(trial.task.name)}</td>'
        return f'<tr class="{kind}">{start}{numbers}<td class="text">{trial.state}</td><td class="text tag">{marked}</td></tr>'

    rows = [row(trial) for trial in trials]
    rest = f"<details><summary>{len(rows) - TOP} more</summary>{table(head, rows[TOP:])}</details>" if len(rows) > TOP else ""
    order = "those that keep what was asked for first, " if asked else ""
    return (
        f'<h2>Leaderboard</h2><p class="soft">Finished trials, {order}then the front, then by {escape(LABELS[search.config.quality])}; below them '
        f"what did not come to its end, with the last values seen.</p>{table(head, rows[:TOP])}{rest}"
    )


def failures(search: Search) -> str:
    failed = [trial for trial in search.trials if trial.state == "failed"]
    rows = [
        f'<tr><td>{trial.number}</td><td class="text name">{escape(trial.task.name)}</td><td class="text">{trial.state}</td>'
        f'<td class="wide">{escape(trial.cause or "no cause was recorded")}</td><td class="text">{escape(trial.node)}</td></tr>'
        for trial in failed
    ]
    # Reasons that differ only in their numbers are one.
    reasons: dict[str, list[str]] = {}
    for trial in search.trials:
        if trial.state == "refused":
            reasons.setdefault(re.sub(r"\d+", "#", trial.cause), []).append(trial.cause)
    groups = [
        f'<tr><td>{len(causes)}</td><td class="wide">{escape(causes[0])}</td></tr>'
        for causes in sorted(reasons.values(), key=len, reverse=True)
    ]
    parts = [
        f"<h2>Failures</h2>{table(['#', 'name', 'state', 'cause', 'node'], rows)}"
        if rows
        else "<h2>Failures</h2><p>No training failed.</p>"
    ]
    if groups:
        said = (
            "Points that make no valid job, or one that was there already. They cost nothing. Of reasons that differ in a number the first."
        )
        parts.append(f'<h3>Refused points</h3><p class="soft">{said}</p>{table(["points", "reason"], groups)}')
    return "".join(parts)
