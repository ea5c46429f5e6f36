"""The dense model in memory, and the two places in each decoder layer that everything else looks at.

`residual`: the residual stream after attention is added and before the MLP, which is exactly the positional input
of the norm that the family table names (`post_attention_layernorm` in most, not in all). `head output`: the input of
`o_proj`, where the heads still stand side by side; it is the only place where closing a head is a multiplication by
zero.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sspcompile.errors import CheckpointError, RunError
from sspcompile.families import FAMILIES, Geometry, family_of, geometry_of
from sspcompile.placement import input_device, loading_options, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Chooser = Callable[[Tensor], Tensor]

# What transformers raises for a configuration or tokenizer that it cannot make sense of.
LOADING_ERRORS = (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError)


@dataclass(frozen=True)
class TextModel:
    """Any decoder ready to run, dense or cut: evaluation mode, no gradients, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def vocab(self) -> int:
        """Width of the logits."""
        return self.model.config.vocab_size

    @property
    def ends(self) -> frozenset[int]:
        """Every token id that ends a sequence: those of the generation configuration and the tokenizer's."""
        declared = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = declared if isinstance(declared, list) else [declared]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of the decoder's normalised output [..., d].

        Granite divides them by a constant and Gemma 2 bends them towards a bound, both behind lm_head.
        """
        config = self.model.config
        logits = self.model.lm_head(hidden).float() / getattr(config, "logits_scaling", 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @torch.inference_mode()
    def scored_logits(self, input_ids: Tensor, attention_mask: Tensor, score_mask: Tensor) -> Tensor:
        """Logits [S, V] in fp32 at the positions that `score_mask` (bool [B, T]) marks, row after row."""
        hidden = self.model.model(
            input_ids=input_ids.to(self.device), attention_mask=attention_mask.to(self.device), use_cache=False
        ).last_hidden_state
        return self.logits_of(hidden[score_mask.to(hidden.device)]).to(self.device)

    @torch.inference_mode()
    def continuations(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        new_tokens: int,
        *,
        choose: Chooser | None = None,
        on_tokens: Callable[[list[int]], None] = lambda _: None,
    ) -> list[list[int]]:
        """At most `new_tokens` tokens behind every row of [B, T], which is padded on the left; end tokens included.

        Decoded with a cache, by argmax or by `choose` (logits fp32 [B, V] -> tokens [B]); `on_tokens` hears every step.
        `generate` is avoided: it adopts the checkpoint's repetition penalty.
        """
        ids, mask = input_ids.to(self.device), attention_mask.to(self.device)
        positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), None
        rows = Rows(len(ids), self.ends)
        for _ in range(new_tokens):
            output = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, scores = output.past_key_values, output.logits[:, -1]
            tokens = scores.argmax(-1) if choose is None else choose(scores.float().cpu()).to(self.device)
            on_tokens(tokens.tolist())
            if rows.ended(tokens.tolist()):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return rows.tails


class Rows:
    """What is written behind every row of a batch, until each has had one of `ends`."""

    def __init__(self, count: int, ends: frozenset[int]) -> None:
        self.tails: list[list[int]] = [[] for _ in range(count)]
        self._ends = ends
        self._running = [True] * count

    def ended(self, tokens: Sequence[int]) -> bool:
        """Take one token per row; whether no row is running any more."""
        for row, token in enumerate(tokens):
            if self._running[row]:
                self.tails[row].append(token)
                self._running[row] = token not in self._ends
        return not any(self._running)


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A dense decoder ready to run, with what is known of its build, in fp32."""

    geometry: Geometry
    path: Path
    fingerprint: str

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.model.model.layers

    @property
    def vocab(self) -> int:
        return self.geometry.vocab


def load_cut(path: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> TextModel:
    """Load a finished model folder of any head counts as its users do, in fp32.

    Raises CheckpointError when transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    attention = family_of(json.loads((path / "config.json").read_text("utf-8"))).attention
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    model.requires_grad_(False).eval().to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return TextModel(model, tokenizer)


def demand_json(path: Path) -> None:
    """Raise CheckpointError for a file that is no JSON: the tokenizers library throws a bare Exception at it."""
    try:
        if path.exists():
            json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON.", hint="Download it again.") from error


def load(
    path: Path, *, fingerprint: str, device: str = "cpu", device_map: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load model and tokenizer from a folder. Everything is computed in fp32, whatever the checkpoint stores.

    `device_map` spreads the model instead of putting it on `device` (see placement). Raises InputError for one that
    cannot be used, CheckpointError when tokenizer, configuration or weights are unusable, and whatever `geometry_of`
    raises.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    geometry = geometry_of(json.loads((path / "config.json").read_text("utf-8")))
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise CheckpointError(f"{path} has no tokenizer.", hint="Copy tokenizer.json beside config.json.")
    spread = loading_options(device_map)
    demand_json(path / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=geometry.family.attention,
            trust_remote_code=trust_remote_code,
            **spread,
        )
    except LOADING_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load {path}: {reason}", hint="Check its files.") from error
    _check_loaded(model, tokenizer, geometry, path)
    model.requires_grad_(False).eval()
    if not spread:
        model.to(device)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model=model, tokenizer=tokenizer, geometry=geometry, path=path, fingerprint=fingerprint)


def _check_loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, geometry: Geometry, path: Path) -> None:
    if len(tokenizer) > geometry.vocab:
        raise CheckpointError(
            f"{path} has a tokenizer of {len(tokenizer)} tokens for a model of {geometry.vocab}.",
            hint="Use the tokenizer that the model was trained with.",
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter).all():
            raise CheckpointError(f"{path} has infinite or undefined numbers in {name}.", hint="Download it again.")


def o_proj(layer: nn.Module) -> nn.Linear:
    """The output projection of one decoder layer; its input is [batch, tokens, heads * head_dim]."""
    return layer.self_attn.o_proj


def input_norm(layer: nn.Module) -> nn.Module:
    """The module whose positional input is the residual stream before attention, [batch, tokens, hidden]."""
    return layer.input_layernorm


def projection_place(geometry: Geometry, name: str) -> tuple[str, slice]:
    """Where q_proj, k_proj, v_proj or o_proj stands: the module of the attention, and the rows of its weight."""
    if name == "o_proj" or not geometry.family.fused_qkv:
        return name, slice(None)
    q, kv = geometry.heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    return "qkv_proj", {"q_proj": slice(0, q), "k_proj": slice(q, q + kv), "v_proj": slice(q + kv, None)}[name]


def projection_weight(loaded: LoadedModel, layer: int, name: str) -> Tensor:
    """The weight of q_proj, k_proj, v_proj or o_proj, [rows, columns], wherever it lies; not to be written to."""
    module, rows = projection_place(loaded.geometry, name)
    return weight_of(getattr(loaded.layers[layer].self_attn, module))[rows]


def residual_norm(layer: nn.Module) -> nn.Module:
    """The module whose positional input is the residual stream after attention, [batch, tokens, hidden]."""
    family = FAMILIES[layer.self_attn.config.model_type]
    return getattr(layer, family.residual_norm)


@contextlib.contextmanager
def head_gates(loaded: LoadedModel, gates: Tensor) -> Iterator[None]:
    """Multiply every head's output by its gate, at the input of o_proj, for the duration of the context.

    `gates` is [layers, heads], or [layers, batch, heads] for one gate per sequence. With zeros and ones this is the
    masked model, the oracle that every sliced or exported file is compared with. Gradients flow into `gates`.
    """
    g = loaded.geometry
    if gates.shape[0] != g.layers or gates.shape[-1] != g.heads or gates.dim() not in (2, 3):
        raise ValueError(f"gates {tuple(gates.shape)} for {g.layers} layers of {g.heads} heads")

    def hook_for(gate: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
            x = args[0]
            batch, tokens, _ = x.shape
            per_head = x.view(batch, tokens, g.heads, g.head_dim)
            scale = gate.to(x)  # layers may lie on several devices
            scale = scale.view(1, 1, g.heads, 1) if gate.dim() == 1 else scale.view(batch, 1, g.heads, 1)
            return ((per_head * scale).view_as(x), *args[1:])

        return hook

    handles = [
        o_proj(layer).register_forward_pre_hook(hook_for(gates[index])) for index, layer in enumerate(loaded.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LayerCall:
    """How the decoder called one layer: the hidden state [B, T, d] it was given, and everything else."""

    hidden: Tensor
    rest: tuple[Any, ...]
    options: Mapping[str, Any]


@contextlib.contextmanager
def recorded_calls(loaded: LoadedModel) -> Iterator[dict[int, LayerCall]]:
    """Record how each layer is called, so that it can be called again with another hidden state.

    Raises RunError when a layer was not called, or got its hidden state by keyword.
    """
    calls: dict[int, LayerCall] = {}

    def hook_for(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            if not args:
                raise RunError(f"Layer {index} is called without a positional hidden state.")
            calls[index] = LayerCall(args[0], args[1:], dict(options))

        return hook

    handles = [y.register_forward_pre_hook(hook_for(i), with_kwargs=True) for i, y in enumerate(loaded.layers)]
    try:
        yield calls
        if len(calls) != len(loaded.layers):
            raise RunError(f"Only {len(calls)} of {len(loaded.layers)} layers were called.")
    finally:
        for handle in handles:
            handle.remove()


def layer_output(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden state that a decoder layer returns, bare or first of a tuple, by version of transformers."""
    return output[0] if isinstance(output, tuple) else output
