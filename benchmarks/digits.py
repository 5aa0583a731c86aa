"""A ResNet on scikit-learn's digits: what a student of a sixteenth of the parameters keeps. The recipe `resnet_digits`, as it ships.

python -m benchmarks.digits          some minutes on two cores
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.made import line
from jobs.config import load
from jobs.pipeline import run


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(load("resnet_digits", [f"cluster.storage={folder}"]), Console(quiet=True))
        (table,) = Path(folder).glob("runs/*/*/evaluation.json")
        found = {e["role"]: e for e in json.loads(table.read_text())}
    student, teacher = found["student"], found["teacher"]
    print("| what | ours | other | ratio | bar |\n|---|---|---|---|---|")
    line("accuracy on test, student / teacher", 100 * student["quality"]["accuracy"], 100 * teacher["quality"]["accuracy"], "%", ">= 0.99")
    line(
        "parameters, student / teacher (thousands)", student["cost"]["parameters"] / 1e3, teacher["cost"]["parameters"] / 1e3, "", "<= 0.25"
    )
    gain, low, high = (student["against"][name] for name in ("gain", "gain_low", "gain_high"))
    print(f"\nAgainst the same student without distillation: {gain:+.1f} points (95 % interval {low:.1f} to {high:.1f}).")


if __name__ == "__main__":
    main()
