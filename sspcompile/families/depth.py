"""A model without some of its layers, or without the attention of some: what its configuration says of layers by
their number, said of those that stay.

Every fact of the table that depends on the number of a layer can be stated for each layer by itself in a stock
configuration: windows in `layer_types`, positions in `no_rope_layers`, dense layers between sparse ones in
`mlp_only_layers`. Patterns that count layers are replaced by these lists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sspcompile.families.geometry import Geometry
from sspcompile.families.windows import FULL, SLIDING, turned_layers, windows_of

# They say which layers slide by counting, and some readers take them before the list.
PATTERNS = ("sliding_window_pattern", "_sliding_window_pattern")


def without_layers(config: Mapping[str, Any], g: Geometry, staying: Sequence[int]) -> dict[str, Any]:
    """The configuration of the layers `staying` (ascending numbers; one may come several times), which are numbered
    from 0 again.

    Raises CheckpointError like `windows_of` and `turned_layers`.
    """
    found = dict(config)
    if [*staying] == [*range(g.layers)]:
        return found
    found["num_hidden_layers"] = len(staying)
    kinds = config.get("layer_types")
    windows = windows_of(config, g.family, g.layers)
    if g.family.window == "layer_types" and kinds is None and any(windows):
        kinds = [FULL if window is None else SLIDING for window in windows]
    if isinstance(kinds, list) and len(kinds) == g.layers:
        found = {key: value for key, value in found.items() if key not in PATTERNS}
        found["layer_types"] = [kinds[layer] for layer in staying]
    if "no_rope_layer_interval" in g.family.silent:
        turned = turned_layers(config, g.family, g.layers)
        found["no_rope_layers"] = [int(turned[layer]) for layer in staying]
    whole = config.get("max_window_layers")
    if type(whole) is int:
        found["max_window_layers"] = sum(layer < whole for layer in staying)
    if g.family.experts is not None and (len(g.sparse) < g.layers or config.get("mlp_only_layers")):
        dense = [place for place, layer in enumerate(staying) if layer not in g.sparse]
        found |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return found


def without_attention(config: Mapping[str, Any], g: Geometry, attending: Sequence[int]) -> dict[str, Any]:
    """The configuration of a model in which the layers `attending` alone attend; not empty, ascending.

    A cache has a place for every layer, of the kind that `layer_types` says. A layer without attention is said to be of
    the kind of the next one that attends (behind the last: of that one), so that the first place of every kind is
    taken: transformers reads there how long the text is. Raises CheckpointError like `windows_of`.
    """
    windows = windows_of(config, g.family, g.layers)
    if g.family.window != "layer_types" or len(attending) == g.layers or not any(windows):
        return dict(config)
    kinds = [FULL if window is None else SLIDING for window in windows]
    said = [kinds[next((at for at in attending if at >= layer), attending[-1])] for layer in range(g.layers)]
    return {**{key: value for key, value in config.items() if key not in PATTERNS}, "layer_types": said}


def shallower(g: Geometry, staying: Sequence[int]) -> Geometry:
    """The sizes of a model of the layers `staying` alone."""
    sparse = frozenset(place for place, layer in enumerate(staying) if layer in g.sparse)
    return replace(g, layers=len(staying), sparse=sparse)
