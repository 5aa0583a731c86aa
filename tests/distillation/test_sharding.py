"""A model cut among processes answers and learns as a whole one does, and its checkpoints do not remember how it was cut."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distillation import fit, models, sharding
from distillation.config import DenseLogits, TargetsConfig, TextClassification, TrainingConfig
from distillation.errors import InputError
from distillation.loop import LocalSession
from distillation.network import Network
from tests.tiny import bert, model_folder, settings, world
from tests.together import PeerSession, together, trained_together


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    # 17 and 34 rows of a weight are not divided by 2 or 4 without a rest, nor are 3 labels.
    return world(tmp_path_factory.mktemp("world"), config=TargetsConfig(logits=DenseLogits(dtype="float32")), hidden=18)


def plan(**changes):
    base = {"epochs": 1, "batch_tokens": 96, "microbatch_tokens": 40, "learning_rate": 3e-4, "log_every": 1, "checkpoint_every": 5}
    return TrainingConfig(**{**base, "precision": "fp32", **changes})


def losses(history):
    return [metrics["train/loss"] for _, metrics in history if "train/loss" in metrics]


def weights(storage, name):
    return load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors")


@pytest.fixture(scope="module")
def alone(storage):
    session = LocalSession()
    result = fit.train(settings(storage, "alone", training=plan()), session, {})
    return result, session.history


def same(storage, name, told, alone):
    result, history = told
    expected, expected_history = alone
    assert losses(history) == pytest.approx(losses(expected_history), rel=1e-5)
    assert [m["train/gradient_norm"] for _, m in history if "train/loss" in m] == pytest.approx(
        [m["train/gradient_norm"] for _, m in expected_history if "train/loss" in m], rel=1e-4
    )
    measured = [key for key in expected if key.startswith("validation/")]
    assert [result[key] for key in measured] == pytest.approx([expected[key] for key in measured], rel=1e-4)
    mine, its = weights(storage, name), weights(storage, "alone")
    assert mine.keys() == its.keys()
    for key, value in its.items():
        if not key.endswith("key.bias"):  # has no influence, so its gradient is rounding noise that Adam scales up
            assert torch.allclose(mine[key], value, atol=1e-4), key
    assert (fit.model_folder(storage, f"students/{name}") / "config.json").read_text() == (
        fit.model_folder(storage, "students/alone") / "config.json"
    ).read_text()


@pytest.mark.parametrize(("count", "shards"), [(2, None), (4, 2)])
def test_a_student_cut_among_workers_learns_as_a_whole_one(storage, tmp_path, alone, count, shards):
    name = f"by-{count}"
    told = trained_together(tmp_path / "run", count, shards, settings(storage, name, training=plan()))
    same(storage, name, told, alone)
    assert len(storage.list(f"students/{name}.checkpoints")) == 0


def test_a_run_goes_on_with_other_numbers_of_workers_and_of_shards(storage, tmp_path, alone):
    """3 shards, then one whole model on 2 workers, then 2 shards; each is killed after some steps."""
    config = settings(storage, "moved", training=plan())
    _, first = trained_together(tmp_path / "1", 3, None, config, stop=8)
    assert {"optimizer-00002.safetensors", "weights-00000.safetensors", "manifest.json"} <= set(
        storage.list("students/moved.checkpoints/step-00000005")
    )
    _, second = trained_together(tmp_path / "2", 2, 1, config, stop=13)
    result, third = trained_together(tmp_path / "3", 2, 2, config)
    assert result["resumed_at"] == 10
    assert losses(second)[:5] == losses(first)[:5]  # from the checkpoint, bit by bit
    assert losses(third)[:10] == losses(second)[:10]
    same(storage, "moved", (result, third), alone)


def test_what_was_restored_is_what_was_saved_to_the_last_bit(storage, tmp_path):
    config = settings(storage, "bits", training=plan())
    trained_together(tmp_path / "1", 2, 2, config, stop=7)
    before = read(storage, "bits", 5)
    assert {name.rpartition(".")[2] for name in before} >= {"weight", "bias", "exp_avg", "exp_avg_sq", "step"}
    together(tmp_path / "2", 3, save_again, config.model_dump_json())
    after = read(storage, "bits-again", 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def read(storage, name, step):
    folder = f"students/{name}.checkpoints/step-{step:08d}"
    pieces = sharding.Pieces([storage.fetch(f"{folder}/{file}") for file in storage.list(folder) if file.endswith(".safetensors")])
    return {name: pieces.whole(name) for name in pieces.names()}


def save_again(config):
    """Restore by other workers than those that saved, and save at the next step under another name."""
    from distillation.checkpoints import Checkpoints, Position
    from distillation.config import FitConfig
    from distillation.loop import make_optimizer
    from distillation.storage import Storage

    config, session = FitConfig.model_validate_json(config), PeerSession(None)
    storage = Storage(config.storage)
    old = Checkpoints(storage, "students/bits.checkpoints", config.fingerprint)
    teacher = fit.model_folder(storage, config.teacher)
    network = fit._part(config, teacher, session, old, None, None)
    optimizer = make_optimizer(network, config.training)
    assert old.restore(network, optimizer, session).step == 5
    new = Checkpoints(storage, "students/bits-again.checkpoints", config.fingerprint)
    new.save(network, optimizer, Position(6, 0, 6), session)
    new.close()


def answers(folder, task, out, kind):
    session = PeerSession(None)
    task = TextClassification.model_validate_json(task)
    teacher = sharding.load(folder, lambda model: Network(model, task), task, session.mesh, session.device)
    held = sum(sharding.local(p).numel() for p in teacher.parameters())
    ids = torch.randint(4, 36, (3, 7 + session.rank), generator=torch.Generator().manual_seed(session.rank))
    inputs, rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.arange(3)
    with torch.no_grad():
        said = teacher(inputs, rows * ids.shape[1], torch.arange(ids.numel()), torch.full((3,), ids.shape[1]))
    (out / f"{kind}-{session.rank}.json").write_text(json.dumps([held, ids.tolist(), said.logits.tolist()]))


@pytest.mark.parametrize("count", [2, 4])
def test_a_teacher_cut_among_workers_gives_the_answers_of_a_whole_one(storage, tmp_path, count):
    folder, task = fit.model_folder(storage, "teachers/t"), TextClassification(type="text_classification", max_length=32)
    together(tmp_path / "run", count, answers, folder, task.model_dump_json(), tmp_path, "bert")
    model = models.load(folder, task).eval()
    whole = sum(p.numel() for p in model.parameters())
    for rank in range(count):
        held, ids, said = json.loads((tmp_path / f"bert-{rank}.json").read_text())
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(ids)).logits
        assert torch.allclose(torch.tensor(said), expected, atol=1e-5)
        assert held < 1.15 * whole / count  # of a weight whose rows are not divided without a rest the first has one more


def lacking(folder, task):
    session, task = PeerSession(None), TextClassification.model_validate_json(task)
    with pytest.raises(InputError, match=r"DST-3207.*1 missing or of another shape: classifier.bias"):
        sharding.load(folder, lambda model: Network(model, task), task, session.mesh, session.device)


def test_a_teacher_that_lacks_a_tensor_is_refused(tmp_path):
    from safetensors.torch import save_file

    bert().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    task = TextClassification(type="text_classification", max_length=32)
    together(tmp_path / "run", 2, lacking, tmp_path / "model", task.model_dump_json())


def test_a_teacher_is_taken_over_tensor_by_tensor_as_it_is_as_a_whole(storage, tmp_path, monkeypatch):
    model_folder(tmp_path / "source", labels=("c", "a", "b"))  # another order than the corpus has
    task = TextClassification(type="text_classification", max_length=32)
    fit.adopt(storage, tmp_path / "source", task, ("a", "b", "c"), "teachers/whole", "w", {})
    monkeypatch.setattr(sharding, "FILE_BYTES", 4000)
    fit.adopt(storage, tmp_path / "source", task, ("a", "b", "c"), "teachers/streamed", "s", {}, sharded=True)
    whole, streamed = (fit.model_folder(storage, f"teachers/{name}") for name in ("whole", "streamed"))
    assert len(list(streamed.glob("model-*.safetensors"))) > 3
    assert (whole / "config.json").read_text() == (streamed / "config.json").read_text()
    one, other = (models.load(folder, task).state_dict() for folder in (whole, streamed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parts_are_found_by_their_rows(tmp_path):
    whole = torch.arange(20.0).view(10, 2)
    for number, (start, stop) in enumerate([(6, 10), (0, 4), (4, 6)]):
        sharding.save_part({"w": whole[start:stop].clone()}, {"w": start}, tmp_path / f"{number}.safetensors")
    pieces = sharding.Pieces(sorted(tmp_path.glob("*.safetensors")))
    assert pieces.shape("w") == (10, 2)
    assert torch.equal(pieces.read("w", 0, 10), whole)
    assert torch.equal(pieces.read("w", 3, 7), whole[3:7])
    assert torch.equal(pieces.read("w", 7, 8), whole[7:8])
