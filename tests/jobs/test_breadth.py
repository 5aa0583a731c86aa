"""Jobs of other kinds than the first, whole, on tiny models: language models, several teachers, a ladder, images, embeddings."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console

from distillation import curves, store
from distillation.beginnings import make
from distillation.config import CausalLM, NewModel
from distillation.errors import ConfigError, InputError
from jobs import cli, estimate
from jobs.config import load
from jobs.pipeline import run as run_job
from jobs.plan import make_plan
from jobs.search import search
from jobs.verify import verify
from tests import kinds
from tests.tiny import LABELS, model_folder, texts

pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

SHORT = {"batch_tokens": 1024, "learning_rate": 3e-3, "log_every": 1, "precision": "fp32", "checkpoint_every": 0}
COMMON = {
    "evaluation": {"repeats": 10, "threads": 1},
    "cluster": {"cpus_per_worker": 1, "storage": "storage"},
    "training": {"steps": 6, **SHORT},
}
WORDS = "the a one small big red old river stone house bird tree runs sees takes makes sings over under near with and".split()  # noqa: SIM905

FIRST = {
    "name": "first",
    "task": {"type": "causal_lm", "max_length": 64},
    "corpus": {"type": "text", "train": "notes/*.txt", "documents": "blank_line", "validation": 0.15, "test": 0.2, "part_rows": 64},
    "teacher": {
        "model": {"architecture": "gpt2", "layers": 2, "hidden_size": 16, "heads": 2, "vocabulary": 400},
        "training": {"epochs": 12, **SHORT, "batch_tokens": 512, "learning_rate": 1e-2},
        "targets": {"logits": {"type": "topk", "k": 8, "temperatures": [1, 2]}},
    },
    "students": {"short": {"type": "layers", "count": 1}},
    "losses": {"hard": {"type": "cross_entropy", "weight": 0.3}, "soft": {"type": "forward_kl", "weight": 0.7, "temperature": 2.0}},
    "finetune": {"steps": 4, **SHORT},
    **COMMON,
}  # fmt: skip
NARROW = {
    **{key: value for key, value in FIRST.items() if key != "finetune"}, "name": "narrow", "baseline": False,
    "students": {"thin": {"type": "layers", "hidden_size": 8, "heads": 1, "trim_vocabulary": True, "sample": 32}},
}  # fmt: skip
SPACE = "search={space: {losses.ranks.weight: {uniform: [0, 1]}}, objectives: {validation/perplexity: min, cost/parameters: min}}"
SECOND = {
    **NARROW, "name": "second",
    "teacher": {"model": "student:first/short", "targets": {"logits": {"type": "topk", "k": 8, "temperatures": [1, 2]}}},
    "students": {"bigger": {"type": "scratch", "layers": 3, "hidden_size": 24, "heads": 2, "intermediate_size": 48}},
}  # fmt: skip
FOREIGN = {
    **{key: value for key, value in FIRST.items() if key != "finetune"}, "name": "foreign", "baseline": False,
    "students": {"own": {"type": "pretrained", "model": "foreign-gpt"}},
    "losses": {"hard": {"type": "cross_entropy", "weight": 0.5}, "ranks": {"type": "universal_logit"}},
}  # fmt: skip
PAIR = {
    "name": "pair",
    "task": {"type": "text_classification", "max_length": 32},
    "corpus": {"type": "files", "train": "rows.jsonl", "validation": 0.2, "test": 0.2, "part_rows": 64},
    "teachers": {  # the first has 2 layers, the one whose layers are compared has 4
        "asked": {"model": "b", "live": True},
        "kept": {"model": "a", "targets": {"features": {"layers": [1, 2, 3]}}},
    },
    "students": {"small": {"type": "scratch", "layers": 2, "hidden_size": 8, "heads": 2, "intermediate_size": 16}},
    "losses": {
        "hard": {"type": "cross_entropy", "weight": 0.2},
        "of-kept": {"type": "forward_kl", "teacher": "kept"},
        "of-asked": {"type": "reverse_kl", "teacher": "asked"},
        "of-both": {"type": "jsd", "teacher": {"kept": 0.25, "asked": 0.75}},
        "inner": {"type": "hidden_mse", "teacher": "kept", "layers": "last", "projection": True},
    },
    **COMMON,
    "training": {"epochs": 3, **SHORT, "batch_tokens": 256},
    "baseline": False,
}  # fmt: skip
LETTERS = {
    "name": "letters", "task": PAIR["task"], "corpus": PAIR["corpus"], "teacher": {"model": "a"},
    "student": {"type": "pretrained", "model": "foreign-bert"}, "losses": {"hard": {"type": "cross_entropy"}, "soft": {"type": "forward_kl"}},
    **COMMON, "training": PAIR["training"],
}  # fmt: skip
VECTORS = {
    "name": "vectors",
    "task": {"type": "embedding", "max_length": 32},
    "corpus": PAIR["corpus"],
    "teacher": {"model": "encoder", "targets": {"features": {"pooled": True}}},
    "student": {"type": "layers", "count": 1},
    "losses": {"direction": {"type": "cosine"}, "neighbours": {"type": "similarity_kl", "weight": 0.5}},
    **COMMON,
    "baseline": False,
}  # fmt: skip
IMAGES = {
    "name": "images",
    "task": {"type": "image_classification", "size": 16, "channels": 3},
    "corpus": {"type": "files", "train": "images.parquet", "validation": 0.2, "test": 0.3},
    "teacher": {
        "model": {"architecture": "resnet", "depths": [1, 1], "hidden_sizes": [8, 12]},
        "training": {"epochs": 8, **SHORT, "batch_tokens": 16, "learning_rate": 1e-2},
        "batch_tokens": 64,
    },
    "student": {"type": "convolutional", "depths": [1], "hidden_sizes": [8]},
    "losses": {"hard": {"type": "cross_entropy", "weight": 0.3}, "soft": {"type": "forward_kl", "weight": 0.7}},
    **COMMON,
    "training": {"epochs": 4, **SHORT, "batch_tokens": 16},
    "baseline": False,
}  # fmt: skip


def notes(folder):
    """Documents in which a word says which come next; each has a name of its own, which no other one has."""
    generator, rng = np.random.default_rng(1), np.random.default_rng(2)
    follow = {word: rng.choice(WORDS, 3, replace=False) for word in WORDS}
    for number in range(4):
        documents = []
        for _ in range(50):
            name, word = "".join(generator.choice(list("bcdfgjkqvwxz"), 6)), "the"
            found = [name]
            for _ in range(generator.integers(12, 40)):
                word = str(generator.choice(follow[word], p=[0.7, 0.2, 0.1]))
                found += [word, name] if generator.random() < 0.1 else [word]
            documents.append(" ".join(found))
        (folder / f"{number}.txt").write_text("\n\n".join(documents))


def images(path):
    """Red ones and blue ones, as PNG."""
    generator, rows = np.random.default_rng(0), []
    for number in range(80):
        pixels = generator.integers(0, 120, (16, 16, 3), np.uint8)
        pixels[:, :, 2 * (number % 2)] += 130
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": ["red", "blue"][number % 2]})
    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    (folder / "notes").mkdir()
    notes(folder / "notes")
    images(folder / "images.parquet")
    model_folder(folder / "a", seed=1)
    model_folder(folder / "b", seed=2, layers=2)
    kinds.save(folder / "encoder", "embedding")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts(240)))
    kinds.save(folder / "foreign-bert", "text_classification")
    task, own = CausalLM(type="causal_lm", max_length=64), NewModel(architecture="gpt2", layers=1, hidden_size=16, heads=2, vocabulary=300)
    make(own, task, [(folder / "notes" / "0.txt").read_text()], folder / "foreign-gpt")
    for job in (FIRST, NARROW, SECOND, FOREIGN, PAIR, LETTERS, VECTORS, IMAGES):
        (folder / f"{job['name']}.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        # As the application starts it.
        for name, value in {"RAY_worker_niceness": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_CHDIR_TO_TRIAL_DIR": "0"}.items():
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def here(place, cluster):
    """Run a job in this process, beside a Ray that is there already. Returns what was printed."""

    def run(name, *overrides):
        console = Console(file=io.StringIO(), width=120)
        with contextlib.chdir(place):
            run_job(load(f"{name}.yaml", overrides), console)
        return console.file.getvalue()

    return run


def planned(place, name, *overrides):
    with contextlib.chdir(place):
        return make_plan(load(f"{name}.yaml", overrides))


def lines_of(place, name):
    plan = planned(place, name)
    with contextlib.chdir(place):
        return {line.stage: line for line in estimate.lines(plan)}


def evaluated(place, name):
    return {e["name"]: e for e in json.loads((planned(place, name).results / "evaluation.json").read_text())}


def manifest_of(plan, name):
    (run,) = [run for run in plan.runs if run.name == name]
    return store.find(plan.storage, run.stage.folder)


def curve(plan, name, metric):
    (run,) = [run for run in plan.runs if run.name == name]
    points = curves.read(plan.storage, run.stage.folder, manifest_of(plan, name))
    return [metrics[metric] for _, metrics in points if metric in metrics]


def runs_of(place, name):
    """Runs in MLflow by the name of the model."""
    client = MlflowClient(f"sqlite:///{place}/storage/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return {run.data.tags["distillery.run"].split("/", 2)[2]: run for run in found if "mlflow.parentRunId" in run.data.tags}


# --------------------------------------------------------------------------------------------------------------- language model


@pytest.fixture(scope="module")
def before(place):
    """What the plan says before anything is there."""
    return lines_of(place, "first")


@pytest.fixture(scope="module")
def first(here, before):
    return here("first")


def test_a_language_model_is_judged_by_its_perplexity(place, first):
    assert re.search(r"model +perplexity +retention", first), first
    found = evaluated(place, "first")
    assert set(found) == {"teacher", "short", "short-baseline", "short-tuned"}
    of = {name: e["quality"]["perplexity"] for name, e in found.items()}
    assert 1 < of["teacher"] < 100  # of 400 tokens
    for name, e in found.items():
        assert e["headline"] == "perplexity"
        assert e["quality"]["nll"] == pytest.approx(np.log(of[name]), rel=1e-6)
        assert e["positions"] > 10 * e["rows"]
        if name != "teacher":
            assert e["against"]["retention"] == pytest.approx(of["teacher"] / of[name], rel=1e-6)
            assert re.search(rf"^ ?{name} +{re.escape(f'{of[name]:.2f}'[:4])}", first, re.M), first
    assert found["short"]["baseline"] == "short-baseline"
    assert found["short"]["against"]["gain"] == pytest.approx(100 * (1 - of["short"] / of["short-baseline"]), rel=1e-6)
    assert found["short-tuned"]["cost"]["parameters"] == found["short"]["cost"]["parameters"] < found["teacher"]["cost"]["parameters"]
    plan = planned(place, "first")
    assert (manifest_of(plan, "short").facts["result"]["steps"], manifest_of(plan, "short-tuned").facts["result"]["steps"]) == (6, 4)


def test_the_store_takes_what_the_plan_said(place, before, first):
    plan = planned(place, "first")
    manifest = store.find(plan.storage, plan.targets["teacher"].folder)
    corpus = store.find(plan.storage, plan.corpus.folder)
    rows = manifest.rows("train") + manifest.rows("validation")
    # 8 ids of 2 bytes and as many fp16, log-sum-exp at temperature 2, the label's own.
    assert before["targets"].note == "once for all students; 38 bytes a position"
    tokens = corpus.tokens("train") + corpus.tokens("validation")
    assert manifest.total_bytes() / tokens == pytest.approx(before["targets"].bytes / before["targets"].tokens, rel=0.15)
    assert (before["targets"].rows, before["targets"].bytes) == (
        pytest.approx(rows, rel=0.15),
        pytest.approx(manifest.total_bytes(), rel=0.15),
    )
    assert {line.state for line in lines_of(place, "first").values()} == {"in the store"}


def test_a_language_model_in_mlflow(place, first):
    found, runs = evaluated(place, "first"), runs_of(place, "first")
    assert set(runs) == set(found)
    for name, run in runs.items():
        assert run.data.metrics["test/perplexity"] == found[name]["quality"]["perplexity"], name
        assert run.info.status == "FINISHED"
    assert 0 < runs["teacher"].data.metrics["teacher/missing_mass"] < 0.9
    assert "validation/perplexity" in runs["short"].data.metrics


def test_texts_that_are_all_too_long_leave_nothing_to_learn_from(place, cluster):
    with contextlib.chdir(place):
        job = load("first.yaml", ["task.max_length=8", "task.too_long=drop", "name=dropped"])
        with pytest.raises(
            InputError, match=r"DST-3440\]: split train, validation, test is empty: .*of 200 rows read, without 200 too_long"
        ) as caught:
            run_job(job, Console(file=io.StringIO()), "prepare")
    assert caught.value.exit_code == 3


@pytest.fixture(scope="module")
def narrow(here, first):
    return here("narrow")


def test_a_narrow_student_with_a_trimmed_vocabulary_generates(place, first, narrow):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for line in ("corpus", "teacher", "targets of "):
        assert re.search(rf"^found {line}", narrow, re.M), line
    plan = planned(place, "narrow")
    folders = {"teacher": plan.model, "thin": plan.results / "students" / "thin"}
    loaded = {
        name: (AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)) for name, folder in folders.items()
    }
    (whole, teacher), (trimmed, thin) = loaded["teacher"], loaded["thin"]
    assert 258 <= len(trimmed) < len(whole) == 400
    assert tuple(thin.get_input_embeddings().weight.shape) == (len(trimmed), 8)
    assert tuple(teacher.get_input_embeddings().weight.shape) == (400, 16)
    assert (thin.config.n_head, thin.config.vocab_size) == (1, len(trimmed))
    text = (place / "notes" / "0.txt").read_text().split("\n\n")[0]
    assert trimmed.decode(trimmed(text)["input_ids"]) == text
    start = trimmed("the small", return_tensors="pt")
    made = thin.generate(**start, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert made.shape == (1, start["input_ids"].shape[1] + 8)
    assert int(made.max()) < len(trimmed)
    assert trimmed.decode(made[0]).startswith("the small")
    assert evaluated(place, "narrow")["thin"]["quality"]["perplexity"] > 1


def test_again_it_finds_everything(place, here, first):
    output = here("first")
    for line in ("corpus", "teacher", "targets of", "student short$", "baseline short-baseline", "student short-tuned", "evaluation"):
        assert re.search(rf"^found {line}", output, re.M), (line, output)
    assert not re.search(r"^done (teacher|targets|student|baseline|corpus|evaluation)", output, re.M)


def test_a_ladder_goes_back_to_a_bigger_student(place, first, cluster, capsys):
    with contextlib.chdir(place):
        cli.ladder(["first.yaml", "second.yaml"])
    output = capsys.readouterr().out
    above, below = output.split("MLflow runs")[:2]
    for part in (above, below):
        assert re.search(r"^found corpus", part, re.M), output
        assert not re.search(r"^(done|now).*fine-tuning", part, re.M)
    assert re.search(r"^found teacher", above, re.M)
    plan = planned(place, "second")
    assert plan.corpus == planned(place, "first").corpus
    assert store.find(plan.storage, plan.teacher.folder).facts["result"].get("steps") is None
    found = evaluated(place, "second")
    assert set(found) == {"teacher", "bigger"}
    assert found["teacher"]["quality"]["perplexity"] == pytest.approx(evaluated(place, "first")["short"]["quality"]["perplexity"], rel=1e-4)
    assert found["bigger"]["ratios"]["parameter_ratio"] > 1


def test_a_student_with_a_tokenizer_of_its_own(place, first, here):
    output = here("foreign")
    for line in ("corpus", "teacher", "targets of "):  # as the first job left them: the teacher is not asked again
        assert re.search(rf"^found {line}", output, re.M), output
    found, plan = evaluated(place, "foreign"), planned(place, "foreign")
    (reading,) = plan.readings
    manifest = plan.found(reading.stage)
    assert (manifest.facts["reads"], manifest.rows("train")) == (plan.corpus.fingerprint, plan.found(plan.corpus).rows("train"))
    assert {e["headline"] for e in found.values()} == {"bits_per_byte"}
    assert found["own"]["against"]["retention"] == pytest.approx(
        found["teacher"]["quality"]["bits_per_byte"] / found["own"]["quality"]["bits_per_byte"], rel=1e-6
    )
    assert found["own"]["positions"] > found["teacher"]["positions"]  # of 300 tokens against 400
    assert len(curve(plan, "own", "train/loss/ranks")) == 6
    assert curve(plan, "own", "validation/bits_per_byte")
    card = (plan.results / "students" / "own" / "README.md").read_text()
    assert "bits per byte" in card
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(plan.results / "students" / "own")) == 300


def test_a_search_compares_students_of_one_tokenizer(place, cluster):
    with contextlib.chdir(place), pytest.raises(ConfigError, match=r"DST-2041\]: .*own has its own"):
        search(load("foreign.yaml", [SPACE]), Console(file=io.StringIO()))


def test_labels_can_be_learned_in_other_tokens(place, here):
    here("letters")
    found = evaluated(place, "letters")
    assert set(found) == {"teacher", "student", "student-baseline"}
    plan = planned(place, "letters")
    (reading,) = plan.readings
    assert reading.tokenizer.name == "foreign-bert"
    for term in ("hard", "soft"):
        values = curve(plan, "student", f"train/loss/{term}")
        assert sum(values[-6:]) / 6 < 0.8 * values[0], values


def test_verify_holds_the_store_against_the_teacher(place, first, tmp_path):
    plan = planned(place, "first")
    console = Console(file=io.StringIO(), width=120)
    with contextlib.chdir(place):
        verify(load("first.yaml"), 1000, 0, console)
    assert re.search(r"train +\d+ rows, \d+ answered again: log-probabilities", console.file.getvalue())
    folder = plan.targets["teacher"].folder
    manifest = store.find(plan.storage, folder)
    record = manifest.splits["validation"][0]
    path = place / "storage" / folder / record.name
    kept = {file: file.read_bytes() for file in (path, path.with_suffix(".json"), path.parent / "manifest.json")}
    try:
        with pa.ipc.open_stream(path) as reader:
            table = reader.read_all()
        column = table.column("log_p").combine_chunks()
        values = column.values.values.to_numpy().copy()
        values[0] -= 1.5  # one log-probability of one position
        changed = pa.ListArray.from_arrays(column.offsets, pa.FixedSizeListArray.from_arrays(pa.array(values), 8))
        table = table.set_column(table.schema.get_field_index("log_p"), "log_p", changed)
        told = store.write_part(plan.storage, folder, record.name.removesuffix(".arrow"), table, record.tokens)
        splits = {**manifest.splits, "validation": (told, *manifest.splits["validation"][1:])}
        store.commit(plan.storage, folder, manifest.model_copy(update={"splits": splits}))
        store.open_artifact(plan.storage, folder, "targets")  # all checksums are right
        with contextlib.chdir(place), pytest.raises(InputError, match=r"DST-3112.*validation.*log-probabilities.*found 1\.5") as caught:
            verify(load("first.yaml"), 1000, 0, console)
        assert caught.value.exit_code == 3
    finally:
        for file, content in kept.items():
            file.write_bytes(content)


# ---------------------------------------------------------------------------------------------------------------- two teachers


def test_two_teachers_one_of_them_live(place, here):
    lines = lines_of(place, "pair")
    assert [name for name in lines if name.startswith("targets")] == ["targets of kept"]
    output = here("pair")
    assert "layers of small, inner: student <- teacher 0 <- 2, 1 <- 3" in output
    plan = planned(place, "pair")
    manifest = store.find(plan.storage, plan.targets["kept"].folder)
    assert set(plan.targets) == {"kept"}
    stored = [store.find(plan.storage, f"targets/{name}").made_from["teacher"] for name in plan.storage.list("targets")]
    assert plan.teachers["kept"].fingerprint in stored
    assert plan.teachers["asked"].fingerprint not in stored
    each = lines["targets of kept"].bytes_per_row
    rows = manifest.rows("train") + manifest.rows("validation")
    assert manifest.total_bytes() / rows == pytest.approx(each, rel=0.3)  # of three widths of 16 fp16
    small = manifest_of(plan, "small")
    for term in PAIR["losses"]:
        values = curve(plan, "small", f"train/loss/{term}")
        assert len(values) == small.facts["result"]["steps"], term
        assert np.isfinite(values).all()
    assert curve(plan, "small", "train/loss/inner")[-1] < curve(plan, "small", "train/loss/inner")[0]
    found, runs = evaluated(place, "pair"), runs_of(place, "pair")
    assert {name: e["role"] for name, e in found.items()} == {"asked": "teacher", "small": "student"}
    assert re.search(r"^ ?asked +\d", output, re.M)
    assert set(runs) == {"asked", "kept", "small"}
    assert runs["asked"].data.metrics["test/accuracy"] == found["asked"]["quality"]["accuracy"]
    # The projection is not part of what serves.
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(plan.results / "students" / "small")
    assert found["small"]["cost"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert sorted(model.config.label2id) == sorted(LABELS)


# ------------------------------------------------------------------------------------------------------- embeddings and images


def test_an_embedding_is_judged_by_what_it_finds(place, here):
    assert lines_of(place, "vectors")["targets"].note == "once for all students; 32 bytes a position"
    output = here("vectors")
    found = evaluated(place, "vectors")
    assert found["student"]["headline"] == "recall_at_1", output
    assert {"agreement", "cosine_to_teacher", "retention"} <= set(found["student"]["against"])
    runs = runs_of(place, "vectors")
    assert runs["student"].data.metrics["test/recall_at_1"] == found["student"]["quality"]["recall_at_1"]


def test_images_of_a_parquet_file_into_a_smaller_resnet(place, here):
    assert set(lines_of(place, "images")) == {"corpus", "teacher", "targets", "student"}
    output = here("images")
    found = evaluated(place, "images")
    assert found["teacher"]["quality"]["accuracy"] > 0.9, output
    assert found["student"]["ratios"]["parameter_ratio"] < 0.6
    exported = planned(place, "images").results / "students" / "student"
    from transformers import pipeline

    serve = pipeline("image-classification", model=str(exported))
    blue = Path(place / "blue.png")
    Image.fromarray(np.full((16, 16, 3), (0, 0, 200), np.uint8)).save(blue)
    assert {answer["label"] for answer in serve(str(blue))} == {"red", "blue"}
