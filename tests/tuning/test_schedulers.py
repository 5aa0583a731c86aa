"""Schedulers: decisions worked out by hand, small students beside large ones, what a restarted search remembers, and real runs of Tune."""

from __future__ import annotations

import json
import math
import os
import random
import sys
import threading
from pathlib import Path
from typing import Any, get_args

import pytest
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from distillation.errors import ConfigError
from tuning import config as settings
from tuning.config import SearchConfig
from tuning.ledger import Ledger, Task
from tuning.schedulers import SCHEDULERS, Buckets, Member, build_scheduler, explore, rungs

ROWS = 1000
SPACE = {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "losses.soft.weight": {"uniform": [0.0, 1.0]}}
ASHA = {"type": "asha", "grace": 0.25, "reduction": 2.0}
MEDIAN = {"type": "median", "grace": 0.25, "every": 0.25, "least": 2}
PBT = {"type": "pbt", "every": 0.25, "quantile": 0.25}


def searching(scheduler: dict[str, Any], **more: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, "scheduler": scheduler, "trials": 64, **more})


def decide(scheduler, number, rows, quality, bucket=0, role="trial", state="running"):
    trial = Trial("made-up", stub=True, config={"number": number, "role": role, "bucket": bucket})
    scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"rows": rows, "quality": quality, "state": state})


def test_schedulers_are_those_of_the_search():
    kinds = [kind.model_fields["type"].annotation for kind in get_args(get_args(settings.SchedulerConfig)[0])]
    assert set(SCHEDULERS) == {get_args(kind)[0] for kind in kinds}


# ------------------------------------------------------------------------------------------------------------------ rungs


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"type": "none"}, ()),
        (ASHA, (250, 500)),
        ({"type": "asha", "grace": 0.1, "reduction": 3.0}, (100, 300, 900)),
        ({"type": "asha", "grace": 0.3335, "reduction": 2.0}, (334, 667)),  # 333.5 rows have been seen after 334
        ({"type": "asha", "grace": 0.9999, "reduction": 2.0}, ()),
        (MEDIAN, (250, 500, 750)),
        ({"type": "median", "grace": 0.5, "every": 0.2}, (600, 800)),
        ({"type": "median", "grace": 0.45, "every": 0.15}, (450, 600, 750, 900)),  # 0.15 * 3 is a little below 0.45
        (PBT, (250, 500, 750)),
        ({"type": "pbt", "every": 0.4}, (400, 800)),
    ],
)
def test_rungs_by_hand(scheduler, expected):
    assert rungs(searching(scheduler), ROWS) == expected


def test_with_few_rows_a_rung_is_there_once():
    assert rungs(searching({"type": "asha", "grace": 0.1, "reduction": 1.3}), 10) == (1, 2, 3, 4, 5, 7, 9)


@pytest.mark.parametrize("grace", [0.1, 0.25, 1 / 3, 0.7])
@pytest.mark.parametrize("reduction", [1.5, 2.0, 3.0, 4.0])
def test_rungs_are_the_milestones_of_rays_asha(grace, reduction):
    rays = AsyncHyperBandScheduler(grace_period=grace * 12_345, reduction_factor=reduction, max_t=12_345, metric="quality", mode="max")
    milestones = sorted(milestone for milestone, _ in rays._brackets[0]._rungs)
    ours = rungs(searching({"type": "asha", "grace": grace, "reduction": reduction}), 12_345)
    assert ours == tuple(math.ceil(milestone) for milestone in milestones if milestone < 12_345)


def test_one_bucket_decides_as_rays_asha_does_over_rows():
    config = searching({"type": "asha", "grace": 0.1, "reduction": 3.0})
    ours = build_scheduler(config, ROWS)
    rays = AsyncHyperBandScheduler("rows", "quality", "max", max_t=ROWS, grace_period=100, reduction_factor=3.0)
    generator, decisions = random.Random(0), []
    for number in range(60):
        rays.on_trial_add(None, Member(str(number)))
        for rows in rungs(config, ROWS):
            quality = generator.random()
            decision = decide(ours, number, rows, quality)
            assert decision == rays.on_trial_result(None, Member(str(number)), {"rows": rows, "quality": quality})
            decisions.append(decision)
            if decision == "STOP":
                break
    assert 20 < decisions.count("STOP") < 60


# ---------------------------------------------------------------------------------------------------------------- buckets


def test_students_of_about_the_same_cost_share_a_bucket():
    buckets = Buckets(1.25)
    assert [buckets.of(flops) for flops in (100e6, 81e6, 124e6, 125e6, 44e6, 100e6)] == [0, 0, 0, 1, 2, 0]
    # 124 is nearer to 125 than to 100; it was asked for earlier and stays.
    assert buckets.of(124e6) == 0
    assert buckets.of(123e6) == 1


def test_no_boundary_lies_between_two_students_that_are_alike():
    for exponent in range(60):
        flops = 1.25 ** (exponent + random.Random(exponent).random())
        buckets = Buckets(1.25)
        assert buckets.of(flops * 0.999) == buckets.of(flops * 1.001)


def test_one_bucket_for_all_where_nothing_is_compared():
    buckets = Buckets(math.inf)
    assert {buckets.of(flops) for flops in (1.0, 1e6, 1e12)} == {0}


# --------------------------------------------------------------------------------------------------------------- decisions


def test_asha_by_hand():
    # A rung's bar is the median of what stood there before.
    scheduler = build_scheduler(searching(ASHA), ROWS)
    assert decide(scheduler, 0, 250, 0.50) == "CONTINUE"  # nothing to compare with
    assert decide(scheduler, 1, 250, 0.40) == "STOP"  # 0.50
    assert decide(scheduler, 2, 250, 0.60) == "CONTINUE"  # (0.40 + 0.50) / 2
    assert decide(scheduler, 3, 250, 0.45) == "STOP"  # 0.50
    assert decide(scheduler, 4, 250, 0.48) == "CONTINUE"  # (0.45 + 0.50) / 2
    assert decide(scheduler, 0, 500, 0.55) == "CONTINUE"  # nothing to compare with
    assert decide(scheduler, 2, 500, 0.54) == "STOP"  # 0.55
    assert decide(scheduler, 0, 750, 0.01) == "CONTINUE"  # no rung


def test_median_by_hand():
    # Best so far against the median of the others' means up to the same rung.
    scheduler = build_scheduler(searching(MEDIAN), ROWS)
    assert decide(scheduler, 0, 250, 0.50) == "CONTINUE"  # nobody yet
    assert decide(scheduler, 1, 250, 0.10) == "CONTINUE"  # one other, two are asked for
    assert decide(scheduler, 2, 250, 0.30) == "CONTINUE"  # (0.50 + 0.10) / 2 = 0.30 is not above it
    assert decide(scheduler, 3, 250, 0.29) == "STOP"  # 0.30
    assert decide(scheduler, 0, 500, 0.70) == "CONTINUE"
    assert decide(scheduler, 2, 500, 0.20) == "CONTINUE"
    assert decide(scheduler, 1, 500, 0.42) == "STOP"  # (0.60 + 0.25) / 2 = 0.425
    assert decide(scheduler, 4, 500, 0.27) == "CONTINUE"  # the median of 0.60, 0.25 and (0.10 + 0.42) / 2 = 0.26
    assert decide(scheduler, 5, 500, 0.25) == "STOP"  # 0.27 joined: (0.26 + 0.27) / 2


def test_nothing_is_decided_beside_the_rungs():
    scheduler = build_scheduler(searching(ASHA), ROWS)
    assert decide(scheduler, 0, 263, 0.5) == "CONTINUE"  # a batch ran over the rung
    assert decide(scheduler, 1, 249, 0.0) == "CONTINUE"
    assert decide(scheduler, 1, 300, 0.4) == "STOP"
    assert decide(scheduler, 2, 250, 0.6) == "CONTINUE"
    assert decide(scheduler, 2, 250, 0.1) == "CONTINUE"  # repeated by a process that was restarted
    assert decide(scheduler, 2, 499, 0.1) == "CONTINUE"
    assert decide(scheduler, 3, 250, 0.0, bucket=1) == "CONTINUE"  # alone in its bucket
    for role in ("baseline", "refit", "refit-baseline", "measure"):
        assert decide(scheduler, 4, 250, 0.0, role=role) == "CONTINUE"
    for state in ("finished", "failed"):
        assert decide(scheduler, 5, 250, 0.0, state=state) == "CONTINUE"
    assert decide(scheduler, 2, 500, 0.6) == "CONTINUE"
    assert decide(scheduler, 5, 1000, 0.0) == "CONTINUE"  # it is over
    assert decide(scheduler, 6, 250, -math.inf) == "CONTINUE"
    assert decide(scheduler, 7, 250, 0.49) == "STOP"  # none of these was written down: the median of 0.5, 0.4 and 0.6
    none = build_scheduler(searching({"type": "none"}), ROWS)
    assert [decide(none, number, 500, -number) for number in range(9)] == ["CONTINUE"] * 9


# ------------------------------------------------------------------------------------------------------- small beside large


def learning(best: float, pace: float, rows: int) -> float:
    return best * (1 - math.exp(-pace * rows / ROWS))


SMALL, LARGE = 44e6, 107e6
STUDENTS = [(LARGE, 0.74 - 0.01 * i, 12.0) for i in range(6)] + [(SMALL, 0.72 - 0.01 * i, 3.0) for i in range(6)]
"""FLOPs, quality in the end, pace. The small ones are behind at every rung, the best by 2 points in the end."""


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [ASHA, MEDIAN])
def test_a_small_student_is_not_stopped_because_a_large_one_learns_faster(kind, seed):
    config = searching(kind)
    buckets, ours = Buckets(1.25), build_scheduler(config, ROWS)
    without = build_scheduler(config, ROWS)
    rays = AsyncHyperBandScheduler("rows", "quality", "max", max_t=ROWS, grace_period=250, reduction_factor=2)
    order = list(enumerate(STUDENTS))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda item: item[0] == 6)  # the best small one is the last
    survivors: dict[str, list[int]] = {"ours": [], "one bucket": [], "Ray's": []}
    for number, (flops, best, pace) in order:
        rays.on_trial_add(None, Member(str(number)))
        deciding = {
            "ours": lambda rows, quality, number=number, flops=flops: decide(ours, number, rows, quality, buckets.of(flops)),
            "one bucket": lambda rows, quality, number=number: decide(without, number, rows, quality),
            "Ray's": lambda rows, quality, number=number: rays.on_trial_result(
                None, Member(str(number)), {"rows": rows, "quality": quality}
            ),
        }
        for name, decision in deciding.items():
            if all(decision(rows, learning(best, pace, rows)) == "CONTINUE" for rows in rungs(config, ROWS)):
                survivors[name].append(number)
    assert {0, 6} <= set(survivors["ours"])
    assert len(survivors["ours"]) < 12
    assert 6 not in survivors["one bucket"]
    assert 6 not in survivors["Ray's"]
    assert 0 in survivors["Ray's"]


# ------------------------------------------------------------------------------------------------------------------ replay


def opened(path: Path, config: SearchConfig) -> Ledger:
    ledger = Ledger(path)
    ledger.begin("made-up", {"search": config.model_dump(mode="json")}, "f", {})
    return ledger


def task(flops: float, role: Any = "trial") -> Task:
    return Task(role, "name", {}, "L2", f"{flops:g}", "f", {"cost/flops": flops}, ROWS)


@pytest.mark.parametrize("quality", ["validation/accuracy", "validation/nll"])
@pytest.mark.parametrize("kind", [ASHA, MEDIAN])
def test_a_restarted_search_decides_as_one_that_was_not_interrupted(kind, quality, tmp_path):
    config = searching(kind, objectives={quality: settings.QUALITY[quality]})
    sign = 1.0 if settings.QUALITY[quality] == "max" else -1.0
    generator, whole, buckets = random.Random(1), build_scheduler(config, ROWS), Buckets(1.25)
    again, restarts, decisions = whole, 0, []
    with opened(tmp_path / "ledger.jsonl", config) as ledger:
        refused = ledger.trial(Task("trial", "refused", {}, "", "", "", {}, 0))
        ledger.end(refused, "refused")
        ledger.trial(task(LARGE, "baseline"))
        buckets.of(LARGE)
        ledger.point(1, 5, {"train/rows": 250, quality: sign * 99.0})  # of a baseline: nobody is compared with it
        running: dict[int, tuple[int, float]] = {}
        while len(ledger.search.trials) < 60 or running:
            if len(running) < 4 and len(ledger.search.trials) < 60:
                flops = generator.choice([SMALL, LARGE, LARGE * 1.1])
                number = ledger.trial(task(flops))
                running[number] = 0, flops
                buckets.of(flops)
            number = generator.choice(sorted(running))
            rows, flops = running.pop(number)
            rows += 125
            value = generator.gauss(0.5, 0.2)
            point = {"train/rows": rows, quality: sign * value}
            ledger.point(number, rows // 25, {"train/rows": rows, "train/loss": 1.0})
            ledger.point(number, rows // 25, point)
            both = [decide(scheduler, number, rows, value, buckets.of(flops)) for scheduler in (whole, again)]
            assert both[0] == both[1]
            decisions.append(both[0])
            if both[0] == "CONTINUE" and rows < ROWS:
                running[number] = rows, flops
            else:
                ledger.end(number, "finished" if both[0] == "CONTINUE" else "stopped")
            if generator.random() < 0.2:
                again, restarts = build_scheduler(config, ROWS), restarts + 1
                again.replay(ledger.search)
    assert restarts > 20
    assert 15 < decisions.count("STOP") < 50


def test_what_a_trial_had_in_the_end_is_of_no_rung(tmp_path):
    config = searching(ASHA)
    with opened(tmp_path / "ledger.jsonl", config) as ledger:
        for number, rows in enumerate((1000, 500)):
            ledger.trial(task(SMALL))
            ledger.point(number, 40, {"train/rows": rows, "validation/accuracy": 0.9})
            scheduler = build_scheduler(config, ROWS)
            scheduler.replay(ledger.search)
            assert decide(scheduler, 2, 500, 0.5) == ("CONTINUE" if rows == 1000 else "STOP")


def test_a_population_waits_again_at_the_rung_that_nobody_went_beyond(tmp_path):
    config = searching(PBT)

    def waits_at(ledger: Ledger) -> list[int]:
        """Rows at which a trial of a new process is held."""
        held = []
        for rows in (250, 510, 750):
            scheduler = build_scheduler(config, ROWS)
            scheduler.replay(ledger.search)
            if decide(scheduler, 0, rows, 0.5) == "PAUSE":
                held.append(rows)
        return held

    def point(number: int, rows: int, **metrics: float) -> None:
        ledger.point(number, rows, {"train/rows": rows, **{name.replace("_", "/"): value for name, value in metrics.items()}})

    with opened(tmp_path / "ledger.jsonl", config) as ledger:
        assert waits_at(ledger) == [250, 510, 750]
        for _ in range(2):
            ledger.trial(task(SMALL))
        point(0, 250, validation_accuracy=0.5)
        assert waits_at(ledger) == [250, 510, 750]  # it waits for the other one
        point(1, 270, validation_accuracy=0.5)
        assert waits_at(ledger) == [250, 510, 750]  # who knows whether they have exchanged; who has not gone on can do so again
        point(1, 300, train_loss=1.0)
        assert waits_at(ledger) == [510, 750]
        point(0, 500, validation_accuracy=0.5)
        assert waits_at(ledger) == [510, 750]
        point(0, 750, validation_accuracy=0.5)
        assert waits_at(ledger) == [750]
        point(0, 1000, validation_accuracy=0.6)
        ledger.end(0, "finished")
        assert waits_at(ledger) == []
        ledger.end(1, "failed")
        assert waits_at(ledger) == [250, 510, 750]  # whoever comes now begins anew


# ---------------------------------------------------------------------------------------------------------------- explore


def knobs(**space: Any) -> Any:
    return SearchConfig.model_validate({"space": {name.replace("__", "."): knob for name, knob in space.items()}}).space


def explored(point: dict[str, Any], space: Any, count: int = 2000) -> list[Any]:
    (name,) = point
    return [explore(point, space, random.Random(seed))[name] for seed in range(count)]


def test_a_number_is_moved_within_its_domain_or_drawn_anew():
    values = explored({"x": 0.5}, knobs(x={"uniform": [0.0, 1.0]}))
    moved = [value for value in values if value in (0.4, 0.6)]
    assert len(moved) == pytest.approx(1500, abs=80)  # three of four
    assert moved.count(0.4) == pytest.approx(750, abs=80)
    assert all(0 <= value <= 1 for value in values)
    values = explored({"x": 0.009}, knobs(x={"log_uniform": [1e-4, 1e-2]}))
    assert values.count(0.01) == pytest.approx(750, abs=80)  # 0.0108 is cut off
    assert sum(value < 1e-3 for value in values) == pytest.approx(250, abs=50)  # half of those that are drawn


def test_what_has_steps_moves_by_one_at_least():
    assert set(explored({"x": "b"}, knobs(x={"choice": ["a", "b", "c", "d"]}), 8000)) == {"a", "b", "c", "d"}
    values = explored({"x": "d"}, knobs(x={"choice": ["a", "b", "c", "d"]}))
    assert values.count("c") == pytest.approx(750 + 125, abs=90)
    assert values.count("d") == pytest.approx(750 + 125, abs=90)
    values = explored({"x": 2}, knobs(x={"integer": [1, 100]}))  # 2 * 1.2 and 2 * 0.8 round to 2
    assert values.count(1) == pytest.approx(750, abs=80)
    assert values.count(3) == pytest.approx(750, abs=80)
    values = explored({"x": 0.5}, knobs(x={"quantized": [0.0, 1.0, 0.05]}))
    assert values.count(0.4) == pytest.approx(750 + 24, abs=80)
    assert values.count(0.6) == pytest.approx(750 + 24, abs=80)
    assert {type(value) for value in values} == {float}


def test_knobs_that_the_space_does_not_have_stay():
    point = {"a": 0.5, "b": 7}
    new = explore(point, knobs(a={"uniform": [0.0, 1.0]}), random.Random(0))
    assert new["b"] == 7
    assert new["a"] != 0.5
    assert point == {"a": 0.5, "b": 7}


# --------------------------------------------------------------------------------------------------------- real runs of Tune


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import this file
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


class Listed(Searcher):
    """Hands out configs in order, as the search's own searcher does."""

    def __init__(self, configs: list[dict[str, Any]]) -> None:
        super().__init__(metric="quality", mode="max")
        self._configs = list(configs)

    def suggest(self, trial_id: str) -> Any:
        return self._configs.pop(0) if self._configs else Searcher.FINISHED

    def on_trial_complete(self, *_: Any, **__: Any) -> None: ...
    def save(self, checkpoint_path: str) -> None: ...
    def restore(self, checkpoint_path: str) -> None: ...


class Heard(tune.Callback):
    """Results in order, by number of the trial."""

    def __init__(self) -> None:
        self.results: dict[int, list[dict[str, Any]]] = {}
        self.errors: set[int] = set()

    def on_trial_result(self, iteration, trials, trial, result, **_):
        kept = {name: result.get(name) for name in ("rows", "quality", "state", "seen", "point", "made", "process")}
        self.results.setdefault(trial.config["number"], []).append(kept)

    def on_trial_error(self, iteration, trials, trial, **_):
        self.errors.add(trial.config["number"])


def fit(function, scheduler, configs, path, monkeypatch, concurrent) -> Heard:
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    heard = Heard()
    tune.Tuner(
        tune.with_resources(function, {"CPU": 1}),
        tune_config=tune.TuneConfig(
            search_alg=Listed(configs), scheduler=scheduler, num_samples=-1, max_concurrent_trials=concurrent, reuse_actors=True
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(path), verbose=0, callbacks=[heard]),
    ).fit()
    return heard


def learn(config):
    """A made-up curve, reported by batches of 40 rows, scored at rungs and at the end."""
    rows, marks = 0, list(config["rungs"])
    while rows < ROWS:
        rows += 40
        if marks and rows >= marks[0]:
            marks.pop(0)
            tune.report(
                {"rows": rows, "quality": learning(config["best"], config["pace"], rows), "state": "running", "process": os.getpid()}
            )
    tune.report({"rows": rows, "quality": learning(config["best"], config["pace"], rows), "state": "finished", "process": os.getpid()})


@pytest.mark.ray
def test_tune_stops_who_is_behind_in_its_bucket(cluster, tmp_path, monkeypatch):
    config, buckets = searching(ASHA), Buckets(1.25)
    # In each bucket the best comes first, so whoever comes third or later is behind at its first rung.
    order = [student for pair in zip(STUDENTS[:6], STUDENTS[6:], strict=True) for student in pair]
    configs = [
        {"number": i, "role": "trial", "bucket": buckets.of(flops), "best": best, "pace": pace, "rungs": rungs(config, ROWS)}
        for i, (flops, best, pace) in enumerate(order)
    ]
    configs.append({**configs[-1], "number": 12, "role": "baseline", "best": 0.1})
    heard = fit(learn, build_scheduler(config, ROWS), configs, tmp_path, monkeypatch, concurrent=2)
    last = {number: results[-1] for number, results in heard.results.items()}
    assert heard.errors == set()
    assert {number for number, result in last.items() if result["state"] == "finished"} >= {0, 1, 12}
    assert [(number, last[number]["rows"], last[number]["state"]) for number in range(4, 12)] == [(n, 280, "running") for n in range(4, 12)]
    assert [result["rows"] for result in heard.results[12]] == [280, 520, 1000]
    assert len({result["process"] for results in heard.results.values() for result in results}) <= 3  # 13 trials


def improve(config):
    """Gains the learning rate with every batch of 50 rows. Fails where it is told to."""
    state, found = {"rows": 0, "quality": 0.0, "seen": []}, tune.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            state = json.loads(Path(folder, "state.json").read_text())
    marks = [mark for mark in config["rungs"] if mark > state["rows"]]
    while state["rows"] < ROWS:
        if state["rows"] >= config.get("fails_at", ROWS):
            raise RuntimeError("made to fail")
        state["rows"] += 50
        state["quality"] += config["point"]["training.learning_rate"]
        state["seen"].append([config["number"], config["point"]["training.learning_rate"]])
        point = {**state, "point": config["point"], "made": config["made"], "process": os.getpid(), "state": "running"}
        if marks and state["rows"] >= marks[0]:
            marks.pop(0)
            Path("state.json").write_text(json.dumps(state))
            tune.report(point, checkpoint=tune.Checkpoint.from_directory("."))
        elif state["rows"] < ROWS:
            tune.report(point)
    tune.report({**point, "state": "finished"})


class Rebuilding:
    """Derives `made` from the point, and holds what cannot be pickled, as the driver does."""

    def __init__(self) -> None:
        self.lock, self.asked = threading.Lock(), []

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(config)
        if len(self.asked) == 1:
            raise ConfigError("DST-2018", "made to be refused")
        return {**config, "made": f"from {config['point']['training.learning_rate']:g}"}


@pytest.mark.ray
def test_the_worst_of_a_population_goes_on_from_the_best(cluster, tmp_path, monkeypatch):
    config, rebuild = searching(PBT), Rebuilding()
    rates = [0.001, 0.003, 0.005, 0.008, 0.002]
    configs = [
        {"number": i, "role": "trial", "bucket": 0, "point": {"training.learning_rate": rate}, "made": "", "rungs": rungs(config, ROWS)}
        for i, rate in enumerate(rates)
    ]
    configs[4]["fails_at"] = 400  # between two rungs: the others must not wait for it
    configs.append({**configs[0], "number": 5, "role": "baseline"})
    heard = fit(improve, build_scheduler(config, ROWS, rebuild=rebuild), configs, tmp_path, monkeypatch, concurrent=6)
    assert heard.errors == {4}
    for number in (0, 1, 2, 3, 5):
        assert (heard.results[number][-1]["rows"], heard.results[number][-1]["state"]) == (1000, "finished"), number
    # At 250 rows 0 and 4 are the worst of five and go on from 2 or 3; at 500 and at 750 it is one of the four that are left.
    exchanges = [(entry["number"], entry["source"], entry["exploits"]) for entry in rebuild.asked]
    assert [number for number, _, _ in exchanges[:3]] == [0, 0, 4]  # the first was refused
    assert {source for _, source, _ in exchanges[:3]} <= {2, 3}
    assert [source for _, source, _ in exchanges[3:]] == [3, 3]
    assert rebuild.asked[1]["point"] == {"training.learning_rate": rates[exchanges[1][1]]}  # so the knobs of the other one stay
    assert rebuild.asked[2]["point"] != {"training.learning_rate": rates[exchanges[2][1]]}
    # The new knobs go on from what the other one had checkpointed at the rung.
    for number, source, _ in exchanges[1:3]:
        rate = next(entry["point"]["training.learning_rate"] for entry in rebuild.asked[1:] if entry["number"] == number)
        after = next(result for result in heard.results[number] if result["rows"] == 300)
        assert after["seen"] == [[source, rates[source]]] * 5 + [[number, rate]]
        assert after["quality"] == pytest.approx(5 * rates[source] + rate)
        assert (after["point"], after["made"]) == ({"training.learning_rate": rate}, f"from {rate:g}")
    for number in (0, 1, 2, 3, 5):
        assert len(heard.results[number][-1]["seen"]) == 20  # batches: none was lost or done twice
    assert heard.results[5][-1]["seen"] == [[5, 0.001]] * 20
    assert {trial for trial, _ in heard.results[3][-1]["seen"]} == {3}  # the best is left alone
    assert len({result["process"] for results in heard.results.values() for result in results}) <= 4
