"""nested.json: the order of removal, and of every member its counts, its sizes and what it costs.

It lies in the model folder, where the class that switches sizes reads it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sspcompile.errors import ArtifactError
from sspcompile.intervals import Estimate
from sspcompile.nested.order import Order, Prefix
from sspcompile.request.amounts import largest_within
from sspcompile.workspace import MODEL, NESTED

SCHEMA_VERSION = 2
MEMBERS = "members"
MASKS = "masks"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Loss(_Section):
    """Divergence from the dense model on texts that decided nothing: KL in nats per token, agreement as a share."""

    mean_kl: Estimate
    top1_agreement: Estimate


class Member(_Section):
    """One size. `share`: of all parameters, as it was asked for; `size`: what came of it. `groups` and `widths`: how
    many key/value groups and channels of the order every layer keeps. `repair`: the file of what its refitted matrices
    differ by from the prefixes, in the model folder, with its `sha256`, None without any; `repair_bytes` in it, beside
    `weight_bytes` of the member cut out. `flops_per_token` and `flops_per_position` as in plan.json, of the member cut
    out; `added_flops_per_token`: what its differences take beside the prefixes, where sizes are switched.
    """

    share: float
    size: float
    groups: tuple[int, ...]
    widths: tuple[int, ...]
    parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    flops_per_token: int
    flops_per_position: int
    added_flops_per_token: int
    repair: str | None
    sha256: str | None
    repair_bytes: int
    refitted: tuple[str, ...]
    own: Loss
    off: Loss | None

    @property
    def flops_in_place(self) -> int:
        """Of a token, where sizes are switched."""
        return self.flops_per_token + self.added_flops_per_token

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.groups, self.widths)

    @property
    def mask(self) -> str:
        """Its mask of the dense model, in the artifact's folder."""
        return f"{MASKS}/{self.share:g}.json"


class Part(_Section):
    """A matrix of every layer of which a member has a prefix: `axis` 0 for rows, 1 for columns, counted in `unit`."""

    module: str
    axis: Literal[0, 1]
    unit: Literal["query", "group", "channel"]


class Nested(_Section):
    """`groups` and `channels` as in `Order`; `members` from the whole model down. A group has `group_size` query heads
    of `head_dim` rows each.
    """

    schema_version: Literal[2] = 2
    head_dim: int
    group_size: int
    parts: tuple[Part, ...]
    groups: tuple[tuple[int, ...], ...]
    channels: tuple[tuple[int, ...], ...] | None
    members: tuple[Member, ...]

    @property
    def order(self) -> Order:
        return Order(self.groups, self.channels)

    def member(self, share: float) -> Member:
        """The largest member of at most this share of the parameters. Raises what `largest_within` raises."""
        found = largest_within([one.share for one in self.members], share, "the nested artifact")
        return next(one for one in self.members if one.share == found)


def dump_nested(nested: Nested) -> str:
    """One line for each layer and member, so that a person can read it."""
    value, lines = nested.model_dump(mode="json"), []
    for key, item in value.items():
        if key in ("parts", "groups", "channels", "members") and item is not None:
            rows = ",\n  ".join(json.dumps(row) for row in item)
            lines.append(f' "{key}": [\n  {rows}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(item)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_nested(artifact: Path) -> Nested:
    """Of the folder of a nested artifact. Raises ArtifactError for anything else, or what is damaged."""
    path = artifact / MODEL / NESTED
    try:
        _demand_version(path)
        nested = Nested.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{artifact} is not a nested artifact: it has no {MODEL}/{NESTED}.",
            hint="Name a folder that `sspcompile build --nested` wrote.",
        ) from error
    except ValidationError as error:
        raise ArtifactError(f"{path} is damaged.", hint="Run `sspcompile build --nested` again.") from error
    if not _agrees(nested):
        raise ArtifactError(f"{path} contradicts itself.", hint="Run `sspcompile build --nested` again.")
    return nested


def _demand_version(path: Path) -> None:
    """Raise ArtifactError for an index of another schema. What is not JSON at all is left to the reader."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return
    version = found.get("schema_version") if isinstance(found, dict) else SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} is of schema version {version!r:.20}; this version reads {SCHEMA_VERSION}.",
            hint="Run `sspcompile build --nested` again.",
        )


def _agrees(nested: Nested) -> bool:
    """Whether orders are permutations, members fall from the whole, and files are those that a build writes."""
    rows = (*nested.groups, *(nested.channels or ()))
    shares = [one.share for one in nested.members]
    lengths = {len(nested.groups), *(len(counts) for one in nested.members for counts in (one.groups, one.widths))}
    files = all(one.repair in (None, repair_file(one.share)) for one in nested.members)
    return (
        all(sorted(row) == list(range(len(row))) for row in rows)
        and bool(shares)
        and shares == sorted(set(shares), reverse=True)
        and len(lengths) == 1
        and files
    )


def repair_file(share: float) -> str:
    """Where a member's refitted matrices lie in the model folder; also the guard against a path out of it."""
    return f"{MEMBERS}/{share:g}/model.safetensors"
