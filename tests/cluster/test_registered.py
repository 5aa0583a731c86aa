"""Students as logged and registered models."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlflow
import pytest

from cluster.delivery import deliver
from cluster.journal import Journal
from cluster.links import state_file
from tests.cluster.recording import STUDENT, runs_of, target
from tests.servers import Server


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "student")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "student")
    (tmp_path / "student" / "optimizer.bin").write_bytes(b"no pickles, please")
    return tmp_path / "student"


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # MLflow, about its own code
def test_student_is_a_logged_model_that_predicts(server: Server, tiny_bert: Path, tmp_path: Path) -> None:
    """Through a server; logged once though declared twice; its scores are those of the plain transformers model."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    server.start()
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(STUDENT, name="L3")
        for _ in range(2):
            journal.model(STUDENT, tiny_bert, name="student", input_example=["good film"], registered="docstrings", alias="champion")
        journal.finish(STUDENT, "FINISHED")
        deliver(target(server.uri), journal)
        state_file(tmp_path / "t.jsonl").unlink()
        deliver(target(server.uri), journal)

    client = mlflow.MlflowClient(server.uri)
    logged = client.search_logged_models(["1"])
    assert [(model.name, str(model.status), model.source_run_id) for model in logged] == [
        ("student", "READY", runs_of(server.uri)[STUDENT].info.run_id)
    ]
    assert [version.version for version in client.search_model_versions("name = 'docstrings'")] == ["1"]
    assert [output.model_id for output in runs_of(server.uri)[STUDENT].outputs.model_outputs] == [logged[0].model_id]
    mlflow.set_tracking_uri(server.uri)
    try:
        assert mlflow.pyfunc.load_model("models:/docstrings@champion").metadata.model_uuid == logged[0].model_id
        model = mlflow.pyfunc.load_model(f"models:/{logged[0].model_id}")
        assert model.metadata.signature.inputs.input_types()[0].name == "string"
        assert model.metadata.signature.outputs.input_names() == ["label", "score"]
        assert list(model.input_example) == ["good film"]
        files = {Path(f.path).name for f in client.list_logged_model_artifacts(logged[0].model_id, "model")}
        answer = model.predict(["good film", "bad"])
    finally:
        mlflow.set_tracking_uri(None)
    assert "model.safetensors" in files
    assert "optimizer.bin" not in files
    tokenizer, plain = AutoTokenizer.from_pretrained(tiny_bert), AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        expected = plain.eval()(**tokenizer(["good film", "bad"], padding=True, return_tensors="pt")).logits.softmax(-1)
    assert list(answer["label"]) == [("neg", "pos")[i] for i in expected.argmax(-1).tolist()]
    assert list(answer["score"]) == pytest.approx(expected.max(-1).values.tolist(), abs=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What of a model is looked at when it is recorded."""
    path = tmp_path / "student"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizerFast"}')
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def test_champion_is_the_version_recorded_last(database: str, folder: Path, tmp_path: Path) -> None:
    """On a database; delivered again, from the start and by another journal, the alias stays with the newest."""
    client = mlflow.MlflowClient(database)

    def champion() -> tuple[int, str]:
        version = client.get_model_version_by_alias("reviews", "champion")
        return int(version.version), client.get_run(version.run_id).info.run_name

    def record(journal: Journal, name: str) -> None:
        journal.run(name, name=name)
        journal.model(name, folder, name="champion", input_example=["good"], registered="reviews", alias="champion")
        journal.finish(name, "FINISHED")
        time.sleep(0.002)  # the newest has a later time

    with Journal(tmp_path / "a.jsonl") as first, Journal(tmp_path / "b.jsonl") as second:
        record(first, "L2")
        deliver(target(database, tmp_path), first)
        assert champion() == (1, "L2")
        record(first, "L4")
        deliver(target(database, tmp_path), first)
        assert champion() == (2, "L4")
        record(second, "L6")
        deliver(target(database, tmp_path), second)
        assert champion() == (3, "L6")
        state_file(first.path).unlink()
        deliver(target(database, tmp_path), first)
        assert champion() == (3, "L6")
        record(first, "L2")
        deliver(target(database, tmp_path), first)
        assert champion() == (1, "L2"), "chosen again, later than L6"
    versions = client.search_model_versions("name = 'reviews'")
    assert sorted(int(version.version) for version in versions) == [1, 2, 3]
    place = client.get_model_version_download_uri("reviews", "1")
    assert (Path(place.removeprefix("file://")) / "model" / "model.safetensors").read_bytes() == b"weights"
    logged = {model.source_run_id: model.tags["mlflow.modelVersions"] for model in client.search_logged_models(["1"])}
    assert logged == {v.run_id: json.dumps([{"name": "reviews", "version": v.version}]) for v in versions}
