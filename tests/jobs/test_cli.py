"""The command line as a user meets it: real processes, their exit codes and what they print."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

from jobs.config import recipes
from tests.tiny import model_folder, texts

ROOT = Path(__file__).parent.parent.parent
PYTHON = [sys.executable, "-m", "jobs"]


def environment(**changes):
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **changes}


@pytest.fixture
def distill(tmp_path):
    """Run a command in an empty folder: (exit code, stdout, stderr)."""

    def run(*arguments, **changes):
        done = subprocess.run([*PYTHON, *arguments], cwd=tmp_path, env=environment(**changes), capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "model")


def job_file(folder, model, **changes):
    """A job of seconds: 150 rows, a tiny teacher that is trained, one student."""
    with open(folder / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *texts(150)])
    job = {
        "name": "tiny", "task": {"type": "text_classification", "max_length": 32},
        "corpus": {"type": "files", "train": "rows.csv", "validation": 0.2, "test": 0.2},
        "teacher": {"model": str(model), "training": {"epochs": 1, "batch_tokens": 512}},
        "student": {"type": "layers", "layers": [0]}, "losses": {"soft": {"type": "forward_kl"}},
        "training": {"epochs": 1, "batch_tokens": 512}, "cluster": {"storage": "out"}, **changes,
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(job))
    return "job.yaml"


def refused(result, exit_code, code, *parts):
    """The command ended with the exit code of its one line of error."""
    found, out, err = result
    assert found == exit_code, (out, err)
    assert err.count("error[DST-") == 1
    assert err.startswith(f"error[DST-{code}]: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    for part in parts:
        assert part in err


# --------------------------------------------------------------------------------------------------------------- usage


def test_help_answers_at_once(distill):
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        code, out, err = distill("--help")
        seconds.append(time.monotonic() - started)
        assert (code, err) == (0, "")
    assert min(seconds) < 0.7
    for verb in ("run", "prepare", "teach", "distill", "evaluate", "export", "plan", "doctor", "ui", "sync", "schema", "recipes"):
        assert re.search(rf"^\W*{verb}\b", out, re.M), verb


@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["run"], ["run", "quickstart", "--nonsense"], ["no-such-verb"], ["ui", "--port", "x"]]
)
def test_usage(distill, arguments):
    code, out, err = distill(*arguments)
    assert code == 2
    assert "Usage:" in err
    assert "Traceback" not in out + err


def test_recipes_are_listed_and_copied_but_never_over_a_file(distill, tmp_path):
    code, out, _ = distill("recipes", "ls")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == sorted(recipes())
    assert distill("recipes", "cp", "quickstart") == (0, "quickstart.yaml\n", "")
    assert (tmp_path / "quickstart.yaml").read_text() == recipes()["quickstart"]
    (tmp_path / "quickstart.yaml").write_text("mine")
    refused(distill("recipes", "cp", "quickstart"), 2, "2007", "quickstart.yaml")
    refused(distill("recipes", "cp", "quickstart", "."), 2, "2007")
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    refused(distill("recipes", "cp", "quickstart", "no/such/folder.yaml"), 2, "2009", "No such file or directory")
    refused(distill("recipes", "cp", "nothing"), 2, "2001", "quickstart, resnet_digits, sst2_bert")


def test_schema_describes_the_recipes(distill):
    code, out, _ = distill("schema")
    assert code == 0
    schema = json.loads(out)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    for text in recipes().values():
        # Exponents with a sign only: PyYAML reads 2.0e-4 as a number, as the loader of job files does.
        validator.validate(yaml.safe_load(text))
    wrong = yaml.safe_load(recipes()["quickstart"])
    wrong["training"]["epoch"] = 1
    wrong["losses"]["soft"]["temperature"] = 0
    assert sorted(tuple(error.absolute_path)[:2] for error in validator.iter_errors(wrong)) == [("losses", "soft"), ("training",)]


def test_a_reader_that_goes_away(tmp_path):
    piped = subprocess.run(
        f"{sys.executable} -m jobs schema | head -1", shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True
    )  # fmt: skip
    assert (piped.stdout, piped.stderr) == ("{\n", "")


# -------------------------------------------------------------------------------------------------------------- refusals


def test_configuration_ends_with_2(distill, tmp_path):
    refused(distill("plan", "nothing.yaml"), 2, "2001", "nothing.yaml")
    refused(distill("run", "quickstart", "training.epoch=1"), 2, "2005", 'unknown key "training.epoch", did you mean "epochs"')
    refused(distill("run", "quickstart", "nonsense"), 2, "2004", "path.to.setting=value")
    (tmp_path / "bad.yaml").write_text("name: [")
    refused(distill("run", "bad.yaml"), 2, "2002", "bad.yaml")
    refused(distill("run", "quickstart", "name=../../etc"), 2, "2005", "name")
    refused(distill("ui", "--storage", "nothing"), 2, "2006", "nothing")
    assert sorted(os.listdir(tmp_path)) == ["bad.yaml"]


def test_input_ends_with_3(distill, tmp_path, model):
    job = job_file(tmp_path, model)
    refused(distill("run", job, "corpus.train=none.csv"), 3, "3402", "none.csv")
    refused(distill("plan", job, "task.label=nothing", "corpus.validation=rows.csv"), 3, "3407", "rows.csv", "'nothing'")
    assert not (tmp_path / "out").exists()


def test_storage_that_cannot_be_written_ends_with_5(distill, tmp_path, model):
    job = job_file(tmp_path, model)
    (tmp_path / "file").write_text("x")
    refused(distill("run", job, "cluster.storage=file/below"), 5, "5002", "file")
    refused(distill("export", job, "--to", "file/below"), 5, "5002", "file")
    assert not (tmp_path / "out").exists(), "nothing was run before the place of the copy was looked at"


def test_security_ends_with_9(distill, tmp_path, model):
    job = job_file(tmp_path, model)
    result = distill("run", job, "teacher.model=${oc.env:HF_TOKEN}", HF_TOKEN="hf_hunter2")
    refused(result, 9, "9007", "HF_TOKEN")
    assert "hunter2" not in result[2]
    result = distill("plan", job, "cluster.storage=s3://key:hunter2@bucket/x", "tracking.uri=http://host")
    refused(result, 9, "9002")
    assert "hunter2" not in result[2]


def test_debug_shows_the_traceback_beside_the_error(distill):
    code, _, err = distill("--debug", "plan", "nothing.yaml")
    assert code == 2
    assert err.startswith("Traceback (most recent call last)")
    assert "jobs/config.py" in err
    assert err.splitlines()[-1].startswith("error[DST-2001]: ")


# ---------------------------------------------------------------------------------------------------------- plan, doctor


def test_plan_for_people_and_machines(distill, tmp_path, model):
    job = job_file(tmp_path, model)
    code, out, err = distill("plan", job, "--json")
    assert (code, err) == (0, "")
    stages = {line["stage"]: line for line in json.loads(out)}
    assert list(stages) == ["corpus", "teacher", "targets", "student", "student-baseline"]
    assert stages["corpus"]["rows"] == 150
    assert stages["targets"]["rows"] == 120
    assert {line["state"] for line in stages.values()} == {"to do"}
    code, out, err = distill("plan", job)
    assert (code, err) == (0, "")
    assert out.splitlines()[0].strip() == "tiny: nothing was launched"
    for stage in stages:
        assert re.search(rf"^{stage} +to do ", out, re.M)
    assert max(len(line) for line in out.splitlines()) <= 120
    assert sorted(os.listdir(tmp_path)) == ["job.yaml", "rows.csv"]


def test_doctor(distill, tmp_path, model):
    job = job_file(tmp_path, model)
    code, out, err = distill("doctor", "--json")
    checks = json.loads(out)
    assert err == ""
    assert code == int(any(check["state"] == "fail" for check in checks))
    assert {"python", "ray", "torch", "storage", "mlflow", "memory"} <= {check["name"] for check in checks}
    assert all(check["do"] for check in checks if check["state"] != "ok")
    (tmp_path / "file").write_text("x")
    code, out, _ = distill("doctor", job, "cluster.storage=file/below", "--json")
    assert code == 1
    assert [check["name"] for check in json.loads(out) if check["state"] == "fail"] == ["storage"]
    code, out, _ = distill("doctor", job, "cluster.storage=file/below")
    assert code == 1
    assert re.search(r"^fail +storage ", out, re.M)


# ------------------------------------------------------------------------------------------------------------ interrupted


def of_ours(mark):
    """Processes that inherited the mark of one command."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DISTILL_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.ray
@pytest.mark.parametrize(
    ("number", "line", "in_storage"),
    [(signal.SIGTERM, "corpus\n", "out/mlflow.db"), (signal.SIGINT, "teacher: fine-tuning", "out/teachers/*.checkpoints/*")],
    ids=["term-in-corpus", "int-in-training"],
)
def test_a_signal_ends_a_run_with_75_and_leaves_no_process(tmp_path, model, number, line, in_storage):
    """Stopped when the line was printed and the file is there."""
    endless = {"epochs": 100_000, "batch_tokens": 512, "checkpoint_every": 5}
    job = job_file(tmp_path, model, teacher={"model": str(model), "training": endless})
    mark = uuid.uuid4().hex
    with open(tmp_path / "err", "w+") as err:
        process = subprocess.Popen(
            [*PYTHON, "run", job, "cluster.cpus_per_worker=1"], cwd=tmp_path, env=environment(DISTILL_TEST_MARK=mark), text=True,
            stdout=subprocess.PIPE, stderr=err, start_new_session=True,
        )  # fmt: skip
        try:
            for printed in process.stdout:
                if printed.startswith(line):
                    break
            deadline = time.monotonic() + 60
            while not list(tmp_path.glob(in_storage)) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(of_ours(mark)) > 3, "Ray runs"
            process.send_signal(number)
            assert process.wait(30) == 75
            err.seek(0)
            assert err.read() == "interrupted; run the same command again to go on from the last checkpoint\n"
            deadline = time.monotonic() + 10
            while of_ours(mark) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert of_ours(mark) == []
        finally:
            process.stdout.close()
            for left in of_ours(mark):
                left.kill()
    assert list(tmp_path.glob(in_storage)), "there is something to go on from"
