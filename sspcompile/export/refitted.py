"""Matrices that a build refitted for a rounding to come. They lie beside its model, which stays as it is; an
export in that rounding takes them in the place of the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo, read_header
from sspcompile.checkpoint.source import SINGLE_NAME
from sspcompile.checkpoint.writer import OutputTensor, content_of, write_checkpoint
from sspcompile.errors import ArtifactError
from sspcompile.model.blocks import ROUNDINGS, Rounding
from sspcompile.slicing.plan import SlicePlan

FOLDER = "rounded"
# What the manifest of an export calls them.
REFITTED = "refitted_for_rounding"


@dataclass(frozen=True)
class Refit:
    """What a build refitted for a `precision`. `tensors`, by name, are those that an export takes: none of them where
    it rounds otherwise, or not at all.
    """

    precision: str
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def taken(self) -> bool:
        return bool(self.tensors)


def write_refitted(artifact: Path, precision: str, plan: SlicePlan, replaced: Mapping[str, np.ndarray]) -> None:
    """Write the refitted matrices, raw words by their names in the dense model, under their names in the cut."""
    folder = artifact / FOLDER / precision
    folder.mkdir(parents=True)
    tensors = []
    for name, source in plan.sources.items():
        if source in replaced:
            shape, dtype = plan.tensors[name]
            tensors.append(OutputTensor(name, dtype, shape, content_of(replaced[source])))
    write_checkpoint(folder, tensors)


def read_refit(artifact: Path, rounding: Rounding | None, tensors: Mapping[str, TensorInfo]) -> Refit | None:
    """What a build refitted, as far as an export of its model's `tensors` in a `rounding` takes it; None where it
    refitted nothing.

    Raises ArtifactError where what is taken does not fit the model.
    """
    precision = next((name for name in ROUNDINGS if (artifact / FOLDER / name / SINGLE_NAME).is_file()), None)
    if precision is None:
        return None
    if ROUNDINGS[precision] != rounding:
        return Refit(precision)
    path = artifact / FOLDER / precision / SINGLE_NAME
    found = read_header(path)
    for name, info in found.items():
        if name not in tensors or tensors[name].shape != info.shape:
            raise ArtifactError(f"{path} does not belong to the model beside it: {name}.", hint="Build it again.")
    return Refit(precision, found)
