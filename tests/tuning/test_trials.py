"""What a trial tells Tune besides what its training reports."""

from __future__ import annotations

import pytest
import ray.tune

from tuning.trials import Reporter


def reporting(monkeypatch, work, *points):
    """What a trial tells Tune."""
    said = []
    monkeypatch.setattr(ray.tune, "report", said.append)
    reporter = Reporter({"fit": {"save_rungs": False}, **work})
    for metrics in points:
        reporter.point(metrics, 1)
    return said


def test_a_trial_reports_what_it_keeps_of_the_teachers_perplexity(monkeypatch):
    teacher = {"metric": "validation/perplexity", "value": 10.0}
    work = {"quality": "validation/retention", "maximise": True, "teacher": teacher}
    said = reporting(monkeypatch, work, {"validation/perplexity": 12.5, "validation/accuracy": 0.4, "train/rows": 7})
    assert said[0]["points"][0][1]["validation/retention"] == pytest.approx(0.8)
    assert (said[0]["rows"], said[0]["quality"]) == (7, pytest.approx(0.8))
    work = {"quality": "validation/perplexity", "maximise": False, "teacher": {**teacher, "value": None}}
    said = reporting(monkeypatch, work, {"validation/perplexity": 12.5, "train/rows": 7})
    assert "validation/retention" not in said[0]["points"][0][1]
    assert said[0]["quality"] == -12.5  # more is better to a scheduler
