# Copyright the sspcompile authors. Licensed under the Apache License, Version 2.0.
"""Decoder classes whose numbers of query and key/value heads differ by layer (`per_layer_config` in config.json).

Only the sizes of the projections differ from the stock classes; every forward is inherited. Works with transformers
4.57 and 5.
"""

import copy

from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3ForCausalLM


def _stock(config):
    """The same configuration without per-layer entries, so that stock constructors accept it."""
    plain = copy.copy(config)
    if isinstance(getattr(config, "per_layer_config", None), dict):  # transformers 4.57: an ordinary attribute
        plain.per_layer_config = None
    else:
        plain.__dict__.pop("_heterogeneity_spec", None)
    return plain


def _layer_config(config, layer):
    """Configuration of one layer."""
    entries = config.per_layer_config
    plain = _stock(config)
    if isinstance(entries, dict):
        for key, value in entries[str(layer)].items():
            setattr(plain, key, value)
    else:
        plain.num_attention_heads = entries[layer].num_attention_heads
        plain.num_key_value_heads = entries[layer].num_key_value_heads
    return plain


class _PerLayerHeads:
    """Builds the stock model, then each decoder layer again from its own configuration."""

    _layer_class = None

    def __init__(self, config):
        super().__init__(_stock(config))
        # The constructor settles the attention implementation on the configuration that it was given.
        config._attn_implementation = self.config._attn_implementation
        for index in range(config.num_hidden_layers):
            layer = self._layer_class(_layer_config(config, index), index)
            # Attention reads its implementation here at every call; a private copy would not follow
            # set_attn_implementation.
            layer.self_attn.config = config
            self.model.layers[index] = layer
        self.config = config
        self.model.config = config
        self.post_init()


class PerLayerMistralForCausalLM(_PerLayerHeads, MistralForCausalLM):
    _layer_class = MistralDecoderLayer


class PerLayerQwen2ForCausalLM(_PerLayerHeads, Qwen2ForCausalLM):
    _layer_class = Qwen2DecoderLayer


class PerLayerQwen3ForCausalLM(_PerLayerHeads, Qwen3ForCausalLM):
    _layer_class = Qwen3DecoderLayer
