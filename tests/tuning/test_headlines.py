"""Searches of other tasks than classification: which way is better, what is kept of a teacher, what is gained, and what people read."""

from __future__ import annotations

import re
from html import unescape

import pytest

from distillation.metrics import REPORTED
from distillation.tasks import TASKS
from tests.tuning.searches import by_hand, decided, in_words
from tuning import insight, views
from tuning.config import METRICS, QUALITY, RATIOS, SHARES, reported, retention
from tuning.drawing import bounds, charts
from tuning.pareto import choose, decide, gain
from tuning.report import page
from tuning.wording import LABELS, gain_text, misses, of_teacher, on_test_split, sentence_of, shown

WORDS = {"objectives": {"validation/perplexity": "min", "cost/parameters": "min"}}

# -------------------------------------------------------------------------------------------------------------- the names


def test_every_metric_of_a_task_can_be_searched_for_and_has_a_name():
    assert {name for kind in REPORTED for name in reported(kind)} == set(QUALITY)
    assert set(LABELS) == set(METRICS)
    assert set(QUALITY) >= SHARES | RATIOS
    assert len(set(LABELS.values())) == len(LABELS)


@pytest.mark.parametrize("kind", TASKS)
def test_the_headline_is_better_in_the_direction_of_its_task(kind):
    assert reported(kind)[0] == f"validation/{TASKS[kind].headline}"
    assert QUALITY[reported(kind)[0]] == TASKS[kind].better
    assert reported(kind)[-1] == "validation/retention"


def test_a_search_knows_the_headline_of_its_task():
    search = by_hand()
    assert search.headline == "validation/accuracy"
    assert in_words(search).headline == "validation/perplexity"
    assert views.leaderboard_json(search, decide(search))["headline"] == "validation/perplexity"


# -------------------------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize(
    ("headline", "value", "teacher", "kept"),
    [
        ("validation/accuracy", 0.72, 0.9, 0.8),
        ("validation/f1", 0.3, 0.6, 0.5),
        ("validation/perplexity", 12.5, 10.0, 0.8),
        ("validation/perplexity", 8.0, 10.0, 1.25),
        ("validation/pearson", -0.2, 0.8, -0.25),
        ("validation/pearson", 0.5, -0.1, None),  # a teacher that is worse than none
        ("validation/accuracy", 0.5, 0.0, None),
        ("validation/accuracy", 0.5, None, None),
        ("validation/perplexity", 0.0, 10.0, None),
    ],
)
def test_retention_by_hand(headline, value, teacher, kept):
    assert retention(headline, value, teacher) == (None if kept is None else pytest.approx(kept))


# --------------------------------------------------------------------------------------------------------------- decision


def words(*trials, **search):
    """A search by hand of (name, perplexity, parameters): perplexity is 5.904 over the accuracy that is asked for."""
    return in_words(
        by_hand(*[(name, "finished", 8 * 0.738 / ppl, size, 100) for name, ppl, size in trials], **{**WORDS, "keep": {}, **search})
    )


def test_a_lower_perplexity_is_on_the_front_ranks_first_and_keeps_a_bound_from_below():
    search = words(("a", 20.0, 1e6), ("b", 12.0, 2e6), ("c", 13.0, 2e6), ("d", 10.0, 4e6), keep={"validation/perplexity": 13})
    decision = decide(search)
    names = [trial.task.name for trial in search.trials]
    assert [names[n] for n in decision.front] == ["a", "b", "d"]
    assert [names[n] for n in decision.feasible] == ["b", "c", "d"]
    assert [names[n] for n in decision.finalists] == ["b", "c"]  # the smallest, of one size the better
    # worst 20 and 4e6, ranges 10 and 3e6: the reference is (21, 4.3e6)
    assert decision.reference == pytest.approx({"validation/perplexity": 21.0, "cost/parameters": 4.3e6})
    assert decision.hypervolume == pytest.approx(1 * 1e6 + 9 * 2e6 + 11 * 0.3e6)
    assert [trial.task.name for trial in views.ranked(search, decision)] == ["d", "b", "c", "a"]
    assert misses(search, search.trials[0]) == ["perplexity 20.00 instead of ≤ 13.00"]
    assert "best perplexity 10.00 d" in views.status(search, decision, search.updated)


def test_the_nearest_to_what_must_be_kept_is_the_lowest_perplexity():
    search = words(("a", 20.0, 1e6), ("b", 12.0, 2e6), keep={"validation/retention": 0.8})
    decision = decide(search)
    assert decision.feasible == []
    assert decision.nearest == [1, 0]  # 8 / 12 and 8 / 20 of what the teacher has
    assert misses(search, search.trials[1]) == ["retention 66.7 % instead of ≥ 80.0 %"]


def confirmed(search, *trainings):
    """(name, role, seed, perplexity) of trainings of trial 0."""
    for name, role, seed, ppl in trainings:
        trial = by_hand((name, "finished", 8 * 0.738 / ppl, 1e6, 100)).trials[0]
        trial.number = len(search.trials)
        trial.task = trial.task._replace(role=role, of=0, seed=seed, student="a", student_key="key-a")
        search.trials.append(trial)
    return in_words(search)


def test_the_choice_ships_the_seed_of_the_lowest_perplexity_and_says_what_was_gained():
    search = words(("a", 12.0, 1e6), keep={"validation/perplexity": 13})
    confirmed(
        search, ("r1", "refit", 1, 12.0), ("r2", "refit", 2, 11.0), ("r3", "refit", 3, 13.0),
        ("b1", "refit-baseline", 1, 16.0), ("b2", "refit-baseline", 2, 22.0),
    )  # fmt: skip
    choice = choose(search, decide(search))
    (finalist,) = choice["finalists"]
    assert (choice["kept"], choice["seed"]) == (True, 2)
    # mean 12, standard deviation 1: half of the interval is 4.30265 / sqrt(3)
    over = finalist["quality"]["validation/perplexity"]
    assert (over["mean"], over["low"], over["high"]) == pytest.approx((12, 12 - 2.48414, 12 + 2.48414), abs=1e-4)
    # by seed: 1 - 12/16 and 1 - 11/22
    assert finalist["gain"]["metric"] == "validation/perplexity"
    assert finalist["gain"]["mean"] == pytest.approx(0.375)
    assert finalist["gain"]["low"] == pytest.approx(0.375 - 12.7062 * 0.125, abs=1e-4)
    assert choice["reason"].startswith("a: the smallest of 1 size that keeps validation/perplexity <= 13: 12 (9.516 to 14.48) over 3 seeds")


def test_a_mean_above_the_bound_does_not_keep_it():
    search = words(("a", 12.0, 1e6), keep={"validation/perplexity": 13})
    confirmed(search, ("r1", "refit", 1, 13.0), ("r2", "refit", 2, 14.0))
    choice = choose(search, decide(search))
    assert choice["kept"] is False
    assert "nearest of 1 finalist" in choice["reason"]


def test_gains_by_hand():
    assert gain("validation/perplexity", []) is None
    assert gain("validation/perplexity", [(9.0, 10.0)]) == {"mean": pytest.approx(0.1), "low": None, "high": None, "count": 1, "p": None}
    assert gain("validation/f1", [(0.75, 0.5)])["mean"] == 0.25
    assert gain("validation/bits_per_byte", [(0.75, 1.0)])["mean"] == 0.25  # lower is better
    assert gain("validation/mse", [(1.0, 1.0), (2.0, 2.0)])["p"] == 1.0


def test_knobs_are_told_by_a_metric_that_falls():
    search = words(*[("a", 10.0 + i, 1e6) for i in range(12)])
    for i, trial in enumerate(search.trials):
        trial.task = trial.task._replace(point={"losses.soft.weight": i / 12})
    found = insight.summary(search)
    assert list(found["importance"]) == ["validation/perplexity"]
    assert found["importance"]["validation/perplexity"]["losses.soft.weight"] == pytest.approx(1.0)
    bins = found["marginals"]["losses.soft.weight"]["validation/perplexity"]
    assert [one["mean"] for one in bins] == sorted(one["mean"] for one in bins)


# ---------------------------------------------------------------------------------------------------------------- wording


def test_shares_are_percent_and_nothing_else_is():
    values = {
        "validation/f1": "81.2 %", "validation/exact_match": "81.2 %", "validation/pearson": "0.812", "validation/cosine": "0.812",
        "validation/mse": "0.812", "validation/bits_per_byte": "0.812", "validation/perplexity": "0.81",
    }  # fmt: skip
    assert {name: shown(name, 0.8123) for name in values} == values
    assert [shown("validation/perplexity", value) for value in (12.345, 123.45, 12345.6)] == ["12.35", "123.5", "12,346"]


def test_a_gain_is_in_points_in_percent_or_in_its_own_unit():
    found = {"mean": 0.0425, "low": -0.005, "high": 0.09, "p": 0.04}
    assert gain_text(found, "validation/f1") == ("+4.2 points", "-0.5 to +9.0, p 0.04")
    assert gain_text(found, "validation/perplexity") == ("+4.2 %", "-0.5 to +9.0, p 0.04")
    assert gain_text(found, "validation/pearson") == ("+0.043", "-0.005 to +0.090, p 0.04")


def test_of_a_perplexity_quality_is_kept():
    assert of_teacher("validation/accuracy") == "the teacher's accuracy"
    assert of_teacher("validation/f1") == "the teacher's F1"
    assert of_teacher("validation/perplexity") == "the teacher's quality in perplexity"


def test_a_bound_on_retention_is_one_on_perplexity_from_above():
    (found,) = bounds(words(keep={"validation/retention": 0.8}))
    assert found == {"axis": "quality", "above": False, "at": pytest.approx(10.0), "label": "retention ≥ 80.0 %"}
    (found,) = bounds(words(keep={"validation/perplexity": 9}))
    assert found == {"axis": "quality", "above": False, "at": 9.0, "label": "perplexity ≤ 9.00"}


# ------------------------------------------------------------------------------------------------------------ to the end


def spoken(**options):
    return decided(24, then=in_words, **{**WORDS, "keep": {"validation/retention": 0.95}, **options})


def test_the_test_split_is_told_in_perplexity():
    search = spoken()
    one = next(one for one in on_test_split(search) if one.shipped)
    seeds = [e["quality"]["perplexity"] for e in search.evaluations if e["name"] in {search.trials[n].task.name for n in _refits(search)}]
    assert one.headline == "validation/perplexity"
    assert one.quality["perplexity"]["mean"] == pytest.approx(sum(seeds) / 3)
    assert "accuracy" not in one.quality
    said = sentence_of(one)
    assert re.match(r"On the test split, mean of 3 seeds: perplexity \d\.\d\d \(\d\.\d\d to \d\.\d\d\), \d+\.\d % \(", said)
    assert " of the teacher's quality; +" in said
    assert re.search(r"; \+\d\.\d % \(", said)
    assert "points" not in said


def _refits(search):
    return next(one["refits"] for one in search.choice["finalists"] if one["trial"] == search.choice["trial"])


def test_the_page_speaks_of_perplexity():
    search = spoken()
    decision = decide(search)
    html = unescape(page(search, decision, insight.summary(search), links={}, versions={}))
    assert "<h2>Parameters against perplexity</h2>" in html
    assert re.search(r"keeps \d+\.\d % of the teacher's quality in perplexity on the test split at 0\.\d\dx the parameters", html)
    finalists = html[html.index("<h2>Finalists") : html.index("<h2>Leaderboard")]
    assert re.findall(r"<th class=\"\w+\">(.*?)</th>", finalists)[:6] == [
        "", "perplexity", "retention", "agreement", "without distillation", "gain",
    ]  # fmt: skip
    exported = finalists[finalists.index("test, the exported model") :]
    assert "<td>+4.2 %<small>-0.5 to +9.0</small></td>" in exported[: exported.index("</tr>")]
    assert "over rows (paired bootstrap)" in finalists
    assert "accuracy" not in finalists
    assert "points" not in finalists.split("<h3>")[0]
    drawn = charts(search, decision, {})
    assert drawn["quality"] == {"label": "perplexity", "format": "number", "up": False}
    assert drawn["teacher"] == 8.0


def test_a_search_whose_teacher_is_not_known_keeps_silent_about_retention():
    search = spoken()
    for one in search.evaluations:
        one["against"].pop("retention", None)
    for finalist in search.choice["finalists"]:
        finalist["values"].pop("validation/retention", None)
    one = next(one for one in on_test_split(search) if one.shipped)
    assert "of the teacher" not in sentence_of(one)
    html = page(search, decide(search), insight.summary(search), links={}, versions={})
    assert "parameters.</strong>" in html


def test_the_page_names_the_first_of_several_teachers():
    search = spoken()
    search.job["teacher"], search.job["teachers"] = None, {"large": {"model": "some/large"}, "other": {"model": "some/other"}}
    assert "the teacher some/large" in page(search, decide(search), {}, links={}, versions={})
