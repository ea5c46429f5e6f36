"""How a scenario conditions the scores: cache and prompts combined, and every part switched off."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import mannwhitneyu
from test_prepare_tools import DOMAINS, outside, pool_of, pools, tiny

from sspcompile.embedded import POOLS_DIR
from sspcompile.errors import ScenarioError, ToolkitError
from sspcompile.prepare import features, importance_of, prepare, with_scores
from sspcompile.prepare.direct import relative_variance, spread_by_domain
from sspcompile.prepare.stages import Stages
from sspcompile.progress import no_steps, silent
from sspcompile.request.domains import load_outside, load_pools
from sspcompile.request.options import Options
from sspcompile.request.request import Request
from sspcompile.request.scenario import Scenario
from sspcompile.request.splits import fit_part, own_fit_part, split
from sspcompile.select import baselines
from sspcompile.select.budget import cuts_channels
from sspcompile.select.mixture import Mixture, ablated, head_scores, mixture_of
from sspcompile.select.reading import Reading, read_through
from sspcompile.select.scoring import ENOUGH_PROMPTS, cached_keys, measured, measured_rankings, score_heads
from sspcompile.select.shrinkage import shrink
from sspcompile.select.texts import Texts
from sspcompile.slicing.sizes import Worth

SHAPE, COUNT = (2, 3), 3
scores = hnp.arrays(np.float64, (*SHAPE, COUNT), elements=st.floats(0, 100))
spreads = hnp.arrays(np.float64, (*SHAPE, COUNT), elements=st.floats(0, 50))
prompts = st.integers(0, 6).flatmap(lambda n: hnp.arrays(np.float64, (n, *SHAPE), elements=st.floats(0, 100)))
ALIKE = np.full(COUNT, 1 / COUNT)


# --- Cache and prompts combined --------------------------------------------------------------------------------------


@given(scores, spreads, prompts)
def test_shrunk_scores_are_finite_never_negative_and_weights_are_shares(importance, spread, values):
    found = shrink(importance, spread, ALIKE, values)
    assert np.isfinite(found.scores).all() and (found.scores >= 0).all()
    assert ((found.weight >= 0) & (found.weight <= 1)).all()


@given(scores, spreads)
def test_no_prompts_give_the_cache(importance, spread):
    found = shrink(importance, spread, ALIKE, np.zeros((0, *SHAPE)))
    np.testing.assert_array_equal(found.scores, importance @ ALIKE)
    assert (found.weight == 0).all()


def lively(seed: int = 0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(size=(*SHAPE, COUNT))), rng.random((*SHAPE, COUNT)) * 5, rng.random((4, *SHAPE)) + 0.1


def test_many_prompts_have_their_way_and_more_of_them_never_less():
    importance, spread, values = lively()
    weights = []
    for times in (1, 4, 64, 1024, 200_000):
        found = shrink(importance, spread, ALIKE, np.broadcast_to(values.mean(0), (times, *SHAPE)))
        weights.append(found.weight)
    assert all((later > earlier).all() for earlier, later in itertools.pairwise(weights))
    share = found.scores / found.scores.sum()
    np.testing.assert_allclose(share, values.mean(0) / values.mean(0).sum(), rtol=1e-2)


def test_the_more_prompts_of_a_domain_differ_the_less_they_count_and_a_loud_scenario_counts_no_more():
    importance, spread, values = lively()
    calm, wild = (shrink(importance, spread * factor, ALIKE, values) for factor in (1, 10))
    assert (wild.weight < calm.weight).all()
    loud = shrink(importance, spread, ALIKE, values * 1e4)
    np.testing.assert_allclose(loud.weight, calm.weight)
    np.testing.assert_allclose(loud.scores / loud.scores.sum(), calm.scores / calm.scores.sum(), atol=1e-12)


def test_domains_that_agree_leave_nothing_for_a_few_prompts_to_say():
    """No variance between sources: a new source is expected to be like the old ones."""
    importance, spread, values = lively()
    same = np.repeat(importance[..., :1], COUNT, axis=-1)
    found = shrink(same, spread, ALIKE, values)
    assert (found.weight == 0).all()
    np.testing.assert_allclose(found.scores / found.scores.sum(), same[..., 0] / same[..., 0].sum())


def test_shrinkage_by_hand():
    """Two heads, two domains with shares (.8, .2) and (.2, .8), asked for the first; one prompt with (.5, .5).

    Logs differ by ln 4 = 1.3863 between the domains, variance 1.3863^2 / 2 = 0.9609. With a relative variance of
    e - 1 of the prompts, v = ln(1 + (e - 1) / 1) = 1, so w = 0.9609 / 1.9609 = 0.49.
    """
    importance = np.array([[[0.8, 0.2], [0.2, 0.8]]])
    spread = np.full((1, 2, 2), np.e - 1)
    found = shrink(importance, spread, np.array([1.0, 0.0]), np.array([[[0.5, 0.5]]]))
    np.testing.assert_allclose(found.weight, 0.49, atol=0.002)
    ratio = (0.8 / 0.2) ** 0.51
    assert found.scores[0, 0] / found.scores[0, 1] == pytest.approx(ratio, rel=0.01)


def test_relative_variance_ignores_loudness_and_knows_a_head_that_comes_and_goes():
    pattern, loudness = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1.0, 10.0, 0.1, 5.0])
    np.testing.assert_allclose(relative_variance(loudness[:, None, None] * pattern), 0, atol=1e-12)
    # Shares (1, 0) and (0, 1) in turn: share .5, residuals +-.5, variance .25 * 4 / 3 over four prompts, / .5^2.
    turns = np.array([[[1.0, 0.0]], [[0.0, 1.0]]] * 2)
    np.testing.assert_allclose(relative_variance(turns), 4 / 3)
    assert (relative_variance(turns[:1]) == 0).all() and (relative_variance(turns * 0) == 0).all()


# --- A scenario through a toolkit ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny("qwen2", layers=3, hidden=64, heads=4, kv_heads=2, scale=0.1)
    made.model.config.save_pretrained(folder := tmp_path_factory.mktemp("model"))  # bounds are read from files
    return replace(made, path=folder)


@pytest.fixture(scope="module")
def toolkit(model):
    return prepare(model, pools(40), outside(), criteria=("fisher-greedy", "subspace"), continuation_tokens=3)


PROMPTS = pool_of("chemistry", DOMAINS["chemistry"], 12, seed=5).prompts


def scenario(**how) -> Scenario:
    return Scenario("lab", how.get("text"), how.get("prompts", ()), how.get("domains"), "prompts")


def compiled(model, toolkit, read: Scenario, **options) -> Reading:
    options = {"criterion": "fisher-greedy", "continuation_tokens": 3, **options}
    asked = Options(**options)
    return read_through(Request(read, asked, "x"), toolkit, model, Texts(model, asked), build=True)


@pytest.mark.parametrize("criterion", ["fisher-greedy", "subspace"])
def test_importance_comes_from_where_it_was_asked_for(model, toolkit, criterion):
    read = scenario(prompts=PROMPTS)
    found = {
        source: compiled(model, toolkit, read, importance_from=source, criterion=criterion)
        for source in ("domains", "prompts", "auto")
    }
    domains, own, both = (found[source].scores for source in ("domains", "prompts", "auto"))
    mixture = found["domains"].mixture
    np.testing.assert_allclose(domains.values, head_scores(toolkit, criterion, mixture))
    chosen = own_fit_part(PROMPTS)
    direct = importance_of(model, criterion, chosen, toolkit=toolkit, mixture=mixture.parts, continuation_tokens=3)
    np.testing.assert_allclose(own.values, direct, rtol=1e-6)
    assert (domains.source, domains.prompts, domains.prompt_weight) == ("domains", 0, 0.0)
    assert (own.source, own.prompts, own.prompt_weight) == ("prompts", len(chosen), 1.0)
    assert both.source == "both" and both.prompts == len(chosen) and 0 < both.prompt_weight < 1
    shares = [one.values / one.values.sum() for one in (domains, own, both)]
    assert ((shares[2] >= np.minimum(*shares[:2]) * 0.7) & (shares[2] <= np.maximum(*shares[:2]) * 1.4)).all()


@pytest.mark.parametrize("how", [{"text": "please tell me about acid"}, {"domains": {"math": 1.0}}])
def test_a_scenario_without_prompts_uses_the_cache_and_cannot_be_scored_on_prompts(model, toolkit, how):
    read = scenario(**how)
    found = compiled(model, toolkit, read)
    assert found.scores.source == "domains"
    with pytest.raises(ScenarioError, match=r"has none of its own.*--importance-from domains"):
        compiled(model, toolkit, read, importance_from="prompts")


def test_enough_prompts_of_its_own_need_no_scores_of_the_pools(model):
    """The pools say what the scenario is made of; the toolkit scores no head, and the whitelist stays empty."""
    told = prepare(model, pools(12), outside(), criteria=(), continuation_tokens=3)
    assert not told.importance and not told.whitelist.any() and told.meta["whitelist"] is None
    many = pool_of("chemistry", DOMAINS["chemistry"], 2 * ENOUGH_PROMPTS, seed=5).prompts
    read = scenario(prompts=many)
    assert cached_keys(Request(read, Options(), "x")) == ()
    found = compiled(model, told, read, criterion="auto")
    assert (found.scores.source, found.scores.prompt_weight) == ("prompts", 1.0)
    assert found.ranking.name == "obs" and [other.name for other in found.scores.others] == ["fisher"]
    assert not np.allclose(found.ranking.values, found.scores.others[0].values)
    # Channels of the MLPs are worth something only where this build may remove some.
    heads_alone = ({"keep": 0.5}, {"size": 0.9, "units": "heads"}, {"size": 0.9, "without": ("mixing",)})
    for options, cut in (({}, True), ({"size": 0.9}, True), *((one, False) for one in heads_alone)):
        asked = compiled(model, told, read, criterion="auto", **options)
        assert (asked.worth().channels is not None) == cut == cuts_channels(asked.options, model.geometry)
    # What a toolkit holds from another build changes nothing.
    scored = with_scores(Stages(model), told, pools(12), "fisher")
    np.testing.assert_array_equal(compiled(model, scored, read, criterion="auto").merit, found.merit)
    assert cached_keys(Request(read, Options(baselines="all"), "x")) == ("fisher", "subspace")


@pytest.mark.parametrize(
    "how", [{"text": "please tell me about acid"}, {"domains": {"math": 1.0}}, {"prompts": PROMPTS}]
)
def test_texts_of_the_mixture_score_heads_where_the_scenario_brings_too_few(model, how):
    """In one pass, by default, and no score of the pools is cached. A named criterion and its ablations need those."""
    told = prepare(model, pools(12), outside(), criteria=(), continuation_tokens=3)
    read = scenario(**how)
    assert cached_keys(Request(read, Options(), "x")) == ()
    found = compiled(model, told, read, criterion="auto")
    scores = found.scores
    assert (scores.criterion, scores.source, scores.prompts) == ("obs", "texts", min(64, len(found.splits.fit)))
    assert set(own_fit_part(read.prompts)) <= set(found.splits.fit) and not found.whitelist.any()
    continued = Texts(model, found.options).continued(found.splits.fit)
    expected, _ = measured_rankings(model, continued, found.options.seed, "head", no_steps)
    np.testing.assert_array_equal(scores.values, expected.values)
    for options in ({"without": ("mixing",)}, {"importance_from": "domains"}, {"criterion": "fisher"}):
        assert cached_keys(Request(read, Options(**options), "x")) == ("fisher",)
        with pytest.raises(ToolkitError, match="no fisher importance"):
            compiled(model, told, read, **{"criterion": "auto", **options})


def test_costs_rise_with_depth_where_a_repair_will_mend_what_early_layers_lose(model):
    texts = Texts(model, Options()).continued(PROMPTS)
    mended, plain = (measured(model, texts, 0, "head", no_steps, repair=how) for how in ("least-squares", "none"))
    heads = (mended.rankings[0].values / plain.rankings[0].values).mean(1)
    np.testing.assert_allclose(heads, np.exp([-1 / 3, 0, 1 / 3]))
    np.testing.assert_allclose(mended.channels, plain.channels * heads[:, None])
    np.testing.assert_array_equal(mended.rankings[1].values, plain.rankings[1].values)


def test_a_baseline_prices_heads_and_channels_alike_whatever_the_build_repairs(model, monkeypatch):
    """Its masks within the same bounds follow from one score, not from heads by one and channels by another."""
    told = prepare(model, pools(12), outside(), criteria=(), continuation_tokens=3)
    read = scenario(prompts=pool_of("chemistry", DOMAINS["chemistry"], 2 * ENOUGH_PROMPTS, seed=5).prompts)
    seen: list[Worth] = []
    monkeypatch.setattr(baselines, "within", lambda reading, g, layout, worth: (seen.append(worth),))
    for repair in ("least-squares", "none"):
        found = compiled(model, told, read, criterion="auto", size=0.9, baselines="all", repair=repair)
        sentences = Texts(model, found.options).continued(found.splits.fit[:4])
        judge = SimpleNamespace(loaded=model, sentences=sentences, progress=silent, peers=lambda *, channels: ())
        names = [one.name for one in baselines.rivals(found, told, judge, "per-layer")]
        assert names.count("criterion fisher") == 1
    mended, plain = (seen[place] for place in (baselines.SEEDS, len(seen) // 2 + baselines.SEEDS))
    np.testing.assert_array_equal(mended.heads, plain.heads)
    np.testing.assert_array_equal(mended.channels, plain.channels)


def test_spread_is_cached_per_domain(model, toolkit):
    assert toolkit.spread["fisher-greedy"].shape == (3, 4, 3) and (toolkit.spread["fisher-greedy"] > 0).all()
    labels = np.array([0, 0, 1, 1])
    values = np.random.default_rng(0).random((4, 2, 2))
    np.testing.assert_array_equal(spread_by_domain(values, labels, 2)[..., 1], relative_variance(values[2:]))


# --- Parts switched off ----------------------------------------------------------------------------------------------

MIXTURE = Mixture(("a", "b", "c"), np.array([0.2, 0.5, 0.3]), 0.9, 0.4, unknown_line=0.5)


def test_mixing_and_scenario_can_be_switched_off():
    assert ablated(MIXTURE, ()) is MIXTURE and ablated(MIXTURE, ("whitelist", "calibration")) is MIXTURE
    np.testing.assert_allclose(ablated(MIXTURE, ("mixing",)).parts, [0, 1, 0])
    np.testing.assert_allclose(ablated(MIXTURE, ("mixing", "scenario")).parts, 1 / 3)
    np.testing.assert_allclose(MIXTURE.parts, 0.6 * MIXTURE.weights + 0.4 / 3)


def test_switched_off_parts_change_what_they_stand_for_and_nothing_else(model, toolkit):
    read = scenario(prompts=PROMPTS)
    whole = compiled(model, toolkit, read, importance_from="domains")

    def without(*parts: str) -> Reading:
        return compiled(model, toolkit, read, importance_from="domains", without=parts)

    free = without("scenario")
    np.testing.assert_allclose(free.scores.values, toolkit.importance["fisher-greedy"].mean(-1), rtol=1e-6)
    top = without("mixing")
    np.testing.assert_allclose(top.scores.values, toolkit.importance["fisher-greedy"][..., 0], rtol=1e-6)
    bare = without("whitelist")
    assert not bare.whitelist.any()
    np.testing.assert_array_equal(bare.merit, bare.scores.values)
    # The texts that choose and judge follow the measured mixture, so that ablations are compared on the same ones.
    for ablation in (free, top, bare):
        np.testing.assert_array_equal(ablation.mixture.weights, whole.mixture.weights)
    raw = without("calibration")
    assert not np.allclose(raw.mixture.weights, whole.mixture.weights)


def test_without_the_scenario_its_prompts_do_not_count_either(model, toolkit):
    read = scenario(prompts=PROMPTS)
    request = Request(read, Options(without=("scenario",), criterion="subspace"), "x")
    used = ablated(compiled(model, toolkit, read).mixture, request.options.without)
    assert score_heads(request, used, (), toolkit, model, Texts(model, request.options)).source == "domains"


OUTSIDE = load_outside(POOLS_DIR / "outside")

# --- Scenarios that fit no domain ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lone(embedded):
    """A toolkit of the embedded model that has seen one of the two outside subjects, and no held-out text."""
    return prepare(
        embedded, fit_part(load_pools(POOLS_DIR)), OUTSIDE[:1], criteria=("fisher-greedy",), continuation_tokens=0
    )


def test_text_of_an_unseen_subject_is_less_known_than_unseen_text_of_the_domains(embedded, lone):
    """By rank, text by text. The embedded model sees it dimly: both outside subjects read like one of the domains."""

    def unknown(texts) -> list[float]:
        found = features(embedded, texts, layers=lone.recogniser.layers.tolist(), bare=True)
        return [mixture_of(lone, one[None]).unknown for one in found]

    held = [text for pool in load_pools(POOLS_DIR) for part in split(pool.prompts)[1:] for text in part]
    known, foreign = unknown(held), unknown(OUTSIDE[1].prompts)
    found = mannwhitneyu(foreign, known, alternative="greater")
    assert found.pvalue < 0.01, found


def test_recognition_is_judged_on_text_that_did_not_fit_it(lone):
    facts = lone.meta["recognition"]
    assert 0 <= facts["ece_after"] < 0.1 and 0 <= facts["unknown_found"] <= 1
    assert facts["named_right_prompts"] > 0.5 and 0 < facts["unknown_line"] < 1


def test_a_mixture_says_when_it_fits_no_domain():
    low, high = (replace(MIXTURE, unknown=share) for share in (0.2, 0.6))
    assert not low.is_unknown and high.is_unknown
    assert high.as_mapping()["fits_no_domain"] is True and high.as_mapping()["unknown"] == 0.6


def test_whole_groups_are_scored_and_cut_when_they_are_asked_for(model, toolkit):
    key = "fisher-greedy.group"
    both = with_scores(Stages(model), toolkit, pools(40), key)
    found = compiled(model, both, scenario(prompts=PROMPTS), granularity="group", keep=0.5)
    per_group = found.scores.values.reshape(3, 2, 2)
    np.testing.assert_allclose(per_group[..., 0], per_group[..., 1])
    heads = compiled(model, both, scenario(prompts=PROMPTS)).scores.values.reshape(3, 2, 2)
    assert not np.allclose(heads.sum(-1), per_group.sum(-1)), "closing a group is not closing its heads one by one"
    assert found.groups_only
    with pytest.raises(ToolkitError, match=r"no fisher-greedy.group importance"):
        compiled(model, toolkit, scenario(prompts=PROMPTS), granularity="group")


def test_a_score_of_all_prompts_together_is_weighed_by_their_number(model, toolkit):
    both = with_scores(Stages(model), toolkit, pools(40), "wanda")
    both = replace(both, spread={**both.spread, "fisher": both.spread["fisher-greedy"]})
    weights = []
    for count in (4, 36):
        prompts = pool_of("chemistry", DOMAINS["chemistry"], count, seed=6).prompts
        found = compiled(model, both, scenario(prompts=prompts), criterion="wanda").scores
        assert found.source == "both" and found.prompts == len(own_fit_part(prompts))
        weights.append(found.prompt_weight)
    assert 0 < weights[0] < weights[1] < 1
