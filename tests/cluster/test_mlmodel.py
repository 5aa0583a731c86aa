"""Models of every task as MLflow keeps them: those that it serves answer through pyfunc."""

import json

import mlflow
import numpy as np
import pytest

from cluster.mlmodel import served, write_model
from tests.kinds import TASKS, save, written_down

SERVED = {"text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm"}


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # MLflow, about its own code
@pytest.mark.parametrize("kind", TASKS)
def test_what_mlflow_can_serve_answers(tmp_path, kind):
    folder, target = tmp_path / "model", tmp_path / "kept"
    if kind == "token_classification":  # MLflow breaks on a text without entities: all words begin one
        written_down(folder, kind, np.eye(3)[np.zeros(40, int)])
    else:
        save(folder, kind, **({"n_positions": 512} if kind == "causal_lm" else {}))  # MLflow asks for 256 new tokens
    text = "some [MASK] text" if kind == "masked_lm" else "some text"
    assert write_model(folder, target, [text], "m-1", "run") == (kind in SERVED)
    assert (target / "model" / "model.safetensors").exists()
    if kind not in SERVED:
        assert json.loads((target / "MLmodel").read_text())["flavors"] == {}
        assert not (target / "components").exists()
        return
    model = mlflow.pyfunc.load_model(str(target))
    assert model.metadata.signature.inputs.input_types()[0].name == "string"
    said = model.predict([text])
    if kind in ("text_classification", "multi_label", "regression"):
        assert list(said.columns) == ["label", "score"]
    else:
        assert len(said) == 1
        assert isinstance(said[0], str)
    if kind == "causal_lm":
        assert said[0].startswith("some text")
    if kind == "token_classification":
        assert said[0] == "B-x,B-x"


def test_an_architecture_that_transformers_does_not_know_is_not_served():
    assert served("NobodysModel") is None
