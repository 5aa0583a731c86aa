"""A node that sees another folder under the name of the storage is found before anything runs. Real nodes, one in a mount namespace of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.config import ClusterConfig
from cluster.preflight import check_nodes, require_shared
from cluster.training import run_workers
from distillation.errors import ClusterError, StorageError
from tests.distillation.served import s3_server

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "there").write_text("")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes that share this machine's files. Module's tests add a third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests/cluster")  # workers import this file
        for name, value in (("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")):
            patch.setenv(name, value)
        node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def apart(cluster, storage):
    """A third node, for which a disk of its own lies over the storage's folder."""
    ray_ = Path(sys.executable).with_name("ray")
    start = f'mount -t tmpfs tmpfs "{storage}" && exec {sys.executable} {ray_} start --address={cluster.address} --num-cpus=1 '
    start += "--object-store-memory=80000000 --labels=apart=yes --block"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", start], env={**os.environ, "PATH": f"{ray_.parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(n["Alive"] for n in ray.nodes()) < 3:
        if node.poll() is not None:
            pytest.skip(f"no mount namespace can be made here: {node.stdout.read().strip()}")
        assert time.monotonic() < deadline, "the third node did not come up"
        time.sleep(0.2)
    yield node
    os.killpg(node.pid, signal.SIGTERM)
    node.communicate(timeout=30)
    while sum(n["Alive"] for n in ray.nodes()) > 2:
        time.sleep(0.2)


def test_nodes_that_share_a_folder(cluster, storage):
    findings = check_nodes(str(storage))
    assert [(f.found, f.do, f.answered) for f in findings] == [("", "", True)] * 2
    assert os.listdir(storage) == ["there"], "it leaves nothing"
    started = time.perf_counter()
    assert require_shared(str(storage)) == findings
    assert time.perf_counter() - started < 2


def test_nodes_that_share_an_object_store(cluster):
    with s3_server() as address:
        assert [f.found for f in check_nodes(f"s3://bucket/x?scheme=http&endpoint_override={address}")] == ["", ""]


def told(payload):
    raise AssertionError("no worker may begin")


def test_a_node_with_another_folder_under_this_name(cluster, storage, apart):
    findings = check_nodes(str(storage))
    (blind,) = [f for f in findings if f.found]
    assert blind.found == "another folder under this name"
    assert blind.node.startswith(ray.nodes()[0]["NodeManagerAddress"])
    with pytest.raises(
        StorageError, match=rf"DST-5006.*not shared by all nodes: node .*expected {storage}.*another folder.*NFS.*s3://"
    ) as caught:
        require_shared(str(storage))
    assert caught.value.exit_code == 5
    config = ClusterConfig(storage=str(storage), cpus_per_worker=1, address=cluster.address, student={"labels": {"apart": "yes"}})
    with pytest.raises(StorageError, match=r"DST-5006.*another folder"):
        run_workers(told, {}, config, "student", lambda *_: None)


def test_a_node_that_does_not_answer(cluster, storage, apart):
    """Its processes are stopped, not dead: nobody has noticed yet."""
    os.killpg(apart.pid, signal.SIGSTOP)
    try:
        findings = check_nodes(str(storage), seconds=3)
        assert [f.found for f in findings if not f.answered] == ["no answer in 3 s"]
        with pytest.raises(ClusterError, match=r"DST-6030.*does not answer.*no answer in 2 s.*ray status"):
            require_shared(str(storage), seconds=2)
    finally:
        os.killpg(apart.pid, signal.SIGCONT)
