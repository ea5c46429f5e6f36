"""Every head score: shapes, determinism, invariances, planted heads, and formulas worked out by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_prepare_tools import tiny

from sspcompile.criteria import CRITERIA, bonsai, chance, dlp, fisher, greedy_kl, greedy_output, probe_pruning
from sspcompile.criteria.measuring import drawn_rows, measure
from sspcompile.criteria.page import page
from sspcompile.criteria.units import CriterionInput, Units, rising
from sspcompile.errors import InputError
from sspcompile.model.hooks import head_gates
from sspcompile.model.modules import input_norm
from sspcompile.model.text import batches_of, continued, encode

PROMPTS = [
    "tell me about acid ?",
    "what is the sum of a prime and a root ?",
    "war",
    "tell me about the king ?",
    "please tell me about the empire and the queen ?",
    "what is a metal ?",
]
NAMES = tuple(CRITERIA)
DATA_DRIVEN = tuple(name for name, entry in CRITERIA.items() if entry.needs != "nothing")
GRANULARITIES = ("head", "group")
LAYERS, HEADS, GROUPS = 2, 4, 2


def model(family="qwen2", **changes):
    return tiny(family, **{"layers": LAYERS, "heads": HEADS, "kv_heads": GROUPS, "seed": 2, **changes})


def directions(hidden=16, domains=2):
    found = np.random.default_rng(3).normal(size=(LAYERS, domains, hidden))
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def look(loaded, *, granularity="head", batch_tokens=4096, new_tokens=2, seed=0):
    batches = batches_of(loaded, continued(loaded, PROMPTS, new_tokens), batch_tokens)
    return CriterionInput(batches, len(PROMPTS), directions(), seed, granularity)


@pytest.fixture(scope="module")
def loaded():
    return model()


@pytest.fixture(scope="module")
def texts(loaded):
    return continued(loaded, PROMPTS, 2)


DRAWN = {"fisher", "obs", "fisher-sampled", "fisher-rounds", "fisher-midway"}
"""They draw random numbers per batch."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_criterion_scores_heads_and_groups_of_every_domain(name, family):
    model_ = model(family)
    texts_, labels = continued(model_, PROMPTS, 2), np.array([0, 0, 0, 1, 1, 1])
    before = {key: value.clone() for key, value in model_.model.state_dict().items()}
    for granularity in GRANULARITIES:
        steps = []
        scores = measure(
            model_,
            name,
            texts_,
            labels=labels,
            directions=directions(),
            granularity=granularity,
            progress=lambda *step, steps=steps: steps.append(step),
        )
        found = scores.by_domain(2)
        assert found.shape == (LAYERS, HEADS, 2) and np.isfinite(found).all() and (found >= 0).all()
        rows = len(PROMPTS) if CRITERIA[name].per == "prompt" else 2
        assert scores.own_axis().shape == (rows, LAYERS, HEADS) and scores.labels.shape == (rows,)
        assert scores.prompts == (len(PROMPTS) if name in DATA_DRIVEN else 0)
        assert steps and steps[-1][0] == steps[-1][1] and steps == sorted(steps)
        if granularity == "group":
            assert (found.reshape(LAYERS, GROUPS, -1, 2) == found.reshape(LAYERS, GROUPS, -1, 2)[:, :, :1]).all()
        assert len(np.unique(found)) > GROUPS, "heads are told apart"
    assert not any(p.requires_grad or p.grad is not None for p in model_.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model_.model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model_.model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_scores(loaded, texts, name):
    one, same, other = (measure(loaded, name, texts, directions=directions(), seed=s).values for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    seeded = {"random", "random-first-layer", "bonsai", *DRAWN}
    assert np.array_equal(one, other) == (name not in seeded)


@pytest.mark.parametrize("name", sorted(set(DATA_DRIVEN) - DRAWN))
def test_batching_changes_no_score(loaded, name):
    together, alone = look(loaded), look(loaded, batch_tokens=1)
    assert len(together.batches) == 1 and len(alone.batches) == len(PROMPTS)
    found = [CRITERIA[name].measure(loaded, x) for x in (together, alone)]
    np.testing.assert_allclose(*found, rtol=2e-3, atol=2e-3 * found[0].max())


@pytest.mark.parametrize("name", DATA_DRIVEN)
def test_what_stands_in_the_padding_changes_no_score(loaded, name):
    given_ = look(loaded)
    (batch,) = given_.batches
    other = copy.deepcopy(given_)
    other.batches[0].input_ids[batch.attention_mask == 0] = 7
    assert not torch.equal(other.batches[0].input_ids, batch.input_ids)
    found = [CRITERIA[name].measure(loaded, x) for x in (given_, other)]
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6 * found[0].max())


SILENT = (
    "fisher",
    "obs",
    "fisher-sampled",
    "fisher-greedy",
    "fisher-rounds",
    "fisher-midway",
    "kl",
    "greedy-kl",
    "llm-pruner",
    "wanda",
    "ria",
    "tyr",
)


@pytest.mark.parametrize("name", [*SILENT, "probe-pruning", "greedy-output", "flap", "dlp"])
def test_a_head_that_writes_nothing_is_needed_least(name):
    model_ = model(kv_heads=HEADS)
    model_.layers[1].self_attn.o_proj.weight[:, 8:12] = 0  # head 2 of layer 1
    found = measure(model_, name, continued(model_, PROMPTS, 2)).values.mean(0)
    if name in ("flap", "dlp"):  # by layers: least of its layer
        assert found[1].argmin() == 2
        return
    assert found[1, 2] == pytest.approx(0, abs=1e-7 * found.max()) and found.argmin() == 6
    # The last steps of the matching pursuit have nothing left to explain either.
    assert name == "greedy-output" or (np.delete(found.ravel(), 6) > 0).all()


@pytest.mark.parametrize("name", sorted({*DATA_DRIVEN, "magnitude"} - {"subspace", "subspace-probe"}))
def test_a_planted_head_is_found_more_often_than_by_chance(name):
    """All writes are made faint but one. Chance finds it in one of four layers; every score has to find it in all."""
    for planted in (0, 1, 3):
        model_ = model(seed=planted)
        for layer, module in enumerate(model_.layers):
            faint = torch.full((HEADS,), 0.1)
            faint[planted] = 1.0 if layer == 1 else 0.1
            module.self_attn.o_proj.weight *= faint.repeat_interleave(4)
        found = measure(model_, name, continued(model_, PROMPTS, 2)).values.mean(0)
        assert found[1].argmax() == planted, found


@pytest.mark.parametrize("name", ["wanda", "ria", "dass", "llm-pruner", "probe-pruning", "subspace"])
def test_additive_scores_of_a_group_are_the_sum_of_its_heads(loaded, texts, name):
    heads, groups = (
        measure(loaded, name, texts, directions=directions(), granularity=g).own_axis().mean(0) for g in GRANULARITIES
    )
    np.testing.assert_allclose(groups[:, ::2] * 2, heads.reshape(LAYERS, GROUPS, 2).sum(-1), rtol=1e-6)


def divergence_of(loaded, batches, gates):
    """Mean over prompts of the mean KL(dense || masked) at their scored positions, by whole forward passes."""
    found = []
    for batch in batches:
        with torch.no_grad():
            dense = torch.log_softmax(loaded.model(batch.input_ids).logits.double(), -1)
            with head_gates(loaded, torch.as_tensor(gates, dtype=torch.float32)):
                masked = torch.log_softmax(loaded.model(batch.input_ids).logits.double(), -1)
        kl = (dense.exp() * (dense - masked)).sum(-1)
        found += [kl[row][batch.score_mask[row]].mean().item() for row in range(len(batch.rows))]
    return float(np.mean(found))


def test_a_group_is_closed_and_gated_as_a_whole(loaded):
    given_ = look(loaded, granularity="group")
    closed = CRITERIA["kl"].measure(loaded, given_).mean(0)
    for layer, group in [(0, 0), (1, 1)]:
        gates = np.ones((LAYERS, HEADS))
        gates[layer, 2 * group : 2 * group + 2] = 0
        assert closed[layer, group] == pytest.approx(divergence_of(loaded, given_.batches, gates), rel=1e-3)
    (batch,) = given_.batches
    by_head, by_group = (
        (fisher.gate_gradients(loaded, batch, units, "greedy", 1, torch.Generator()))[0]
        for units in (Units(LAYERS, HEADS, 1), Units(LAYERS, GROUPS, 2))
    )
    torch.testing.assert_close(by_group, by_head.unflatten(-1, (GROUPS, 2)).sum(-1), rtol=1e-4, atol=1e-6)


def test_greedy_kl_is_backward_elimination_by_brute_force():
    model_ = model(heads=2, kv_heads=2)
    given_ = look(model_)
    open_, order, costs, base = {0, 1, 2, 3}, [], [], 0.0
    while open_:
        after = {}
        for unit in sorted(open_):
            gates = np.zeros(4)
            gates[sorted(open_ - {unit})] = 1
            after[unit] = divergence_of(model_, given_.batches, gates.reshape(2, 2))
        order.append(min(after, key=after.get))
        costs.append(after[order[-1]] - base)
        base = after[order[-1]]
        open_.remove(order[-1])
    found = CRITERIA["greedy-kl"].measure(model_, given_).ravel()
    assert np.argsort(found).tolist() == order
    np.testing.assert_allclose(found[order], rising(costs), rtol=1e-2)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=greedy_kl.WINDOW))
def test_lazy_elimination_is_exact_where_closing_more_makes_closing_costs_more(units):
    """Cost (sum of weights)^2 + sum of prices, against measuring every candidate in every step."""

    def total(closed):
        return sum(units[u][0] for u in closed) ** 2 + sum(units[u][1] for u in closed)

    alive, exact = list(range(len(units))), []
    while alive:
        exact.append(min(alive, key=lambda u: total([*exact, u])))
        alive.remove(exact[-1])
    closed = []
    order, costs = greedy_kl.eliminate(len(units), lambda u: float(total([*closed, u])), closed.append)
    reached = [total(order[: place + 1]) for place in range(len(order))]
    assert reached == [total(exact[: place + 1]) for place in range(len(order))]
    assert np.cumsum(costs).tolist() == pytest.approx(reached)


@settings(max_examples=40)
@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 1)), st.sampled_from([5, 256]))
def test_elimination_closes_every_unit_once_within_its_bound_of_measurements(weights, steps):
    closed, measured = [], []

    def cost(unit):
        measured.append(unit)
        return float((weights[closed].sum() + weights[unit]) ** 2)

    order, costs = greedy_kl.eliminate(len(weights), cost, closed.append, steps=steps)
    assert sorted(order) == list(range(len(weights))) and closed == order[:-1]
    assert sum(costs) == pytest.approx(weights.sum() ** 2)
    block = -(-len(weights) // steps)
    assert len(measured) <= len(weights) + -(-len(weights) // block) * (max(greedy_kl.WINDOW, 2 * block) + block)


def test_elimination_measures_more_than_the_stale_cheapest():
    """0 and 1 cover for each other: once 0 is closed, 1 is dear, though it looked as cheap."""
    closed = []

    def cost(unit):
        now = {*closed, unit}
        return 0.1 * len(now & {0, 1}) + 10 * ({0, 1} <= now) + 1.0 * len(now & {2, 3, 4, 5, 6})

    order, costs = greedy_kl.eliminate(7, cost, closed.append)
    assert order == [0, 2, 3, 4, 5, 6, 1]
    assert costs == pytest.approx([0.1, 1, 1, 1, 1, 1, 10.1])


@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.just(0.0) | st.floats(1e-9, 1e3)))
def test_rising_keeps_the_order_and_what_rises_already(costs):
    scores = rising(costs)
    positive = scores[scores > 0].astype(np.float32)
    assert (np.diff(positive) > 0).all() and (scores >= costs).all() and (np.diff(scores) >= 0).all()
    strictly = np.cumsum(costs + 1)
    np.testing.assert_array_equal(rising(strictly), strictly)


def test_fisher_rounds_remove_the_least_informative_quarter_first_and_keep_that_order(loaded):
    given_ = look(loaded)
    once = fisher.information(loaded, given_, "normal", fisher.ROUND_DRAWS).mean(0).ravel()
    found = fisher.rounds(loaded, given_).ravel()
    order = np.argsort(found)
    assert set(order[:2]) == set(np.argsort(once)[:2]) and len(set(found)) == 8
    np.testing.assert_allclose(found[order[:2]], once[order[:2]], rtol=1e-5)
    kept = np.ones((LAYERS, HEADS), dtype=bool)
    kept.flat[order[:2]] = False
    again = fisher.information(loaded, given_, "normal", fisher.ROUND_DRAWS, kept).mean(0).ravel()
    assert set(order[2:4]) == set(sorted(np.flatnonzero(kept), key=lambda u: again[u])[:2])


@given(st.integers(1, 60), st.integers(1, 300), st.integers(0, 9))
def test_sub_models_close_units_equally_often(total, count, seed):
    masks = bonsai.draw_masks(total, count, seed)
    sizes = masks.sum(1)
    assert masks.shape == (count, total) and (sizes == sizes[0]).all() and sizes[0] <= max(2, total / 8 + 1)
    # A shuffle leaves out what is less than a mask at its end.
    assert masks.sum(0).max() <= -(-count // max(1, total // sizes[0]))


def test_the_regression_of_bonsai_finds_what_single_closings_cost(loaded):
    given_ = look(loaded)
    single = CRITERIA["kl"].measure(loaded, given_).mean(0).ravel()
    assert np.corrcoef(CRITERIA["bonsai"].measure(loaded, given_).ravel(), single)[0, 1] > 0.6


def hand_model(*, values, embeddings):
    """One layer, d = 4, two heads of size 2 that attend evenly to all earlier tokens.

    The first token of a text has the residual `embeddings[0]`, all others `embeddings[1]` (of RMS norm 1, so the norm
    leaves them); `values` [4, 4] is the value projection. Head 0 writes (a, b, 0, 0), head 1 (2 b, a, 0, 0).
    """
    loaded = tiny("llama", layers=1, hidden=4, heads=2, kv_heads=2)
    inner, attention = loaded.model.model, loaded.layers[0].self_attn
    inner.embed_tokens.weight.copy_(torch.tensor(embeddings[1]).expand_as(inner.embed_tokens.weight))
    inner.embed_tokens.weight[loaded.tokenizer.bos_token_id] = torch.tensor(embeddings[0])
    inner.layers[0].input_layernorm.weight.fill_(1.0)
    attention.q_proj.weight.zero_()
    attention.k_proj.weight.zero_()
    attention.v_proj.weight.copy_(torch.tensor(values))
    attention.o_proj.weight.copy_(torch.tensor([[1.0, 0, 0, 2], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    return loaded


def constant_model():
    """Every residual is (2, 0, 0, 0): the channels are 3, 4, 1, 1 at every token."""
    values = [[1.5, 0, 0, 0], [2.0, 0, 0, 0], [0.5, 0, 0, 0], [0.5, 0, 0, 0]]
    return hand_model(values=values, embeddings=[[2.0, 0, 0, 0]] * 2)


FIRST = 0.0675 * (5 + 5 / 25.0675) / 50
# Column sums of |W_o|: 1, 1, 1, 2. Row sums: 3, 2, 0, 0. Column norms squared: 1, 1, 1, 4.
BY_HAND = {
    "wanda": [1 * 3 + 1 * 4, 1 * 1 + 2 * 1],
    # |W| / column sum adds up to 1 per channel; |W| / row sum: 1/3, 1/2, 1/2, 2/3
    "ria": [(1 + 1 / 3) * 3**0.5 + (1 + 1 / 2) * 4**0.5, (1 + 1 / 2) + (1 + 2 / 3)],
    # value rows 1.5, 2, 0.5, 0.5 times root of the norm, and the score of wanda
    "dass": [1.5 * 3**0.5 + 2 * 4**0.5 + 7, 0.5 + 0.5 + 3],
    # sqrt(sum_i W^4) = 1, 1, 1, 4; the probe is like the history, so the squared norms are 9, 16, 1, 1
    "probe-pruning": [9 + 16, 1 + 4],
    # v and o, squared: 1.5^2 + 2^2 + 1 + 1 and 0.5^2 + 0.5^2 + 1 + 4
    "magnitude": [8.25**0.5, 5.5**0.5],
    # writes (3, 4) and (2, 1), Y = (5, 5): alone they explain 35^2 / 25 = 49 and 15^2 / 5 = 45 of 50
    "greedy-output": [49 / 50, 1 / 50],
    # one layer, so no deviation of its rate: places 0 and 1 of wanda
    "dlp": [1 - 0.5 / 2, 1 - 1.5 / 2],
    # H = x x^T + r, r a hundredth of (9 + 16 + 1 + 1) / 4, is singular but for r: what head 1 costs, given head 0, is
    # r (|c_2|^2 + |c_3|^2 + |c_2 + c_3|^2 / (25 + r)) of |W x|^2 = 50. Both together cost 50 + r |W|^2.
    "tyr": [1 + 7 * 0.0675 / 50 - FIRST, FIRST],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_formulas_by_hand_on_two_heads(name):
    model_ = constant_model()
    given_ = CriterionInput(encode(model_, ["war", "tell me about acid ?"]), 2)
    np.testing.assert_allclose(CRITERIA[name].measure(model_, given_), [BY_HAND[name]], rtol=1e-4, atol=1e-6)


def test_flap_by_hand():
    # Values of the first token (2, 0, 1, 1), of the second (0, 0, 1, 5); attending evenly, the two positions have the
    # channels (2, 0, 1, 1) and (1, 0, 1, 3), of variance 0.5, 0, 0, 2; times 1, 1, 1, 4: 0.5, 0, 0, 8, of mean 2.125.
    # Squared deviations 1.625^2 + 2 * 2.125^2 + 5.875^2 = 46.1875, over 3. Head means: (-1.625 - 2.125) / 2, and
    # (-2.125 + 5.875) / 2, which lie 3.75 apart before they are standardised.
    values = [[1.0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0], [0.5, 2.5, 0, 0]]
    model_ = hand_model(values=values, embeddings=[[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    found = CRITERIA["flap"].measure(model_, CriterionInput(encode(model_, ["war"]), 1))
    np.testing.assert_allclose(found, [[0, 3.75 / (46.1875 / 3) ** 0.5]], rtol=1e-4, atol=1e-9)


@given(
    hnp.arrays(np.float64, (5, 8), elements=st.floats(0, 9)),
    hnp.arrays(np.float64, 5, elements=st.floats(0, 9)),
    st.floats(0.31, 0.69),
)
def test_a_threshold_on_dlp_keeps_the_published_rate_of_every_layer(values, medians, rate):
    """1 - u / sum u, stretched to 2 alpha and centred around the rate."""
    medians[:2] = 10, 11  # so that they differ
    importance = 1 - medians / medians.sum()
    stretched = (importance - importance.min()) / np.ptp(importance) * 0.3
    rates = stretched - stretched.mean() + rate
    scores = dlp.by_rates(values, medians)
    kept = scores >= 1 + stretched.mean() - rate - 1e-9
    assert (abs(kept.sum(1) - 8 * rates) <= 0.5 + 1e-6).all() and (scores > 0).all()
    worst, best = np.where(kept, values, np.inf).min(1), np.where(kept, -np.inf, values).max(1)
    assert (worst >= best).all()


def test_dlp_goes_by_the_median_of_a_layer_and_not_by_its_mean():
    model_ = model()
    quiet, even = (layer.self_attn.o_proj.weight for layer in model_.layers)
    even.fill_(1.0)
    quiet.fill_(0.01)
    quiet[0] = 1000.0
    found = np.sort(CRITERIA["dlp"].measure(model_, look(model_)), axis=1)
    np.testing.assert_allclose(found, [[0.425, 0.675, 0.925, 1.175], [0.125, 0.375, 0.625, 0.875]])


def test_layers_count_alike_in_tyr_however_loud_they_are(loaded):
    given_, loud = look(loaded), copy.deepcopy(loaded)
    loud.layers[1].self_attn.o_proj.weight *= 5
    found, again = (CRITERIA["tyr"].measure(x, given_) for x in (loaded, loud))
    np.testing.assert_allclose(again, found, rtol=1e-4)
    assert (found.sum(1) >= 1).all(), "all heads together cost all of the output"


def test_matching_pursuit_by_hand():
    # w = (3, 0), (0, 2), (0, -1): Y = (3, 1). Alone they explain 9, 1 and 1 of 10; then the second is first of equals.
    writes = np.array([[3.0, 0], [0, 2], [0, -1]])
    np.testing.assert_allclose(greedy_output.pursue(writes @ writes.T), [0.9, 0.1, 0], atol=1e-12)
    assert greedy_output.pursue(np.zeros((3, 3))).tolist() == [0, 0, 0]


@given(hnp.arrays(np.float64, (5, 3), elements=st.floats(-2, 2)))
def test_matching_pursuit_explains_everything_in_the_end(writes):
    scores = greedy_output.pursue(writes @ writes.T)
    assert (scores >= 0).all()
    if (np.linalg.norm(writes.sum(0)) > 1e-3).all():
        assert scores.sum() >= 1 - 1e-6


def test_probe_of_probe_pruning_by_hand():
    assert probe_pruning.fuse(np.array([3.0, 0.0]), np.array([1.0, 0.0])).tolist() == [10 / 4, 0]
    norms, mask = torch.tensor([[3.0, 9, 5, 99], [1, 2, 3, 4]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    picked = probe_pruning.probe_tokens(norms, mask)
    assert picked.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_llm_pruner_equals_the_weights_and_gradients_of_the_loss_on_the_continuation(loaded):
    """Labels are the continuation's own tokens here; heads and their group's k and v are cut out by hand."""
    given_ = look(loaded, batch_tokens=1)
    model_ = copy.deepcopy(loaded.model).requires_grad_(True)
    for batch in given_.batches:
        logits = model_(batch.input_ids).logits[0, :-1]
        scored = batch.score_mask[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits[scored], batch.input_ids[0, 1:][scored])
        (loss / len(PROMPTS)).backward()
    found = CRITERIA["llm-pruner"].measure(loaded, given_)
    for layer, head in [(0, 0), (0, 3), (1, 2)]:
        attention = model_.model.layers[layer].self_attn
        rows, group = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        parts = {
            n: (getattr(attention, n).weight * getattr(attention, n).weight.grad).abs()
            for n in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        own = parts["q_proj"][rows].sum() + parts["o_proj"][:, rows].sum()
        shared = (parts["k_proj"][group].sum() + parts["v_proj"][group].sum()) / 2
        assert found[layer, head] == pytest.approx((own + shared).item(), rel=1e-3)


def test_magnitude_of_a_group_is_the_norm_of_all_its_weights():
    model_ = model(kv_heads=1)
    found = measure(model_, "magnitude", (), granularity="group", labels=np.zeros(1)).values[0]
    for layer, module in enumerate(model_.layers):
        weights = [getattr(module.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
        norm = torch.cat([weight.flatten() for weight in weights]).norm().item()
        np.testing.assert_allclose(found[layer] * HEADS, [norm] * HEADS, rtol=1e-5)


def test_random_is_the_same_for_every_domain_and_the_baseline_keeps_the_first_layer(loaded, texts):
    labels = np.array([0, 0, 1, 1, 2, 2])
    for name in ("random", "random-first-layer"):
        found = measure(loaded, name, texts, labels=labels).by_domain(3)
        assert (found == found[..., :1]).all()
    assert found[0].min() > found[1].max()
    np.testing.assert_array_equal(found[..., 0], chance.first_layer_kept((LAYERS, HEADS), 0))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 5))
def test_at_most_so_many_texts_of_each_domain_are_drawn(labels, most, seed):
    labels = np.array(labels)
    rows = drawn_rows(labels, most, seed)
    assert (np.diff(rows) > 0).all()
    for k in np.unique(labels):
        assert (labels[rows] == k).sum() == min(most, (labels == k).sum())


def test_expensive_criteria_look_at_a_bounded_number_of_texts_unless_told_otherwise(loaded, texts):
    many = texts * 6
    assert measure(loaded, "kl", many).prompts == 32
    assert measure(loaded, "kl", many, every_prompt=True).prompts == 36


@pytest.mark.parametrize("name", NAMES)
def test_passes_are_what_was_promised(loaded, texts, name):
    """Counted in layers of one prompt; resuming from a layer costs the layer itself too, hence (1 + 1 / layers)."""
    ran = [0]
    handles = [
        input_norm(y).register_forward_pre_hook(lambda _m, args: ran.__setitem__(0, ran[0] + len(args[0])))
        for y in loaded.layers
    ]
    try:
        measure(loaded, name, texts, directions=directions())
    finally:
        for handle in handles:
            handle.remove()
    promised = CRITERIA[name].passes(LAYERS * HEADS, len(texts)).forward
    assert 0.3 * promised <= ran[0] / LAYERS <= (1 + 1 / LAYERS) * promised


def test_the_table_agrees_with_the_modules_and_describes_every_entry():
    assert CRITERIA["fisher"].passes(64, 1).backward == fisher.DRAWS
    for name in ("fisher-rounds", "fisher-midway"):
        assert CRITERIA[name].passes(64, 1).backward == fisher.ROUNDS * fisher.ROUND_DRAWS
    for units in (3, 64, 1000):
        assert CRITERIA["bonsai"].passes(units, 1).forward == 1 + bonsai.mask_count(units)
    assert str(greedy_kl.WINDOW) in CRITERIA["greedy-kl"].cost and str(greedy_kl.STEPS) in CRITERIA["greedy-kl"].cost
    assert CRITERIA["kl"].passes(10, 1000) == CRITERIA["kl"].passes(10, 32)
    for name, entry in CRITERIA.items():
        assert entry.name == name and entry.summary and entry.source and entry.adaptation and entry.cost
        assert "\n" not in entry.summary + entry.source + entry.adaptation + entry.cost


def test_the_documentation_page_is_the_one_that_the_table_gives():
    written = (Path(__file__).parents[1] / "docs" / "criteria.md").read_text("utf-8")
    assert written == page(), "python -m sspcompile.criteria.page > docs/criteria.md"


def test_names_are_known_without_torch_and_the_room_can_be_entered_first():
    """The command line needs the names for its help; and `criteria` and `prepare` may be imported in either order."""
    code = (
        "import sys, sspcompile.criteria, sspcompile.cli.main; assert 'torch' not in sys.modules;"
        "import sspcompile.criteria.measuring, sspcompile.prepare"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_refused(loaded, texts):
    with pytest.raises(InputError, match=r"Accepted: fisher, obs, kl.*`sspcompile criteria`"):
        measure(loaded, "taste", texts)
    with pytest.raises(InputError, match="Accepted: head or group"):
        measure(loaded, "random", texts, granularity="layer")
