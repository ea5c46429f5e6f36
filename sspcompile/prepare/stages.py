"""The stages of `prepare` that run the model. What a stage found is kept until the toolkit is finished.

An interrupted `prepare` so goes on where it stopped, inside of a stage at the batch where it was (`model/journal.py`).
Each file carries in its name the digest of everything that the stage was measured from; when any of it changes, the
stage is measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sspcompile.checkpoint.publish import write_atomically
from sspcompile.checkpoint.writer import pieces_of
from sspcompile.criteria import measuring
from sspcompile.criteria.table import of_key
from sspcompile.errors import ToolkitError
from sspcompile.model import capture, journal, parallel, text
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.journal import Journal
from sspcompile.model.text import TEXT_VERSION, Sentence
from sspcompile.progress import Steps

PASSES = "passes"
Arrays = Mapping[str, np.ndarray]


def beside(folder: Path) -> Path:
    """Where the stages of an unfinished toolkit lie."""
    return folder.with_name(f"{journal.PREFIX}{folder.name}")


class Stages:
    """Measures a model's stages, or reads what an earlier run measured in `folder`; without one nothing is kept.

    Under torchrun every process reads, the first one writes: all see the same files, because a stage is written only
    after every process has taken part in it.
    """

    def __init__(self, loaded: LoadedModel, folder: Path | None = None, *, every: float | None = None) -> None:
        self._loaded = loaded
        self._folder = folder
        self._continuations: tuple[list[object], Arrays] | None = None
        self._journal = Journal(folder / PASSES if folder is not None else None, every=every)
        self._identity = [*journal.identity_of(loaded), TEXT_VERSION]

    @property
    def layers(self) -> int:
        """How many the model has."""
        return self._loaded.geometry.layers

    def features(
        self,
        texts: Sequence[str],
        max_tokens: int,
        report: Steps,
        *,
        layers: Sequence[int] | None = None,
        bare: bool = False,
    ) -> np.ndarray:
        """As `model.capture.features`, [N, R, d]."""

        def measure() -> Arrays:
            return {"features": capture.features(self._loaded, texts, max_tokens, report, layers=layers, bare=bare)}

        inputs = [list(texts), max_tokens, None if layers is None else list(layers), bare]
        return self._stage("features", inputs, measure, report)["features"]

    def continued(self, prompts: Sequence[str], new_tokens: int, max_tokens: int, report: Steps) -> list[Sentence]:
        """As `model.text.continued`."""

        def measure() -> Arrays:
            found = text.continued(self._loaded, prompts, new_tokens, max_tokens, progress=report)
            return {
                "ids": np.array([token for item in found for token in item.ids]),
                "lengths": np.array([(len(item.ids), item.prompt) for item in found]),
            }

        inputs = [list(prompts), new_tokens, max_tokens]
        # Every score reads them.
        if self._continuations is None or self._continuations[0] != inputs:
            self._continuations = inputs, self._stage("continuations", inputs, measure, report)
        found = self._continuations[1]
        ends = np.cumsum(found["lengths"][:, 0])
        return [
            Sentence(tuple(found["ids"][end - length : end].tolist()), int(prompt))
            for end, (length, prompt) in zip(ends, found["lengths"], strict=True)
        ]

    def scored(
        self,
        key: str,
        texts: Sequence[Sentence],
        labels: np.ndarray,
        directions: np.ndarray | None,
        seed: int,
        report: Steps,
    ) -> measuring.Scores:
        """As `criteria.measuring.measure`, under the name by which scores are cached, see `of_key`."""
        chosen, granularity = of_key(key)

        def measure() -> Arrays:
            scores = measuring.measure(
                self._loaded,
                chosen.name,
                texts,
                labels=labels,
                directions=directions,
                seed=seed,
                granularity=granularity,
                progress=report,
            )
            return {"values": scores.values, "labels": scores.labels, "prompts": np.array([scores.prompts])}

        axes = None if directions is None else _digest(directions.tobytes())
        read = [[(item.ids, item.prompt) for item in texts], labels.tolist(), axes, seed]
        found = self._stage(key, read, measure, report)
        return measuring.Scores(found["values"], found["labels"], chosen.per, int(found["prompts"][0]))

    def finish(self) -> None:
        """The toolkit is written: what was kept on the way is not needed any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _stage(self, name: str, inputs: object, measure: Callable[[], Arrays], report: Steps) -> Arrays:
        if self._folder is None:
            return measure()
        digest = _digest(json.dumps([self._identity, name, inputs]).encode())
        path = self._folder / f"{name}-{digest}.safetensors"
        kept = _read(path)
        if kept is not None:
            report(1, 1)
            return kept
        with journal.keeping(self._journal):
            found = measure()
        if parallel.current().first:
            # Another run that prepared the same has finished, and has removed what neither of them needs.
            with contextlib.suppress(FileNotFoundError):
                self._folder.mkdir(parents=True, exist_ok=True)
                write_atomically(
                    path, pieces_of({key: np.ascontiguousarray(array) for key, array in found.items()}, {})
                )
        self._journal.clear(remove=parallel.current().first)
        return found


def _read(path: Path) -> Arrays | None:
    try:
        return load_file(path)
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        raise ToolkitError(f"{path} cannot be read: {error}.", hint=f"Remove {path.parent}.") from error


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
