"""The Toolkit: what `prepare` learns once per model, and how it is saved, opened and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sspcompile.checkpoint.publish import staged
from sspcompile.errors import ToolkitError
from sspcompile.prepare.recogniser import Recogniser

SCHEMA_VERSION = 5

TENSORS_FILE = "toolkit.safetensors"
DESCRIPTION_FILE = "toolkit.json"
IMPORTANCE_PREFIX = "importance."
SPREAD_PREFIX = "spread."
RECOGNISER_PREFIX = "recogniser."
DIRECTIONS = "directions"
PREPARE_AGAIN = "Run `sspcompile prepare` again for this model."


@dataclass(frozen=True)
class Toolkit:
    """Everything that compiling a scenario needs besides the model itself. Arrays are float32 unless said otherwise.

    L layers, H query heads per layer, K domains, d hidden size. One that is `unlearned` knows its domains by name
    alone; it is never saved.
    """

    fingerprint: str  # of the model's checkpoint
    domains: tuple[str, ...]
    axes: np.ndarray  # [K, d] centred unit directions
    gram: np.ndarray  # [K, K] cosines between axes
    recogniser: Recogniser | None  # None where nothing was learned
    directions: np.ndarray | None  # [L, K, d] unit probe directions, where a criterion that reads them was asked for
    importance: Mapping[str, np.ndarray]  # criterion -> [L, H, K], mean over each domain's prompts
    spread: Mapping[str, np.ndarray]  # criterion -> [L, H, K], relative variance of a head's share over prompts
    whitelist_p: np.ndarray  # [L, H] p-value of "worth more than the median head in every domain"
    whitelist: np.ndarray  # [L, H] bool, after false discovery control, low spread over domains and the cap
    meta: Mapping[str, Any]  # seeds, versions, pool fingerprint, text version, expected calibration errors

    @property
    def learned(self) -> Recogniser:
        """The recogniser. Raises ToolkitError where nothing was learned."""
        if self.recogniser is None:
            raise ToolkitError("The toolkit has not learned to recognise domains.", hint=PREPARE_AGAIN)
        return self.recogniser


ARRAY_FIELDS = tuple(field.name for field in fields(Toolkit) if field.type == "np.ndarray")
RECOGNISER_FIELDS = tuple(field.name for field in fields(Recogniser))


def expected_shapes(toolkit: Toolkit) -> dict[str, tuple[int, ...]]:
    """Shape of every array as the axes [K, d], the whitelist [L, H], the domain names and the recogniser's own layers
    and classes imply it."""
    (layers, heads), hidden, domains = toolkit.whitelist.shape, toolkit.axes.shape[-1], len(toolkit.domains)
    recogniser = toolkit.learned
    read, classes = len(recogniser.layers), len(recogniser.bias)
    shapes = {
        "axes": (domains, hidden),
        "gram": (domains, domains),
        "whitelist_p": (layers, heads),
        "whitelist": (layers, heads),
        # One class more says "none of them".
        **_recogniser_shapes(read, domains if classes == domains else domains + 1, hidden),
    }
    if toolkit.directions is not None:
        shapes[DIRECTIONS] = (layers, domains, hidden)
    per_criterion = [prefix + name for name in toolkit.importance for prefix in (IMPORTANCE_PREFIX, SPREAD_PREFIX)]
    return shapes | dict.fromkeys(per_criterion, (layers, heads, domains))


def _recogniser_shapes(layers: int, classes: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "layers": (layers,),
        "mean": (layers, hidden),
        "scale": (layers, hidden),
        "weight": (layers, classes, hidden),
        "bias": (classes,),
        "log_temperature": (1,),
        "unknown_line": (1,),
    }
    return {RECOGNISER_PREFIX + name: shape for name, shape in shapes.items()}


def _arrays(toolkit: Toolkit) -> dict[str, np.ndarray]:
    named = {name: getattr(toolkit, name) for name in ARRAY_FIELDS}
    named |= {RECOGNISER_PREFIX + name: getattr(toolkit.learned, name) for name in RECOGNISER_FIELDS}
    if toolkit.directions is not None:
        named[DIRECTIONS] = toolkit.directions
    named |= {IMPORTANCE_PREFIX + name: array for name, array in toolkit.importance.items()}
    return named | {SPREAD_PREFIX + name: array for name, array in toolkit.spread.items()}


def check(toolkit: Toolkit) -> None:
    """Raise ToolkitError when an array contradicts the others or holds a number that is not finite."""
    recogniser = toolkit.learned
    if (toolkit.axes.ndim, toolkit.whitelist.ndim, recogniser.layers.ndim, recogniser.bias.ndim) != (2, 2, 1, 1):
        raise ToolkitError("The toolkit's arrays have the wrong number of dimensions.", hint=PREPARE_AGAIN)
    if set(toolkit.importance) != set(toolkit.spread):
        raise ToolkitError("The toolkit's importance and spread name different criteria.", hint=PREPARE_AGAIN)
    arrays = _arrays(toolkit)
    for name, shape in expected_shapes(toolkit).items():
        if arrays[name].shape != shape:
            raise ToolkitError(
                f"The toolkit's {name} has shape {list(arrays[name].shape)} instead of {list(shape)}.",
                hint=PREPARE_AGAIN,
            )
        if not np.isfinite(arrays[name]).all():
            raise ToolkitError(f"The toolkit's {name} holds a number that is not finite.", hint=PREPARE_AGAIN)


def with_importance(toolkit: Toolkit, name: str, importance: np.ndarray, spread: np.ndarray) -> Toolkit:
    """The same toolkit with one more criterion (or a newer value of it), [L, H, K] each."""
    added = replace(
        toolkit,
        importance={**toolkit.importance, name: np.asarray(importance, dtype=np.float32)},
        spread={**toolkit.spread, name: np.asarray(spread, dtype=np.float32)},
    )
    check(added)
    return added


def save(toolkit: Toolkit, folder: Path) -> None:
    """Write `toolkit.safetensors` and `toolkit.json`; the folder is whole or absent, whenever the run is killed.

    An earlier toolkit in `folder` is replaced.
    """
    from safetensors.numpy import save as to_bytes

    check(toolkit)
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(_arrays(toolkit).items())}
    description = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": toolkit.fingerprint,
        "domains": list(toolkit.domains),
        "criteria": sorted(toolkit.importance),
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
        "meta": toolkit.meta,
    }
    text = json.dumps(description, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with staged(folder, overwrite=True) as building:
        (building / TENSORS_FILE).write_bytes(to_bytes(arrays))
        (building / DESCRIPTION_FILE).write_text(text, "utf-8")


def is_outdated(folder: Path) -> bool:
    """Whether the toolkit in `folder` is of another schema version, so that only preparing it anew helps.

    Raises ToolkitError when its description is unreadable.
    """
    return _read_description(folder)["schema_version"] != SCHEMA_VERSION


def load(folder: Path, *, fingerprint: str) -> Toolkit:
    """Open a toolkit of the model with this fingerprint.

    Raises ToolkitError when it is missing, unreadable, of another schema version or another model, or when its
    arrays are incomplete or contradict each other.
    """
    description = _read_description(folder)
    if description["schema_version"] != SCHEMA_VERSION:
        raise ToolkitError(
            f"{folder} has schema version {description['schema_version']}; this release reads {SCHEMA_VERSION}.",
            hint=PREPARE_AGAIN,
        )
    if description["fingerprint"] != fingerprint:
        raise ToolkitError(
            f"{folder} was prepared for another model ({description['fingerprint'][:12]}, not {fingerprint[:12]}).",
            hint=PREPARE_AGAIN,
        )
    arrays = _read_arrays(folder, description["arrays"])
    names = [prefix + name for name in description["criteria"] for prefix in (IMPORTANCE_PREFIX, SPREAD_PREFIX)]
    names += [RECOGNISER_PREFIX + name for name in RECOGNISER_FIELDS]
    missing = sorted({*ARRAY_FIELDS, *names} - set(arrays))
    if missing:
        raise ToolkitError(f"{folder} lacks {', '.join(missing)}.", hint=PREPARE_AGAIN)
    toolkit = Toolkit(
        fingerprint=fingerprint,
        domains=tuple(description["domains"]),
        recogniser=Recogniser(**{name: arrays[RECOGNISER_PREFIX + name] for name in RECOGNISER_FIELDS}),
        directions=arrays.get(DIRECTIONS),
        importance={name: arrays[IMPORTANCE_PREFIX + name] for name in description["criteria"]},
        spread={name: arrays[SPREAD_PREFIX + name] for name in description["criteria"]},
        meta=description["meta"],
        **{name: arrays[name] for name in ARRAY_FIELDS},
    )
    check(toolkit)
    return toolkit


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise ToolkitError(f"There is no toolkit in {folder}.", hint="Run `sspcompile prepare` for this model.")
    try:
        description = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ToolkitError(f"{path} is not valid JSON: {error}.", hint=PREPARE_AGAIN) from error
    keys = {"schema_version": int, "fingerprint": str, "domains": list, "criteria": list, "arrays": dict, "meta": dict}
    wrong = [
        key
        for key, kind in keys.items()
        if not isinstance(description, dict) or not isinstance(description.get(key), kind)
    ]
    if wrong:
        raise ToolkitError(f"{path} has no valid {', '.join(wrong)}.", hint=PREPARE_AGAIN)
    return description


def _read_arrays(folder: Path, shapes: Mapping[str, list[int]]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / TENSORS_FILE
    if not path.is_file():
        raise ToolkitError(f"{folder} lacks {TENSORS_FILE}.", hint=PREPARE_AGAIN)
    try:
        arrays = load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ToolkitError(f"{path} cannot be read: {error}.", hint=PREPARE_AGAIN) from error
    found = {name: list(array.shape) for name, array in arrays.items()}
    if found != dict(shapes):
        different = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ToolkitError(f"{folder}: the two files disagree about {', '.join(different)}.", hint=PREPARE_AGAIN)
    return arrays
