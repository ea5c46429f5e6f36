"""Refitted experts: what they are fitted to, where they are put, and that what is written of them is proven."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import OffloadedWeightsLoader
from builders import expert_config, family_config, save_random, stated
from safetensors.numpy import load_file, save_file
from test_layers import PROBES, demand_resumed, written
from test_slicing_exact import IDS, PROMPTS, mask_for, residual_error
from test_streaming import by_accelerate, on_disk

from sspcompile.api.cost import _repairing, cost_of
from sspcompile.api.stages import Stage
from sspcompile.checkpoint import Checkpoint
from sspcompile.checkpoint.headers import read_words
from sspcompile.checkpoint.tensors import down_names
from sspcompile.errors import ParityError
from sspcompile.families import geometry_of
from sspcompile.model.dense import open_dense
from sspcompile.model.hooks import input_of
from sspcompile.model.loading import load
from sspcompile.model.modules import down_proj, experts, residual_norm
from sspcompile.model.text import Batch, with_continuations
from sspcompile.model.working import refitted_bytes, repair_bytes, system_bytes, working_bytes
from sspcompile.progress import silent
from sspcompile.proof.claim import written_repair
from sspcompile.proof.contents import check_contents
from sspcompile.proof.prove import prove
from sspcompile.repair.dense import position_weights
from sspcompile.repair.fitting import RIDGES, Ridges, fit_repairs, masks_at_once
from sspcompile.repair.repair import Repair, masked
from sspcompile.report.json import read_report
from sspcompile.request.request import read_request
from sspcompile.slicing.mask import Kept, load_mask
from sspcompile.workspace import PROBES as PROBES_FILE
from sspcompile.workspace import Workspace

FAMILIES = ("mixtral", "qwen3_moe")
Run = Callable[..., tuple[int, str, str]]
EXACT = Ridges(o_proj=1e-9, down_proj=1e-9)


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory) -> Path:
    """Three layers; three experts of 48 channels each, or four of 24."""
    return save_random(tmp_path_factory.mktemp(request.param) / "dense", expert_config(request.param), seed=1)


@pytest.fixture(scope="module")
def loaded(dense):
    return load(dense, fingerprint="")


def rewritten(folder: Path, changed: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A model folder whose tensors were changed, by the names of its file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def narrowed(g, *layers: int, stay: int = 16) -> Kept:
    """The first channels of every expert in these layers; all else stays."""
    channels = np.ones((g.layers, g.mlps, g.width), dtype=bool)
    channels[[*layers], :, stay:] = False
    return Kept(np.ones((g.layers, g.heads), dtype=bool), channels.reshape(g.layers, -1))


def states(loaded, kept: Kept, repair: Repair | None, batches) -> Iterator[torch.Tensor]:
    for batch in batches:
        with torch.inference_mode(), masked(loaded, kept, repair):
            found = loaded.model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        yield found.last_hidden_state[batch.attention_mask.bool()]


# --- What they are fitted to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_whose_removed_channels_repeat_kept_ones_compute_what_they_did_on_other_texts_too(family, tmp_path):
    """In the last layer channel 16 + c is a multiple of channel c % 16."""
    source = save_random(tmp_path / "dense", expert_config(family), seed=4)
    g = Checkpoint(source).geometry

    def repeat(tensors: dict[str, np.ndarray]) -> None:
        same = np.arange(g.width) % 16
        factors = np.random.default_rng(0).uniform(0.5, 2, g.width).astype(np.float32)
        factors[:16] = 1
        assert g.family.experts is not None
        for number in range(g.experts):
            place = f"model.layers.2.{g.family.experts.expert.format(number)}."
            gate, up = (tensors[f"{place}{part}.weight"] for part in g.family.experts.gate_up)
            gate[:], up[:] = gate[same], up[same] * factors[:, None]

    loaded = load(rewritten(source, repeat), fingerprint="")
    kept, batches = narrowed(g, 2), with_continuations(loaded, PROMPTS, 4)
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32, ridges=EXACT)
    assert set(repair.experts) == {2} and set(repair.experts[2]) == set(range(g.experts))
    assert not (repair.weights or repair.down or repair.biases)
    others = with_continuations(loaded, [f"What is {n} minus {3 * n}?" for n in range(6)], 4)
    cases = ((Kept(np.ones((g.layers, g.heads), dtype=bool)), None), (kept, repair), (kept, None))
    for whole, mended, bare in zip(*(states(loaded, *case, others) for case in cases), strict=True):
        assert (whole - mended).abs().max() < 1e-3 * whole.abs().max() < 0.05 * (whole - bare).abs().max()


def by_hand(loaded, batches: list[Batch], kept: Kept, repair: Repair, tensors: dict[str, np.ndarray], prefix: str):
    """Normal equations in float64 of every expert of the first layer, whose attention lost heads: number -> solution.

    States in front of its MLP are taken from the model; routing and experts are worked out again here.
    """
    g, layer = loaded.geometry, loaded.layers[0]
    part, k = g.family.experts, g.active_experts
    plain, found = Repair(repair.weights), {number: [] for number in range(g.experts)}
    for batch, weights in zip(batches, position_weights(batches), strict=True):
        real, inputs = (
            batch.attention_mask.bool(),
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
        )
        with torch.inference_mode():
            target = loaded.model.model(**inputs, output_hidden_states=True).hidden_states[1][real].double().numpy()
            with masked(loaded, Kept(kept.heads), plain), input_of(residual_norm(layer), "norm") as seen:
                loaded.model.model(**inputs)
            x = residual_norm(layer)(seen[0])[real].double().numpy()
        residual = seen[0][real].double().numpy()
        scores = x @ tensors[prefix + part.router + ".weight"].T.astype(np.float64)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        chosen = np.argsort(-shares, -1)[:, :k]
        mine = np.zeros_like(shares)
        np.put_along_axis(mine, chosen, np.take_along_axis(shares, chosen, -1), -1)
        if getattr(loaded.model.config, "norm_topk_prob", True):
            mine /= mine.sum(-1, keepdims=True)
        channels, outputs = [], []
        for number in range(g.experts):
            gate, up, down = (
                tensors[f"{prefix}{part.expert.format(number)}.{name}.weight"].astype(np.float64)
                for name in (*part.gate_up, part.down)
            )
            gated = x @ gate.T
            channels.append(gated / (1 + np.exp(-gated)) * (x @ up.T))
            outputs.append(channels[-1] @ down.T)
        lacking = target - residual - sum(mine[:, [number]] * outputs[number] for number in range(g.experts))
        total = mine.sum(-1)
        for number in range(g.experts):
            visits = mine[:, number] > 0
            rows = weights[real].double().numpy() * mine[:, number] * total
            y = outputs[number] + lacking / total[:, None]
            found[number].append((channels[number][visits], y[visits], rows[visits]))
    solutions = {}
    for number, parts in found.items():
        x, y, w = (np.concatenate(one) for one in zip(*parts, strict=True))
        columns = kept.channels.reshape(g.layers, g.mlps, g.width)[0, number]
        x, start = x[:, columns], tensors[f"{prefix}{part.expert.format(number)}.{part.down}.weight"][:, columns]
        if len(x):
            energy = (w[:, None] * x * x).sum(0)
            held = RIDGES.down_proj * max(1.0, columns.sum() / len(x)) * energy.clip(RIDGES.least * energy.mean())
            stacked = np.concatenate([x * np.sqrt(w)[:, None], np.diag(np.sqrt(held))])
            wanted = np.concatenate([y * np.sqrt(w)[:, None], np.sqrt(held)[:, None] * start.T])
            solutions[number] = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    return solutions


@pytest.mark.parametrize("texts", [1, 12], ids=["fewer rows than channels", "more"])
def test_every_expert_is_the_least_squares_solution_that_the_docstring_states(loaded, dense, texts):
    g, rng = loaded.geometry, np.random.default_rng(3)
    heads = np.ones((g.layers, g.heads), dtype=bool)
    heads[0, ::2] = False
    channels = rng.random((g.layers, g.mlps, g.width)).argsort(-1) < g.width * 2 // 3
    kept = Kept(heads, channels.reshape(g.layers, -1))
    batches = with_continuations(loaded, PROMPTS[:texts], 2)
    (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)
    wanted = by_hand(loaded, batches, kept, repair, load_file(dense / "model.safetensors"), "model.layers.0.")
    assert wanted.keys() == repair.experts[0].keys()
    for number, solution in wanted.items():
        found, columns = repair.experts[0][number].numpy(), channels[0, number]
        np.testing.assert_allclose(found[:, columns], solution, atol=2e-4 * np.abs(solution).max())
        assert found.shape == (g.hidden, g.width) and not found[:, ~columns].any()


def test_refitted_experts_bring_the_residual_closer(loaded, dense):
    """Of the last layer alone nothing else is refitted; of all of them attention is as well."""
    batches, g = with_continuations(loaded, PROMPTS, 4), loaded.geometry
    every = mask_for(Checkpoint(dense), 0.6, "per-layer", 3, 0.7).units
    for kept, most in ((narrowed(g, 2, stay=g.width // 2), 0.75), (every, 0.7)):
        (repair,) = fit_repairs(loaded, [kept], batches, dtype=torch.float32)
        assert set(repair.experts) == set(np.flatnonzero(~kept.channels.all(1)))
        fits = (None, repair, Repair(repair.weights))
        bare, mended, attention = (residual_error(loaded, kept, batches, one) for one in fits)
        assert mended < most * bare and mended < attention


def test_an_expert_that_no_text_visits_keeps_its_bytes_and_its_channels_go(tmp_path):
    """A token visits one expert; the router gives the first what the others get on average: it is never the best."""
    config = expert_config("qwen3_moe")
    config.num_experts_per_tok = 1
    source = save_random(tmp_path / "dense", config, seed=1)

    def never_first(tensors: dict[str, np.ndarray]) -> None:
        for name, router in tensors.items():
            if name.endswith("mlp.gate.weight"):
                router[0] = router[1:].mean(0)

    rewritten(source, never_first)
    loaded, mask = load(source, fingerprint=""), mask_for(Checkpoint(source), 0.6, "per-layer", 3, 0.7)
    (repair,) = fit_repairs(loaded, [mask.units], with_continuations(loaded, PROMPTS[:8], 2), dtype=torch.float32)
    assert set(repair.experts) == {0, 1, 2} and all(0 not in own for own in repair.experts.values())
    claim = written(source, tmp_path / "cut", mask, replaced=repair.replaced(mask.units, loaded.geometry))
    check_contents(claim)
    assert all(prove(claim, PROBES, silent, layerwise=way).holds for way in (False, True))
    for layer in range(3):
        name = down_names(loaded.geometry, layer)[0]
        columns = mask.units.channels[layer].reshape(4, -1)[0]
        assert name not in claim.refitted
        assert np.array_equal(read_words(claim.there[name]), read_words(claim.checkpoint.tensors[name])[:, columns])


def test_a_mixture_with_dense_layers_has_its_attention_refitted_alone(tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen3_moe"), seed=1)
    loaded, mask = load(source, fingerprint=""), mask_for(Checkpoint(source), 0.6, "per-layer", 3, 0.7)
    (repair,) = fit_repairs(loaded, [mask.units], with_continuations(loaded, PROMPTS[:8], 2), dtype=torch.float32)
    assert mask.channels is None and repair.weights and not (repair.experts or repair.down)


# --- Where they are put, and what is written -------------------------------------------------------------------------


def test_what_is_written_of_refitted_experts_is_what_was_fitted_and_is_proven(loaded, dense, tmp_path):
    mask = mask_for(Checkpoint(dense), 1.0, "per-layer", 3, 0.7)
    batches = with_continuations(loaded, PROMPTS[:8], 2)
    (repair,) = fit_repairs(loaded, [mask.units], batches, dtype=torch.float32)
    assert not repair.down and set(repair.weights) == {1, 2} and set(repair.experts) == {0, 1, 2}
    claim = written(dense, tmp_path / "cut", mask, replaced=repair.replaced(mask.units, loaded.geometry))
    names = [down_names(loaded.geometry, layer)[number] for layer, own in repair.experts.items() for number in own]
    assert {*names} < {*claim.refitted} and len(claim.refitted) == len(names) + 2
    found = written_repair(claim)
    assert found.weights.keys() == {1, 2} and found.experts.keys() == repair.experts.keys()
    for layer, own in repair.experts.items():
        assert own.keys() == found.experts[layer].keys()
        assert all(weight.equal(found.experts[layer][number]) for number, weight in own.items())
    assert all(prove(claim, PROBES, silent, layerwise=way).holds for way in (False, True))

    def flip(tensors: dict[str, np.ndarray]) -> None:
        tensors[names[-1]].view(np.uint8).ravel()[0] ^= 1

    rewritten(tmp_path / "cut", flip)
    with pytest.raises(ParityError, match=names[-1]):
        check_contents(claim)


@pytest.mark.parametrize("spread", [False, True], ids=["ours", "accelerate"])
def test_refitted_experts_are_the_same_and_are_put_in_place_wherever_layers_lie(loaded, dense, spread, tmp_path):
    stored = by_accelerate(dense, tmp_path) if spread else on_disk(dense, resident=1)
    kept = mask_for(Checkpoint(dense), 0.6, "per-layer", 3, 0.7).units
    one, other = (
        next(fit_repairs(model, [kept], with_continuations(model, PROMPTS[:8], 2), dtype=torch.float32))
        for model in (loaded, stored)
    )
    for layer, own in one.experts.items():
        assert own.keys() == other.experts[layer].keys()
        assert all(other.experts[layer][number].equal(weight) for number, weight in own.items())
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        plain = stored.model(ids).logits
        with masked(loaded, kept, one):
            expected = loaded.model(ids).logits
        with masked(stored, kept, one):
            assert stored.model(ids).logits.equal(expected)
        assert stored.model(ids).logits.equal(plain) and not plain.equal(expected)


@pytest.fixture
def reads(monkeypatch) -> Counter[str]:
    """How often accelerate read each weight that it keeps on disk, by its name."""
    found: Counter[str] = Counter()
    read = OffloadedWeightsLoader.__getitem__

    def counted(self: OffloadedWeightsLoader, name: str) -> torch.Tensor:
        found[name] += 1
        return read(self, name)

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", counted)
    return found


@pytest.mark.parametrize("texts", [2, 8], ids=["four batches", "one batch"])
def test_a_repair_reads_what_accelerate_keeps_of_a_layer_once(loaded, dense, texts, reads, tmp_path):
    """However many batches and experts there are. Behind it they lie on disk again, and a call reads them as before."""
    spread, every = by_accelerate(dense, tmp_path), mask_for(Checkpoint(dense), 0.6, "per-layer", 3, 0.7).units
    batches = [one for start in range(0, 8, texts) for one in with_continuations(loaded, PROMPTS[start:][:texts], 2)]
    assert len(batches) == 8 // texts
    (wanted,) = fit_repairs(loaded, [every], batches, dtype=torch.float32)
    reads.clear()
    (found,) = fit_repairs(spread, [every], batches, dtype=torch.float32)
    inside = {name: count for name, count in reads.items() if ".layers." in name}
    assert {*inside.values()} == {1} and inside.keys() == {
        name for name in spread.model.state_dict() if ".layers." in name
    }
    assert all(found.weights[layer].equal(weight) for layer, weight in wanted.weights.items())
    for layer, own in wanted.experts.items():
        assert own.keys() == found.experts[layer].keys() and len(own) > 1
        assert all(found.experts[layer][number].equal(weight) for number, weight in own.items())
    assert all(parameter.is_meta for layer in spread.layers for parameter in layer.parameters())
    reads.clear()
    with torch.inference_mode():
        assert spread.model(torch.tensor([IDS])).logits.equal(loaded.model(torch.tensor([IDS])).logits)
    assert {reads[name] for name in inside} == {1}


def test_an_interrupted_repair_goes_on_behind_refitted_experts(loaded, dense, tmp_path):
    masks = [mask_for(Checkpoint(dense), keep, "per-layer", 3, 0.7).units for keep in (1.0, 0.6)]
    demand_resumed(loaded, masks, with_continuations(loaded, PROMPTS[:6], 2), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_build_refits_experts_in_their_stored_numbers_and_verifies(run: Run, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    family = FAMILIES[dtype == torch.bfloat16]
    source = save_random(tmp_path / "dense", expert_config(family), seed=1, dtype=dtype)
    asked = ("--scenario", stated(tmp_path / "sums.yaml"), "--size", 0.6, "--layout", "uniform", "--baselines", "none")
    fast = ("--continuation-tokens", "4", "--max-tokens", "48", "--quiet")
    assert run("build", "--model", source, *asked, "--out", "cut", *fast)[0] == 0
    report, mask, g = (
        read_report(tmp_path / "cut" / "report.json"),
        load_mask(tmp_path / "cut" / "mask.json"),
        Checkpoint(source).geometry,
    )
    assert report.repair.used and report.repair.kl_after < report.repair.kl_before
    names = {name for layer in range(g.layers) for name in down_names(g, layer)}
    refitted = names & {*json.loads((tmp_path / "cut" / PROBES_FILE).read_text())["refitted"]}
    assert len(refitted) > len(names) / 2
    cut, whole = Checkpoint(tmp_path / "cut" / "model").tensors, Checkpoint(source).tensors
    for layer in range(g.layers):
        for number, name in enumerate(down_names(g, layer)):
            columns = mask.units.channels[layer].reshape(g.mlps, g.width)[number]
            same = np.array_equal(read_words(cut[name]), read_words(whole[name])[:, columns])
            assert cut[name].dtype == whole[name].dtype and same == (name not in refitted)
    assert run("verify", "cut", "-q")[0] == 0 and run("verify", "cut", "-q", "--layerwise")[0] == 0


# --- What it takes ---------------------------------------------------------------------------------------------------


def test_room_is_kept_for_the_system_of_one_expert_and_for_what_is_refitted_of_all(loaded):
    g = geometry_of(expert_config("qwen3_moe").to_dict() | {"moe_intermediate_size": 20_000})
    assert repair_bytes(g, g.width) == system_bytes(20_000, g.hidden) > repair_bytes(g, None)
    attention = working_bytes(geometry_of(expert_config("qwen3_moe").to_dict()), 260, 48, 4)
    assert working_bytes(g, 260, 48, 4) - attention > 0.9 * system_bytes(20_000, g.hidden)
    g = loaded.geometry
    numbers = g.layers * g.hidden * (g.heads * g.head_dim + g.experts * g.width)
    assert masks_at_once(loaded, 0, torch.float32, down=True) == (1 << 30) // (4 * numbers)
    assert masks_at_once(loaded, 0, torch.float32) > masks_at_once(loaded, 0, torch.float32, down=True)


@pytest.mark.parametrize(("dtype", "bytes_of_each"), [(torch.float32, 8), (torch.bfloat16, 6)])
def test_a_measured_repair_of_experts_is_held_twice_and_counted_twice(loaded, dense, dtype, bytes_of_each):
    """As it will be written, and in the stacks that are computed with in fp32."""
    g, kept = loaded.geometry, mask_for(Checkpoint(dense), 0.6, "per-layer", 3, 0.7).units
    fitted = [torch.zeros(g.hidden, g.width, dtype=dtype) for _ in range(g.layers * g.experts)]
    of_layers = (dict(enumerate(fitted[layer * g.experts :][: g.experts])) for layer in range(g.layers))
    repair = Repair({}, experts=dict(enumerate(of_layers)))  # as where texts visit every expert
    before = {experts(layer).down_proj.data_ptr() for layer in loaded.layers}
    with masked(loaded, kept, repair):
        stacks = [experts(layer).down_proj for layer in loaded.layers]
        assert not before & {one.data_ptr() for one in stacks}
    held = tuple(sum(one.nbytes for one in some) for some in (fitted, stacks))
    assert held == refitted_bytes(g, 1, dtype.itemsize, 4, in_place=dtype == torch.float32)
    assert sum(held) == bytes_of_each * g.layers * g.experts * g.width * g.hidden
    # Experts so wide that nothing else that a repair holds counts beside them; only one of two masks is measured.
    wide = replace(loaded, geometry=replace(g, expert_intermediate=100_000))
    numbers = g.layers * g.experts * 100_000 * g.hidden
    for masks, taken in ((1, bytes_of_each), (2, bytes_of_each + dtype.itemsize)):
        stage = Stage("repairing", texts=0, tokens=0, passes=1, masks=masks, down_projs=masks)
        assert _repairing(wide, stage, 8, dtype) == taken * numbers
    stage = Stage("repairing", texts=0, tokens=0, passes=1, masks=1)
    assert _repairing(wide, stage, None, dtype) == repair_bytes(g, None)  # of heads alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_measured_repair_of_one_mlp_is_held_twice_where_its_numbers_are_of_another_kind(tmp_path, dtype):
    loaded = load(save_random(tmp_path / "dense", family_config("llama"), seed=1), fingerprint="")
    g, in_place = loaded.geometry, dtype == torch.float32
    down = {layer: torch.zeros(g.hidden, g.channels, dtype=dtype) for layer in range(g.layers)}
    with masked(loaded, Kept(np.ones((g.layers, g.heads), dtype=bool)), Repair({}, down=down)):
        others = [
            weight
            for layer, own in down.items()
            if (weight := down_proj(loaded.layers[layer]).weight).data_ptr() != own.data_ptr()
        ]
    held = sum(one.nbytes for one in down.values()), sum(one.nbytes for one in others)
    assert held == refitted_bytes(g, 1, dtype.itemsize, 4, in_place=in_place) and (held[1] == 0) == in_place


def test_plan_counts_what_fitting_experts_takes(dense, tmp_path):
    model, workspace = open_dense(str(dense)), Workspace(tmp_path)
    scenario = str(stated(tmp_path / "sums.yaml"))

    def stage(**options):
        given = {"model": str(dense), "max_tokens": 48, "continuation_tokens": 4, "layout": "uniform"} | options
        stages = cost_of(read_request(scenario, given, {}), model, workspace).stages
        return next(one for one in stages if one.name == "repairing this build and its baselines")

    heads, channels = stage(keep=0.6), stage(size=0.6)
    assert channels.passes > heads.passes + 1 and channels.down_projs == channels.masks and not heads.down_projs
