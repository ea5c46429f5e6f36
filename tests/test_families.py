"""Every row of the family table: a small random model, cut both ways, equals its masked self in its stock class."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from builders import FAMILY_SETTINGS, family_config, save_random
from safetensors.torch import load_file
from test_slicing_exact import IDS, PROMPTS, assert_equal_to_masked, mask_for
from transformers import AutoModel, AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint
from sspcompile.criteria.measuring import measure
from sspcompile.errors import UnsupportedModelError
from sspcompile.families import FAMILIES
from sspcompile.model.hooks import answered, input_of, recorded_calls
from sspcompile.model.loading import load
from sspcompile.model.modules import attention, layer_output, o_proj, residual_norm
from sspcompile.model.text import continued
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

BIASED = {family for family, settings in FAMILY_SETTINGS.items() if "bias" in settings}
MOE = {family for family, row in FAMILIES.items() if row.experts}


def test_every_family_has_a_test_row():
    assert set(FAMILY_SETTINGS) == set(FAMILIES)


def variants():
    for family in FAMILIES:
        for layout in ("uniform", "per-layer"):
            yield family, layout, False, 1.0
            yield family, layout, False, 0.6
            if family in BIASED:
                yield family, layout, True, 0.6


def uniform_half(checkpoint, width=1.0):
    """4 of 8 heads in every layer: a count that divides hidden_size, which some stock classes insist on."""
    masks = (mask_for(checkpoint, 0.5, "uniform", seed, width) for seed in range(100))
    return next(mask for mask in masks if mask.keep_achieved == 0.5)


@pytest.mark.parametrize(("family", "layout", "bias", "width"), list(variants()))
def test_cut_of_a_family_equals_its_masked_self(family, layout, bias, width, tmp_path):
    config = family_config(family, bias=bias, tied=bias)
    source = save_random(tmp_path / "dense", config, seed=1)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, layout, 3, width) if layout == "per-layer" else uniform_half(checkpoint, width)
    plan = make_plan(checkpoint, mask)
    assert plan.custom_code == (layout == "per-layer")
    write_model(checkpoint, plan, tmp_path / "cut", max_shard_bytes=60_000)
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=plan.custom_code)
    written = {k: v for file in (tmp_path / "cut").glob("*.safetensors") for k, v in load_file(file).items()}
    dense = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    assert sum(tensor.nbytes for tensor in written.values()) == plan.sliced.weight_bytes
    assert {k: tuple(v.shape) for k, v in written.items()} == {k: shape for k, (shape, _) in plan.tensors.items()}
    cut = ("self_attn.",) if mask.channels is None else ("self_attn.", "mlp.", ".experts.")
    untouched = [name for name in dense if not any(part in name for part in cut) or "norm" in name]
    assert all(written[name].equal(dense[name]) for name in untouched)
    assert (family in MOE and mask.channels is None) == any(".experts." in name for name in untouched)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_residual_norm_reads_the_stream_after_attention(family, tmp_path):
    """Its input is the layer's input plus what attention adds, so closing the MLP makes it the layer's output."""
    loaded = load(save_random(tmp_path / "dense", family_config(family, layers=2), seed=2), fingerprint="")
    layer, seen, stream = loaded.layers[0], [], []
    hooks = [
        residual_norm(layer).register_forward_pre_hook(lambda _module, args: seen.append(args[0])),
        layer.register_forward_hook(lambda _module, _args, out: stream.append(out[0] if type(out) is tuple else out)),
        layer.mlp.register_forward_hook(lambda _module, _args, out: out * 0),
    ]
    with torch.inference_mode():
        loaded.model(torch.tensor([IDS]))
    for hook in hooks:
        hook.remove()
    # Gemma's norm after the MLP maps zero to zero.
    assert torch.allclose(seen[0], stream[0], atol=1e-6)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_layer_goes_on_from_its_attention_as_if_that_had_run(family, tmp_path):
    loaded = load(save_random(tmp_path / "dense", family_config(family, layers=2), seed=2), fingerprint="")
    ids = torch.tensor([IDS, IDS[::-1]])
    with torch.inference_mode(), recorded_calls(loaded.layers) as calls:
        loaded.model(ids, use_cache=False)
    for layer, call in zip(loaded.layers, calls.values(), strict=True):
        with torch.inference_mode():
            with input_of(o_proj(layer), "o_proj") as seen:
                expected = layer_output(layer(call.hidden, *call.rest, **call.options))
            with answered(attention(layer), o_proj(layer)(seen[0])):
                found = layer_output(layer(call.hidden, *call.rest, **call.options))
            again = layer_output(layer(call.hidden, *call.rest, **call.options))
        assert found.equal(expected) and again.equal(expected)
        with answered(attention(layer), torch.zeros_like(call.hidden)), torch.inference_mode():
            assert not layer_output(layer(call.hidden, *call.rest, **call.options)).equal(expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_per_token_are_what_torch_counts(family, tmp_path):
    """One token without context: the matrices alone, and attention over itself."""
    from torch.utils.flop_counter import FlopCounterMode

    source = save_random(tmp_path / "dense", family_config(family), seed=2)
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 1.0, "uniform", 0))
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([IDS[:1]]))
    counted = counter.get_total_flops()
    rotary = 2 * len(IDS) * plan.geometry.head_dim * plan.geometry.layers
    if family not in MOE:  # how experts are multiplied differs by implementation
        expected = plan.dense.flops_per_token + plan.dense.flops_per_position
        assert expected <= counted <= expected + rotary
    assert plan.dense.flops_per_token > 2 * plan.geometry.vocab * plan.geometry.hidden


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.hidden_must_divide and not row.hosts])
def test_uniform_cut_that_no_class_holds_is_refused_and_the_per_layer_one_offered(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, group_size=1), seed=1)
    checkpoint = Checkpoint(source)
    with pytest.raises(UnsupportedModelError, match=r"3 heads at hidden_size 64.*--layout per-layer"):
        make_plan(checkpoint, mask_for(checkpoint, 0.75, "uniform", 3))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_per_layer_cut_is_refused_without_its_code(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family), seed=1)
    checkpoint = Checkpoint(source)
    write_model(checkpoint, make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 3)), tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["per_layer_config"]
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=False)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_per_layer_class_works_with_every_cache_beams_padding_saving_and_compilation(family, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family), seed=1)
    checkpoint = Checkpoint(source)
    write_model(checkpoint, make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 3, 0.6)), tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", trust_remote_code=True, attn_implementation=FAMILIES[family].attention
    ).eval()
    ids = torch.tensor([IDS])
    plain = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
    }
    greedy = model.generate(ids, **plain)
    assert greedy.equal(model.generate(ids, cache_implementation="static", **plain))
    assert greedy.equal(model.generate(ids, use_cache=False, **plain))
    assert model.generate(ids, num_beams=3, **plain).shape == greedy.shape
    padded = torch.tensor([[258] * 15 + IDS[:9], IDS])
    mask = (torch.arange(24) >= torch.tensor([[15], [0]])).long()
    together = model.generate(padded, **{**plain, "attention_mask": mask})
    alone = model.generate(ids[:, :9], **{**plain, "attention_mask": torch.ones_like(ids[:, :9])})
    assert together[0, 24:].tolist() == alone[0, 9:].tolist()
    with torch.inference_mode():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(ids).logits, expected, atol=1e-4)
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "again", trust_remote_code=True, attn_implementation=FAMILIES[family].attention
        ).eval()
        assert again(ids).logits.equal(expected)
        again.set_attn_implementation("eager")
        assert again.model.layers[1].self_attn.config._attn_implementation == "eager"
        if family not in MOE:
            inner = AutoModel.from_pretrained(
                tmp_path / "cut", trust_remote_code=True, attn_implementation=FAMILIES[family].attention
            ).eval()
            assert inner(ids).last_hidden_state.equal(model.model(ids).last_hidden_state)
        scale = float(np.abs(expected.numpy()).max())
        assert torch.allclose(again(ids).logits, expected, atol=1e-5 * scale)


def test_long_positions_of_phi3_hold_no_other_head_count_in_the_stock_class(tmp_path):
    config = family_config("phi3", hidden=128)
    config.original_max_position_embeddings = 64
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    source = save_random(tmp_path / "dense", config, seed=1)
    checkpoint = Checkpoint(source)
    with pytest.raises(UnsupportedModelError, match="--layout per-layer"):
        make_plan(checkpoint, uniform_half(checkpoint))
    mask = mask_for(checkpoint, 0.6, "per-layer", 3)
    write_model(checkpoint, make_plan(checkpoint, mask), tmp_path / "cut")
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=True)


@pytest.mark.parametrize("name", ["magnitude", "dass", "llm-pruner", "wanda", "fisher"])
def test_head_scores_of_a_fused_projection_are_those_of_its_parts(name, tmp_path):
    """A Phi-3 and the Mistral with the same weights, its qkv_proj taken apart, have the same scores."""
    fused = load(save_random(tmp_path / "fused", family_config("phi3"), seed=2), fingerprint="")
    config = family_config("mistral")
    config.rms_norm_eps = fused.model.config.rms_norm_eps
    apart = load(save_random(tmp_path / "apart", config, seed=2), fingerprint="")
    state = dict(fused.model.state_dict())
    for index in range(fused.geometry.layers):
        prefix = f"model.layers.{index}."
        q, k, v = state.pop(prefix + "self_attn.qkv_proj.weight").split([128, 64, 64])
        gate, up = state.pop(prefix + "mlp.gate_up_proj.weight").chunk(2)
        state |= {f"{prefix}self_attn.{part}_proj.weight": value for part, value in zip("qkv", (q, k, v), strict=True)}
        state |= {prefix + "mlp.gate_proj.weight": gate, prefix + "mlp.up_proj.weight": up}
    apart.model.load_state_dict(state)
    scores = [measure(model, name, continued(model, PROMPTS[:6], 2)).values for model in (fused, apart)]
    assert np.abs(scores[0]).max() > 0
    np.testing.assert_allclose(*scores, rtol=1e-3, atol=1e-6 * np.abs(scores[0]).max())
