"""What published structured pruners say heads and channels of the MLPs are worth, as one budget over both can be spent.

Each method compares units in a way of its own, and a budget takes what costs the least per parameter, so the worth of a
unit is its parameters times a price:

* FLAP ranks heads and channels of all layers together by standardised scores. The score is the price; the lowest one of
  the model is made zero, which moves all alike.
* Wanda-sp, LLM-Pruner and magnitude remove the same share of every layer and kind. The price is the unit's place among
  those of its kind in its layer, from 0 for the least needed to 1, so that heads and channels of all layers fall alike.
  Heads stand behind each other by groups, the group of the lowest sum first: together they free keys and values, and
  every layer has the same steps. What does not come out even is taken from the layers in the middle, which are thought
  to lose least by it.

Texts are those that chose the build. Layouts, bounds and repairs are those of whoever asks. The authors of LLM-Pruner
leave the first and the last layers of LLaMA alone by hand; nothing of that kind is done here. Channels of experts have
no score of theirs, so none of them is asked where such may go.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from sspcompile.criteria.channels import structure_moments
from sspcompile.criteria.flap import flap_structures
from sspcompile.criteria.llm_pruner import has_gradients, llm_pruner_structures
from sspcompile.criteria.magnitude import magnitude_structures
from sspcompile.criteria.units import CriterionInput, Structures
from sspcompile.criteria.wanda import wanda_structures
from sspcompile.families import Geometry
from sspcompile.model import journal
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.placement import free_bytes
from sspcompile.model.text import BATCH_TOKENS, GRADIENT_TOKENS, Sentence, batches_of
from sspcompile.progress import Progress, stage_of
from sspcompile.request.splits import thinned
from sspcompile.select.scoring import CURVATURE_TEXTS
from sspcompile.slicing.sizes import Worth, channel_parameters, head_share

FLAP, WANDA, LLM_PRUNER, MAGNITUDE = PEERS = ("FLAP", "Wanda-sp", "LLM-Pruner", "magnitude")
# Stages of a build.
INPUTS, GRADIENTS = "inputs of heads and channels (baselines)", "gradients of weights (baseline)"
# Forward passes that gradients of weights are worth: forward, forward again layer by layer, and backward through inputs
# and through weights.
GRADIENT_PASSES = 4
# Of a price, by how much that of the outermost layers is higher than that of one in the middle: a tie-break.
MIDDLE_FIRST = 1e-6
# Of what is free, gradients of weights may take so much; activations need the rest.
ROOM = 0.7

log = logging.getLogger("sspcompile")


def peers(
    loaded: LoadedModel, texts: Sequence[Sentence], progress: Progress, *, channels: bool, names: Sequence[str] = PEERS
) -> Iterator[tuple[str, Worth]]:
    """Name and worth of the methods in `names`, on as many of the texts as score heads elsewhere; without `channels`
    those of heads alone.

    One forward pass serves FLAP and Wanda-sp, magnitude needs none. LLM-Pruner is left out of a model some of whose
    weights lie outside of the device, and where gradients of all weights would leave no room.
    """
    read = thinned(texts, CURVATURE_TEXTS)

    def given(tokens: int, stage: str) -> CriterionInput:
        return CriterionInput(batches_of(loaded, read, tokens), len(read), progress=stage_of(progress, stage))

    priced = partial(_within, loaded.geometry, channels=channels)
    if {FLAP, WANDA} & {*names}:
        found = structure_moments(loaded, given(BATCH_TOKENS, INPUTS))
        if FLAP in names:
            yield FLAP, priced(standardised(flap_structures(loaded, *found)))
        if WANDA in names:
            yield WANDA, priced(shared_evenly(wanda_structures(loaded, *found), loaded.geometry))
    if LLM_PRUNER in names and has_gradients(loaded) and _room_for_gradients(loaded):
        scores = _kept(loaded, given(GRADIENT_TOKENS, GRADIENTS))
        yield LLM_PRUNER, priced(shared_evenly(scores, loaded.geometry))
    if MAGNITUDE in names:
        yield MAGNITUDE, priced(shared_evenly(magnitude_structures(loaded), loaded.geometry))


def scored_by_peers(g: Geometry, channels: bool) -> bool:
    """Whether the methods say what the units are worth that may go: none has a score for channels of experts."""
    return g.is_dense or not channels


def _room_for_gradients(loaded: LoadedModel) -> bool:
    """Whether as much as all layers weigh is free: a row of a table may not end a build that has decided already."""
    needed = sum(p.numel() * p.element_size() for layer in loaded.layers for p in layer.parameters())
    if needed > ROOM * free_bytes(loaded.device):
        log.info(f"{LLM_PRUNER} is left out of the baselines: gradients of {needed / 1e9:.1f} GB have no room.")
        return False
    return True


def standardised(scores: Structures) -> Structures:
    """Prices of scores that are compared between heads, channels and layers as they are: none is below zero."""
    every = (scores.heads, scores.channels)
    least = min(values.min() for values in every if values is not None)
    return Structures(scores.heads - least, None if scores.channels is None else scores.channels - least)


def shared_evenly(scores: Structures, g: Geometry) -> Structures:
    """Prices that take the same share of every layer and kind: places in (0, 1), the least needed first."""
    grouped = scores.heads.reshape(g.layers, g.kv_heads, g.group_size)
    places = _order(grouped.sum(2))[..., None] * g.group_size + _order(grouped)
    heads = _spaced(places.reshape(scores.heads.shape))
    return Structures(heads, None if scores.channels is None else _spaced(_order(scores.channels)))


def _order(values: np.ndarray) -> np.ndarray:
    """Places 0, 1, ... along the last axis; of equal values the first counts as lower."""
    return np.argsort(np.argsort(values, axis=-1, kind="stable"), axis=-1, kind="stable")


def _spaced(places: np.ndarray) -> np.ndarray:
    """[layers, units] in (0, 1]."""
    layers, units = places.shape
    off = np.abs(2 * (np.arange(layers) + 0.5) / layers - 1)[:, None]
    return (places + 0.5) / units * (1 + MIDDLE_FIRST * off)


def _within(g: Geometry, prices: Structures, *, channels: bool) -> Worth:
    """Prices per parameter as what units are worth."""
    if not channels or prices.channels is None:
        return Worth(head_share(g) * prices.heads, None)
    return Worth(head_share(g) * prices.heads, channel_parameters(g) * prices.channels)


def _kept(loaded: LoadedModel, given: CriterionInput) -> Structures:
    """LLM-Pruner's scores, kept by the journal once they are there; gradients on the way are as much as the weights."""
    rows = journal.current().rows("llm-pruner-structures", loaded, [given.batches])
    g = loaded.geometry

    def measure() -> np.ndarray:
        found = llm_pruner_structures(loaded, given)
        return found.heads if found.channels is None else np.concatenate([found.heads, found.channels], axis=1)

    both = rows.of(0, measure)
    return Structures(both[:, : g.heads], both[:, g.heads :] if g.is_dense else None)
