"""The files of a nested model: the dense weights reordered, the repairs of its members, and a member cut out of them.

No model is loaded and torch is not needed: bytes move from file to file, as in any cut.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import read_header, read_words
from sspcompile.checkpoint.source import tensor_table
from sspcompile.errors import ArtifactError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.nested.index import Member, Nested, Part
from sspcompile.nested.low_rank import LowRank, Stored, from_file, refitted
from sspcompile.nested.order import Order, Prefix, columns, reordered, restored
from sspcompile.slicing.mask import HeadMask, whole_mask
from sspcompile.slicing.plan import SlicePlan, make_plan
from sspcompile.slicing.write import write_model
from sspcompile.workspace import MODEL

MODELING_FILE = "modeling_sspcompile_nested.py"
CLASS_PREFIX = "Nested"
O_PROJ = "self_attn.o_proj"


def parts_of(g: Geometry) -> tuple[Part, ...]:
    """The matrices of a layer that hold its units."""
    found = [Part(module="self_attn.q_proj", axis=0, unit="query"), Part(module=O_PROJ, axis=1, unit="query")]
    found += [Part(module=f"self_attn.{name}", axis=0, unit="group") for name in ("k_proj", "v_proj")]
    for linear in g.family.mlp if g.is_dense else ():
        found.append(Part(module=linear.name, axis=1 if linear.columns == "intermediate" else 0, unit="channel"))
    return tuple(found)


def write_whole(
    checkpoint: Checkpoint, order: Order, folder: Path, progress: Callable[[int], None] | None = None
) -> SlicePlan:
    """Write the dense model with its units in this order, and the class that switches sizes; gives its plan.

    The stock class loads it too: by itself, transformers takes ours only with trust_remote_code.
    """
    g = checkpoint.geometry
    plan = make_plan(checkpoint, whole_mask(g.layers, g.heads, g.kv_heads))
    write_model(checkpoint, reordered(plan, order), folder, progress=progress)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    name = f"{MODELING_FILE.removesuffix('.py')}.{CLASS_PREFIX}{g.family.architecture}"
    config["auto_map"] = {"AutoModelForCausalLM": name}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    shutil.copyfile(Path(__file__).with_name(MODELING_FILE), folder / MODELING_FILE)
    return plan


def dense_columns(g: Geometry, mask: HeadMask, order: Order, prefix: Prefix) -> dict[str, np.ndarray]:
    """Of o_proj and down_proj of every layer, by name: where the columns of a member, which are a prefix of the order,
    lie in that prefix, in the dense order.
    """
    found = {}
    for layer in range(g.layers):
        groups, channels = columns(mask, order, prefix, layer)
        span = g.group_size * g.head_dim
        heads = (np.array(groups, dtype=np.intp)[:, None] * span + np.arange(span)).ravel()
        for name, places in ((O_PROJ, heads), (g.family.down, np.array(channels, dtype=np.intp))):
            found[f"{layer_prefix(layer)}{name}.weight"] = places
    return found


def demand_class(model: Path) -> None:
    """Raise ArtifactError unless the class in a model folder is ours: no other code is ever run from an artifact."""
    path = model / MODELING_FILE
    if not path.is_file() or path.read_bytes() != Path(__file__).with_name(MODELING_FILE).read_bytes():
        raise ArtifactError(
            f"{path} is not the file that this version of sspcompile ships; it is not run.",
            hint="Build the artifact again.",
        )


def read_repair(artifact: Path, member: Member) -> dict[str, Stored]:
    """A member's repair by the names of matrices. Raises ArtifactError for another file than the one that was built."""
    if member.repair is None:
        return {}
    path = artifact / MODEL / member.repair
    if not path.is_file() or digest_of(path) != member.sha256:
        raise ArtifactError(
            f"{path} is missing, or is not the file that was built.", hint="Run `sspcompile build --nested` again."
        )
    found = read_header(path)
    return from_file(found, lambda name: read_words(found[name]))


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Refitted(Mapping[str, np.ndarray]):
    """What a member's own cut holds in place of the dense model's tensors: the prefix of the whole, and the repair.

    A matrix is put together when it is asked for, so no more than one has to be in memory.
    """

    def __init__(self, artifact: Path, nested: Nested, member: Member, mask: HeadMask, g: Geometry) -> None:
        self._stored = read_repair(artifact, member)
        self._whole = tensor_table(artifact / MODEL) if self._stored else {}
        self._columns = dense_columns(g, mask, nested.order, member.prefix) if self._stored else {}

    def __getitem__(self, name: str) -> np.ndarray:
        one, dense = self._stored[name], self._whole[name]
        kept = one.inputs.shape[1] if isinstance(one, LowRank) else one.shape[1]
        return refitted(read_words(dense)[:, :kept], one, dense.dtype)[:, self._columns[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def write_member(
    artifact: Path,
    nested: Nested,
    member: Member,
    mask: HeadMask,
    plan: SlicePlan,
    folder: Path,
    *,
    max_shard_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Refitted:
    """Write a member as the cut of its mask that a build of its own would write, units in the dense order.

    `plan` is of the mask. Gives the tensors that a repair computed. Raises ArtifactError for files that disagree.
    """
    source = Checkpoint(artifact / MODEL)
    replaced = Refitted(artifact, nested, member, mask, source.geometry)
    ordered = restored(plan, nested.order, member.prefix)
    write_model(source, ordered, folder, replaced=replaced, max_shard_bytes=max_shard_bytes, progress=progress)
    return replaced
