"""Fronts, volumes, knees, decisions and choices against numbers worked out by hand."""

import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillation.errors import InputError
from tests.tuning.searches import by_hand
from tuning.ledger import Search, Task, Trial
from tuning.pareto import choose, decide, hypervolume, interval, knee, non_dominated, paired_p

UP, DOWN = True, False

# -------------------------------------------------------------------------------------------------------------- geometry


def test_the_front_by_hand():
    # more accuracy, fewer parameters
    points = [(0.90, 30), (0.80, 10), (0.85, 30), (0.80, 20), (0.95, 60), (0.70, 10), (0.85, 20)]
    assert non_dominated(points, (UP, DOWN)) == [0, 1, 4, 6]
    assert non_dominated(points, (DOWN, UP)) == [2, 3, 4, 5]  # the other way round: least accuracy, most parameters
    assert non_dominated(points, (UP, UP)) == [4]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_of_equal_points_the_first_stays(width):
    points = [(1.0,) * width, (2.0,) * width, (2.0,) * width]
    assert non_dominated(points, (UP,) * width) == [1]
    assert non_dominated(points[1:], (DOWN,) * width) == [0]
    assert non_dominated([], (UP,) * width) == []


def test_three_objectives_by_hand():
    points = [(1, 1, 3), (1, 3, 1), (3, 1, 1), (2, 2, 2), (1, 2, 2), (2, 2, 1), (2, 2, 2)]
    assert non_dominated(points, (UP, UP, UP)) == [0, 1, 2, 3]
    assert non_dominated(points, (UP, UP, DOWN)) == [1, 2, 5]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_the_front_is_what_the_definition_says(width):
    draw = random.Random(width)
    points = [tuple(draw.randrange(6) for _ in range(width)) for _ in range(60)]
    maximise = tuple(draw.random() < 0.5 for _ in range(width))

    def beats(a, b):
        signs = [1 if up else -1 for up in maximise]
        return all(s * x >= s * y for s, x, y in zip(signs, a, b, strict=True)) and a != b

    expected = [i for i, p in enumerate(points) if not any(beats(q, p) for q in points) and p not in points[:i]]
    assert non_dominated(points, maximise) == expected


def test_the_front_of_2000_trials_takes_no_time():
    draw = random.Random(0)
    cloud = [(draw.random(), draw.random()) for _ in range(2000)]
    all_on_it = [(i, i) for i in range(2000)]
    start = time.process_time()
    assert len(non_dominated(cloud, (UP, DOWN))) < 50
    assert len(non_dominated(all_on_it, (UP, DOWN))) == 2000
    assert time.process_time() - start < 0.3


def test_hypervolume_of_two_objectives_by_hand():
    # steps of a staircase over (0, 0): 1 x 3, then 1 x 2, then 1 x 1
    assert hypervolume([(1, 3), (2, 2), (3, 1)], (UP, UP), (0, 0)) == 6.0
    assert hypervolume([(1, 3), (2, 2), (3, 1), (1, 1), (2, 2)], (UP, UP), (0, 0)) == 6.0  # dominated and equal ones add nothing
    assert hypervolume([(0.9, 30), (0.8, 10)], (UP, DOWN), (0.5, 40)) == pytest.approx(0.4 * 10 + 0.3 * 20)
    assert hypervolume([(1, 1), (5, -1), (0, 9)], (UP, UP), (0, 0)) == 1.0  # on or beyond the reference: nothing
    assert hypervolume([], (UP, UP), (0, 0)) == 0.0
    assert hypervolume([(3,), (5,)], (DOWN,), (7,)) == 4.0


def test_hypervolume_of_three_objectives_by_hand():
    assert hypervolume([(2, 3, 4)], (UP, UP, UP), (0, 0, 0)) == 24.0
    # two boxes 1 x 2 x 3 and 3 x 2 x 1 share 1 x 2 x 1
    assert hypervolume([(1, 2, 3), (3, 2, 1)], (UP, UP, UP), (0, 0, 0)) == 6 + 6 - 2
    # 3 + 3 + 3 less the three pairs, which share the unit cube, plus that cube
    assert hypervolume([(1, 1, 3), (1, 3, 1), (3, 1, 1)], (UP, UP, UP), (0, 0, 0)) == 9 - 3 + 1
    assert hypervolume([(1, -1, 3), (1, -3, 1), (3, -1, 1)], (UP, DOWN, UP), (0, 0, 0)) == 7.0
    assert hypervolume([(1, 1, 1, 2), (1, 1, 2, 1)], (UP,) * 4, (0, 0, 0, 0)) == 3.0


def test_hypervolume_agrees_with_counting_cells():
    draw = random.Random(1)
    points = [tuple(draw.randrange(7) for _ in range(3)) for _ in range(12)]
    cells = sum(any(x < p[0] and y < p[1] and z < p[2] for p in points) for x in range(7) for y in range(7) for z in range(7))
    assert hypervolume(points, (UP, UP, UP), (0, 0, 0)) == cells > 50


def test_hypervolume_of_five_objectives_is_quick():
    draw = random.Random(2)
    points = [tuple(draw.random() for _ in range(5)) for _ in range(200)]
    front = [points[i] for i in non_dominated(points, (UP,) * 5)]
    assert len(front) > 50
    start = time.process_time()
    found = hypervolume(front, (UP,) * 5, (0,) * 5)
    assert time.process_time() - start < 1
    corners = [tuple(draw.random() for _ in range(5)) for _ in range(4000)]
    assert found == pytest.approx(sum(any(all(map(float.__le__, c, p)) for p in front) for c in corners) / 4000, abs=0.03)


def test_the_knee_by_hand():
    # scaled: (0, 1), (1/2, 9/10), (4/5, 1/2), (1, 0): sums 1, 1.4, 1.3, 1
    points = [(0.50, 100), (0.75, 190), (0.90, 550), (1.00, 1000)]
    assert knee(points, (UP, DOWN)) == 1
    assert knee(points[::-1], (UP, DOWN)) == 2
    assert knee([(0.6, 5000), *points], (UP, DOWN)) == 2  # what is dominated moves no end


def test_the_knee_of_a_hollow_front_is_an_end():
    # (1/4, 1/4) lies on the wrong side of the line between (0, 1) and (1, 0)
    assert knee([(0.25, 75), (1.0, 100), (0.0, 0)], (UP, DOWN)) == 1
    assert knee([(0.0, 0), (1.0, 100), (0.25, 75)], (UP, DOWN)) == 0


def test_the_knee_of_hardly_any_points():
    assert knee([], (UP, DOWN)) is None
    assert knee([(1, 2)], (UP, DOWN)) == 0
    assert knee([(1, 9), (1, 2), (1, 2)], (UP, DOWN)) == 1
    assert knee([(3, 30), (1, 10)], (UP, DOWN)) == 0
    assert knee([(0.7, 7), (0.8, 8), (0.9, 9)], (UP, DOWN)) == 0  # a straight line, but for rounding
    assert knee([(3,), (1,), (2,)], (DOWN,)) == 1


def test_the_knee_of_three_objectives_is_nearest_to_the_ideal():
    # squared distances to (1, 1, 1): 2, 2, 2, 3/4
    assert knee([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5)], (UP, UP, UP)) == 3
    assert knee([(1, 0, 7), (0, 1, 7), (0.6, 0.5, 7)], (UP, UP, DOWN)) == 2  # an objective that is the same everywhere


# -------------------------------------------------------------------------------------------------------------- decision


def searched(*trials, **config):
    """A search of trials (student, metrics, more fields of Trial and Task). A student's key is its label, and its cost is in COST."""
    settings = {"space": {"training.learning_rate": {"uniform": [0, 1]}}, **config}
    search = Search("reviews", {"search": settings}, "f00d", {"validation/accuracy": 0.9}, 0, 0)
    for student, metrics, more in trials:
        task = Task(
            role=more.get("role", "trial"), name=f"{student}-{len(search.trials)}", point={"training.learning_rate": 0.5}, student=student,
            student_key=f"key-{student}", fingerprint=str(len(search.trials)), cost={"cost/parameters": COST[student]}, rows=100,
            of=more.get("of"), seed=more.get("seed", 0),
        )  # fmt: skip
        state, cause = more.get("state", "finished"), more.get("cause", "")
        search.trials.append(
            Trial(len(search.trials), task, state, metrics={f"validation/{k}": v for k, v in metrics.items()}, cause=cause)
        )
    return search


COST = {"L1": 10, "L1b": 10, "L2": 20, "L4": 40}


def trial(student, accuracy, **more):
    return student, {"accuracy": accuracy}, more


def test_the_decision_by_hand():
    search = searched(
        trial("L4", 0.90), trial("L2", 0.84), trial("L1", 0.70), trial("L2", 0.86), trial("L1", 0.80), trial("L4", 0.90),
        trial("L1", 0.99, state="stopped"), trial("L1", 0.99, role="baseline"), trial("L1", 0.99, role="refit", of=0),
        keep={"validation/accuracy": 0.84},
    )  # fmt: skip
    decision = decide(search)
    assert decision.front == [4, 3, 0]
    assert decision.knee == 3  # scaled sums: 1; 0.6 + 20/30; 1
    assert decision.feasible == [3, 1, 0, 5]
    assert decision.nearest == []
    assert decision.finalists == [3, 0]  # the best L2, then the first of two equal L4
    # worst values 0.70 and 40; ranges 0.20 and 30: the reference is (0.68, 43)
    assert decision.reference == pytest.approx({"validation/accuracy": 0.68, "cost/parameters": 43})
    assert decision.hypervolume == pytest.approx(0.22 * 3 + 0.18 * 20 + 0.12 * 10)
    assert decision.why.startswith("4 of 6 finished trials keep validation/accuracy >= 0.84")


def test_finalists_are_different_students_and_no_more_than_asked_for():
    trials = [trial("L4", 0.9), trial("L2", 0.9), trial("L1", 0.88), trial("L1b", 0.89)]
    assert decide(searched(*trials, keep={"validation/accuracy": 0.85}, finalists=9)).finalists == [3, 2, 1, 0]
    assert decide(searched(*trials, keep={"validation/accuracy": 0.85}, finalists=1)).finalists == [3]


def test_none_feasible_names_the_nearest():
    # bounds 0.8 and 20: L4 misses 0 + 1, L2 0.1 + 0, L1 0.2 + 0 and 0.1 + 0
    search = searched(
        trial("L4", 0.90), trial("L2", 0.72), trial("L1", 0.64), trial("L1", 0.72),
        keep={"validation/accuracy": 0.8, "cost/parameters": "<= 20"}, finalists=3,
    )  # fmt: skip
    decision = decide(search)
    assert decision.feasible == []
    assert decision.nearest == [3, 1, 2, 0]  # of equals the smallest
    assert decision.finalists == [3, 1, 0]
    assert decision.why.startswith("None of 4 finished trials keeps validation/accuracy >= 0.8 and cost/parameters <= 20")


def test_what_was_not_measured_is_not_kept():
    search = searched(trial("L4", 0.9), trial("L2", 0.9), trial("L1", 0.9), keep={"cost/latency_ms_p95": 5.0})
    search.latencies = {"key-L4": {"cost/latency_ms_p95": 9.0}, "key-L2": {"cost/latency_ms_p95": 5.0}}
    assert decide(search).feasible == [1]
    search.latencies["key-L2"] = {"cost/latency_ms_p95": 5.5}
    assert decide(search).nearest == [1, 0, 2]
    search.latencies = {}
    assert decide(search).nearest == [2, 1, 0]


def test_a_trial_without_an_objective_is_left_out():
    search = searched(trial("L4", 0.9), trial("L1", 0.9), objectives={"validation/accuracy": "max", "cost/latency_ms_p50": "min"})
    search.latencies = {"key-L4": {"cost/latency_ms_p50": 9.0}}
    decision = decide(search)
    assert (decision.front, decision.knee, decision.feasible, decision.finalists) == ([0], 0, [0], [0])
    # one value each: a tenth of it beyond
    assert decision.reference == pytest.approx({"validation/accuracy": 0.81, "cost/latency_ms_p50": 9.9})
    assert decision.hypervolume == pytest.approx(0.09 * 0.9)


def test_nothing_asked_begins_at_the_knee():
    # scaled: L1 (0, 1), L2 (0.9, 2/3), L4 (1, 0); from L2 it is nearer to L4 (0.67) than to L1 (0.96)
    trials = [trial("L1", 0.70), trial("L2", 0.79), trial("L4", 0.80), trial("L2", 0.71)]
    decision = decide(searched(*trials, finalists=3))
    assert (decision.front, decision.knee, decision.finalists) == ([0, 1, 2], 1, [1, 2, 0])
    assert decision.feasible == [0, 1, 3, 2]
    assert decision.why.startswith("Nothing was asked to be kept")


def test_a_quality_that_is_better_when_lower():
    objectives = {"validation/nll": "min", "cost/parameters": "min"}
    trials = [("L1", {"nll": 0.9}, {}), ("L2", {"nll": 0.5}, {}), ("L2", {"nll": 0.4}, {}), ("L4", {"nll": 0.45}, {})]
    decision = decide(searched(*trials, objectives=objectives, keep={"validation/nll": 0.5}))
    assert decision.front == [0, 2]
    assert decision.feasible == [2, 1, 3]
    assert decision.finalists == [2, 3]


def test_before_any_trial_has_finished():
    for keep in ({}, {"validation/accuracy": 0.8}):
        decision = decide(searched(trial("L1", 0.9, state="running"), keep=keep))
        assert (decision.front, decision.knee, decision.feasible, decision.nearest, decision.finalists) == ([], None, [], [], [])
        assert (decision.hypervolume, decision.reference) == (0.0, {})


def test_a_decision_of_1000_trials_is_quick_and_loads_nothing_heavy():
    draw = random.Random(0)
    search = searched(*(trial(draw.choice(list(COST)), draw.random()) for _ in range(1000)), keep={"validation/accuracy": 0.5})
    start = time.process_time()
    decide(search)
    assert time.process_time() - start < 0.3
    program = "import sys, json, tuning.pareto; print(json.dumps(sorted(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not {"numpy", "scipy", "torch", "ray", "sklearn"} & {name.split(".")[0] for name in json.loads(done.stdout)}


# ---------------------------------------------------------------------------------------------------------------- choice


def refits(of, student, accuracies, role="refit", **more):
    return [trial(student, accuracy, role=role, of=of, seed=seed, **more) for seed, accuracy in enumerate(accuracies)]


def test_the_interval_of_three_seeds_by_hand():
    # 1, 2, 3: mean 2, standard deviation 1, and 4.302653 is Student's t with two degrees of freedom
    found = interval([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "low": pytest.approx(2 - 4.302653 / math.sqrt(3)), "high": pytest.approx(2 + 4.302653 / math.sqrt(3)),
                     "count": 3}  # fmt: skip
    assert interval([0.97, 0.97]) == {"mean": 0.97, "low": 0.97, "high": 0.97, "count": 2}
    assert interval([5.0]) == {"mean": 5.0, "low": None, "high": None, "count": 1}


def test_the_paired_test_by_hand():
    # differences 1 and 3: mean 2, standard error 1, t = 2 with one degree of freedom: p = 1 - 2 atan(2) / pi
    assert paired_p([2.0, 5.0], [1.0, 2.0]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert paired_p([1.0, 2.0], [2.0, 5.0]) == pytest.approx(1 - 2 * math.atan(2) / math.pi)
    assert paired_p([0.3, 0.7], [0.3, 0.7]) == 1.0
    assert paired_p([0.3, 0.7], [0.2, 0.6]) is None  # no spread but that of rounding
    assert paired_p([0.3], [0.2]) is None
    assert paired_p([0.3], [0.3]) is None
    assert paired_p([], []) is None


def test_the_choice_is_the_smallest_that_keeps():
    search = searched(
        trial("L4", 0.92), trial("L2", 0.86), trial("L1", 0.81),
        *refits(2, "L1", [0.78, 0.80, 0.79]), *refits(1, "L2", [0.84, 0.87, 0.87]), *refits(0, "L4", [0.9, 0.9, 0.9]),
        *refits(1, "L2", [0.85, 0.83], role="refit-baseline"),
        keep={"validation/accuracy": 0.80, "cost/parameters": "<= 50"}, finalists=3,
    )  # fmt: skip
    choice = choose(search, decide(search))
    assert json.loads(json.dumps(choice, allow_nan=False)) == choice
    assert {key: choice[key] for key in ("trial", "refit", "seed", "name", "kept", "front", "knee")} == {
        "trial": 1, "refit": 7, "seed": 1, "name": "L2-1", "kept": True, "front": [2, 1, 0], "knee": 1,
    }  # fmt: skip
    assert choice.keys() == {
        "trial", "refit", "seed", "name", "kept", "reason", "finalists", "front", "knee", "hypervolume", "reference",
    }  # fmt: skip
    # mean 0.86, standard deviation sqrt(3) / 100: half of the interval is 0.043027
    assert choice["reason"] == (
        "L2-1: the smallest of 3 sizes that keeps validation/accuracy >= 0.8: 0.86 (0.817 to 0.903) over 3 seeds and "
        "cost/parameters <= 50: 20; L1-2 comes before it and does not: validation/accuracy >= 0.8: 0.79 (0.7652 to 0.8148) over 3 seeds "
        "and cost/parameters <= 50: 10"
    )
    one, two, four = choice["finalists"]
    assert [one["kept"], two["kept"], four["kept"]] == [False, True, True]
    assert (two["refits"], two["baselines"], two["failed"]) == ([6, 7, 8], [12, 13], [])
    assert two["quality"]["validation/accuracy"] == {
        "mean": pytest.approx(0.86), "low": pytest.approx(0.86 - 0.043027, abs=1e-6), "high": pytest.approx(0.86 + 0.043027, abs=1e-6),
        "count": 3,
    }  # fmt: skip
    assert two["baseline"]["validation/accuracy"]["mean"] == pytest.approx(0.84)
    # paired by seed: -0.01 and 0.04; mean 0.015, standard error 0.025, t = 0.6
    assert two["gain"] == {
        "metric": "validation/accuracy", "mean": pytest.approx(0.015), "low": pytest.approx(0.015 - 12.7062 * 0.025, abs=1e-5),
        "high": pytest.approx(0.015 + 12.7062 * 0.025, abs=1e-5), "count": 2, "p": pytest.approx(1 - 2 * math.atan(0.6) / math.pi),
    }  # fmt: skip
    assert one["gain"] is None
    assert one["baseline"] == {}
    assert two["values"] == {"cost/parameters": 20, "validation/accuracy": pytest.approx(0.86)}


def test_a_mean_on_the_bound_keeps_it():
    accuracies = [0.19, 0.12, 0.29]
    assert interval(accuracies)["mean"] < 0.2  # by rounding
    search = searched(trial("L1", 0.8), *refits(0, "L1", accuracies), keep={"validation/accuracy": 0.2})
    choice = choose(search, decide(search))
    assert choice["kept"]
    assert choice["reason"].startswith("L1-0: the smallest of 1 size that keeps validation/accuracy >= 0.2: 0.2 (")


def test_a_gain_of_a_metric_that_is_better_when_lower_is_positive():
    search = searched(
        ("L1", {"nll": 0.5, "accuracy": 0.8}, {}),
        ("L1", {"nll": 0.5, "accuracy": 0.8}, {"role": "refit", "of": 0, "seed": 3}),
        ("L1", {"nll": 0.4, "accuracy": 0.7}, {"role": "refit", "of": 0, "seed": 1}),
        ("L1", {"nll": 0.7}, {"role": "refit-baseline", "of": 0, "seed": 1}),
        ("L1", {"nll": 0.6}, {"role": "refit-baseline", "of": 0, "seed": 2}),
        objectives={"validation/nll": "min"},
    )
    choice = choose(search, decide(search))
    (finalist,) = choice["finalists"]
    assert finalist["gain"] == {"metric": "validation/nll", "mean": pytest.approx(0.3), "low": None, "high": None, "count": 1, "p": None}
    assert (choice["refit"], choice["seed"], finalist["refits"]) == (2, 1, [2, 1])
    assert choice["reason"].startswith("L1-0: better than all others, as nothing was asked to be kept: validation/nll 0.45 (")


def test_of_seeds_that_validate_alike_the_smallest_is_shipped():
    search = searched(trial("L1", 0.8), *reversed(refits(0, "L1", [0.7, 0.8, 0.8])))
    assert choose(search, decide(search))["seed"] == 1


def test_none_kept_is_the_one_that_misses_least():
    search = searched(
        trial("L2", 0.85), trial("L1", 0.80), *refits(0, "L2", [0.79, 0.79]), *refits(1, "L1", [0.70, 0.72]),
        keep={"validation/accuracy": 0.8},
    )  # fmt: skip
    choice = choose(search, decide(search))
    assert (choice["trial"], choice["kept"]) == (0, False)
    assert choice["reason"] == (
        "L2-0: nearest of 2 finalists, none keeps validation/accuracy >= 0.8: validation/accuracy >= 0.8: 0.79 (0.79 to 0.79) over 2 seeds"
    )


def test_what_came_near_in_the_search_may_keep_it_in_full():
    # L4 came nearest, but both keep it when they are trained in full: the smaller one is chosen
    search = searched(
        trial("L4", 0.79), trial("L2", 0.78), *refits(0, "L4", [0.85]), *refits(1, "L2", [0.82]), keep={"validation/accuracy": 0.8}
    )
    decision = decide(search)
    assert decision.finalists == [0, 1]
    choice = choose(search, decision)
    assert (choice["trial"], choice["kept"]) == (1, True)
    assert choice["reason"] == "L2-1: the smallest of 2 sizes that keeps validation/accuracy >= 0.8: 0.82 over 1 seed"


def test_a_latency_that_was_not_measured_is_not_kept_and_said():
    search = searched(trial("L1", 0.9), *refits(0, "L1", [0.9]), keep={"cost/latency_ms_p95": 5.0})
    choice = choose(search, decide(search))
    assert not choice["kept"]
    assert choice["reason"].endswith("cost/latency_ms_p95 <= 5: not measured")
    search.latencies["key-L1"] = {"cost/latency_ms_p95": 4.25}
    choice = choose(search, decide(search))
    assert choice["kept"]
    assert choice["reason"].endswith("cost/latency_ms_p95 <= 5: 4.25")


def test_failed_refits_are_left_out_and_mentioned():
    search = searched(
        trial("L1", 0.70), trial("L2", 0.79), trial("L4", 0.80),
        *refits(1, "L2", [0.0, 0.0], state="failed", cause="out of memory"), *refits(2, "L4", [0.81]),
        trial("L4", 0.0, role="refit", of=2, seed=1, state="failed", cause="NaN"), trial("L4", 0.99, role="refit", of=2, seed=2, state="running"),
    )  # fmt: skip
    decision = decide(search)
    assert decision.finalists == [1, 2]
    choice = choose(search, decision)
    assert (choice["trial"], choice["refit"], choice["kept"]) == (2, 5, True)
    assert choice["reason"] == (
        "L4-2: near the knee of the front, as nothing was asked to be kept: validation/accuracy 0.81 over 1 seed; "
        "failed: 3 trainings of the finalists"
    )
    two, four = choice["finalists"]
    assert (two["refits"], two["quality"], two["kept"], two["values"]) == ([], {}, False, {"cost/parameters": 20})
    assert two["failed"][0] == {"number": 3, "role": "refit", "seed": 0, "cause": "out of memory"}
    assert [lost["number"] for lost in four["failed"]] == [6]


def test_the_knee_is_chosen_where_nothing_was_asked():
    search = searched(trial("L1", 0.70), trial("L2", 0.79), trial("L4", 0.80), *refits(1, "L2", [0.79]), *refits(2, "L4", [0.9]))
    choice = choose(search, decide(search))
    assert choice["trial"] == 1
    assert choice["reason"] == "L2-1: the knee of the front, as nothing was asked to be kept: validation/accuracy 0.79 over 1 seed"


def test_a_refit_that_was_run_again_counts_once():
    again = [
        trial("L1", 0.0, role="refit", of=0, state="failed"),
        trial("L1", 0.7, role="refit", of=0),
        trial("L1", 0.7, role="refit", of=0),
    ]
    search = searched(trial("L1", 0.8), *again)
    (finalist,) = choose(search, decide(search))["finalists"]
    assert finalist["quality"]["validation/accuracy"] == {"mean": 0.7, "low": None, "high": None, "count": 1}


def test_no_refit_at_all():
    lost = [
        *refits(0, "L1", [0.0], role="refit-baseline", state="failed", cause="NaN"),
        *refits(0, "L1", [0.0], state="failed", cause="worker was killed"),
    ]
    for trials, found in (([], "none"), (lost, "worker was killed")):
        search = searched(trial("L1", 0.8), *trials)
        with pytest.raises(InputError) as caught:
            choose(search, decide(search))
        assert caught.value.code == "DST-3502"
        assert f"found {found}" in str(caught.value)


# ------------------------------------------------------------------------------------------------- where finalists fall short


def refitted(search, of, accuracy, role="refit", seed=1, state="finished"):
    source = search.trials[of].task
    task = source._replace(role=role, name=f"{source.name}-{role}-{seed}", of=of, seed=seed, fingerprint=f"{source.student}-{role}-{seed}")
    search.trials.append(Trial(len(search.trials), task, state))
    if accuracy is not None:
        search.trials[-1].add(100, {"validation/accuracy": accuracy, "train/rows": 100})


def test_where_the_finalists_fall_short_in_full_the_next_larger_one_is_tried():
    sizes = ("L1", "finished", 0.60, 1e6, 100), ("L2", "finished", 0.71, 2e6, 100), ("L3", "finished", 0.75, 3e6, 100)
    search = by_hand(*sizes, keep={"validation/accuracy": 0.7}, finalists=1, seeds=1)
    assert decide(search).finalists == [1]
    refitted(search, 1, None, state="running")
    assert decide(search).finalists == [1]  # it is not known yet
    search.trials[-1].state = "finished"
    search.trials[-1].add(100, {"validation/accuracy": 0.69, "train/rows": 100})
    assert decide(search).finalists == [1, 2]
    refitted(search, 2, 0.74)
    decision = decide(search)
    choice = choose(search, decision)
    assert (decision.finalists, choice["trial"], choice["kept"]) == ([1, 2], 2, True)
    assert "comes before it and does not" in choice["reason"]


def test_where_no_finalist_keeps_it_the_search_ends_with_the_last():
    sizes = ("L2", "finished", 0.71, 2e6, 100), ("L3", "finished", 0.75, 3e6, 100)
    search = by_hand(*sizes, keep={"validation/accuracy": 0.7}, finalists=1, seeds=1)
    refitted(search, 0, 0.68)
    refitted(search, 1, 0.69)
    decision = decide(search)
    assert (decision.finalists, choose(search, decision)["kept"]) == ([0, 1], False)


def test_a_baseline_that_two_finalists_have_in_common_counts_for_both():
    search = by_hand(
        ("L2", "finished", 0.71, 2e6, 100), ("L2", "finished", 0.72, 2e6, 100), keep={"validation/accuracy": 0.7}, finalists=1, seeds=1
    )
    refitted(search, 0, 0.65, "refit-baseline")
    refitted(search, 1, 0.72)
    assert choose(search, decide(search))["finalists"][0]["gain"] is None
    search.remember({"kind": "shared", "time": search.updated, "number": 2, "of": 1})
    assert choose(search, decide(search))["finalists"][0]["gain"]["mean"] == pytest.approx(0.07)


def test_a_bound_is_met_where_only_rounding_is_in_the_way():
    search = by_hand(("L1", "finished", 90 / 103, 1e6, 100), keep={"validation/retention": 0.9})
    search.trials[0].metrics["validation/retention"] = (90 / 103) / (100 / 103)
    assert decide(search).feasible == [0]
