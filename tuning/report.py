"""The page of a search: what was chosen and why, in one file that opens from disk without a network. Every text from data is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from typing import Any

from tuning.drawing import charts, short_paths, sizes
from tuning.insight import knobs
from tuning.ledger import Search
from tuning.pareto import Decision
from tuning.tables import failures, finalists, leaderboard, loss_shares
from tuning.views import counts
from tuning.wording import LABELS, Finding, counted, duration, many, misses, of_teacher, on_test_split, sentence_of, shown, wished

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
NEAREST = 3
PANELS = 12
"""Sizes whose learning curves are drawn."""


def page(search: Search, decision: Decision, insight: Mapping[str, Any], *, links: Mapping[str, str], versions: Mapping[str, str]) -> str:
    """HTML of a search, also of one that is not over.

    insight: as `tuning.insight.summary` gives it, parts of it may be missing. links: title -> address. versions: package -> version.
    """
    drawn = charts(search, decision, insight.get("marginals", {}))
    body = [
        f"<h1>{escape(search.name)}</h1>",
        f'<p class="soft">{escape(_subject(search))}</p>',
        _verdict(search, decision),
        *(_charts(search, drawn) if drawn["trials"] else []),
        _importance(insight.get("importance", {}) if drawn["trials"] else {}),
        _marginals(drawn),
        loss_shares(search, insight.get("shares", {})),
        finalists(search),
        leaderboard(search, decision),
        failures(search),
        _reproduce(search, links, versions),
    ]
    return _document(search.name, "\n".join(part for part in body if part), drawn)


def _document(title: str, body: str, drawn: Mapping[str, Any]) -> str:
    sources = {name: files("tuning").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "plot.js", "page.js")}
    head = [
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title>',
        f"<style>{sources['page.css']}</style>",
    ]
    scripts = [
        f'<script type="application/json" id="data">{_json(drawn)}</script>',
        *(f"<script>{sources[name]}</script>" for name in ("plot.js", "page.js")),
    ]
    tip = '<div id="tip" role="status" hidden></div>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{"".join(head)}</head><body><main>\n{body}\n</main>{tip}\n'
        + "\n".join(scripts)
        + "\n</body></html>\n"
    )


def _json(content: Mapping[str, Any]) -> str:
    """JSON that cannot end the script it stands in."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


# ----------------------------------------------------------------------------------------------------------- the verdict


def _subject(search: Search) -> str:
    run = [trial for trial in search.of_role("trial") if trial.state != "refused"]
    over = f"{many(len(knobs(search)), 'knob')} and {many(len(sizes(search, run)), 'student size')}"
    trials = f"{many(len(run), 'trial')} of {search.config.trials}" if len(run) != search.config.trials else many(len(run), "trial")
    job = search.job
    teacher = (job["teacher"] or next(iter(job["teachers"].values())))["model"]
    return f"A search over {over}: {trials}, all on one pass of the teacher {teacher}. Trials are compared on the validation split."


def _verdict(search: Search, decision: Decision) -> str:
    choice, found = search.choice, counts(search)
    wishes = " and ".join(f"{LABELS[wish.metric]} {wished(wish)}" for wish in search.config.constraints)
    test = {one.trial: one for one in on_test_split(search)}
    if choice is None:
        big = "Nothing has finished yet." if not found["finished"] else "Not decided yet."
        lines = [_so_far(search), decision.why]
    else:
        finalist = next(one for one in choice["finalists"] if one["trial"] == choice["trial"])
        big = _headline(search, finalist, test.get(choice["trial"]))
        if wishes and not choice["kept"]:
            big = f"No student keeps {wishes}. Nearest: {big}"
        lines = [choice["reason"] + ".", *(sentence_of(test[number]) for number in test if number == choice["trial"])]
    near = "" if decision.feasible or not decision.nearest else _nearest(search, decision)
    kind = "verdict" if choice is not None and choice["kept"] else "verdict open"
    return f'<div class="{kind}"><strong>{escape(big)}</strong>{"".join(f"<p>{escape(line)}</p>" for line in lines)}{near}</div>'


def _headline(search: Search, finalist: Mapping[str, Any], test: Finding | None) -> str:
    """The student, what it keeps and what it costs."""
    student, parameters, whole = finalist["student"], counted(finalist["values"]["cost/parameters"]), of_teacher(search.headline)
    if test is not None and "retention" in test.quality:
        kept, ratios = shown("validation/retention", test.quality["retention"]["mean"]), test.evaluation["ratios"]
        pace = f", {ratios['speedup']:.1f}x faster" if ratios["speedup"] >= 1.05 else ""
        return f"{student} keeps {kept} of {whole} on the test split at {ratios['parameter_ratio']:.2f}x the parameters{pace}."
    if (retention := finalist["values"].get("validation/retention")) is not None:
        return f"{student} keeps {shown('validation/retention', retention)} of {whole} with {parameters} parameters."
    return f"{student}, with {parameters} parameters."


def _so_far(search: Search) -> str:
    found = {state: count for state, count in counts(search).items() if count}
    return f"So far: {', '.join(f'{count} {state}' for state, count in found.items()) or 'no trials'}; {search.config.trials} are wanted."


def _nearest(search: Search, decision: Decision) -> str:
    rows = [search.trials[number] for number in decision.nearest[:NEAREST]]
    items = "".join(f"<li>{escape(trial.task.name)}: {escape('; '.join(misses(search, trial)))}</li>" for trial in rows)
    return f"<p>Among the trials these came nearest:</p><ol>{items}</ol>"


# ---------------------------------------------------------------------------------------------------------------- charts


def _charts(search: Search, drawn: Mapping[str, Any]) -> list[str]:
    quality, size = drawn["quality"]["label"], drawn["size"]["label"]
    front = f"Each finished trial of the search by {size} and {quality}."
    return [
        "<noscript><p>The charts are drawn by a script in this file; the tables need none.</p></noscript>",
        f"<h2>{escape(_sentence(size))} against {escape(quality)}</h2>",
        _figure("front", front, _legend(search, drawn),
                "The line is what the front reaches at each size. A baseline is the same student and budget without the teacher. "
                "Points of one size are spread a little sideways; a triangle at the edge lies beyond it. "
                "Stopped trials are shown where they were stopped."),
        "<h2>Knobs and what they led to</h2>",
        _figure("parallel", "Parallel coordinates: each line is a trial, each axis a knob or an objective.", _ramp(search, drawn),
                "Each line is a trial, coloured by its quality; grey: not finished, so without a result. A knob that a trial does not have is none."),
        "<h2>Learning curves</h2>",
        _curves(search, drawn),
    ]  # fmt: skip


def _figure(chart: str, title: str, legend: str, caption: str) -> str:
    return f"<figure>{legend}{_plot(chart, title)}<figcaption>{escape(caption)}</figcaption></figure>"


def _plot(chart: str, title: str, of: int = 0) -> str:
    said = f'role="group" aria-label="{escape(title)} Arrow keys go from trial to trial." data-title="{escape(title)}"'
    return f'<div class="plot" tabindex="0" {said} data-chart="{chart}" data-of="{of}"></div>'


def _legend(search: Search, drawn: Mapping[str, Any]) -> str:
    """Only of what is there to see."""
    states = {(trial["s"], trial["ok"], trial["front"]) for trial in drawn["trials"]}
    asked = bool(search.config.keep)
    circle = '<circle cx="8" cy="8" r="{}" class="{}"/>'.format
    entries = {
        "chosen": circle(6, "chosen") if drawn["choice"] is not None else "",
        "front": circle(6, "trial finished front") if any(front for *_, front in states) else "",
        "keeps what was asked for" if asked else "finished": circle(4, "trial finished") if ("finished", True, False) in states else "",
        "finished, does not keep it": circle(4, "trial failing") if asked and ("finished", False, False) in states else "",
        "stopped early": circle(3, "trial stopped") if any(state == "stopped" for state, *_ in states) else "",
        "failed": circle(3, "trial failed") if any(state == "failed" for state, *_ in states) else "",
        "running": circle(3, "trial running") if any(state == "running" for state, *_ in states) else "",
        "baseline": '<rect x="3.5" y="3.5" width="9" height="9" class="baseline"/>' if drawn["baselines"] else "",
        "teacher": '<line x1="0" x2="16" y1="8" y2="8" class="teacher"/>' if drawn["teacher"] is not None else "",
    }
    spans = "".join(
        f'<span><svg width="16" height="16" aria-hidden="true">{shape}</svg>{name}</span>' for name, shape in entries.items() if shape
    )
    return f'<div class="legend">{spans}</div>'


def _ramp(search: Search, drawn: Mapping[str, Any]) -> str:
    label = escape(drawn["quality"]["label"])
    chosen = '<span><svg width="16" height="16" aria-hidden="true" class="lines"><path d="M0 8H16" class="choice"/></svg>chosen</span>'
    thick = '<span><svg width="16" height="16" aria-hidden="true" class="lines"><path d="M0 8H16" class="front"/></svg>front (thick)</span>'
    grey = '<span><svg width="16" height="16" aria-hidden="true" class="lines"><path d="M0 8H16" class="over"/></svg>stopped early</span>'
    stopped = any(trial["s"] == "stopped" for trial in drawn["trials"])
    return (
        f'<div class="legend"><span>worse {label} <i class="ramp"></i> better</span>{chosen if search.choice else ""}{thick}'
        f"{grey if stopped else ''}</div>"
    )


def _curves(search: Search, drawn: Mapping[str, Any]) -> str:
    """A panel for each student: only those are compared while they train."""
    panels = []
    for i, student in enumerate(drawn["students"][:PANELS]):
        mine = [trial for trial in drawn["trials"] if trial["l"] == i]
        if not any(trial["c"] for trial in mine):
            continue
        stopped = sum(trial["s"] == "stopped" for trial in mine)
        cost = next((trial["z"] for trial in mine if trial["z"] is not None), None)
        about = f"{shown(search.config.size, cost)}, " if cost is not None else ""
        about += many(len(mine), "trial") + (f", {stopped} stopped" if stopped else "")
        title = f"Learning curves of {student['label']}."
        panels.append(f"<div><h3>{escape(student['label'])}<small>{escape(about)}</small></h3>{_plot('curves', title, i)}</div>")
    if not panels:
        return '<p class="soft">No curve has been recorded.</p>'
    hidden = f" The {PANELS} smallest sizes of {len(drawn['students'])}." if len(drawn["students"]) > PANELS else ""
    caption = (
        f"{drawn['quality']['label']} on the validation split against rows seen. Bold: on the front; ring: where a trial was stopped or is now; "
        f"dashed: the same student without the teacher.{hidden}"
    )
    return f'<figure><div class="panels">{"".join(panels)}</div><figcaption>{escape(_sentence(caption))}</figcaption></figure>'


# --------------------------------------------------------------------------------------------------------------- insight


def _importance(importance: Mapping[str, Mapping[str, float]]) -> str:
    parts = []
    for metric, shares in importance.items():
        names, most = dict(zip(shares, short_paths(list(shares)), strict=True)), max(shares.values(), default=0.0)
        bars = "".join(
            f"<tr><td>{escape(names[path])}</td><td>{100 * share:.0f} %</td>"
            f'<td class="bar"><i style="width:{100 * share / most:.1f}%"></i></td></tr>'
            for path, share in sorted(shares.items(), key=lambda pair: -pair[1])
            if most
        )
        why = "The knobs tell nothing about it." if shares else "Too few finished trials to tell."
        table = f'<table class="bars"><tbody>{bars}</tbody></table>' if bars else f'<p class="soft">{why}</p>'
        parts.append(f"<div><h3>{escape(LABELS[metric])}</h3>{table}</div>")
    caption = "Share of each knob in what the knobs tell about a metric of the finished trials: permutation importance of a random forest."
    return f"<h2>What mattered</h2>{_panels(parts, caption)}" if parts else ""


def _marginals(drawn: Mapping[str, Any]) -> str:
    quality, panels = drawn["quality"]["label"], []
    for i, (knob, bins) in enumerate(zip(drawn["knobs"], drawn["marginals"], strict=True)):
        if bins:
            path = f"<small>{escape(knob['path'])}</small>" if knob["path"] != knob["label"] else ""
            title = f"<h3>{escape(knob['label'])}{path}</h3>"
            about = f"{quality} against {knob['label']}."
            panels.append(f"<div>{title}{_plot('marginal', about, i)}</div>")
    caption = f"{quality} of the finished trials against each knob: the mean of each bin with its 95 % interval, the trials behind."
    return f"<h2>Each knob alone</h2>{_panels(panels, caption)}" if panels else ""


def _panels(panels: Sequence[str], caption: str) -> str:
    return f'<figure><div class="panels">{"".join(panels)}</div><figcaption>{escape(_sentence(caption))}</figcaption></figure>'


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# ------------------------------------------------------------------------------------------------------------- reproduce


def _reproduce(search: Search, links: Mapping[str, str], versions: Mapping[str, str]) -> str:
    import yaml

    commands = ["distill run best.yaml      # train, test and export the choice again"] if search.choice is not None else []
    commands += ["distill search job.yaml    # the search: goes on where it stopped, what is finished is found"]
    seeds = [f"search {search.config.seed}", f"training {search.job['training'].get('seed', 0)}"]
    if search.choice is not None:
        refits = sorted({trial.task.seed for trial in search.of_role("refit")})
        seeds += [f"refits {', '.join(map(str, refits))}", f"chosen {search.choice['seed']}"]
    asked = f"{many(search.passes, 'pass', 'passes')} over train and validation, {search.answered:,} rows in trainings"
    started = datetime.fromtimestamp(search.started / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = {
        "fingerprint": search.fingerprint, "teacher asked": asked, "seeds": "; ".join(seeds), "started": started,
        "took": duration(search.elapsed(search.updated)) + ("" if search.ended else " so far"), **versions,
    }  # fmt: skip
    pairs = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    pairs += "".join(f"<dt>{escape(title)}</dt><dd>{_link(address)}</dd>" for title, address in links.items())
    job = yaml.safe_dump(search.job, sort_keys=False, allow_unicode=True, width=120)
    return (
        f'<h2>How to reproduce it</h2><pre>{escape(chr(10).join(commands))}</pre><p class="soft">What they read lies beside this page.</p>'
        f"<dl>{pairs}</dl><details><summary>Job file, as resolved</summary><pre>{escape(job)}</pre></details>"
    )


def _link(address: str) -> str:
    if not address.startswith(("http://", "https://")):
        return escape(address)
    return f'<a href="{escape(address)}" rel="noreferrer">{escape(address if len(address) < 90 else address[:80] + "…")}</a>'
