"""Storage on S3: what two trials of one node fetch, one after the other and at once; and parts one by one against several at a time.

python -m benchmarks.storage

moto's server behind a proxy that counts the bytes of objects and answers after 20 ms, as an object store does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.made import corpus
from distillation import store
from distillation.columns import Columns
from distillation.storage import Storage
from tests.distillation.served import Proxy, proxied, s3_server

ROWS, PART_ROWS = 60_000, 1000
DELAY = 0.02


def main() -> None:
    print("| what | figure | bar |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bs-") as folder, s3_server() as address, proxied(address) as proxy:
        os.environ.update(AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
        uri = f"s3://bucket/x?scheme=http&endpoint_override={proxy.address}"
        corpus(Storage(uri), "corpora/c", {"train": ROWS}, PART_ROWS)
        manifest = store.find(Storage(uri), "corpora/c")
        assert manifest is not None
        parts = manifest.total_bytes()
        print(f"| store of {ROWS:,} rows in {len(manifest.splits['train'])} parts | {parts / 1e6:.1f} MB | |")
        proxy.delay = DELAY
        first = fetched(proxy, uri, folder, "one", 1)
        print(f"| first trial of a node: bytes of parts fetched | {first:,} | {parts:,} |")
        print(f"| second trial of that node | {fetched(proxy, uri, folder, 'one', 1):,} | 0 |")
        print(f"| two trials at once on another node, both together | {fetched(proxy, uri, folder, 'two', 2):,} | {parts:,} |")
        speed(uri, folder, manifest)


def fetched(proxy: Proxy, uri: str, folder: str, node: str, trials: int) -> int:
    """Bytes of parts that so many trials fetch at once on a node, each in a process of its own. A trial opens the split and reads every row."""
    proxy.log.clear()
    environment = {**os.environ, "DISTILLERY_CACHE": f"{folder}/{node}"}
    command = [sys.executable, "-m", "benchmarks.storage", "trial", uri]
    for process in [subprocess.Popen(command, env=environment) for _ in range(trials)]:
        assert process.wait() == 0
    return sum(size for method, path, status, size in proxy.log if method == "GET" and status in (200, 206) and ".arrow" in path)


def trial(uri: str) -> None:
    _, paths = store.open_artifact(Storage(uri), "corpora/c", "corpus")
    columns = Columns(list(paths.values()))
    assert int(columns.whole("length").sum()) == sum(len(values) for values in columns.values("input_ids"))


def speed(uri: str, folder: str, manifest: store.Manifest) -> None:
    """Seconds to fetch and check all parts, as `open_artifact` does and one after the other, in turn."""
    ours, plain = [], []
    for turn in range(3):
        for times, threads in ((ours, store.FETCHERS), (plain, 1)):
            os.environ["DISTILLERY_CACHE"] = str(Path(folder) / f"speed-{turn}-{threads}")
            storage, started = Storage(uri), time.perf_counter()
            with ThreadPoolExecutor(threads) as pool:
                list(
                    pool.map(lambda part, s=storage: s.fetch(f"corpora/c/{part.name}", part.bytes, part.checksum), manifest.splits["train"])
                )
            times.append(time.perf_counter() - started)
    print(
        f"| parts one after the other / {store.FETCHERS} at a time | {min(plain):.2f} / {min(ours):.2f} s = {min(plain) / min(ours):.1f} | |"
    )


if __name__ == "__main__":
    trial(sys.argv[2]) if sys.argv[1:2] == ["trial"] else main()
