"""The main job as a user runs it: from files and a model folder to students, a table, a report and runs in MLflow; again, changed, killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from distillation import store
from distillation.storage import Storage
from tests.jobs.place import JOB, furnished, killed
from tests.tiny import LABELS, model_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def first(place):
    return place.run("run", "job.yaml")


class Recorded:
    """The runs of a job in MLflow, by the end of their key."""

    def __init__(self, place, plan):
        self.client = MlflowClient(f"sqlite:///{place.folder}/storage/mlflow.db")
        self.experiment = self.client.get_experiment_by_name(plan.job.name)
        every = self.client.search_runs([self.experiment.experiment_id])
        self.parents = [run for run in every if "mlflow.parentRunId" not in run.data.tags]
        key = f"{plan.job.name}/{plan.fingerprint}"
        (self.parent,) = [run for run in self.parents if run.data.tags["distillery.run"] == key]
        mine = [run for run in every if run.data.tags.get("mlflow.parentRunId") == self.parent.info.run_id]
        self.children = {run.data.tags["distillery.run"].removeprefix(f"{key}/"): run for run in mine}

    def steps(self, name, metric="train/loss"):
        return [point.step for point in self.client.get_metric_history(self.children[name].info.run_id, metric)]

    def points(self):
        """Of all that the job measures of itself; the nodes are measured whenever it runs."""
        named = [
            (run, name) for run in [self.parent, *self.children.values()] for name in run.data.metrics if not name.startswith("system/")
        ]
        return sum(len(self.client.get_metric_history(run.info.run_id, name)) for run, name in named)

    def artifacts(self, run, folder=None):
        return {file.path for file in self.client.list_artifacts(run.info.run_id, folder)}


def result_of(place, plan, name):
    (run,) = [run for run in plan.runs if run.name == name]
    return store.find(place.storage, run.stage.folder).facts["result"]


def evaluated(place):
    return {e["name"]: e for e in json.loads((place.plan().results / "evaluation.json").read_text())}


def test_a_job_ends_with_a_table_and_says_where_to_look(place, first):
    output, _ = first
    plain = re.sub(r"\s+", " ", output)
    assert "corpus: train 320, validation 50, test 90 rows (200 of train labelled)" in plain
    assert "370 rows answered" in plain
    for name in ("teacher", "cut-baseline", "cut", "probe-baseline", "probe"):
        assert re.search(rf"^ ?{name} +\d+\.\d ?%? ?±", output, re.M), output
    assert f"report          {place.plan().results}/report.html" in output
    assert "MLflow runs     http://127.0.0.1:5000/#/experiments/1/runs" in output
    assert "compare-runs" in output
    found = evaluated(place)
    assert found["teacher"]["quality"]["accuracy"] > 0.7
    assert found["cut"]["against"]["agreement"] > 0.8
    assert found["probe"]["cost"]["parameters"] == found["teacher"]["cost"]["parameters"]
    assert found["cut"]["baseline"] == "cut-baseline"


def test_students_serve_under_plain_transformers(place, first):
    from transformers import pipeline

    rows = [json.loads(line) for line in (place.folder / "test.jsonl").read_text().splitlines()]
    for name in ("cut", "probe"):
        serve = pipeline("text-classification", model=str(place.plan().results / "students" / name))
        answers = [answer["label"] for answer in serve([row["text"] for row in rows])]
        right = sum(answer == row["label"] for answer, row in zip(answers, rows, strict=True))
        assert right / len(rows) == pytest.approx(evaluated(place)[name]["quality"]["accuracy"]), name
    assert (place.plan().results / "report.html").stat().st_size > 50_000


def test_everything_is_in_mlflow(place, first):
    recorded = Recorded(place, place.plan())
    assert len(recorded.parents) == 1
    assert set(recorded.children) == {"teacher", "cut", "cut-baseline", "probe", "probe-baseline"}
    assert {run.info.status for run in [recorded.parent, *recorded.children.values()]} == {"FINISHED"}
    params = recorded.parent.data.params
    assert (params["training.epochs"], params["losses.soft.temperature"], params["corpus.part_rows"]) == ("2", "2.0", "64")
    assert {(i.dataset.name, i.tags[0].value) for i in recorded.parent.inputs.dataset_inputs} == {
        ("corpus", "training"),
        ("targets", "teacher"),
    }
    assert {"report.html", "evaluation.json", "job.yaml", "figures"} <= recorded.artifacts(recorded.parent)
    assert "figures/learning_curves.png" in recorded.artifacts(recorded.parent, "figures")
    for name, run in recorded.children.items():
        kinds = {metric.split("/")[0] for metric in run.data.metrics}
        assert {"train", "validation", "test", "cost"} <= kinds, name
        assert recorded.steps(name) == list(range(1, int(run.data.params["derived.steps"]) + 1)), name
        assert recorded.steps(name, "test/accuracy") == [0]
    cut = recorded.children["cut"]
    assert recorded.children["cut-baseline"].data.params["derived.steps"] == cut.data.params["derived.steps"]
    assert recorded.steps("cut", "validation/agreement")[0] == 10
    assert "losses.soft.weight" in cut.data.params
    assert "losses.soft.weight" not in recorded.children["cut-baseline"].data.params
    assert cut.data.metrics["test/accuracy"] == evaluated(place)["cut"]["quality"]["accuracy"]
    models = recorded.client.search_logged_models([recorded.experiment.experiment_id])
    assert {model.name: str(model.status) for model in models} == {"cut": "READY", "probe": "READY"}


def test_nothing_is_left_in_the_home_folder_and_by_ray(place, first):
    written = [str(path.relative_to(place.folder / "home")) for path in (place.folder / "home").rglob("*") if path.is_file()]
    assert [path for path in written if "ray" in path.lower() or "token" in path.lower()] == []
    assert place.storage.list(".ray") == []
    assert sorted(path.name for path in place.folder.iterdir()) == sorted(
        ["home", "job.yaml", "labelled.csv", "model", "storage", "test.jsonl", "unlabelled.jsonl", "validation.csv"]
    )


def test_again_finds_everything(place, first):
    recorded = Recorded(place, place.plan())
    points, runs = recorded.points(), len(recorded.parents) + len(recorded.children)
    output, seconds = place.run("run", "job.yaml")
    for line in ("corpus", "teacher", "targets of 370 rows", "student cut", "baseline cut-baseline", "student probe", "evaluation"):
        assert re.search(rf"^found {line}", output, re.M), line
    assert not re.search(r"^done (teacher|targets|student|baseline|corpus|evaluation)", output, re.M)
    assert seconds < 0.6 * first[1]
    again = Recorded(place, place.plan())
    assert (again.points(), len(again.parents) + len(again.children)) == (points, runs)
    assert again.parent.info.status == "FINISHED"
    assert re.findall(r"^.*±.*$", output, re.M) == re.findall(r"^.*±.*$", first[0], re.M)


def started_until(place, file, *arguments):
    """A command that has gone on until there is a file in the storage, or a later one of its kind."""
    process = place.start(*arguments)
    deadline = time.monotonic() + 120
    folder, _, name = file.rpartition("/")
    while not [one for one in place.storage.list(folder) if one >= name]:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)
    return process


TELLING = """
import jobs.evaluation
from jobs.cli import main

whole = jobs.evaluation.together
def telling(shares):
    print("shares", [len(share.said["teacher"].said) for share in shares])
    return whole(shares)
jobs.evaluation.SHARE_ROWS, jobs.evaluation.together = 8, telling
main()
"""


def test_several_workers_evaluate_to_the_same_numbers(place, first):
    change = ("name=several", "evaluation.repeats=11", "evaluation.batch_tokens=256", "cluster.workers=2")
    command = [sys.executable, "-c", TELLING, "run", "job.yaml", *change]
    done = subprocess.run(command, cwd=place.folder, env=place.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = re.findall(r"shares \[(\d+), (\d+)\]", done.stdout)
    assert min(map(int, told)) > 20
    assert sum(map(int, told)) == 90
    found = json.loads((place.plan(*change).results / "evaluation.json").read_text())
    assert len(found) == 5
    for e in found:
        for name, value in evaluated(place)[e["name"]]["quality"].items():
            assert e["quality"][name] == pytest.approx(value, abs=1e-5), (e["name"], name)


def test_changed_and_killed_in_training_it_goes_on_from_the_checkpoint(place, first):
    change = ("training.epochs=60", "baseline=false")
    before = store.find(place.storage, place.plan().runs[0].stage.folder)
    plan = place.plan(*change)
    student = plan.runs[0].stage.folder
    stopped = started_until(place, f"{student}.checkpoints/step-00000020", "run", "job.yaml", *change)
    os.killpg(stopped.pid, signal.SIGINT)
    output, _ = stopped.communicate(timeout=30)
    assert stopped.returncode == 75, output
    assert output.endswith("interrupted; run the same command again to go on from the last checkpoint\n")
    assert "Traceback" not in output
    reached = int(place.storage.list(f"{student}.checkpoints")[-1].removeprefix("step-"))

    killed(started_until(place, f"{student}.checkpoints/step-{reached + 40:08d}", "run", "job.yaml", *change))
    assert store.find(place.storage, student) is None

    output, _ = place.run("run", "job.yaml", *change)
    for line in ("corpus", "teacher", "targets of 370 rows"):
        assert re.search(rf"^found {line}", output, re.M), line
    assert re.search(r"^done student cut ", output, re.M)
    result = result_of(place, plan, "cut")
    assert result["resumed_at"] >= reached + 40 >= 60
    assert result["resumed_at"] % 10 == 0
    assert result["steps"] == 30 * before.facts["result"]["steps"]
    recorded = Recorded(place, plan)
    assert len(recorded.parents) == 2
    assert recorded.parent.info.status == "FINISHED"
    for name, run in recorded.children.items():
        assert recorded.steps(name) == list(range(1, int(run.data.params["derived.steps"]) + 1)), name


def adopted(place, name, **changes):
    """A job whose teacher is the one just trained, with its labels in another order; the student is a copy of it that hardly trains."""
    trained = place.folder / "storage" / place.plan().teacher.folder
    folder = place.folder / "turned"
    if not folder.exists():
        order = [2, 0, 1]
        model_folder(folder)
        tensors = load_file(trained / "model.safetensors")
        tensors["classifier.weight"], tensors["classifier.bias"] = tensors["classifier.weight"][order], tensors["classifier.bias"][order]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((trained / "config.json").read_text())
        names = [LABELS[i] for i in order]
        config |= {"id2label": dict(enumerate(names)), "label2id": {label: i for i, label in enumerate(names)}}
        (folder / "config.json").write_text(json.dumps(config))
    job = {
        **JOB, "name": name, "teacher": {"model": "turned"}, "students": {"copy": {"type": "layers", "layers": [0, 1, 2, 3]}},
        "training": {"steps": 2, "batch_tokens": 256, "learning_rate": 1e-6, "precision": "fp32"}, "baseline": False, **changes,
    }  # fmt: skip
    (place.folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    return f"{name}.yaml"


def test_a_trained_teacher_with_its_labels_in_another_order_and_storage_in_an_object_store(place, first):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        uri = f"s3://bucket/here?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        job = adopted(
            place, "remote", cluster={"cpus_per_worker": 1, "storage": uri}, tracking={"uri": f"sqlite:///{place.folder}/remote.db"}
        )
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "DISTILLERY_CACHE": str(place.folder / "cache")}
        keys["DISTILLERY_STATE"] = str(place.folder / "state")
        output, _ = place.run("run", job, **keys)
        assert re.search(r"^done student copy", output, re.M)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in keys.items():
                patch.setenv(name, value)
            remote = Storage(uri)
            assert {"corpora", "runs", "students", "targets", "teachers"} <= set(remote.list(""))
            (results,) = [f"runs/remote/{name}" for name in remote.list("runs/remote")]
            assert remote.list(results) == ["evaluation.json", "job.yaml", "report.html", "students"]
            assert "model.safetensors" in remote.list(f"{results}/students/copy")
            found = {e["name"]: e for e in json.loads(remote.read(f"{results}/evaluation.json"))}
        assert found["teacher"]["quality"]["accuracy"] == evaluated(place)["teacher"]["quality"]["accuracy"]
        assert found["copy"]["against"]["agreement"] > 0.97
        assert found["copy"]["labels"] == list(LABELS)
    finally:
        server.stop()
