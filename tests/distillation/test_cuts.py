"""Students that are cut in width and vocabulary, trained from the store: what they keep, what they read, what is handed over."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from distillation import fit, models, store
from distillation.columns import Columns
from distillation.config import (
    CausalLM,
    CrossEntropy,
    DenseLogits,
    FitConfig,
    ForwardKL,
    LayersStudent,
    NewModel,
    SampledLogits,
    TargetsConfig,
    TopKLogits,
    TrainingConfig,
)
from distillation.errors import InputError
from distillation.inference import load_trained, rows_for
from distillation.loop import LocalSession
from distillation.network import Network
from distillation.rows import open_columns, open_rows
from distillation.signals import TeacherSignal
from distillation.students import size_of
from distillation.tasks import build_task
from tests.tiny import LABELS, TASK, settings, world

NARROW = LayersStudent(type="layers", count=2, heads=1, intermediate_size=20, trim_vocabulary=True)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    # 36 words have ids 4 to 39; the texts of the corpus use all of them but those that are added here.
    return world(tmp_path_factory.mktemp("world"), vocab_size=40)


@pytest.fixture(scope="module")
def narrow(storage):
    session = LocalSession()
    fit.train(settings(storage, "narrow", student=NARROW), session, {})
    return fit.model_folder(storage, "students/narrow")


def test_a_cut_student_has_its_sizes_and_loads_with_plain_transformers(narrow):
    model = AutoModelForSequenceClassification.from_pretrained(narrow)
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size) == (2, 8, 1, 20)
    assert tuple(config.id2label.values()) == LABELS
    tokenizer = AutoTokenizer.from_pretrained(narrow)
    assert len(tokenizer) == config.vocab_size
    with torch.no_grad():
        logits = model(**tokenizer(["w5 w9", "w20"], padding=True, return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def test_nothing_cut_starts_as_the_teacher(storage):
    teacher = fit.model_folder(storage, "teachers/t")
    whole = LayersStudent(type="layers", count=4, hidden_size=16, heads=2, intermediate_size=32)
    start = fit.untrained(settings(storage, "whole", student=whole), storage).eval()
    its = models.load(teacher, TASK).eval()
    rows = open_rows(storage, "corpora/c", {}, "validation", fit.reader(TASK, teacher, LABELS)).batch(np.arange(8))
    with torch.no_grad():
        assert torch.allclose(start(**rows.inputs).logits, its(**rows.inputs).logits, atol=1e-6)


def test_a_trimmed_student_reads_the_corpus_as_its_own_tokenizer_would(storage, narrow):
    """The stored ids, translated, are those that the trimmed tokenizer writes."""
    rows = rows_for(narrow, open_columns(storage, "corpora/c", "corpus", "test"), TASK, LABELS)
    batch = rows.batch(np.arange(10))
    tokenizer = AutoTokenizer.from_pretrained(narrow)
    for text, ids, length in zip(rows.texts(np.arange(10)), batch.inputs["input_ids"].tolist(), batch.lengths.tolist(), strict=True):
        assert tokenizer(text)["input_ids"] == ids[:length]


def test_resumed_and_tuned_further_it_keeps_its_vocabulary(storage, narrow):
    fit.train(settings(storage, "tuned", start="students/narrow", losses={"hard": CrossEntropy(type="cross_entropy")}, targets={}),
              LocalSession(), {})  # fmt: skip
    tuned = fit.model_folder(storage, "students/tuned")
    assert models.kept_tokens(tuned).tolist() == models.kept_tokens(narrow).tolist()
    assert models.tokenizer_fingerprint(tuned) == models.tokenizer_fingerprint(narrow)
    assert models.weights_fingerprint(tuned) != models.weights_fingerprint(narrow)


def test_translated_targets_by_hand():
    """Tokens 0 to 3 of which 1 is gone: 2 is the new 1, 3 the new 2."""
    task = build_task(CausalLM(type="causal_lm", max_length=8, pack=False))
    columns = {"length": np.array([4]), "input_ids": [np.array([0, 2, 1, 3])]}
    dense = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).repeat(3, 1))
    signals = {
        "dense": TeacherSignal(logits=dense),
        "topk": TeacherSignal(ids=torch.tensor([[3, 1]]).repeat(3, 1), log_p=torch.log(torch.tensor([[0.4, 0.2]])).repeat(3, 1)),
        "drawn": TeacherSignal(ids=torch.tensor([[2, 1]]).repeat(3, 1), weights=torch.tensor([[0.75, 0.25]]).repeat(3, 1)),
    }
    batch = task.translate(task.collate(["r"], columns, signals), np.array([0, -1, 1, 2]))
    assert batch.inputs["input_ids"].tolist() == [[0, 1, 0, 2]]
    assert batch.labels.tolist() == [1, -100, 2]
    assert torch.equal(batch.signals["dense"].logits, dense[:, [0, 2, 3]])
    assert batch.signals["topk"].ids.tolist()[0] == [2, 0]
    assert batch.signals["topk"].log_p[0].tolist() == pytest.approx([np.log(0.4), -np.inf])
    assert batch.signals["drawn"].weights[0].tolist() == [0.75, 0.0]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A tiny GPT with a corpus that uses a part of its tokens."""
    import hashlib

    import pyarrow as pa

    from distillation import beginnings, encoding
    from distillation.answers import answer_part, make_teacher
    from distillation.rows import Rows
    from distillation.storage import Storage

    folder = tmp_path_factory.mktemp("spoken")
    storage, task = Storage(str(folder / "storage")), CausalLM(type="causal_lm", max_length=16)
    base = folder / "base"
    words = [f"{a}{b}" for a in ("ba", "co", "du", "fi", "ge", "lo") for b in ("n", "r", "st", "mp")]
    beginnings.make(NewModel(architecture="gpt2", layers=2, hidden_size=16, heads=2, vocabulary=320), task, [" ".join(words)] * 9, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    generator, splits = np.random.default_rng(0), {}
    for split, count in (("train", 60), ("validation", 12), ("test", 12)):
        texts = [" ".join(generator.choice(words[:8], 9)) for _ in range(count)]  # a third of the words
        ids = sorted(hashlib.sha256(f"{split}{i}".encode()).hexdigest()[:32] for i in range(count))
        columns = encoding.encode(task, tokenizer, ids, texts).columns
        table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in encoding.fields(task)}, schema=encoding.fields(task))
        splits[split] = (store.write_part(storage, "corpora/c", f"part-{split}", table, sum(columns["length"])),)
    store.commit(storage, "corpora/c", store.Manifest(kind="corpus", fingerprint="c", made_from={}, splits=splits, facts={"labels": []}))
    fit.commit_model(storage, "teachers/t", models.load(base, task, ()), base, task, (), "t", {}, {"result": {}, "history": []})
    _, paths = store.open_artifact(storage, "corpora/c", "corpus")
    for name, logits in {"topk": TopKLogits(type="topk", k=8), "dense": DenseLogits(), "drawn": SampledLogits(type="sampled")}.items():
        config, records = TargetsConfig(logits=logits), {}
        for split in ("train", "validation"):
            rows = Rows(Columns([paths[f"part-{split}.arrow"]]), {}, fit.reader(task, base, ()))
            table, _ = answer_part(make_teacher(models.load(base, task), task, config), rows, config, 256, False, torch.device("cpu"))
            records[split] = (store.write_part(storage, f"targets/{name}", f"part-{split}", table, 1),)
        facts = {"corpus": "c", "targets": config.model_dump(mode="json"), "labels": []}
        manifest = store.Manifest(kind="targets", fingerprint=name, made_from={}, splits=records, facts=facts)
        store.commit(storage, f"targets/{name}", manifest)
    return storage, task


@pytest.mark.parametrize("targets", ["topk", "dense", "drawn"])
def test_a_language_model_with_a_trimmed_vocabulary_learns_from_every_kind_of_target(spoken, targets):
    storage, task = spoken
    config = FitConfig(
        name=targets, task=task, labels=(), student=LayersStudent(type="layers", count=1, trim_vocabulary=True),
        losses={"soft": ForwardKL(type="forward_kl", temperature=1.0), "hard": CrossEntropy(type="cross_entropy", weight=0.5)},
        training=TrainingConfig(epochs=6, batch_tokens=128, learning_rate=1e-2, log_every=1, checkpoint_every=0, precision="fp32"),
        storage=storage.uri, corpus="corpora/c", targets={"teacher": f"targets/{targets}"}, teacher="teachers/t",
        output=f"students/{targets}", fingerprint=targets,
    )  # fmt: skip
    session = LocalSession()
    result = fit.train(config, session, {})
    curve = [m["train/loss/hard"] for _, m in session.history if "train/loss/hard" in m]
    assert curve[-1] < 0.7 * curve[0]
    folder = fit.model_folder(storage, f"students/{targets}")
    teacher = models.read_config(fit.model_folder(storage, "teachers/t"))["vocab_size"]
    kept = json.loads((folder / models.VOCABULARY).read_text())
    assert kept["tokens"] == teacher
    assert models.read_config(folder)["vocab_size"] == len(kept["kept"]) < teacher
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    made = model.generate(**tokenizer("ban bar", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert set(tokenizer.decode(made[0])) <= set("abcdefghijklmnopqrstuvwxyz <|>")
    # What evaluation finds on the validation split is what the loop found.
    rows = rows_for(folder, open_columns(storage, "corpora/c", "corpus", "validation"), task, ())
    batch = rows.batch(np.arange(len(rows)))
    with torch.no_grad():
        outputs = Network(load_trained(folder, task, ()), task).eval()(batch.inputs, batch.scored, batch.tokens, batch.lengths)
        scores = rows.task.scores(rows.task.statistics(outputs, batch).sum(0).numpy())
    assert scores["perplexity"] == pytest.approx(result["validation/perplexity"], rel=1e-4)


def test_a_width_that_cannot_be_is_refused_before_training(storage):
    from distillation.errors import ConfigError
    from distillation.students import require_buildable

    teacher = fit.model_folder(storage, "teachers/t")
    for student, code in (({"heads": 3}, "DST-2021"), ({"hidden_size": 12}, "DST-2023")):
        with pytest.raises((ConfigError, InputError), match=code):
            require_buildable(LayersStudent(type="layers", **student), teacher, TASK)


def test_a_trimmed_size_is_known_beforehand_and_rows_are_read_in_its_ids_without_weights(spoken, tmp_path):
    storage, task = spoken
    teacher, student = fit.model_folder(storage, "teachers/t"), LayersStudent(type="layers", count=1, trim_vocabulary=True)
    kept = fit.tokens_in_use(storage, "corpora/c", task, teacher)
    config = FitConfig(
        name="size", task=task, labels=(), student=student, losses={"hard": CrossEntropy(type="cross_entropy")},
        training=TrainingConfig(steps=1), storage=storage.uri, corpus="corpora/c", teacher="teachers/t", output="students/size",
        fingerprint="size",
    )  # fmt: skip
    made = fit.untrained(config, storage)
    assert size_of(student, teacher, task, (), 8, len(kept))["parameters"] == sum(p.numel() for p in made.parameters())
    folder = fit.as_read(config, storage, tmp_path)
    table = models.kept_table(folder)
    assert table[kept].tolist() == list(range(len(kept)))
    assert (table >= 0).sum() == len(kept)
    assert not list(folder.glob("*.safetensors"))
    whole = config.model_copy(update={"student": LayersStudent(type="layers", count=1)})
    assert fit.as_read(whole, storage, tmp_path) == teacher
