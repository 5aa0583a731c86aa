"""The search as a user runs it: one teacher pass, many trials, a decision that can be reproduced; again, changed, killed, with trials that fail."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from mlflow import MlflowClient
from rich.console import Console
from safetensors.torch import load_file

from distillation.errors import ClusterError
from jobs.config import load
from jobs.search import search as run_search
from tests.jobs.place import JOB, furnished, killed
from tuning.ledger import read_search

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ONE, TWO = {"type": "layers", "layers": [0]}, {"type": "layers", "layers": [0, 3]}
SEARCH = {
    "space": {
        "student": {"choice": [ONE, TWO]},
        "losses.soft.weight": {"uniform": [0.1, 1.0]},
        "training.learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
    },
    "trials": 6,
    "keep": {"validation/accuracy": 0.2, "cost/latency_ms_p95": "<= 1000"},
    "finalists": 1,
    "seeds": 2,
}


def write(place, name, search=SEARCH, **changes):
    """A job to search, beside the others: they share corpus, teacher and targets."""
    job = {**{key: value for key, value in JOB.items() if key != "students"}, "student": ONE, **changes, "name": name, "search": search}
    (place.folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    return f"{name}.yaml"


def folder_of(place, name):
    return place.folder / "storage" / "runs" / name / "search"


def recorded(place, name):
    return read_search(folder_of(place, name) / "ledger.jsonl")


def lines(place, name):
    path = folder_of(place, name) / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def ends(place, name):
    """Numbers of trainings in the order in which they ended."""
    return [event["number"] for event in lines(place, name) if event["kind"] == "end" and event["state"] != "refused"]


@pytest.fixture(scope="module")
def here(place, first):
    """Search in this process, beside a Ray that is there already: for what needs no process of its own. Returns what was printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # as the application starts it
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)

    def search(name, *overrides):
        console = Console(file=io.StringIO(), width=120)
        with contextlib.chdir(place.folder):
            run_search(load(f"{name}.yaml", overrides), console)
        return console.file.getvalue()

    yield search
    ray.shutdown()


def refuse(place, *arguments):
    """Exit code and output of a command that fails."""
    process = place.start(*arguments)
    output, _ = process.communicate(timeout=560)
    assert process.returncode != 0, output
    assert "Traceback" not in output
    return process.returncode, output


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def first(place):
    write(place, "hunt")
    output, _ = place.run("search", "hunt.yaml")
    return output


# ---------------------------------------------------------------------------------------------------------------- what it does


def test_it_ends_with_the_front_a_choice_what_the_test_split_says_and_links(place, first):
    search = recorded(place, "hunt")
    plain = re.sub(r"\s+", " ", first)
    assert f"{len(search.trials)} trainings in this run. Teacher forward passes over train and validation: 1; " in plain
    assert "rows asked of it in trainings: 0." in plain
    assert f"Chosen: {search.choice['name']}: the smallest of 2 sizes that keeps cost/latency_ms_p95 <= 1000" in plain
    assert "On the test split, mean of 2 seeds: accuracy" in plain
    assert "over the same student without distillation" in plain
    for title in ("champion", "best job", "report"):
        (where,) = re.findall(rf"^{title} +(/.*)$", first, re.M)
        assert os.path.exists(where), title
    for title in ("MLflow runs", "MLflow charts", "MLflow compare"):
        assert re.search(rf"^{title} +http://127.0.0.1:5000/#/", first, re.M), title


def test_every_size_on_the_front_stands_beside_itself_without_distillation_at_the_same_budget(place, first):
    search = recorded(place, "hunt")
    trials, baselines = search.of_role("trial"), search.of_role("baseline")
    assert [trial.state for trial in search.trials] == ["finished"] * len(search.trials)
    assert len(trials) == 6
    front = {search.trials[number].task.student for number in search.choice["front"]}
    assert sorted(trial.task.student for trial in baselines) == sorted(front)
    for trial in [*trials, *baselines]:
        assert trial.rows == trial.task.rows
        assert trial.curve[-1][0] == 32
    assert {trial.rows for trial in trials} == {640}  # two epochs of 320
    assert {trial.rows for trial in baselines} == {581}  # as many steps over the 200 rows with a label, whose epochs end in small batches
    assert {search.trials[trial.task.of].task.student_key for trial in baselines} == {trial.task.student_key for trial in baselines}
    assert [(trial.task.role, trial.task.seed) for trial in search.trials[len(trials) + len(baselines) :]] == [
        ("refit", 1), ("refit-baseline", 1), ("refit", 2), ("refit-baseline", 2),
    ]  # fmt: skip


def test_the_choice_is_the_smallest_that_keeps_what_was_asked_for(place, first):
    search = recorded(place, "hunt")
    feasible = [trial for trial in search.of_role("trial") if trial.metrics["validation/accuracy"] >= 0.2]
    smallest = min(trial.task.cost["cost/parameters"] for trial in feasible)
    chosen = search.trials[search.choice["trial"]]
    assert chosen.task.cost["cost/parameters"] == smallest
    alike = [trial.metrics["validation/accuracy"] for trial in feasible if trial.task.cost["cost/parameters"] == smallest]
    assert chosen.metrics["validation/accuracy"] == max(alike)
    runs = Runs(place, "hunt")
    latency = search.latencies[chosen.task.student_key]["cost/latency_ms_p95"]
    assert runs.trials[chosen.number].data.metrics["cost/latency_ms_p95"] == latency
    assert set(search.latencies) == {trial.task.student_key for trial in search.of_role("trial")}
    assert {e["role"] for e in search.evaluations} == {"teacher", "student", "baseline"}
    assert len(search.evaluations) == 5  # two seeds of each, and the teacher


def test_the_champion_serves_and_best_yaml_makes_it_again(place, first):
    search, folder = recorded(place, "hunt"), folder_of(place, "hunt")
    refit = search.trials[search.choice["refit"]]
    champion = load_file(folder / "champion" / "model.safetensors")
    # Nothing of it is there any more, so it is trained anew.
    student = place.folder / "storage" / "students" / refit.task.fingerprint
    shutil.rmtree(student)
    output, _ = place.run("run", str(folder / "best.yaml"))
    assert re.search(r"^done student champion", output, re.M)
    assert re.search(r"^found targets of 370 rows", output, re.M)
    again = load_file(student / "model.safetensors")
    assert again.keys() == champion.keys()
    assert all((again[key] == champion[key]).all() for key in champion)
    from transformers import pipeline

    rows = [json.loads(line) for line in (place.folder / "test.jsonl").read_text().splitlines()]
    answers = pipeline("text-classification", model=str(folder / "champion"))([row["text"] for row in rows])
    right = sum(answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)) / len(rows)
    (mine,) = [e for e in search.evaluations if e["name"] == refit.task.name]
    assert right == pytest.approx(mine["quality"]["accuracy"])


class Runs:
    """The runs of a search in MLflow."""

    def __init__(self, place, name):
        self.client = MlflowClient(f"sqlite:///{place.folder}/storage/mlflow.db", f"sqlite:///{place.folder}/storage/mlflow.db")
        self.experiment = self.client.get_experiment_by_name(f"{name}-search")
        runs = self.client.search_runs([self.experiment.experiment_id], max_results=1000)
        (self.parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        mine = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == self.parent.info.run_id]
        assert len(mine) == len(runs) - 1
        self.teacher = [run for run in mine if run.info.run_name == "teacher"]
        self.trials = {int(run.data.tags["distillery.trial"]): run for run in mine if "distillery.trial" in run.data.tags}
        assert len(self.trials) + len(self.teacher) == len(mine)


def test_mlflow_holds_a_run_for_the_search_and_one_for_every_training(place, first):
    search, runs = recorded(place, "hunt"), Runs(place, "hunt")
    assert sorted(runs.trials) == list(range(len(search.trials)))
    assert (runs.parent.info.status, runs.parent.data.metrics["search/front"]) == ("FINISHED", len(search.choice["front"]))
    for number, run in runs.trials.items():
        trial = search.trials[number]
        assert (run.info.run_name, run.info.status, run.data.tags["role"]) == (trial.task.name, "FINISHED", trial.task.role)
        assert float(run.data.params["losses.soft.weight"]) == trial.task.point["losses.soft.weight"]
        assert run.data.params["student.type"] == "layers"
        assert run.data.metrics["validation/accuracy"] == trial.metrics["validation/accuracy"]
        assert run.data.metrics["cost/parameters"] == trial.task.cost["cost/parameters"]
        steps = [point.step for point in runs.client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == sorted(set(steps))
    note = runs.experiment.tags["mlflow.note.content"]
    assert search.choice["name"] in note
    assert f"get-artifact?path=front.png&run_uuid={runs.parent.info.run_id}" in note
    assert {"report.html", "best.yaml", "front.png", "job.yaml"} <= {
        file.path for file in runs.client.list_artifacts(runs.parent.info.run_id)
    }
    version = runs.client.get_model_version_by_alias("hunt", "champion")
    assert version.run_id == runs.trials[search.choice["refit"]].info.run_id


def test_what_is_recorded_can_be_read_by_people_and_machines(place, first):
    search = recorded(place, "hunt")
    started = time.monotonic()
    board, _ = place.run("leaderboard", "hunt.yaml")
    assert time.monotonic() - started < 5
    assert search.choice["name"] in board
    found = json.loads(place.run("leaderboard", "hunt.yaml", "--json")[0])
    assert (found["teacher_passes"], found["teacher_rows_in_trainings"], found["ended"]) == (1, 0, True)
    assert [trial["number"] for trial in found["trials"]].count(search.choice["trial"]) == 1
    beside = json.loads(place.run("compare", "hunt.yaml", "--trial", "0", "--trial", "3", "--json")[0])
    assert [trial["number"] for trial in beside["trials"]] == [0, 3]
    assert beside["rows"]["knobs"]["losses.soft.weight"] == [search.trials[n].task.point["losses.soft.weight"] for n in (0, 3)]
    assert "losses.soft.weight" in place.run("compare", "hunt.yaml")[0]
    page = json.loads(place.run("report", "hunt.yaml", "--json")[0])
    assert search.choice["name"] in Path(page["report"]).read_text()
    assert page["MLflow runs"].startswith("http://127.0.0.1:5000/#/experiments/")
    code, output = refuse(place, "compare", "hunt.yaml", "--trial", "99")
    assert (code, f"expected 0 to {len(search.trials) - 1}" in output) == (2, True)
    code, output = refuse(place, "leaderboard", "hunt.yaml", "name=nobody")
    assert (code, "no runs here yet" in output) == (2, True)


def test_again_nothing_is_trained(place, first):
    before, runs = ends(place, "hunt"), Runs(place, "hunt")
    output, _ = place.run("search", "hunt.yaml")
    assert "0 trainings in this run. Teacher forward passes over train and validation: 1;" in output
    assert ends(place, "hunt") == before
    assert re.search(r"^found evaluation", output, re.M)
    again = Runs(place, "hunt")
    assert {number: run.info.run_id for number, run in again.trials.items()} == {n: run.info.run_id for n, run in runs.trials.items()}
    assert (again.parent.info.run_id, again.parent.info.status) == (runs.parent.info.run_id, "FINISHED")


def test_more_trials_go_on_from_those_that_are_there(place, first, here):
    before = ends(place, "hunt")
    output = here("hunt", "search.trials=7", "search.keep.validation/accuracy=0.1")
    search = recorded(place, "hunt")
    assert len(search.of_role("trial")) == 7
    assert ends(place, "hunt")[: len(before)] == before
    assert len(set(ends(place, "hunt"))) == len(ends(place, "hunt"))
    assert "Teacher forward passes over train and validation: 1;" in output


def test_another_search_over_other_coefficients_runs_no_teacher(place, here):
    space = {"student": SEARCH["space"]["student"], "losses.soft.temperature": {"log_uniform": [1, 8]}}
    write(
        place, "second", {**SEARCH, "space": space, "trials": 4, "scheduler": {"type": "asha"}, "searcher": {"type": "tpe", "startup": 2}}
    )
    output = here("second", "search.seeds=1", "baseline=false")
    assert "Teacher forward passes over train and validation: 0; rows asked of it in trainings: 0." in output
    assert len(recorded(place, "second").of_role("trial")) == 4


# ----------------------------------------------------------------------------------------------------- changed, stopped, killed


def test_a_changed_search_is_refused_with_the_difference_or_begun_under_another_name(place, first):
    code, output = refuse(place, "search", "hunt.yaml", "search.space.losses.soft.weight.uniform=[0.2,1.0]", "training.epochs=3")
    assert code == 8
    assert "search was begun with other settings" in output
    assert "search.space.losses.soft.weight.uniform: [0.1, 1.0] -> [0.2, 1.0]" in output
    assert "training.epochs: 2 -> 3" in output
    assert "name=another-name" in output


def until(place, name, process, wanted):
    """Wait until the ledger holds what is wanted."""
    deadline = time.monotonic() + 120
    while not wanted(lines(place, name)):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)


def ended(count):
    return lambda events: sum(event["kind"] == "end" for event in events) >= count


def outcome(search):
    """What every training gave, by what it was."""
    return {
        (trial.task.role, trial.task.fingerprint): (trial.task.name, trial.state, trial.metrics, trial.rows, trial.task.of)
        for trial in search.trials
    }


def test_killed_and_stopped_it_goes_on_and_ends_as_if_it_had_not_been(place, here):
    """Twice killed with all its processes and once stopped by Ctrl-C: among the trials, in the middle of one, among the refits."""
    write(place, "killed")
    write(place, "whole")
    killed_at = []
    for wanted in (ended(2), ended(4)):
        process = place.start("search", "killed.yaml")
        until(place, "killed", process, wanted)
        killed(process)
        killed_at.append(ends(place, "killed"))
    process = place.start("search", "killed.yaml")
    until(place, "killed", process, lambda events: any(event.get("role") == "refit" for event in events))
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "interrupted; run the same command again to go on from the last checkpoint" in output.splitlines()
    assert "Traceback" not in output
    killed_at.append(ends(place, "killed"))
    place.run("search", "killed.yaml")
    final = ends(place, "killed")
    assert len(set(final)) == len(final)  # no training has ended twice
    for earlier in killed_at:
        assert final[: len(earlier)] == earlier
    here("whole")
    search, whole = recorded(place, "killed"), recorded(place, "whole")
    assert outcome(search) == outcome(whole)
    assert search.choice["trial"] == whole.choice["trial"]
    runs = Runs(place, "killed")
    assert sorted(runs.trials) == list(range(len(search.trials)))
    assert {run.info.status for run in [runs.parent, *runs.trials.values()]} == {"FINISHED"}
    for number, run in runs.trials.items():
        steps = [point.step for point in runs.client.get_metric_history(run.info.run_id, "train/loss")]
        assert steps == [step for step, metrics in whole.trials[number].curve if "train/loss" in metrics]


# --------------------------------------------------------------------------------------------------------------- trials that fail


def test_trials_that_diverge_or_ask_for_too_much_memory_are_recorded_and_the_search_goes_on(place, here):
    huge = {"type": "scratch", "layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 10**12}
    odd = {"type": "scratch", "layers": 1, "hidden_size": 15, "heads": 2, "intermediate_size": 32}
    space = {"student": {"choice": [ONE, huge, odd]}, "losses.soft.weight": {"choice": [0.7, 1.0e38]}}
    write(place, "rough", {"space": space, "trials": 6, "searcher": {"type": "grid"}, "finalists": 1, "seeds": 1})
    output = here("rough")
    search = recorded(place, "rough")
    trials = {
        (trial.task.student, trial.task.point["losses.soft.weight"]): trial for trial in search.of_role("trial") if trial.task.student
    }
    assert trials["L1", 0.7].state == "finished"
    assert trials["L1", 1.0e38].state == "failed"
    assert trials["L1", 1.0e38].cause.startswith("error[DST-4001]: loss or gradient is no longer finite")
    assert (trials["L1H16", 0.7].state, "memory" in trials["L1H16", 0.7].cause) == ("failed", True)
    refused = [trial for trial in search.of_role("trial") if trial.state == "refused"]
    assert len(refused) == 2
    assert all("hidden_size" in trial.cause or "heads" in trial.cause for trial in refused)
    assert "1 trials finished (3 failed, 2 refused)" in output
    runs = Runs(place, "rough")
    failed = runs.trials[trials["L1", 1.0e38].number]
    assert (failed.info.status, "DST-4001" in failed.data.tags["distillery.error"]) == ("FAILED", True)
    assert "loss or gradient is no longer finite" in (folder_of(place, "rough") / "report.html").read_text()
    # Run again, it is left as it was; unless one says so.
    before = ends(place, "rough")
    here("rough")
    assert ends(place, "rough") == before
    here("rough", "search.retry_failed=true")
    assert sorted(ends(place, "rough")[len(before) :]) == sorted(t.number for t in search.of_role("trial") if t.state == "failed")


def test_a_search_in_which_every_trial_fails_the_same_way_ends_with_the_cause(place, here):
    write(place, "hopeless", {**SEARCH, "space": {"losses.soft.weight": {"uniform": [1.0e38, 2.0e38]}}, "trials": 50})
    with pytest.raises(ClusterError, match=r"DST-6005.*every trial fails the same way.*loss or gradient is no longer finite"):
        here("hopeless")
    assert len(recorded(place, "hopeless").trials) < 10


def workers_of(process):
    """Processes that run trials."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if any(part.startswith("ray::") and "ImplicitFunc" in part for part in one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_trial_whose_process_is_killed_is_tried_again_or_recorded(place, first, restarts):
    name = f"lost-{restarts}"
    search = {**SEARCH, "trials": 3, "seeds": 1, "keep": {}, "concurrent": 1}
    write(place, name, search, cluster={**JOB["cluster"], "max_failures": restarts}, baseline=False)
    process = place.start("search", f"{name}.yaml", "training.epochs=20")
    until(place, name, process, lambda events: sum(event["kind"] == "point" for event in events) > 3)
    for one in workers_of(process):
        one.kill()
    output, _ = process.communicate(timeout=560)
    assert process.returncode == 0, output
    found = recorded(place, name)
    assert [trial.state for trial in found.of_role("trial")] == [["failed", "finished"][restarts > 0], "finished", "finished"]
    lost = found.trials[0]
    steps = [step for step, metrics in lost.curve if "train/loss" in metrics]
    assert steps == sorted(set(steps))
    if restarts:
        assert lost.rows == 20 * 320
    else:
        assert re.search("died|killed|crashed|unavailable", lost.cause, re.I), lost.cause


# ------------------------------------------------------------------------------------------------------------- the other engines


def test_a_population_hands_on_weights_and_turns_its_knobs(place, here):
    space = {"losses.soft.weight": {"uniform": [0.1, 1.0]}, "training.learning_rate": {"log_uniform": [1.0e-5, 1.0e-2]}}
    search = {"space": space, "trials": 4, "scheduler": {"type": "pbt", "every": 0.25}, "seeds": 1, "finalists": 1}
    write(place, "people", search, student=TWO)
    here("people", "baseline=false")
    found = recorded(place, "people")
    trials = found.of_role("trial")
    assert [(trial.state, trial.rows) for trial in trials] == [("finished", 640)] * 4
    moved = [trial for trial in trials if trial.exploits]
    assert sum(len(trial.exploits) for trial in trials) == 3  # one of four, at each of three rungs
    runs = Runs(place, "people")
    for trial in moved:
        last = trial.exploits[-1]
        assert trial.task.point != last.point
        source = found.trials[last.source]
        # The learning curve goes on from the other one's checkpoint, not from its own: the same step, the same rows.
        assert last.step in [step for step, metrics in source.curve if "validation/accuracy" in metrics]
        history = runs.client.get_metric_history(runs.trials[trial.number].info.run_id, "knob/training.learning_rate")
        assert history[-1].value == trial.task.point["training.learning_rate"]
        assert runs.trials[trial.number].info.run_name == trial.task.name
    left = {name.removesuffix(".checkpoints") for name in place.storage.list("trials")}
    assert not left & {trial.task.fingerprint for trial in trials}


@pytest.mark.long
def test_trials_of_two_workers_give_what_trials_of_one_give(place, here):
    search = {
        "space": {"losses.soft.weight": {"choice": [0.3, 0.9]}},
        "trials": 2,
        "searcher": {"type": "grid"},
        "seeds": 1,
        "finalists": 1,
    }
    for workers in (1, 2):
        write(place, f"by-{workers}", {**search, "workers_per_trial": workers}, baseline=False)
        here(f"by-{workers}")
    one, two = recorded(place, "by-1"), recorded(place, "by-2")
    for a, b in zip(one.trials, two.trials, strict=True):
        assert (a.task.name, a.task.fingerprint, a.state, b.state) == (b.task.name, b.task.fingerprint, "finished", "finished")
        learned = [point for point in b.curve if not point[1].keys() <= {"cluster/workers", "cluster/restarts", "cluster/wasted_steps"}]
        for (step, ours), (other, theirs) in zip(a.curve, learned, strict=True):
            assert step == other
            for name in ours.keys() & theirs.keys() - {"perf/rows_per_second", "perf/tokens_per_second"}:
                assert math.isclose(ours[name], theirs[name], rel_tol=1e-3, abs_tol=1e-4), (step, name)


def test_more_workers_than_the_cluster_has_are_refused_before_anything_starts(place, here):
    with pytest.raises(ClusterError, match=r"DST-6002.*job does not fit the cluster: search: expected 500 workers a trial"):
        here("hunt", "name=crowd", "search.workers_per_trial=500")
    assert lines(place, "crowd") == []


def test_a_job_without_a_search_says_so(place, first):
    code, output = refuse(place, "search", "job.yaml")
    assert (code, "job has no search" in output) == (2, True)
