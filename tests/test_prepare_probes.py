"""Axes, probes, temperatures, whitelist: numbers only, no model."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import wilcoxon
from test_prepare_tools import DOMAINS, pools

from sspcompile.errors import InputError
from sspcompile.prepare import axes, calibration, probes
from sspcompile.prepare.whitelist import FALSE_DISCOVERY, head_p_values, whitelist, wins

LAYERS, WIDTH, DOMAIN_COUNT = 3, 10, 4


def synthetic(per_domain=40, signal=3.0, seed=0, width=WIDTH):
    """Features [N, L, d]: layer 0 is noise, later layers carry the domain; labels [N]."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(DOMAIN_COUNT), per_domain)
    centres = rng.normal(size=(LAYERS, DOMAIN_COUNT, width)) * signal
    centres[0] = 0
    noise = rng.normal(size=(len(labels), LAYERS, width))
    return (noise + centres[:, labels].swapaxes(0, 1)).astype(np.float32), labels


def fitted_on(features, labels, seed=0):
    held_out = probes.split(labels, seed)
    found = probes.fit(features, labels, np.ones(len(labels)), ~held_out, DOMAIN_COUNT)
    return found, probes.auc(found.logits(features[held_out]), labels[held_out])


def test_probes_separate_an_easy_corpus_and_the_noise_layer_weighs_nearly_nothing():
    _, auc = fitted_on(*synthetic())
    assert auc[1:].min() > 0.97
    assert abs(auc[0].mean() - 0.5) < 0.15
    weight = probes.layer_weights(auc)
    assert weight[0] < 0.05 and weight.sum() == pytest.approx(1)


@pytest.mark.parametrize("width", [6, 50])
def test_newton_finds_the_minimum_that_lbfgs_finds(width):
    """Both ways to solve: in the coordinates (6) and in the span of fewer rows (50)."""
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(30, width)), (rng.random(30) < 0.4) * 1.0, rng.random(30) + 0.5
    w *= 30 / w.sum()
    solved = probes.solve(torch.tensor(x)[None], torch.tensor(y)[:, None], torch.tensor(w))
    weight, bias = solved[0][0, 0].numpy(), solved[1][0, 0].item()
    ridge = probes.RIDGE * (x**2).sum() / 30 / min(30, width)

    def loss(theta):
        z = x @ theta[:-1] + theta[-1]
        return (w * (np.logaddexp(0, z) - y * z)).mean() + ridge / 2 * (theta[:-1] ** 2).sum()

    best = minimize(loss, np.zeros(width + 1), method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9})
    assert loss(np.append(weight, bias)) <= best.fun + 1e-10
    np.testing.assert_allclose(weight, best.x[:-1], atol=2e-4)


def test_groups_of_layers_give_the_same_probes_as_all_at_once(monkeypatch):
    features, labels = synthetic()
    whole, _ = fitted_on(features, labels)
    monkeypatch.setattr(probes, "NEWTON_BYTES", 1)
    np.testing.assert_allclose(fitted_on(features, labels)[0].weight, whole.weight, atol=1e-5)


def test_split_is_stratified_deterministic_and_follows_the_seed():
    labels = np.repeat([0, 1], [40, 12])
    flags = probes.split(labels, 0)
    assert flags[:40].sum() == 10 and flags[40:].sum() == 3
    np.testing.assert_array_equal(flags, probes.split(labels, 0))
    assert not np.array_equal(flags, probes.split(labels, 1))


def test_sample_weights_balance_domains_and_descriptions():
    labels = np.array([0] * 10 + [1] * 4)
    described = np.array([False] * 8 + [True] * 2 + [False] * 4)
    weights = probes.sample_weights(labels, described)
    assert weights[:10].sum() == pytest.approx(7) and weights[10:].sum() == pytest.approx(7)
    assert weights[8:10].sum() == pytest.approx(7 * probes.DESCRIPTION_SHARE)


def test_layer_weights_are_zero_at_chance_and_equal_when_all_are_at_chance():
    assert probes.layer_weights(np.array([[0.5], [0.3], [1.0]])).tolist() == [0, 0, 1]
    assert probes.layer_weights(np.full((4, 2), 0.5)).tolist() == [0.25] * 4


def test_format_confound_is_found_when_answer_style_gives_the_domain_away_and_not_otherwise():
    plain = [p for pool in pools(24) for p in pool.prompts]
    labels = np.repeat(np.arange(3), 24)
    assert probes.format_confound(plain, labels, 0)["p_value"] > 0.001
    styled = [p + ["", " A) one B) two", " true or false"][k] for p, k in zip(plain, labels, strict=True)]
    found = probes.format_confound(styled, labels, 0)
    assert found["accuracy"] > 0.9 and found["chance"] == pytest.approx(1 / 3) and found["p_value"] < 1e-6


def test_axes_are_centred_unit_directions():
    features, labels = synthetic()
    found = axes.domain_axes(features, labels, DOMAIN_COUNT)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1)
    np.testing.assert_allclose(np.diag(axes.gram(found)), 1)
    # Shifting or scaling a layer changes nothing: the space is standardised.
    np.testing.assert_allclose(
        axes.domain_axes(features * np.array([1, 50, 0.02])[:, None] + 7, labels, DOMAIN_COUNT), found, atol=1e-4
    )


def test_axes_by_hand():
    # one layer, both coordinates with mean 0 and standard deviation 1: domain means (1, 1) and (-1, -1)
    features = np.array([[[1.0, 1.0]], [[1.0, 1.0]], [[-1.0, -1.0]], [[-1.0, -1.0]]])
    found = axes.domain_axes(features, np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(found, np.array([[1, 1], [-1, -1]]) / np.sqrt(2))


def test_identical_domains_are_refused():
    features = np.random.default_rng(0).normal(size=(4, 2, 3))
    with pytest.raises(InputError, match="coincide"):
        axes.domain_axes(np.concatenate([features, features]), np.repeat([0, 1], 4), 2)


def test_dead_coordinates_do_not_blow_up():
    features, _ = synthetic()
    features[:, :, 0] = 5.0
    _, scale = axes.standardisation(features)
    assert (scale[:, 0] == 1).all()


def test_selection_takes_orthogonal_axes_before_near_copies_and_everything_when_asked():
    unit = np.eye(3)
    near = unit[0] * 0.95 + unit[1] * np.sqrt(1 - 0.95**2)
    candidates = np.stack([unit[0], near, unit[1], unit[2]])
    chosen = axes.select(candidates, 3)
    assert not {0, 1} <= set(chosen.indices)
    assert chosen.coverage == pytest.approx(1, abs=1e-6)
    assert chosen == axes.select(candidates, 3)
    assert axes.select(candidates, 9).indices == (0, 1, 2, 3)
    assert axes.select(candidates, 4).orthogonality == pytest.approx(0.05)


def overconfident(seed=0, factor=4.0, n=600):
    rng = np.random.default_rng(seed)
    true_logits = rng.normal(size=(n, 2, 3)) * 2
    targets = (rng.random((n, 3)) < expit(true_logits[:, 0])) * 1.0
    true_logits[:, 1] = true_logits[:, 0]
    return true_logits * factor, targets


def regime(seed=0, factor=4.0, n=600):
    logits, targets = overconfident(seed, factor, n)
    return calibration.fit_regime(logits, targets, np.arange(n) % calibration.FOLDS)


def test_calibration_recovers_the_factor_by_which_logits_are_overconfident_and_lowers_the_error():
    fit = regime()
    np.testing.assert_allclose(np.exp(fit.log_temperature), 4.0, rtol=0.15)
    assert fit.ece_after < 0.5 * fit.ece_before


def test_calibration_leaves_calibrated_probes_alone():
    fit = regime(factor=1.0)
    np.testing.assert_allclose(fit.log_temperature, 0, atol=0.15)
    assert fit.ece_after < fit.ece_before + 0.01


def test_calibration_never_raises_the_loss_it_minimises():
    for seed in range(4):
        logits, targets = overconfident(seed, factor=[0.2, 0.9, 2, 30][seed], n=80)
        log_t = calibration.fit_temperature(logits[:, 0], targets)
        after = calibration.binary_cross_entropy(logits[:, 0] * np.exp(-log_t), targets)
        assert after <= calibration.binary_cross_entropy(logits[:, 0], targets) + 1e-6


def test_no_text_is_judged_with_a_temperature_that_it_fitted():
    """One fold is four times too sure, the other four times too timid: what either teaches makes the other worse."""
    logits, targets = overconfident(factor=1.0)
    folds = np.arange(len(logits)) % 2
    logits[folds == 0] *= 4
    logits[folds == 1] /= 4
    fit = calibration.fit_regime(logits, targets, folds)
    assert fit.ece_after > fit.ece_before + 0.02
    alone = calibration.fit_regime(logits[folds == 0], targets[folds == 0], np.zeros((folds == 0).sum()))
    assert alone.ece_after is None and alone.ece_before > 0


def test_folds_hold_every_label_alike_and_follow_the_seed():
    labels = np.repeat([0, 1], [9, 6])
    folds = calibration.folds_of(labels, 0)
    assert [np.bincount(folds[labels == k]).tolist() for k in (0, 1)] == [[3, 3, 3], [2, 2, 2]]
    np.testing.assert_array_equal(folds, calibration.folds_of(labels, 0))
    assert not np.array_equal(folds, calibration.folds_of(labels, 1))


def test_expected_calibration_error_by_hand():
    # two bins: {0.1, 0.3} with one positive: |0.4 - 1| ; {0.9} without: |0.9 - 0|; over 3 values
    found = calibration.expected_calibration_error(np.array([0.1, 0.3, 0.9]), np.array([0.0, 1.0, 0.0]), bins=2)
    assert found == pytest.approx((0.6 + 0.9) / 3)


def test_regime_without_text_stays_at_temperature_one():
    fit = regime()
    found = calibration.log_temperatures({"single": fit}, 2)
    np.testing.assert_array_equal(found[:, 0], fit.log_temperature)
    assert (found[:, 1:] == 0).all()


def test_cross_pairs_join_two_domains_and_every_pair_of_domains_occurs():
    labels = np.repeat(np.arange(3), 5)
    rows = np.flatnonzero(np.arange(15) % 5 < 3)
    pairs = calibration.cross_pairs(labels, rows, 2, 0)
    assert len(pairs) == 6 and {frozenset((labels[a], labels[b])) for a, b in pairs} == {
        frozenset(x) for x in ((0, 1), (0, 2), (1, 2))
    }
    assert {x for pair in pairs for x in pair} <= set(rows)


def head_values(seed=0, prompts=30, domains=3):
    """10 x 2 heads of log-normal importance. Head (0, 0) is high everywhere, (0, 1) in two domains only."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(domains), prompts)
    values = np.exp(rng.normal(size=(len(labels), 10, 2)) * 0.3)
    values[:, 0, 0] *= 6
    values[labels < 2, 0, 1] *= 6
    return values, labels


def test_fault_the_whitelist_follows_from_the_test():
    values, labels = head_values()
    found = whitelist(values, labels)
    assert found.chosen[0, 0] and found.p[0, 0] < 1e-4
    assert not found.chosen[0, 1] and found.p[0, 1] > 0.01
    # Take the advantage away on one domain's prompts: the test no longer rejects, and the head leaves the list.
    values[labels == 1, 0, 0] /= 6
    assert not whitelist(values, labels).chosen[0, 0]


def test_the_whitelist_needs_prompts_and_not_domain_means():
    values, labels = head_values(prompts=3)
    assert not whitelist(values, labels).chosen.any()


def alike(rng: np.random.Generator, kind: str, prompts: int) -> np.ndarray:
    """Importance [prompts, 8, 8] of exchangeable heads; skewed on the log scale, or tied to each other by layer."""
    if kind == "skewed":
        return np.exp(rng.exponential(size=(prompts, 8, 8)) * rng.random((prompts, 1, 1)) * 2)
    if kind == "by layer":
        return np.exp(rng.normal(size=(prompts, 8, 1)) * 2 + rng.normal(size=(prompts, 8, 8)))
    return np.exp(rng.normal(size=(prompts, 8, 8)))


@pytest.mark.parametrize("kind", ["plain", "skewed", "by layer"])
@pytest.mark.parametrize("domains", [1, 3])
def test_false_discoveries_are_controlled_when_no_head_stands_out(kind, domains):
    """With all heads alike every discovery is false, and the chance of any is the false discovery rate."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(domains), 60)
    found = [whitelist(alike(rng, kind, 60 * domains), labels).chosen.any() for _ in range(150)]
    # Three standard errors of 150 draws above the promised rate.
    assert np.mean(found) <= FALSE_DISCOVERY + 3 * np.sqrt(FALSE_DISCOVERY * (1 - FALSE_DISCOVERY) / 150)


@pytest.mark.parametrize("kind", ["plain", "skewed", "by layer"])
def test_heads_that_are_always_needed_are_found_among_others_and_few_others_are(kind):
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(2), 60)
    planted = np.zeros((8, 8), dtype=bool)
    planted[0, :3], planted[5, 2] = True, True
    false_shares, found_shares = [], []
    for _ in range(60):
        values = alike(rng, kind, 120)
        values[:, planted] *= 20
        chosen = whitelist(values, labels).chosen
        false_shares.append((chosen & ~planted).sum() / max(1, chosen.sum()))
        found_shares.append(chosen[planted].mean())
    assert np.mean(false_shares) <= FALSE_DISCOVERY and np.mean(found_shares) > 0.9


def test_a_signed_rank_test_would_list_heads_that_are_alike():
    """The reason for the sign test: skewed differences have a median of 0 and still a positive signed-rank sum."""
    values = alike(np.random.default_rng(0), "skewed", 2000)
    differences = np.log(values) - np.log(np.median(values, axis=(1, 2), keepdims=True))
    signed_rank = wilcoxon(differences.reshape(2000, -1), alternative="greater", axis=0).pvalue
    assert np.median(signed_rank) < 0.001 < 0.1 < np.median(head_p_values(values, np.zeros(2000)))


def test_wins_by_hand():
    # Medians 2, 0 and 5: at the median is no win, nor is a lead of less than a thousandth.
    values = np.array([[[1.0, 2, 3]], [[0, 0, 6]], [[5.004, 5, 1]]])
    assert wins(values).tolist() == [[[False, False, True]], [[False, False, True]], [[False, False, False]]]


def test_the_whitelist_is_capped_and_keeps_the_heads_with_the_best_weakest_domain():
    values, labels = head_values()
    values[:, :4] *= np.array([50.0, 40, 30, 20])[:, None]
    found = whitelist(values, labels, max_share=0.1)
    assert found.chosen.sum() <= 2
    assert not whitelist(values, labels, max_share=0).chosen.any()


def test_whitelist_p_is_the_largest_over_domains():
    values, labels = head_values()
    alone = [head_p_values(values[labels == k], labels[labels == k]) for k in range(3)]
    np.testing.assert_array_equal(head_p_values(values, labels), np.max(alone, axis=0))


def test_all_zero_importance_confirms_nothing_and_breaks_nothing():
    labels = np.repeat(np.arange(3), 10)
    assert not whitelist(np.zeros((30, 2, 2)), labels).chosen.any()
    assert (head_p_values(np.zeros((30, 2, 2)), labels) == 1).all()


def test_domains_of_the_easy_pools_share_their_filler_words():
    assert len({frozenset(words) for words in DOMAINS.values()}) == 3
