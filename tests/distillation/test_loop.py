"""The loop: resume is bitwise, the cut into microbatches changes nothing, live teacher and store give the same gradient."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file

from distillation import fit, models, signals, store
from distillation.answers import answer_part, make_teacher
from distillation.checkpoints import Checkpoints
from distillation.config import (
    CausalLM,
    DenseLogits,
    Features,
    LayersStudent,
    LiveTeacher,
    LossConfig,
    PatientKD,
    PretrainedStudent,
    ProbeStudent,
    RelationKL,
    ScratchStudent,
    TargetsConfig,
    TopKLogits,
    TrainingConfig,
)
from distillation.errors import DivergedError, InputError
from distillation.loop import Left, LocalSession, learning_rate
from distillation.losses import unit_of, weigh
from distillation.network import observe
from distillation.rows import open_rows
from distillation.signals import UNLABELLED, Outputs
from distillation.storage import Storage
from distillation.tasks import build_task
from tests.tiny import LOSSES, TASK, model_folder, rows_of, settings, split_of, tokenizer, world


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    features = TargetsConfig(features=Features(layers=(1, 3), pooled=True, dtype="float32"))
    return world(tmp_path_factory.mktemp("world"), labelled=0.5, config=features)


def trained(storage, name, session=None, **changes):
    session = session or LocalSession()
    result = fit.train(settings(storage, name, **changes), session, {})
    return result, session.history, load_file(fit.model_folder(storage, f"students/{name}") / "model.safetensors")


def faster(**changes):
    base = {"epochs": 3, "batch_tokens": 256, "learning_rate": 3e-3, "log_every": 1, "checkpoint_every": 0, "precision": "fp32"}
    return TrainingConfig(**{**base, **changes})


def losses_of(history):
    return [metrics["train/loss"] for _, metrics in history if "train/loss" in metrics]


class Stopped(Exception):
    pass


class StoppingSession(LocalSession):
    """Dies right after it reported a step, as a killed process would."""

    def __init__(self, step):
        super().__init__()
        self._step = step

    def report(self, metrics, step):
        super().report(metrics, step)
        if step == self._step and "train/loss" in metrics:
            raise Stopped


def test_a_student_learns_and_a_finished_run_is_not_repeated(storage):
    soft = {"losses": {"soft": LOSSES["soft"]}, "training": faster(epochs=12)}
    result, history, _ = trained(storage, "learns", **soft)
    losses = losses_of(history)
    assert losses[-1] < 0.2 * losses[0]
    assert result["validation/agreement"] >= 0.8
    assert result["validation/kl_to_teacher"] < 0.1
    hard, _, _ = trained(storage, "labels-learn", losses={"hard": LOSSES["hard"]}, targets={}, training=faster(epochs=12))
    assert hard["validation/accuracy"] > 0.6  # one in three by chance
    again = LocalSession()
    assert fit.train(settings(storage, "learns", **soft), again, {}) == result
    assert again.history == history  # whoever asks has not seen it


@pytest.mark.parametrize("stop", [1, 7, 12])
def test_stopped_in_mid_epoch_and_resumed_is_bitwise_the_same(storage, stop):
    plan = faster(checkpoint_every=3, dropout=0.1)
    _, whole, weights = trained(storage, f"whole-{stop}", training=plan)
    first = StoppingSession(stop)
    with pytest.raises(Stopped):
        trained(storage, f"cut-{stop}", first, training=plan)
    second = LocalSession()
    result, _, resumed = trained(storage, f"cut-{stop}", second, training=plan)
    at = stop // 3 * 3  # a checkpoint is on its way before its step is reported
    assert result["resumed_at"] == at
    assert losses_of(first.history)[:at] == losses_of(whole)[:at]
    assert losses_of(second.history) == losses_of(whole)  # what came before the checkpoint is reported again: it may not have arrived
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert len(storage.list(f"students/cut-{stop}.checkpoints")) == 0


class LeavingSession(LocalSession):
    """Is asked to leave when six steps are done."""

    def leave(self, step):
        return step == 6


def test_a_group_that_is_asked_to_leave_keeps_every_step(storage):
    plain = trained(storage, "stays", training=faster(log_every=4))
    leaving = LeavingSession()
    with pytest.raises(Left):
        trained(storage, "leaves", leaving, training=faster(log_every=4))
    assert storage.list("students/leaves.checkpoints") == ["step-00000007"]  # the step that was begun is ended
    assert [step for step, _ in leaving.history] == [4, 7]  # and told, as at any checkpoint
    result, _, weights = trained(storage, "leaves", training=faster(log_every=4))
    assert result["resumed_at"] == 7
    assert all(torch.equal(value, weights[name]) for name, value in plain[2].items())


def test_resume_keeps_the_curve_whatever_the_cadences(storage):
    plan = faster(checkpoint_every=6, log_every=4)
    _, whole, _ = trained(storage, "cadence", training=plan)
    with pytest.raises(Stopped):
        trained(storage, "cadence-cut", StoppingSession(8), training=plan)
    _, resumed, _ = trained(storage, "cadence-cut", training=plan)
    assert [step for step, _ in whole][:4] == [4, 6, 8, 12]
    assert losses_of(resumed) == losses_of(whole)


def test_a_damaged_checkpoint_is_passed_over_and_kept(storage, capsys):
    plan = faster(checkpoint_every=3)
    with pytest.raises(Stopped):
        trained(storage, "hurt", StoppingSession(8), training=plan)
    folder = "students/hurt.checkpoints"
    assert storage.list(folder) == ["step-00000003", "step-00000006"]
    path = storage.fetch(f"{folder}/step-00000006/weights.safetensors")
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    session = LocalSession()
    result, _, _ = trained(storage, "hurt", session, training=plan)
    assert result["resumed_at"] == 3
    assert "step-00000006 is passed over" in capsys.readouterr().out


class Looking(LocalSession):
    """Sees which checkpoints are there when a score is reported."""

    def __init__(self, storage, folder):
        super().__init__()
        self._look, self.there = lambda: storage.list(folder), {}

    def report(self, metrics, step):
        super().report(metrics, step)
        if "validation/accuracy" in metrics:
            self.there[step] = self._look()


def test_a_checkpoint_at_a_rung_is_committed_before_its_score_is_reported(storage):
    session = Looking(storage, "trials/rung.checkpoints")
    rows = {int(metrics["train/rows"]): step for step, metrics in trained(storage, "for-rungs")[1] if "train/rows" in metrics}
    rungs = sorted(rows)[4], sorted(rows)[9]
    fit.train(settings(storage, "rung", output="trials/rung", keep_model=False, rungs=rungs, save_rungs=True), session, {})
    first, second = rows[rungs[0]], rows[rungs[1]]
    assert session.there[first] == [f"step-{first:08d}"]
    assert session.there[second] == [f"step-{first:08d}", f"step-{second:08d}"]


def test_a_run_goes_on_from_the_checkpoint_of_another_once(storage):
    """As in a population: the weights of the other one, its own losses and rate."""
    rows = [int(metrics["train/rows"]) for _, metrics in trained(storage, "for-rows")[1] if "train/rows" in metrics]
    kind = {"keep_model": False, "rungs": (rows[4], rows[9]), "save_rungs": True}
    for name, rate in (("source", 3e-3), ("taker", 1e-4)):
        with pytest.raises(Stopped):
            fit.train(settings(storage, name, output=f"trials/{name}", training=faster(learning_rate=rate), **kind), StoppingSession(7), {})
    other = load_file(storage.fetch("trials/source.checkpoints/step-00000005/weights.safetensors"))
    taker = settings(storage, "taker", output="trials/taker", training=faster(learning_rate=1e-4), **kind)
    fit.go_on_from(taker, "trials/source", 5)
    mine = storage.fetch("trials/taker.checkpoints/step-00000005/weights.safetensors")
    assert all(torch.equal(value, load_file(mine)[name]) for name, value in other.items())
    session = StoppingSession(11)
    with pytest.raises(Stopped):
        fit.train(taker, session, {})
    assert storage.list("trials/taker.checkpoints") == ["step-00000005", "step-00000010"]
    assert session.history[-1][1]["train/learning_rate"] < 1e-4  # its own, not 3e-3
    reached = storage.read("trials/taker.checkpoints/step-00000010/manifest.json")
    fit.go_on_from(taker, "trials/source", 5)  # said again after a restart: this run is beyond it
    assert storage.read("trials/taker.checkpoints/step-00000010/manifest.json") == reached
    assert storage.list("trials/taker.checkpoints") == ["step-00000005", "step-00000010"]


def test_checkpoints_of_another_run_are_not_taken(storage, capsys):
    plan = faster(checkpoint_every=3)
    with pytest.raises(Stopped):
        trained(storage, "other", StoppingSession(5), training=plan)
    result, _, _ = trained(storage, "other", training=plan, fingerprint="changed")
    assert result["resumed_at"] == 0
    assert "is of another run" in capsys.readouterr().out


def test_checkpoints_hold_no_pickle_and_a_readable_position(storage):
    with pytest.raises(Stopped):
        trained(storage, "look", StoppingSession(8), training=faster(checkpoint_every=3))
    names = storage.list("students/look.checkpoints/step-00000006")
    assert names == ["history.json", "manifest.json", "optimizer.safetensors", "position.json", "weights.safetensors"]
    position = json.loads(storage.read("students/look.checkpoints/step-00000006/position.json"))
    assert position["step"] == 6
    assert [step for step, _ in json.loads(storage.read("students/look.checkpoints/step-00000006/history.json"))] == [1, 2, 3, 4, 5, 6]


def test_microbatches_change_nothing(storage):
    _, whole, _ = trained(storage, "micro-whole")
    _, pieces, _ = trained(storage, "micro-cut", training=faster(microbatch_tokens=40))
    assert losses_of(pieces) == pytest.approx(losses_of(whole), rel=1e-5)


def test_live_teacher_and_store_give_the_same_gradient(storage):
    losses = {**LOSSES, "inner": PatientKD(type="pkd", weight=0.5, layers={0: 1, 1: 3})}
    rows = rows_of(storage)
    stored = rows.batch(np.arange(20))
    config = rows.targets["teacher"].config
    teacher = make_teacher(models.load(fit.model_folder(storage, "teachers/t"), TASK), TASK, config)
    live = observe(teacher, stored, False, config.logits, config.features)
    assert torch.allclose(live.pooled, stored.signal.pooled, atol=1e-6)

    def gradient(signal):
        logits = torch.linspace(-1, 1, 60).reshape(20, 3).requires_grad_()
        hidden = torch.linspace(-1, 2, 20 * 2 * 16).reshape(20, 2, 16).requires_grad_()
        counts = {name: rows.count(np.arange(20), unit_of(loss, "scored")) for name, loss in losses.items()}
        outputs = Outputs(logits, hidden=hidden, layers=(0, 1))
        weigh(losses, outputs, replace(stored, signals={"teacher": signal}), counts)[0].backward()
        return torch.cat([logits.grad.flatten(), hidden.grad.flatten()])

    ours, its = gradient(stored.signal), gradient(live)
    assert (ours - its).norm() / its.norm() < 1e-3  # logits are stored as float16
    assert (stored.signal.logits.float() - live.logits).abs().max() < 2**-11 * 8  # half a unit of float16 below 8


def test_labels_alone_use_labelled_rows_only(storage):
    only = {"hard": LOSSES["hard"]}
    result, history, _ = trained(storage, "labels", losses=only, targets={})
    both, _, _ = trained(storage, "both")
    assert result["steps"] < both["steps"]
    assert "validation/agreement" not in result
    assert losses_of(history)[0] == pytest.approx(0.3 * history[0][1]["train/loss/hard"])


def test_hidden_states_and_probe_train_from_the_store(storage):
    inner = {"inner": PatientKD(type="pkd", layers={0: 1, 1: 3})}
    _, history, _ = trained(storage, "inner", losses=inner)
    assert losses_of(history)[-1] < losses_of(history)[0]
    soft = {"losses": {"soft": LOSSES["soft"]}, "training": faster(epochs=15, learning_rate=0.05)}
    result, _, weights = trained(storage, "probe", student=ProbeStudent(type="probe"), **soft)
    assert result["validation/agreement"] == 1.0  # the teacher's own head is such a layer
    teacher = load_file(fit.model_folder(storage, "teachers/t") / "model.safetensors")
    assert torch.equal(weights["bert.embeddings.word_embeddings.weight"], teacher["bert.embeddings.word_embeddings.weight"])
    assert not torch.equal(weights["classifier.weight"], teacher["classifier.weight"])


def test_a_store_without_the_layer_and_a_foreign_corpus(storage):
    with pytest.raises(InputError, match=r"DST-3214.*losses\.inner: expected \[0\] but found \[1, 3\]"):
        trained(storage, "nolayer", losses={"inner": PatientKD(type="pkd", layers={0: 0})})
    with pytest.raises(InputError, match=r"DST-3214.*losses\.inner: expected relations but found"):
        trained(storage, "norelation", losses={"inner": RelationKL(type="relation_kl", heads=2)})
    manifest = json.loads(storage.read("targets/t/manifest.json"))
    facts = {**manifest["facts"], "corpus": "someone else's"}
    found = store.find(storage, "targets/t")
    store.commit(storage, "targets/foreign", found.model_copy(update={"facts": facts, "splits": {}}))
    with pytest.raises(InputError, match=r"DST-3110.*expected c but found someone else's"):
        trained(storage, "foreign", targets={"teacher": "targets/foreign"})


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(storage, tmp_path):
    folder = model_folder(tmp_path / "broken", layers=2)
    weights = load_file(folder / "model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][30] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DivergedError, match=r"DST-4001.*step \d+, rows [0-9a-f]{32}.*Lower training.learning_rate"):
        trained(storage, "nan", student=PretrainedStudent(type="pretrained", model=str(folder)))


def test_a_score_that_is_not_finite_ends_the_run_though_the_loss_was(storage):
    """The last step leaves weights of 1e38: the loss before it was fine, and a score from before would be believed."""
    session = LocalSession()
    with pytest.raises(DivergedError, match=r"DST-4001.*evaluation after step 1\b.*validation/nll=nan"):
        trained(storage, "leaps", session, training=faster(epochs=None, steps=1, learning_rate=1e38, warmup=0.0))
    assert not [metrics for _, metrics in session.history if "validation/nll" in metrics]


def test_no_rows_to_train_on(storage):
    split = split_of(storage, with_targets=False)
    split.whole._labelled[:] = 0
    from distillation.loop import Fit

    with pytest.raises(InputError, match="DST-3302"):
        Fit(torch.nn.Linear(1, 1), split, None, {"hard": LOSSES["hard"]}, faster(), LocalSession(), None).run()


def test_unlabelled_rows_reach_the_batch_as_such(storage):
    batch = rows_of(storage).batch(np.arange(120))
    assert int((batch.labels == UNLABELLED).sum()) == 60
    assert batch.signal.logits.dtype == torch.float16
    assert batch.inputs["attention_mask"].sum(1).tolist() == batch.lengths.tolist() == rows_of(storage).lengths.tolist()


def test_learning_rate_by_hand():
    plan = TrainingConfig(steps=10, learning_rate=1.0, warmup=0.2, decay="linear")
    assert [learning_rate(step, 10, plan) for step in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])
    cosine = plan.model_copy(update={"decay": "cosine"})
    assert learning_rate(6, 10, cosine) == pytest.approx(0.5)
    assert learning_rate(9, 10, plan.model_copy(update={"decay": "constant"})) == 1.0


def test_what_a_checkpoint_could_not_write_is_raised(storage, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    module = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(Storage(str(blocked / "below")), "c", "f")
    from distillation.checkpoints import Position
    from distillation.errors import StorageError

    checkpoints.save(module, torch.optim.AdamW(module.parameters()), Position(1, 0, 1), LocalSession())
    with pytest.raises(StorageError, match="DST-5002"):
        checkpoints.close()


# ------------------------------------------------------------------------------------------- language models, live teachers, groups


WORDS = CausalLM(type="causal_lm", max_length=12)
FEATURES = Features(layers=(0, 1), at="tokens", pooled=True, dtype="float32")
STORES = {
    "topk": TargetsConfig(logits=TopKLogits(type="topk", k=8, temperatures=(1, 2)), features=FEATURES),
    "dense": TargetsConfig(logits=DenseLogits(dtype="float32"), features=FEATURES),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Sentences that count up from a word, a GPT-2 of two layers that was drawn at random, and two stores of what it says."""
    folder = tmp_path_factory.mktemp("words")
    storage, generator, splits = Storage(str(folder / "storage")), np.random.default_rng(0), {}
    for split, count in (("train", 60), ("validation", 12)):
        ids = [(generator.integers(4, 30) + np.arange(generator.integers(1, 12))).astype(np.int32) for _ in range(count)]
        lengths = [len(row) for row in ids]
        names = sorted(hashlib.sha256(f"{split}{i}".encode()).hexdigest()[:32] for i in range(count))
        scored = pa.array([n - 1 for n in lengths], pa.int32())
        table = pa.table({
            "id": names, "text": [""] * count, "length": pa.array(lengths, pa.int32()), "scored": scored, "labelled": scored,
            "bytes": pa.array([3 * n for n in lengths], pa.int32()), "input_ids": pa.array(ids, pa.list_(pa.int32())),
        })  # fmt: skip
        splits[split] = (store.write_part(storage, "corpora/w", f"part-{split}", table, sum(lengths)),)
    facts = {"labels": [], "labelled": {}}
    store.commit(storage, "corpora/w", store.Manifest(kind="corpus", fingerprint="w", made_from={}, splits=splits, facts=facts))
    torch.manual_seed(0)
    sizes = {"vocab_size": 44, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.3}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).eval()
    model.save_pretrained(folder / "source")
    tokenizer(folder / "source")
    fit.commit_model(storage, "teachers/w", model, folder / "source", WORDS, (), "t", {}, {"result": {}, "history": []})
    for name, config in STORES.items():
        records = {}
        for split in splits:
            rows = open_rows(storage, "corpora/w", {}, split, build_task(WORDS))
            table, _ = answer_part(make_teacher(model, WORDS, config), rows, config, 60, False, torch.device("cpu"))
            records[split] = (store.write_part(storage, f"targets/{name}", f"part-{split}", table, 0),)
        facts = {"corpus": "w", "targets": config.model_dump(mode="json"), "labels": []}
        store.commit(
            storage, f"targets/{name}", store.Manifest(kind="targets", fingerprint=name, made_from={}, splits=records, facts=facts)
        )
    return storage


def loss(type_, **knobs):
    return TypeAdapter(LossConfig).validate_python({"type": type_, **knobs})


def language(words, name, session=None, *, store_="topk", pack=True, training=None, **changes):
    values = {
        "task": WORDS.model_copy(update={"pack": pack}), "labels": (), "corpus": "corpora/w", "targets": {"teacher": f"targets/{store_}"},
        "teacher": "teachers/w", "student": LayersStudent(type="layers", layers=(1,)), "features_at": "tokens",
        "losses": {"hard": loss("cross_entropy", weight=0.3), "soft": loss("forward_kl")},
        "training": faster(epochs=4, batch_tokens=96, **(training or {})),
    }  # fmt: skip
    return trained(words, name, session, **{**values, **changes})


def alike(one, other, rel=1e-4):
    """Of two runs: the curve, what was measured, and the weights."""
    assert losses_of(one[1]) == pytest.approx(losses_of(other[1]), rel=rel)
    measured = [name for name in one[0] if name.startswith("validation/")]
    assert len(measured) >= 2
    assert [one[0][name] for name in measured] == pytest.approx([other[0][name] for name in measured], rel=10 * rel, abs=1e-6)
    assert one[2].keys() == other[2].keys()


@pytest.mark.parametrize("pack", [True, False])
def test_microbatches_change_nothing_for_a_language_model(words, pack, monkeypatch):
    whole = language(words, f"lm-whole-{pack}", pack=pack)
    monkeypatch.setattr(signals, "CHUNK_VALUES", 44 * 5)
    pieces = language(words, f"lm-cut-{pack}", pack=pack, training={"microbatch_tokens": 16})
    alike(whole, pieces)
    assert losses_of(whole[1])[-1] < losses_of(whole[1])[0]
    assert set(whole[0]) >= {"validation/perplexity", "validation/bits_per_byte", "validation/kl_to_teacher", "validation/agreement"}
    if pack:  # packing changes the padding alone, not what is learned
        alike(whole, language(words, "lm-padded", pack=False))


SMALL = ScratchStudent(type="scratch", layers=1, hidden_size=8, heads=2, intermediate_size=12)
INNER = {"losses": {"h": loss("hidden_mse", layers={0: 1}, projection=True), "soft": loss("forward_kl", weight=0.1)}, "student": SMALL}


def test_hidden_states_of_another_width_at_every_token(words):
    plan = {"checkpoint_every": 3}
    whole = language(words, "wide-whole", training=plan, **INNER)
    alike(whole, language(words, "wide-cut", training={"microbatch_tokens": 16}, **INNER))
    terms = [metrics["train/loss/h"] for _, metrics in whole[1] if "train/loss/h" in metrics]
    assert terms[-1] < 0.9 * terms[0]
    assert not any("projection" in name for name in whole[2])
    trained_ = store.find(words, "students/wide-whole").facts["trained_parameters"]
    assert trained_ == store.find(words, "students/wide-whole").facts["parameters"] + 8 * 16
    with pytest.raises(Stopped):
        language(words, "wide-stopped", StoppingSession(7), training=plan, **INNER)
    saved = [
        load_file(words.fetch(f"students/wide-stopped.checkpoints/step-{step:08d}/weights.safetensors"))["projections.h.0.weight"]
        for step in (3, 6)
    ]
    assert saved[0].shape == (16, 8)
    assert (saved[0] - saved[1]).abs().max() > 1e-4  # it learns along
    result, history, weights = language(words, "wide-stopped", training=plan, **INNER)
    assert result["resumed_at"] == 6
    assert losses_of(history) == losses_of(whole[1])
    assert all(torch.equal(weights[name], whole[2][name]) for name in weights)


@pytest.mark.parametrize("type_", ["rkd_distance", "similarity_kl", "contrastive"])
def test_microbatches_do_not_cut_groups(storage, type_):
    terms = {"losses": {"g": loss(type_, group=4, **({"temperature": 1.0} if type_ != "rkd_distance" else {})), "soft": LOSSES["soft"]}}
    whole = trained(storage, f"{type_}-whole", **terms, training=faster(epochs=6))
    alike(whole, trained(storage, f"{type_}-cut", training=faster(epochs=6, microbatch_tokens=70), **terms))
    terms_ = [metrics["train/loss/g"] for _, metrics in whole[1] if "train/loss/g" in metrics]
    assert np.mean(terms_[-8:]) < 0.98 * np.mean(terms_[:8])


def live(folder, config):
    return {"targets": {}, "live": {"teacher": LiveTeacher(folder=folder, targets=config, precision="fp32")}}


@pytest.mark.parametrize("losses", [
    {"soft": loss("forward_kl"), "hard": loss("cross_entropy", weight=0.1)},
    {"soft": loss("reverse_kl", temperature=1.0), "h": loss("hidden_mse", layers={0: 1}), "p": loss("cosine", weight=0.3)},
], ids=["logits", "states"])  # fmt: skip
def test_training_with_a_live_teacher_is_training_from_its_store(words, losses, request):
    name = request.node.callspec.id
    stored = language(words, f"stored-{name}", store_="dense", losses=losses)
    asked = language(words, f"live-{name}", losses=losses, **live("teachers/w", STORES["dense"]))
    alike(asked, stored, rel=1e-3)
    assert stored[0]["teacher_rows"] == 0
    seen = [metrics["train/rows"] for _, metrics in asked[1] if "train/rows" in metrics][-1]
    assert asked[0]["teacher_rows"] == seen + 12  # every step's rows, and the validation split at the end


def test_a_live_teacher_shows_its_attention_beside_its_hidden_states(storage):
    config = TargetsConfig(logits=DenseLogits(dtype="float32"), features=Features(layers=(2,), dtype="float32"))
    terms = {"a": loss("attention_kl", layers={0: 1, 1: 3}), "h": loss("hidden_mse", layers={1: 2}, weight=0.1)}
    whole = trained(storage, "attention", losses=terms, training=faster(epochs=6), **live("teachers/t", config))
    points = [metrics["train/loss/a"] for _, metrics in whole[1] if "train/loss/a" in metrics]
    assert points[-1] < 0.7 * points[0]
    cut = trained(storage, "attention-cut", losses=terms, training=faster(epochs=6, microbatch_tokens=64), **live("teachers/t", config))
    alike(cut, whole)


def test_a_stored_and_a_live_teacher_at_once(storage):
    config = TargetsConfig(logits=DenseLogits(dtype="float32"))
    two = {"targets": {"one": "targets/t"}, "live": {"two": LiveTeacher(folder="teachers/t", targets=config, precision="fp32")}}
    half = {"a": loss("forward_kl", teacher="one", weight=0.5), "b": loss("forward_kl", teacher="two", weight=0.5)}
    mean = {"m": loss("forward_kl", teacher={"one": 0.5, "two": 0.5})}
    both, mixed = trained(storage, "half", losses=half, **two), trained(storage, "mixed", losses=mean, **two)
    one = trained(storage, "one-alone", losses={"a": loss("forward_kl")})
    assert losses_of(both[1]) == pytest.approx(losses_of(one[1]), rel=5e-3)  # they are the same one
    assert losses_of(mixed[1]) == pytest.approx(losses_of(one[1]), rel=5e-3)


def test_a_ramp_moves_the_weight_from_step_to_step(storage):
    ramped = {"soft": loss("forward_kl", weight={"start": 1, "end": 0}, temperature={"start": 4, "end": 1}), "hard": loss("cross_entropy")}
    result, history, _ = trained(storage, "ramp", losses=ramped)
    points = [metrics for _, metrics in history if "train/loss" in metrics]
    shares = [one["train/weighted/soft"] / one["train/loss/soft"] for one in points]
    assert shares == pytest.approx([1 - step / result["steps"] for step in range(len(points))], rel=1e-4)
