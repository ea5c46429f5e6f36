"""The proof for models that do not fit: dense and cut side by side, one layer of each in memory at a time.

Both models are built without weights. Layer by layer, the weights are read, both layers are run on their own hidden
states, the states are compared, and the weights are dropped. Masking a head at the input of o_proj is the same as
zeroing its columns of o_proj, and so are channels and down_proj, or that of an expert: that is how the dense model is
masked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.checkpoint.headers import TensorInfo, read_words
from sspcompile.checkpoint.tensors import (
    EMBEDDING,
    EXPERTS_DOWN,
    EXPERTS_GATE_UP,
    FINAL_NORM,
    LM_HEAD,
    ROUTER,
    down_names,
)
from sspcompile.errors import ParityError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.exact import in_float64
from sspcompile.model.hooks import LayerCall, passed_over, recorded_calls
from sspcompile.model.modules import layer_output
from sspcompile.model.stored import as_tensor, read_tensor
from sspcompile.model.streaming import skeleton
from sspcompile.progress import Steps, no_steps
from sspcompile.proof.claim import BIAS, WEIGHT, Claim, widened
from sspcompile.proof.parity import BOUND, DTYPE, PROBE_PROMPTS, PROBE_TOKENS, REPORT, Distance, Parity
from sspcompile.repair.repair import bias_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rows of the output matrix that are multiplied at once.
VOCABULARY_ROWS = 8192
Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class _Side:
    """One of the two models: its empty skeleton, where its tensors lie by their names in the source, and one hidden
    state [1, T, d] per prompt.

    `calls`: how its decoder calls each layer, per prompt. Neither positions nor masks depend on hidden states.
    """

    model: PreTrainedModel
    tensors: Tensors
    hidden: list[Tensor]
    calls: list[dict[int, LayerCall]]


@torch.inference_mode()
def compare_layerwise(claim: Claim, prompts: Sequence[Sequence[int]], *, progress: Steps = no_steps) -> Parity:
    """Compare on token ids `prompts`: the states behind every layer, then the logits of every token.

    Raises ParityError naming the first layer whose output differs.
    """
    g = claim.geometry
    texts = [list(ids[:PROBE_TOKENS]) for ids in prompts[:PROBE_PROMPTS]]
    dense = _side(claim.checkpoint.path, claim.checkpoint.tensors, texts, g, trusted=False)
    cut = _side(claim.written, claim.there, texts, g, trusted=claim.custom_code)
    staying = claim.mask.staying
    with in_float64():
        for place, index in enumerate(staying):
            states = _states(dense.tensors, cut.tensors, index)
            _mask(*states, index, claim)
            for side, number, weights in zip((dense, cut), (index, place), states, strict=True):
                _run(side, number, _in_memory(weights, index, g))
            _compare_states(dense.hidden, cut.hidden, index)
            progress(place + 1, len(staying) + 1)
        for side in (dense, cut):
            side.model.model.norm.load_state_dict(_state(side.tensors, FINAL_NORM + "."), assign=True)
            side.hidden[:] = [side.model.model.norm(hidden) for hidden in side.hidden]
        parity = _compare_logits(dense, cut, g)
    progress(len(staying) + 1, len(staying) + 1)
    return parity


def _side(folder: Path, tensors: Tensors, prompts: list[list[int]], g: Geometry, *, trusted: bool) -> _Side:
    model = skeleton(folder, torch.float64, g.family.attention, trust_remote_code=trusted)
    ids = _embeddable(model, tensors[EMBEDDING], prompts)
    with in_float64(), passed_over([*model.model.layers, model.model.norm]):  # which have no weights yet
        calls = [_recorded(model, row) for row in ids]
    return _Side(model, tensors, [recorded[0].hidden for recorded in calls], calls)


def _embeddable(model: PreTrainedModel, info: TensorInfo, prompts: list[list[int]]) -> list[Tensor]:
    """The prompts in ids of a small vocabulary, whose rows are the only ones that are read."""
    used = sorted({token for ids in prompts for token in ids})
    rows = np.concatenate([read_words(info.band(token, token + 1)) for token in used])
    model.model.embed_tokens.padding_idx = None  # only training looks at it, but its range is checked
    model.model.embed_tokens.weight = nn.Parameter(as_tensor(rows, info.dtype).double(), requires_grad=False)
    place = {token: index for index, token in enumerate(used)}
    return [torch.tensor([[place[token] for token in ids]]) for ids in prompts]


def _recorded(model: PreTrainedModel, ids: Tensor) -> dict[int, LayerCall]:
    with recorded_calls(model.model.layers) as calls:
        model.model(input_ids=ids, use_cache=False)
    return calls


def _run(side: _Side, index: int, weights: dict[str, Tensor]) -> None:
    layer = side.model.model.layers[index]
    layer.load_state_dict(weights, assign=True)
    for number, hidden in enumerate(side.hidden):
        call = side.calls[number][index]
        side.hidden[number] = layer_output(layer(hidden, *call.rest, **call.options))
    layer.to("meta")


def _states(dense: Tensors, cut: Tensors, index: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both layers' weights in float64, by their names in the layer. Tensors of the same bytes are held once."""
    prefix = layer_prefix(index)
    first, second = _state(dense, prefix), {}
    for name in (name for name in cut if name.startswith(prefix)):
        part = name.removeprefix(prefix)
        tensor = read_tensor(cut[name]).double()
        second[part] = first[part] if part in first and tensor.equal(first[part]) else tensor
    return first, second


def _state(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    infos = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
    return {name: read_tensor(info).double() for name, info in infos.items()}


def _in_memory(state: dict[str, Tensor], index: int, g: Geometry) -> dict[str, Tensor]:
    """The names that transformers gives to the weights of a layer: stacked experts in a sparse one."""
    state = {name: tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    experts = g.family.experts
    if experts is None or index not in g.sparse:
        return state

    def part(number: int, name: str) -> Tensor:
        return state.pop(f"{experts.expert.format(number)}.{name}.weight")

    numbers = range(g.experts)
    stacked = {
        EXPERTS_GATE_UP: torch.stack(
            [torch.cat([part(number, name) for name in experts.gate_up]) for number in numbers]
        ),
        EXPERTS_DOWN: torch.stack([part(number, experts.down) for number in numbers]),
        ROUTER: state.pop(experts.router + ".weight"),
    }
    return {**state, **stacked}


def _mask(dense: dict[str, Tensor], cut: Mapping[str, Tensor], index: int, claim: Claim) -> None:
    """Leave in the dense layer's o_proj and every down_proj the columns of what is kept, and put in what was
    refitted.
    """
    g, kept = claim.geometry, claim.mask.units
    prefix = layer_prefix(index)
    if not kept.attends(index):
        dense |= {part: torch.zeros_like(dense[part]) for part in (WEIGHT, BIAS) if part in dense}
    columns = {WEIGHT: np.repeat(kept.heads[index], g.head_dim)}
    downs = [name.removeprefix(prefix) for name in down_names(g, index)]
    if kept.channels is not None:
        columns |= zip(downs, kept.channels[index].reshape(g.mlps, g.width), strict=True)
    of_attention = (WEIGHT, BIAS) if kept.attends(index) else ()
    for part in (*of_attention, *downs, bias_name(g, index).removeprefix(prefix)):
        refitted, there = prefix + part in claim.refitted, columns.get(part)
        if there is None:
            dense |= {part: cut[part]} if refitted else {}
        elif refitted:
            dense[part] = widened(cut[part], there)
        else:
            dense[part] = dense[part] * torch.from_numpy(there)


def _compare_states(dense: list[Tensor], cut: list[Tensor], index: int) -> None:
    for one, other in zip(dense, cut, strict=True):
        if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
            raise ParityError(f"Layer {index} computes infinite or undefined numbers.", hint="Check the weights.")
        relative = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
        if relative > BOUND:
            raise ParityError(
                f"The output of layer {index} differs from the masked model's by {relative:.2e} of its scale in "
                f"{DTYPE}; at most {BOUND:.1e} is allowed.",
                hint=REPORT,
            )


def _compare_logits(dense: _Side, cut: _Side, g: Geometry) -> Parity:
    """Logits in slices of the vocabulary; only the best of each position is kept."""
    infos = [side.tensors[EMBEDDING if g.tied and LM_HEAD not in side.tensors else LM_HEAD] for side in (dense, cut)]
    hidden = [torch.cat([state[0] for state in side.hidden]) for side in (dense, cut)]
    best = [torch.full((len(states),), -torch.inf, dtype=torch.float64) for states in hidden]
    chosen, distance = torch.zeros_like(best[0]), Distance()
    for start in range(0, g.vocab, VOCABULARY_ROWS):
        rows = [read_tensor(info.band(start, min(g.vocab, start + VOCABULARY_ROWS))).double() for info in infos]
        expected, found = (states @ weight.T for states, weight in zip(hidden, rows, strict=True))
        distance.add_values(float((expected - found).abs().max()), float(expected.abs().max()))
        top, where = found.max(-1)
        # What the dense model gives to the token that the cut prefers.
        chosen = torch.where(top > best[1], expected.gather(-1, where[:, None])[:, 0], chosen)
        best = [best[0].maximum(expected.max(-1).values), best[1].maximum(top)]
    distance.add_preference(best[0] - chosen)
    return distance.parity(len(dense.hidden), layerwise=True)
