"""The export: file written, run by llama.cpp against transformers, described, published."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sspcompile
from sspcompile.checkpoint import Manifest, copy_companions, staged, write_manifest
from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.references import drop_references
from sspcompile.checkpoint.replacing import refuse_existing
from sspcompile.errors import InputError
from sspcompile.export.agreement import Agreement, Gate
from sspcompile.export.gguf.rounding import TYPES, Kind, kind_of
from sspcompile.export.gguf.source import Source, read_source
from sspcompile.export.gguf.vocabulary import Vocabulary, read_vocabulary
from sspcompile.export.gguf.write import write_gguf
from sspcompile.export.refitted import REFITTED
from sspcompile.families.gguf import GELU
from sspcompile.model.llama_session import MODEL, has_llama_cpp, quantise
from sspcompile.model.placement import ON_CPU, Placement
from sspcompile.progress import Progress, silent

CHECKS, MODELFILE = "check.json", "Modelfile"
EXACT = TYPES["f32"]
# Ollama allocates the cache of a whole context, and takes this many tokens by default.
OLLAMA_CONTEXT = 4096
GATE = Gate(1e-4, same_text=True)
# llama.cpp takes the values of GELU from a table in fp16: up to 5e-3 in the logits of tiny models of Gemma 3.
GATE_OF_TABLES = Gate(1e-2, same_text=True)


@dataclass(frozen=True)
class GgufExport:
    """What was published. `architecture`: the code of llama.cpp that loads it.

    `structure` is how the model in fp32 agrees with transformers, `agreement` how the file that was published does;
    both None where llama.cpp was not there to say. `refitted`: whether a build refitted it for this rounding; the
    model in transformers is not, so that they differ by more than rounding.
    """

    kind: Kind
    architecture: str
    context_length: int
    structure: Agreement | None = None
    agreement: Agreement | None = None
    refitted: bool = False


def demand_writable(kind: Kind) -> None:
    """Raise InputError for a type that only llama.cpp's quantiser writes, where llama.cpp is not installed."""
    if kind.here is None and not has_llama_cpp():
        here = ", ".join(name for name, other in TYPES.items() if other.here)
        raise InputError(
            f"{kind.name} is written by llama.cpp's own quantiser, and llama.cpp is not installed.",
            hint=f"pip install 'sspcompile[gguf]', or use one of {here}.",
        )


def export_gguf(
    model: Path,
    out: Path,
    *,
    kind: str | None,
    probes: list[list[int]],
    origin: Mapping[str, Any],
    card: Callable[[GgufExport], str],
    trust_remote_code: bool,
    refitted: Mapping[str, TensorInfo] | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    placement: Placement = ON_CPU,
) -> tuple[Manifest, GgufExport]:
    """Publish the model folder `model` for llama.cpp and Ollama, in the type `kind` (None: as it is stored).

    `probes`: token ids to run before publishing. `card` writes the model card, from what that run found. Where
    llama.cpp is not installed nothing is run, and the card says so. `refitted`: matrices that are written in the place
    of the model's own, with which it is compared sharply.

    Raises UnsupportedModelError for what llama.cpp does not hold and InputError for an unknown type or an `out` that
    is, holds or lies in `model`, before anything is written; ParityError when llama.cpp does not compute what
    transformers does.
    """
    refuse_existing(out, overwrite=overwrite, reads=(model,))
    source = read_source(model)
    wanted = kind_of(kind, source.dtypes)
    demand_writable(wanted)
    vocabulary = read_vocabulary(model, source.geometry.vocab, source.geometry.family)
    work = _Work(source, vocabulary, wanted, out.resolve().name, origin, progress, refitted or {})
    with staged(out, overwrite=overwrite, reads=(model,)) as folder:
        structure: Agreement | None = None
        agreement: Agreement | None = None
        if has_llama_cpp():
            structure, agreement = work.proven(folder, probes, placement, trust_remote_code=trust_remote_code)
        else:
            work.write(work.written, folder / MODEL, wanted)
        copy_companions(model, folder)
        drop_references(folder)
        config = json.dumps(source.carried, indent=2, sort_keys=True)
        (folder / "config.json").write_text(config + "\n", "utf-8")
        (folder / MODELFILE).write_text(_modelfile(source), "utf-8")
        architecture = source.model.form.architecture
        done = GgufExport(wanted, architecture, source.context, structure, agreement, refitted=bool(refitted))
        checks = {"proven": agreement is not None, "structure": _dict(structure), "agreement": _dict(agreement)}
        (folder / CHECKS).write_text(json.dumps(checks, indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(card(done), "utf-8")
        return write_manifest(folder, {**origin, **_described(done)}), done


def write_to_time(model: Path, folder: Path, *, kind: str | None, threads: int | None = None) -> None:
    """Write the model folder `model` into the new folder `folder`, as `export_gguf` does, to be timed: nothing is
    proven or published. Needs llama.cpp. Raises as `export_gguf` does.
    """
    source = read_source(model)
    if kind is None and len(source.dtypes) != 1:
        raise InputError(
            f"{model} is stored in {' and '.join(sorted(source.dtypes))}, and a GGUF has one type.",
            hint="Export it with `--format gguf --type f32`, say, and name the export.",
        )
    vocabulary = read_vocabulary(model, source.geometry.vocab, source.geometry.family)
    folder.mkdir(parents=True)
    _Work(source, vocabulary, kind_of(kind, source.dtypes), folder.name, {}, silent).unproven(folder, threads)
    (folder / "config.json").write_text(json.dumps(source.carried) + "\n", "utf-8")


def _dict(agreement: Agreement | None) -> dict[str, Any] | None:
    return None if agreement is None else asdict(agreement)


def _described(done: GgufExport) -> dict[str, Any]:
    """What the manifest says of the file."""
    return {
        "sspcompile": sspcompile.__version__,
        "format": "gguf",
        "type": done.kind.name,
        "architecture": done.architecture,
        "context_length": done.context_length,
        "proven": done.agreement is not None,
        **({REFITTED: True} if done.refitted else {}),
    }


@dataclass(frozen=True)
class _Work:
    """What is written: the `source`, with the `refitted` matrices in the place of its own."""

    source: Source
    vocabulary: Vocabulary
    kind: Kind
    name: str
    origin: Mapping[str, Any]
    progress: Progress
    refitted: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def written(self) -> Source:
        return self.source.with_tensors(self.refitted)

    def write(self, source: Source, path: Path, kind: Kind) -> None:
        write_gguf(source, self.vocabulary, path, kind, name=self.name, origin=self.origin, progress=self.progress)

    def finish(self, exact: Path, folder: Path, threads: int | None) -> None:
        """Write the file, where the type is rounded from the one in fp32, `exact`, which holds the source's own
        matrices.
        """
        if not self.kind.rounded:
            self.write(self.written, folder / MODEL, self.kind)
            return
        if self.refitted:
            self.write(self.written, exact, EXACT)
        quantise(exact, folder / MODEL, self.kind.file_type, threads=threads)

    def unproven(self, folder: Path, threads: int | None) -> None:
        """Write the file as a proven one is written, and run nothing."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            exact = Path(scratch) / MODEL
            if self.kind.rounded:
                self.write(self.source, exact, EXACT)
            self.finish(exact, folder, threads)

    def proven(
        self, folder: Path, probes: list[list[int]], placement: Placement, *, trust_remote_code: bool
    ) -> tuple[Agreement, Agreement]:
        """Write the file, round it where that is asked for, and compare: (the model in fp32, the file itself)."""
        from sspcompile.export.gguf.check import compare, demand_tokens, read_reference

        reference = read_reference(
            self.source.folder,
            probes,
            self.source.context,
            placement=placement,
            trust_remote_code=trust_remote_code,
            progress=self.progress,
        )
        gate = GATE_OF_TABLES if self.source.model.form.activation == GELU else GATE
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            exact = folder / MODEL if self.kind == EXACT else Path(scratch) / MODEL
            self.write(self.source, exact, EXACT)
            demand_tokens(exact, reference)
            structure = compare(exact, reference, gate, self.progress)
            if self.kind == EXACT:
                return structure, structure
            self.finish(exact, folder, placement.threads)
        return structure, compare(folder / MODEL, reference, None, self.progress)


def _modelfile(source: Source) -> str:
    """Ollama's description: it takes template, tokens and context length from the file."""
    return f"FROM ./{MODEL}\nPARAMETER num_ctx {min(source.context, OLLAMA_CONTEXT)}\n"
