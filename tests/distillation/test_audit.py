"""The audit: what a teacher said passes, what it did not say is found, for every kind of target."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.audit import audit
from distillation.columns import Columns
from distillation.config import DenseLogits, Features, SampledLogits, TargetsConfig, TopKLogits
from distillation.rows import Rows, Targets
from tests.tiny import LABELS, TASK, world

CPU = torch.device("cpu")
INNER = Features(layers=(1,), pooled=True, relations=2)
KINDS = {
    "dense": TargetsConfig(logits=DenseLogits(), features=INNER),
    "topk": TargetsConfig(logits=TopKLogits(type="topk", k=2, temperatures=(1.0, 2.0)), features=Features(pooled=True, dtype="float32")),
    "coarse": TargetsConfig(logits=TopKLogits(type="topk", k=2, dtype="uint8")),
    "drawn": TargetsConfig(logits=SampledLogits(type="sampled", draws=40)),
}


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    return world(tmp_path_factory.mktemp("world"))


def opened(storage, config, change=None):
    """Teacher, and 40 rows with their answers, of which `change` may alter a column."""
    folder = fit.model_folder(storage, "teachers/t")
    _, paths = store.open_artifact(storage, "corpora/c", "corpus")
    with pa.ipc.open_stream(next(path for name, path in paths.items() if name.endswith("train.arrow"))) as reader:
        columns = Columns.of(reader.read_all()[:40])
    task = fit.reader(TASK, folder, LABELS)
    teacher = make_teacher(models.load(folder, TASK), TASK, config)
    table, _ = answer_part(teacher, Rows(columns, {}, task), config, 512, False, CPU)
    return teacher, Rows(columns, {"teacher": Targets(Columns.of(change(table) if change else table), config)}, task)


def findings(storage, config, change=None):
    teacher, rows = opened(storage, config, change)
    return audit(teacher, rows, "teacher", np.arange(0, 40, 2), False, CPU)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_teacher_said_passes(storage, kind):
    found = findings(storage, KINDS[kind])
    assert found
    assert all(one.holds for one in found), found


def altered(column, row, by):
    """One number of one row is another."""

    def change(table):
        values = table.column(column).combine_chunks()
        width = values.type.list_size
        numbers = values.flatten().to_numpy().copy()
        numbers[row * width] = by(numbers[row * width])
        place = table.column_names.index(column)
        return table.set_column(place, column, pa.FixedSizeListArray.from_arrays(pa.array(numbers), width))

    return change


@pytest.mark.parametrize(
    ("kind", "column", "by", "what"),
    [
        ("dense", "logits", lambda x: x + 1, "logits"),
        ("dense", "pooled", lambda x: -x + 0.5, "pooled"),
        ("dense", "hidden_1", lambda x: x + 2, "hidden_1"),
        ("topk", "log_p", lambda x: x - 0.2, "log-probabilities (nats)"),
        ("topk", "pooled", lambda x: x + 3, "head on the stored input of the head (nats)"),
        ("coarse", "log_p", lambda x: x + 9, "log-probabilities (nats)"),
    ],
)
def test_one_altered_number_of_a_row_of_the_sample_is_found(storage, kind, column, by, what):
    found = findings(storage, KINDS[kind], altered(column, 4, by))
    assert what in [one.what for one in found if not one.holds]
    outside = findings(storage, KINDS[kind], altered(column, 5, by))  # not in the sample
    assert all(one.holds for one in outside)


def test_an_altered_head_disagrees_with_the_stored_answers(storage):
    teacher, rows = opened(storage, KINDS["dense"])
    with torch.no_grad():
        teacher.head.bias += 0.5
    failed = [one.what for one in audit(teacher, rows, "teacher", np.arange(20), False, CPU) if not one.holds]
    assert failed == ["logits", "head on the stored input of the head"]


def test_an_id_that_the_teacher_does_not_name_is_lost_mass(storage):
    def swap(table):
        ids = table.column("ids").combine_chunks().flatten().to_numpy().reshape(-1, 2).copy()
        missing = 3 - ids.astype(int).sum(1)  # of three classes the one that is not stored
        ids[:, 0] = missing
        place = table.column_names.index("ids")
        return table.set_column(place, "ids", pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), 2))

    failed = [one.what for one in findings(storage, KINDS["topk"], swap) if not one.holds]
    assert "mass of ids that are not stored" in failed


def test_draws_of_another_teacher_are_far(storage):
    def one_class(table):
        ids = np.zeros(40 * 40, np.uint16)
        place = table.column_names.index("ids")
        return table.set_column(place, "ids", pa.FixedSizeListArray.from_arrays(pa.array(ids), 40))

    assert [one.what for one in findings(storage, KINDS["drawn"], one_class) if not one.holds] == ["draws"]
