"""What is captured is what the method names: the residual after attention, and true heads at o_proj's input."""

import numpy as np
import pytest
import torch
from test_prepare_tools import tiny

from sspcompile.errors import RunError
from sspcompile.model import capture, text

PROMPTS = ["tell me about acid ?", "what is the sum of a prime and a root ?", "war"]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]


def residuals_by_hand(loaded, prompt):
    """Per layer: layer input + self_attn output, one unpadded sequence, [L, T, d]."""
    ids = torch.tensor([text.sentences(loaded.tokenizer, [prompt], 99)[0].ids])
    inputs, attended = [], []
    handles = [y.register_forward_pre_hook(lambda _m, a: inputs.append(a[0])) for y in loaded.layers]
    handles += [y.self_attn.register_forward_hook(lambda _m, _a, o: attended.append(o[0])) for y in loaded.layers]
    loaded.model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack([(x + a)[0] for x, a in zip(inputs, attended, strict=True)])


@pytest.mark.parametrize("family", FAMILIES)
def test_fault_probe_input_is_the_residual_after_attention_not_the_attention_output(family):
    loaded = tiny(family)
    found = capture.features(loaded, PROMPTS)
    expected = torch.stack([residuals_by_hand(loaded, p).mean(1) for p in PROMPTS])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
    assert found.dtype == np.float32


def test_fault_pooling_does_not_see_padding():
    loaded = tiny()
    together = capture.features(loaded, PROMPTS)
    alone = np.concatenate([capture.features(loaded, [p]) for p in PROMPTS])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    loaded.tokenizer.pad_token = "siege"
    np.testing.assert_allclose(capture.features(loaded, PROMPTS), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_states_that_overflow_are_told_with_what_to_compute_in(value):
    loaded = tiny()
    loaded.layers[1].self_attn.o_proj.weight[0] = value  # as 16 bits overflow to
    with pytest.raises(RunError, match=r"hidden states hold NaN or infinite values.*--dtype float32"):
        capture.features(loaded, PROMPTS)
    assert np.isfinite(capture.features(loaded, PROMPTS, layers=[0])).all()


def test_pool_ignores_whatever_stands_in_the_padding():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [float("nan"), float("inf")]]])
    assert capture.pool(values, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 3.0]]


def test_fault_pooling_is_fp32_for_half_precision_models():
    values = torch.full((1, 4096, 1), 1.0, dtype=torch.float16)
    values[0, 0] = 60000.0
    assert capture.pool(values, torch.ones(1, 4096)).item() == pytest.approx((60000 + 4095) / 4096, rel=1e-6)


def test_features_come_back_in_the_order_of_the_prompts():
    loaded = tiny()
    forward, backward = capture.features(loaded, PROMPTS), capture.features(loaded, PROMPTS[::-1])
    np.testing.assert_allclose(forward, backward[::-1], rtol=1e-5, atol=1e-5)


def test_chosen_layers_are_those_of_a_whole_pass_and_it_ends_at_the_last_of_them():
    loaded, ran = tiny(layers=4), []
    whole = capture.features(loaded, PROMPTS)
    for index, layer in enumerate(loaded.layers):
        layer.register_forward_pre_hook(lambda _m, _a, index=index: ran.append(index))
    np.testing.assert_array_equal(capture.features(loaded, PROMPTS, layers=[0, 2]), whole[:, [0, 2]])
    assert ran == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_o_proj_input_times_o_proj_is_the_attention_output_on_a_two_head_model(family):
    loaded = tiny(family, heads=2, kv_heads=1, hidden=16, head_dim=6, o_bias=True)
    (batch,) = text.encode(loaded, PROMPTS[:1])
    heads, attended = {}, []
    handles = [y.self_attn.register_forward_hook(lambda _m, _a, o: attended.append(o[0])) for y in loaded.layers]
    capture.capture(loaded, batch, lambda layer, x: heads.update({layer: x.clone()}))
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(loaded.layers):
        projection = layer.self_attn.o_proj
        assert heads[index].shape[-1] == 12
        first = heads[index][..., :6] @ projection.weight[:, :6].T
        second = heads[index][..., 6:] @ projection.weight[:, 6:].T
        torch.testing.assert_close(first + second + projection.bias, attended[index], rtol=1e-5, atol=1e-5)


def test_fault_a_hook_that_does_not_fire_is_an_error_and_not_a_fallback():
    loaded = tiny()
    layer = loaded.layers[1]
    norm = layer.post_attention_layernorm
    layer.forward_norm = norm

    def bypass(hidden, **options):
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
        hidden = hidden + attended
        return hidden + layer.mlp(norm.forward(hidden))  # not called as a module

    layer.forward = bypass
    with pytest.raises(RunError, match=r"layers \[1\] was never called"):
        capture.features(loaded, PROMPTS)


def test_fault_a_hook_without_positional_input_is_an_error():
    module = torch.nn.Identity()
    with pytest.raises(RunError, match="without a positional"), capture.reading([module], "norm", lambda _i, _x: None):
        module(input=torch.zeros(1))


def test_hooks_are_gone_after_an_error():
    loaded = tiny()
    (batch,) = text.encode(loaded, PROMPTS[:1])

    def fail(_layer, _x):
        raise RunError("stop")

    with pytest.raises(RunError):
        capture.capture(loaded, batch, fail)
    assert not any(m._forward_pre_hooks for m in loaded.model.modules())
