"""What is said where there is no Ray to work with."""

import os

import pytest
import ray

from cluster.config import ClusterConfig
from cluster.session import connect
from distillation.errors import ClusterError


def refusal(monkeypatch, error, **settings):
    def fails(**options):
        raise error

    monkeypatch.setattr(ray, "init", fails)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets some
    with connect(ClusterConfig(**settings)):
        pytest.fail("there is no cluster")


def test_a_machine_too_busy_for_ray_to_start(monkeypatch):
    late = Exception("The current node timed out during startup. This could happen because ...\nand more")
    with pytest.raises(
        ClusterError, match=r"DST-6001.*this machine.*timed out during startup[^\n]*\n?.*when the machine has less to do"
    ) as told:
        refusal(monkeypatch, late)
    assert "and more" not in str(told.value)


def test_an_address_that_nobody_answers(monkeypatch):
    with pytest.raises(ClusterError, match=r"DST-6001.*127\.0\.0\.1:1\b"):
        refusal(monkeypatch, ConnectionError("Ray cluster at 127.0.0.1:1 is not there"), address="127.0.0.1:1")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), TypeError("unexpected keyword argument"), AssertionError("of Ray")])
def test_what_is_nobodys_cluster_is_not_hidden(monkeypatch, error):
    with pytest.raises(type(error)):
        refusal(monkeypatch, error)
