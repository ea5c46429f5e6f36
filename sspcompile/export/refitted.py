"""Matrices that a build refitted for a rounding to come. They lie beside its model, which stays as it is; an
export to that precision rounds them in the place of the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sspcompile.checkpoint.headers import TensorInfo, read_header
from sspcompile.checkpoint.source import SINGLE_NAME
from sspcompile.checkpoint.writer import OutputTensor, content_of, write_checkpoint
from sspcompile.errors import ArtifactError
from sspcompile.slicing.plan import SlicePlan

FOLDER = "rounded"


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


def read_refitted(artifact: Path, precision: str, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The refitted matrices of a build for a precision, by name; nothing where it has none.

    Raises ArtifactError where they do not fit `tensors`, those of its model.
    """
    path = artifact / FOLDER / precision / SINGLE_NAME
    if not path.is_file():
        return {}
    found = read_header(path)
    for name, info in found.items():
        if name not in tensors or tensors[name].shape != info.shape:
            raise ArtifactError(f"{path} does not belong to the model beside it: {name}.", hint="Build it again.")
    return found
