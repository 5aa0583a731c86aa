"""`distill doctor` where it runs: this machine, and every node where it is part of a cluster."""

from __future__ import annotations

from cluster import doctor
from cluster.config import ClusterConfig, TrackingConfig
from cluster.doctor import Check
from jobs.config import JobConfig


def checkup(job: JobConfig | None, address: str | None) -> list[Check]:
    """address: of Ray, "auto" on a node of it; without a job only what concerns every job is looked at there."""
    cluster, tracking = (job.cluster, job.tracking) if job else (ClusterConfig(), TrackingConfig())
    cluster = cluster.model_copy(update={"address": address}) if address else cluster
    checks = doctor.check(cluster, tracking, places=job is not None or cluster.address is None)
    if cluster.address and any(one.name == "cluster" and one.state == "ok" for one in checks):
        from cluster import nodes
        from cluster.session import connect

        with connect(cluster):
            seen = nodes.check(cluster, tracking, cluster.storage if job else None)
        # These are looked at on every node, this one too.
        checks = [*(one for one in checks if one.name not in ("memory", "/dev/shm", "storage", "shared", "token")), *seen]
    return checks
