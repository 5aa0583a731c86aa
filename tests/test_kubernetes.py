"""The Kubernetes manifests hold only fields that KubeRay and Kubernetes know, and what they start is closed, of one version and placed by role.

Field names and types are in kubernetes_fields.json: `name!` is required, ["x"] a list, {"*": "x"} a map, ["=", ...] one of these words.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ClusterConfig
from cluster.session import places

ROOT = Path(__file__).parent.parent
FIELDS = json.loads((ROOT / "tests" / "kubernetes_fields.json").read_text())
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
PINNED = dict(re.findall(r"^(\S+?)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
SCALARS = {"string": str, "integer": int, "boolean": bool, "number": (int, float), "any": object}


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


OBJECTS = {(path.stem, thing["kind"], thing["metadata"]["name"]): thing for path in FILES for thing in objects(path)}


def faults(value: Any, kind: Any, where: str) -> Iterator[str]:
    """What is wrong with a value that should be of a kind."""
    if isinstance(kind, list) and kind[0] == "=":
        if value not in kind[1:]:
            yield f"{where}: {value!r} is none of {kind[1:]}"
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{where}: no list"
            return
        for number, one in enumerate(value):
            yield from faults(one, kind[0], f"{where}[{number}]")
    elif isinstance(kind, dict) or kind in FIELDS:
        if not isinstance(value, dict):
            yield f"{where}: no object"
            return
        known = {} if isinstance(kind, dict) else {name.rstrip("!"): its for name, its in FIELDS[kind].items()}
        for name, one in value.items():
            if isinstance(kind, dict) or name in known:
                yield from faults(one, kind["*"] if isinstance(kind, dict) else known[name], f"{where}.{name}")
            else:
                yield f"{where}: unknown field {name}"
        if not isinstance(kind, dict):
            yield from (f"{where}: {name[:-1]} is missing" for name in FIELDS[kind] if name.endswith("!") and name[:-1] not in value)
    elif not isinstance(value, SCALARS[kind]) or (isinstance(value, bool) and kind not in ("boolean", "any")):
        yield f"{where}: {value!r} is no {kind}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_field_is_known(path):
    for thing in objects(path):
        assert list(faults(thing, thing["kind"], thing["kind"])) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda spec: spec.update(rayVersoin="2"), "RayCluster.spec: unknown field rayVersoin"),
        (lambda spec: spec.pop("headGroupSpec"), "RayCluster.spec: headGroupSpec is missing"),
        (lambda spec: spec["authOptions"].update(mode="tokens"), "RayCluster.spec.authOptions.mode: 'tokens' is none of ['disabled', 'token']"),
        (
            lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
            "RayCluster.spec.headGroupSpec.rayStartParams.num-cpus: 0 is no string",
        ),
        (
            lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(img="x"),
            "RayCluster.spec.workerGroupSpecs[0].template.spec.containers[0]: unknown field img",
        ),
    ],
)  # fmt: skip
def test_a_slip_is_seen(change, fault):
    (thing,) = objects(ROOT / "cluster" / "kuberay" / "cluster.yaml")
    change(thing["spec"])
    assert list(faults(thing, "RayCluster", "RayCluster")) == [fault]


# ---------------------------------------------------------------------------------------------------------------- the cluster

CLUSTER = OBJECTS["cluster", "RayCluster", "distillery"]["spec"]
JOB = OBJECTS["job", "RayJob", "distillery-job"]["spec"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of every manifest."""
    for (file, kind, name), thing in OBJECTS.items():
        spec = thing.get("spec", {})
        for cluster in (spec, spec.get("rayClusterSpec", {})):
            for group in [*([cluster["headGroupSpec"]] if "headGroupSpec" in cluster else []), *cluster.get("workerGroupSpecs", [])]:
                yield f"{file} {group.get('groupName', 'head')}", group["template"]
        if kind in ("Deployment", "StatefulSet"):
            yield f"{file} {name}", spec["template"]


def test_the_job_brings_the_same_cluster():
    assert JOB["rayClusterSpec"] == {name: value for name, value in CLUSTER.items() if name != "gcsFaultToleranceOptions"}


def test_who_has_no_token_is_refused_and_what_the_head_knows_survives_it():
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert CLUSTER["rayVersion"] == PINNED["ray"]
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    redis = CLUSTER["gcsFaultToleranceOptions"]
    host, port = redis["redisAddress"].split(":")
    assert OBJECTS["redis", "Service", host]["spec"]["ports"][0]["port"] == int(port)
    secret = redis["redisPassword"]["valueFrom"]["secretKeyRef"]
    container = OBJECTS["redis", "StatefulSet", "redis"]["spec"]["template"]["spec"]["containers"][0]
    assert container["env"][0] == {"name": "REDIS_PASSWORD", "valueFrom": {"secretKeyRef": secret}}


def test_pods_are_not_root_and_a_pod_that_ended_is_not_reused():
    seen = dict(pods())
    assert len(seen) == 4 + 4 + 3
    for name, pod in seen.items():
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True, name
        assert pod["metadata"]["labels"]["app.kubernetes.io/part-of"] == "distillery", name
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["resources"]["limits"]["memory"], name
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= {volume["name"] for volume in pod["spec"].get("volumes", [])} | {"data"}, name
            if container["name"].startswith("ray-"):
                assert pod["spec"]["restartPolicy"] == "Never", name
                assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"], name


def test_no_manifest_holds_a_secret():
    assert not [kind for _, kind, _ in OBJECTS if kind == "Secret"]
    for path in FILES:
        assert not re.search(r"(?i)(password|token):\s*[\"']?[\w/+]{12,}", path.read_text()), path


def test_the_job_tries_again_and_cleans_up():
    assert JOB["entrypoint"].startswith("python -m jobs run /etc/distillery/job.yaml")
    mounts = {mount["mountPath"]: mount["name"] for mount in CLUSTER["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert mounts["/etc/distillery"] == "job"
    assert JOB["backoffLimit"] > 0
    assert JOB["shutdownAfterJobFinishes"] is True  # without it the time to live has no effect
    assert JOB["ttlSecondsAfterFinished"] > 0


def test_mlflow_allows_exact_names_and_runs_no_jobs():
    (container,) = OBJECTS["mlflow", "Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    (hosts,) = [arg.split("=", 1)[1].split(",") for arg in container["args"] if arg.startswith("--allowed-hosts")]
    assert "mlflow:5000" in hosts
    assert not [host for host in hosts if "*" in host]
    env = {one["name"]: one.get("value") for one in container["env"]}
    assert env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert re.fullmatch(r"postgresql://mlflow:\$\(POSTGRES_PASSWORD\)@mlflow-postgres:5432/mlflow", env["MLFLOW_BACKEND_STORE_URI"])
    assert [one["name"] for one in container["env"]].index("POSTGRES_PASSWORD") < list(env).index("MLFLOW_BACKEND_STORE_URI")
    told = subprocess.run([Path(sys.executable).parent / "mlflow", "server", "--help"], capture_output=True, text=True, check=True).stdout
    assert {arg.split("=")[0] for arg in container["args"]} <= set(re.findall(r"--[a-z-]+", told))


# ------------------------------------------------------------------------------------------------------------------- roles


def job_file() -> dict[str, Any]:
    """The example of docs/kubernetes.md."""
    (block,) = re.findall(r"```yaml\n(cluster:\n.*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.S)
    return yaml.safe_load(block)


def launched() -> list[tuple[dict[str, str], dict[str, float], int]]:
    """Labels, resources and number of the machines of cluster.yaml."""
    types = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].values()
    return [(kind["labels"], kind["resources"], kind["max_workers"]) for kind in types if "max_workers" in kind]


def on_kubernetes() -> list[tuple[dict[str, str], dict[str, float], int]]:
    found = []
    for group in CLUSTER["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        found.append((group["labels"], has, group["maxReplicas"]))
    return found


@pytest.mark.parametrize("machines", [launched, on_kubernetes])
def test_the_roles_of_a_job_file_are_those_of_the_machines(machines):
    config = ClusterConfig.model_validate(job_file()["cluster"])
    assert [labels["role"] for labels, _, _ in machines()] == ["teacher", "student", "data"]
    for role in ("teacher", "student"):
        group = config.group(role)
        ((labels, has, count),) = [one for one in machines() if group.labels.items() <= one[0].items()]
        assert group.cpus is not None  # machines start on demand, so nothing can be read off them before
        assert places([has] * count, group.cpus, group.gpus) >= group.most
        assert has["CPU"] * count > group.most * group.cpus, "CPUs are left for Ray Data"
        assert ("ray.io/market-type" in labels) == (role == "student")
    assert next(has for labels, has, _ in machines() if config.data.labels.items() <= labels.items()).get("GPU", 0) == 0
