"""Rules of the house that hold for every file: import direction, light settings, codes of errors, and what is never written."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillation import errors

ROOT = Path(__file__).parent.parent
LAYERS = ("distillation", "cluster", "tuning", "jobs")
"""From the innermost to the outermost: a package imports itself and those before it."""

FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
CONFIGS = [f"{layer}.{path.stem}" for layer in LAYERS for path in sorted((ROOT / layer).glob("*config.py"))]
HEAVY = {"torch", "ray", "transformers", "mlflow", "datasets", "pandas", "numpy", "pyarrow", "sklearn", "matplotlib"}
MLFLOW = {"cluster/tracking.py", "cluster/attachments.py", "cluster/outages.py"}
NEVER = ("weights_only=False", "pickle.load", "except Exception", "trust_remote_code=True", "yaml.load(")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Absolute names of the modules that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(path)}:{node.lineno} imports relatively"
            yield node.module


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_one_way(path):
    layer = LAYERS.index(path.relative_to(ROOT).parts[0])
    roots = {module.split(".")[0] for module in imported(path)}
    assert not roots & set(LAYERS[layer + 1 :])
    if layer == 0:
        assert not roots & {"ray", "mlflow"}
    if name(path) not in MLFLOW:
        assert "mlflow" not in roots
    assert "tests" not in roots


@pytest.mark.parametrize("module", CONFIGS)
def test_settings_load_nothing_heavy(module):
    program = f"import sys, json, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & {loaded.split(".")[0] for loaded in json.loads(done.stdout)}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_what_is_never_written(path):
    text = path.read_text()
    assert [pattern for pattern in NEVER if pattern in text] == []


# -------------------------------------------------------------------------------------------------------------- error codes


def raised_codes(path: Path) -> Iterator[tuple[str, str, str]]:
    """(class, code, what) wherever one of our errors is built with a literal code; what is empty where it is not a literal."""
    kinds = {kind.__name__ for kind in errors.DistilleryError.__subclasses__()}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            code, what = [*node.args, None, None][:2]
            if isinstance(code, ast.Constant):
                yield node.func.id, code.value, what.value if isinstance(what, ast.Constant) else ""


def written_codes(path: Path) -> set[str]:
    strings = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    return {text for text in strings if isinstance(text, str) and re.fullmatch(r"DST-\d+", text)}


USED = {code: name(path) for path in FILES for code in written_codes(path)}
LISTED = re.findall(r"^\| (DST-\d+) \|", (ROOT / "docs" / "errors.md").read_text(), re.M)


def test_every_code_is_in_the_document_once_and_the_other_way_round():
    assert {code: path for code, path in USED.items() if code not in LISTED} == {}, "missing in docs/errors.md"
    assert [code for code in LISTED if code not in USED] == [], "in docs/errors.md but used nowhere"
    assert sorted(LISTED) == sorted(set(LISTED)), "twice in docs/errors.md"


def test_codes_are_sorted_under_their_headings():
    for section in (ROOT / "docs" / "errors.md").read_text().split("\n## ")[1:]:
        codes = re.findall(r"^\| (DST-\d+) \|", section, re.M)
        assert codes == sorted(codes), section.splitlines()[0]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_code_begins_with_the_exit_code_of_its_class(path):
    for kind, code, _ in raised_codes(path):
        assert re.fullmatch(rf"DST-{getattr(errors, kind).exit_code}\d{{3}}", code), f"{kind}({code})"


def test_one_code_has_one_meaning():
    """Where two files raise the same code, what they say begins alike."""
    begins: dict[str, dict[str, set[str]]] = {}
    for path in FILES:
        for _, code, what in raised_codes(path):
            begins.setdefault(code, {}).setdefault(name(path), set()).add(what.split(" ")[0])
    assert {code: files for code, files in begins.items() if not set.intersection(*files.values())} == {}


def test_the_exit_codes_of_the_document_are_those_of_the_classes():
    table = (ROOT / "docs" / "errors.md").read_text().split("## Exit codes")[1].split("\n## ")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)}
    assert codes == {kind.exit_code for kind in errors.DistilleryError.__subclasses__()} | {0, 1, 75, 130}
