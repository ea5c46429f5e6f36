"""The whole of `prepare` on tiny models, and the faults of the released code that it must not have."""

import dataclasses

import numpy as np
import pytest
from test_prepare_tools import DOMAINS, OTHER, outside, pool_of, pools, tiny

from sspcompile.criteria import CRITERIA
from sspcompile.embedded import MODEL_DIR, POOLS_DIR
from sspcompile.errors import InputError
from sspcompile.model import capture
from sspcompile.model.loading import load as load_model
from sspcompile.prepare import features, importance_of, prepare, with_directions, with_scores
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import check
from sspcompile.request.domains import load_outside, load_pools
from sspcompile.select.mixture import mixture_of


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2", layers=3, hidden=64, heads=4, kv_heads=2, scale=0.1)


@pytest.fixture(scope="module")
def toolkit(model):
    return prepare(model, pools(40), outside(), continuation_tokens=3)


def test_everything_is_filled_and_agrees_with_itself(model, toolkit):
    check(toolkit)
    assert toolkit.domains == tuple(DOMAINS) and toolkit.fingerprint == model.fingerprint
    assert toolkit.importance["fisher"].shape == (3, 4, 3) and (toolkit.importance["fisher"] > 0).all()
    assert toolkit.whitelist.sum() <= 0.2 * 12
    assert toolkit.directions is None, "no criterion asked for them"
    for key in ("seed", "text_version", "pools_fingerprint", "recognition", "format_confound", "versions"):
        assert key in toolkit.meta


def test_prepare_is_deterministic_and_the_seed_counts(model, toolkit):
    again = prepare(model, pools(40), outside(), continuation_tokens=3)
    for field in dataclasses.fields(toolkit):
        value = getattr(toolkit, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(again, field.name), err_msg=field.name)
    np.testing.assert_array_equal(toolkit.importance["fisher"], again.importance["fisher"])
    np.testing.assert_array_equal(toolkit.recogniser.weight, again.recogniser.weight)
    assert again.meta == toolkit.meta
    other = prepare(model, pools(40), outside(), continuation_tokens=3, seed=1)
    assert other.meta["recognition"]["ece_after"] != toolkit.meta["recognition"]["ece_after"], "folds follow the seed"


def mixture(model, toolkit, prompts):
    return mixture_of(toolkit, features(model, prompts, layers=toolkit.recogniser.layers.tolist(), bare=True))


def test_new_prompts_of_a_domain_are_recognised_online(model, toolkit):
    for k, (name, words) in enumerate(DOMAINS.items()):
        found = mixture(model, toolkit, pool_of(name, words, 8, seed=9).prompts)
        assert found.weights.argmax() == k and found.weights[k] > 0.6 and not found.is_unknown


def test_text_of_other_subjects_is_called_unknown(model, toolkit):
    found = mixture(model, toolkit, pool_of("leisure", OTHER, 8, seed=9).prompts)
    assert found.is_unknown and found.unknown > 0.6


def test_a_mixed_scenario_keeps_both_domains_at_their_share(model, toolkit):
    mixed = [p for name in ("chemistry", "math") for p in pool_of(name, DOMAINS[name], 8, seed=9).prompts]
    p = mixture(model, toolkit, mixed).weights
    assert p[1] < min(p[0], p[2]) and 0.3 < p[0] < 0.7 and 0.3 < p[2] < 0.7


def test_fault_what_no_domain_is_comes_from_other_text(model, toolkit):
    other = (pool_of("leisure", ("angle", "prime", "goal"), 6),)
    changed = prepare(model, pools(40), other, criteria=(), continuation_tokens=0)
    assert not np.allclose(changed.recogniser.weight, toolkit.recogniser.weight)
    assert changed.meta["outside_fingerprint"] != toolkit.meta["outside_fingerprint"]
    assert toolkit.meta["recognition"]["texts"] - changed.meta["recognition"]["texts"] == 12 - 6


def test_without_outside_text_nothing_is_unknown_and_the_toolkit_says_so(model):
    found = prepare(model, pools(), (), criteria=(), continuation_tokens=0)
    assert found.meta["recognition"]["unknown_found"] is None
    lost = mixture(model, found, pool_of("leisure", OTHER, 4).prompts)
    assert lost.unknown == 0 and not lost.is_unknown


def test_recognition_records_how_well_it_does_on_text_that_did_not_teach_it(toolkit):
    facts = toolkit.meta["recognition"]
    for key in ("named_right_prompts", "named_right_descriptions", "unknown_found", "ece_before", "ece_after"):
        assert 0 <= facts[key] <= 1
    assert facts["named_right_prompts"] > 0.9


def test_probe_directions_are_learned_only_for_a_criterion_that_reads_them(model, toolkit):
    found = with_scores(Stages(model), toolkit, pools(40), "subspace")
    assert found.directions.shape == (3, 3, 64) and found.meta["probes"]["auc_prompts"] > 0.9
    np.testing.assert_allclose(np.linalg.norm(found.directions, axis=-1), 1, rtol=1e-5)
    assert with_directions(Stages(model), found, pools(40)) is found
    np.testing.assert_array_equal(with_directions(Stages(model), toolkit, pools(40)).directions, found.directions)


def test_fault_offline_and_online_features_are_the_same_function(model, monkeypatch):
    """In the release: mean over 512 padded positions offline, over real tokens online, both in fp16."""
    seen = []
    original = capture.features

    def spy(loaded, prompts, *rest, **options):
        seen.extend(prompts)
        return original(loaded, prompts, *rest, **options)

    monkeypatch.setattr("sspcompile.model.capture.features", spy)
    prepare(model, pools(), outside(), continuation_tokens=0)
    assert set(pools()[0].prompts) <= set(seen) and set(outside()[0].prompts) <= set(seen)
    assert features is original


def test_fault_scores_follow_the_text_of_the_domain(model, toolkit):
    """I[:, :, k] is the mean over the prompts of domain k and of no other."""
    direct = importance_of(model, "fisher-greedy", pools()[1].prompts, continuation_tokens=3)
    whole = prepare(model, pools(), (), criteria=("fisher-greedy",), continuation_tokens=3)
    np.testing.assert_allclose(whole.importance["fisher-greedy"][:, :, 1], direct, rtol=1e-3)


def test_every_criterion_in_one_run_and_one_added_later(model, toolkit):
    whole = prepare(model, pools(10), outside(), criteria=tuple(CRITERIA), continuation_tokens=2)
    for name, array in whole.importance.items():
        assert array.shape == (3, 4, 3) and np.isfinite(array).all() and (array >= 0).all(), name
    assert (whole.importance["subspace"] <= 1).all() and (whole.importance["subspace-probe"] <= 1).all()
    fewer = prepare(model, pools(10), outside(), continuation_tokens=2)
    for name in ("kl", "subspace", "flap", "greedy-kl"):
        added = with_scores(Stages(model), fewer, pools(10), name)
        np.testing.assert_allclose(added.importance[name], whole.importance[name], rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(added.spread[name], whole.spread[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(InputError, match="changed"):
        with_scores(Stages(model), fewer, pools(11), "kl")


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_every_family_can_be_prepared_also_with_gqa_and_its_own_head_size(family):
    loaded = tiny(family, layers=2, head_dim=6, o_bias=family != "mistral")
    found = prepare(loaded, pools(8), outside(8), criteria=("fisher", "subspace"), continuation_tokens=2)
    assert found.importance["subspace"].shape == (2, 4, 3)


def test_axes_are_selected_from_more_candidates_and_the_others_become_outside_text(model):
    near = dataclasses.replace(pool_of("alchemy", DOMAINS["chemistry"], 24, seed=3))
    candidates = (*pools(), near)
    found = prepare(model, candidates, outside(), axes=3, continuation_tokens=0)
    facts = found.meta["axes"]
    assert facts["candidates"] == [*DOMAINS, "alchemy"] and facts["chosen"] == list(found.domains)
    # Two pools of the same words: only one of them can be an axis.
    assert len({"chemistry", "alchemy"} & set(found.domains)) == 1 and {"history", "math"} <= set(found.domains)
    assert found.importance["fisher"].shape[-1] == 3 == len(found.gram)
    gram = np.array(facts["candidate_gram"])
    inside = [facts["candidates"].index(name) for name in found.domains]
    pairs = gram[np.ix_(inside, inside)][~np.eye(3, dtype=bool)]
    assert facts["orthogonality"] == pytest.approx(1 - pairs.max(), abs=1e-5)
    assert facts["orthogonality"] > facts["whole_orthogonality"] and facts["whole_coverage"] == pytest.approx(1)
    # Two axes' worth of pools, their sentences, and all that belongs to no axis.
    inside = sum(
        len(pool.prompts) + len({pool.description, *pool.descriptions})
        for pool in candidates
        if pool.name in found.domains
    )
    assert found.meta["recognition"]["texts"] == inside + 12 + 24
    again = prepare(model, candidates, outside(), axes=3, continuation_tokens=0)
    assert again.domains == found.domains and again.meta == found.meta


def test_all_candidates_are_axes_when_all_are_asked_for_or_nothing_is(model, toolkit):
    whole = prepare(model, pools(40), outside(), axes=3, continuation_tokens=3)
    np.testing.assert_array_equal(whole.axes, toolkit.axes)
    assert whole.meta["axes"] == toolkit.meta["axes"] and toolkit.meta["axes"]["chosen"] == list(DOMAINS)
    for count in (1, 4):
        with pytest.raises(InputError, match="cannot become axes"):
            prepare(model, pools(40), (), axes=count)


def test_progress_reports_stages_and_reaches_their_ends(model):
    seen = []
    prepare(model, pools(8), outside(8), continuation_tokens=1, progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(name for name, _, _ in seen))
    assert stages == ["features", "other subjects", "recognition", "continuations", "fisher"]
    for stage in stages:
        last = [step for step in seen if step[0] == stage][-1]
        assert last[1] == last[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p[:1], "1 domain pools"),
        (lambda p: (p[0], p[0]), "appear twice"),
        (lambda p: (p[0], pool_of("small", OTHER, 3)), "Too few prompts: small"),
    ],
)
def test_pools_that_cannot_teach_anything_are_refused_before_any_work(model, change, message):
    with pytest.raises(InputError, match=message):
        prepare(model, change(pools(8)), ())


def test_an_unknown_criterion_is_refused_before_any_work(model):
    with pytest.raises(InputError, match="Accepted"):
        prepare(model, pools(8), (), criteria=("magic",))


def test_whitelist_needs_a_score_for_each_prompt_and_takes_the_first_that_has_one(model):
    without = prepare(model, pools(8), (), criteria=("wanda", "random"), continuation_tokens=1)
    assert not without.whitelist.any() and without.meta["whitelist"] is None
    found = prepare(model, pools(8), (), criteria=("wanda", "kl"), continuation_tokens=1)
    assert found.meta["whitelist"]["criterion"] == "kl"
    assert found.meta["importance_prompts"] == {"wanda": 24, "kl": 24}


@pytest.mark.skipif(not (MODEL_DIR / "model.safetensors").exists(), reason="the embedded model is not trained yet")
def test_shipped_pools_teach_the_embedded_model_its_domains_and_do_not_give_them_away_by_format():
    loaded = load_model(MODEL_DIR, fingerprint="embedded")
    found = prepare(
        loaded,
        load_pools(POOLS_DIR),
        load_outside(POOLS_DIR / "outside"),
        criteria=("fisher-greedy",),
        continuation_tokens=2,
    )
    told = found.meta["recognition"]
    assert told["named_right_prompts"] > 0.6 and told["named_right_descriptions"] > 0.3, told
    confound = found.meta["format_confound"]
    assert confound["accuracy"] < confound["chance"] + 0.2, confound
