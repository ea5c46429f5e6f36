"""The proof for models that do not fit twice: dense and cut side by side, one layer of each in memory at a time.

Both models are built without weights. Layer by layer, the weights are read, both layers are run on their own hidden
states, the states are compared, and the weights are dropped. Masking a head at the input of o_proj is the same as
zeroing its columns of o_proj, so that is how the dense model is masked here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sspcompile.checkpoint.source import Checkpoint, TensorInfo, read_words, tensor_table
from sspcompile.checkpoint.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from sspcompile.errors import ParityError
from sspcompile.families import Geometry, layer_prefix
from sspcompile.model.loading import open_config, readable
from sspcompile.model.modules import layer_output
from sspcompile.progress import Steps, no_steps
from sspcompile.proof.parity import PROBE_PROMPTS, PROBE_TOKENS, TOLERANCE, Parity
from sspcompile.repair.repair import DOWN
from sspcompile.slicing.mask import HeadMask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Rows of the output matrix that are multiplied at once.
VOCABULARY_ROWS = 8192
WEIGHT, BIAS = "self_attn.o_proj.weight", "self_attn.o_proj.bias"
Tensors = Mapping[str, TensorInfo]
# What a layer is called with beside the hidden state.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class _Side:
    """One of the two models: its empty skeleton, where its tensors lie, and one hidden state [1, T, d] per prompt."""

    model: PreTrainedModel
    tensors: Tensors
    hidden: list[Tensor]


@torch.inference_mode()
def compare_layerwise(
    checkpoint: Checkpoint,
    mask: HeadMask,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    repaired: bool,
    custom_code: bool,
    down: bool = False,
    progress: Steps = no_steps,
) -> Parity:
    """Compare the model in `folder` with the masked dense model on token ids `prompts`, layer by layer, in fp32.

    `repaired`: the kept columns of o_proj were refitted, and with `down` down_proj, so the oracle takes them from the
    cut. `same_text`: both prefer the same next token at every position. Raises ParityError naming the first layer
    whose output differs.
    """
    g = checkpoint.geometry
    prompts = [list(ids[:PROBE_TOKENS]) for ids in prompts[:PROBE_PROMPTS]]
    dense = _side(checkpoint.path, checkpoint.tensors, prompts, g, trusted=False)
    cut = _side(folder, tensor_table(folder), prompts, g, trusted=custom_code)
    calls = [_calls(side.model, side.hidden) for side in (dense, cut)]
    for index in range(g.layers):
        states = _states(dense.tensors, cut.tensors, index, g)
        _mask(*states, mask.kept[index], g, repaired=repaired)
        if down:
            states[0][DOWN] = states[1][DOWN]
        for side, weights, recorded in zip((dense, cut), states, calls, strict=True):
            _run(side, index, weights, recorded)
        _compare_states(dense.hidden, cut.hidden, index)
        progress(index + 1, g.layers + 1)
    for side in (dense, cut):
        side.model.model.norm.load_state_dict(_norm_state(side.tensors), assign=True)
        side.hidden[:] = [side.model.model.norm(hidden) for hidden in side.hidden]
    parity = _compare_logits(dense, cut, g)
    progress(g.layers + 1, g.layers + 1)
    return parity


def _side(folder: Path, tensors: Tensors, prompts: list[list[int]], g: Geometry, *, trusted: bool) -> _Side:
    from transformers import AutoModelForCausalLM

    with readable(folder), torch.device("meta"):
        config = open_config(folder, trust_remote_code=trusted)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=g.family.attention, trust_remote_code=trusted
        ).eval()
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if empty:  # rotary frequencies, embedding scales: computed, never stored
            model._init_weights(module)
    return _Side(model, tensors, _embedded(model, tensors[EMBEDDING], prompts))


def _embedded(model: PreTrainedModel, info: TensorInfo, prompts: list[list[int]]) -> list[Tensor]:
    """What enters the decoder: ids of a small vocabulary, whose rows are the only ones that are read."""
    used = sorted({token for ids in prompts for token in ids})
    rows = np.concatenate([_words(info, token, token + 1) for token in used])
    model.model.embed_tokens.padding_idx = None  # only training looks at it, but its range is checked
    model.model.embed_tokens.weight = nn.Parameter(_tensor(rows, info.dtype), requires_grad=False)
    place = {token: index for index, token in enumerate(used)}
    return [torch.tensor([[place[token] for token in ids]]) for ids in prompts]


def _calls(model: PreTrainedModel, ids: list[Tensor]) -> list[list[Call]]:
    """How the decoder calls each layer for each prompt; `ids` become the hidden states that enter the first one.

    Positions and masks do not depend on hidden states, so the layers themselves are passed over.
    """
    recorded: list[list[Call]] = []
    originals = [layer.forward for layer in model.model.layers]
    seen: list[Call] = []
    first: list[Tensor] = []

    def pass_over(hidden_states: Tensor, *rest: Any, **options: Any) -> Tensor:
        if not seen:
            first.append(hidden_states)
        seen.append((rest, options))
        return hidden_states

    norm = model.model.norm.forward
    try:
        model.model.norm.forward = lambda hidden_states: hidden_states
        for layer in model.model.layers:
            layer.forward = pass_over
        for number, tokens in enumerate(ids):
            seen.clear()
            first.clear()
            model.model(input_ids=tokens, use_cache=False)
            recorded.append(list(seen))
            ids[number] = first[0]
    finally:
        model.model.norm.forward = norm
        for layer, forward in zip(model.model.layers, originals, strict=True):
            layer.forward = forward
    return recorded


def _run(side: _Side, index: int, weights: dict[str, Tensor], recorded: list[list[Call]]) -> None:
    layer = side.model.model.layers[index]
    layer.load_state_dict(weights, assign=True)
    for number, hidden in enumerate(side.hidden):
        rest, options = recorded[number][index]
        side.hidden[number] = layer_output(layer(hidden, *rest, **options))
    layer.to("meta")


def _states(dense: Tensors, cut: Tensors, index: int, g: Geometry) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both layers' weights in fp32, by their names in memory. Tensors that are the same bytes are held once."""
    prefix = layer_prefix(index)
    first, second = {}, {}
    for name in (name for name in dense if name.startswith(prefix)):
        words = read_words(dense[name])
        tensor = first[name.removeprefix(prefix)] = _tensor(words, dense[name].dtype)
        if name in cut and cut[name].shape == dense[name].shape and np.array_equal(words, read_words(cut[name])):
            second[name.removeprefix(prefix)] = tensor
    for name in (name for name in cut if name.startswith(prefix)):
        if name.removeprefix(prefix) not in second:
            second[name.removeprefix(prefix)] = _tensor(read_words(cut[name]), cut[name].dtype)
    return _in_memory(first, index, g), _in_memory(second, index, g)


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
        "mlp.experts.gate_up_proj": torch.stack(
            [torch.cat([part(number, name) for name in experts.gate_up]) for number in numbers]
        ),
        "mlp.experts.down_proj": torch.stack([part(number, experts.down) for number in numbers]),
        "mlp.gate.weight": state.pop(experts.router + ".weight"),
    }
    return {**state, **stacked}


def _mask(
    state: dict[str, Tensor], cut: Mapping[str, Tensor], kept: Sequence[int], g: Geometry, *, repaired: bool
) -> None:
    """Leave in the dense layer's o_proj the columns of the kept heads, or the cut's own columns in their places."""
    columns = list(kept)
    weight = torch.zeros(g.hidden, g.heads, g.head_dim)
    source = cut[WEIGHT].view(g.hidden, -1, g.head_dim) if repaired else state[WEIGHT].view_as(weight)[:, columns]
    weight[:, columns] = source
    state[WEIGHT] = weight.view(g.hidden, g.heads * g.head_dim)
    if repaired and BIAS in state:  # a repair may have changed it
        state[BIAS] = cut[BIAS]


def _norm_state(tensors: Tensors) -> dict[str, Tensor]:
    prefix = FINAL_NORM + "."
    infos = {name.removeprefix(prefix): info for name, info in tensors.items() if name.startswith(prefix)}
    return {name: _tensor(read_words(info), info.dtype) for name, info in infos.items()}


def _compare_states(dense: list[Tensor], cut: list[Tensor], index: int) -> None:
    for one, other in zip(dense, cut, strict=True):
        if not (torch.isfinite(one).all() and torch.isfinite(other).all()):
            raise ParityError(f"Layer {index} computes infinite or undefined numbers.", hint="Check the weights.")
        relative = float((one - other).abs().max() / one.abs().max().clamp_min(1e-30))
        if relative > TOLERANCE:
            raise ParityError(
                f"The output of layer {index} differs from the masked model's by {relative:.2e} of its scale; at most "
                f"{TOLERANCE:g} is allowed.",
                hint="Build the artifact again.",
            )


def _compare_logits(dense: _Side, cut: _Side, g: Geometry) -> Parity:
    """Logits in slices of the vocabulary; only the best of each position is kept."""
    infos = [side.tensors[EMBEDDING if g.tied and LM_HEAD not in side.tensors else LM_HEAD] for side in (dense, cut)]
    hidden = [torch.cat([state[0] for state in side.hidden]) for side in (dense, cut)]
    best = [torch.full((len(states),), -torch.inf) for states in hidden]
    token = [torch.zeros(len(states), dtype=torch.long) for states in hidden]
    difference = scale = 0.0
    for start in range(0, g.vocab, VOCABULARY_ROWS):
        stop = min(g.vocab, start + VOCABULARY_ROWS)
        weights = [_tensor(_words(info, start, stop), info.dtype) for info in infos]
        logits = [states @ weight.T for states, weight in zip(hidden, weights, strict=True)]
        difference = max(difference, float((logits[0] - logits[1]).abs().max()))
        scale = max(scale, float(logits[0].abs().max()))
        for side, values in enumerate(logits):
            top, where = values.max(-1)
            better = top > best[side]
            best[side] = torch.where(better, top, best[side])
            token[side] = torch.where(better, where + start, token[side])
    return Parity(difference, scale, bool(token[0].equal(token[1])), len(dense.hidden))


def _words(info: TensorInfo, start: int, stop: int) -> np.ndarray:
    rows = info.rows(start, stop)
    return read_words(TensorInfo(info.file, info.dtype, (stop - start, *info.shape[1:]), rows.offset))


def _tensor(words: np.ndarray, dtype: str) -> Tensor:
    """Raw words of a floating-point dtype as fp32."""
    if dtype not in TORCH_DTYPES:
        raise ParityError(f"Weights stored as {dtype} cannot be computed with.", hint=f"Use {', '.join(TORCH_DTYPES)}.")
    return torch.from_numpy(words.view(np.uint8)).view(TORCH_DTYPES[dtype]).view(words.shape).float()
