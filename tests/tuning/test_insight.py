"""Importance on made-up data where the answer is known; curves and shares against numbers worked out by hand."""

import json
import math
import random
import time
from itertools import pairwise

import pytest

from tuning.insight import importance, knobs, marginal, shares, summary
from tuning.ledger import Search, Task, Trial

METRIC = "validation/accuracy"
WEIGHT = {"losses.soft.weight": {"uniform": [0.0, 1.0]}}
RATE = {"training.learning_rate": {"log_uniform": [1e-5, 1e-2]}}
TYPE = {"losses.soft.type": {"choice": ["forward_kl", "logit_mse", "l2_distil"]}}
TEMPERATURE = {"losses.soft.temperature": {"uniform": [1.0, 9.0], "when": {"losses.soft.type": "forward_kl"}}}


def searched(space, results, metric=METRIC, **config):
    """A search whose finished trials have these points and values of the metric."""
    search = Search("reviews", {"search": {"space": space, **config}}, "f00d", {}, 0, 0)
    for point, value in results:
        add(search, point, {metric: value})
    return search


def add(search, point, metrics, state="finished", role="trial", student="L1"):
    number, cost = len(search.trials), {"cost/parameters": 10.0}
    task = Task(role, f"trial-{number}", point, student, student, str(number), cost, 100)
    search.trials.append(Trial(number, task, state, metrics=dict(metrics)))


def drawn(count, answer, noise=0.01, seed=0):
    """Points of the whole space above, drawn at random, and what `answer` says of each."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        point = {"losses.soft.weight": draw.random(), "training.learning_rate": 10 ** draw.uniform(-5, -2)}
        point["losses.soft.type"] = draw.choice(["forward_kl", "logit_mse", "l2_distil"])
        if point["losses.soft.type"] == "forward_kl":
            point["losses.soft.temperature"] = draw.uniform(1, 9)
        found.append((point, answer(point) + draw.gauss(0, noise)))
    return found


SPACE = {**WEIGHT, **RATE, **TYPE, **TEMPERATURE}

# ------------------------------------------------------------------------------------------------------------ importance


def test_the_knob_that_rules_is_found_and_noise_is_nothing():
    found = importance(searched(SPACE, drawn(60, lambda p: 1 - (p["losses.soft.weight"] - 0.6) ** 2)), METRIC)
    assert list(found) == list(SPACE)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["losses.soft.weight"] > 0.95
    assert max(found["training.learning_rate"], found["losses.soft.type"], found["losses.soft.temperature"]) < 0.03


def test_the_shares_of_two_knobs_are_as_their_variances():
    # A straight line of slope s over 0..1 has variance s^2 / 12: 4 to 1. Three decades of the rate are 0..1 in their logarithm.
    def answer(point):
        return 2 * point["losses.soft.weight"] + (math.log10(point["training.learning_rate"]) + 5) / 3

    found = importance(searched(SPACE, drawn(400, answer)), METRIC)
    assert found["losses.soft.weight"] == pytest.approx(0.8, abs=0.05)
    assert found["training.learning_rate"] == pytest.approx(0.2, abs=0.05)


def test_two_knobs_that_only_work_together_are_both_found():
    found = importance(
        searched(SPACE, drawn(300, lambda p: (p["losses.soft.weight"] > 0.5) == (p["training.learning_rate"] > 10**-3.5))), METRIC
    )
    assert found["losses.soft.weight"] == pytest.approx(0.5, abs=0.1)
    assert found["training.learning_rate"] == pytest.approx(0.5, abs=0.1)


def test_a_choice_in_the_middle_of_the_list_is_found():
    found = importance(searched(SPACE, drawn(60, lambda p: p["losses.soft.type"] == "logit_mse")), METRIC)
    assert found["losses.soft.type"] > 0.95


def test_a_knob_that_exists_only_under_a_choice_gets_no_credit_for_the_choice():
    # variances: 1/3 * 2/3 of the choice, 0.64 / 12 of the weight: 0.806 and 0.194
    found = importance(
        searched(SPACE, drawn(400, lambda p: (p["losses.soft.type"] == "forward_kl") + 0.8 * p["losses.soft.weight"])), METRIC
    )
    assert found["losses.soft.type"] == pytest.approx(0.806, abs=0.03)
    assert found["losses.soft.temperature"] < 0.01


def test_a_knob_that_exists_only_under_a_choice_is_found_where_it_matters():
    # forward_kl, a third of the trials: -1..1 by the temperature, a variance of 1/3 there and 1/9 in all; the others 1; 4/3 / 12 of the weight
    def answer(point):
        return (point.get("losses.soft.temperature", 9) - 5) / 4 + math.sqrt(4 / 3) * point["losses.soft.weight"]

    found = importance(searched(SPACE, drawn(800, answer)), METRIC)
    # The choice dealt out anew costs 1 + 1/3 for 4 of 9 trials, half of that beside the variances: 8/27, 3/27, 3/27
    assert found["losses.soft.type"] == pytest.approx(8 / 14, abs=0.04)
    assert found["losses.soft.temperature"] == pytest.approx(3 / 14, abs=0.04)
    assert found["losses.soft.weight"] == pytest.approx(3 / 14, abs=0.04)


def test_a_logarithmic_knob_counts_in_logarithms():
    results = drawn(20, lambda p: math.log10(p["training.learning_rate"]))
    logarithms = [({**p, "training.learning_rate": math.log(p["training.learning_rate"])}, value) for p, value in results]
    linear = {**SPACE, "training.learning_rate": {"uniform": [-12.0, -4.0]}}
    assert importance(searched(SPACE, results), METRIC) == importance(searched(linear, logarithms), METRIC)


def test_choices_among_sub_objects_and_none():
    students = [{"type": "layers", "layers": [0]}, {"type": "layers", "layers": [0, 5]}]
    space = {"student": {"choice": students}, "training.dropout": {"choice": [None, 0.1]}}
    draw = random.Random(0)
    points = [{"student": draw.choice(students), "training.dropout": draw.choice([None, 0.1])} for _ in range(40)]
    found = importance(searched(space, [(p, p["training.dropout"] is None) for p in points]), METRIC)
    assert found == {"student": 0.0, "training.dropout": 1.0}
    found = importance(searched(space, [(p, len(p["student"]["layers"])) for p in points]), METRIC)
    assert found == {"student": 1.0, "training.dropout": 0.0}


def test_nothing_matters():
    assert importance(searched(SPACE, drawn(40, lambda _: 0.1 + 0.2, noise=0)), METRIC) == dict.fromkeys(SPACE, 0.0)
    assert importance(searched(SPACE, drawn(40, lambda _: 0.0, noise=0)), METRIC) == dict.fromkeys(SPACE, 0.0)
    for seed in range(5):
        assert importance(searched(SPACE, drawn(200, lambda _: 0.0, noise=1.0, seed=seed)), METRIC) == dict.fromkeys(SPACE, 0.0)
    taken_in = [
        seed for seed in range(30) if any(importance(searched(SPACE, drawn(12, lambda _: 0.0, noise=1.0, seed=seed)), METRIC).values())
    ]
    assert len(taken_in) <= 2


def test_too_few_trials_say_nothing():
    results = drawn(8, lambda p: p["losses.soft.weight"])
    assert importance(searched(SPACE, results[:7]), METRIC) == {}
    assert set(importance(searched(SPACE, results), METRIC)) == set(SPACE)
    search = searched(SPACE, results[:7])
    add(search, results[7][0], {METRIC: 0.5}, state="stopped")
    add(search, results[7][0], {METRIC: 0.5}, role="refit")
    add(search, results[7][0], {"validation/nll": 0.5})
    assert importance(search, METRIC) == {}


def test_no_share_is_negative_even_of_few_trials():
    found = [importance(searched(SPACE, drawn(16, lambda p: p["losses.soft.weight"], seed=seed)), METRIC) for seed in range(10)]
    assert min(share for shares in found for share in shares.values()) == 0.0
    assert max(sum(shares.values()) for shares in found) == pytest.approx(1.0)


def test_the_same_ledger_gives_the_same_shares():
    search = searched(SPACE, drawn(30, lambda p: p["losses.soft.weight"] + p["training.learning_rate"] * 30, noise=0.1))
    assert importance(search, METRIC) == importance(search, METRIC)


def test_a_choice_among_students_that_the_space_does_not_name_is_a_knob():
    search = searched(WEIGHT, [])
    for i in range(20):
        layers = [0] if i % 2 else [0, 5]
        add(search, {"student": {"layers": layers}, "losses.soft.weight": i / 20}, {METRIC: float(len(layers))}, student=f"L{len(layers)}")
    assert list(knobs(search)) == ["student", "losses.soft.weight"]
    assert importance(search, METRIC) == {"student": 1.0, "losses.soft.weight": 0.0}
    assert [(bin["label"], bin["value"], bin["mean"]) for bin in marginal(search, "student", METRIC)] == [
        ("L2", {"layers": [0, 5]}, 2.0),
        ("L1", {"layers": [0]}, 1.0),
    ]


# -------------------------------------------------------------------------------------------------------------- marginals


def test_a_number_with_few_values_has_a_point_for_each():
    space = {"training.epochs": {"integer": [1, 8]}}
    search = searched(space, [({"training.epochs": n}, value) for n, value in [(4, 0.5), (2, 0.1), (4, 0.7), (2, 0.3), (2, 0.2), (8, 0.9)]])
    half = 4.302653 * 0.1 / math.sqrt(3)  # Student's t with 2 degrees of freedom, standard deviation 0.1
    assert marginal(search, "training.epochs", METRIC) == [
        {"value": 2, "from": 2, "to": 2, "mean": pytest.approx(0.2), "low": pytest.approx(0.2 - half), "high": pytest.approx(0.2 + half), "count": 3},
        {"value": 4, "from": 4, "to": 4, "mean": pytest.approx(0.6), "low": pytest.approx(0.6 - 1.270620), "high": pytest.approx(0.6 + 1.270620),
         "count": 2},
        {"value": 8, "from": 8, "to": 8, "mean": 0.9, "low": None, "high": None, "count": 1},
    ]  # fmt: skip


def test_a_number_with_many_values_is_binned_evenly():
    search = searched(WEIGHT, [({"losses.soft.weight": i / 100}, float(i)) for i in reversed(range(80))])
    bins = marginal(search, "losses.soft.weight", METRIC)
    assert [bin["count"] for bin in bins] == [10] * 8
    assert [bin["mean"] for bin in bins] == [4.5 + 10 * k for k in range(8)]
    assert (bins[1]["from"], bins[1]["value"], bins[1]["to"]) == (0.1, pytest.approx(0.145), 0.19)
    few = searched(WEIGHT, [({"losses.soft.weight": i / 100}, float(i)) for i in range(9)])
    assert [(bin["from"], bin["to"], bin["count"]) for bin in marginal(few, "losses.soft.weight", METRIC)] == [
        (0, 0.03, 4),
        (0.04, 0.08, 5),
    ]
    assert [bin["count"] for bin in marginal(searched(WEIGHT, [({"losses.soft.weight": 0.5}, 1.0)]), "losses.soft.weight", METRIC)] == [1]


@pytest.mark.parametrize(("values", "each", "bins"), [(8, 2, 8), (5, 1, 1), (9, 2, 4), (9, 9, 8)])
def test_a_number_has_no_more_points_than_its_trials_can_bear(values, each, bins):
    search = searched(WEIGHT, [({"losses.soft.weight": i / 10}, 0.0) for i in range(values) for _ in range(each)])
    assert len(marginal(search, "losses.soft.weight", METRIC)) == bins


def test_equal_numbers_are_never_torn_apart():
    # 20 times 0.5 among 20 others: most edges of the quantiles fall on it
    values = [0.5] * 20 + [i / 20 for i in range(20)]
    bins = marginal(searched(WEIGHT, [({"losses.soft.weight": v}, 0.0) for v in values]), "losses.soft.weight", METRIC)
    assert sum(bin["count"] for bin in bins) == 40
    assert all(before["to"] < after["from"] for before, after in pairwise(bins))


def test_a_choice_has_a_point_for_each_option_in_the_order_of_the_file():
    results = [("l2_distil", 0.4), ("forward_kl", 0.7), ("l2_distil", 0.6), ("forward_kl", 0.7)]
    search = searched(TYPE, [({"losses.soft.type": kind}, value) for kind, value in results])
    first, second = marginal(search, "losses.soft.type", METRIC)
    assert first == {"value": "forward_kl", "label": "forward_kl", "mean": 0.7, "low": 0.7, "high": 0.7, "count": 2}
    assert (second["label"], second["mean"], second["count"]) == ("l2_distil", pytest.approx(0.5), 2)


def test_only_trials_that_have_the_knob_and_the_metric_count():
    search = searched({**TYPE, **TEMPERATURE}, [({"losses.soft.type": "logit_mse"}, 0.5)])
    add(search, {"losses.soft.type": "forward_kl", "losses.soft.temperature": 2.0}, {"validation/nll": 0.5})
    assert marginal(search, "losses.soft.temperature", METRIC) == []
    assert [bin["label"] for bin in marginal(search, "losses.soft.type", METRIC)] == ["logit_mse"]
    assert [bin["mean"] for bin in marginal(search, "losses.soft.temperature", "validation/nll")] == [0.5]


# ------------------------------------------------------------------------------------------------------------- loss terms


def test_shares_by_hand():
    trial = searched(WEIGHT, [({"losses.soft.weight": 0.5}, 0.5)]).trials[0]
    trial.add(1, {"train/loss": 9.0, "train/loss/hard": 2.0, "train/weighted/hard": 1.0, "train/gradient/hard": 3.0, "train/gradient_norm": 9.0,
                  "train/loss/soft": 4.0, "train/weighted/soft": 2.0, "train/gradient/soft": 1.0})  # fmt: skip
    trial.add(2, {"train/loss/hard": 1.0, "train/weighted/hard": 0.5, "train/loss/soft": 8.0, "train/weighted/soft": 4.0})
    trial.add(2, {METRIC: 0.5})
    assert shares(trial) == {
        "hard": {"raw": 1.5, "weighted": 0.75, "gradient": 3.0, "weighted_share": 0.2, "gradient_share": 0.75},
        "soft": {"raw": 6.0, "weighted": 3.0, "gradient": 1.0, "weighted_share": 0.8, "gradient_share": 0.25},
    }


def test_shares_without_gradients_or_of_a_loss_that_is_zero():
    trial = searched(WEIGHT, [({"losses.soft.weight": 0.5}, 0.5)]).trials[0]
    assert shares(trial) == {}
    trial.add(1, {"train/loss/hard": 2.0, "train/weighted/hard": 0.0})
    assert shares(trial) == {"hard": {"raw": 2.0, "weighted": 0.0, "weighted_share": 0.0}}


# ---------------------------------------------------------------------------------------------------------------- summary


def test_the_summary_holds_all_of_it():
    search = searched(SPACE, drawn(20, lambda p: p["losses.soft.weight"]), keep={"validation/retention": 0.9, "cost/parameters": 99})
    best = max(search.trials, key=lambda trial: trial.metrics[METRIC])
    for trial in search.trials:
        trial.add(1, {"train/loss/soft": 2.0, "train/weighted/soft": 1.0})
    found = summary(search)
    assert found["importance"] == {METRIC: importance(search, METRIC), "validation/retention": {}}
    assert found["marginals"].keys() == SPACE.keys()
    assert found["marginals"]["losses.soft.weight"] == {METRIC: marginal(search, "losses.soft.weight", METRIC), "validation/retention": []}
    assert found["shares"] == {best.number: {"soft": {"raw": 2.0, "weighted": 1.0, "weighted_share": 1.0}}}
    assert json.loads(json.dumps(found, allow_nan=False))["shares"].keys() == {str(best.number)}


def test_the_summary_of_a_search_that_has_only_begun():
    search = searched(SPACE, [], keep={"validation/retention": 0.9})
    assert summary(search) == {
        "importance": {METRIC: {}, "validation/retention": {}},
        "marginals": {path: {METRIC: [], "validation/retention": []} for path in SPACE},
        "shares": {},
    }


def test_the_summary_of_1000_trials_takes_less_than_5_seconds():
    search = searched({**SPACE, "a.b": {"uniform": [0, 1]}, "a.c": {"integer": [0, 9]}}, [], keep={"validation/retention": 0.9})
    draw = random.Random(1)
    for point, value in drawn(1000, lambda p: p["losses.soft.weight"]):
        point |= {"a.b": draw.random(), "a.c": draw.randrange(10)}
        add(search, point, {METRIC: value + draw.gauss(0, 0.1), "validation/retention": value + draw.gauss(0, 0.1)})
    start = time.process_time()
    found = summary(search)["importance"]
    assert time.process_time() - start < 5
    assert all(shares["losses.soft.weight"] > 0.95 for shares in found.values())
    assert len(found) == 2
