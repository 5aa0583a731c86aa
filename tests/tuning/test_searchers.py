"""Searchers: draws that do not depend on interruptions, and a model that learns from whatever was seen."""

import json
import statistics
import subprocess
import sys
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distillation.errors import ConfigError
from tests.tuning.test_space import BASE, SPACES, TREE, check_point
from tuning import config as settings_of
from tuning.config import SearchConfig
from tuning.searchers import SEARCHERS, Outcome, build_searcher
from tuning.space import Space, identity

PLANE = {"losses.soft.weight": {"uniform": [0, 1]}, "losses.hard.weight": {"uniform": [0, 1]}}
BRANCHES = {
    "losses.soft": {"choice": [{"type": "forward_kl", "weight": 1.0}, {"type": "jsd", "weight": 1.0}]},
    "losses.soft.temperature": {"log_uniform": [1, 8], "when": {"losses.soft.type": "forward_kl"}},
    "losses.soft.beta": {"uniform": [0, 1], "when": {"losses.soft.type": "jsd"}},
}
SMALL = {"training.epochs": {"choice": [1, 2]}, "student.layers": {"choice": [[0], [0, 5], [0, 3, 5]]}}
ONE = {"validation/accuracy": "max"}
TWO = {"validation/accuracy": "max", "cost/parameters": "min"}


def searcher(kind, knobs, base=BASE, *, objectives=ONE, seed=0, **options):
    config = SearchConfig(space=knobs, searcher={"type": kind, **options}, objectives=objectives, seed=seed)
    return build_searcher(config, Space(config.space, base))


def finished(*values):
    return Outcome("finished", dict(zip(TWO, values, strict=False)))


def drive(search, measure, draws, history=None):
    """Ask, measure and tell one point after the other; the points."""
    points = []
    for draw in draws:
        point = search.ask(draw)
        outcome = measure(point)
        search.tell(draw, point, outcome)
        points.append(point)
        if history is not None:
            history.append((draw, point, outcome))
    return points


def hill(point):
    """Best at (0.8, 0.2)."""
    return 1 - (point["losses.soft.weight"] - 0.8) ** 2 - (point["losses.hard.weight"] - 0.2) ** 2


def test_searchers_are_those_of_the_job_file():
    members = get_args(get_args(settings_of.SearcherConfig)[0])
    assert set(SEARCHERS) == {get_args(member.model_fields["type"].annotation)[0] for member in members}


def test_importing_them_loads_no_optuna_and_nothing_heavy():
    program = "import sys, json, tuning.searchers; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"optuna", "torch", "ray", "mlflow", "numpy"} & {name.split(".")[0] for name in json.loads(done.stdout)}


# --------------------------------------------------------------------------------------------------------- grid and random


def test_a_grid_ends_after_its_last_combination():
    grid = searcher("grid", {"training.epochs": {"integer": [1, 2]}, "losses.soft.weight": {"uniform": [0, 1]}}, points=3)
    points = [grid.ask(draw) for draw in range(7)]
    expected = [{"training.epochs": epochs, "losses.soft.weight": weight} for epochs in (1, 2) for weight in (0.0, 0.5, 1.0)]
    assert points == [*expected, None]
    assert grid.ask(4) == expected[4]
    fresh = searcher("grid", {"training.epochs": {"integer": [1, 2]}, "losses.soft.weight": {"uniform": [0, 1]}}, points=3)
    assert fresh.ask(5) == expected[5]  # resumed


@pytest.mark.parametrize("knobs", [PLANE, BRANCHES, SMALL])
def test_a_random_draw_is_a_function_of_seed_and_number(knobs):
    once = searcher("random", knobs)
    points = [once.ask(draw) for draw in range(6)]
    for draw in (5, 0, 3):
        assert searcher("random", knobs).ask(draw) == points[draw]
    for draw, point in enumerate(points):
        once.tell(draw, point, finished(0.5))
    assert [once.ask(draw) for draw in range(6)] == points
    assert len({identity(point) for point in points}) == 6
    assert [searcher("random", knobs, seed=1).ask(draw) for draw in range(6)] != points


def test_random_draws_are_spread_over_the_domain():
    search = searcher("random", PLANE)
    weights = [search.ask(draw)["losses.soft.weight"] for draw in range(400)]
    assert statistics.mean(weights) == pytest.approx(0.5, abs=0.05)
    assert statistics.stdev(weights) == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_a_finite_space_is_exhausted_without_repeats(kind):
    search = searcher(kind, SMALL)
    points = drive(search, lambda point: finished(point["training.epochs"] / 3), range(6))
    assert len({identity(point) for point in points}) == 6
    assert search.ask(6) is None
    assert search.ask(6) is None
    search = searcher(kind, SMALL)  # all under way at once
    assert len({identity(search.ask(draw)) for draw in range(6)}) == 6
    assert search.ask(6) is None


@settings(max_examples=25, deadline=None)
@given(SPACES, st.sampled_from(["grid", "random", "tpe"]), st.sampled_from([ONE, TWO]), st.integers(0, 9))
def test_every_point_lies_in_its_domains_and_its_conditions_hold(knobs, kind, objectives, seed):
    try:
        search = searcher(kind, knobs, TREE, objectives=objectives, seed=seed, **({"startup": 2} if kind == "tpe" else {}))
    except ConfigError:
        return  # knobs that wait for each other
    over = Space(SearchConfig(space=knobs).space, TREE)
    told = [
        finished(0.5, 7),
        Outcome("stopped", {}, [(3, 0.1), (9, 0.2)]),
        finished(0.7, 3),
        Outcome("refused"),
        Outcome("failed"),
        finished(0.1, 1),
    ]
    seen = set()
    for draw, outcome in enumerate([*told, *told]):
        if (point := search.ask(draw)) is None:
            break
        check_point(over, knobs, point)
        assert identity(point) not in seen
        seen.add(identity(point))
        search.tell(draw, json.loads(json.dumps(point)), outcome)


# --------------------------------------------------------------------------------------------------------------------- tpe


def test_tpe_comes_closer_to_an_optimum_than_random():
    def best(kind, seed):
        search = searcher(kind, PLANE, seed=seed)
        return max(hill(point) for point in drive(search, lambda point: finished(hill(point)), range(50)))

    missing = {kind: statistics.mean(1 - best(kind, seed) for seed in range(4)) for kind in ("random", "tpe")}
    assert missing["tpe"] < 0.3 * missing["random"], missing


def test_tpe_learns_in_a_space_with_conditions():
    def measure(point):  # jsd with a beta near 0.25 is best
        beta = point.get("losses.soft.beta")
        return finished(0.4 if beta is None else 1 - (beta - 0.25) ** 2)

    points = drive(searcher("tpe", BRANCHES), measure, range(50))
    assert all(("losses.soft.beta" in point) == (point["losses.soft"]["type"] == "jsd") for point in points)
    assert all(("losses.soft.temperature" in point) != ("losses.soft.beta" in point) for point in points)
    late = [point.get("losses.soft.beta", 9) for point in points[30:]]
    assert sum(abs(beta - 0.25) < 0.15 for beta in late) >= 9  # 3 of 20 by chance


def test_tpe_learns_with_several_objectives():
    knobs = {"student.count": {"integer": [1, 12]}, "losses.soft.weight": {"uniform": [0, 1]}}

    def measure(point):  # for every size the best weight is 0.7
        return finished(1 - 0.5 / point["student.count"] - (point["losses.soft.weight"] - 0.7) ** 2, point["student.count"])

    late = drive(searcher("tpe", knobs, objectives=TWO), measure, range(60))[30:]
    assert sum(abs(point["losses.soft.weight"] - 0.7) < 0.15 for point in late) >= 20  # 9 of 30 by chance
    assert len({point["student.count"] for point in late}) >= 4  # along the front, not at one end of it


def test_tpe_follows_the_direction_of_an_objective():
    low = searcher("tpe", {"training.learning_rate": {"uniform": [0, 1]}}, objectives={"validation/nll": "min"})
    measured = drive(low, lambda p: Outcome("finished", {"validation/nll": p["training.learning_rate"]}), range(40))
    assert statistics.mean(point["training.learning_rate"] for point in measured[20:]) < 0.2


@pytest.mark.parametrize("objectives", [ONE, TWO])
def test_a_resumed_search_goes_on_as_if_it_had_not_been_interrupted(objectives):
    def measure(point):
        value = hill(point)
        return finished(value, 5) if value > 0.6 else Outcome("stopped", {}, [(100, value), (200, value)])

    history = []
    search = searcher("tpe", PLANE, objectives=objectives)
    drive(search, measure, range(18), history)
    under_way = search.ask(18)
    resumed = searcher("tpe", PLANE, objectives=objectives)
    for draw, point, outcome in json.loads(json.dumps([*history, (18, under_way, Outcome("running"))])):
        resumed.tell(draw, point, Outcome(*outcome))
    for one in (search, resumed):
        one.tell(18, under_way, finished(hill(under_way), 5))
    points = drive(search, measure, range(19, 30))
    assert drive(resumed, measure, range(19, 30)) == points
    made = [identity(point) for _, point, _ in history] + [identity(point) for point in [under_way, *points]]
    assert len(set(made)) == 30


def test_a_resumed_search_does_not_repeat_its_first_draws():
    first = searcher("tpe", PLANE)
    points = [first.ask(draw) for draw in range(4)]
    resumed = searcher("tpe", PLANE)
    for draw, point in enumerate(points[:3]):
        resumed.tell(draw, point, finished(0.5))
    assert resumed.ask(3) == points[3]
    assert searcher("tpe", PLANE).ask(3) == points[3]  # also where nothing of the first ones is known
    assert resumed.ask(4) not in points


@pytest.mark.parametrize("knob", [{"quantized": [0.1, 7.3, 0.1]}, {"integer": [3, 90]}, {"choice": [[0], {"a": 1}, None, True, 1]}])
def test_finite_values_come_back_from_the_ledger_as_the_same_points(knob):
    """Told points that are taken for others would come again."""
    search = searcher("tpe", {"student.count": knob}, startup=3)
    grid = searcher("grid", {"student.count": knob})
    points = []
    while (point := grid.ask(len(points))) is not None:
        points.append(point)
    for draw, point in enumerate(points[:-1]):
        search.tell(draw, json.loads(json.dumps(point)), finished(0.5))
    assert search.ask(len(points)) == points[-1]
    params = [trial.params["student.count"] for trial in search._study.trials if trial.state.name == "COMPLETE"]
    assert params == list(range(len(points) - 1))


def concentrated(outcome_of_the_right, objectives, count=12, seeds=8):
    """Share of suggestions right of 0.5 after `count` even trials left of it, and as many right of it that ended otherwise."""
    right = []
    for seed in range(seeds):
        search = searcher("tpe", {"losses.soft.weight": {"uniform": [0, 1]}}, objectives=objectives, seed=seed, startup=5)
        for i in range(count):
            search.tell(2 * i, {"losses.soft.weight": 0.5 * (i + 0.5) / count}, finished(0.5 + 0.01 * (i % 3), 5 + i % 3))
            search.tell(2 * i + 1, {"losses.soft.weight": 0.5 + 0.5 * (i + 0.5) / count}, outcome_of_the_right)
        right += [search.ask(2 * count + i)["losses.soft.weight"] > 0.5 for i in range(4)]
    return sum(right) / len(right)


@pytest.mark.parametrize("objectives", [ONE, TWO])
def test_where_trials_were_stopped_tpe_looks_less(objectives):
    # Their quality at half the rows is above all final ones: that must not count for them.
    stopped = concentrated(Outcome("stopped", {"validation/accuracy": 0.9, "cost/parameters": 1}, [(50, 0.9)]), objectives)
    failed = concentrated(Outcome("failed"), objectives)
    assert stopped < 0.15
    assert failed > stopped + 0.2  # says nothing about the objectives


@pytest.mark.parametrize("objectives", [ONE, TWO])
@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ([(100, 0.2), (200, 0.3)], [(100, 0.9)]),  # came farther
        ([(100, 0.9)], [(100, 0.2)]),  # better at the same point
        ([(100, 0.1)], [(100, float("nan"))]),
        ([(100, 0.1)], []),
    ],
)
def test_among_stopped_trials_the_one_that_came_farther_and_was_better_counts_as_good(objectives, better, worse):
    near = 0
    for seed in range(12):
        search = searcher("tpe", {"losses.soft.weight": {"uniform": [0, 1]}}, objectives=objectives, seed=seed, startup=5)
        for draw in range(12):
            good = draw % 6 == 4
            point = {"losses.soft.weight": (0.8 if good else 0.1 + 0.03 * (draw % 6)) + 0.001 * draw}
            search.tell(draw, point, Outcome("stopped", {}, better if good else worse))
        near += abs(search.ask(12)["losses.soft.weight"] - 0.8) < 0.2
    assert near >= 9  # of 12; 5 by chance


@pytest.mark.parametrize("objectives", [{"validation/nll": "min"}, {"cost/flops": "min", "validation/nll": "min"}])
def test_among_stopped_trials_a_lower_nll_counts_as_good(objectives):
    search = searcher("tpe", {"losses.soft.weight": {"uniform": [0, 1]}}, objectives=objectives, startup=5)
    for draw in range(12):
        weight = 0.05 + 0.08 * draw
        search.tell(draw, {"losses.soft.weight": weight}, Outcome("stopped", {}, [(100, 1 - weight)]))
    assert statistics.mean(search.ask(12 + i)["losses.soft.weight"] for i in range(6)) > 0.7


@pytest.mark.parametrize("outcome", [Outcome("finished"), finished(0.5), finished(float("nan"), 1), finished(0.5, float("inf"))])
def test_a_trial_without_all_its_values_is_ignored(outcome):
    search = searcher("tpe", {"losses.soft.weight": {"uniform": [0, 1]}}, objectives=TWO, startup=1)
    search.tell(0, {"losses.soft.weight": 0.5}, outcome)
    assert [trial.state.name for trial in search._study.trials] == ["FAIL"]
    assert search.ask(1) is not None


def test_concurrent_trials_do_not_pile_up_on_one_point():
    search = searcher("tpe", {"losses.soft.weight": {"uniform": [0, 1]}}, startup=5)
    drive(search, lambda point: finished(1 - (point["losses.soft.weight"] - 0.5) ** 2), range(30))
    alone = []
    for draw in range(30, 38):  # nothing else is under way: each point is taken back
        alone.append(search.ask(draw))
        search.tell(draw, alone[-1], Outcome("failed"))
    together = [search.ask(draw) for draw in range(38, 46)]
    alone, together = ([point["losses.soft.weight"] for point in points] for points in (alone, together))
    assert statistics.stdev(together) > 3 * statistics.stdev(alone)
