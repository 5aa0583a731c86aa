"""cluster.yaml is what Ray's cluster launcher accepts, and the cluster it starts is not open to others. Checked without a cloud."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_the_launcher_accepts_it(config):
    validate_config(prepare_config(config))


@pytest.mark.parametrize("place", [(), ("available_node_types", "student_gpu"), ("docker",)])
def test_the_launcher_refuses_a_key_it_does_not_know(config, place):
    inner = config
    for key in place:
        inner = inner[key]
    inner["idle_timeout_minuets"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuets"):
        validate_config(prepare_config(copy.deepcopy(config)))


def test_every_start_command_asks_for_the_token(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config[key] if "ray start" in command]
        assert len(starts) == 1
        before = starts[0].split("ray start")[0]
        assert "export RAY_AUTH_MODE=token;" in before
        assert "ulimit -n 65536;" in before
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_the_dashboard_listens_on_loopback_only(config):
    text = (ROOT / "cluster.yaml").read_text()
    assert re.findall(r"--dashboard-host=(\S+)", text) == ["127.0.0.1"]
    assert "0.0.0.0" not in text


def test_no_work_lands_on_the_head_and_students_are_on_spot_machines(config):
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["student_gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert {name: kind["labels"]["role"] for name, kind in types.items()} == {
        "head": "head",
        "teacher_gpu": "teacher",
        "student_gpu": "student",
        "cpu_data": "data",
    }


def test_image_and_constraints_name_the_same_ray(config):
    version = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert config["docker"]["image"] == f"rayproject/ray:{version}-py311-gpu"
