# Copyright the sspcompile authors. Licensed under the Apache License, Version 2.0.
"""Decoder classes whose layers differ in their numbers of heads and MLP channels (`per_layer_config` in config.json).
A layer of no heads has no attention: nothing is added to the residual stream in its place.

`PerLayerMistralForCausalLM` is `MistralForCausalLM` with each decoder layer built from its own counts, and so on for
every stock class; `PerLayerMistralModel` is the decoder without its head, which vLLM's Transformers backend asks for.
Only the sizes of the projections differ; every other forward is inherited. Works with transformers 4.57 and 5.

`Gemma2Config` and so on are the stock configurations, with global head counts that can be read without a warning.
"""

import copy
import functools

import torch
import transformers

PREFIX = "PerLayer"
COUNTS = ("num_attention_heads", "num_key_value_heads")
# Stated per layer where layers differ in it: the width of an MLP, or of an expert.
WIDTHS = ("intermediate_size", "moe_intermediate_size")
# A norm in front of attention, and the one behind it where the MLP has another in front of it.
NORM_BEFORE, NORM_BEHIND, NORM_OF_MLP = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"


class _LayerView:
    """One layer's counts in front of the shared configuration.

    Attention reads its implementation, and in some families its head counts, from its configuration at every call. A
    private copy would not follow set_attn_implementation, the shared one does not know the counts.
    """

    def __init__(self, shared, counts):
        self._shared = shared
        self.__dict__.update(counts)

    def __getattr__(self, name):
        if name.startswith("__") or name == "_shared":  # asked for while copying or unpickling
            raise AttributeError(name)
        return getattr(self._shared, name)


def _stock(config):
    """The same configuration without per-layer entries, so that stock constructors accept it."""
    plain = copy.copy(config)
    if isinstance(getattr(config, "per_layer_config", None), dict):  # transformers 4.57: an ordinary attribute
        plain.per_layer_config = None
    else:
        plain.__dict__.pop("_heterogeneity_spec", None)
    return plain


def _counts(config, layer):
    """The counts of one layer."""
    entries = config.per_layer_config
    if isinstance(entries, dict):
        return dict(entries[str(layer)])
    return {key: getattr(entries[layer], key) for key in (*COUNTS, *WIDTHS) if hasattr(entries[layer], key)}


class _GlobalCounts:
    """A configuration that answers for its global head counts although layers have their own.

    Some stock classes look at them while they are built. transformers 5 warns of that even where it is allowed.
    """

    def __getattribute__(self, name):
        return object.__getattribute__(self, name) if name in (*COUNTS, *WIDTHS) else super().__getattribute__(name)


class _NoAttention(torch.nn.Module):
    """In the place of an attention that is gone: a zero, which broadcasts."""

    def __init__(self, attention, config):
        super().__init__()
        self.config = config
        # A layer of Gemma 3 in transformers 4.57 asks its attention which of two kinds of positions to hand on.
        self.is_sliding = getattr(attention, "is_sliding", False)

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states.new_zeros(()), None


def _without_attention(layer, config):
    """Take the attention out of a layer, and the norms around it."""
    layer.self_attn = _NoAttention(layer.self_attn, config)
    setattr(layer, NORM_BEFORE, torch.nn.Identity())
    if hasattr(layer, NORM_OF_MLP):
        setattr(layer, NORM_BEHIND, torch.nn.Identity())


def _places(config, attending):
    """Where each of the layers that attend keeps its keys and values in a cache: in the first free place of its kind.

    A cache has a place for every layer, and how long the text is, is read from the first one (of a kind).
    """
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    free = {kind: [place for place, other in enumerate(kinds) if other == kind] for kind in kinds}
    return {layer: free[kinds[layer]].pop(0) for layer in attending}


class _PerLayerHeads:
    """Builds the stock model, then each decoder layer again from its own counts."""

    def __init__(self, config):
        super().__init__(_stock(config))
        # The constructor settled these on the copy that it was given.
        for name in ("_attn_implementation", "_experts_implementation"):
            if hasattr(self.config, name):
                setattr(config, name, getattr(self.config, name))
        decoder = getattr(self, "model", self)  # or this is the decoder itself
        every = [_counts(config, index) for index in range(len(decoder.layers))]
        places = _places(self.config, [index for index, counts in enumerate(every) if counts[COUNTS[0]]])
        for index, counts in enumerate(every):
            attends, layer_config = index in places, copy.copy(self.config)
            for key, value in counts.items():
                if attends or key in WIDTHS:  # no attention can be made of no heads
                    setattr(layer_config, key, value)
            layer = type(decoder.layers[index])(layer_config, index)
            if attends:
                layer.self_attn.config = _LayerView(config, counts)
                layer.self_attn.layer_idx = places[index]
            else:
                _without_attention(layer, config)
            decoder.layers[index] = layer
        self.config = config
        decoder.config = config
        self.post_init()

    def _get_static_cache_init_shape(self):
        """Keys and values of another layer may lie in a layer's place: what transformers 5 would lay out by counts."""
        return None


@functools.cache
def _per_layer(stock_name):
    # With _auto_class save_pretrained copies this file beside the weights. Not every transformers sets it.
    kind = "AutoModelForCausalLM" if stock_name.endswith("ForCausalLM") else "AutoModel"
    own = {"__module__": __name__, "_auto_class": kind}
    return type(PREFIX + stock_name, (_PerLayerHeads, getattr(transformers, stock_name)), own)


@functools.cache
def _configuration(stock_name):
    # The stock class's own name: by it transformers compares a configuration with the one that a model declares.
    own = {"__module__": __name__, "_auto_class": "AutoConfig"}
    return type(stock_name, (_GlobalCounts, getattr(transformers, stock_name)), own)


def __getattr__(name):
    if name.startswith(PREFIX):
        return _per_layer(name.removeprefix(PREFIX))
    if name.endswith("Config"):
        return _configuration(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
