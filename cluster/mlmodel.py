"""A `save_pretrained` folder laid out as MLflow stores models, with signature and input example.

Classifiers of texts and of words and language models become what `mlflow.pyfunc` loads and asks with texts. Of others (images, embeddings)
the files are kept as they are, without a flavour: MLflow would ask them with something else than they were trained on.

`mlflow.transformers.save_model` loads the model, writes it again, and asks the hub for a model card and a licence: 48 s where there is no
hub. Here it is links and four small files. tests/cluster/test_tracking.py loads it back with `mlflow.pyfunc`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Served(NamedTuple):
    """How MLflow serves a kind of model: a pipeline of transformers, and the columns of its answer."""

    task: str
    pipeline: str
    answer: tuple[tuple[str | None, str], ...]
    """Name and type of each column; a column without a name is a list of strings."""


LABEL = (("label", "string"), ("score", "double"))
TEXTS: tuple[tuple[str | None, str], ...] = ((None, "string"),)


def served(architecture: str) -> Served | None:
    """By the class that config.json names; None where MLflow has nothing that asks it with texts."""
    from transformers.models.auto import modeling_auto as known

    kinds = (
        (known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, Served("text-classification", "TextClassificationPipeline", LABEL)),
        (known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, Served("token-classification", "TokenClassificationPipeline", TEXTS)),
        (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Served("text-generation", "TextGenerationPipeline", TEXTS)),
        (known.MODEL_FOR_MASKED_LM_MAPPING_NAMES, Served("fill-mask", "FillMaskPipeline", TEXTS)),
    )
    return next((found for names, found in kinds if architecture in names.values()), None)


def write_model(folder: Path, target: Path, input_example: Sequence[str], model_id: str, run_id: str) -> bool:
    """Lay out the model in `folder` under `target`. Of the weights only safetensors files are taken. Returns whether pyfunc loads it."""
    config = json.loads((folder / "config.json").read_text())
    kind = served(config["architectures"][0])
    weights = sorted(folder.glob("*.safetensors"))
    texts = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja"))
    for part, files in (("model", [*weights, *texts]), *([("components/tokenizer", texts)] if kind else [])):
        (target / part).mkdir(parents=True)
        for file in files:
            (target / part / file.name).symlink_to(file.resolve())
    versions = {name: importlib.metadata.version(name) for name in ("mlflow", "transformers", "torch")}
    model = {
        "flavors": _flavours(folder, config, kind, versions["transformers"]) if kind else {},
        "mlflow_version": versions["mlflow"],
        "model_id": model_id,
        "run_id": run_id,
        "model_uuid": model_id,
        "model_size_bytes": sum(p.stat().st_size for p in weights),
        **(_example(target, kind, input_example) if kind else {}),
    }
    (target / "MLmodel").write_text(json.dumps(model, indent=1))  # the file is YAML, and JSON is YAML
    (target / "requirements.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    (target / "python_env.yaml").write_text(f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n")
    return kind is not None


def _flavours(folder: Path, config: dict[str, Any], kind: Served, version: str) -> dict[str, Any]:
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    return {
        "python_function": {
            "loader_module": "mlflow.transformers",
            "python_version": platform.python_version(),
            "env": {"virtualenv": "python_env.yaml"},
        },
        "transformers": {
            "code": None,
            "components": ["tokenizer"],
            "instance_type": kind.pipeline,
            "model_binary": "model",
            "pipeline_model_type": config["architectures"][0],
            "source_model_name": "distillery",
            "task": kind.task,
            "tokenizer_type": tokenizer["tokenizer_class"],
            "torch_dtype": f"torch.{config.get('dtype', 'float32')}",
            "transformers_version": version,
        },
    }


def _example(target: Path, kind: Served, texts: Sequence[str]) -> dict[str, Any]:
    (target / "input_example.json").write_text(json.dumps(list(texts)))
    (target / "serving_input_example.json").write_text(json.dumps({"inputs": list(texts)}))
    columns = [{"type": each, "name": name, "required": True} if name else {"type": each, "required": True} for name, each in kind.answer]
    return {
        "signature": {"inputs": json.dumps([{"type": "string", "required": True}]), "outputs": json.dumps(columns), "params": None},
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
    }
