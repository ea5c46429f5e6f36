"""The benchmark: contenders in processes of their own, trials in turn, raw samples kept."""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sspcompile.bench.capacity import Capacity, capacity
from sspcompile.bench.load import Load, Settings
from sspcompile.bench.metrics import METRICS
from sspcompile.bench.process import Worker
from sspcompile.bench.ratios import Ratio, compare_all
from sspcompile.bench.roofline import Prediction, Roofline, predict, roofline
from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.errors import InputError
from sspcompile.intervals import Summary, summarize
from sspcompile.machine import free_memory
from sspcompile.model.context import context_of
from sspcompile.progress import Progress, silent

SCHEMA_VERSION = 2
# What the bandwidth is measured on is at most this large; beyond, no cache of any machine plays a part.
LARGEST_READ = 1 << 30
WEIGHT_FILES = (".safetensors", ".onnx", ".data", ".gguf")

Runtime = Literal["hf", "onnx", "gguf"]
# Everything that one session measured: contender name -> facts, trials by load, memory; and the bandwidth.
Session = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A folder and what runs it: a Hugging Face model folder in transformers, an ONNX export in ONNX Runtime, or a GGUF
    export in llama.cpp.

    `trust_remote_code` lets it run the code that it ships. `flops`: operations for one token, and what each position
    of its context adds; None when they are not known.
    """

    name: str
    path: Path
    runtime: Runtime = "hf"
    trust_remote_code: bool = False
    flops: tuple[int, int] | None = None


@dataclass(frozen=True)
class LoadResult:
    """Metrics of one contender under one load. `warmup` holds the discarded samples."""

    load: Load
    metrics: Mapping[str, Summary]
    warmup: Mapping[str, tuple[float, ...]]
    roofline: Roofline


@dataclass(frozen=True)
class ContenderResult:
    """`metrics` are those of the process and of the model. Samples lie session after session."""

    name: str
    path: str
    runtime: Runtime
    architecture: str
    dtype: str
    metrics: Mapping[str, Summary]
    loads: tuple[LoadResult, ...]


@dataclass(frozen=True)
class BenchResult:
    """`ratios` and `predictions` compare pairs of contenders: the first of them, or of a runtime, with the others."""

    settings: Settings
    contenders: tuple[ContenderResult, ...]
    ratios: tuple[Ratio, ...]
    predictions: tuple[Prediction, ...]
    capacities: tuple[Capacity, ...]
    bandwidth: Summary
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain values only; with the definition and unit of every metric that occurs."""
        own = {name for c in self.contenders for name in c.metrics}
        used = own | {name for c in self.contenders for load in c.loads for name in load.metrics}
        definitions = {n: {"unit": m.unit, "definition": m.definition} for n, m in METRICS.items() if n in used}
        return {"schema_version": SCHEMA_VERSION, **json.loads(json.dumps(asdict(self))), "definitions": definitions}


def bench(
    contenders: Sequence[Contender],
    settings: Settings,
    *,
    progress: Progress = silent,
    done: Sequence[Session] = (),
    keep: Callable[[Session], None] = lambda _: None,
) -> BenchResult:
    """Measure the contenders in turn, A B A B, B A B A; the first one is the reference of all others.

    `progress` hears what comes next, trials done, and trials in all. `done` are sessions of an earlier run
    with the same contenders and settings, `keep` gets each new one. Raises InputError for settings or folders that
    cannot be measured (before any process starts, where the folder alone tells), RunError when a worker dies.
    """
    check(contenders, settings)
    sessions = list(done[: settings.sessions])
    if len(sessions) < settings.sessions:
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(Worker(c.name, c.runtime, threads=settings.threads)) for c in contenders]
            for worker in workers:
                worker.wait_ready()
            while len(sessions) < settings.sessions:
                sessions.append(_session(workers, contenders, settings, len(sessions), progress))
                keep(sessions[-1])
    return _result(contenders, settings, sessions)


def check(contenders: Sequence[Contender], settings: Settings) -> None:
    """Raises InputError or CheckpointError for what cannot be measured."""
    if not contenders or len({c.name for c in contenders}) != len(contenders):
        raise InputError("A benchmark needs at least one contender, each with a name of its own.")
    settings.check()
    for contender in contenders:
        _check_folder(contender, settings)


def _check_folder(contender: Contender, settings: Settings) -> None:
    config = read_json(contender.path / "config.json")
    read_generation(contender.path)
    # Other code that a folder names is not run: the stock class of its model_type loads it.
    if contender.runtime == "hf" and config.get("per_layer_config") and not contender.trust_remote_code:
        raise InputError(f"{contender.path} is loaded by the class in it.", hint="Name the artifact, or its export.")
    limit = context_of(contender.path)
    for load in settings.loads:
        if limit is not None and load.positions > limit:
            raise InputError(
                f"{load.prompt_tokens} + {load.new_tokens} tokens exceed {contender.name}'s {limit} positions.",
                hint="Lower --prompt-tokens or --new-tokens.",
            )


def _session(
    workers: Sequence[Worker], contenders: Sequence[Contender], settings: Settings, number: int, say: Progress
) -> Session:
    """All loads of all contenders, each in a fresh process; the order is turned from session to session."""
    order = list(zip(workers, contenders, strict=True))
    if number % 2:
        order.reverse()
    total = len(settings.loads) * (settings.warmup + settings.trials) * len(order)
    ticks = itertools.count(number * total)
    found: Session = {}
    for group in [order] if fit_together(contenders, settings.device) else [[one] for one in order]:
        found |= _group(group, settings, lambda what: say(what, next(ticks), settings.sessions * total))
    meter = next((w for w, c in order if c.runtime == "hf"), order[0][0])
    size = min(LARGEST_READ, int(_bytes_per_step(contenders[0], found[contenders[0].name], settings.loads[0])))
    with meter.session():
        read = meter.ask("bandwidth", size=size, threads=settings.threads, device=settings.device)
    say("done", (number + 1) * total, settings.sessions * total)
    return found | {"bandwidth": read["bytes_per_second"]}


def _group(
    group: Sequence[tuple[Worker, Contender]], settings: Settings, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Contenders that are in memory at once take turns, trial by trial."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        for worker, contender in group:
            stack.enter_context(worker.session())
            found[contender.name] = {"facts": _load(worker, contender, settings), "trials": {}}
        for load in settings.loads:
            for trial in range(settings.warmup + settings.trials):
                for worker, contender in group:
                    say(f"{'warm-up' if trial < settings.warmup else 'trial'} of {contender.name}")
                    trials = found[contender.name]["trials"].setdefault(load.label, [])
                    trials.append(worker.ask("trial", **asdict(load)))
        for worker, contender in group:
            found[contender.name]["memory"] = worker.ask("memory")
    return found


def fit_together(contenders: Sequence[Contender], device: str) -> bool:
    """Whether all contenders may be in memory at once: half of what is free must hold their weights.

    A device is given to one at a time: what is free there is not known before it is used.
    """
    weights = sum(path.stat().st_size for c in contenders for path in c.path.iterdir() if path.suffix in WEIGHT_FILES)
    return device == "cpu" and weights < free_memory() / 2


def _load(worker: Worker, contender: Contender, settings: Settings) -> dict[str, Any]:
    return worker.ask(
        "load",
        path=str(contender.path),
        trust_remote_code=contender.trust_remote_code,
        threads=settings.threads,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
        device_map=settings.device_map,
        positions=max(load.positions for load in settings.loads),
    )


def _result(contenders: Sequence[Contender], settings: Settings, sessions: Sequence[Session]) -> BenchResult:
    bandwidth = summarize([session["bandwidth"] for session in sessions])
    results = tuple(
        _contender(contender, [session[contender.name] for session in sessions], settings, bandwidth.median)
        for contender in contenders
    )
    pairs = [pair for other in results[1:] for pair in _pairs(results, other)]
    ratios = [ratio for pair in pairs for ratio in _ratios(*pair, settings.sessions)]
    predictions = [found for pair in pairs for found in _predictions(*pair, ratios)]
    fits = tuple(_capacity(result, settings) for result in results)
    return BenchResult(settings, results, tuple(ratios), tuple(predictions), fits, bandwidth, versions_of(contenders))


def _capacity(result: ContenderResult, settings: Settings) -> Capacity:
    return capacity(
        result.name,
        memory=settings.memory,
        weight_bytes=result.metrics["weight_bytes"].median,
        kv_bytes_per_token=result.metrics["kv_bytes_per_token"].median,
        tokens=settings.loads[-1].positions,
        positions=context_of(Path(result.path)),
    )


def _pairs(
    results: Sequence[ContenderResult], other: ContenderResult
) -> Iterator[tuple[ContenderResult, ContenderResult]]:
    """With the first of all, and with the first of its own runtime."""
    first = next(result for result in results if result.runtime == other.runtime)
    for reference in dict.fromkeys((results[0].name, first.name)):
        if reference != other.name:
            yield next(result for result in results if result.name == reference), other


def _ratios(reference: ContenderResult, other: ContenderResult, sessions: int) -> Iterator[Ratio]:
    names = (reference.name, other.name)
    for top, bottom in zip(reference.loads, other.loads, strict=True):
        yield from compare_all(top.metrics, bottom.metrics, sessions=sessions, names=names, load=top.load.label)
    yield from compare_all(reference.metrics, other.metrics, sessions=sessions, names=names)


def _predictions(reference: ContenderResult, other: ContenderResult, ratios: Sequence[Ratio]) -> Iterator[Prediction]:
    """What the bytes predict for decoding, beside what was measured, for every load of a pair."""
    found = {(r.reference, r.contender, r.load): r for r in ratios if r.metric == "inter_token_seconds"}
    for top, bottom in zip(reference.loads, other.loads, strict=True):
        ratio = found.get((reference.name, other.name, top.load.label))
        if ratio:
            yield predict(top.roofline, bottom.roofline, ratio)


def _contender(
    contender: Contender, parts: Sequence[Mapping[str, Any]], settings: Settings, bandwidth: float
) -> ContenderResult:
    facts = [part["facts"] | part["memory"] for part in parts]
    last = parts[0]["trials"][settings.loads[0].label][-1]
    once = facts[0] | {"kv_bytes_per_token": last["kv_bytes_per_token"]}
    metrics = {}
    for name, metric in METRICS.items():
        values = [once.get(name)] if metric.exact else [fact.get(name) for fact in facts]
        if metric.scope != "load" and values[0] is not None:
            metrics[name] = summarize(values)
    loads = tuple(_under(load, contender, parts, settings, bandwidth) for load in settings.loads)
    return ContenderResult(
        contender.name, str(contender.path), contender.runtime, once["architecture"], once["dtype"], metrics, loads
    )


def _under(
    load: Load, contender: Contender, parts: Sequence[Mapping[str, Any]], settings: Settings, bandwidth: float
) -> LoadResult:
    samples: dict[str, list[float]] = defaultdict(list)
    warmup: dict[str, list[float]] = defaultdict(list)
    for part in parts:
        for number, trial in enumerate(part["trials"][load.label]):
            for name, value in _timed(trial, load):
                (warmup if number < settings.warmup else samples)[name].append(value)
    metrics = {name: summarize(samples[name]) for name in METRICS if name in samples}
    flops = None if contender.flops is None else contender.flops[0] + load.mean_context * contender.flops[1]
    step = _bytes_per_step(contender, parts[0], load)
    line = roofline(step, flops, bandwidth, metrics["inter_token_seconds"].median)
    return LoadResult(load, metrics, {name: tuple(values) for name, values in warmup.items()}, line)


def _bytes_per_step(contender: Contender, part: Mapping[str, Any], load: Load) -> float:
    """What a decode step of the whole batch reads at the mean context: the matrices once, every sequence's cache.

    Of a mixture of experts a token visits a few, which its operations tell.
    """
    facts = part["facts"]
    weights = facts["step_weight_bytes"]
    if contender.runtime == "hf" and contender.flops is not None:
        weights = contender.flops[0] / 2 * facts["weight_bytes"] / facts["parameters"]
    kv = part["trials"][load.label][-1]["kv_bytes_per_token"]
    return weights + load.batch * load.mean_context * kv


def _timed(trial: Mapping[str, Any], load: Load) -> Iterator[tuple[str, float]]:
    prefill, steps = trial["prefill_seconds"], trial["decode_seconds"]
    inter_token = sum(steps) / len(steps)
    yield "prefill_seconds", prefill
    yield "prefill_tokens_per_second", load.batch * load.prompt_tokens / prefill
    yield "inter_token_seconds", inter_token
    yield "inter_token_p50_seconds", float(np.percentile(steps, 50))
    yield "inter_token_p90_seconds", float(np.percentile(steps, 90))
    yield "decode_tokens_per_second", load.batch / inter_token


def versions_of(contenders: Sequence[Contender]) -> dict[str, str]:
    """Of Python, and of the packages that run the contenders."""
    used = {"hf": ("torch", "transformers"), "onnx": ("onnxruntime",), "gguf": ("llama-cpp-python",)}
    names = [name for runtime in dict.fromkeys(c.runtime for c in contenders) for name in used[runtime]]
    return {"python": platform.python_version()} | {name: _version(name) for name in names}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # onnxruntime-gpu is the same module under another name
        return metadata.version(f"{package}-gpu")
