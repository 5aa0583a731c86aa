"""What a terminal shows of a search: a line, a board, a leaderboard, trials side by side, and the sentences at its end. Loads in no time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tuning.config import COSTS, METRICS, QUALITY, SearchConfig
from tuning.insight import shares
from tuning.ledger import Search, Trial
from tuning.pareto import Decision
from tuning.wording import LABELS, duration, on_test_split, plain, sentence_of, shown

STATES = {"finished": 0, "running": 1, "stopped": 2, "failed": 3, "refused": 4}
SILENT_MS = 120_000
"""After so long without a word a search counts as interrupted, and its clock stands still."""

# --------------------------------------------------------------------------------------------------------------- ranking


def ranked(search: Search, decision: Decision) -> list[Trial]:
    """Trials that were run, the best first: those that keep what was asked for before others, the front before what it beats, then quality.

    Below them, in the same order, what has not seen all its rows or has failed: its numbers do not compare.
    """
    quality, front, feasible = search.config.quality, set(decision.front), set(decision.feasible)
    sign = -1 if QUALITY[quality] == "max" else 1

    def place(trial: Trial) -> tuple[Any, ...]:
        value = trial.metrics.get(quality)
        unknown = value is None, sign * (value or 0.0)
        return STATES[trial.state], trial.number not in feasible, trial.number not in front, *unknown, trial.number

    return sorted((trial for trial in search.of_role("trial") if trial.state != "refused"), key=place)


def columns(config: SearchConfig, values: Iterable[Mapping[str, float]]) -> list[str]:
    """Metrics worth a column: objectives and what is to be kept, retention and parameters; those that any trial has."""
    wanted = [config.quality, *config.objectives, *config.keep, "validation/retention", "cost/parameters"]
    known = {name for one in values for name in one}
    order = list(LABELS)
    return sorted((name for name in dict.fromkeys(wanted) if name in known), key=lambda name: (name != config.quality, order.index(name)))


def mark(trial: Trial, search: Search, decision: Decision) -> str:
    if search.choice is not None and search.choice["trial"] == trial.number:
        return "choice"
    return "front" if trial.number in decision.front else ""


def keeps(trial: Trial, decision: Decision) -> str:
    """Whether a trial has what was asked for; empty before its end."""
    return "" if trial.state != "finished" else "yes" if trial.number in decision.feasible else "no"


def leaderboard(search: Search, decision: Decision, top: int = 20) -> Table:
    """The best trials; fits 120 columns. Values of trials that are not finished are the last that were seen."""
    trials = ranked(search, decision)[:top]
    values, asked = {trial.number: search.values(trial) for trial in trials}, bool(search.config.keep)
    names = columns(search.config, values.values())
    heads = ["#", "name", "state", *(LABELS[name] for name in names), "rows", *(["keeps"] if asked else []), ""]
    rows = [
        [
            str(trial.number), trial.task.name, trial.state, *(shown(name, values[trial.number].get(name)) for name in names), seen(trial),
            *([keeps(trial, decision)] if asked else []), mark(trial, search, decision),
        ]
        for trial in trials
    ]  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for head in heads:
        # Numbers are never cut: where a line is too long, names are, being the only column that rich takes for one to wrap.
        table.add_column(head, justify="left" if head in ("name", "state", "") else "right", no_wrap=head != "name")
    for row in rows:
        cells = [Text(cell, no_wrap=True, overflow="ellipsis") for cell in row]
        table.add_row(*cells, style="bold" if row[-1] else "" if row[2] == "finished" else "dim")
    return table


def seen(trial: Trial) -> str:
    """Share of its rows that a trial has seen."""
    return f"{100 * trial.rows / trial.task.rows:.0f} %" if trial.task.rows else ""


def leaderboard_json(search: Search, decision: Decision) -> dict[str, Any]:
    """Everything: every trial in the order of the leaderboard, then refused points, baselines and refits, each with a `role`."""
    rank = {trial.number: i for i, trial in enumerate(ranked(search, decision), 1)}
    last = len(rank) + 1
    trials = sorted(search.trials, key=lambda trial: (rank.get(trial.number, last), trial.task.role, trial.number))
    return {
        "name": search.name, "fingerprint": search.fingerprint, "started": search.started, "updated": search.updated, "ended": search.ended,
        "objectives": search.config.objectives, "keep": search.config.keep, "headline": search.headline, "teacher": search.teacher,
        "counts": counts(search),
        "front": decision.front, "knee": decision.knee, "feasible": decision.feasible, "nearest": decision.nearest,
        "teacher_passes": search.passes, "teacher_rows_in_trainings": search.answered,
        "finalists": decision.finalists, "hypervolume": decision.hypervolume, "why": decision.why, "choice": search.choice,
        "trials": [
            {
                "rank": rank.get(trial.number), "number": trial.number, "role": trial.task.role, "name": trial.task.name,
                "state": trial.state, "student": trial.task.student, "point": dict(trial.task.point), "of": trial.task.of,
                "seed": trial.task.seed, "metrics": search.values(trial), "rows": trial.rows, "rows_in_all": trial.task.rows,
                "seconds": trial.seconds, "cause": trial.cause, "node": trial.node, "front": trial.number in decision.front,
                "feasible": trial.number in decision.feasible,
                "choice": search.choice is not None and search.choice["trial"] == trial.number,
            }
            for trial in trials
        ],
    }  # fmt: skip


def counts(search: Search) -> dict[str, int]:
    """Trials in each state; baselines and refits are not among them."""
    found = Counter(trial.state for trial in search.of_role("trial"))
    return {state: found[state] for state in ("finished", "stopped", "failed", "running", "refused")}


# ---------------------------------------------------------------------------------------------------------------- status


def status(search: Search, decision: Decision, now_ms: int) -> str:
    """One line: how far the search is, what is best so far, how fast it goes and for how long."""
    return " | ".join([*_progress(search), *_best(search, decision), *_pace(search, now_ms)])


def _progress(search: Search) -> list[str]:
    found, wanted = counts(search), search.config.trials
    done = {state: found[state] for state in ("finished", "stopped", "failed") if found[state]}
    text = f"{sum(done.values())} of {wanted} trials"
    text += f" ({', '.join(f'{count} {state}' for state, count in done.items())})" if done else ""
    text += "".join(f", {found[state]} {state}" for state in ("running", "refused") if found[state])
    return [text, *(one for one in (_confirmed(search, "baselines"), _confirmed(search, "refits")) if one)]


def _confirmed(search: Search, what: str) -> str:
    trials = search.of_role("baseline") if what == "baselines" else search.of_role("refit", "refit-baseline")
    return f"{what} {sum(trial.state != 'running' for trial in trials)} done" if trials else ""


def _best(search: Search, decision: Decision) -> list[str]:
    quality, trials = search.config.quality, [search.trials[number] for number in decision.front]
    if not trials:
        return ["no trial has finished"]
    sign = 1 if QUALITY[quality] == "max" else -1
    best = max(trials, key=lambda trial: sign * trial.metrics[quality])
    found = [f"best {LABELS[quality]} {shown(quality, best.metrics[quality])} {best.task.name}"]
    if search.config.keep:
        names = [search.trials[number].task.name for number in decision.finalists[:1] if decision.feasible]
        found += [f"smallest that keeps: {names[0]}" if names else "none keeps what was asked for yet"]
    return [*found, f"front of {len(trials)}"]


def _pace(search: Search, now_ms: int) -> list[str]:
    silent = 0 if search.ended else now_ms - search.updated
    seconds = search.elapsed(now_ms if 0 < silent < SILENT_MS else search.updated)
    rows = sum(trial.rows for trial in search.trials)
    found = [f"{rows / seconds:,.0f} rows/s"] if rows and seconds > 0 else []
    found += [duration(seconds)]
    if silent >= SILENT_MS:
        return [*found, f"nothing recorded for {duration(silent / 1000)}"]
    left = _rows_left(search)
    return found if search.ended or not left or not rows else [*found, f"about {duration(left * seconds / rows)} left"]


def _rows_left(search: Search) -> float:
    """That everything still to be trained will see: trials like those so far, then baselines and refits in full."""
    config, trials = search.config, [trial for trial in search.of_role("trial") if trial.state != "refused"]
    over = [trial for trial in trials if trial.state != "running"]
    usual = sum(trial.rows for trial in over) / len(over) if over else 0.0
    left = sum(
        max(0.0, (trial.task.rows if trial.task.role != "trial" else usual) - trial.rows)
        for trial in search.trials
        if trial.state == "running"
    )
    if not over:
        return left
    whole = max(trial.task.rows for trial in over)
    left += usual * max(0, config.trials - len(trials))
    if not search.of_role("refit"):
        left += 2 * config.finalists * config.seeds * whole / config.budget
    return left + (0 if search.of_role("baseline") else config.finalists * whole)


def board(search: Search, decision: Decision, now_ms: int) -> RenderableType:
    """What a terminal shows while a search runs: how far it is, what runs, the ten best."""
    *best, front = _best(search, decision)
    lines = [Text(line) for line in (" | ".join(_progress(search)), *best, " | ".join([front, *_pace(search, now_ms)]))]
    running = [trial for trial in search.trials if trial.state == "running"]
    table = Table(box=None, pad_edge=False, show_header=False)
    for trial in running[:8]:
        value = shown(search.config.quality, trial.metrics.get(search.config.quality))
        table.add_row(
            Text(str(trial.number), justify="right"), Text(trial.task.name), Text(f"{seen(trial)} of its rows"), Text(value), style="dim"
        )
    if len(running) > 8:
        table.add_row("", Text(f"and {len(running) - 8} more"), style="dim")
    return Group(*lines, table, leaderboard(search, decision, top=10))


# --------------------------------------------------------------------------------------------------------------- compare


def compare(search: Search, numbers: Sequence[int]) -> Table:
    """Trials side by side: the knobs in which they differ, metrics, costs, shares of the terms of the loss."""
    found = compare_json(search, numbers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    for one in found["trials"]:
        table.add_column(Text(f"{one['number']}  {one['name']}"), justify="right", overflow="fold")
    for title, rows in found["rows"].items():
        for i, (name, values) in enumerate(rows.items()):
            label = LABELS.get(name, name)
            cells = [_cell(title, name, value) for value in values]
            table.add_row(Text(label), *(Text(cell) for cell in cells), end_section=i == len(rows) - 1)
    return table


def _cell(title: str, name: str, value: Any) -> str:
    if value is None or name in METRICS:
        return shown(name, value) or "-"
    return f"{100 * value:.0f} %" if title == "loss" else f"{value:,}" if title == "run" and not isinstance(value, str) else plain(value)


def compare_json(search: Search, numbers: Sequence[int]) -> dict[str, Any]:
    """The same as values: rows by knobs, quality, cost, loss and run, each with one value per trial, None where a trial has none."""
    trials = [search.trials[number] for number in numbers]
    values, losses = [search.values(trial) for trial in trials], [shares(trial) for trial in trials]
    knobs = {path: [trial.task.point.get(path) for trial in trials] for path in dict.fromkeys(p for t in trials for p in t.task.point)}
    terms = sorted({term for one in losses for term in one})
    return {
        "trials": [{"number": t.number, "name": t.task.name, "state": t.state, "student": t.task.student} for t in trials],
        "rows": {
            "knobs": {path: row for path, row in knobs.items() if len({json.dumps(value, sort_keys=True) for value in row}) > 1},
            "quality": {name: [one.get(name) for one in values] for name in QUALITY if any(name in one for one in values)},
            "cost": {name: [one.get(name) for one in values] for name in COSTS if any(name in one for one in values)},
            "loss": {
                f"{kind} share of {term}": [one.get(term, {}).get(f"{kind}_share") for one in losses]
                for term in terms
                for kind in ("weighted", "gradient")
            },
            "run": {
                "state": [t.state for t in trials],
                "rows seen": [t.rows for t in trials],
                "seconds": [round(t.seconds, 1) for t in trials],
            },
        },
    }


# --------------------------------------------------------------------------------------------------------------- summary


def teacher_passes(search: Search) -> str:
    """How often the whole search asked the teacher: once at most."""
    return f"Teacher forward passes over train and validation: {search.passes}; rows asked of it in trainings: {search.answered:,}."


def summary(search: Search, decision: Decision) -> list[str]:
    """Plain sentences for the end of a search, or for where it is: the front, the choice, what the test split says, what to do next."""
    found, finished = counts(search), counts(search)["finished"]
    others = ", ".join(f"{found[state]} {state}" for state in ("stopped", "failed", "running", "refused") if found[state])
    front = "; ".join(_in_front(search, search.trials[number]) for number in decision.front)
    lines = [
        f"{finished} trials finished{f' ({others})' if others else ''}, {len(decision.front)} of them on the front"
        + (f": {front}." if front else ".")
    ]
    choice = search.choice
    if choice is None:
        return [*lines, decision.why, "Nothing is chosen yet: `distill search` goes on where it stopped."]
    lines += [f"Chosen: {choice['reason']}."]
    lines += [sentence_of(one) for one in on_test_split(search) if one.trial == choice["trial"]]
    if not choice["kept"] and search.config.keep:
        return [*lines, "What was asked for was not reached: allow larger students or more trials, or ask for less in search.keep."]
    return [*lines, "best.yaml reproduces it: `distill run best.yaml`."]


def _in_front(search: Search, trial: Trial) -> str:
    config, values = search.config, search.values(trial)
    return f"{trial.task.student} {shown(config.quality, values[config.quality])} at {shown(config.size, values.get(config.size))}".rstrip()
