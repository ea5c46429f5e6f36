"""The network: a stock Qwen2 model, and a lean forward pass over its own weights for training.

The lean pass gives the logits of the stock class (a test holds them together). It needs no masks, no caches and no
output matrix at positions that have no loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from training.tokenizer import MAX_LENGTH

LAYERS, HIDDEN, INTERMEDIATE = 8, 128, 256
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 16
HALF_ACTIVE = 0.02
"""Share of the stream's norm that a head writes when it counts as half active."""
ROPE_THETA = 10_000.0
FIRST_MATCHING_LAYER = 2
MATCH_SCALE, OUTPUT_LIKENESS = 1.0, 0.3


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model for this tokenizer; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.03,
    )
    model = Qwen2ForCausalLM(config).float()
    _mimic_matching(model)
    return model


@torch.no_grad()
def _mimic_matching(model: Qwen2ForCausalLM) -> None:
    """Starts heads where trained ones end up (mimetic initialisation, Trockman and Kolter, 2023).

    Queries resemble keys, so that a token finds its earlier occurrence, and outputs resemble values, so that what is
    moved stays recognisable. Without it looking things up in the prompt takes far longer to emerge.
    """
    group = HEADS // KV_HEADS
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for head in range(KV_HEADS):
            rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
            value = nn.init.orthogonal_(torch.empty(HEAD_DIM, HIDDEN))
            key = nn.init.orthogonal_(torch.empty(HEAD_DIM, HIDDEN))
            attention.v_proj.weight[rows] = value
            for query in range(head * group, (head + 1) * group):
                columns = slice(query * HEAD_DIM, (query + 1) * HEAD_DIM)
                attention.o_proj.weight[:, columns] = OUTPUT_LIKENESS * value.T
                if index >= FIRST_MATCHING_LAYER:
                    attention.q_proj.weight[columns] = MATCH_SCALE * key
            if index >= FIRST_MATCHING_LAYER:
                attention.k_proj.weight[rows] = MATCH_SCALE * key


def _rotary(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [length, head_dim]."""
    inverse = 1.0 / ROPE_THETA ** (torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
    angles = torch.outer(torch.arange(length, device=device).float(), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def hidden_states(
    model: Qwen2ForCausalLM, tokens: Tensor, keep: Tensor | None = None, real: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Residual streams after each layer and the normed last one, each [rows, length, hidden]; and how active heads are.

    `tokens` [rows, length] are padded on the right, where causal attention makes padding harmless. `keep`
    [layers, heads], if given, scales the output of each head before o_proj. A head is active in a row by
    r / (r + HALF_ACTIVE), r being the root mean square, over the `real` [rows, length] tokens, of the norm of its
    output behind o_proj over the norm of the stream that it joins. The last result is the sum over layers of the square
    of how many heads are active, mean over rows; zero without `real`.
    """
    rows, length = tokens.shape
    body = model.model
    eps = model.config.rms_norm_eps
    cos, sin = _rotary(length, tokens.device)
    x = body.embed_tokens(tokens)
    states, activity = [], x.new_zeros(())
    for index, layer in enumerate(body.layers):
        attention, mlp = layer.self_attn, layer.mlp
        y = F.rms_norm(x, (HIDDEN,), layer.input_layernorm.weight, eps)
        weight = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        bias = torch.cat((attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias))
        # [rows, length, heads, head_dim] -> [rows, heads, length, head_dim]
        qkv = F.linear(y, weight, bias).view(rows, length, HEADS + 2 * KV_HEADS, HEAD_DIM).transpose(1, 2)
        qk = _rotate(qkv[:, : HEADS + KV_HEADS], cos, sin)
        key = qk[:, HEADS:].repeat_interleave(HEADS // KV_HEADS, dim=1)
        value = qkv[:, HEADS + KV_HEADS :].repeat_interleave(HEADS // KV_HEADS, dim=1)
        out = F.scaled_dot_product_attention(qk[:, :HEADS], key, value, is_causal=True)
        if keep is not None:
            out = out * keep[index].view(1, HEADS, 1, 1)
        x = x + F.linear(out.transpose(1, 2).reshape(rows, length, HEADS * HEAD_DIM), attention.o_proj.weight)
        if real is not None:
            share = _norms(out, attention.o_proj.weight) / x.detach().norm(dim=-1).unsqueeze(1)
            counted = real.unsqueeze(1)
            typical = ((share.square() * counted).sum(-1) / counted.sum(-1)).sqrt()
            active = typical / (typical + HALF_ACTIVE)
            activity = activity + active.sum(1).square().mean()
        y = F.rms_norm(x, (HIDDEN,), layer.post_attention_layernorm.weight, eps)
        gate, up = F.linear(y, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, mlp.down_proj.weight)
        states.append(x)
    return states, F.rms_norm(x, (HIDDEN,), body.norm.weight, eps), activity


def _norms(outputs: Tensor, weight: Tensor) -> Tensor:
    """Norm of what o_proj makes of each head's output [rows, heads, length, head_dim]: [rows, heads, length]."""
    parts = weight.view(HIDDEN, HEADS, HEAD_DIM)
    gram = torch.einsum("ohd,ohe->hde", parts, parts)
    # Without the small term the gradient at zero is infinite.
    return ((outputs @ gram * outputs).sum(-1) + 1e-8).sqrt()
