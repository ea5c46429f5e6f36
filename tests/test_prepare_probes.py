"""Axes, probes, the recogniser and its temperature, the whitelist: numbers only, no model."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from scipy.stats import wilcoxon
from test_prepare_tools import DOMAINS, pools

from sspcompile.errors import InputError
from sspcompile.prepare import axes, calibration, learning, probes
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


def test_probes_separate_an_easy_corpus_and_the_noise_layer_is_at_chance():
    found, auc = fitted_on(*synthetic())
    assert auc[1:].min() > 0.97
    assert abs(auc[0].mean() - 0.5) < 0.15
    np.testing.assert_allclose(np.linalg.norm(found.directions(), axis=-1), 1)


def test_probe_directions_map_the_weight_back_through_the_standardisation():
    # weight (2, 3) on features scaled by (1, 0.5) is (2, 6) in the stream: at unit length (1, 3) / sqrt(10)
    one = probes.Probes(np.zeros((1, 2)), np.array([[1.0, 0.5]]), np.array([[[2.0, 3.0]]]), np.zeros((1, 1)))
    np.testing.assert_allclose(one.directions()[0, 0], np.array([1, 3]) / np.sqrt(10))


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


def examples(signal=3.0, seed=0, foreign=40, width=WIDTH) -> learning.Examples:
    """The synthetic domains, and text of none of them around centres of its own, with three folds."""
    features, classes = synthetic(signal=signal, seed=seed, width=width)
    rng = np.random.default_rng(seed + 1)
    other = rng.normal(size=(LAYERS, width)) * signal + rng.normal(size=(foreign, LAYERS, width))
    classes = np.concatenate([classes, np.full(foreign, DOMAIN_COUNT)])
    return learning.Examples(
        np.concatenate([features, other.astype(np.float32)]),
        classes,
        np.ones(len(classes)),
        np.arange(len(classes)) % 3,
        np.where(classes < DOMAIN_COUNT, -1, np.arange(len(classes)) % 2),
        DOMAIN_COUNT,
    )


def part_of(given: learning.Examples, rows: np.ndarray) -> learning.Examples:
    arrays = {name: value[rows] for name, value in vars(given).items() if name != "domains"}
    return learning.Examples(**arrays, domains=given.domains)


def test_the_recogniser_names_domains_and_text_of_none():
    given = examples()
    taught = np.arange(len(given.classes)) % 2 == 0
    told = learning.learn(part_of(given, taught), np.arange(LAYERS))
    p = told.recogniser.probabilities(given.features[~taught])
    np.testing.assert_allclose(p.sum(1), 1)
    assert (p.argmax(1) == given.classes[~taught]).mean() > 0.97
    assert (told.held_out.argmax(1) == given.classes[taught]).mean() > 0.95
    assert told.recogniser.weight.shape == (LAYERS, DOMAIN_COUNT + 1, WIDTH)


def test_unseen_text_is_judged_without_any_text_of_its_subject():
    """Two subjects far apart: each is known by its own text, and looks like neither the other one nor a domain."""
    given = examples()
    far = given.features.copy()
    far[given.subjects == 0] += 40
    far[given.subjects == 1] -= 40
    told = learning.learn(dataclasses.replace(given, features=far), np.arange(LAYERS))
    assert told.held_out[given.subjects >= 0, -1].min() > 0.9 and told.unseen.shape == (40,)
    assert told.unseen.mean() < told.held_out[given.subjects >= 0, -1].mean() - 0.1
    one = dataclasses.replace(given, subjects=np.minimum(given.subjects, 0))
    assert learning.learn(one, np.arange(LAYERS)).unseen is None


def test_without_text_of_other_subjects_there_is_no_such_class_and_nothing_is_unknown():
    told = learning.learn(examples(foreign=0), np.arange(LAYERS))
    assert told.recogniser.bias.shape == (DOMAIN_COUNT,) and told.recogniser.unknown_line.tolist() == [1.0]


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_the_fit_is_where_the_slope_of_the_loss_is_zero(ridge):
    """By finite differences, and no step from there is better."""
    rng = np.random.default_rng(0)
    x, classes, weights = rng.normal(size=(60, 5)), rng.integers(3, size=60), rng.random(60) + 0.5
    share = weights / weights.sum()

    def loss(theta):
        own = log_softmax(x @ theta[:, :-1].T + theta[:, -1], axis=1)[np.arange(60), classes]
        return -(share * own).sum() + ridge / 2 * (theta[:, :-1] ** 2).sum()

    found = learning.fit(x, classes, weights, 3, ridge)
    best = loss(found)
    for _ in range(200):
        step = rng.normal(size=found.shape) * 1e-2
        assert loss(found + step) >= best - 1e-9
        assert abs(loss(found + 1e-4 * step) - loss(found - 1e-4 * step)) < 1e-8


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)], ids=["tall", "wide"])
def test_variances_along_the_leading_directions_come_closer_to_each_other(shape):
    x = np.random.default_rng(0).normal(size=shape)
    coordinates = x @ learning.leading(x)
    found = coordinates.T @ coordinates / len(x)
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-9)
    variance = np.linalg.svd(x, compute_uv=False)[:8] ** 2 / len(x)
    np.testing.assert_allclose(np.diag(found), variance / (0.6 * variance.mean() + 0.4 * variance))


def test_directions_of_most_energy_come_first_and_no_more_than_asked_for(monkeypatch):
    x = np.random.default_rng(0).normal(size=(40, 6)) * np.array([9, 1, 1, 5, 1, 1])
    monkeypatch.setattr(learning, "DIRECTIONS", 2)
    basis = np.abs(learning.leading(x))
    assert basis.shape == (6, 2) and basis.argmax(0).tolist() == [0, 3]


def test_one_in_ten_held_out_texts_of_the_domains_lies_above_the_line():
    given = examples(signal=0.5)
    told = learning.learn(given, np.arange(LAYERS))
    inside, line = given.classes < DOMAIN_COUNT, told.recogniser.unknown_line[0]
    assert (told.held_out[inside, -1] > line).mean() == pytest.approx(learning.FALSE_ALARM, abs=1 / inside.sum())


def test_the_line_counts_texts_by_their_weight():
    # Of a domain: .1, .2 and .3 with weight 8 together, .8 and .9 with 1 each: a tenth of the weight is above .8.
    held_out = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9], [0.2, 0.8], [0.0, 1.0]])
    weights = np.array([4.0, 2.0, 2.0, 1.0, 1.0, 7.0])
    classes = np.array([0, 0, 0, 0, 0, 1])
    given = learning.Examples(np.zeros((6, 1, 1)), classes, weights, np.zeros(6, int), classes - 1, 1)
    assert learning.unknown_line(held_out, given) == 0.8
    assert learning.unknown_line(held_out / 100, given) == learning.LEAST_LINE


def overconfident(seed=0, factor=4.0, n=800):
    """Logits [N, 3] that are too sure by a factor, and classes drawn from what they would say without it."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 3)) * 2
    classes = (rng.random(n)[:, None] > softmax(logits, axis=1).cumsum(1)).sum(1)
    return logits * factor, classes, np.ones(n)


def error(probabilities, classes) -> float:
    return calibration.expected_calibration_error(probabilities, np.eye(3)[classes])


def test_calibration_recovers_the_factor_by_which_logits_are_overconfident_and_lowers_the_error():
    logits, classes, weights = overconfident()
    found = calibration.fit_temperature(logits, classes, weights)
    assert np.exp(found.log) == pytest.approx(4, rel=0.15)
    after = calibration.cross_fitted(logits, classes, weights, np.arange(800) % 3)
    assert error(after, classes) < 0.5 * error(softmax(logits, axis=1), classes)


def test_calibration_never_raises_the_loss_it_minimises():
    for seed in range(4):
        logits, classes, weights = overconfident(seed, factor=[0.2, 0.9, 2, 30][seed], n=80)
        found = calibration.fit_temperature(logits, classes, weights)
        assert found.loss <= calibration.cross_entropy(logits, classes, weights) + 1e-6
        assert found.loss == pytest.approx(calibration.cross_entropy(logits * np.exp(-found.log), classes, weights))


def test_no_text_is_judged_with_a_temperature_that_it_fitted():
    """One fold is four times too sure, the other four times too timid: what either teaches makes the other worse."""
    logits, classes, weights = overconfident(factor=1.0)
    folds = np.arange(len(logits)) % 2
    logits[folds == 0] *= 4
    logits[folds == 1] /= 4
    after = calibration.cross_fitted(logits, classes, weights, folds)
    assert error(after, classes) > error(softmax(logits, axis=1), classes) + 0.02


def test_folds_hold_every_label_alike_and_follow_the_seed():
    labels = np.repeat([0, 1], [9, 6])
    folds = calibration.folds_of(labels, 3, 0)
    assert [np.bincount(folds[labels == k]).tolist() for k in (0, 1)] == [[3, 3, 3], [2, 2, 2]]
    np.testing.assert_array_equal(folds, calibration.folds_of(labels, 3, 0))
    assert not np.array_equal(folds, calibration.folds_of(labels, 3, 1))


def test_expected_calibration_error_by_hand():
    # two bins: {0.1, 0.3} with one positive: |0.4 - 1| ; {0.9} without: |0.9 - 0|; over 3 values
    found = calibration.expected_calibration_error(np.array([0.1, 0.3, 0.9]), np.array([0.0, 1.0, 0.0]), bins=2)
    assert found == pytest.approx((0.6 + 0.9) / 3)


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
