"""What a job file may say about a search, and what it is told where it may not: in a second, before anything starts."""

from __future__ import annotations

import pytest

from distillation.errors import ConfigError
from jobs.config import dump, load, parse, recipes
from tests.jobs.test_config import text

SEARCH = {
    "space": {"losses.soft.weight": {"uniform": [0.1, 1.0]}, "losses.soft.temperature": {"log_uniform": [1, 8]}},
    "objectives": {"validation/accuracy": "max", "cost/parameters": "min"},
    "keep": {"validation/retention": 0.97, "cost/latency_ms_p95": "<= 5"},
    "trials": 8,
}


def job(space=None, **changes):
    """Text of a job with this search."""
    return text(search={**SEARCH, **({"space": space} if space else {}), **changes})


def refused(*arguments, **changes):
    return told(job(*arguments, **changes))


def told(content):
    with pytest.raises(ConfigError) as caught:
        parse(content, [], "job.yaml")
    return str(caught.value)


def test_a_search_is_read_as_it_is_written_and_comes_back_from_its_dump():
    read = parse(job(), ["search.trials=400", "search.scheduler={type: asha, reduction: 4}"], "job.yaml")
    assert (read.search.trials, read.search.scheduler.reduction, read.search.workers_per_trial) == (400, 4, 1)
    assert [str(wish) for wish in read.search.constraints] == ["validation/retention >= 0.97", "cost/latency_ms_p95 <= 5"]
    assert (read.search.quality, read.search.size) == ("validation/accuracy", "cost/parameters")
    assert parse(dump(read), [], "dump") == read


def test_knobs_may_be_nested_and_are_changed_by_an_override():
    nested = {"losses": {"soft": {"weight": {"uniform": [0.1, 1.0]}, "temperature": {"log_uniform": [1, 8]}}}}
    assert parse(job(nested), [], "job.yaml") == parse(job(), [], "job.yaml")
    space = {"losses.soft.weight": {"uniform": [0.1, 1.0], "when": {"training.epochs": 1}}}
    knob = "search.space.losses.soft.weight"
    (narrow,) = parse(job(space), [f"{knob}.uniform=[0.2,0.3]"], "job.yaml").search.space.values()
    assert (narrow.uniform, narrow.when) == ((0.2, 0.3), {"training.epochs": 1})
    (other,) = parse(job(space), [f"{knob}.choice=[0.5]"], "job.yaml").search.space.values()
    assert (other.choice, other.when) == ((0.5,), {})
    assert parse(job(), ["search.keep.validation/retention=0.9"], "job.yaml").search.keep["validation/retention"] == 0.9


def test_the_quickstart_searches_two_coefficients_a_rate_and_three_sizes_with_16_trials():
    search = load("quickstart").search
    assert search.trials == 16
    assert len(search.space["student"].choice) == 3
    assert {"losses.soft.weight", "losses.soft.temperature", "training.learning_rate"} == set(search.space) - {"student"}
    assert "search" in recipes()["quickstart"]


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("losses.soft.wieght", "losses.soft.weight"),
        ("losses.sofd.temperature", "losses.soft.temperature"),
        ("training.learningrate", "training.learning_rate"),
        ("student.layer", "student.layers"),
    ],
)
def test_a_path_that_does_not_exist_is_refused_with_the_nearest_one(path, near):
    assert f"search.space: there is no setting {path}; the nearest is {near}" in refused({path: {"choice": [1]}})


@pytest.mark.parametrize("path", ["corpus.validation", "task.max_length", "teacher.model", "name", "cluster.workers"])
def test_what_all_trials_share_cannot_be_turned(path):
    assert f"{path} cannot be turned; trials share corpus, task and teacher" in refused({path: {"choice": [1]}})


@pytest.mark.parametrize(
    ("knob", "message"),
    [
        ({"uniform": [1, 0]}, "the first bound must be below the second, got [1.0, 0.0]"),
        ({"log_uniform": [0, 1]}, "log_uniform starts above 0, got [0.0, 1.0]"),
        ({"integer": [3, 3]}, "the first bound must be below the second, got [3, 3]"),
        ({"quantized": [0, 1, 2]}, "the step must be above 0 and at most high - low"),
        ({"choice": []}, "at least 1 item"),
        ({"normal": [0, 1]}, "a knob is one of choice: [...], uniform: [low, high]"),
        ({"choice": [1], "uniform": [0, 1]}, "a knob is one of choice"),
        ({"uniform": [0, 1], "step": 2}, 'unknown key "search.space.losses.soft.weight.step"'),
    ],
)
def test_domains(knob, message):
    assert message in refused({"losses.soft.weight": knob})


def test_knobs_that_wait_for_each_other():
    a, b = "losses.soft.weight", "losses.soft.temperature"
    said = refused({a: {"choice": [1], "when": {b: 2}}, b: {"choice": [2], "when": {a: 1}}})
    assert "knobs wait for each other" in said
    assert f"{a} waits for {b} waits for {a}" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": {"validation/bleu": "max"}}, "objectives: no stage reports validation/bleu; known are validation/accuracy"),
        ({"objectives": {"validation/accuracy": "min"}}, "objectives: validation/accuracy is better when it is maximal"),
        ({"objectives": {"cost/flops": "min"}}, "objectives: one of them must be a quality: validation/accuracy"),
        ({"keep": {"test/accuracy": 0.9}}, "keep: no stage reports test/accuracy; known are"),
        ({"keep": {"validation/accuracy": "about 0.9"}}, 'keep.validation/accuracy: write a number, "<= number" or ">= number"'),
        ({"keep": {"validation/accuracy": ".inf"}}, "keep.validation/accuracy: write a number"),
        ({"keep": {"validation/accuracy": ">= 1e999"}}, "keep.validation/accuracy: the bound must be finite"),
        (
            {"searcher": {"type": "tpe"}, "objectives": {"validation/accuracy": "max", "cost/latency_ms_p95": "min"}},
            "latency is measured when the trials are done, so it cannot guide searcher tpe; use cost/flops",
        ),
        ({"gpus_per_worker": 0.5, "workers_per_trial": 2}, "gpus_per_worker is 0, 1, or with one worker a share of one GPU, got 0.5"),
        ({"gpus_per_worker": 1.5}, "gpus_per_worker is 0, 1, or with one worker a share of one GPU, got 1.5"),
        ({"scheduler": {"type": "pbt"}, "workers_per_trial": 2}, "scheduler pbt works with workers_per_trial 1 only"),
        ({"scheduler": {"type": "pbt"}, "searcher": {"type": "tpe"}}, "scheduler pbt turns the knobs itself: use searcher {type: random}"),
        ({"scheduler": {"type": "pbt"}, "trials": 3}, "scheduler pbt needs a population: at least 4 trials, got 3"),
        ({"scheduler": {"type": "pbt"}, "concurrent": 2}, "scheduler pbt holds the whole population"),
        (
            {"scheduler": {"type": "pbt"}, "space": {"student.layers": {"choice": [[0], [0, 1]]}}},
            "a student cannot go on from the weights of another one",
        ),
        (
            {"scheduler": {"type": "asha"}, "space": {"training.epochs": {"choice": [1, 2]}}},
            "scheduler asha compares trials of one length, but training.epochs change it",
        ),
        (
            {"space": {"losses.soft.weight": {"uniform": [0, 1], "when": {"losses.soft.typ": "forward_kl"}}}},
            "search.space.losses.soft.weight.when: there is no setting losses.soft.typ; the nearest is losses.soft.type",
        ),
        ({"searcher": {"type": "grid"}}, "search.trials is 8, but the grid has more points"),
        ({"scheduler": {"type": "asha", "every": 0.1}}, 'unknown key "search.scheduler.every"'),
        ({"scheduler": {"type": "hyperband"}}, "search.scheduler"),
        ({"searcher": {"type": "bohb"}}, "search.searcher"),
        ({"budget": 0}, "search.budget"),
        ({"trials": 0}, "search.trials"),
    ],
)
def test_what_cannot_take_effect_is_refused(changes, message):
    assert message in refused(**changes)


MULTI = {
    "task": {"type": "multi_label", "max_length": 64},
    "losses": {"soft": {"type": "binary_kl"}},
}


def searching(of, **changes):
    """Text of a job of another task, which searches for what the default is if nothing else is said."""
    return text(**{"search": {"space": {"losses.soft.weight": {"uniform": [0.1, 1.0]}}, "trials": 8, **changes}, **of})


REGRESSION = {"task": {"type": "regression", "max_length": 64}, "losses": {"soft": {"type": "teacher_mse"}}}
LANGUAGE = {"task": {"type": "causal_lm", "max_length": 64}, "losses": {"soft": {"type": "forward_kl", "temperature": 1.0}}}


@pytest.mark.parametrize(
    ("of", "objectives"),
    [
        (MULTI, "multi_label reports no accuracy, by which trials are compared where nothing is said; set objectives: {validation/f1: max, "),
        (REGRESSION, "regression reports no accuracy, by which trials are compared where nothing is said; set objectives: {validation/pearson: max"),
    ],
)  # fmt: skip
def test_a_task_without_accuracy_says_what_it_searches_for(of, objectives):
    assert f"search.objectives: {objectives}" in told(searching(of))
    headline = objectives.split("{")[1].split(":")[0]
    set_to = {headline: "max", "cost/parameters": "min"}
    read = parse(searching(of, objectives=set_to, keep={"validation/retention": 0.9}), [], "job.yaml")
    assert (read.search.quality, read.search.size) == (headline, "cost/parameters")


def test_a_language_model_is_searched_by_accuracy_or_by_perplexity():
    assert parse(searching(LANGUAGE), [], "job.yaml").search.quality == "validation/accuracy"
    read = parse(searching(LANGUAGE, objectives={"validation/perplexity": "min"}, keep={"validation/perplexity": 20}), [], "job.yaml")
    assert read.search.quality == "validation/perplexity"
    assert [str(wish) for wish in read.search.constraints] == ["validation/perplexity <= 20"]


@pytest.mark.parametrize(
    ("of", "changes", "message"),
    [
        (
            {}, {"objectives": {"validation/f1": "max"}},
            "search.objectives: validation/f1 is not reported by text_classification, which reports validation/accuracy, validation/nll, "
            "validation/agreement, validation/kl_to_teacher, validation/retention",
        ),
        ({}, {"keep": {"validation/perplexity": 12}}, "search.keep: validation/perplexity is not reported by text_classification, which"),
        (
            REGRESSION, {"objectives": {"validation/pearson": "max"}, "keep": {"validation/agreement": 0.9}},
            "search.keep: validation/agreement is not reported by regression, which reports validation/pearson, validation/mse, validation/mae",
        ),
        (MULTI, {"objectives": {"validation/accuracy": "max"}}, "search.objectives: validation/accuracy is not reported by multi_label, which"),
    ],
)  # fmt: skip
def test_what_the_task_does_not_report_is_refused(of, changes, message):
    said = told(searching(of, **changes))
    assert message in said
    assert "reports no accuracy" not in said


def test_a_search_needs_a_teacher_to_learn_from():
    said = told(text(losses={"hard": {"type": "cross_entropy"}}, search={"space": {"losses.hard.weight": {"choice": [1, 2]}}}))
    assert "no loss asks the teacher, so there is nothing to search for" in said


def test_a_population_is_of_one_student():
    students = {"a": {"type": "layers", "layers": [0]}, "b": {"type": "layers", "layers": [0, 1]}}
    assert "scheduler pbt needs one student" in told(text(student=None, students=students, search={**SEARCH, "scheduler": {"type": "pbt"}}))


def test_where_the_job_has_gpus_a_search_says_what_a_trial_gets():
    assert "say which share of one a trial gets" in told(text(cluster={"gpus_per_worker": 1}, search=SEARCH))
    assert (
        parse(text(cluster={"gpus_per_worker": 1}, search={**SEARCH, "gpus_per_worker": 0.5}), [], "job.yaml").search.gpus_per_worker == 0.5
    )
