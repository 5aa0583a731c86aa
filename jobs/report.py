"""What a person reads at the end of a job: a table, a sentence for each student, a page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from distillation.cards import METRICS, Facts, show
from distillation.evaluate import Evaluation


def ordered(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """The teacher, then each student after its baseline."""
    by_name = {e.name: e for e in evaluations}
    names = [e.name for e in evaluations if e.role == "teacher"]
    for student in (e for e in evaluations if e.role == "student"):
        names += [student.name] if student.baseline is None else [student.baseline, student.name]
    return [by_name[name] for name in dict.fromkeys([*names, *by_name])]


def headings(evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
    """Of the table's columns: the headline of the task, and what is known beside the teacher."""
    near = METRICS[_near(evaluations)].title
    return ("model", METRICS[evaluations[0].headline].title, "retention", near, "parameters", "FLOPs", "p50 / p95 ms", "MB")


def _near(evaluations: Sequence[Evaluation]) -> str:
    """The metric that says how alike a model and its teacher are; numbers have no agreement."""
    return "mse_to_teacher" if evaluations[0].task == "regression" else "agreement"


def cells(e: Evaluation) -> tuple[str, ...]:
    """One row of the table, as text: see `headings`."""
    beside, cost, ratio, near = e.against, e.cost, e.ratios, _near([e])
    value, low, high = (e.quality[f"{e.headline}{end}"] for end in ("", "_low", "_high"))
    half = f"{50 * (high - low):.1f}" if METRICS[e.headline].share else f"{(high - low) / 2:.2g}"
    return (
        e.name,
        f"{metric(e.headline, value)} ±{half}",
        f"{_percent(beside['retention'])} ±{50 * (beside['retention_high'] - beside['retention_low']):.1f}" if beside else "",
        metric(near, beside[near]) if near in beside else "",
        _count(cost["parameters"]) + (f" ({ratio['parameter_ratio']:.2f}x)" if ratio else ""),
        _count(cost["flops"]) + (f" ({ratio['flops_ratio']:.2f}x)" if ratio else ""),
        f"{cost['latency_ms_p50']:.1f} / {cost['latency_ms_p95']:.1f}",
        f"{cost['bytes'] / 1e6:.1f}",
    )


def metric(name: str, value: float) -> str:
    """In percent where it is a share."""
    return _percent(value) if METRICS[name].share else show(name, value)


def table(evaluations: Sequence[Evaluation]) -> Table:
    """Teacher, baselines and students side by side; fits 120 columns. `conditions` belongs under it."""
    rich = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for i, name in enumerate(headings(evaluations)):
        rich.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    rows = ordered(evaluations)
    for e, after in zip(rows, [*rows[1:], None], strict=True):
        last = after is None or e.role == "teacher" or (e.role == "student" and after.role != "student")
        rich.add_row(*(Text(cell) for cell in cells(e)), style="bold" if e.role == "student" else "", end_section=last)
    return rich


def conditions(evaluations: Sequence[Evaluation]) -> str:
    """What the numbers of the table were measured on."""
    e = evaluations[0]
    interval = "accuracy: Wilson; retention: paired bootstrap" if e.headline == "accuracy" else "paired bootstrap over rows"
    lower = f"Of {METRICS[e.headline].title} less is better: retention is the teacher's over the model's. " if e.better == "min" else ""
    other = "A student has other tokens than its teacher, and perplexities do not compare. " if e.headline == "bits_per_byte" else ""
    scored = f", {e.positions:,} scored positions" if e.positions > e.rows else ""
    where = list(dict.fromkeys(each.device for each in evaluations))
    on = where[0] if len(where) == 1 else ", ".join(f"{' and '.join(x.name for x in evaluations if x.device == d)} on {d}" for d in where)
    return (
        f"{e.rows:,} rows, {e.labelled:,} labelled{scored}; {on}, {e.precision}, {int(e.cost['threads'])} threads. "
        f"± is half of a 95 % interval ({interval}). {lower}{other}"
        f"FLOPs: a row of median length. ms: one row at a time."
    )


def verdicts(evaluations: Sequence[Evaluation]) -> dict[str, str]:
    """One plain sentence for each student, by its name."""
    return {e.name: _verdict(e) for e in evaluations if e.role == "student"}


def _verdict(e: Evaluation) -> str:
    speed = e.ratios["speedup"]
    pace = f"{speed:.1f}x faster" if speed >= 1.05 else "no faster" if speed > 1 / 1.05 else f"{1 / speed:.1f}x slower"
    size = f"{e.ratios['parameter_ratio']:.2f}x the parameters"
    kept = f"{e.name} {_kept(e)} at {size}, {pace}"
    if "gain" not in e.against:
        return f"{kept}; nothing was trained without distillation to compare it with."
    gain, low, high = (e.against[key] for key in ("gain", "gain_low", "gain_high"))
    same, interval = "the same student without distillation", f"95 % interval {low:.1f} to {high:.1f}"
    over, under, unit = ("points over", "points worse than", " points")
    if e.better == "min":
        name = METRICS[e.headline].title
        over, under, unit = (f"% less {name} than", f"% more {name} than", " %")
    if low > 0:
        return f"{kept}; {f'{gain:+.1f}' if e.better == 'max' else f'{gain:.1f}'} {over} {same} ({interval})."
    if high < 0:
        return f"{kept}; {-gain:.1f} {under} {same} ({gain:+.1f}, {interval})."
    return f"{kept}; no measurable gain over {same} ({gain:+.1f}{unit}, {interval})."


def _kept(e: Evaluation) -> str:
    value, retention = e.quality[e.headline], e.against["retention"]
    if e.headline == "cosine":
        return f"comes as near to the teacher's vectors as a cosine of {show('cosine', value)}"
    if e.headline == "neighbours":
        return f"finds the teacher's nearest neighbour of {_percent(value)} of the rows"
    of = f"keeps {_percent(retention)} of the teacher's {METRICS[e.headline].title}"
    if e.headline == "accuracy" or retention <= 0:
        return of
    teacher = value * retention if e.better == "min" else value / retention
    return f"{of} ({metric(e.headline, value)} against {metric(e.headline, teacher)})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


# ------------------------------------------------------------------------------------------------------------------ page

CAPTIONS = {
    "learning_curves": "Learning curves. Training losses of runs with different loss terms do not compare; validation metrics do.",
    "size_quality": "Size against quality. Hollow, a little to the left: without distillation. The arrow is what distillation brought.",
    "reliability": "Reliability. On the dotted line a model is right as often as sure. Pale: few rows; hatched: without distillation.",
    "confusion": "Confusion. Each line is a label; its cells say which answers its rows got.",
}

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --card: #f8f9fb; --ink: #1d2939; --soft: #667085; --line: #e4e7ec; --mark: #2e6fdb
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #11151c; --card: #1a202b; --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3544; --mark: #7aa7f7 }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem }
.soft, figcaption { color: var(--soft); font-size: .88rem }
.verdict { border-left: 4px solid var(--mark); background: var(--card); padding: .8rem 1.1rem; margin: .7rem 0; border-radius: 0 8px 8px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 600 }
th:first-child, td:first-child, .text td, .text th { text-align: left }
.text td { white-space: normal; vertical-align: top }
.text td:first-child { width: 60%; overflow-wrap: anywhere }
tr.student td { font-weight: 650 }
tr.student td:first-child { box-shadow: inset 3px 0 var(--mark) }
.role { color: var(--soft); font-weight: 400 }
.right { color: var(--mark); font-weight: 650 }
figure { margin: 0 0 1.8rem }
figure img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 10px }
figcaption { margin-top: .5rem }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; overflow-x: auto; font-size: .84rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem }
dt { color: var(--soft) }
dd { margin: 0; overflow-wrap: anywhere }
"""


def page(path: Path, title: str, evaluations: Sequence[Evaluation], figures: Sequence[Path], facts: Facts) -> None:
    """Write one HTML file that opens from disk without a network: pictures and style are inside, and every text is escaped."""
    rows = ordered(evaluations)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Teacher {escape(facts.teacher)}, corpus {escape(facts.corpus)}</p>',
        *(f'<p class="verdict">{escape(sentence)}</p>' for sentence in verdicts(rows).values()),
        "<h2>Teacher, baseline, student</h2>",
        _comparison(rows),
        f'<p class="soft">{escape(conditions(rows))} A baseline is the same student with the same start and the same number of steps, '
        "trained on labels alone.</p>",
        _further(rows),
        _by_label(rows),
        "<h2>Figures</h2>" if figures else "",
        *(_picture(figure) for figure in figures),
        *(_examples(e) for e in rows if e.role == "student" and e.disagreements),
        "<h2>How it was made</h2>",
        _pairs({**facts.fingerprints, **facts.versions}),
        f"<h2>Job file, as resolved</h2><pre>{escape(facts.config)}</pre>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style>'
    text = f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>\n' + "\n".join(body) + "\n</main></body></html>\n"
    path.write_text(text, encoding="utf-8")


def _comparison(rows: Sequence[Evaluation]) -> str:
    lines = []
    for e in rows:
        name, *numbers = cells(e)
        first = escape(name) + (f' <span class="role">{e.role}</span>' if e.role not in name else "")
        lines.append(f'<tr class="{e.role}"><td>{first}</td>' + "".join(f"<td>{escape(n)}</td>" for n in numbers) + "</tr>")
    return _table(headings(rows), lines)


def _table(head: Sequence[str], lines: Sequence[str]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _further(rows: Sequence[Evaluation]) -> str:
    """Every metric that the comparison leaves out, of whatever has it."""
    shown, found = {rows[0].headline, _near(rows)}, [{**e.quality, **e.against} for e in rows]
    names = [name for name in METRICS if name not in shown and any(name in each for each in found)]
    lines = [
        f'<tr class="{e.role}"><td>{escape(e.name)}</td>'
        + "".join(f"<td>{metric(n, each[n]) if n in each else ''}</td>" for n in names)
        + "</tr>"
        for e, each in zip(rows, found, strict=True)
    ]
    return f"<h2>Further metrics</h2>{_table(('model', *(METRICS[name].title for name in names)), lines)}" if names else ""


def _by_label(rows: Sequence[Evaluation]) -> str:
    """Of words: how many have each label, and recall and precision of every model, in percent."""
    if rows[0].task != "token_classification":
        return ""
    lines = []
    for i, label in enumerate(rows[0].labels):
        line_cells = [f"{sum(rows[0].confusion[i]):,}"]
        for e in rows:
            right, true, said = e.confusion[i][i], sum(e.confusion[i]), sum(line[i] for line in e.confusion)
            line_cells.append(" / ".join(f"{100 * right / of:.1f}" if of else "-" for of in (true, said)))
        lines.append(f"<tr><td>{escape(label)}</td>{''.join(f'<td>{cell}</td>' for cell in line_cells)}</tr>")
    return f"<h2>Recall / precision of each label, word by word</h2>{_table(('label', 'words', *(e.name for e in rows)), lines)}"


def _picture(figure: Path) -> str:
    caption = CAPTIONS.get(figure.stem, figure.stem)
    content = base64.b64encode(figure.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{content}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _examples(e: Evaluation) -> str:
    lines, different = [], round((1 - e.against["agreement"]) * e.rows)
    for row in e.disagreements:
        answers = (f'<td class="{"right" if answer == row.label else ""}">{escape(answer)}</td>' for answer in (row.answer, row.teacher))
        lines.append(f"<tr><td>{escape(row.text)}</td><td>{escape(row.label or 'none')}</td>{''.join(answers)}</tr>")
    return (
        f"<h2>Where {escape(e.name)} and its teacher disagree</h2>"
        f'<p class="soft">{len(lines)} of {different} such rows, drawn at random; right answers in colour.</p>'
        f'<div class="scroll"><table class="text"><thead><tr><th>text</th><th>label</th><th>student</th><th>teacher</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _pairs(pairs: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs.items()) + "</dl>"
