"""The benchmark: contenders in processes of their own, trials in turn, raw samples kept."""

from __future__ import annotations

import contextlib
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sspcompile.errors import CheckpointError, InputError
from sspcompile.measure.compare import Ratio, compare_all
from sspcompile.measure.intervals import Summary, summarize
from sspcompile.measure.metrics import METRICS
from sspcompile.measure.process import Worker

SCHEMA_VERSION = 1
WARMUP = 2
# About 15 seconds for two tiny models, most of it imports.
QUICK: Mapping[str, int] = {"prompt_tokens": 64, "new_tokens": 16, "batch": 1, "repeats": 7}
FULL: Mapping[str, int] = {"prompt_tokens": 512, "new_tokens": 128, "batch": 1, "repeats": 20}

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Contender:
    """A Hugging Face model folder. `trust_remote_code` lets it run the code that it ships."""

    name: str
    path: Path
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Settings:
    """Equal for all contenders. Counts of tokens are per sequence."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    warmup: int
    threads: int
    seed: int
    device: str


@dataclass(frozen=True)
class ContenderResult:
    """`metrics` maps names of METRICS to samples; `warmup` holds the discarded samples of the timed ones."""

    name: str
    path: str
    architecture: str
    dtype: str
    metrics: Mapping[str, Summary]
    warmup: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class BenchResult:
    """`ratios` compare the first contender (the reference) with each of the others."""

    settings: Settings
    contenders: tuple[ContenderResult, ...]
    ratios: tuple[Ratio, ...]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values only; with the definition and unit of every metric that occurs."""
        used = {name for contender in self.contenders for name in contender.metrics}
        definitions = {n: {"unit": m.unit, "definition": m.definition} for n, m in METRICS.items() if n in used}
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self))), "definitions": definitions}


def bench(
    contenders: Sequence[Contender],
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    threads: int,
    progress: Progress | None = None,
    warmup: int = WARMUP,
    seed: int = 0,
    device: str = "cpu",
) -> BenchResult:
    """Measure the contenders in turn, A B A B; the first one is the reference of all ratios.

    `progress` is called with trials done, trials in all, and what comes next. Raises InputError for settings or
    folders that cannot be measured (before any process starts, where the folder alone tells), RunError when a
    worker dies.
    """
    settings = Settings(prompt_tokens, new_tokens, batch, repeats, warmup, threads, seed, device)
    _check(contenders, settings)
    say = progress or (lambda _done, _total, _what: None)
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(c.name, threads=threads)) for c in contenders]
        for worker in workers:
            worker.wait_ready()
        facts = [_load(worker, c, settings) for worker, c in zip(workers, contenders, strict=True)]
        trials = _trials(workers, settings, say)
        memory = [worker.ask("memory") for worker in workers]
    results = tuple(_result(c, f, t, m, settings) for c, f, t, m in zip(contenders, facts, trials, memory, strict=True))
    reference, *others = results
    ratios = [
        ratio
        for other in others
        for ratio in compare_all(reference.metrics, other.metrics, names=(reference.name, other.name), seed=seed)
    ]
    return BenchResult(settings, results, tuple(ratios), _versions())


def _check(contenders: Sequence[Contender], settings: Settings) -> None:
    if not contenders or len({c.name for c in contenders}) != len(contenders):
        raise InputError("A benchmark needs at least one contender, each with a name of its own.")
    least = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "repeats": 1, "threads": 1, "warmup": 0}
    for name, low in least.items():
        if getattr(settings, name) < low:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is {getattr(settings, name)}.", hint=f"It must be at least {low}.")
    for contender in contenders:
        _check_folder(contender, settings)


def _check_folder(contender: Contender, settings: Settings) -> None:
    file = contender.path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{contender.path} has no config.json.", hint="Give a Hugging Face model folder.")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError:
        raise CheckpointError(f"{file} is not JSON.", hint="Give a Hugging Face model folder.") from None
    if config.get("auto_map") and not contender.trust_remote_code:
        raise InputError(f"{contender.path} ships its own model code.", hint="Allow it with --trust-remote-code.")
    limit = config.get("max_position_embeddings")
    wanted = settings.prompt_tokens + settings.new_tokens
    if isinstance(limit, int) and wanted > limit:
        raise InputError(
            f"{settings.prompt_tokens} + {settings.new_tokens} tokens exceed {contender.name}'s {limit} positions.",
            hint="Lower --prompt-tokens or --new-tokens.",
        )


def _load(worker: Worker, contender: Contender, settings: Settings) -> dict[str, Any]:
    return worker.ask(
        "load",
        path=str(contender.path),
        trust_remote_code=contender.trust_remote_code,
        threads=settings.threads,
        seed=settings.seed,
        device=settings.device,
    )


def _trials(workers: Sequence[Worker], settings: Settings, say: Progress) -> list[list[dict[str, Any]]]:
    """Per worker the replies of its trials, warm-up first; the workers take turns."""
    rounds = settings.warmup + settings.repeats
    shape = {name: getattr(settings, name) for name in ("prompt_tokens", "new_tokens", "batch")}
    trials: list[list[dict[str, Any]]] = [[] for _ in workers]
    for number in range(rounds):
        for index, worker in enumerate(workers):
            kind = "warm-up" if number < settings.warmup else "trial"
            say(number * len(workers) + index, rounds * len(workers), f"{kind} of {worker.name}")
            trials[index].append(worker.ask("trial", **shape))
    say(rounds * len(workers), rounds * len(workers), "done")
    return trials


def _result(
    contender: Contender,
    facts: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    memory: Mapping[str, Any],
    settings: Settings,
) -> ContenderResult:
    samples: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        for name, value in _timed(trial, settings):
            samples[name].append(value)
    metrics = {name: summarize(values[settings.warmup :]) for name, values in samples.items()}
    once = dict(facts) | dict(memory) | {"kv_bytes_per_token": trials[-1]["kv_bytes_per_token"]}
    metrics |= {name: summarize([once[name]]) for name in METRICS if once.get(name) is not None}
    return ContenderResult(
        name=contender.name,
        path=str(contender.path),
        architecture=facts["architecture"],
        dtype=facts["dtype"],
        metrics={name: metrics[name] for name in METRICS if name in metrics},
        warmup={name: tuple(values[: settings.warmup]) for name, values in samples.items()},
    )


def _timed(trial: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, float]]:
    prefill, steps = trial["prefill_seconds"], trial["decode_seconds"]
    inter_token = sum(steps) / len(steps)
    yield "prefill_seconds", prefill
    yield "prefill_tokens_per_second", settings.batch * settings.prompt_tokens / prefill
    yield "inter_token_seconds", inter_token
    yield "decode_tokens_per_second", settings.batch / inter_token


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("torch", "transformers")}
