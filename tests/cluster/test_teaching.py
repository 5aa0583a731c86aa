"""The teacher over the corpus: any number of workers, killed or not, leaves the same bytes, and they are what the teacher says."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from cluster.config import ClusterConfig
from cluster.teaching import teach
from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.columns import Columns
from distillation.config import DenseLogits, Features, TargetsConfig
from distillation.errors import InputError
from distillation.network import output_head
from distillation.rows import Rows
from distillation.storage import Storage
from distillation.tasks import build_task
from tests import tiny
from tests.tiny import LABELS, TASK, bert, model_folder

ROOT = Path(__file__).resolve().parents[2]
# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")]
FEATURES = TargetsConfig(logits=DenseLogits(), features=Features(layers=(1, 3), pooled=True, dtype="float32"))


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("PYTHONPATH", str(ROOT))
        ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=150 << 20, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(autouse=True)
def one_thread():
    """As the workers have: on some processors sums over several threads differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """150 rows to answer, in parts of 5."""
    folder = tmp_path_factory.mktemp("world")
    storage = Storage(str(folder / "storage"))
    tiny.corpus(storage, part_rows=5)
    tiny.teacher(storage, folder)
    return storage


def taught(storage, output, count=1, targets=FEATURES, **changes):
    cluster = ClusterConfig(storage=storage.uri, workers=count, cpus_per_worker=1, max_failures=0)
    values = {
        "fingerprint": output,
        "made_from": {},
        "batch_tokens": 128,
        "precision": "fp32",
        "record": lambda *_: None,
        "key": "job/teacher",
    }
    return teach(TASK, targets, "teachers/t", "corpora/c", output, cluster=cluster, **{**values, **changes})


def digests(storage, output):
    return {name: hashlib.sha256(storage.read(f"{output}/{name}")).hexdigest() for name in storage.list(output) if name.endswith(".arrow")}


@pytest.fixture(scope="module")
def undisturbed(storage):
    manifest = taught(storage, "targets/one")
    assert manifest.facts == {
        "corpus": "c", "targets": FEATURES.model_dump(mode="json"), "labels": list(LABELS), "rows_answered": 150
    }  # fmt: skip
    found = digests(storage, "targets/one")
    assert len(found) == 24 + 6
    return found


def test_two_workers_leave_the_same_bytes_as_one(storage, undisturbed):
    told = []
    manifest = taught(storage, "targets/two", 2, record=lambda key, metrics, step: told.append((key, metrics, step)))
    assert digests(storage, "targets/two") == undisturbed
    assert [p.name for p in manifest.splits["train"]] == [p.name for p in store.find(storage, "corpora/c").splits["train"]]
    key, metrics, rows = told[-1]
    assert (key, metrics["teacher/rows"], rows) == ("job/teacher", 150.0, 75)  # half of the parts each


def test_what_is_stored_is_what_the_teacher_says(storage, undisturbed):
    _, paths = store.open_artifact(storage, "corpora/c", "corpus")
    _, answers = store.open_artifact(storage, "targets/one", "targets")
    model = models.load(fit.model_folder(storage, "teachers/t"), TASK).eval()
    for name in list(answers)[:2] + list(answers)[-1:]:
        corpus, stored = Columns([paths[name]]), Columns([answers[name]])
        rows = np.arange(5)
        assert stored.strings("id", rows) == corpus.strings("id", rows)
        assert str(stored.schema.field("logits").type) == "fixed_size_list<item: halffloat>[3]"
        assert str(stored.schema.field("hidden_3").type) == "fixed_size_list<item: float>[16]"
        for row in rows:
            ids = torch.from_numpy(corpus.ragged("input_ids", np.array([row]))[0].astype(np.int64))[None]
            with torch.no_grad():
                said = model(input_ids=ids, output_hidden_states=True)
                pooled = model.bert.pooler(said.hidden_states[-1])
            here = np.array([row])
            assert stored.fixed("logits", here)[0] == pytest.approx(said.logits[0].numpy(), rel=1e-3, abs=1e-4)
            assert stored.fixed("hidden_1", here)[0] == pytest.approx(said.hidden_states[2][0, 0].numpy(), abs=1e-5)
            assert stored.fixed("hidden_3", here)[0] == pytest.approx(said.hidden_states[4][0, 0].numpy(), abs=1e-5)
            assert stored.fixed("pooled", here)[0] == pytest.approx(pooled[0].numpy(), abs=1e-5)


DRIVER = """
import sys, ray
from cluster.config import ClusterConfig
from cluster.teaching import teach
from distillation.config import DenseLogits, Features, TargetsConfig
from tests.tiny import TASK

ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=150 << 20, log_to_driver=False)
targets = TargetsConfig(logits=DenseLogits(), features=Features(layers=(1, 3), pooled=True, dtype="float32"))
cluster = ClusterConfig(storage=sys.argv[1], workers=1, cpus_per_worker=1)
teach(TASK, targets, "teachers/t", "corpora/big", "targets/cut", fingerprint="targets/cut", made_from={}, batch_tokens=128, precision="fp32",
      cluster=cluster, record=lambda *_: None, key="k")
"""


def test_killed_in_the_middle_and_run_again_computes_what_is_missing(storage):
    corpus = tiny.corpus(storage, train=900, part_rows=3, folder="corpora/big")
    total = 300 + 10
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, storage.uri], cwd=ROOT)
    deadline = time.monotonic() + 300
    while len(storage.list("targets/cut")) < 40:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    for process in family:  # the machine is gone
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, 20)
    names = [part.name.removesuffix(".arrow") for split in ("train", "validation") for part in corpus.splits[split]]
    before = {name: times(storage, name) for name in names if store.committed_part(storage, "targets/cut", name)}
    assert 0 < len(before) < total
    assert store.find(storage, "targets/cut") is None
    manifest = teach(
        TASK, FEATURES, "teachers/t", "corpora/big", "targets/cut", fingerprint="targets/cut", made_from={}, batch_tokens=128,
        precision="fp32", cluster=ClusterConfig(storage=storage.uri, cpus_per_worker=1), record=lambda *_: None, key="k",
    )  # fmt: skip
    assert {name: times(storage, name) for name in before} == before
    assert [part.name for split in ("train", "validation") for part in manifest.splits[split]] == [f"{name}.arrow" for name in names]
    model = models.load(fit.model_folder(storage, "teachers/t"), TASK)
    _, paths = store.open_artifact(storage, "corpora/big", "corpus")
    for name in names:
        table = answer(model, [paths[f"{name}.arrow"]], FEATURES)
        store.write_part(storage, "targets/whole", name, table, 0)
    assert digests(storage, "targets/cut") == digests(storage, "targets/whole")


def times(storage, name):
    return [os.stat(storage.path(f"targets/cut/{name}.{ending}")).st_mtime_ns for ending in ("arrow", "json")]


def answer(model, paths, targets):
    rows = Rows(Columns(paths), {}, build_task(TASK, 0))
    return answer_part(make_teacher(model, TASK, targets), rows, targets, 128, False, torch.device("cpu"))[0]


def test_a_teacher_with_a_broken_weight_is_refused_with_the_row(storage, tmp_path):
    folder = model_folder(tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][1, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fit.adopt(storage, folder, TASK, LABELS, "teachers/broken", "broken", {})
    cluster = ClusterConfig(storage=storage.uri, workers=2, cpus_per_worker=1)
    with pytest.raises(InputError, match=r"DST-3301.*row [0-9a-f]{32}, logits.*inf or nan") as caught:
        teach(
            TASK, FEATURES, "teachers/broken", "corpora/c", "targets/broken", fingerprint="b", made_from={}, batch_tokens=128,
            precision="fp32", cluster=cluster, record=lambda *_: None, key="k",
        )  # fmt: skip
    assert caught.value.exit_code == 3
    assert storage.list("targets/broken") == []


def test_what_overflows_float16_is_refused_and_fits_float32(storage):
    paths = list(store.open_artifact(storage, "corpora/c", "corpus")[1].values())[:1]
    model = bert()
    with torch.no_grad():
        output_head(model).weight.mul_(1e6)
    with pytest.raises(InputError, match=r"DST-3301.*row [0-9a-f]{32}, logits: expected finite float16.*dtype of the targets to float32"):
        answer(model, paths, TargetsConfig(logits=DenseLogits()))
    table = answer(model, paths, TargetsConfig(logits=DenseLogits(dtype="float32")))
    logits = table["logits"].combine_chunks().flatten().to_numpy()
    assert pa.types.is_float32(table.schema.field("logits").type.value_type)
    assert np.isfinite(logits).all()
    assert np.abs(logits).max() > 65504


def test_an_altered_part_of_the_corpus_is_refused_by_name(storage):
    manifest = tiny.corpus(storage, folder="corpora/hurt")
    part = manifest.splits["validation"][0].name
    path = storage.fetch(f"corpora/hurt/{part}")
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"DST-3106.*{part}"):
        teach(
            TASK, FEATURES, "teachers/t", "corpora/hurt", "targets/hurt", fingerprint="h", made_from={}, batch_tokens=128,
            precision="fp32", cluster=ClusterConfig(storage=storage.uri, max_failures=0), record=lambda *_: None, key="k",
        )  # fmt: skip
    assert store.find(storage, "targets/hurt") is None
    assert not [name for name in storage.list("targets/hurt") if name.startswith(part.removesuffix(".arrow"))]  # of the others may be some
