"""Corpus preparation at N and at 10 N rows: time at most 11 times, peak memory the same within 20 %.

    python benchmarks/corpus.py [rows]

Each size runs in a process of its own with its own local Ray (2 CPUs, the same object store). Memory is the sum of the proportional set
sizes of that process and all below it, which counts a shared page once, sampled four times a second. N must be large enough to fill the
object store: below that Ray starts no process that writes to disk, and what is measured is Ray's start, not the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LARGEST_TIME_RATIO = 11.0
LARGEST_MEMORY_RATIO = 1.2
WORDS_PER_ROW = 100
OBJECT_STORE_BYTES = 80 << 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=50_000)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        return prepare(arguments.inside)
    with tempfile.TemporaryDirectory() as folder:
        small = measure(Path(folder) / "small", arguments.rows)
        large = measure(Path(folder) / "large", 10 * arguments.rows)
    time_ratio, memory_ratio = large["seconds"] / small["seconds"], large["bytes"] / small["bytes"]
    print("| corpus preparation | rows | seconds | peak MB | parts |")
    print("|---|---|---|---|---|")
    for name, run in (("N", small), ("10 N", large)):
        print(f"| {name} | {run['rows']:,} | {run['seconds']:.1f} | {run['bytes'] / 1e6:.0f} | {run['parts']} |")
    print(f"| ratio (bar: time <= {LARGEST_TIME_RATIO}, memory <= {LARGEST_MEMORY_RATIO}) | | {time_ratio:.2f} | {memory_ratio:.2f} | |")
    return int(time_ratio > LARGEST_TIME_RATIO or memory_ratio > LARGEST_MEMORY_RATIO)


def measure(folder: Path, rows: int) -> dict[str, float]:
    """Generate `rows` rows, prepare them in a fresh process, and watch its memory. Seconds are of `prepare` alone."""
    folder.mkdir()
    generate(folder, rows)
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--inside", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0
    while process.poll() is None:
        peak = max(peak, proportional_bytes(process.pid))
        time.sleep(0.25)
    assert process.stdout is not None
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"preparing {rows} rows ended with {process.returncode}: {output}")
    return {**json.loads(output.splitlines()[-1]), "bytes": peak}


def proportional_bytes(pid: int) -> int:
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def generate(folder: Path, rows: int) -> None:
    """Rows of random words in JSON lines, five files; every twentieth is a copy of an earlier one. And a tokenizer that knows the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(0)
    words = ["".join(draw.choices("aeioubdfgklmnprstvz", k=draw.randint(2, 9))) for _ in range(5000)]
    texts: list[str] = []
    for file in range(5):
        with open(folder / f"rows-{file}.jsonl", "w", encoding="utf-8") as stream:
            for row in range(rows // 5):
                copy = row % 20 == 19
                text = draw.choice(texts) if copy else " ".join(draw.choices(words, k=WORDS_PER_ROW))
                if row % 20 == 0:
                    texts.append(text)
                stream.write(json.dumps({"text": text, "label": "even" if len(text) % 2 == 0 else "odd"}) + "\n")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder / "tokenizer")


def prepare(folder: Path) -> int:
    import ray

    from cluster import corpus
    from cluster.config import FilesCorpus
    from distillation.config import TextClassification
    from distillation.storage import Storage

    ray.init(address="local", include_dashboard=False, num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, log_to_driver=False)
    settings, task, tokenizer = FilesCorpus(type="files", train=str(folder / "*.jsonl")), TextClassification(), folder / "tokenizer"
    started = time.perf_counter()
    fingerprint, made_from = corpus.corpus_fingerprint(settings, task, tokenizer)
    manifest = corpus.prepare(settings, task, tokenizer, Storage(str(folder / "storage")), fingerprint=fingerprint, made_from=made_from)
    seconds = time.perf_counter() - started
    parts = sum(len(records) for records in manifest.splits.values())
    print(json.dumps({"rows": manifest.facts["rows_read"], "seconds": seconds, "parts": parts}))
    ray.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
