"""One test per fault of the released research code, outside `prepare` (test_prepare_*.py has the others)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from safetensors.torch import load_file
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families import geometry_of
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load
from sspcompile.prepare.recogniser import Recogniser
from sspcompile.prepare.toolkit import Toolkit
from sspcompile.select.budget import keep_from_strength
from sspcompile.select.mixture import Mixture, head_scores, mixture_of
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

LAYERS, HEADS, DOMAINS, HIDDEN = 2, 4, 3, 5


def recogniser(temperature: float = 1.0) -> Recogniser:
    """Reads one layer, whose first features are the logits of the domains and of "none of them"."""
    return Recogniser(
        layers=np.array([1]),
        mean=np.zeros((1, HIDDEN)),
        scale=np.ones((1, HIDDEN)),
        weight=np.eye(DOMAINS + 1, HIDDEN)[None],
        bias=np.zeros(DOMAINS + 1),
        log_temperature=np.log([temperature]),
        unknown_line=np.array([0.5]),
    )


def toolkit_with(**changes) -> Toolkit:
    rng = np.random.default_rng(0)
    values = {
        "fingerprint": "f",
        "domains": ("a", "b", "c"),
        "axes": np.eye(DOMAINS, HIDDEN),
        "gram": np.eye(DOMAINS),
        "recogniser": recogniser(),
        "directions": None,
        "importance": {"fisher": rng.random((LAYERS, HEADS, DOMAINS))},
        "spread": {"fisher": np.ones((LAYERS, HEADS, DOMAINS))},
        "whitelist_p": np.ones((LAYERS, HEADS)),
        "whitelist": np.zeros((LAYERS, HEADS), dtype=bool),
        "meta": {},
    }
    return Toolkit(**{**values, **changes})


def features(*logits: tuple[float, float, float, float]) -> np.ndarray:
    """One prompt per argument, of which recognition says these logits, the last one for no domain: [N, 1, d]."""
    return np.array([[(*values, 0.0)] for values in logits], dtype=np.float32)


def test_fault_masking_is_of_heads_and_not_of_blocks_of_the_attention_output(tmp_path):
    """Two heads of 4 on a hidden size of 6: closing head 0 leaves exactly head 1's product with its own columns."""
    shape = Shape(family="llama", layers=1, hidden=6, kv_heads=1, group_size=2, head_dim=4)
    loaded = load(make_checkpoint(tmp_path / "dense", shape), fingerprint="")
    attention = loaded.layers[0].self_attn
    seen = {}
    ids = torch.tensor([[1, 2, 3]])
    keep = attention.o_proj.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], out=out))
    with torch.inference_mode(), head_gates(loaded, torch.tensor([[0.0, 1.0]])):
        loaded.model(ids)
    keep.remove()
    capture = {}
    handle = attention.o_proj.register_forward_pre_hook(lambda _m, args: capture.update(x=args[0]))
    with torch.inference_mode():
        loaded.model(ids)
    handle.remove()
    by_hand = capture["x"][..., 4:] @ attention.o_proj.weight[:, 4:].T
    assert torch.allclose(seen["out"], by_hand, atol=1e-6)
    # What the released code masks: coordinates of the output.
    blocked = (capture["x"] @ attention.o_proj.weight.T).clone()
    blocked[..., :3] = 0
    assert not torch.allclose(seen["out"], blocked, atol=1e-3)


def test_fault_heads_are_removed_from_weights_and_cache_and_not_only_masked(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(layers=2, kv_heads=4))
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.25, "uniform", 0))
    write_model(checkpoint, plan, tmp_path / "cut")
    dense, cut = load_file(source / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    heads, groups = plan.counts[0]
    assert heads <= 4
    for name, tensor in cut.items():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            assert tensor.numel() * 8 == dense[name].numel() * heads
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            assert tensor.numel() * 4 == dense[name].numel() * groups
    assert (tmp_path / "cut" / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size
    assert plan.sliced.kv_bytes_per_token < plan.dense.kv_bytes_per_token


def test_fault_more_strength_prunes_more():
    for breadth in (0.0, 0.3, 1.0):
        ratios = [keep_from_strength(strength, breadth) for strength in np.linspace(0, 1, 11)]
        assert ratios == sorted(ratios, reverse=True)
        assert ratios[0] == 1
        assert ratios[-1] < 1


def test_fault_the_mixture_changes_the_ranking_inside_and_across_domains():
    toolkit = toolkit_with()
    ranks = []
    for weights in ((1.0, 0, 0), (0, 1.0, 0), (0.5, 0.5, 0)):
        mixture = Mixture(toolkit.domains, np.array(weights), 0.0, 0.0)
        scores = head_scores(toolkit, "fisher", mixture)
        assert np.allclose(scores, toolkit.importance["fisher"] @ np.array(weights))
        ranks.append(tuple(np.argsort(scores.ravel())))
    assert len(set(ranks)) == 3


def test_fault_the_total_is_bounded_and_no_union_of_per_domain_top_heads():
    rng = np.random.default_rng(1)
    for keep in (0.25, 0.5, 0.8):
        assert choose(rng.random((4, 8)), 4, keep, "per-layer").kept.mean() <= keep


def test_fault_the_calibrated_recogniser_is_the_one_that_is_used():
    text = features((3.0, 0.0, 0.0, 0.0))
    hot = toolkit_with(recogniser=recogniser(temperature=5.0))
    cold_mixture, hot_mixture = mixture_of(toolkit_with(), text), mixture_of(hot, text)
    assert hot_mixture.weights[0] < cold_mixture.weights[0]
    assert hot_mixture.weights[0] == pytest.approx(np.exp(3 / 5) / (np.exp(3 / 5) + 2))
    assert hot_mixture.unknown == pytest.approx(1 / (np.exp(3 / 5) + 3))
    np.testing.assert_array_equal(mixture_of(hot, text, calibrated=False).weights, cold_mixture.weights)


def test_fault_ignorance_is_said_and_scored_with_the_domain_free_average():
    toolkit = toolkit_with()
    lost = mixture_of(toolkit, features((0, 0, 0, 9)))
    assert lost.unknown > 0.99 and lost.is_unknown
    scores = head_scores(toolkit, "fisher", lost)
    assert np.allclose(scores, toolkit.importance["fisher"].mean(-1), atol=1e-3)
    known = mixture_of(toolkit, features((9, 0, 0, 0)))
    assert known.unknown < 0.01 and not known.is_unknown


def test_fault_a_list_of_prompts_from_two_domains_is_a_mixture_and_not_ignorance():
    mixture = mixture_of(toolkit_with(), features((9, 0, 0, 0), (0, 9, 0, 0)))
    assert mixture.weights == pytest.approx([0.5, 0.5, 0], abs=1e-3)
    assert mixture.unknown < 0.01


def test_one_certain_prompt_cannot_veto_the_others():
    """Mean of probabilities: a prompt that surely is of no domain takes away its own share and no more."""
    mixture = mixture_of(toolkit_with(), features((9, 0, 0, 0), (9, 0, 0, 0), (9, 0, 0, 0), (-1e6, 0, 0, 1e6)))
    assert mixture.unknown == pytest.approx(0.25, abs=1e-3) and mixture.weights[0] > 0.99


def test_fault_pickled_weights_are_never_opened(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape())
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04never")
    with pytest.raises(CheckpointError, match="pickled"):
        _ = Checkpoint(source).tensors


def test_fault_groups_share_their_key_value_head_and_head_size_is_not_derived(tmp_path):
    shape = Shape(family="qwen3", hidden=32, kv_heads=2, group_size=3, head_dim=16)
    source = make_checkpoint(tmp_path / "dense", shape)
    geometry = Checkpoint(source).geometry
    assert (geometry.head_dim, geometry.group_size) == (16, 3)
    assert geometry.hidden // geometry.heads != geometry.head_dim
    mask = mask_for(Checkpoint(source), 0.5, "per-layer", 1)
    for layer, kept in enumerate(mask.kept):
        assert set(mask.kept_groups(layer)) == {head // 3 for head in kept}


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "olmo2", "opt", "falcon", "banana"])
def test_fault_models_that_cannot_be_cut_exactly_are_refused_with_the_reason(model_type):
    with pytest.raises(UnsupportedModelError, match=model_type):
        geometry_of({"model_type": model_type, "num_attention_heads": 4})


def test_masks_and_toolkits_are_plain_data():
    names = {field.name for field in dataclasses.fields(Toolkit)}
    assert {"recogniser", "importance", "whitelist"} <= names
    json.dumps(Mixture(("a",), np.array([1.0]), 0.0, 0.0).as_mapping())
