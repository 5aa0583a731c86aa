"""Nodes that come and go while a student is trained: 4 -> 2 -> 3 -> 1 -> 4 workers, beside the same training undisturbed.

python -m benchmarks.elastic          about 3 minutes on two cores; nodes of one CPU, a tiny model
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from cluster import elastic
from cluster.config import ClusterConfig
from distillation import fit
from distillation.config import DenseLogits, TargetsConfig, TrainingConfig
from distillation.loop import LocalSession
from tests.cluster import growing
from tests.tiny import rows_of, settings, world

TRAINING = TrainingConfig(epochs=12, batch_tokens=140, learning_rate=3e-4, log_every=1, checkpoint_every=10, precision="fp32")
LOST, TAKEN_BACK = 17, 44
"""Steps at which two nodes vanish without a word, 7 after a checkpoint, and at which two are taken back with notice."""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(growing.environment(folder))
        elastic.GROW_SECONDS = 0.0
        storage = world(folder, config=TargetsConfig(logits=DenseLogits(dtype="float32")))
        alone, notes = LocalSession(), folder / "notes"
        notes.mkdir()
        fit.train(settings(storage, "alone", training=TRAINING), alone, {})
        payload = {"fit": settings(storage, "s", training=TRAINING).model_dump(mode="json"), "key": "k", "notes": str(notes)}
        with growing.nodes(4) as nodes:
            events = growing.Events(
                notes, (LOST, lambda: nodes.kill(2), 2), (31, nodes.add, 3), (TAKEN_BACK, lambda: nodes.notify(2), 1), (57, lambda: nodes.add(3), 4)
            )  # fmt: skip
            cluster = ClusterConfig(storage=storage.uri, workers={"min": 1, "max": 4}, cpus_per_worker=1, address="auto")
            started = time.perf_counter()
            events.undergo(payload, cluster)
            seconds = time.perf_counter() - started
        found, training = growing.read_notes(notes), TRAINING
        steps = growing.every_row_once(found, rows_of(storage), training.batch_tokens, training.epochs or 0)
        expected, curve = growing.losses(alone.history), growing.losses(events.points)
        assert list(curve) == list(expected) == list(range(1, steps + 1))
        apart = max(abs(curve[step] - expected[step]) for step in curve)
        recorded = [metrics for _, metrics in events.points if "cluster/workers" in metrics]
        print("| what | found | bar |\n|---|---|---|")
        print(f"| workers | {' -> '.join(map(str, found.sizes))} | 4 -> 2 -> 3 -> 1 -> 4 |")
        print(f"| rows of {training.epochs} epochs, each once | {steps} steps as planned | exact |")
        print(f"| losses against the undisturbed run, furthest apart | {apart:.1e} | 1e-6 |")
        print(f"| steps done again, of {steps}: lost nodes, notice and growth | {found.wasted()} | at most 10 for the loss, 0 else |")
        print(
            f"| restarts, wasted steps as recorded | {recorded[-1]['cluster/restarts']:.0f}, {recorded[-1]['cluster/wasted_steps']:.0f} | |"
        )
        print(f"| time | {seconds:.0f} s | |")


if __name__ == "__main__":
    main()
