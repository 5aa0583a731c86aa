"""The files that start clusters are what Ray's launcher and command line accept, and no cluster is open to others. Checked without a cloud."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

ROOT = Path(__file__).parent.parent
PINNED = dict(re.findall(r"^(\S+?)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
LAUNCHED = ("cluster.yaml", "cluster/local.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.fixture
def config() -> dict[str, Any]:
    return read("cluster.yaml")


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_accepts_it(name):
    validate_config(prepare_config(read(name)))


@pytest.mark.parametrize("place", [(), ("available_node_types", "student_gpu"), ("docker",)])
def test_the_launcher_refuses_a_key_it_does_not_know(config, place):
    inner = config
    for key in place:
        inner = inner[key]
    inner["idle_timeout_minuets"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        validate_config(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_start_command_asks_for_the_token(name):
    config = read(name)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        before = starts[0].split("ray start")[0]
        assert "export RAY_AUTH_MODE=token;" in before
        assert "ulimit -n 65536;" in before
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    assert any("chmod 600" in command and ".ray/auth_token" in command for command in config["setup_commands"])


def options() -> Iterator[tuple[str, list[str]]]:
    """Where Ray is started, and what it is told."""
    for name in LAUNCHED:
        config = read(name)
        for command in config["head_start_ray_commands"] + config["worker_start_ray_commands"]:
            if "ray start " in command:
                yield name, shlex.split(command.split("ray start ")[1])
    script = (ROOT / "cluster" / "slurm.sh").read_text().replace("\\\n", " ")
    yield "slurm", shlex.split(script.split("ray symmetric-run ")[1].split(" -- ")[0])
    for line in re.findall(r"^    ray start (.*)$", (ROOT / "docs" / "kubernetes.md").read_text(), re.M):
        yield "docs/kubernetes.md", shlex.split(line)


def test_ray_knows_every_option():
    known = {option for parameter in start.params for option in parameter.opts}
    told = list(options())
    assert len(told) == 2 + 2 + 1 + 2
    for name, arguments in told:
        unknown = {argument.split("=")[0] for argument in arguments} - known
        assert unknown == ({"--min-nodes"} if name == "slurm" else set()), name
        assert "--head" not in arguments or "--dashboard-host=127.0.0.1" in arguments, name
        assert all("0.0.0.0" not in argument for argument in arguments), name


def test_no_work_lands_on_the_head_and_students_are_on_spot_machines(config):
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["student_gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for kind in types.values():
        market = kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        assert kind["labels"].get("ray.io/market-type") == market
    assert "--num-cpus=0" in next(arguments for name, arguments in options() if name == "cluster/local.yaml")


# --------------------------------------------------------------------------------------------------------------- the image


def test_image_and_constraints_name_the_same_ray(config):
    assert config["docker"]["image"] == f"rayproject/ray:{PINNED['ray']}-py311-gpu"


def test_the_image_has_the_versions_that_were_tested_and_no_root():
    text = (ROOT / "cluster" / "Dockerfile").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "FROM python:3.11-slim-bookworm"  # as the image of cluster.yaml
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert all("-c constraints.txt" in line and "==" not in line for line in installs)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    assert lines.index("USER 1000") > lines.index(installs[-1])
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


def test_every_package_of_the_image_is_pinned():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["server"]
    names = {re.match(r"[\w.-]+", one)[0] for one in wanted}
    assert names - set(PINNED) == set()


# ------------------------------------------------------------------------------------------------------------------- Slurm

FAKE = {
    "scontrol": 'echo "$3"',  # show hostnames LIST, and one machine is its own list
    "srun": 'shift; exec "$@"',
}


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_of_slurm_runs_in_a_ray_of_its_own_and_leaves_nothing(tmp_path):
    """Slurm's own commands are stood in for; Ray is real, in a namespace of its own, because `ray symmetric-run` ends with `ray stop`."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, body in FAKE.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    venv = Path(sys.executable).parent.parent
    (tmp_path / ".venv").symlink_to(venv)
    (tmp_path / "job.yaml").write_text((ROOT / "jobs" / "recipes" / "resnet_digits.yaml").read_text())
    env = {
        "PATH": f"{tools}:{venv}/bin:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
    }  # fmt: skip
    arguments = ["doctor", "job.yaml", f"cluster.storage={tmp_path}/storage"]
    done = subprocess.run(
        [*apart, "bash", ROOT / "cluster" / "slurm.sh", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert re.search(r"ok +cluster +.*1 nodes, 2 CPU, 0 GPU", done.stdout), done.stdout + done.stderr
    assert re.search(r"ok +token", done.stdout)
    assert done.returncode == 0
    assert not list(tmp_path.glob(".ray-token-*"))
