"""Published pruners of heads and channels: their channel scores by hand, and their rows in a build by size."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape as Random
from builders import family_config, make_checkpoint, save_random, stated
from test_criteria import hand_model
from test_prepare_tools import tiny

from sspcompile.api.build import build
from sspcompile.api.cost import cost_of
from sspcompile.checkpoint import Checkpoint
from sspcompile.criteria.channels import structure_moments
from sspcompile.criteria.flap import flap, flap_structures
from sspcompile.criteria.llm_pruner import llm_pruner_structures
from sspcompile.criteria.magnitude import magnitude, magnitude_structures
from sspcompile.criteria.units import CriterionInput, Structures
from sspcompile.criteria.wanda import wanda, wanda_structures
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.dense import open_dense
from sspcompile.model.loading import load
from sspcompile.model.text import batches_of, continued, encode
from sspcompile.progress import silent
from sspcompile.request.request import read_request
from sspcompile.select.baselines import SEEDS, WHOLE_LAYERS, most_rivals
from sspcompile.select.peers import GRADIENTS, INPUTS, MIDDLE_FIRST, PEERS, peers, shared_evenly, standardised
from sspcompile.slicing.measures import of_size
from sspcompile.slicing.sizes import channel_parameters, choose_per_layer, head_share, share_of, uniform_sizes
from sspcompile.workspace import Workspace

PROMPTS = ("please tell me about acid", "the sum of three and four", "who was king in the year of war")


def looked_at(loaded: LoadedModel, tokens: int = 4096) -> CriterionInput:
    return CriterionInput(batches_of(loaded, continued(loaded, PROMPTS, 3), tokens), len(PROMPTS))


def scored(loaded: LoadedModel, given: CriterionInput) -> dict[str, Structures]:
    found = structure_moments(loaded, given)
    return {
        "FLAP": flap_structures(loaded, *found),
        "Wanda-sp": wanda_structures(loaded, *found),
        "LLM-Pruner": llm_pruner_structures(loaded, given),
        "magnitude": magnitude_structures(loaded),
    }


def hand_mlp() -> LoadedModel:
    """One layer whose attention writes nothing: the MLP reads (2, 0, 0, 0) at the first token, (0, 2, 0, 0) at the
    second. Gates are silu(20) = 20, so the channels are (2, 0, 1, 1, 1) and (0, 0, 1, 5, 3), and 19 zeros.
    """
    loaded = hand_model(values=np.zeros((4, 4)).tolist(), embeddings=[[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    mlp = loaded.layers[0].mlp
    loaded.layers[0].self_attn.o_proj.weight.zero_()
    for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        projection.weight.zero_()
    mlp.gate_proj.weight[:, :2] = 10.0
    mlp.up_proj.weight[:5, 0] = torch.tensor([2.0, 0, 1, 1, 1]) / 40
    mlp.up_proj.weight[:5, 1] = torch.tensor([0.0, 0, 1, 5, 3]) / 40
    columns = torch.tensor([[1.0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, -2]])
    mlp.down_proj.weight[:, :5] = columns.T
    return loaded


def test_channels_by_hand():
    model = hand_mlp()
    found = scored(model, CriterionInput(encode(model, ["war"]), 1))
    # Variances 2, 0, 0, 8, 2 times squared columns 5, 1, 9, 0, 4: 10 and 8 of 24 channels, of mean 0.75.
    deviation = ((9.25**2 + 7.25**2 + 22 * 0.75**2) / 23) ** 0.5
    wanted = np.full(24, -0.75)
    wanted[[0, 4]] = 9.25, 7.25
    np.testing.assert_allclose(found["FLAP"].channels, [wanted / deviation], rtol=1e-4)
    # Columns 3, 1, 3, 0, 2 times roots of the mean squares 2, 0, 1, 13, 5.
    wanted = np.zeros(24)
    wanted[[0, 2, 4]] = 3 * 2**0.5, 3, 2 * 5**0.5
    np.testing.assert_allclose(found["Wanda-sp"].channels, [wanted], rtol=1e-4, atol=1e-9)
    # 2 * 10^2 of every gate, squares of up over 40^2, and those of the columns of down.
    wanted = np.full(24, 200.0)
    wanted[:5] += np.array([4, 0, 2, 26, 10]) / 1600 + [5, 1, 9, 0, 4]
    np.testing.assert_allclose(found["magnitude"].channels, [np.sqrt(wanted)], rtol=1e-6)


@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_llm_pruner_is_the_gradient_of_the_loss_on_the_texts_as_they_stand(family: str, tmp_path: Path):
    loaded = load(save_random(tmp_path, family_config(family, layers=2)), fingerprint="")
    given, alone = looked_at(loaded), looked_at(loaded, 1)
    model = copy.deepcopy(loaded.model).requires_grad_(True)
    tokens = sum(batch.input_ids.shape[1] - 1 for batch in alone.batches)
    for batch in alone.batches:
        logits = model(batch.input_ids).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, batch.input_ids[0, 1:], reduction="sum") / tokens).backward()
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    found = llm_pruner_structures(loaded, given)
    for layer, module in enumerate(model.model.layers):
        parts = {n: (p.grad * p).abs() for n, p in module.named_parameters() if n.endswith("proj.weight") or ".c_" in n}
        down = parts.pop("mlp.down_proj.weight" if family == "llama" else "mlp.c_proj.weight")
        reading = [value for name, value in parts.items() if name.startswith("mlp") and name.endswith("weight")]
        wanted = down.sum(0) + sum(value.sum(1) for value in reading)
        np.testing.assert_allclose(found.channels[layer], wanted.detach().numpy(), rtol=2e-3)
        q, k, v, o = (parts[f"self_attn.{n}_proj.weight"] for n in "qkvo")
        own = q.sum(1) + o.sum(0) + (k + v).sum(1).view(4, 1, 16).expand(4, 2, 16).flatten() / 2
        np.testing.assert_allclose(found.heads[layer], own.view(8, 16).sum(1).detach().numpy(), rtol=2e-3)
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_channels_without_weight_or_input_cost_nothing():
    loaded = tiny("qwen2", scale=0.3)
    mlp = loaded.layers[1].mlp
    mlp.down_proj.weight[:, 3] = 0  # whatever is in it, it writes nothing
    mlp.up_proj.weight[7] = 0  # nothing is in it
    found = scored(loaded, looked_at(loaded))
    for name in ("Wanda-sp", "LLM-Pruner"):
        channels = found[name].channels
        assert channels[1, [3, 7]] == pytest.approx(0, abs=1e-9) and (np.delete(channels[1], [3, 7]) > 0).all(), name
    flap = found["FLAP"].channels[1]
    assert set(np.argsort(flap)[:2]) == {3, 7} and flap[3] == pytest.approx(flap[7])
    for projection, place in ((mlp.gate_proj, 3), (mlp.up_proj, 3)):
        projection.weight[place] = 0
    assert magnitude_structures(loaded).channels[1, 3] == 0


def test_heads_are_scored_as_the_criteria_of_the_same_names_score_them():
    loaded = tiny("qwen2", layers=2)
    given = looked_at(loaded)
    found = scored(loaded, given)
    np.testing.assert_allclose(found["Wanda-sp"].heads, wanda(loaded, given), rtol=1e-6)
    np.testing.assert_allclose(found["FLAP"].heads - found["FLAP"].heads.min(), flap(loaded, given), atol=1e-6)
    np.testing.assert_allclose(found["magnitude"].heads, magnitude(loaded, given), rtol=1e-6)


@pytest.mark.parametrize("name", PEERS)
def test_batches_change_no_score(name: str):
    loaded = tiny("qwen2", layers=2)
    together, alone = (scored(loaded, looked_at(loaded, tokens))[name] for tokens in (4096, 1))
    for part in ("heads", "channels"):
        one, other = getattr(together, part), getattr(alone, part)
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-3 * np.abs(one).max())


def test_a_fused_mlp_is_scored_like_one_whose_parts_are_apart(tmp_path: Path):
    configs = [family_config(family, layers=2) for family in ("phi3", "llama")]
    for config in configs:
        config.rms_norm_eps = 1e-5
    fused, apart = (load(save_random(tmp_path / config.model_type, config), fingerprint="") for config in configs)
    weights = apart.model.state_dict()
    for name, value in fused.model.state_dict().items():
        parts, sizes = [name], [len(value)]
        if "qkv_proj" in name:
            parts, sizes = [name.replace("qkv", part) for part in "qkv"], [128, 64, 64]
        elif "gate_up" in name:
            parts, sizes = [name.replace("gate_up", part) for part in ("gate", "up")], [48, 48]
        for part, rows in zip(parts, value.split(sizes), strict=True):
            weights[part].copy_(rows)
    for name, found in scored(fused, looked_at(fused)).items():
        wanted = scored(apart, looked_at(apart))[name]
        np.testing.assert_allclose(found.channels, wanted.channels, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found.heads, wanted.heads, rtol=1e-3, atol=1e-6, err_msg=name)


def test_a_mixture_of_experts_has_scores_of_heads_alone(tmp_path: Path):
    loaded = load(save_random(tmp_path, family_config("mixtral", layers=2)), fingerprint="")
    assert all(found.channels is None for found in scored(loaded, looked_at(loaded)).values())
    worths = dict(peers(loaded, continued(loaded, PROMPTS, 2), silent, channels=False))
    assert [*worths] == [*PEERS] and all(worth.channels is None for worth in worths.values())


def test_prices_by_hand():
    """FLAP's are its scores above the lowest; the others' are places in a layer, group by group."""
    scores = Structures(np.array([[0.5, -1.0, 2.0, 0.0]]), np.array([[3.0, -2.0]]))
    found = standardised(scores)
    assert found.heads.tolist() == [[2.5, 1, 4, 2]] and found.channels.tolist() == [[5, 0]]
    geometry = tiny(layers=1).geometry
    found = shared_evenly(scores, geometry)
    # Groups of -0.5 and 2: that of the first two heads goes before the other one.
    np.testing.assert_allclose(found.heads, np.array([[3, 1, 7, 5]]) / 8, rtol=2 * MIDDLE_FIRST)
    np.testing.assert_allclose(found.channels, [[0.75, 0.25]], rtol=2 * MIDDLE_FIRST)


def test_an_even_budget_takes_as_much_of_every_layer_and_spares_the_outer_ones():
    """A layer of this model has 4 heads in 2 groups and 24 channels: with half of all that can go, each loses half."""
    loaded = tiny("qwen2", layers=5)
    g, texts = loaded.geometry, continued(loaded, PROMPTS, 2)
    worths = dict(peers(loaded, texts, silent, channels=True))
    cuttable = g.layers * (g.heads * head_share(g) + g.intermediate * channel_parameters(g))
    whole = sum(p.numel() for p in loaded.model.parameters())
    for name in ("Wanda-sp", "LLM-Pruner", "magnitude"):
        choice = choose_per_layer(worths[name], g, (of_size(g, 1 - cuttable / whole / 2),))
        heads, widths = choice.kept.sum(1), np.array(choice.widths)
        assert np.ptp(heads) <= g.group_size and np.ptp(widths) <= 1, name
        assert heads[0] == heads[-1] == heads.max() and widths[0] == widths[-1] == widths.max(), name


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
def test_every_peer_is_within_the_budget_in_both_layouts(share: float):
    loaded = tiny("qwen2")
    g = loaded.geometry
    for name, worth in peers(loaded, continued(loaded, PROMPTS, 2), silent, channels=True):
        assert (worth.heads >= 0).all() and (worth.channels >= 0).all(), name
        bounds = (of_size(g, share),)
        for choice in (choose_per_layer(worth, g, bounds), uniform_sizes(worth, g, bounds)[0]):
            assert share - 0.1 < share_of(g, choice) <= share, name


def test_gradients_that_have_no_room_cost_a_row_and_no_build(monkeypatch: pytest.MonkeyPatch):
    loaded = tiny("qwen2")
    texts = continued(loaded, PROMPTS, 2)
    monkeypatch.setattr("sspcompile.model.placement.free_memory", lambda: 1000)
    assert [name for name, _ in peers(loaded, texts, silent, channels=True)] == [n for n in PEERS if n != "LLM-Pruner"]


def test_a_build_by_size_with_all_baselines_has_a_row_for_every_peer(tmp_path: Path):
    make_checkpoint(tmp_path / "model", Random(hidden=64, kv_heads=2, group_size=2, head_dim=16))
    options = {"max_tokens": 32, "continuation_tokens": 2, "layout": "per-layer", "baselines": "all", "size": 0.8}
    recipe = stated(tmp_path / "sums.yaml", model=str(tmp_path / "model"), **options)
    request, dense = read_request(str(recipe), {}, {}), open_dense(str(tmp_path / "model"))
    workspace, told = Workspace(tmp_path / "kept"), {}
    stages = {stage.name: stage for stage in cost_of(request, dense, workspace).stages}
    outcome = build(request, dense, tmp_path / "out", workspace, lambda name, *steps: told.__setitem__(name, steps))
    names = [baseline.name for baseline in outcome.selection.baselines]
    assert names[1:] == ["criterion fisher", *PEERS, WHOLE_LAYERS]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {*PEERS} <= {row["name"] for row in report["quality"]}
    assert "Against FLAP at the same budget" in (tmp_path / "out" / "report.md").read_text()
    # As many masks and stages as were foretold, and each stage told to its end.
    assert most_rivals("all", "prompts", sized=True) == SEEDS + len(names) - 1
    assert stages[INPUTS].passes == 1 < stages[GRADIENTS].passes
    assert stages[INPUTS].tokens == stages[GRADIENTS].tokens == stages["head scores"].tokens
    assert all(told[name][0] == told[name][1] > 0 for name in (INPUTS, GRADIENTS))
    # Its baselines need no pool, so none is scored for them.
    assert not any("pools" in name for name in stages)
    assert Checkpoint(tmp_path / "model").geometry.has_channels
