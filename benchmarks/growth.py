"""What grows when rows and nodes grow: the scheduler and the store without any compute.

python -m benchmarks.growth [quick]

Manifests are made up for 10^6 to 10^10 rows in parts of the size that corpus preparation would choose; what a driver, a worker and a
trial do with them is what the app does. A store of 1,000 nodes is one in memory that counts requests. What is said of more rows than can be
held here (plans beyond 10^8) is a straight line through what was measured, and marked ~.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from cluster.corpus import rows_of_a_part
from distillation.config import TextClassification
from distillation.parts import MANY, FileRecord
from distillation.storage import Storage
from distillation.store import Manifest, commit, find

ROWS = (10**6, 10**7, 10**8, 10**9, 10**10)
NODES = (1, 10, 100, 1000)
REQUEST = 0.02
"""Seconds that an object store takes to answer."""


def made(rows: int) -> Manifest:
    """The manifest of a corpus of so many rows of 22 tokens."""
    each = rows_of_a_part(8192, rows, TextClassification())
    count = -(-rows // each)
    parts = tuple(
        FileRecord(name=f"part-{i:012x}-train.arrow", bytes=120 * each, checksum=f"{i * 2654435761 % (1 << 128):032x}", rows=each, tokens=22 * each)
        for i in range(count)
    )  # fmt: skip
    return Manifest(kind="corpus", fingerprint="f" * 16, made_from={"source": "made up"}, splits={"train": parts}, facts={"labels": []})


def manifests() -> None:
    print("\n| rows | rows of a part | parts | manifest, table of records | commit | open | bytes of the old manifest | open it |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in ROWS:
        with tempfile.TemporaryDirectory(prefix="bg-") as folder:
            storage, manifest = Storage(folder), made(rows)
            parts = manifest.splits["train"]
            started = time.perf_counter()
            commit(storage, "corpora/c", manifest)
            committed = time.perf_counter() - started
            opened = fresh("opened", folder)
            sizes = storage.sizes("corpora/c")
            old = old_manifest(rows)
            print(
                f"| 10^{len(str(rows)) - 1} | {parts[0].rows:,} | {len(parts):,} | {sizes.pop('manifest.json') / 1e3:.0f} kB, "
                f"{sum(sizes.values()) / 1e6:.1f} MB | {committed:.2f} s | {opened['seconds']:.3f} s, {opened['mb']:.0f} MB | {old} |",
                flush=True,
            )


def old_manifest(rows: int) -> str:
    """Size and time to read of one JSON file with a record for every 8,192 rows, as it was: measured up to 10^9, beyond a straight line."""
    some = min(-(-rows // 8192), 122_071)
    factor = -(-rows // 8192) / some
    record = {"name": "part-0123456789ab-train.arrow", "bytes": 983_040, "checksum": "0" * 32, "rows": 8192, "tokens": 180_224}
    text = json.dumps({"splits": {"train": [record] * some}}, indent=1)
    started = time.perf_counter()
    fields = json.loads(text)
    json.dumps(fields, sort_keys=True)
    Manifest(kind="corpus", fingerprint="f", made_from={}, **fields)
    mark = "~" if factor > 1 else ""
    return f"{mark}{len(text) * factor / 1e6:.1f} MB | {mark}{(time.perf_counter() - started) * factor:.2f} s"


def fresh(what: str, *arguments: str) -> dict[str, float]:
    """Run a function of this file in a process of its own; what it printed, and the memory that it added."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.growth", what, *arguments], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def opened(folder: str) -> None:
    before, started = peak(), time.perf_counter()
    manifest = find(Storage(folder), "corpora/c")
    assert manifest is not None
    assert manifest.rows("train") > 0
    print(json.dumps({"seconds": time.perf_counter() - started, "mb": peak() - before}))


def peak() -> float:
    """Most memory of this process so far, in MB. What `resource` says is carried over from the process that started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def driver() -> None:
    """Requests to an object store that a whole job makes on the driver, and how long they take at 20 ms."""
    from distillation.store import READERS

    print("\n| rows | requests of the driver: listings, records | at 20 ms | as it was: record and rows of every part |")
    print("|---|---|---|---|")
    for rows in ROWS:
        parts, before = -(-rows // rows_of_a_part(8192, rows, TextClassification())), -(-rows // 8192)
        listings = -(-2 * parts // 1000)
        seconds, was = listings * REQUEST + parts * REQUEST * 2 / READERS, before * REQUEST * 4
        print(f"| 10^{len(str(rows)) - 1} | {listings:,} + {parts:,} | {span(seconds)} | {before:,} parts one by one: {span(was)} |")


def nodes() -> None:
    """Parts that one node of the teacher's pass lists, checks and fetches, where rows grow with the nodes."""
    print("\n| nodes | rows | parts of a node: fetched, answered, written | parts that it fetched before |\n|---|---|---|---|")
    for count in NODES:
        rows = 10**7 * count
        parts, before = -(-rows // rows_of_a_part(8192, rows, TextClassification())), -(-rows // 8192)
        shares = [len(range(rank, parts, count)) for rank in range(count)]
        print(f"| {count:,} | {rows:.0e} | {min(shares):,} to {max(shares):,} of {parts:,} | {before:,} |")


def plans(most: int) -> None:
    """Memory and time of a worker for the plan of an epoch and the columns that it looks at: the first that does not fit."""
    print("\n| rows | plan of an epoch | memory of a worker for columns and plan | a row |\n|---|---|---|---|")
    for rows in (n for n in ROWS if n <= most):
        found = fresh("planned", str(rows))
        print(
            f"| 10^{len(str(rows)) - 1} | {found['seconds']:.1f} s | {found['mb'] / 1e3:.2f} GB | {found['mb'] * 1e6 / rows:.0f} bytes |",
            flush=True,
        )
    for rows in (n for n in ROWS if n > most):
        print(f"| 10^{len(str(rows)) - 1} | ~{found['seconds'] * rows / most:,.0f} s | ~{found['mb'] / 1e3 * rows / most:,.0f} GB | |")


def planned(rows: str) -> None:
    from distillation.config import TrainingConfig
    from distillation.loop import schedule

    before, generator = peak(), np.random.default_rng(0)
    lengths = np.empty(int(rows), np.int32)
    for start in range(0, int(rows), 10**6):  # in pieces: what making them up takes is not to be counted
        lengths[start : start + 10**6] = np.clip(np.exp(generator.normal(2.75, 0.75, min(10**6, int(rows) - start))), 6, 128)
    others = [np.ones(int(rows), np.int32) for _ in range(3)]  # scored, labelled and label, as `Rows` holds them
    made_up, started = peak(), time.perf_counter()
    plan = schedule(lengths, others[0], {}, TrainingConfig(epochs=1, batch_tokens=4096))
    seconds = time.perf_counter() - started
    assert plan.seen(plan.total)["train/rows"] == int(rows)
    print(json.dumps({"seconds": seconds, "mb": max(peak(), made_up) - before}))


def span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def main() -> None:
    print(f"parts beyond {MANY:,} lie in a table")
    manifests()
    driver()
    nodes()
    plans(10**7 if sys.argv[1:2] == ["quick"] else 10**8)


if __name__ == "__main__":
    commands = {"opened": opened, "planned": planned}
    commands[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in commands else main()
