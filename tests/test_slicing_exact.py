"""Sliced equals masked: the promise that everything else rests on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CONFIGS, Shape, family_config, make_checkpoint, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import ParityError, UnsupportedModelError
from sspcompile.families import geometry_of
from sspcompile.model.cache import cache_of
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load, load_cut
from sspcompile.model.modules import down_proj
from sspcompile.model.text import with_continuations
from sspcompile.progress import silent
from sspcompile.proof.claim import Claim, written_repair
from sspcompile.proof.parity import BOUND
from sspcompile.proof.prove import prove
from sspcompile.proof.reload import respond
from sspcompile.proof.whole import compare_whole
from sspcompile.repair import fitting
from sspcompile.repair.biases import fit_biases
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import demand_place, is_linear, masked
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.mask import HeadMask, Kept, kept_of
from sspcompile.slicing.plan import make_plan, plan_counts
from sspcompile.slicing.sizes import EXPERT_STEP
from sspcompile.slicing.write import write_model

IDS = [(7 * n) % 250 for n in range(24)]
PROMPTS = [f"How much is {n} times {n + 3}?" for n in range(20)]


def channels_for(checkpoint: Checkpoint, width: float, layout: str, seed: int) -> tuple[tuple[int, ...], ...] | None:
    """Random channels of every layer's MLP, or of each expert, about `width` of them; None where all stay or there are
    none to cut.
    """
    g, rng = checkpoint.geometry, np.random.default_rng(seed)
    if width == 1 or not g.has_channels:
        return None
    step = 1 if g.mlps == 1 else EXPERT_STEP
    counts = np.full(g.layers, max(1, int(width * g.width) // step))
    if layout == "per-layer":
        counts = rng.integers(1, counts[0] + 1, g.layers)

    def row(count: int) -> tuple[int, ...]:
        of_each = [sorted(rng.permutation(g.width)[:count].tolist()) for _ in range(g.mlps)]
        return tuple(number * g.width + channel for number, kept in enumerate(of_each) for channel in kept)

    return tuple(map(row, step * counts))


def mask_for(checkpoint: Checkpoint, keep: float, layout: str, seed: int, width: float = 1.0) -> HeadMask:
    g = checkpoint.geometry
    scores = np.random.default_rng(seed).random((g.layers, g.heads))
    choice = choose(scores, g.kv_heads, keep, layout)
    channels = channels_for(checkpoint, width, layout, seed)
    return HeadMask(
        model="",
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout=layout,
        keep_requested=keep,
        keep_achieved=choice.ratio,
        scores=tuple(map(tuple, scores.tolist())),
        whitelist=(),
        criterion="random",
        scenario={},
        intermediate=g.width,
        channels=channels,
        experts=g.mlps if channels is not None else 1,
    )


def without(mask: HeadMask, *removed: int) -> HeadMask:
    """The mask with layers removed whole."""

    def rows(given):
        return tuple(() if layer in removed else row for layer, row in enumerate(given))

    channels = None if mask.channels is None else rows(mask.channels)
    return replace(mask, kept=rows(mask.kept), channels=channels, removed=removed)


def without_attention(mask: HeadMask, *silent: int) -> HeadMask:
    """The mask with the attention of layers removed whole."""
    rows = tuple(() if layer in silent else row for layer, row in enumerate(mask.kept))
    return replace(mask, kept=rows, layout="per-layer")


def assert_equal_to_masked(source: Path, out: Path, mask: HeadMask, *, custom: bool) -> None:
    loaded = load(source, fingerprint="", dtype=torch.float64)
    sliced = load_cut(out, dtype=torch.float64, trust_remote_code=custom)
    with in_float64():
        with masked(loaded, mask.units):
            expected = torch.cat(list(respond(loaded.model, [IDS], 12)), 1)
        logits = torch.cat(list(respond(sliced.model, [IDS], 12)), 1)
    assert (logits - expected).abs().max() <= BOUND * expected.abs().max()
    assert logits[:, len(IDS) - 1 :].argmax(-1).equal(expected[:, len(IDS) - 1 :].argmax(-1))


shapes = st.builds(
    Shape,
    layers=st.integers(1, 3),
    hidden=st.sampled_from([32, 48, 64]),
    kv_heads=st.integers(1, 4),
    group_size=st.integers(1, 3),
    head_dim=st.sampled_from([4, 8, 16]),
    bias=st.booleans(),
    tied=st.booleans(),
    shard_bytes=st.sampled_from([None, 20_000]),
    rope_scaling=st.booleans(),
)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@settings(max_examples=20)
@given(
    shape=shapes,
    keep=st.floats(0.3, 1.0),
    width=st.sampled_from([0.1, 0.5, 0.8, 1.0]),
    layout=st.sampled_from(["uniform", "per-layer"]),
    silent=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 99),
)
def test_sliced_model_equals_masked_model(family, tmp_path_factory, shape, keep, width, layout, silent, seed):
    folder = tmp_path_factory.mktemp("exact")
    shape = Shape(**{**shape.__dict__, "family": family})
    # A head count that does not divide hidden_size is only possible after the cut in Llama's own class.
    if family == "llama" and shape.hidden % (shape.kv_heads * shape.group_size):
        shape = Shape(**{**shape.__dict__, "hidden": 16 * shape.kv_heads * shape.group_size})
    keep = max(keep, 1 / (shape.kv_heads * shape.group_size))
    source = make_checkpoint(folder / "dense", shape, seed)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, keep, layout, seed, width)
    if layout == "per-layer" and not silent >= {*range(shape.layers)}:
        mask = without_attention(mask, *silent)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, folder / "cut", max_shard_bytes=30_000)
    assert_equal_to_masked(source, folder / "cut", mask, custom=plan.custom_code)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_mask_writes_byte_identical_tensors(family, dtype, tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family=family, dtype=dtype, shard_bytes=20_000))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 1.0, "uniform", 0))
    write_model(checkpoint, plan, tmp_path / "cut")
    before = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    written = (tmp_path / "cut").glob("*.safetensors")
    after = {name: tensor for file in written for name, tensor in load_file(file).items()}
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.view(torch.uint8).equal(after[name].view(torch.uint8)), name
    assert json.loads((tmp_path / "cut" / "config.json").read_text()) == checkpoint.config


def test_half_precision_weights_are_kept_bit_for_bit_where_rows_stay(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(dtype=torch.bfloat16))
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.5, "uniform", 1)
    write_model(checkpoint, make_plan(checkpoint, mask), tmp_path / "cut")
    dense, cut = load_file(source / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    for layer, kept in enumerate(mask.kept):
        rows = [row for head in kept for row in range(head * 8, head * 8 + 8)]
        name = f"model.layers.{layer}.self_attn."
        assert cut[name + "q_proj.weight"].equal(dense[name + "q_proj.weight"][rows])
        assert cut[name + "o_proj.weight"].equal(dense[name + "o_proj.weight"][:, rows])


def test_plan_sizes_are_what_the_files_have_to_the_byte(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="qwen2", layers=3, tied=True))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 2, width=0.7))
    write_model(checkpoint, plan, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.sliced.weight_bytes
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.sliced.parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=plan.custom_code)
    cache = cache_of(model(torch.tensor([IDS]), use_cache=True))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == plan.sliced.kv_bytes_per_token * len(IDS)


@pytest.mark.parametrize(("mlp", "width"), [(False, 1.0), (True, 1.0), (False, 0.6)])
@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_repaired_model_equals_its_oracle_in_a_fresh_process(family, mlp, width, tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family=family, hidden=64, kv_heads=4, head_dim=16, layers=3))
    checkpoint = Checkpoint(source)
    loaded = load(source, fingerprint="")
    mask = mask_for(checkpoint, 0.5, "per-layer", 3, width)
    texts = with_continuations(loaded, PROMPTS, 4)
    (repair,) = fit_repairs(loaded, [mask.units], texts, dtype=torch.float32, mlp=mlp)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut", replaced=repair.replaced(mask.units, plan.geometry))
    replaced = repair.replaced(mask.units, plan.geometry)
    claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code, replaced)
    # The oracle is rebuilt from the written files; it must be the one that was fitted.
    read_back = written_repair(claim)
    assert set(repair.down) == (set(repair.weights) if mlp or width < 1 else set())
    for fitted, found in ((repair.weights, read_back.weights), (repair.down, read_back.down)):
        assert fitted.keys() == found.keys()
        assert all(weight.equal(found[layer]) for layer, weight in fitted.items())
    assert prove(claim, [IDS, IDS[:5]], silent).holds


def test_parity_fails_for_a_model_that_is_not_the_masked_one(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=2, kv_heads=4))
    checkpoint = Checkpoint(source)
    mask, other = mask_for(checkpoint, 0.5, "per-layer", 3), mask_for(checkpoint, 0.5, "per-layer", 4)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    claim = Claim(checkpoint, other, tmp_path / "cut", plan.custom_code)
    assert not compare_whole(claim, [IDS]).holds
    with pytest.raises(ParityError, match="is not what the mask leaves"):
        prove(claim, [IDS], silent)


def residual_error(loaded, kept, batches, fitted) -> float:
    """Squared distance of the last residual stream from the dense model's, over real tokens."""
    total = 0.0
    for batch in batches:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.inference_mode():
            dense = loaded.model.model(**inputs).last_hidden_state
            with masked(loaded, kept, fitted):
                cut = loaded.model.model(**inputs).last_hidden_state
        total += float((dense - cut)[batch.attention_mask.bool()].square().sum())
    return total


def test_repair_brings_the_residual_closer_on_its_own_texts(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(hidden=64, kv_heads=4, head_dim=16, layers=3))
    loaded = load(source, fingerprint="")
    checkpoint = Checkpoint(source)
    kept = mask_for(checkpoint, 0.5, "per-layer", 4).units
    batches = with_continuations(loaded, PROMPTS, 4)
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)

    def error(fitted) -> float:
        return residual_error(loaded, kept, batches, fitted)

    (both,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32, mlp=True)
    assert error(both) < error(repair) < 0.7 * error(None)
    assert loaded.model.model.layers[0].self_attn.o_proj.weight.shape == (64, 128)


def test_repair_of_narrower_mlps_brings_the_residual_closer(tmp_path):
    """Channels alone were removed: attention is refitted to what they changed, from the second layer on."""
    source = make_checkpoint(tmp_path / "dense", Shape(hidden=64, kv_heads=4, head_dim=16, layers=3))
    loaded, checkpoint = load(source, fingerprint=""), Checkpoint(source)
    kept = mask_for(checkpoint, 1.0, "uniform", 4, width=0.6).units
    batches = with_continuations(loaded, PROMPTS, 4)
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)
    assert set(repair.down) == {0, 1, 2} and set(repair.weights) == {1, 2}
    plain = residual_error(loaded, kept, batches, None)
    assert residual_error(loaded, kept, batches, repair) < 0.7 * plain


def mean_output(loaded, batches, projection: torch.nn.Module) -> torch.Tensor:
    """Mean over real tokens of what a projection puts out, [hidden]."""
    seen: list[torch.Tensor] = []
    handle = projection.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.inference_mode():
        for batch in batches:
            loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    return torch.cat([x[batch.attention_mask.bool()] for x, batch in zip(seen, batches, strict=True)]).mean(0)


@pytest.mark.parametrize(("family", "bias"), [("qwen2", False), ("qwen3", True)])
def test_flap_bias_restores_the_mean_that_removed_heads_put_out(family, bias, tmp_path):
    """In the first layer exactly: its inputs do not depend on what was removed elsewhere."""
    loaded = load(make_checkpoint(tmp_path / "dense", Shape(family=family, bias=bias, kv_heads=4)), fingerprint="")
    kept = np.ones((2, 8), dtype=bool)
    kept[0, 2:6] = False
    batches = with_continuations(loaded, PROMPTS, 4)
    (repair,) = fit_biases(loaded, [Kept(kept)], batches, dtype=torch.float32)
    assert set(repair.biases) == {0} and not repair.weights
    projection = loaded.layers[0].self_attn.o_proj
    before, bias_before = mean_output(loaded, batches, projection), projection.bias
    with masked(loaded, Kept(kept)):
        assert not torch.allclose(mean_output(loaded, batches, projection), before, atol=1e-3)
    with masked(loaded, Kept(kept), repair):
        torch.testing.assert_close(mean_output(loaded, batches, projection), before, atol=1e-5, rtol=1e-4)
    assert projection.bias is bias_before


def test_flap_bias_is_written_where_o_proj_has_one_and_equals_its_oracle(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="qwen3", bias=True, kv_heads=4, layers=3))
    checkpoint, loaded = Checkpoint(source), load(source, fingerprint="")
    mask = mask_for(checkpoint, 0.5, "per-layer", 3)
    (repair,) = fit_biases(loaded, [mask.units], with_continuations(loaded, PROMPTS, 4), dtype=torch.float32)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut", replaced=repair.replaced(mask.units, plan.geometry))
    claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code, repair.replaced(mask.units, plan.geometry))
    read_back = written_repair(claim)
    assert not read_back.weights and read_back.biases.keys() == repair.biases.keys()
    assert all(bias.equal(read_back.biases[layer]) for layer, bias in repair.biases.items())
    assert all(prove(claim, [IDS, IDS[:5]], silent, layerwise=way).holds for way in (False, True))
    assert not compare_whole(replace(claim, refitted={}), [IDS]).holds


@pytest.mark.parametrize(("family", "bias"), [("starcoder2", True), ("llama", True), ("qwen3", True), ("llama", False)])
def test_flap_bias_of_channels_stands_where_down_proj_has_one_and_equals_its_oracle(family, bias, tmp_path):
    """With `anywhere` it can be judged in every model: the first MLP puts out on average what it did."""
    source = save_random(tmp_path / "dense", family_config(family, bias=bias))
    checkpoint, loaded = Checkpoint(source), load(source, fingerprint="")
    texts, mask = with_continuations(loaded, PROMPTS, 4), mask_for(checkpoint, 1.0, "per-layer", 3, width=0.6)
    (repair,) = fit_biases(loaded, [mask.units], texts, dtype=torch.float32)
    (everywhere,) = fit_biases(loaded, [mask.units], texts, dtype=torch.float32, anywhere=True)
    has_place = family != "qwen3" and bias
    assert not repair.biases and set(repair.down_biases) == ({0, 1, 2} if has_place else set())
    projection = down_proj(loaded.layers[0])
    before, bias_before = mean_output(loaded, texts, projection), projection.bias
    with masked(loaded, mask.units):
        assert not torch.allclose(mean_output(loaded, texts, projection), before, atol=1e-2)
    with masked(loaded, mask.units, everywhere):
        torch.testing.assert_close(mean_output(loaded, texts, projection), before, atol=1e-4, rtol=1e-3)
    assert projection.bias is bias_before
    if has_place:
        plan, replaced = make_plan(checkpoint, mask), repair.replaced(mask.units, checkpoint.geometry)
        write_model(checkpoint, plan, tmp_path / "cut", replaced=replaced)
        claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code, replaced)
        assert written_repair(claim).down_biases.keys() == repair.down_biases.keys()
        assert all(prove(claim, [IDS, IDS[:5]], silent, layerwise=way).holds for way in (False, True))
        assert not compare_whole(replace(claim, refitted={}), [IDS]).holds


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
def test_flap_bias_is_refused_where_o_proj_has_no_bias(family, tmp_path):
    geometry = Checkpoint(make_checkpoint(tmp_path, Shape(family=family))).geometry
    with pytest.raises(UnsupportedModelError, match=r"has no bias.*--repair least-squares"):
        demand_place(geometry, "flap-bias")


@pytest.mark.parametrize("family", ["starcoder2", "mixtral", "gemma2"])
def test_refitting_the_mlp_is_refused_where_it_has_no_plain_down_proj(family):
    geometry = geometry_of(family_config(family).to_dict())
    with pytest.raises(UnsupportedModelError, match=r"has no down_proj.*--repair least-squares"):
        demand_place(geometry, "least-squares-mlp")


@pytest.mark.parametrize(("mlp", "width"), [(False, 1.0), (True, 1.0), (False, 0.6)])
def test_a_residual_multiplier_is_part_of_the_repair(mlp, width, tmp_path):
    config = family_config("granite", layers=2)
    config.residual_multiplier = 0.3
    source = save_random(tmp_path / "dense", config, seed=1)
    checkpoint, loaded = Checkpoint(source), load(source, fingerprint="")
    kept = mask_for(checkpoint, 0.5, "per-layer", 3, width).units
    batches = with_continuations(loaded, PROMPTS, 2)
    plain = residual_error(loaded, kept, batches, None)
    (fitted,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32, mlp=mlp)
    assert residual_error(loaded, kept, batches, fitted) < 0.7 * plain


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("mlp", "width"), [(False, 1.0), (True, 1.0), (False, 0.6)])
def test_masks_repaired_together_are_repaired_as_if_alone(mlp, width, rounds, tmp_path, monkeypatch):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=3, kv_heads=4))
    checkpoint, loaded = Checkpoint(source), load(source, fingerprint="")
    masks = [mask_for(checkpoint, 0.5, "per-layer", seed, width).units for seed in range(3)]
    # Nothing cut in the first layer: this one is the dense model until there.
    masks[1].heads[0] = True
    if masks[1].channels is not None:
        masks[1].channels[0] = True
    batches = with_continuations(loaded, PROMPTS, 2)
    alone = [next(fit_repairs(loaded, [kept], batches, dtype=torch.float32, mlp=mlp)) for kept in masks]
    if rounds > 1:
        monkeypatch.setattr(fitting, "ROUND_BYTES", 1)
    steps = []
    together = list(
        fit_repairs(loaded, masks, batches, dtype=torch.float32, mlp=mlp, progress=lambda *step: steps.append(step))
    )
    assert steps == [(step + 1, 3 * rounds) for step in range(3 * rounds)]
    assert 0 not in together[1].weights and 0 not in together[1].down
    for one, other in zip(alone, together, strict=True):
        for mine, theirs in ((one.weights, other.weights), (one.down, other.down)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[layer], theirs[layer]) for layer in mine)


def test_no_refit_where_a_norm_stands_behind_o_proj():
    assert not is_linear(geometry_of(family_config("gemma2").to_dict()))
    assert is_linear(geometry_of(family_config("granite").to_dict()))


def test_llama_head_count_that_does_not_divide_hidden_loads_with_a_stock_class(tmp_path):
    shape = Shape(family="llama", hidden=64, kv_heads=4, group_size=1, head_dim=16)
    source = make_checkpoint(tmp_path / "dense", shape)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.75, "uniform", 5)
    plan = make_plan(checkpoint, mask)
    assert {heads for heads, _ in plan.counts} == {3}
    write_model(checkpoint, plan, tmp_path / "cut")
    assert not (tmp_path / "cut" / "modeling_sspcompile.py").exists()
    assert_equal_to_masked(source, tmp_path / "cut", mask, custom=False)


def test_per_layer_model_raises_without_trust_remote_code_instead_of_loading_wrongly(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=3, kv_heads=4))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 6))
    assert plan.custom_code
    write_model(checkpoint, plan, tmp_path / "cut")
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=False)


def test_per_layer_model_survives_saving_attention_switching_static_cache_and_beams(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="qwen3", layers=3, kv_heads=4))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 7))
    write_model(checkpoint, plan, tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        expected = model(ids).logits
        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
        assert again(ids).logits.equal(expected)
        again.set_attn_implementation("eager")
        assert again.model.layers[1].self_attn.config._attn_implementation == "eager"
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)
    plain = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    greedy = model.generate(ids, **plain)
    assert greedy.equal(model.generate(ids, cache_implementation="static", **plain))
    assert model.generate(ids, num_beams=3, **plain).shape[1] > ids.shape[1]


def test_left_padding_does_not_change_what_a_cut_model_writes(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=3, kv_heads=4))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.6, "per-layer", 8))
    write_model(checkpoint, plan, tmp_path / "cut")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    short, long = IDS[:9], IDS
    padded = torch.tensor([[258] * (len(long) - len(short)) + short, long])
    mask = (padded != 258).long()
    together = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    alone = model.generate(torch.tensor([short]), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert together[0, len(long) :].tolist() == alone[0, len(short) :].tolist()


def test_plan_from_the_configuration_alone_has_the_sizes_of_the_real_cut(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="llama", kv_heads=4))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((source / "config.json").read_bytes())
    full, alone = Checkpoint(source), Checkpoint(bare)
    with_weights = make_plan(full, mask_for(full, 0.5, "uniform", 9))
    by_counts = plan_counts(alone, 0.5, "uniform")
    assert by_counts.dense == with_weights.dense
    assert by_counts.sliced.parameters <= by_counts.dense.parameters
    assert sum(h for h, _ in by_counts.counts) <= 0.5 * full.geometry.total_heads
