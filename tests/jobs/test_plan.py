"""What changes which stage, what a job costs before it runs, and what is refused before anything starts."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.corpus import prepare
from distillation.config import PretrainedStudent
from distillation.errors import ConfigError, InputError, SecurityError
from jobs import counting, estimate
from jobs.config import load, parse
from jobs.plan import _found_from_anywhere, make_plan
from tests.tiny import model_folder, texts

# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher of 12 layers and 64 positions, another one, and a corpus of 400 labelled rows."""
    root = tmp_path_factory.mktemp("world")
    model_folder(root / "model", layers=12)
    model_folder(root / "other", layers=12, seed=1)
    (root / "train.jsonl").write_text("".join(json.dumps({"text": t, "label": label}) + "\n" for t, label in texts(400)))
    return root


def job(world, *overrides):
    text = json.dumps({
        "name": "j", "task": {"type": "text_classification", "max_length": 32}, "corpus": {"type": "files", "train": str(world / "train.jsonl")},
        "teacher": {"model": str(world / "model"), "training": {"epochs": 2, "batch_tokens": 256}},
        "students": {"small": {"type": "layers", "layers": [0]}, "probe": {"type": "probe"}},
        "losses": {"hard": {"type": "cross_entropy", "weight": 0.3}, "soft": {"type": "forward_kl"}},
        "training": {"epochs": 3, "batch_tokens": 256}, "cluster": {"storage": str(world / "storage")},
    })  # fmt: skip
    return parse(text, ["teacher.targets.features.pooled=true", *overrides], "test")


def prints(plan):
    """Fingerprint of every stage by a name of one word."""
    runs = {run.name: run.stage.fingerprint for run in plan.runs}
    return {
        "corpus": plan.corpus.fingerprint, "teacher": plan.teacher.fingerprint, "targets": plan.targets["teacher"].fingerprint,
        "student": runs["small"], "baseline": runs.get("small-baseline"), "probe": runs["probe"], "job": plan.fingerprint,
    }  # fmt: skip


def plan_of(world, *overrides):
    return make_plan(job(world, *overrides))


def test_the_same_job_is_the_same_wherever_it_lies(world, tmp_path):
    first = prints(plan_of(world))
    assert prints(plan_of(world)) == first
    assert len(set(first.values())) == 7
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for folder in ("model", "train.jsonl"):
        os.symlink(world / folder, copy / folder)
    moved = plan_of(world, f"teacher.model={copy / 'model'}", f"corpus.train={copy / 'train.jsonl'}", f"cluster.storage={copy / 's'}")
    assert prints(moved) == first


STUDENTS = {"student", "baseline", "probe", "job"}
TEACHER = {"teacher", "targets", *STUDENTS}


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        # what is learned
        ("training.learning_rate=1e-3", STUDENTS),
        ("training.epochs=4", STUDENTS),
        ("training.batch_tokens=512", STUDENTS),
        ("training.seed=1", STUDENTS),
        ("training.precision=fp32", STUDENTS),
        ("training.dropout=0.1", STUDENTS),
        ("students.small.layers=[1]", {"student", "baseline", "job"}),
        # a loss that asks the teacher is none of the baseline's business
        ("losses.soft.temperature=4", {"student", "probe", "job"}),
        ("losses.soft.weight=0.5", {"student", "probe", "job"}),
        ("losses.hard.weight=0.5", {"student", "probe", "job"}),  # one teacher and one baseline whatever the weights
        # the teacher and what it says
        ("teacher.training.epochs=3", TEACHER),
        ("teacher.training.log_every=1", set()),
        ("teacher.targets.logits={type: dense, dtype: float32}", {"targets", "student", "probe", "job"}),
        ("teacher.targets.features.layers=[1]", {"targets", "student", "probe", "job"}),
        ("teacher.batch_tokens=4096", {"targets", "student", "probe", "job"}),
        ("teacher.precision=fp32", {"targets", "student", "probe", "job"}),
        # the corpus
        ("corpus.labelled=0.5", {"corpus", *TEACHER}),
        ("corpus.test=0.2", {"corpus", *TEACHER}),
        ("corpus.part_rows=100", {"corpus", *TEACHER}),
        ("task.max_length=16", {"corpus", *TEACHER}),
        # how, where and how often one looks
        ("cluster.workers=3", set()),
        ("cluster.cpus_per_worker=1", set()),
        ("cluster.max_failures=0", set()),
        ("training.log_every=1", set()),
        ("training.evaluate_every=5", set()),
        ("training.checkpoint_every=5", set()),
        ("training.microbatch_tokens=512", set()),
        ("tracking.strict=true", set()),
        ("evaluation.repeats=10", {"job"}),
        ("baseline=false", {"baseline", "job"}),
        ("name=other", set()),
    ],
)  # fmt: skip
def test_what_changes_which_stage(world, override, changes):
    before, after = prints(plan_of(world)), prints(plan_of(world, override))
    assert {name for name in before if before[name] != after[name]} - {"probe-baseline"} == changes


def test_weights_and_rows_count_not_their_names(world, tmp_path):
    before = prints(plan_of(world))
    after = prints(plan_of(world, f"teacher.model={world / 'other'}"))
    assert {name for name in before if before[name] != after[name]} == TEACHER
    lines = (world / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(lines[:-1]))
    after = prints(plan_of(world, f"corpus.train={tmp_path / 'train.jsonl'}"))
    assert {name for name in before if before[name] != after[name]} == set(before)


def test_every_student_that_asks_the_teacher_has_a_baseline(world):
    plan = plan_of(world)
    assert [(run.name, run.role, run.baseline) for run in plan.runs] == [
        ("small", "student", "small-baseline"), ("small-baseline", "baseline", None),
        ("probe", "student", "probe-baseline"), ("probe-baseline", "baseline", None),
    ]  # fmt: skip
    assert list(plan.runs[1].losses) == ["hard"]
    assert [run.name for run in plan_of(world, "baseline=false").runs] == ["small", "probe"]
    # A changed target store changes what a probe reads even without the teacher's answers, but not the other baseline.
    changed = plan_of(world, "teacher.targets.logits={type: dense, dtype: float32}")
    assert changed.runs[1].stage == plan.runs[1].stage
    assert changed.runs[3].stage != plan.runs[3].stage


def test_without_a_loss_that_asks_there_are_no_targets(world):
    plan = plan_of(world, "students={small: {type: layers, layers: [0]}}", "losses.soft.weight=0")
    # OmegaConf merges dicts, so the probe is still there and still reads pooled output.
    assert list(plan.targets) == ["teacher"]
    text = json.dumps({
        "name": "j", "task": {"type": "text_classification", "max_length": 32}, "corpus": {"type": "files", "train": str(world / "train.jsonl")},
        "teacher": {"model": str(world / "model"), "training": {"epochs": 2}}, "student": {"type": "layers", "layers": [0]},
        "losses": {"hard": {"type": "cross_entropy"}}, "training": {"epochs": 3}, "cluster": {"storage": str(world / "storage")},
    })  # fmt: skip
    plan = make_plan(parse(text, (), "x"))
    assert plan.targets == {}
    assert [(run.name, run.baseline) for run in plan.runs] == [("student", None)]
    assert [line.stage for line in estimate.lines(plan)] == ["corpus", "teacher", "student"]


# --------------------------------------------------------------------------------------------------- refused before it starts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.max_length=65"], r"DST-2014.*task\.max_length: expected at most 64 for .*/model but found 65"),
        (["students.small={type: pretrained, layers: null}"], r"DST-2005"),
        (["students.small.layers=[12]"], r"DST-2011.*expected layers 0 to 11 but found 12"),
        (["teacher.targets.features.layers=[0,12]"], r"DST-2011.*teacher\.targets\.features: expected layers 0 to 11 but found \[12\]"),
        (["teacher.targets.features.layers=[-1]"], r"DST-2011.*found \[-1\]"),
    ],
)
def test_jobs_that_do_not_fit_their_model(world, overrides, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(world, *overrides)


def student_job(world, student, **losses):
    """One student, and terms of the loss beside the soft one; the targets hold layer 3."""
    text = json.dumps({
        "name": "j", "task": {"type": "text_classification", "max_length": 60}, "corpus": {"type": "files", "train": str(world / "train.jsonl")},
        "teacher": {"model": str(world / "model"), "training": {"epochs": 1}, "targets": {"features": {"layers": [3]}}},
        "student": student, "losses": {"soft": {"type": "forward_kl"}, **losses}, "training": {"epochs": 1},
        "cluster": {"storage": str(world / "storage")},
    })  # fmt: skip
    return parse(text, (), "test")


def test_layer_maps_are_held_against_the_student(world):
    pkd = {"type": "pkd", "layers": {1: 3}}
    make_plan(student_job(world, {"type": "layers", "count": 2}, h=pkd))
    with pytest.raises(ConfigError, match=r"DST-2012.*student: losses: expected layers 0 to 0 but found \[1\]"):
        make_plan(student_job(world, {"type": "layers", "count": 1}, h=pkd))
    sizes = {"type": "scratch", "layers": 2, "heads": 2, "intermediate_size": 8}
    make_plan(student_job(world, {**sizes, "hidden_size": 16}, h=pkd))
    with pytest.raises(ConfigError, match=r"DST-2013.*student: hidden_size: expected 16 but found 8"):
        make_plan(student_job(world, {**sizes, "hidden_size": 8}, h=pkd))
    make_plan(student_job(world, {**sizes, "hidden_size": 8}, h={**pkd, "weight": 0}))


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_student_with_fewer_positions_than_the_teacher(world, tmp_path):
    folder = model_folder(tmp_path / "short", max_position_embeddings=40)
    with pytest.raises(ConfigError, match=r"DST-2014.*at most 40 for .*short but found 60"):
        make_plan(student_job(world, {"type": "pretrained", "model": str(folder)}))
    # RoBERTa counts positions from pad_token_id + 1: 62 of 64 can be used.
    change_config(folder, model_type="roberta", max_position_embeddings=62, pad_token_id=1)
    make_plan(student_job(world, {"type": "pretrained", "model": str(folder)}))
    change_config(folder, max_position_embeddings=61)
    with pytest.raises(ConfigError, match=r"DST-2014.*at most 59 for"):
        make_plan(student_job(world, {"type": "pretrained", "model": str(folder)}))


def test_a_teacher_that_is_trained_already_must_know_the_labels(world, tmp_path):
    def refused(message, *overrides, kind=InputError):
        with pytest.raises(kind, match=message):
            plan_of(world, "teacher.training=null", *overrides)

    plan_of(world, "teacher.training=null", "task.labels=[c,b,a]")
    refused(r"DST-3205.*expected a, b, x but found a, b, c", "task.labels=[a,b,x]")
    folder = model_folder(tmp_path / "unnamed", layers=12, labels=("LABEL_0", "LABEL_1"))
    refused(r"DST-3204.*expected 3 .*but found 2", "task.labels=[a,b,c]", f"teacher.model={folder}")
    change_config(folder, auto_map={"AutoModel": "x.Y"})
    refused("DST-9004", f"teacher.model={folder}", kind=SecurityError)
    refused("DST-3209", "teacher.model=nobody/nothing")
    refused("DST-3401", "corpus.train=/nowhere/*.csv")


# -------------------------------------------------------------------------------------------------------------- the recipes


@pytest.fixture
def sst2(tmp_path):
    """A data set like SST-2, saved by `datasets`: 200 rows to train on, 20 to test on."""
    from datasets import ClassLabel, Dataset, DatasetDict
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    found = {}
    for split, count in (("train", 200), ("validation", 20)):
        rows = texts(count, seed=count)
        data = Dataset.from_dict({"sentence": [t for t, _ in rows], "label": [int(label == "a") for _, label in rows]})
        found[split] = data.cast_column("label", ClassLabel(names=["negative", "positive"]))
    DatasetDict(found).save_to_disk(tmp_path / "sst2")
    return tmp_path / "sst2"


def test_sst2_recipe_is_planned_offline(sst2, tmp_path):
    model_folder(tmp_path / "bert", layers=12, max_position_embeddings=128)
    overrides = [f"teacher.model={tmp_path / 'bert'}", f"corpus.dataset={sst2}", f"cluster.storage={tmp_path / 's'}"]
    plan = make_plan(load("sst2_bert", overrides))
    assert [run.name for run in plan.runs] == ["six-layers", "six-layers-baseline", "three-layers", "three-layers-baseline"]
    lines = {line.stage: line for line in estimate.lines(plan)}
    assert list(lines) == ["corpus", "teacher", "targets", *(run.name for run in plan.runs)]
    assert lines["corpus"].rows == 220
    # 2 % of 200 are set aside for validation: 196 rows, 3 epochs of the teacher, 5 of the students.
    assert (lines["teacher"].rows, lines["targets"].rows, lines["six-layers"].rows) == (588, 200, 980)
    # id and offset, 2 logits of two bytes
    assert lines["targets"].bytes_per_row == 36 + 2 * 2
    # 12 layers of 4 * 16^2 + 2 * 16 * 32 = 2048 parameters; half of them twice forward and backward
    assert lines["six-layers"].flops == pytest.approx(6 * 6 * 2048 * lines["six-layers"].tokens)
    assert lines["three-layers"].flops == pytest.approx(6 * 3 * 2048 * lines["three-layers"].tokens)
    assert not (tmp_path / "s").exists()


# --------------------------------------------------------------------------------------------------------------- estimates


def write(path, rows):
    table = pa.table({"text": [t for t, _ in rows], "label": [label for _, label in rows], "other": [7] * len(rows)})
    if path.name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=300)
    elif path.name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    else:
        if ".csv" in path.name:
            lines = ["text,label,other", *(f'"{t},\n{t[::-1]}",{label},7' for t, label in rows)]
        else:
            lines = [json.dumps(row) for row in table.to_pylist()]
        content = ("\n".join(lines) + "\n").encode()
        path.write_bytes(
            gzip.compress(content[: len(content) // 2]) + gzip.compress(content[len(content) // 2 :]) if path.suffix == ".gz" else content
        )


@pytest.mark.parametrize("ending", ["parquet", "arrow", "csv", "csv.gz", "jsonl", "jsonl.gz"])
def test_rows_are_counted_without_reading_all(world, tmp_path, ending, monkeypatch):
    for number, count in enumerate((1300, 700)):
        write(tmp_path / f"{number}.{ending}", texts(count, seed=number))
    write(tmp_path / f"held.{ending}", texts(150, seed=9))
    monkeypatch.setattr(counting, "HEAD_BYTES", 20_000)  # so that CSV and JSON lines are not read whole
    where = [
        f"corpus.train={tmp_path}/[01].{ending}",
        f"corpus.test={tmp_path}/held.{ending}",
        "corpus.validation=0.2",
        "corpus.labelled=0.5",
    ]
    size = estimate.corpus_size(plan_of(world, *where))
    assert not size.exact
    within = 0.001 if ending == "parquet" else 0.1
    assert size.rows == {
        "train": pytest.approx(1600, rel=within),
        "validation": pytest.approx(400, rel=within),
        "test": pytest.approx(150, rel=within),
    }
    assert size.labelled == pytest.approx(800, rel=within)


def test_tokens_and_bytes_are_close_to_what_is_written(world, ray_here, tmp_path):
    write(tmp_path / "x.jsonl", texts(3000))
    where = [f"corpus.train={tmp_path}/x.jsonl", f"cluster.storage={tmp_path}/s"]
    plan = plan_of(world, *where)
    before = estimate.corpus_size(plan)
    guess = {line.stage: line for line in estimate.lines(plan)}
    manifest = prepare(
        plan.job.corpus, plan.job.task, plan.model, plan.storage, fingerprint=plan.corpus.fingerprint, made_from=plan.corpus.made_from
    )
    exact = estimate.corpus_size(plan)
    assert exact.exact
    assert exact.rows == {split: manifest.rows(split) for split in ("train", "validation", "test")}
    assert sum(exact.rows.values()) == 3000 - manifest.facts["duplicates"]
    assert exact.tokens == {split: manifest.tokens(split) for split in ("train", "validation", "test")}
    assert exact.labelled == manifest.facts["labelled"]["train"]
    assert sum(before.rows.values()) == pytest.approx(3000, rel=0.1)
    assert sum(before.tokens.values()) == pytest.approx(sum(exact.tokens.values()), rel=0.1)
    assert before.bytes_per_row == pytest.approx(exact.bytes_per_row, rel=0.1)
    lines = {line.stage: line for line in estimate.lines(plan)}
    assert (lines["corpus"].state, lines["corpus"].note) == ("in the store", "")
    assert (guess["corpus"].state, guess["corpus"].note) == ("to do", "estimated from a sample")
    assert lines["corpus"].bytes == pytest.approx(manifest.total_bytes(), rel=1e-6)
    assert lines["targets"].rows == manifest.rows("train") + manifest.rows("validation")
    assert lines["targets"].tokens == manifest.tokens("train") + manifest.tokens("validation")
    # 12 layers of 4 * 16^2 + 2 * 16 * 32 parameters; two FLOPs each to answer, six to train
    assert lines["targets"].flops == 2 * 12 * 2048 * lines["targets"].tokens
    assert lines["teacher"].rows == 2 * exact.labelled
    assert lines["small"].tokens == 3 * manifest.tokens("train")
    assert lines["small"].flops == pytest.approx(6 * 2048 * lines["small"].tokens)
    assert lines["probe"].flops == 0


@pytest.fixture
def ray_here():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000)
    yield
    ray.shutdown()


def test_steps_instead_of_epochs(world):
    lines = {line.stage: line for line in estimate.lines(plan_of(world, "training.epochs=null", "training.steps=10"))}
    assert lines["small"].tokens == 10 * 256
    assert lines["small"].flops == 6 * 2048 * 2560


def test_planning_takes_seconds_and_starts_nothing(world):
    program = """
import sys
from jobs import estimate
from jobs.config import load
from jobs.plan import make_plan
plan = make_plan(load("quickstart", [f"teacher.model={sys.argv[1]}/model"]))
lines = estimate.lines(plan)
assert lines[0].rows <= 8 * 1500, lines
import ray
assert not ray.is_initialized()
"""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", program, str(world)], cwd=ROOT, check=True)
    assert time.monotonic() - started < 30


def test_layer_maps_by_name_are_written_out_and_kept_layers_must_do(world):
    def maps(layers, count, name="hidden_mse"):
        text = json.dumps({
            "name": "j", "task": {"type": "text_classification", "max_length": 60}, "teacher": {
                "model": str(world / "model"), "training": {"epochs": 1}, "targets": {"features": {"layers": [0, 5, 11]}},
            }, "corpus": {"type": "files", "train": str(world / "train.jsonl")}, "student": {"type": "layers", "count": count},
            "losses": {"h": {"type": name, "layers": layers}}, "training": {"epochs": 1}, "cluster": {"storage": str(world / "storage")},
        })  # fmt: skip
        return make_plan(parse(text, (), "x")).runs[0].losses["h"].layers

    assert maps("even", 2) == {0: 5, 1: 11}
    assert maps("last", 1) == {0: 11}
    assert maps("skip", 1) == {0: 0}
    with pytest.raises(ConfigError, match=r"DST-2011.*losses\.h\.layers: expected some of \[0, 5, 11\] but found \[3, 7\] for student"):
        maps("even", 3)
    with pytest.raises(ConfigError, match=r"DST-2011.*\[6\]"):
        maps("skip", 2)


def test_relation_heads_divide_the_widths(world):
    for heads in (4, 8, 16):
        make_plan(relation_job(world, {"type": "layers", "count": 2}, heads))
    make_plan(relation_job(world, {"type": "scratch", "layers": 1, "hidden_size": 8, "heads": 2, "intermediate_size": 8}, 8))
    with pytest.raises(ConfigError, match=r"DST-2025.*losses\.r\.heads: expected a divisor of \[16\] but found 12 for student"):
        make_plan(relation_job(world, {"type": "layers", "count": 2}, 12))
    with pytest.raises(ConfigError, match=r"DST-2025.*a divisor of \[8\] but found 16"):
        make_plan(relation_job(world, {"type": "scratch", "layers": 1, "hidden_size": 8, "heads": 2, "intermediate_size": 8}, 16))


def relation_job(world, student, heads):
    text = json.dumps({
        "name": "j", "task": {"type": "text_classification", "max_length": 60}, "student": student, "teacher": {
            "model": str(world / "model"), "training": {"epochs": 1}, "targets": {"features": {"relations": 11}},
        }, "corpus": {"type": "files", "train": str(world / "train.jsonl")}, "losses": {"r": {"type": "relation_kl", "heads": heads}},
        "training": {"epochs": 1}, "cluster": {"storage": str(world / "storage")},
    })  # fmt: skip
    return parse(text, (), "test")


def test_each_teacher_has_stages_of_its_own_and_a_live_one_no_store(world):
    def several(**second):
        text = json.dumps({
            "name": "j", "task": {"type": "text_classification", "max_length": 32},
            "teachers": {"one": {"model": str(world / "model")}, "two": {"model": str(world / "other"), **second}},
            "corpus": {"type": "files", "train": str(world / "train.jsonl")}, "student": {"type": "layers", "count": 2},
            "losses": {"a": {"type": "forward_kl", "teacher": "one"}, "b": {"type": "reverse_kl", "teacher": "two"}},
            "training": {"epochs": 1}, "cluster": {"storage": str(world / "storage")},
        })  # fmt: skip
        return make_plan(parse(text, (), "x"))

    plan, live = several(), several(live=True)
    assert (list(plan.teachers), list(plan.targets), list(live.targets)) == (["one", "two"], ["one", "two"], ["one"])
    assert plan.teachers["one"] != plan.teachers["two"]
    assert live.targets["one"] == plan.targets["one"]
    assert live.teachers == plan.teachers
    assert live.runs[0].stage != plan.runs[0].stage
    assert live.runs[1].stage == plan.runs[1].stage  # the baseline asks nobody
    assert [line.stage for line in estimate.lines(plan)] == ["corpus", "targets of one", "targets of two", "student", "student-baseline"]


def test_a_student_in_a_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    told = [_found_from_anywhere(PretrainedStudent(type="pretrained", model=name)).model for name in ("mine", "a/b", "s3://bucket/mine")]
    assert told == [str(tmp_path / "mine"), "a/b", "s3://bucket/mine"]
