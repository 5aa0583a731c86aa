"""What leaves this machine with a job, and what does not: checked without a cluster."""

from __future__ import annotations

import http.server
import json
import os
import shlex
import socket
import threading

import pytest
import yaml

from cluster import package, reach, submit
from cluster.submit import Request
from distillation.errors import ClusterError, ConfigError, SecurityError
from jobs import shipping
from jobs.config import load, recipes
from tests.jobs.place import JOB


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def job(tmp_path):
    """A job whose paths are those of every node."""
    content = json.loads(json.dumps(JOB))
    content["corpus"] |= {"train": ["/data/a.csv", "s3://bucket/b.csv"], "validation": "/data/c.csv", "test": 0.1}
    content["teacher"]["model"] = "/models/teacher"
    content["cluster"]["storage"] = "/mnt/shared"
    path = tmp_path / "job.yaml"
    path.write_text("# as it was written\n" + yaml.safe_dump(content))
    return path


# -------------------------------------------------------------------------------------------------------------- package


def test_the_package_is_the_job_file_and_the_code_and_nothing_else(job):
    made, _ = shipping.request(str(job), [], "run")
    built = made.build("tiny-run")
    files = {path.relative_to(built.folder).as_posix(): path for path in built.folder.rglob("*") if path.is_file()}
    assert files.pop("tiny.yaml").read_text() == job.read_text()
    code = dict(package.code())
    assert files.keys() == code.keys()
    assert {"jobs/cli.py", "jobs/recipes/quickstart.yaml", "tuning/page.css", "tuning/plot.js", "distillation/loop.py"} <= code.keys()
    assert {os.path.splitext(name)[1] for name in code} == {".py", ".yaml", ".css", ".js"}
    assert built.files == len(code) + 1
    assert built.bytes < 2_000_000


def test_the_same_job_makes_the_same_package_and_ray_sees_it(job):
    from ray._private.runtime_env.packaging import get_uri_for_directory

    made, _ = shipping.request(str(job), [], "run")
    first = get_uri_for_directory(str(made.build("tiny-run").folder), True)
    assert get_uri_for_directory(str(made.build("tiny-run").folder), True) == first
    assert get_uri_for_directory(str(made.build("tiny-run-r2").folder), True) == first, "nothing is uploaded again"


def test_installed_nodes_get_the_file_only(job):
    made, _ = shipping.request(str(job), [], "run", installed=True)
    built = made.build("tiny-run")
    assert [path.name for path in built.folder.rglob("*")] == ["tiny.yaml"]


def tree(tmp_path, monkeypatch):
    """A tree with the four packages, where `package` looks for the code."""
    root = tmp_path / "tree"
    for name in package.CODE:
        (root / name).mkdir(parents=True)
        (root / name / "a.py").write_text(name)
    monkeypatch.setattr(package, "__file__", str(root / "cluster" / "package.py"))
    return root


def test_what_lies_about_stays_here(tmp_path, monkeypatch):
    root = tree(tmp_path, monkeypatch)
    for name in (
        "jobs/.env",
        "jobs/key.pem",
        "jobs/rows.csv",
        "cluster/model.safetensors",
        "jobs/secrets.yaml",
        "data.py",
        "tuning/mlflow.db",
    ):
        (root / name).write_text("hunter2")
    (root / "jobs/__pycache__").mkdir()
    (root / "jobs/__pycache__/a.pyc").write_text("hunter2")
    assert [path for path, _ in package.code()] == ["distillation/a.py", "cluster/a.py", "tuning/a.py", "jobs/a.py"]


def test_a_link_that_leads_out_is_refused(tmp_path, monkeypatch):
    root = tree(tmp_path, monkeypatch)
    (tmp_path / "secret").write_text("hunter2")
    (root / "jobs/b.py").symlink_to(tmp_path / "secret")
    with pytest.raises(SecurityError, match=r"DST-9021.*jobs/b\.py"):
        dict(package.code())


def test_a_package_that_is_too_large_is_refused(tmp_path, monkeypatch):
    root = tree(tmp_path, monkeypatch)
    (root / "jobs/big.py").write_bytes(b"#" * 5_000_001)
    with pytest.raises(ConfigError, match=r"DST-2063.*jobs/big\.py"):
        package.build("x", {}, with_code=True)
    assert not package.home().exists()


def test_rayignore_keeps_a_hand_made_submission_to_code(tmp_path, monkeypatch):
    """Ray's own reader of the file, over a folder as a user has it."""
    import shutil
    from pathlib import Path

    from ray._private.runtime_env.packaging import create_package

    root = tree(tmp_path, monkeypatch)
    shutil.copy(Path(__file__).parents[2] / ".rayignore", root)
    for name in (
        "jobs/recipes/r.yaml",
        "tuning/page.css",
        "my_job.yaml",
        ".env",
        "key.pem",
        "rows.csv",
        "distillery-storage/a.arrow",
        "docs/a.png",
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("x")
    create_package(str(root), tmp_path / "p.zip", include_gitignore=True)
    import zipfile

    names = sorted(name for name in zipfile.ZipFile(tmp_path / "p.zip").namelist() if not name.endswith("/"))
    code = [f"{name}/a.py" for name in package.CODE]
    assert names == sorted([*code, "jobs/recipes/r.yaml", "tuning/page.css", "my_job.yaml"])


# ---------------------------------------------------------------------------------------------------------- job file


def test_the_entrypoint_is_one_command_whatever_the_settings_say(job):
    nasty = "tracking.experiment=x", "task.text=a'; touch /tmp/canary; $(id) `id`"
    made, _ = shipping.request(str(job), list(nasty), "run", python="/opt/my python")
    words = ["/opt/my python", "-m", "jobs", "run", "tiny.yaml", *nasty, "cluster.address=auto"]
    assert shlex.split(made.entrypoint) == words


def test_metadata_brings_back_the_request(job):
    made, _ = shipping.request(str(job), ["training.epochs=7"], "run", labels={"role": "head"}, python="python3")

    class Told:
        submission_id, metadata, status = "tiny-run-r3", made.metadata, "STOPPED"
        start_time, end_time, driver_exit_code, message = 1000, 3000, None, None

    found = submit._attempt(Told)
    assert found.request == made
    assert (found.number, found.started, found.ended, found.code) == (3, 1.0, 3.0, 75)
    assert all(isinstance(value, str) for value in made.metadata.values())
    Told.metadata = {"distillery": "{}"}
    assert submit._attempt(Told) is None


def test_variables_of_this_machine_are_meant(job, monkeypatch):
    monkeypatch.setenv("WHERE", "/mnt/mine")
    made, _ = shipping.request(str(job), ["cluster.storage=${oc.env:WHERE}", "training.epochs=5"], "run")
    monkeypatch.delenv("WHERE")
    assert made.overrides == ()
    assert "${" not in made.file
    settings = shipping.settings_of(made)
    assert (settings["cluster.storage"], settings["training.epochs"]) == ("/mnt/mine", 5)


def test_paths_of_this_machine_are_refused_all_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    content = json.loads(json.dumps(JOB))
    content["students"]["other"] = {"type": "pretrained", "model": "here"}
    content["tracking"] = {"uri": "sqlite:///runs.db"}
    content["cluster"]["storage"] = "~/storage"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="DST-2061") as refused:
        shipping.request("job.yaml", [], "run")
    assert refused.value.found == (
        "cluster.storage=~/storage; corpus.train=labelled.csv; corpus.train=unlabelled.jsonl; corpus.validation=validation.csv; "
        "corpus.test=test.jsonl; teacher.model=./model; students.other.model=here; tracking.uri=sqlite:///runs.db"
    )


@pytest.mark.parametrize("uri", ["s3://key:hunter2@bucket/x", "s3://bucket/x?secret_key=hunter2"])
def test_a_password_never_leaves(job, uri):
    with pytest.raises(SecurityError, match="DST-9002") as refused:
        shipping.request(str(job), [f"cluster.storage={uri}", "tracking.uri=http://mlflow"], "run")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(SecurityError, match="DST-9007"):
        shipping.request(str(job), ["task.text=${oc.env:HF_TOKEN}"], "run")


def test_a_search_needs_a_section(job):
    with pytest.raises(ConfigError, match="DST-2018"):
        shipping.request(str(job), [], "search")


def test_every_recipe_can_be_submitted():
    for name in recipes():
        made, job = shipping.request(name, ["cluster.storage=/mnt/shared"], "run")
        assert load(name, ["cluster.storage=/mnt/shared"]) == job
        assert made.name == job.name


def test_a_job_in_other_words_is_the_same_job(job, tmp_path):
    first, config = shipping.request(str(job), ["training.epochs=7"], "run")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    again, _ = shipping.request(str(other), ["cluster.address=http://head:8265"], "run")
    assert shipping.differences(first, again) == []
    changed, _ = shipping.request(str(other), ["training.epochs=8", "losses.hard.weight=0.5", "students.cut.layers=[0]"], "run")
    assert shipping.differences(first, changed) == [
        "losses.hard.weight: 0.3 -> 0.5", "students.cut.layers: [0, 3] -> [0]", "training.epochs: 7 -> 8"
    ]  # fmt: skip
    assert shipping.differences(Request("tiny", "run", "no: job"), changed) == [
        "it was handed in by a version of Distillery with other settings"
    ]


# ---------------------------------------------------------------------------------------------------------- the way there


def test_the_address_comes_from_the_option_the_environment_the_job(monkeypatch):
    with pytest.raises(ConfigError, match="DST-2060"):
        reach.address_of(None, "auto")
    assert reach.address_of(None, "http://job:1") == "http://job:1"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of Ray itself, not of its job server
    assert reach.address_of(None, "http://job:1") == "http://job:1"
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:1")
    assert reach.address_of(None, "http://job:1") == "http://ray:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://server:1")
    assert reach.address_of(None, "http://job:1") == "http://server:1"
    assert reach.address_of("https://option:1", "http://job:1") == "https://option:1"
    with pytest.raises(ConfigError, match="DST-2060"):
        reach.address_of("option:1", "http://job:1")


def test_the_token_comes_from_where_ray_looks(monkeypatch, tmp_path):
    with pytest.raises(ClusterError, match=r"DST-6021.*home/\.ray/auth_token"):
        reach.token()
    (tmp_path / "home/.ray").mkdir(parents=True)
    (tmp_path / "home/.ray/auth_token").write_text("of-home\n")
    assert reach.token() == "of-home"
    (tmp_path / "file").write_text("of-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file"))
    assert reach.token() == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    assert reach.token() == "of-variable"


@pytest.mark.parametrize(
    ("address", "its"),
    [("http://127.0.0.1:1", True), ("http://[::1]:1", True), ("http://localhost:1", True), ("http://10.0.0.1:1", False),
     ("https://localhost.evil.example", False), ("http://0.0.0.0:1", False)],
)  # fmt: skip
def test_loopback(address, its):
    assert reach.is_loopback(address) is its


@pytest.fixture
def head():
    """Says how one logs in, as the dashboard of Ray does, on every address of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps({"authentication_mode": "disabled", "ray_version": "2.60.0"}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cluster_that_is_open_to_others_is_refused(head):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("192.0.2.1", 1))  # sends nothing: the address this machine would be seen under
        own = one.getsockname()[0]
    with pytest.raises(SecurityError, match=r"DST-9020.*RAY_AUTH_MODE=token, or pass --insecure-cluster"):
        submit.Cluster(f"http://{own}:{head}")
    assert submit.Cluster(f"http://{own}:{head}", insecure=True).mode == "disabled"
    assert submit.Cluster(f"http://127.0.0.1:{head}").mode == "disabled"


def test_nobody_answers(head):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    with pytest.raises(ClusterError, match=r"DST-6020.*Connection refused.*tunnel"):
        submit.Cluster(f"http://127.0.0.1:{port}")
