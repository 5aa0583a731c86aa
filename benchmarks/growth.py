"""What grows when rows and nodes grow: the scheduler and the store without any compute.

python -m benchmarks.growth

Manifests are made up for 10^6 to 10^10 rows in parts of the size that corpus preparation would choose; what a driver, a worker and a
trial do with them is what the app does. A store of 1,000 nodes is one in memory that counts requests. What is marked ~ is a straight line
through what was measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

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


def fresh(what: str, *arguments: str) -> dict[str, Any]:
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


def trainings() -> None:
    """What a training worker holds, plans and reads in an epoch, with 10^7 rows for each node; and if all rows were planned together."""
    print(
        "\n| rows, nodes | parts: all, at once, in the first epoch, in three | plan of a window | memory of a worker | all planned together |"
        "\n|---|---|---|---|---|"
    )
    for rows in ROWS:
        count = max(1, rows // 10**7)
        found, before = fresh("planned", str(rows), str(count)), fresh("planned", str(rows), str(count), "whole") if rows <= 10**7 else None
        each = before["mb"] / rows if before else each  # noqa: F821 - of the row before
        told = f"{before['seconds']:.1f} s, {before['mb']:,.0f} MB" if before else f"~{each * rows:,.0f} MB"
        print(
            f"| 10^{len(str(rows)) - 1}, {count:,} | {', '.join(f'{n:,.0f}' for n in found['parts'])} | {found['seconds']:.2f} s | "
            f"{found['mb']:,.0f} MB | {told} |",
            flush=True,
        )


class Rows:
    """As many made-up rows as some parts have, with the columns that `distillation.rows.Rows` holds of each."""

    def __init__(self, sizes: list[int]) -> None:
        generator, count = np.random.default_rng(0), sum(sizes)
        self.offsets, self.lengths = np.cumsum([0, *sizes]), np.empty(count, np.int32)
        for start in range(0, count, 10**6):  # in pieces: what making them up takes is not to be counted
            self.lengths[start : start + 10**6] = np.clip(np.exp(generator.normal(2.75, 0.75, min(10**6, count - start))), 6, 128)
        self.others = [np.ones(count, np.int32) for _ in range(3)]  # scored, labelled, label

    def __len__(self) -> int:
        return len(self.lengths)


class Split:
    """What a schedule is told of a split, and what it opens."""

    def __init__(self, rows: int) -> None:
        self.parts = made(rows).splits["train"]
        self.most = 0

    def open(self, parts: list[int] | None = None) -> Rows:
        chosen = self.parts if parts is None else [self.parts[part] for part in parts]
        self.most = max(self.most, len(chosen))
        return Rows([part.rows for part in chosen])

    @cached_property
    def first(self) -> Rows:
        return Rows([self.parts[0].rows])

    @property
    def whole(self) -> Rows:
        return self.open()


def planned(rows: str, nodes: str, how: str = "") -> None:
    """Plan the first window of a worker, and open the next, as it does in its first steps."""
    from distillation import windows
    from distillation.checkpoints import Position
    from distillation.config import TrainingConfig
    from distillation.parts import numbers
    from distillation.schedule import schedule

    if how == "whole":
        windows.PARTS = 10**9
    split, world_size = Split(int(rows)), int(nodes)
    training = TrainingConfig(epochs=1, batch_tokens=4096 * world_size)
    before, started = peak(), time.perf_counter()
    plan = schedule(split, training, labelled=False, rank=world_size // 2, world_size=world_size)  # type: ignore[arg-type]
    plan.batch(Position(0, 0, 0))
    seconds = time.perf_counter() - started
    plan.batch(Position(1, 0, 1))
    if thread := getattr(plan, "_thread", None):
        thread.shutdown()
    read: list[set[int]] = []
    tokens = numbers(split.parts, "tokens")
    for epoch in range(3):
        dealt = windows.deal(len(split.parts), 0, epoch)
        read.append({each.part for its in dealt for each in windows.held(its, tokens[its], world_size // 2, world_size)})
    parts = [len(split.parts), split.most, len(read[0]), len(read[0] | read[1] | read[2])]
    print(json.dumps({"seconds": seconds, "mb": peak() - before, "parts": parts}))


def span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def main() -> None:
    print(f"parts beyond {MANY:,} lie in a table")
    manifests()
    driver()
    nodes()
    trainings()


if __name__ == "__main__":
    commands = {"opened": opened, "planned": planned}
    commands[sys.argv[1]](*sys.argv[2:]) if sys.argv[1:2] and sys.argv[1] in commands else main()
