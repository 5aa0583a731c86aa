"""Populations, without Ray: trials that go on from each other, and checkpoints that are kept as long as one may go on from them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distillation.errors import ConfigError
from tests.tuning.driving import PBT, Driver, said, scores
from tuning.director import Job


def population(driver: Driver) -> list[Job]:
    """The trials of a population, after their first exchange: the later, the better."""
    jobs = [driver.director.next() for _ in range(4)]
    for job in jobs:
        driver.director.result(job.number, said((20, scores(50, 0.5 + 0.1 * job.number)), (25, {"train/rows": 60.0, "train/loss": 1.0})))
    return jobs


def as_tune_has_it(job: Job, source: int, **knobs: float) -> dict[str, Any]:
    work = {"cpus": 2, **job.work}
    point = {"training.learning_rate": 0.002, "losses.soft.weight": 0.25, **knobs}
    return {"number": job.number, "role": job.role, "bucket": 0, "exploits": 1, "source": source, "point": point, "work": work}


def test_a_trial_of_a_population_goes_on_from_another_one_with_other_knobs(drive):
    driver = drive(**PBT)
    jobs = population(driver)
    names, outputs = [job.work["fit"]["name"] for job in jobs], [job.work["fit"]["output"] for job in jobs]
    config = as_tune_has_it(jobs[0], source=2)
    before, kept = json.dumps(config), dict(jobs[0].point)
    new = driver.director.exploit(config)
    assert json.dumps(config) == before
    work = {
        "fit": {"name": "L1-w0.25-lr0.002", "output": outputs[0], "fingerprint": f"fp-{names[0]}", "seed": 0, "knobs": config["point"]},
        "made_from": {"name": "L1-w0.25-lr0.002"},
        "adopt": {"output": outputs[2], "step": 20},  # step 25 has no score
    }
    assert new == {**config, "work": {"cpus": 2, **work}}
    *_, event = [json.loads(line) for line in driver.ledger.path.read_bytes().splitlines()]
    assert {key: event[key] for key in event if key not in ("seq", "time")} == {
        "kind": "exploit", "number": 0, "source": 2, "step": 20, "point": config["point"], "name": "L1-w0.25-lr0.002",
    }  # fmt: skip
    assert driver.notes.calls[-1] == ("exploited", 0, "L1-w0.25-lr0.002")
    (exploit,) = driver.search.trials[0].exploits
    assert exploit == (2, 20, kept)

    # Another one goes on from it: its checkpoints are where they were.
    other = driver.director.exploit(as_tune_has_it(jobs[1], source=0, **{"losses.soft.weight": 0.75}))
    assert other["work"]["adopt"] == {"output": outputs[0], "step": 20}

    again = drive(**PBT)
    resumed = [again.director.next() for _ in range(4)]
    assert [job.number for job in resumed] == [0, 1, 2, 3]
    assert (resumed[0].point, resumed[0].work) == (config["point"], work)
    assert resumed[1].work == {key: other["work"][key] for key in ("fit", "made_from", "adopt")}
    assert [job.work for job in resumed[2:]] == [job.work for job in jobs[2:]]
    assert again.director.next() == "wait"


def test_the_last_exchange_of_a_trial_is_what_counts(drive):
    driver = drive(**PBT)
    jobs = population(driver)
    driver.director.exploit(as_tune_has_it(jobs[0], source=3))
    driver.director.result(2, said((40, scores(75, 0.9))))
    driver.director.exploit(as_tune_has_it(jobs[0], source=2, **{"losses.soft.weight": 0.4}))
    assert [(e.source, e.step) for e in driver.search.trials[0].exploits] == [(3, 20), (2, 40)]
    work = drive(**PBT).director.next().work
    assert (work["fit"]["name"], work["adopt"]) == ("L1-w0.4-lr0.002", {"output": jobs[2].work["fit"]["output"], "step": 40})


def test_knobs_under_which_other_rows_are_seen_are_not_taken_over(drive):
    driver = drive(**PBT)
    jobs = population(driver)
    ledger, notes = driver.ledger.path.read_bytes(), list(driver.notes.calls)
    with pytest.raises(ConfigError, match=r"DST-2020.*trial 1: expected 100 rows but found 60"):
        driver.director.exploit(as_tune_has_it(jobs[1], source=3, **{"losses.soft.weight": 0.0}))
    assert (driver.ledger.path.read_bytes(), driver.notes.calls) == (ledger, notes)
    assert (driver.search.trials[1].exploits, driver.search.trials[1].task.point) == ([], jobs[1].point)


def test_knobs_that_make_no_valid_job_are_not_taken_over(drive):
    driver = drive(**PBT, refuses=["L1-w0.25-lr0.002"])
    jobs = population(driver)
    ledger = driver.ledger.path.read_bytes()
    with pytest.raises(ConfigError, match="DST-2011"):
        driver.director.exploit(as_tune_has_it(jobs[1], source=3))
    assert driver.ledger.path.read_bytes() == ledger


def test_after_it_is_closed_no_trial_goes_on_from_another_one(drive):
    driver = drive(**PBT)
    jobs = population(driver)
    driver.director.close()
    ledger, notes = driver.ledger.path.read_bytes(), list(driver.notes.calls)
    config = as_tune_has_it(jobs[0], source=2)
    assert driver.director.exploit(config) == as_tune_has_it(jobs[0], source=2)
    assert (driver.ledger.path.read_bytes(), driver.notes.calls) == (ledger, notes)
    assert (driver.search.trials[0].exploits, driver.search.trials[0].task.point) == ([], jobs[0].point)


def test_a_population_keeps_its_checkpoints_until_all_of_it_is_over(drive):
    driver = drive(**PBT, finalists=1, seeds=1)
    jobs = population(driver)
    driver.director.exploit(as_tune_has_it(jobs[3], source=2))
    driver.director.result(0, said(state="failed", cause="why"))
    driver.director.gone(0)
    for job in jobs[1:]:
        assert driver.director.next() == "wait"
        driver.director.result(job.number, said((50, scores(100, 0.5 + 0.1 * job.number)), state="finished"))
        driver.director.gone(job.number)
        assert driver.notes.of("discard") == []
    baseline = driver.director.next()
    assert driver.notes.of("discard") == [("discard", number) for number in range(4)]
    # The best one is trained again with the knobs that it had in the end.
    assert (baseline.role, baseline.work["fit"]["knobs"]) == ("baseline", {"training.learning_rate": 0.002, "losses.soft.weight": 0.25})
    driver.director.result(baseline.number, said(state="finished"))
    driver.director.gone(baseline.number)
    assert driver.notes.of("discard")[4:] == [("discard", baseline.number)]
    assert driver.director.next().work["fit"]["name"] == "L1-w0.25-lr0.002-seed0"


def test_elsewhere_checkpoints_go_when_their_trial_ends(drive):
    driver = drive({"L1-w0.8": "stopped", "L2-w0.2": "failed: why"}, trials=3, finalists=1, seeds=1).run()
    numbers = list(range(len(driver.search.trials)))
    assert len(numbers) == 6
    assert driver.notes.of("discard") == [("discard", number) for number in numbers]
    for number in numbers:
        calls = [call[0] for call in driver.notes.calls if call[1] == number]
        assert calls[-2:] == ["ended", "discard"]
