"""What a search does next, without Ray: what comes when, points that are refused, trials that fail, and what they report."""

from __future__ import annotations

import math
import time

import pytest

from tests.tuning.driving import CONFIRMED, KEEP, LATENCIES, MEASURED, TRIALS, said, scores, states
from tuning.director import MAX_REFUSED, kind_of
from tuning.ledger import Task, read_search
from tuning.searchers import Outcome

# ------------------------------------------------------------------------------------------------------- what comes when


@pytest.mark.parametrize("room", [1, 3])
@pytest.mark.parametrize("wish", [{"keep": KEEP}, {"objectives": {"validation/accuracy": "max", "cost/latency_ms_p50": "min"}}])
def test_trials_come_first_then_latencies_then_baselines_then_refits(drive, wish, room):
    driver = drive(room=room, **wish).run()
    assert driver.names == TRIALS + MEASURED + CONFIRMED
    assert driver.search.latencies == {
        f"key-{label}": {"cost/latency_ms_p50": ms / 2, "cost/latency_ms_p95": ms} for label, ms in LATENCIES.items()
    }
    assert states(driver.search) == dict.fromkeys(TRIALS + CONFIRMED, "finished")
    assert (driver.director.ran, driver.director.failure, driver.director.next()) == (16, None, "done")
    assert [(trial.task.role, trial.task.of, trial.task.seed) for trial in driver.search.trials[6:10]] == [
        ("baseline", 1, 0), ("baseline", 2, 0), ("refit", 1, 0), ("refit-baseline", 1, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("wish", [{}, {"keep": {"validation/accuracy": 0.65, "cost/parameters": 25}}])
def test_latencies_are_not_measured_where_nobody_asks_for_them(drive, wish):
    assert drive(**wish).run().names == TRIALS + CONFIRMED


def test_latencies_are_measured_for_students_that_some_trial_brought_to_its_end(drive):
    ends = {"L1-w0.2": "stopped", "L2-w0.2": "failed: why", "L2-w0.8": "stopped", "L3-w0.2": "died: why"}
    driver = drive(ends, keep=KEEP).run()
    assert driver.names[6:8] == ["latency of key-L1", "latency of key-L3"]


def test_a_measurement_that_is_there_counts_whatever_becomes_of_its_process(drive):
    driver = drive(trials=1, keep=KEEP).run(calls=7)
    assert driver.names == ["L1-w0.2", "latency of key-L1"]
    assert list(driver.search.latencies) == ["key-L1"]
    driver.director.gone(None, "RayActorError: its process died")
    assert driver.director.failure is None
    assert driver.director.next().role == "baseline"


@pytest.mark.parametrize("way", ["said", "died"])
def test_a_measurement_that_fails_ends_the_search(drive, way):
    driver = drive(trials=1, keep=KEEP).run(calls=6)
    assert driver.names == ["L1-w0.2", "latency of key-L1"]
    assert driver.director.next() == "wait"
    if way == "said":
        driver.director.result(None, said(state="failed", cause="no memory"))
    driver.director.gone(None, "no memory" if way == "died" else None)
    assert "DST-6006" in str(driver.director.failure)
    assert "found no memory" in str(driver.director.failure)
    assert driver.director.next() == "done"
    assert driver.search.latencies == {}
    assert drive(trials=1, keep=KEEP).run().names[:2] == ["latency of key-L1", "L1-base"]


def test_a_job_says_what_is_to_be_run_and_with_whom_it_compares(drive):
    sizes = {"choice": ["L1", "L2", "L3"]}
    driver = drive(space={"student": sizes}, trials=3, scheduler={"type": "asha", "bucket": 2.5}).run()
    # 20 MFLOPs are less than 2.5 times 10 MFLOPs, 30 are not.
    assert [(job.number, job.role, job.bucket, job.point) for job in driver.jobs[:4]] == [
        (0, "trial", 0, {"student": "L1"}), (1, "trial", 0, {"student": "L2"}), (2, "trial", 1, {"student": "L3"}),
        (3, "baseline", 0, {"student": "L1"}),
    ]  # fmt: skip
    fit = {"name": "L2-w0.5", "output": "trials/fp-L2-w0.5", "fingerprint": "fp-L2-w0.5", "seed": 0, "knobs": {"student": "L2"}}
    assert driver.jobs[1].work == {"fit": fit, "made_from": {"name": "L2-w0.5"}}
    assert driver.jobs[1].student_key == "key-L2"


def test_a_student_that_does_not_look_at_the_teacher_has_no_baseline(drive):
    driver = drive(alone=["L2"]).run()
    assert driver.names == TRIALS + [name for name in CONFIRMED if not name.startswith("L2-base")]


@pytest.mark.parametrize(
    ("quality", "better"),
    [("validation/accuracy", 0), ("validation/nll", 1)],  # the first objective that is a quality
)
def test_of_two_of_one_size_on_the_front_the_better_one_gets_the_baseline(drive, quality, better):
    others = {"validation/accuracy": "max", "validation/nll": "min", "cost/parameters": "min"}
    objectives = {quality: others.pop(quality), **others}
    driver = drive(space={"training.learning_rate": {"choice": [1e-3, 2e-3]}}, trials=2, finalists=1, seeds=1, objectives=objectives)
    for accuracy, nll in ((0.7, 1.2), (0.6, 1.0)):
        number = driver.director.next().number
        driver.director.result(number, said((20, {**scores(100, accuracy), "validation/nll": nll}), state="finished"))
        driver.director.gone(number)
    assert sorted(driver.director.decision().front) == [0, 1]
    jobs = [driver.director.next(), driver.director.next()]
    assert [(job.role, driver.search.trials[job.number].task.of) for job in jobs] == [("baseline", better), ("refit", better)]
    assert jobs[0].work["fit"]["name"] == ("L1-base-lr0.001", "L1-base-lr0.002")[better]


# ---------------------------------------------------------------------------------------------------------- refused points


def test_a_refused_point_is_recorded_and_is_no_trial(drive):
    driver = drive(trials=4, refuses=["L1-w0.8", "L2-w0.2"]).run()
    trials = driver.search.of_role("trial")
    assert [trial.state for trial in trials] == ["finished", "refused", "refused", "finished", "finished", "finished"]
    refused = trials[1]
    assert refused.cause == "error[DST-2011]: teacher has no such layer: L1-w0.8: expected 0 to 5 but found 9"
    assert refused.task == Task("trial", "refused", {"student": "L1", "losses.soft.weight": 0.8}, "", "", "", {}, 0)
    assert (refused.seconds, refused.rows, refused.curve) == (0.0, 0, [])
    assert [call for call in driver.notes.calls if call[1] in (1, 2)] == [("ended", 1, "refused"), ("ended", 2, "refused")]
    assert [name for name in driver.names if "base" not in name and "seed" not in name] == ["L1-w0.2", "L2-w0.8", "L3-w0.2", "L3-w0.8"]
    assert driver.searcher.told[1] == (1, {"student": "L1", "losses.soft.weight": 0.8}, Outcome("refused", {}, []))


def test_a_job_that_comes_again_is_refused(drive):
    space = {"student": {"choice": ["L1", "L2"]}, "losses.soft.temperature": {"choice": [1.0, 2.0]}}  # which changes nothing here
    ends = {"L2-w0.5": "failed: why"}
    driver = drive(ends, space=space, trials=4).run()
    assert [(trial.state, trial.cause) for trial in driver.search.of_role("trial")] == [
        ("finished", ""), ("refused", "the same job as trial 0"), ("failed", "why"), ("refused", "the same job as trial 2"),
    ]  # fmt: skip


def test_a_search_of_which_every_point_is_refused_ends_with_the_reason(drive):
    driver = drive(refuses=["all"])
    assert driver.director.next() == "done"
    assert "DST-2017" in str(driver.director.failure)
    assert "L3-w0.8: expected 0 to 5" in str(driver.director.failure)  # of the last one
    assert [trial.state for trial in driver.search.trials] == ["refused"] * 6
    assert driver.director.ran == 0


def test_a_space_without_end_is_given_up_after_so_many_refused_points(drive):
    driver = drive(space={"losses.soft.weight": {"uniform": [0.0, 1.0]}}, searcher={"type": "random"}, refuses=["all"])
    assert driver.director.next() == "done"
    assert "DST-2017" in str(driver.director.failure)
    assert [trial.state for trial in driver.search.trials] == ["refused"] * MAX_REFUSED
    assert len({trial.task.point["losses.soft.weight"] for trial in driver.search.trials}) == MAX_REFUSED


def test_a_space_without_end_that_has_no_other_jobs_is_given_up_once(drive):
    space = {"student": {"choice": ["L1", "L2"]}, "losses.soft.temperature": {"uniform": [1.0, 4.0]}}  # which changes nothing here
    driver = drive(space=space, searcher={"type": "random"}, trials=64)
    jobs = [driver.director.next(), driver.director.next()]
    assert {job.point["student"] for job in jobs} == {"L1", "L2"}
    before = len(driver.search.trials)
    for _ in range(4):
        assert driver.director.next() == "wait"
        assert len(driver.search.trials) == before + MAX_REFUSED
    for job in jobs:
        driver.director.result(job.number, said((20, scores(100, 0.6)), state="finished"))
        driver.director.gone(job.number)
    assert (driver.director.next().role, len(driver.search.of_role("trial"))) == ("baseline", before + MAX_REFUSED)


@pytest.mark.parametrize("kind", ["grid", "random", "tpe"])
def test_a_space_that_is_smaller_than_the_search_ends_it(drive, kind):
    driver = drive(room=2, searcher={"type": kind}, trials=64).run()
    assert sorted(driver.names[:6]) == TRIALS
    assert driver.names[6:8] == ["L1-base", "L2-base"]
    assert (len(driver.search.trials), driver.director.failure) == (16, None)


# ----------------------------------------------------------------------------------------------------------- failed trials


def test_the_search_goes_on_after_a_failed_trial(drive):
    driver = drive({"L1-w0.8": "failed: DST-1203 loss is not finite at step 12", "L3-w0.2": "died: its process died"}).run()
    failed, died = driver.search.trials[1], driver.search.trials[4]
    assert (failed.state, failed.cause, failed.node, failed.seconds) == ("failed", "DST-1203 loss is not finite at step 12", "node-1", 2.0)
    assert (died.state, died.cause) == ("failed", "its process died")
    assert failed.curve == [(10, scores(50, 0.33))]
    # Without L1-w0.8 the smallest of the front is L1-w0.2.
    assert driver.names[6:] == [name.replace("L1-w0.8", "L1-w0.2") for name in CONFIRMED]
    assert driver.director.failure is None


OOM = "failed: OutOfMemoryError: tried to allocate "


@pytest.mark.parametrize("room", [1, 3])
def test_a_search_in_which_everything_fails_the_same_way_ends(drive, room):
    ends = {name: f"{OOM}{size} GiB" for name, size in zip(TRIALS, ("1.50", "2", "12.25", "0.5", "7", "8"), strict=True)}
    driver = drive(ends, room=room).run()
    assert "DST-6005" in str(driver.director.failure)
    assert "found OutOfMemoryError: tried to allocate" in str(driver.director.failure)
    assert driver.names == TRIALS[: 4 + (room - 1)]  # those beside the fourth end, too, and nothing new begins
    assert set(states(driver.search).values()) == {"failed"}
    assert driver.director.next() == "done"


@pytest.mark.parametrize(
    "others",
    [
        {"L1-w0.2": "finished"},
        {"L3-w0.8": "finished", "L2-w0.8": "stopped"},
        {"L1-w0.2": "stopped"},
        {"L2-w0.2": "failed: RuntimeError: worker died"},
    ],
)
def test_a_search_in_which_not_everything_fails_the_same_way_goes_on(drive, others):
    driver = drive({**dict.fromkeys(TRIALS, f"{OOM}1 GiB"), **others}).run()
    assert driver.director.failure is None
    assert driver.names[:6] == TRIALS


def test_three_that_fail_the_same_way_are_not_enough(drive):
    driver = drive(dict.fromkeys(TRIALS, f"{OOM}1 GiB"), trials=3).run()
    assert (driver.names, driver.director.failure) == (TRIALS[:3], None)


# ------------------------------------------------------------------------------------------------------ what trials report


def test_a_trial_that_is_gone_without_a_word_was_stopped(drive):
    driver = drive({"L1-w0.2": "stopped"}).run(calls=3)
    (trial,) = driver.search.trials
    assert (trial.state, trial.cause, trial.node, trial.rows) == ("stopped", "", "node-1", 50)
    assert 0 < trial.seconds < 60
    assert driver.searcher.told[-1] == (
        0,
        trial.task.point,
        Outcome("stopped", {"validation/accuracy": 0.3, "cost/parameters": 10.0}, [(50, 0.3)]),
    )


def test_a_trial_that_is_gone_with_an_error_failed(drive):
    driver = drive({"L1-w0.2": "died: its process died"}).run(calls=3)
    (trial,) = driver.search.trials
    assert (trial.state, trial.cause, trial.node) == ("failed", "its process died", "node-1")
    assert 0 < trial.seconds < 60


@pytest.mark.parametrize("error", [None, "its process died"])
def test_what_a_trial_said_of_its_end_stands(drive, error):
    driver = drive()
    driver.director.next()
    driver.director.result(0, said((20, scores(100, 0.6)), state="finished", answered=30))
    driver.director.gone(0, error)
    (trial,) = driver.search.trials
    assert (trial.state, trial.cause, trial.seconds, driver.search.answered) == ("finished", "", 2.0, 30)
    driver.director.result(0, said((30, scores(100, 0.9)), state="failed", cause="too late"))
    assert (trial.state, trial.metrics) == ("finished", {"validation/accuracy": 0.6})
    assert driver.notes.of("ended", "discard") == [("ended", 0, "finished"), ("discard", 0)]


def test_the_observer_hears_everything_in_order_and_repeated_points_once(drive):
    driver = drive()
    driver.director.next()
    points = [(10, {"train/rows": 50.0, "train/loss": 1.0}), (10, scores(50, 0.3))]
    driver.director.result(0, said(*points))
    driver.director.result(0, said((10, scores(50, 0.3)), (20, scores(100, 0.6)), state="finished"))
    driver.director.gone(0)
    assert driver.notes.calls == [
        ("started", 0), ("point", 0, *points[0]), ("point", 0, *points[1]), ("point", 0, 20, scores(100, 0.6)), ("ended", 0, "finished"),
        ("discard", 0),
    ]  # fmt: skip
    assert driver.search.trials[0].curve == [*points, (20, scores(100, 0.6))]


def test_numbers_that_are_not_finite_reach_the_observer_alone(drive):
    driver = drive()
    driver.director.next()
    odd = {
        "train/rows": 50.0,
        "train/loss": math.inf,
        "train/gradient_norm": -math.inf,
        "validation/accuracy": math.nan,
        "validation/nll": 1.5,
    }
    driver.director.result(0, said((10, odd)))
    driver.director.result(0, said((20, {"train/rows": 100.0, "train/loss": math.nan})))
    ((_, _, step, heard), (_, _, _, later)) = driver.notes.of("point")
    assert step == 10
    assert heard.keys() == odd.keys()
    assert math.isinf(heard["train/loss"])
    assert math.isnan(heard["validation/accuracy"])
    assert math.isnan(later["train/loss"])
    (trial,) = read_search(driver.ledger.path).trials
    assert trial.curve == [(10, {"train/rows": 50.0, "validation/nll": 1.5}), (20, {"train/rows": 100.0})]
    assert trial.metrics == {"validation/nll": 1.5}


def test_the_searcher_is_told_of_every_end_by_its_draw(drive):
    ends = {"L1-w0.8": "stopped", "L2-w0.8": "failed: why"}
    driver = drive(ends, room=2, refuses=["L2-w0.2"], trials=4).run()
    told = {draw: outcome for draw, _, outcome in driver.searcher.told}
    assert told == {
        0: Outcome("finished", {"validation/accuracy": 0.60, "cost/parameters": 10.0}, [(50, 0.30), (100, 0.60)]),
        1: Outcome("stopped", {"validation/accuracy": 0.33, "cost/parameters": 10.0}, [(50, 0.33)]),
        2: Outcome("refused", {}, []),
        3: Outcome("failed", {"validation/accuracy": 0.32, "cost/parameters": 20.0}, [(50, 0.32)]),
        4: Outcome("finished", {"validation/accuracy": 0.69, "cost/parameters": 30.0}, [(50, 0.345), (100, 0.69)]),
    }
    assert len(driver.searcher.told) == 5  # not of baselines and refits
    again = drive(trials=4)  # whose searcher knows as much
    assert [(draw, outcome) for draw, _, outcome in again.searcher.told] == sorted(told.items())


def test_when_the_time_is_over_no_trial_is_drawn_but_what_there_is_is_confirmed(drive):
    driver = drive(time_budget_s=1.0, keep=KEEP, room=2).run(calls=3)
    assert driver.names == ["L1-w0.2", "L1-w0.8"]
    time.sleep(1.1)
    driver.run()
    assert driver.names[2:] == ["latency of key-L1", *(name for name in CONFIRMED if name.startswith("L1"))]
    assert len(driver.search.of_role("trial")) == 2


def test_a_score_that_is_not_a_number_reaches_the_observer_beside_a_point_of_its_step(drive):
    driver = drive()
    driver.director.next()
    driver.director.result(0, said((10, {"train/rows": 50.0, "train/loss": 1.0}), (10, {"train/rows": 50.0, "validation/nll": math.nan})))
    assert [sorted(metrics) for *_, metrics in driver.notes.of("point")] == [
        ["train/loss", "train/rows"],
        ["train/rows", "validation/nll"],
    ]
    assert driver.search.trials[0].curve == [(10, {"train/rows": 50.0, "train/loss": 1.0})]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("error[DST-4001]: no longer finite: step 3, rows 3fa2", "error[DST-4001]: no longer finite: step 40, rows b7c1", True),
        ("error[DST-4001]: no longer finite: step 3", "error[DST-5001]: no space: /disk", False),
        ("RuntimeError: tried to allocate 64 bytes", "RuntimeError: tried to allocate 128 bytes", True),
        ("RuntimeError: tried to allocate", "ValueError: no such thing", False),
    ],
)
def test_causes_are_alike_whatever_step_and_rows(one, other, alike):
    assert (kind_of(one) == kind_of(other)) is alike
