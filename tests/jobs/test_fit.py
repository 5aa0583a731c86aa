"""Whether a job fits a cluster: what is printed and what ends the plan. The questions to Ray are in test_submit.py."""

from __future__ import annotations

import json

import pytest

from cluster.config import ClusterConfig
from distillation.errors import ClusterError
from jobs import fit
from jobs.fit import Fit

ERROR = ClusterError("DST-6002", "job does not fit the cluster", where="cluster.student")


def test_what_does_not_fit_is_json_too_and_ends_the_plan():
    found = [Fit("teacher", "ok", "1 worker", "2 CPUs", ""), Fit("student", "fail", "3 workers", "2 CPUs", "Lower workers", ERROR)]
    assert [one["error"] and one["error"]["code"] for one in json.loads(json.dumps([one.as_dict() for one in found]))] == [None, "DST-6002"]
    fit.require(found[:1])
    with pytest.raises(ClusterError, match="DST-6002"):
        fit.require(found)


def test_how_long_workers_are_busy(monkeypatch):
    monkeypatch.setattr(fit.ray, "nodes", lambda: [{"Alive": True, "Labels": {"ray.io/accelerator-type": "L4"}}])
    cpu = ClusterConfig(workers=2, cpus_per_worker=5).group("student")
    # 1.8e15 FLOPs at 50 GFLOP/s a core: 36,000 core-seconds, on 10 cores an hour.
    assert fit._busy("student", cpu, 2, 5, 1.8e15).needs.endswith("10 core-hours")
    assert fit._busy("student", cpu, 2, 5, 1.8e15).has.startswith("1 h on 2 workers")
    gpu = ClusterConfig(workers=2, gpus_per_worker=1).group("student")
    # 30 % of 121 TFLOP/s: 1.3068e17 FLOPs an hour.
    assert fit._busy("student", gpu, 2, 1, 2 * 1.3068e17).has.startswith("1 h on 2 workers at 30% of 121 TFLOP/s (L4)")
