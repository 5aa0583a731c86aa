"""Where a person looks, and what a run says of its surroundings."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest

from cluster import links
from distillation.errors import ConfigError


def test_links() -> None:
    """Spaces, quotes and brackets are escaped, so that a terminal makes the whole of it a link."""
    assert links.compare_url("http://m:80/", "2", ["a", "b"]) == (
        "http://m:80/#/compare-runs?runs=%5B%22a%22%2C%22b%22%5D&experiments=%5B%222%22%5D&workflowType=machine_learning"
    )
    assert links.experiment_url("sqlite:///x.db", "2") == (
        "http://127.0.0.1:5000/#/experiments/2/runs?viewStateShareKey=distillery&workflowType=machine_learning"
    )
    assert links.chart_url("http://m:80/", "2", "validation/accuracy") == (
        "http://m:80/#/experiments/2/runs?orderByKey=metrics.%60validation%2Faccuracy%60&orderByAsc=false"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )
    assert "&orderByAsc=true&" in links.chart_url("http://m:80/", "2", "validation/nll", ascending=True)
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
