"""A `save_pretrained` folder laid out as MLflow stores transformers models, with signature and input example.

`mlflow.transformers.save_model` loads the model, writes it again, and asks the hub for a model card and a licence: 48 s where there is no
hub. Here it is links and four small files. tests/cluster/test_tracking.py loads it back with `mlflow.pyfunc`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path


def write_model(folder: Path, target: Path, input_example: Sequence[str], model_id: str, run_id: str) -> None:
    """Lay out the text classifier in `folder` under `target`. Of the weights only safetensors files are taken."""
    config, tokenizer = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "tokenizer_config"))
    weights = sorted(folder.glob("*.safetensors"))
    texts = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".txt", ".model", ".jinja"))
    for part, files in (("model", [*weights, *texts]), ("components/tokenizer", texts)):
        (target / part).mkdir(parents=True)
        for file in files:
            (target / part / file.name).symlink_to(file.resolve())
    versions = {name: importlib.metadata.version(name) for name in ("mlflow", "transformers", "torch")}
    columns = [{"type": "string", "name": "label", "required": True}, {"type": "double", "name": "score", "required": True}]
    model = {
        "flavors": {
            "python_function": {
                "loader_module": "mlflow.transformers",
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
            },
            "transformers": {
                "code": None,
                "components": ["tokenizer"],
                "instance_type": "TextClassificationPipeline",
                "model_binary": "model",
                "pipeline_model_type": config["architectures"][0],
                "source_model_name": "distillery",
                "task": "text-classification",
                "tokenizer_type": tokenizer["tokenizer_class"],
                "torch_dtype": f"torch.{config.get('dtype', 'float32')}",
                "transformers_version": versions["transformers"],
            },
        },
        "mlflow_version": versions["mlflow"],
        "model_id": model_id,
        "run_id": run_id,
        "model_uuid": model_id,
        "model_size_bytes": sum(p.stat().st_size for p in weights),
        "signature": {"inputs": json.dumps([{"type": "string", "required": True}]), "outputs": json.dumps(columns), "params": None},
        "saved_input_example_info": {
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
            "type": "json_object",
        },
    }
    (target / "MLmodel").write_text(json.dumps(model, indent=1))  # the file is YAML, and JSON is YAML
    (target / "input_example.json").write_text(json.dumps(list(input_example)))
    (target / "serving_input_example.json").write_text(json.dumps({"inputs": list(input_example)}))
    (target / "requirements.txt").write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    (target / "python_env.yaml").write_text(f"python: {platform.python_version()}\ndependencies:\n- -r requirements.txt\n")
