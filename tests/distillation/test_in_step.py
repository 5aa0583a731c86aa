"""Evaluation by workers that hold models together finds what one process finds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distillation import inference
from distillation.evaluate import Candidate, evaluate
from distillation.in_step import evaluate_in_step
from distillation.network import mixed
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


def apart(place, folder):
    session = PeerSession(None)
    columns, own = split(place, "text_classification"), longer(place)
    models = [candidates(place)[0], Candidate("student", "student", place / "student", None, own)]
    found = evaluate_in_step(
        models, columns, TASKS["text_classification"], LABELS["text_classification"], ("teacher", "student"), session,
        precision="bf16", threads=1, repeats=4,
    )  # fmt: skip
    if session.rank == 0:
        (folder / "told.json").write_text(json.dumps([e.model_dump(mode="json") for e in found]))


def longer(place):
    """The same rows, each twice as long, as if in the tokens of another tokenizer."""
    columns = split(place, "text_classification")
    (place / "longer").mkdir(exist_ok=True)
    ids = [[*row, *row] for row in columns.ragged("input_ids", np.arange(len(columns)))]
    return split(place / "longer", "text_classification", input_ids=ids)


def test_a_student_that_reads_longer_rows_costs_more_and_bf16_is_said(place, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "SECONDS", 0.01)
    home = place / "text_classification"
    together(tmp_path / "run", 2, apart, home, tmp_path)
    teacher, student = json.loads((tmp_path / "told.json").read_text())
    models = [candidates(home)[0], Candidate("student", "student", home / "student", None, longer(home))]
    columns, about = split(home, "text_classification"), (TASKS["text_classification"], LABELS["text_classification"])
    expected = evaluate(models, columns, *about, precision="bf16", threads=1, repeats=4)
    assert [e["cost"]["flops"] for e in (teacher, student)] == [e.cost["flops"] for e in expected]
    assert student["cost"]["flops"] > 1.9 * teacher["cost"]["flops"]
    assert teacher["precision"] == "bf16"
    assert teacher["quality"]["nll"] == pytest.approx(expected[0].quality["nll"], rel=0.02)


class Cut:
    full_tensor = None


def test_what_is_cast_of_a_cut_model_is_not_kept():
    for parameters, kept in (([torch.zeros(1), Cut()], False), ([torch.zeros(1)], True)):
        with mixed([SimpleNamespace(parameters=lambda its=parameters: its)], True, torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled() is kept
