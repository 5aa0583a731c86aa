"""A thousand trials of no work through all of a search - Tune, ledger, journal, MLflow on SQLite - and the leaderboard over them.

python -m benchmarks.many_trials [TRIALS]          about 5 minutes on two cores
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

COSTS = {"cost/parameters": 15e6, "cost/bytes": 60e6, "cost/flops": 107e6}


def nothing(config: dict[str, Any]) -> None:
    """A trial of 1,000 rows that reports what a real one does, and trains nothing."""
    from tuning.trials import Reporter

    reporter, quality = Reporter(config["work"]), 0.5 + config["point"]["losses.soft.weight"] / 4
    for step in (10, 20, 30):
        terms = {f"train/{kind}/{name}": 0.5 for kind in ("loss", "weighted", "gradient") for name in ("hard", "soft")}
        reporter.point({"train/loss": 1.0, **terms, "train/learning_rate": 1e-4, "train/rows": step * 100 / 3}, step)
    reporter.point({"validation/accuracy": quality, "validation/nll": 1 - quality, "train/rows": 1000}, 30)
    reporter.finish("finished", seconds=0.0)


class NoWork:
    """Proposes trials of `nothing`; notes the memory of this process, in MB, at every hundredth."""

    def __init__(self) -> None:
        self.asked, self.memory = 0, {}

    def trial(self, point: Mapping[str, Any]) -> Any:
        import psutil

        from distillation import store
        from tuning.director import Proposal
        from tuning.ledger import Task

        if self.asked % 100 == 0:
            self.memory[self.asked] = psutil.Process().memory_info().rss / 1e6
        self.asked += 1
        weight, made = point["losses.soft.weight"], store.fingerprint(dict(point))
        task = Task("trial", f"L2-w{weight:.2f}", dict(point), "L2", "L2", made, COSTS, 1000)
        return Proposal(task, {"fit": {"save_rungs": False}, "made_from": {}})

    def baseline(self, trial: Any) -> None:
        return None

    def refits(self, trial: Any) -> Sequence[Any]:
        return []


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        folder = Path(name)
        file = folder / "job.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "name": "nothing",
                    "task": {"type": "text_classification"},
                    "corpus": {"type": "files", "train": "none.csv"},
                    "teacher": {"model": "none"},
                    "student": {"type": "layers", "layers": [0, 5]},
                    "losses": {"hard": {"type": "cross_entropy", "weight": 0.3}, "soft": {"type": "forward_kl"}},
                    "training": {"epochs": 1},
                    "cluster": {"storage": str(folder / "storage")},
                    "search": {"space": {"losses.soft.weight": {"uniform": [0.0, 1.0]}}, "trials": trials},
                }
            )
        )
        memory, seconds, delivered = run(str(file))
        print("| what | ours | other | ratio | bar |\n|---|---|---|---|---|")
        print(f"| {trials:,} trials of no work, MLflow on SQLite: a trial | {seconds / trials:.3f} s | | | <= 0.3 s |")
        print(f"| the same until MLflow has all of it | {(seconds + delivered) / trials:.3f} s | | | |")
        first, last = memory[100], memory[trials]
        print(f"| memory of the driver after {trials:,} trials / after 100 | {last:.0f} MB | {first:.0f} MB | {last / first:.2f} | flat |")
        print(f"memory by trials: {', '.join(f'{count}: {size:.0f}' for count, size in sorted(memory.items()))} MB", file=sys.stderr)
        started = time.perf_counter()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "COLUMNS": "120"}
        done = subprocess.run(
            [sys.executable, "-m", "jobs", "leaderboard", str(file)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        print(f"| distill leaderboard over {trials:,} trials | {time.perf_counter() - started:.2f} s | | | < 2 s |")
        assert f"{trials} of {trials} trials ({trials} finished)" in done.stdout, done.stdout


def run(file: str) -> tuple[dict[int, float], float, float]:
    """MB of the driver by trials that have ended, seconds of the search, and seconds until MLflow had the rest."""
    import psutil

    from cluster.delivery import Tracker
    from cluster.journal import Journal
    from cluster.session import connect
    from jobs.config import load
    from jobs.search import folder_of, target_of_search
    from tuning import search as tune
    from tuning.director import Director
    from tuning.ledger import Ledger
    from tuning.recording import Recorder
    from tuning.schedulers import build_scheduler
    from tuning.searchers import build_searcher

    job, work = load(file), NoWork()
    folder = folder_of(job)
    assert job.search is not None
    with Ledger(folder / "ledger.jsonl") as ledger, Journal(folder / "journal.jsonl") as journal, connect(job.cluster):
        concurrent = tune.require_room(job.search, job.cluster)
        with Tracker(target_of_search(job), journal) as tracker:
            journal.run("nothing", name="nothing")
            ledger.begin(job.name, job.model_dump(mode="json"), "none", {"validation/accuracy": 0.8})
            director = Director(ledger, build_searcher(job.search, job.space()), work, Recorder(journal, "nothing"), lambda trial: None)
            context = {"quality": job.search.quality, "maximise": True, "teacher": {"metric": "validation/accuracy", "value": 0.8}}

            started = time.perf_counter()
            tune.run(director, build_scheduler(job.search, 1000), job.cluster, concurrent, context, lambda: None, trial=nothing)
            seconds = time.perf_counter() - started
            work.memory[job.search.trials] = psutil.Process().memory_info().rss / 1e6
            journal.finish("nothing", "FINISHED")
            started = time.perf_counter()
            assert tracker.close() == 0
            return work.memory, seconds, time.perf_counter() - started


if __name__ == "__main__":
    main()
