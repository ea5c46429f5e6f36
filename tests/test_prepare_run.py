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
from sspcompile.prepare import features, importance_of, prepare, probabilities, probes, with_scores
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkit import check
from sspcompile.request.domains import load_outside, load_pools


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
    assert toolkit.layer_weight.sum() == pytest.approx(1)
    assert toolkit.whitelist.sum() <= 0.2 * 12
    assert toolkit.probe_auc.mean() > 0.9
    for key in ("seed", "text_version", "pools_fingerprint", "calibration", "format_confound", "versions"):
        assert key in toolkit.meta


def test_prepare_is_deterministic_and_the_seed_counts(model, toolkit):
    again = prepare(model, pools(40), outside(), continuation_tokens=3)
    for field in dataclasses.fields(toolkit):
        value = getattr(toolkit, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(again, field.name), err_msg=field.name)
    np.testing.assert_array_equal(toolkit.importance["fisher"], again.importance["fisher"])
    assert again.meta == toolkit.meta
    other = prepare(model, pools(40), outside(), continuation_tokens=3, seed=1)
    assert not np.array_equal(other.probe_weight, toolkit.probe_weight)


def test_new_prompts_of_a_domain_are_recognised_online(model, toolkit):
    for k, (name, words) in enumerate(DOMAINS.items()):
        fresh = pool_of(name, words, 8, seed=9).prompts
        p = probabilities(toolkit, features(model, fresh), "single")
        mean = (p * toolkit.layer_weight[:, None]).sum(0)
        assert p.shape == (3, 3) and mean.argmax() == k and mean[k] > 0.6


def test_a_mixed_scenario_keeps_both_domains_at_their_share(model, toolkit):
    mixed = [p for name in ("chemistry", "math") for p in pool_of(name, DOMAINS[name], 8, seed=9).prompts]
    p = (probabilities(toolkit, features(model, mixed), "single") * toolkit.layer_weight[:, None]).sum(0)
    assert p[1] < min(p[0], p[2]) and 0.3 < p[0] < 0.7 and 0.3 < p[2] < 0.7


def test_one_certain_prompt_cannot_veto_the_others(toolkit):
    """Mean of probabilities: a prompt with a huge negative logit takes away its own share and no more."""
    base = np.repeat(toolkit.feature_mean[None], 4, axis=0)
    direction = toolkit.probe_weight[:, 0] * toolkit.feature_scale
    base[:3] += 50 * direction
    base[3] -= 1e6 * direction
    assert probabilities(toolkit, base, "single")[:, 0] == pytest.approx(0.75, abs=0.01)


def test_fault_calibration_is_used_and_keyed_by_layer_and_regime(model, toolkit):
    """In the release the flag selects the uncalibrated probe, and the keys never match after a reload."""
    found = features(model, pools()[0].prompts[:4])
    z = probes.logits(found, toolkit.feature_mean, toolkit.feature_scale, toolkit.probe_weight, toolkit.probe_bias)
    for column, regime in enumerate(("single", "cross", "outside")):
        temperature = np.exp(toolkit.log_temperature[:, column])
        expected = (1 / (1 + np.exp(-z / temperature[:, None]))).mean(0)
        np.testing.assert_allclose(probabilities(toolkit, found, regime), expected, rtol=1e-5)
    assert len({round(float(x), 3) for x in toolkit.log_temperature.ravel()}) > 3


def test_fault_out_of_domain_temperature_comes_from_other_text(model, toolkit):
    other = (pool_of("leisure", ("angle", "prime", "goal"), 6),)
    changed = prepare(model, pools(40), other, continuation_tokens=0)
    np.testing.assert_array_equal(changed.log_temperature[:, :2], toolkit.log_temperature[:, :2])
    assert not np.allclose(changed.log_temperature[:, 2], toolkit.log_temperature[:, 2])
    assert changed.meta["outside_fingerprint"] != toolkit.meta["outside_fingerprint"]
    assert toolkit.meta["calibration"]["outside"]["texts"] == 12


def test_without_outside_text_that_regime_is_uncalibrated_and_says_so(model):
    found = prepare(model, pools(), (), continuation_tokens=0)
    assert (found.log_temperature[:, 2] == 0).all()
    assert found.meta["calibration"]["uncalibrated"] == ["outside"]


def test_calibration_records_the_error_before_and_after(toolkit):
    for regime in ("single", "cross", "outside"):
        entry = toolkit.meta["calibration"][regime]
        assert 0 <= entry["ece_after"] <= 1 and 0 <= entry["ece_before"] <= 1
    assert toolkit.meta["calibration"]["cross"]["texts"] == 18


def test_fault_offline_and_online_features_are_the_same_function(model, monkeypatch):
    """In the release: mean over 512 padded positions offline, over real tokens online, both in fp16."""
    seen = []
    original = capture.features

    def spy(loaded, prompts, *rest):
        seen.extend(prompts)
        return original(loaded, prompts, *rest)

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
    assert found.meta["calibration"]["outside"]["texts"] == 12 + 24
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
    assert stages == ["features", "probes", "cross text", "outside text", "continuations", "fisher"]
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
    assert found.probe_auc.mean() > 0.75
    confound = found.meta["format_confound"]
    assert confound["accuracy"] < confound["chance"] + 0.2, confound
