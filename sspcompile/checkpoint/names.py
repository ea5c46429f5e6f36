"""The names that tensors have on disk, and the ones that every version of transformers reads: from the first to those.

Checkpoints come without the `model.` that the class with a head puts in front of its decoder (saved from the decoder
alone), below a longer prefix (saved from inside a larger model or a wrapper), and with all experts of a layer in one
tensor, as transformers 5 holds them in memory. All of that is a matter of names and places: no value is touched.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from sspcompile.checkpoint.headers import TensorInfo
from sspcompile.checkpoint.tensors import (
    DECODER,
    EMBEDDING,
    EXPERTS_DOWN,
    EXPERTS_GATE_UP,
    LM_HEAD,
    SPARSE_MLP,
    linear_shape,
)
from sspcompile.errors import CheckpointError
from sspcompile.families import Experts, Geometry

# Every family of the table has this one; what stands in front of it is the prefix.
ANCHOR = "layers.0.self_attn.o_proj.weight"
LAYER = re.escape(DECODER) + r"layers\.(\d+)\."
# What transformers adds or takes away by itself while it loads.
FOUND_ANYWAY = (DECODER, "", DECODER + DECODER)


def canonical(table: Mapping[str, TensorInfo], geometry: Geometry) -> dict[str, TensorInfo]:
    """The tensors of a folder under the names of the family table, in the order of `table`.

    Stacked experts become the parts of their tensor, which are runs of neighbouring bytes. Names that mean nothing
    here stay as they are. Raises CheckpointError when two tensors are the same one, and for a stack of another shape
    than the configuration's.
    """
    prefix = stored_prefix(table)
    stored_as: dict[str, str] = {}
    found: dict[str, TensorInfo] = {}
    for stored, info in table.items():
        for name, part in _parts(_plain_name(stored, prefix), stored, info, geometry):
            if name in found:
                raise CheckpointError(
                    f"{stored_as[name]} and {stored} are both {name}.", hint="Leave one of them in the weights."
                )
            found[name], stored_as[name] = part, stored
    if geometry.tied and EMBEDDING not in found and LM_HEAD in found:
        # One matrix under either name; the decoder's own class needs it as the embedding.
        found = {EMBEDDING if name == LM_HEAD else name: info for name, info in found.items()}
    return found


def stored_prefix(names: Collection[str]) -> str:
    """What stands in front of the decoder's names on disk; the usual "model." where that cannot be told."""
    prefixes = {name.removesuffix(ANCHOR) for name in names if name.endswith(ANCHOR)}
    prefixes = {prefix for prefix in prefixes if not prefix or prefix.endswith(".")}
    if len(prefixes) > 1:  # a tower beside the language model
        prefixes = {prefix for prefix in prefixes if prefix + EMBEDDING.removeprefix(DECODER) in names}
    return prefixes.pop() if len(prefixes) == 1 else DECODER


def key_mapping(names: Collection[str]) -> dict[str, str]:
    """What transformers must be told to find these tensors: pattern -> replacement, as `from_pretrained` takes it.

    Empty where it finds them by itself.
    """
    prefix = stored_prefix(names)
    if prefix in FOUND_ANYWAY:
        return {}
    outer = [place for place in _outer(prefix) if place and place + LM_HEAD in names]
    return {f"^{re.escape(prefix)}": DECODER, **{f"^{re.escape(place + LM_HEAD)}": LM_HEAD for place in outer}}


def _outer(prefix: str) -> Iterator[str]:
    """The places around a decoder, where its head may stand: "a.b." -> "", "a.", "a.b."."""
    parts = prefix.split(".")[:-1]
    for count in range(len(parts) + 1):
        yield "".join(part + "." for part in parts[:count])


def _plain_name(stored: str, prefix: str) -> str:
    if stored.endswith(LM_HEAD) and stored.removesuffix(LM_HEAD) in _outer(prefix):
        return LM_HEAD
    return DECODER + stored.removeprefix(prefix) if stored.startswith(prefix) else stored


def _parts(name: str, stored: str, info: TensorInfo, g: Geometry) -> Iterable[tuple[str, TensorInfo]]:
    """(name, place) of what one stored tensor holds: itself, unless it is a stack of experts."""
    experts = g.family.experts
    layer = re.match(LAYER, name)
    if experts is None or layer is None or int(layer[1]) not in g.sparse:
        return [(name, info)]
    prefix, module = layer[0], experts.router.rpartition(".")[0] + "."
    rest = name.removeprefix(prefix)
    if rest.startswith(module):
        rest = SPARSE_MLP + rest.removeprefix(module)
    if rest == EXPERTS_GATE_UP:
        return _unstacked(prefix, experts, experts.gate_up, stored, info, g)
    if rest == EXPERTS_DOWN:
        return _unstacked(prefix, experts, (experts.down,), stored, info, g)
    if rest.startswith(SPARSE_MLP):
        rest = module + rest.removeprefix(SPARSE_MLP)
    return [(prefix + rest, info)]


def _unstacked(
    prefix: str, experts: Experts, parts: tuple[str, ...], stored: str, info: TensorInfo, g: Geometry
) -> Iterator[tuple[str, TensorInfo]]:
    """One expert behind the other, and in each its `parts` one above the other: [experts, parts * rows, columns]."""
    rows, columns = next(linear_shape(g, linear) for linear in experts.parts if linear.name == parts[0])
    wanted = (g.experts, len(parts) * rows, columns)
    if info.shape != wanted:
        raise CheckpointError(
            f"{stored} has shape {list(info.shape)}; config.json asks for {list(wanted)}.",
            hint="config.json and weights must be of the same model.",
        )
    for number in range(g.experts):
        for place, part in enumerate(parts):
            first = (number * len(parts) + place) * rows * columns
            yield f"{prefix}{experts.expert.format(number)}.{part}.weight", info.part(first, (rows, columns))
