"""Opening the store of a million rows and planning an epoch, in a fresh process that needs neither torch nor Ray.

python -m benchmarks.store [ROWS]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time

from distillation.columns import Columns
from distillation.storage import Storage

BATCH_TOKENS = 4096


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        from benchmarks.made import corpus

        corpus(Storage(folder), "corpora/c", {"train": rows})
        print("| what | ours | bar |\n|---|---|---|")
        subprocess.run([sys.executable, "-m", "benchmarks.store", "open", folder], check=True)


def open_and_plan(folder: str) -> None:
    import numpy as np

    from distillation import store
    from distillation.batches import plan_epoch

    started = time.perf_counter()
    manifest, paths = store.open_artifact(Storage(folder), "corpora/c", "corpus")
    columns = Columns([paths[part.name] for part in manifest.splits["train"]])
    lengths = columns.whole("length")
    opened = time.perf_counter()
    plan = plan_epoch(lengths, np.arange(len(lengths)), BATCH_TOKENS, 0, 0)
    planned = time.perf_counter()
    assert sorted(plan.rows.tolist()) == list(range(len(lengths)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    size = manifest.total_bytes() / 1e6
    print(f"| open and verify {len(lengths):,} rows ({size:.0f} MB), plan {plan.steps:,} steps | {opened - started:.2f} + "
          f"{planned - opened:.2f} s | < 2 s |\n| peak memory of the process | {peak:.0f} MB | < 300 MB |")  # fmt: skip


if __name__ == "__main__":
    open_and_plan(sys.argv[2]) if sys.argv[1:2] == ["open"] else main()
