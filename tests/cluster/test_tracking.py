"""Against real MLflow: SQLite directly, and servers that start late, die and come back. Only the journal is allowed to be fast."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from cluster import links
from cluster.config import TrackingConfig
from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from distillation.errors import ConfigError, ConflictError, InputError, TrackingError

OPTIONS = {"default_uri": "sqlite:///unused.db", "experiment": "docstrings"}
JOB, STUDENT = "docstrings", "docstrings/L3-1a2b"


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes seconds, copying the file does not."""
    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> str:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


class Server:
    """What `distill ui` starts on a database, on a port that stays the same when it is started again."""

    def __init__(self, database: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri, self.database, self.folder = f"http://127.0.0.1:{self.port}", database, folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = "import sys; from cluster.links import ui; sys.exit(ui(sys.argv[1], sys.argv[2], int(sys.argv[3])))"
        command = [sys.executable, "-c", script, self.database, str(self.folder / "artifacts"), str(self.port)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=log, stderr=log, start_new_session=True)
        until(self._healthy, 60)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it to everything in the foreground."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        assert self.process.wait(20) == 0
        self.process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@pytest.fixture
def server(database: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(database, tmp_path)
    yield server
    server.kill()


def until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def options(tmp_path: Path) -> dict[str, object]:
    return {**OPTIONS, "artifact_root": str(tmp_path / "files")}


def runs_of(uri: str) -> dict[str, Run]:
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("docstrings")
    found = client.search_runs([experiment.experiment_id])
    runs = {run.data.tags["distillery.run"]: run for run in found}
    assert len(runs) == len(found), "a run exists twice"
    return runs


def history(uri: str, run: Run, metric: str) -> list[tuple[int, float]]:
    points = mlflow.MlflowClient(uri).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_journal_resumes_where_a_killed_process_stopped(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"train/loss": 2.0, "validation/accuracy": 0.5}, step=10)
        journal.metrics(JOB, {"train/loss": 1.5}, step=20)
        first = journal.id
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 4, "time": 17, "kind": "metr')
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        assert (journal.id, journal.count) == (first, 4)
        journal.metrics(JOB, {"train/loss": 9.0, "validation/accuracy": 0.6}, step=20)
        journal.metrics(JOB, {"train/loss": 9.0}, step=15)
        events = [event for event, _ in journal.events()]
    assert [event["seq"] for event in events] == [0, 1, 2, 3, 4]
    assert events[4]["values"] == {"validation/accuracy": 0.6}


def test_journal_keeps_the_first_value_of_a_parameter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.params(JOB, {"training.epochs": 3, "training.seed": 0})
    with Journal(path) as journal:
        journal.params(JOB, {"training.epochs": 5, "training.seed": 0, "training.precision": None})
        assert journal.events()[-1][0]["values"] == {"training.precision": "None"}
    assert "keeps the first value of training.epochs" in caplog.text


def test_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "tracking.jsonl"), pytest.raises(ConflictError, match="DST-8101"):
        Journal(tmp_path / "tracking.jsonl")
    Journal(tmp_path / "tracking.jsonl").close()


def test_altered_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"loss": 1.0}, step=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(InputError, match=rf"DST-3501.*at byte {len(lines[0])}"):
        Journal(path)


def test_journal_survives_kill_and_threads(tmp_path: Path) -> None:
    """4 threads, then SIGKILL: all of them are there, whole and numbered."""
    path = tmp_path / "tracking.jsonl"
    script = f"""
import os, signal, threading
from pathlib import Path
from cluster.journal import Journal
journal = Journal(Path({str(path)!r}))
for t in range(4):
    journal.run(f"r{{t}}", name="r")
def work(t):
    for step in range(99):
        journal.metrics(f"r{{t}}", {{"loss": step / 2}}, step)
threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == -signal.SIGKILL
    with Journal(path) as journal:
        events = [event for event, _ in journal.events()]
        assert [event["seq"] for event in events] == list(range(401))
        assert journal.finish_unfinished("KILLED") == ["r0", "r1", "r2", "r3"]
        assert journal.events(most=10_000)[-1][0]["time"] == [e for e in events if e.get("key") == "r3"][-1]["time"]


def test_everything_arrives_and_a_second_job_goes_on_with_the_same_runs(database: str, tmp_path: Path) -> None:
    config = TrackingConfig(uri=database)
    picture = tmp_path / "curve.txt"
    picture.write_text("first")
    long, odd = "x" * 7000, "losses.c++/ä;"
    with Journal(tmp_path / "tracking.jsonl") as journal, Tracker(config, journal, **options(tmp_path), note="# Hello") as tracker:
        journal.run(JOB, name="docstrings", description="**main**")
        journal.run(STUDENT, name="L3", parent=JOB, tags={"role": "student"})
        journal.params(STUDENT, {f"p{i:03}": i for i in range(250)} | {"long": long, odd: "kept", "n" * 300: "long key"})
        for step in range(2500):
            journal.metrics(STUDENT, {"train/loss": step / 4}, step)
        journal.metrics(STUDENT, {"train/gradient": math.inf, "train/other": 1.0}, step=12)
        journal.dataset(STUDENT, "docstrings", "0123456789abcdef" * 4, "s3://bucket/corpora/x", "training")
        journal.file(STUDENT, picture, "plots")
        journal.finish(STUDENT, "FINISHED")
    assert tracker.close() == 0
    picture.write_text("second")
    with Journal(tmp_path / "tracking.jsonl") as journal, Tracker(config, journal, **options(tmp_path)) as again:
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        journal.metrics(STUDENT, {"train/loss": -1.0}, step=2499)
        journal.metrics(STUDENT, {"test/accuracy": 0.75}, step=2500)
        journal.file(STUDENT, picture, "plots")
        journal.finish(STUDENT, "KILLED")
        journal.finish(JOB, "FINISHED")

    runs, client = runs_of(database), mlflow.MlflowClient(database)
    job, student = runs[JOB], runs[STUDENT]
    assert set(runs) == {JOB, STUDENT}
    assert student.data.tags["mlflow.parentRunId"] == job.info.run_id
    assert (job.info.run_name, student.info.run_name) == ("docstrings", "L3")
    assert (job.info.status, student.info.status) == ("FINISHED", "KILLED")
    assert (job.data.tags["mlflow.note.content"], student.data.tags["role"]) == ("**main**", "student")
    assert history(database, student, "train/loss") == [(step, step / 4) for step in range(2500)]
    assert history(database, student, "test/accuracy") == [(2500, 0.75)]
    assert student.data.tags["nonfinite/train/gradient"] == "inf at step 12"
    assert "train/gradient" not in student.data.metrics
    assert len(student.data.params) == 253
    assert student.data.params["p249"] == "249"
    assert student.data.params["long"] == "x" * 5990 + " ... [cut]"
    assert student.data.params["losses.c:2b:2b/ä:3b"] == "kept"
    assert [value for name, value in student.data.params.items() if name.startswith("nnn") and len(name) == 250] == ["long key"]
    dataset = student.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest, dataset.source_type) == ("docstrings", "0123456789abcdef0123456789abcdef0123", "s3")
    assert Path(client.download_artifacts(student.info.run_id, "plots/curve.txt", str(tmp_path))).read_text() == "second"
    events = [json.loads(line) for line in (tmp_path / "tracking.jsonl").read_bytes().splitlines()]
    ends = [event["time"] for event in events if event["kind"] == "finish" and event["key"] == STUDENT]
    assert (student.info.start_time, student.info.end_time) == (events[2]["time"], ends[-1])
    experiment = client.get_experiment_by_name("docstrings")
    assert experiment.tags["mlflow.note.content"] == "# Hello"
    assert again.run_url(STUDENT) == f"http://127.0.0.1:5000/#/experiments/1/runs/{student.info.run_id}?workflowType=machine_learning"
    assert again.compare_url([JOB, "other"]) is None


def test_killed_job_goes_on_with_its_runs(database: str, tmp_path: Path) -> None:
    """SIGKILL while metrics are recorded and delivered; the next process repeats steps, as training does after its last checkpoint."""
    script = f"""
from pathlib import Path
from cluster.config import TrackingConfig
from cluster.delivery import Tracker
from cluster.journal import Journal
import itertools, time
with Journal(Path({str(tmp_path / "t.jsonl")!r})) as journal, Tracker(
    TrackingConfig(uri={database!r}), journal, default_uri="", experiment="docstrings", artifact_root={str(tmp_path / "files")!r}
) as tracker:
    journal.run({JOB!r}, name="docstrings")
    journal.run({STUDENT!r}, name="L3", parent={JOB!r})
    for step in itertools.count():
        journal.metrics({STUDENT!r}, {{"train/loss": step / 4}}, step)
        if tracker.run_url({STUDENT!r}) and step % 100 == 0:
            print(step, flush=True)
        time.sleep(0.001)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE) as process:
        reached = [int(process.stdout.readline()) for _ in range(10)][-1]
        process.kill()
    assert {run.info.status for run in runs_of(database).values()} == {"RUNNING"}
    with Journal(tmp_path / "t.jsonl") as journal, Tracker(TrackingConfig(uri=database), journal, **options(tmp_path)):
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        for step in range(reached - 500, reached + 500):
            journal.metrics(STUDENT, {"train/loss": step / 4}, step)
        journal.finish(STUDENT, "FINISHED")
        journal.finish(JOB, "FINISHED")
    runs = runs_of(database)
    assert {key: run.info.status for key, run in runs.items()} == {JOB: "FINISHED", STUDENT: "FINISHED"}
    assert history(database, runs[STUDENT], "train/loss") == [(step, step / 4) for step in range(reached + 500)]


def test_lost_state_and_two_journals(database: str, tmp_path: Path) -> None:
    """Killed between delivery and saving the state: all is delivered again and nothing is there twice. Another journal has other runs."""
    for name in ("a", "b"):
        with Journal(tmp_path / f"{name}.jsonl") as journal:
            journal.run(JOB, name=name)
            journal.params(JOB, {"p": 1})
            journal.metrics(JOB, {"loss": 0.5}, step=1)
            journal.metrics(JOB, {"loss": 0.25}, step=2)
            journal.finish(JOB, "FINISHED")
            assert deliver(TrackingConfig(uri=database), journal, **options(tmp_path)) == 6
            assert deliver(TrackingConfig(uri=database), journal, **options(tmp_path)) == 0
            (tmp_path / f"{name}.jsonl.state.json").unlink()
            assert deliver(TrackingConfig(uri=database), journal, **options(tmp_path)) == 6
    client = mlflow.MlflowClient(database)
    found = client.search_runs(["1"])
    assert sorted(run.info.run_name for run in found) == ["a", "b"]
    assert [history(database, run, "loss") for run in found] == [[(1, 0.5), (2, 0.25)]] * 2


def test_other_database_gets_everything(database: str, empty_database: Path, tmp_path: Path) -> None:
    """The view can be rebuilt; runs that a killed job left open end when it was last heard of."""
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"loss": 0.5}, step=1)
        last = journal.events()[-1][0]["time"]
        assert deliver(TrackingConfig(uri=database), journal, **options(tmp_path)) == 4
        shutil.copy(empty_database, tmp_path / "mlflow.db")
        assert deliver(TrackingConfig(uri=database), journal, **options(tmp_path)) == 4
    run = runs_of(database)[JOB]
    assert (run.info.status, run.info.end_time) == ("KILLED", last)
    assert history(database, run, "loss") == [(1, 0.5)]


def test_a_refused_event_does_not_hold_up_the_rest(database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        deliver(TrackingConfig(uri=database), journal, **options(tmp_path))
        mlflow.MlflowClient(database).delete_run(runs_of(database)[STUDENT].info.run_id)
        journal.metrics(STUDENT, {"loss": 1.0}, step=1)
        journal.metrics(JOB, {"loss": 2.0}, step=1)
        deliver(TrackingConfig(uri=database), journal, **options(tmp_path))
    assert history(database, runs_of(database)[JOB], "loss") == [(1, 2.0)]
    assert f"refused a part of {STUDENT}" in caplog.text


def test_failed_job_marks_its_runs(database: str, tmp_path: Path) -> None:
    def job() -> None:
        with Journal(tmp_path / "t.jsonl") as journal, Tracker(TrackingConfig(uri=database), journal, **options(tmp_path)):
            journal.run(JOB, name="docstrings")
            journal.run(STUDENT, name="L3", parent=JOB)
            journal.finish(STUDENT, "FINISHED")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        job()
    assert {key: run.info.status for key, run in runs_of(database).items()} == {JOB: "FAILED", STUDENT: "FINISHED"}


def test_two_jobs_create_one_experiment_at_once(database: str, tmp_path: Path) -> None:
    def job(name: str) -> None:
        with Journal(tmp_path / f"{name}.jsonl") as journal:
            journal.run(name, name=name)
            deliver(TrackingConfig(uri=database), journal, **options(tmp_path))

    threads = [threading.Thread(target=job, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(runs_of(database)) == {"a", "b", "c"}


def test_server_that_starts_late_and_dies_on_the_way(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Down at the start, up, killed while metrics are sent, up again: each value arrives once, and recording never waits."""
    slowest = 0.0
    with (
        Journal(tmp_path / "t.jsonl") as journal,
        Tracker(TrackingConfig(uri=server.uri), journal, **OPTIONS, artifact_root=None) as tracker,
    ):

        def steps(first: int, last: int) -> None:
            nonlocal slowest
            for step in range(first, last):
                before = time.perf_counter()
                journal.metrics(STUDENT, {"train/loss": step / 8, "perf/rows_per_second": float(step)}, step)
                slowest = max(slowest, time.perf_counter() - before)
                time.sleep(0.001)

        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        journal.params(STUDENT, {"training.epochs": 3})
        steps(0, 500)
        assert tracker.experiment_url() is None
        server.start()
        until(lambda: tracker.run_url(STUDENT), 30)
        steps(500, 600)
        server.kill()
        steps(600, 1500)
        time.sleep(1)
        server.start()
        steps(1500, 1600)
        journal.file(STUDENT, Path(__file__), "code")
        journal.finish(STUDENT, "FINISHED")
        journal.finish(JOB, "FINISHED")
    runs = runs_of(server.uri)
    assert history(server.uri, runs[STUDENT], "train/loss") == [(step, step / 8) for step in range(1600)]
    assert history(server.uri, runs[STUDENT], "perf/rows_per_second") == [(step, float(step)) for step in range(1600)]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[STUDENT].data.tags["mlflow.parentRunId"] == runs[JOB].info.run_id
    assert [file.path for file in mlflow.MlflowClient(server.uri).list_artifacts(runs[STUDENT].info.run_id, "code")] == [
        "code/test_tracking.py"
    ]
    assert 1 <= caplog.text.count("cannot be used") <= 2
    assert "incomplete" not in caplog.text
    assert slowest < 0.05, f"recording took {slowest * 1000:.1f} ms"


def test_server_that_never_comes(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TrackingConfig(uri=server.uri)
    started = time.monotonic()
    with Journal(tmp_path / "t.jsonl") as journal, Tracker(config, journal, **OPTIONS, artifact_root=None) as tracker:
        assert time.monotonic() - started < 1
        journal.run(JOB, name="docstrings")
        costs = []
        for step in range(1000):
            before = time.perf_counter()
            journal.metrics(JOB, {"train/loss": 1.0}, step)
            costs.append(time.perf_counter() - before)
        assert sorted(costs)[990] < 0.005
        until(lambda: "cannot be used" in caplog.text, 15)
        ended = time.monotonic()
    assert time.monotonic() - ended < 10
    assert tracker.run_url(JOB) is None
    assert f'tracking incomplete: 1002 events wait in {tmp_path}/t.jsonl; run "distill sync"' in caplog.text
    with Journal(tmp_path / "t.jsonl") as journal, pytest.raises(TrackingError, match="DST-7001"):
        deliver(config, journal, **OPTIONS, artifact_root=None)


@pytest.mark.parametrize("hangs", [False, True])
def test_strict_tracking_refuses_at_once(hangs: bool, tmp_path: Path) -> None:
    """A port nobody listens on, and a server that takes the connection and never answers."""
    with socket.socket() as listener, Journal(tmp_path / "t.jsonl") as journal:
        listener.bind(("127.0.0.1", 0))
        if hangs:
            listener.listen()
        config = TrackingConfig(uri=f"http://127.0.0.1:{listener.getsockname()[1]}", strict=True)
        started = time.monotonic()
        with pytest.raises(TrackingError) as caught, Tracker(config, journal, **OPTIONS, artifact_root=None):
            pytest.fail("the block must not run")
        assert time.monotonic() - started < 10
        assert (caught.value.exit_code, caught.value.code) == (7, "DST-7001")


@pytest.mark.parametrize(("status", "setting"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts")])
def test_refused_login_says_what_to_set(status: int, setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(status)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "anna")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "canary-7f3a")
    with HTTPServer(("127.0.0.1", 0), Refuses) as refusing, Journal(tmp_path / "t.jsonl") as journal:
        thread = threading.Thread(target=refusing.serve_forever)
        thread.start()
        try:
            with pytest.raises(TrackingError, match=f"{status}.*{setting}") as caught:
                deliver(TrackingConfig(uri=f"http://127.0.0.1:{refusing.server_port}"), journal, **OPTIONS, artifact_root=None)
        finally:
            refusing.shutdown()
            thread.join()
    assert "canary" not in str(caught.value)


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "student")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "optimizer.bin").write_bytes(b"no pickles, please")
    return tmp_path / "student"


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # MLflow, about its own code
def test_student_is_a_logged_model_that_predicts(server: Server, tiny_bert: Path, tmp_path: Path) -> None:
    """Through a server; logged once though declared twice; its scores are those of the plain transformers model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    server.start()
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(STUDENT, name="L3")
        for _ in range(2):
            journal.model(STUDENT, tiny_bert, name="student", input_example=["good film"], registered="docstrings")
        journal.finish(STUDENT, "FINISHED")
        deliver(TrackingConfig(uri=server.uri), journal, **OPTIONS, artifact_root=None)
        (tmp_path / "t.jsonl.state.json").unlink()
        deliver(TrackingConfig(uri=server.uri), journal, **OPTIONS, artifact_root=None)

    client = mlflow.MlflowClient(server.uri)
    logged = client.search_logged_models(["1"])
    assert [(model.name, str(model.status), model.source_run_id) for model in logged] == [
        ("student", "READY", runs_of(server.uri)[STUDENT].info.run_id)
    ]
    assert [version.version for version in client.search_model_versions("name = 'docstrings'")] == ["1"]
    assert [output.model_id for output in runs_of(server.uri)[STUDENT].outputs.model_outputs] == [logged[0].model_id]
    mlflow.set_tracking_uri(server.uri)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{logged[0].model_id}")
        assert model.metadata.signature.inputs.input_types()[0].name == "string"
        assert model.metadata.signature.outputs.input_names() == ["label", "score"]
        assert list(model.input_example) == ["good film"]
        files = {Path(f.path).name for f in client.list_logged_model_artifacts(logged[0].model_id, "model")}
        answer = model.predict(["good film", "bad"])
    finally:
        mlflow.set_tracking_uri(None)
    assert "model.safetensors" in files
    assert "optimizer.bin" not in files
    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_bert), AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        expected = plain.eval()(**tokenizer(["good film", "bad"], padding=True, return_tensors="pt")).logits.softmax(-1)
    assert list(answer["label"]) == [("neg", "pos")[i] for i in expected.argmax(-1).tolist()]
    assert list(answer["score"]) == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)


def test_ui_shows_files_of_a_database_and_answers_only_to_its_own_name(server: Server, tmp_path: Path) -> None:
    picture = tmp_path / "curve.txt"
    picture.write_text("a curve")
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        journal.file(JOB, picture, "plots")
        deliver(TrackingConfig(uri=server.database), journal, **options(tmp_path))
    server.start()
    path = f"{server.uri}/get-artifact?path=plots%2Fcurve.txt&run_uuid={runs_of(server.database)[JOB].info.run_id}"
    with urllib.request.urlopen(path, timeout=10) as answer:
        assert answer.read() == b"a curve"
    with pytest.raises(urllib.error.HTTPError, match="403") as caught:
        urllib.request.urlopen(urllib.request.Request(path, headers={"Host": "10.example.org"}), timeout=10)
    caught.value.close()
    server.interrupt()


def test_links() -> None:
    """Spaces, quotes and brackets are escaped, so that a terminal makes the whole of it a link."""
    assert links.compare_url("http://m:80/", "2", ["a", "b"]) == (
        "http://m:80/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%222%22%5D&workflowType=machine_learning"
    )
    assert links.experiment_url("sqlite:///x.db", "2") == (
        "http://127.0.0.1:5000/#/experiments/2/runs?viewStateShareKey=distillery&workflowType=machine_learning"
    )
    assert json.loads(links.view_tag(["test/accuracy", "cost/bytes"])) == {
        "orderByKey": "metrics.`test/accuracy`",
        "orderByAsc": False,
        "selectedColumns": ["metrics.`test/accuracy`", "metrics.`cost/bytes`", "attributes.`Models`"],
        "columnOrder": ["metrics.`test/accuracy`", "metrics.`cost/bytes`", "attributes.`Models`"],
        "columnWidths": {"metrics.`test/accuracy`": 150, "metrics.`cost/bytes`": 150, "attributes.`Models`": 150},
        "runsHiddenMode": "SHOW_ALL",
    }
    with pytest.raises(ConfigError, match="DST-2301"):
        links.ui("http://m:80", "/tmp")


def test_environment_tags_name_versions_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    folder = tmp_path / "code"
    folder.mkdir()
    monkeypatch.setattr(links, "__file__", str(folder / "links.py"))
    (folder / "links.py").write_text("")
    assert "mlflow.source.git.commit" not in links.environment_tags()
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        ["init", "-q"],
        ["remote", "add", "origin", "https://anna:canary-7f3a@example.org/d.git"],
        ["add", "."],
        ["commit", "-qm", "x"],
    ):
        subprocess.run([*git, *command], check=True)
    tags = links.environment_tags()
    assert tags["version.torch"] == torch.__version__
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert tags["mlflow.source.git.repoURL"] == "https://example.org/d.git"
    assert tags["git.changed"] == "false"
    (folder / "links.py").write_text("changed")
    assert links.environment_tags()["git.changed"] == "true"
    assert socket.gethostname() not in " ".join(tags.values())
