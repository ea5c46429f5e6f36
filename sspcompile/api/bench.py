"""`bench`: artifacts and exports against their dense model, and the artifacts' reports brought up to date."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import sspcompile
from sspcompile.api.arguments import CutModel, Named, cut_model
from sspcompile.api.export import source_of, to_onnx
from sspcompile.bench.latency import BenchResult, Contender, Runtime, check, versions_of
from sspcompile.bench.latency import bench as measure
from sspcompile.bench.load import Load, Settings
from sspcompile.checkpoint.manifest import NAME as MANIFEST
from sspcompile.checkpoint.manifest import check_manifest, write_manifest
from sspcompile.checkpoint.publish import scratch, write_atomically
from sspcompile.errors import ArtifactError, InputError
from sspcompile.export.gguf.publish import write_to_time
from sspcompile.machine import usable_cores
from sspcompile.model.context import shortest_context
from sspcompile.model.dense import DenseModel
from sspcompile.model.llama_session import demand_llama_cpp, gguf_type
from sspcompile.model.onnx_session import demand_runtime
from sspcompile.model.placement import Placement, resolve
from sspcompile.progress import Progress, silent
from sspcompile.report.build import latency_section
from sspcompile.report.json import read_report
from sspcompile.report.model import Report
from sspcompile.report.write import write_report
from sspcompile.request.options import AUTO
from sspcompile.slicing.plan import plan_counts
from sspcompile.workspace import PLAN, REPORT, Workspace

SAMPLES = "bench.json"
DENSE = "dense"
RUNTIMES: tuple[Runtime, ...] = ("hf", "onnx", "gguf")
# They run on the processor here, whatever device there is.
ON_PROCESSOR: tuple[Runtime, ...] = ("onnx", "gguf")


# A quick look has short texts. Processes narrow the intervals most; a large model is loaded anew in each, so only a
# quick look takes many.
QUICK: Mapping[str, Any] = {"prompt_tokens": (64,), "new_tokens": 16, "repeats": 32, "sessions": 16}
FEWEST_NEW_TOKENS = 2


@dataclass(frozen=True)
class BenchRequest:
    """What is measured, complete. Lengths are those of texts in tokens, `memory` in bytes (None: all of the device).

    `stated` names what somebody asked for: that is measured as it was said, or refused. Other lengths are shortened to
    what the models have positions for.
    """

    runtimes: tuple[Runtime, ...] = ("hf",)
    batch: tuple[int, ...] = (1,)
    prompt_tokens: tuple[int, ...] = (512,)
    new_tokens: int = 64
    repeats: int = 24
    sessions: int = 8
    threads: int = field(default_factory=usable_cores)
    device: str = AUTO
    memory: int | None = None
    dtype: str = AUTO
    device_map: str | None = None
    stated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, *, quick: bool = False, **given: Any) -> BenchRequest:
        """What was `given` (None: nothing was said), the rest as usual, or as for a quick look."""
        said = {name: value for name, value in given.items() if value is not None}
        return cls(**{**(QUICK if quick else {}), **said}, stated=frozenset(said))

    def settings(self, positions: int | None, runtimes: Collection[Runtime] = ()) -> Settings:
        """Loads that fit models of so many positions; the report states what was used. `auto` is the CPU where ONNX
        Runtime or llama.cpp takes part. Raises InputError for a device that is not there, and with llama.cpp for any
        but the CPU, and for several texts at once."""
        if "gguf" in runtimes and max(self.batch) > 1:
            raise InputError("llama.cpp is measured with one text at a time.", hint="Give --batch 1.")
        new_tokens, prompts = self.new_tokens, self.prompt_tokens
        if positions is not None and "new_tokens" not in self.stated:
            new_tokens = max(FEWEST_NEW_TOKENS, min(new_tokens, positions // 2))
        if positions is not None and "prompt_tokens" not in self.stated:
            prompts = tuple(max(1, min(tokens, positions - new_tokens)) for tokens in prompts)
        sessions = min(self.sessions, self.repeats)
        device = _device(self.device, runtimes)
        return Settings(
            loads=tuple(Load(b, p, new_tokens) for b in self.batch for p in prompts),
            sessions=sessions,
            trials=-(-self.repeats // sessions),
            warmup=1,
            threads=self.threads,
            seed=0,
            device=device,
            memory=_memory_of(device) if self.memory is None else self.memory,
            dtype=self.dtype,
            device_map=self.device_map,
        )


def _device(asked: str, runtimes: Collection[Runtime]) -> str:
    if asked == "cpu" or (asked == AUTO and any(runtime in ON_PROCESSOR for runtime in runtimes)):
        return "cpu"
    if "gguf" in runtimes:
        raise InputError(
            f"llama.cpp is timed on the processor here, not on {asked}.",
            hint="Give --device cpu, or measure its server with `sspcompile bench --server`.",
        )
    return str(resolve(Placement(device=asked)).device)


def _memory_of(device: str) -> int:
    if not device.startswith("cuda"):
        return int(psutil.virtual_memory().total)
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


@dataclass(frozen=True)
class Benched:
    """The measurement, the artifacts whose reports hold it now, and the report to show: that of the only artifact, or
    one with nothing but the measurement.
    """

    result: BenchResult
    artifacts: tuple[Path, ...]
    report: Report


def bench(
    given: Sequence[str | None],
    request: BenchRequest,
    workspace: Workspace,
    progress: Progress = silent,
    *,
    against: str | None = None,
    model: str | None = None,
    fresh: bool = False,
) -> Benched:
    """Measure, write every sample to the artifacts' bench.json, and put the summary into their reports.

    `given` are artifacts, exports or model folders that were cut from one dense model, which is looked for at `model`
    where it was moved. `against` is what they are compared with: None or `dense` for that model, or another folder.
    An interrupted measurement goes on where it stopped unless `fresh`. Raises what `bench.latency.bench` raises, and
    ArtifactError for damaged files.
    """
    opened = partial(cut_model, dense=model, workspace=workspace, option="--model", command="bench")
    entries = [opened(one) for one in given]
    reference = None if against in (None, DENSE) else opened(against)
    every = [*entries, *([reference] if reference else [])]
    dense = _one_dense(every)
    runtimes = {runtime for entry in every for runtime in _runtimes(entry, request)}
    if "gguf" in runtimes:
        demand_llama_cpp()
    if "onnx" in runtimes:
        demand_runtime()
    models = [dense.checkpoint.path, *(entry.found.model for entry in every)]
    settings = request.settings(shortest_context(models), runtimes)
    # Graphs that only this measurement needs lie where weights can be linked.
    with scratch(workspace.artifacts, "bench") as place:
        kind = _type(entries, reference)
        own = [list(_of(entry, _name(entry, entries), request, place, kind)) for entry in entries]
        first = _reference(reference, dense, entries, request, place, kind)
        contenders = [*first, *(c for part in own for c in part)]
        check(contenders, settings)
        notes = _Notes(workspace, _key(contenders, every, dense, settings))
        result = measure(
            contenders,
            settings,
            progress=lambda _what, done, total: progress("measuring", done, total),
            done=[] if fresh else notes.read(),
            keep=notes.add,
        )
    artifacts = []
    for entry, part in zip(entries, own, strict=True):
        if entry.build is not None:
            _record(entry.build, result, {contender.name for contender in part})
            artifacts.append(entry.build)
    notes.forget()
    if len(artifacts) == len(entries) == 1:
        return Benched(result, tuple(artifacts), read_report(artifacts[0] / REPORT))
    title = f"{', '.join(entry.name for entry in entries)} against {contenders[0].name}"
    return Benched(result, tuple(artifacts), Report(title=title, model=dense.name, latency=latency_section(result)))


def _one_dense(entries: Sequence[CutModel]) -> DenseModel:
    first, *others = entries
    for other in others:
        if other.dense.fingerprint != first.dense.fingerprint:
            raise InputError(
                f"{first.name} and {other.name} were not cut from the same model.", hint="Measure them one by one."
            )
    return first.dense


def _name(entry: CutModel, entries: Sequence[CutModel]) -> str:
    """`sliced` for a single one; the folder's name, and its parents where names are shared."""
    if len(entries) == 1:
        return "sliced"
    alike = [other for other in entries if other.name == entry.name]
    return entry.name if len(alike) == 1 else str(entry.found.folder)


def _reference(
    reference: CutModel | None,
    dense: DenseModel,
    entries: Sequence[CutModel],
    request: BenchRequest,
    place: Path,
    kind: str | None,
) -> Iterator[Contender]:
    if reference is not None:
        yield from _of(reference, reference.name, request, place, kind)
        return
    runtimes = dict.fromkeys(runtime for entry in entries for runtime in _runtimes(entry, request))
    sizes = plan_counts(dense.checkpoint, 1.0, "per-layer").dense
    flops = (sizes.flops_per_token, sizes.flops_per_position)
    for runtime in runtimes:
        path = dense.checkpoint.path
        if runtime == "onnx":
            path = place / DENSE
            _as_onnx(Named("model", dense.checkpoint.path, dense.checkpoint.path), path)
        if runtime == "gguf":
            path = place / f"{DENSE}-gguf"
            write_to_time(dense.checkpoint.path, path, kind=kind, threads=request.threads)
        yield Contender(_labelled(DENSE, runtime, len(runtimes)), path, runtime, flops=flops)


def _of(entry: CutModel, name: str, request: BenchRequest, place: Path, kind: str | None) -> Iterator[Contender]:
    """`kind`: the type of a GGUF that is written for the occasion."""
    runtimes = _runtimes(entry, request)
    flops = None
    if (entry.found.folder / PLAN).is_file():
        plan = json.loads((entry.found.folder / PLAN).read_text("utf-8"))
        flops = (int(plan["flops_per_token"]["sliced"]), int(plan["flops_per_position"]["sliced"]))
    for runtime in runtimes:
        path = entry.found.model
        if runtime == "onnx" and not entry.found.onnx:
            path = place / hashlib.sha256(name.encode()).hexdigest()[:8]
            _as_onnx(entry.found, path)
        if runtime == "gguf" and not entry.found.gguf:
            path = place / f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-gguf"
            write_to_time(entry.found.model, path, kind=kind, threads=request.threads)
        yield Contender(_labelled(name, runtime, len(runtimes)), path, runtime, entry.found.custom_code, flops)


def _runtimes(entry: CutModel, request: BenchRequest) -> tuple[Runtime, ...]:
    return ("onnx",) if entry.found.onnx else ("gguf",) if entry.found.gguf else request.runtimes


def _type(entries: Sequence[CutModel], reference: CutModel | None) -> str | None:
    """The type in which models are written for llama.cpp: that of the GGUF exports among the entries, or else of the
    reference; None: as they are stored.

    Raises InputError where they differ.
    """
    found = {gguf_type(entry.found.model): entry.name for entry in entries if entry.found.gguf}
    if len(found) > 1:
        raise InputError(
            f"{' and '.join(found.values())} are GGUF exports of different types.",
            hint="Measure them one by one, or name one of them with --against.",
        )
    if not found and reference is not None and reference.found.gguf:
        return gguf_type(reference.found.model)
    return next(iter(found), None)


def _labelled(name: str, runtime: Runtime, count: int) -> str:
    return name if runtime == "hf" and count == 1 else f"{name}, {runtime}"


def _as_onnx(found: Named, out: Path) -> None:
    from sspcompile.export.onnx import PRECISIONS, Blocks

    to_onnx(source_of(found), out, PRECISIONS["fp32"], blocks=Blocks(), link=True)


def _key(
    contenders: Sequence[Contender], entries: Sequence[CutModel], dense: DenseModel, settings: Settings
) -> dict[str, Any]:
    """What must be the same for a measurement to go on: inputs, settings, machine, versions."""
    marks = {str(entry.found.folder): _mark(entry.found.folder) for entry in entries}
    return {
        "contenders": [[c.name, c.runtime] for c in contenders],
        "inputs": marks,
        "dense": dense.fingerprint,
        "settings": asdict(settings),
        "machine": [platform.node(), platform.machine()],
        "versions": versions_of(contenders) | {"sspcompile": sspcompile.__version__},
    }


def _mark(folder: Path) -> str:
    """Of the manifest, or of names, sizes and times where there is none. The measurement's own traces do not count."""
    if (folder / MANIFEST).is_file():
        manifest = check_manifest(folder)
        files: Mapping[str, Any] = {n: e for n, e in manifest.files.items() if not n.startswith((SAMPLES, "report."))}
    else:
        files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


class _Notes:
    """Finished sessions of a measurement that may be interrupted, in one file of the artifacts folder."""

    def __init__(self, workspace: Workspace, key: Mapping[str, Any]) -> None:
        self._key = json.loads(json.dumps(key))
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()[:16]
        self._path = workspace.artifacts / f".bench-{digest}.json"
        self._sessions: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        try:
            found = json.loads(self._path.read_text("utf-8"))
        except FileNotFoundError:
            return []
        except ValueError as error:
            raise ArtifactError(f"{self._path} is damaged.", hint="Remove it, or give --fresh.") from error
        self._sessions = found["sessions"] if found["key"] == self._key else []
        return list(self._sessions)

    def add(self, session: dict[str, Any]) -> None:
        self._sessions.append(session)
        write_atomically(self._path, json.dumps({"key": self._key, "sessions": self._sessions}) + "\n")

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


def _record(folder: Path, result: BenchResult, own: Collection[str]) -> None:
    # The manifest is written anew at the end: without this check a damaged file would be blessed there.
    manifest = check_manifest(folder)
    write_atomically(folder / SAMPLES, json.dumps(result.to_json(), indent=1) + "\n")
    report = read_report(folder / REPORT)
    write_report(report.model_copy(update={"latency": latency_section(result, own)}), folder)
    write_manifest(folder, manifest.origin)
