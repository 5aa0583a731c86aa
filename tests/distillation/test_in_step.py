"""Evaluation by workers that hold models together finds what one process finds."""

import json

import pytest

from distillation import inference
from distillation.evaluate import Candidate, evaluate
from distillation.in_step import evaluate_in_step
from tests.kinds import LABELS, TASKS, save, split
from tests.together import PeerSession, together

KINDS = [kind for kind in TASKS if kind not in ("regression", "multi_label", "image_classification")]
"""Without those that need models that were written down, and ViT, which cannot be cut."""


def world(place, kind):
    """Folders of two models."""
    save(place / "teacher", kind)
    save(place / "student", kind, seed=1)


def candidates(place):
    return [Candidate("teacher", "teacher", place / "teacher"), Candidate("student", "student", place / "student", "plain"),
            Candidate("baseline", "plain", place / "student")]  # fmt: skip


def in_step(place, kinds, cut, batch_tokens):
    session, told = PeerSession(None), {}
    for kind in kinds:
        columns = split(place / kind, kind)
        found = evaluate_in_step(
            candidates(place / kind), columns, TASKS[kind], LABELS.get(kind, ()), cut, session, precision="fp32", threads=1, repeats=4,
            batch_tokens=batch_tokens,
        )  # fmt: skip
        assert bool(found) == (session.rank == 0)
        told[kind] = [e.model_dump(mode="json") for e in found]
    (place / f"told-{session.rank}-{len(cut)}.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        (place / kind).mkdir()
        world(place / kind, kind)
    return place


@pytest.mark.parametrize(("workers", "cut", "batch_tokens"), [(2, ("teacher",), 64), (3, ("teacher", "student", "plain"), 8192)])
def test_cut_models_are_worth_and_cost_what_whole_ones_do(place, tmp_path, monkeypatch, workers, cut, batch_tokens):
    """With 8,192 tokens there is one batch, and two of three workers have none."""
    monkeypatch.setattr(inference, "SECONDS", 0.01)
    together(tmp_path / "run", workers, in_step, place, KINDS, cut, batch_tokens)
    told = json.loads((place / f"told-0-{len(cut)}.json").read_text())
    for kind in KINDS:
        columns = split(place / kind, kind)
        expected = evaluate(
            candidates(place / kind), columns, TASKS[kind], LABELS.get(kind, ()), precision="fp32", threads=1, repeats=4, batch_tokens=batch_tokens
        )  # fmt: skip
        for mine, its in zip(told[kind], (e.model_dump(mode="json") for e in expected), strict=True):
            where = kind, mine["name"]
            for part in ("quality", "against"):
                assert mine[part] == pytest.approx(its[part], rel=1e-5, abs=1e-5), (*where, part)
            assert mine["confusion"] == its["confusion"], where
            assert mine["cost"].keys() == its["cost"].keys(), where
            for name in ("parameters", "bytes", "flops", "threads"):
                assert mine["cost"][name] == its["cost"][name], (*where, name)
            assert min(mine["cost"].values()) > 0, where
            assert mine["ratios"].keys() == its["ratios"].keys()
            assert mine["device"] == (f"{workers} x cpu" if mine["name"] in cut else "cpu")
