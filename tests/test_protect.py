"""`--protect DOMAIN=LOSS`: which texts hold it, what is refused, and what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import Shape, make_checkpoint

from sspcompile.errors import InputError, RecipeError
from sspcompile.intervals import Estimate
from sspcompile.model.dense import open_dense
from sspcompile.report.json import read_report
from sspcompile.report.model import ProtectedRow, QualityRow, Report
from sspcompile.report.page import report_page
from sspcompile.report.verdict import verdict
from sspcompile.request.domains import DomainPool
from sspcompile.request.options import DEFAULT_MAX_LOSS, Options
from sspcompile.request.pools import pools_of
from sspcompile.request.protecting import protected_pools
from sspcompile.request.recipe import load_recipe
from sspcompile.request.resolving import resolve
from sspcompile.request.splits import GUARD_PROMPTS, JUDGE_PROMPTS, PROTECTED_SHARE, draw_splits, split
from sspcompile.select.allowed import Allowed, Rung
from sspcompile.select.descent import descend
from sspcompile.select.floor import nothing_within
from sspcompile.select.mixture import Mixture, protecting
from sspcompile.slicing.layouts import Choice, choose

MERIT = np.random.default_rng(0).random((8, 8))
NAMES = ("a", "b", "c")
POOLS = tuple(DomainPool(name, name, (), tuple(f"{name} {n}" for n in range(160))) for name in NAMES)
OWN = [f"mine {n}" for n in range(128)]


def test_it_is_typed_several_times_and_stands_beside_any_budget_of_parameters_or_loss():
    typed = resolve({"protect": ("law=0.1", "art=.05"), "size": 0.8}, environment={})
    assert typed.protect == {"art": 0.05, "law": 0.1} and list(typed.protect) == ["art", "law"]
    assert (typed.size, typed.max_loss) == (0.8, None)
    assert resolve({}, environment={"SSPCOMPILE_PROTECT": "law=0.1, art=0.05"}).protect == typed.protect
    assert resolve({"protect": typed.protect}, environment={}).max_loss == DEFAULT_MAX_LOSS
    recipe = {"protect": {"law": 0.2}, "max_params": 10**6}
    assert resolve({"size": 0.7}, environment={}, recipe=recipe).protect == {"law": 0.2}, "no budget lifts a floor"
    assert resolve({}, environment={}).protect is None


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"protect": ("law",)}, "--protect: must be DOMAIN=LOSS, as medicine=0.05, not 'law'"),
        ({"protect": ("law=much",)}, "must be DOMAIN=LOSS"),
        ({"protect": ("law=0.1", "law=0.2")}, "--protect: names law twice"),
        ({"protect": ("law=1.5",)}, "--protect.law: must be less than 1, not 1.5"),
        ({"protect": ("law=nan",)}, "--protect.law: must be a finite number"),
        ({"protect": ("law=0.1",), "keep": 0.5}, "--keep and --protect exclude each other"),
        ({"protect": ("law=0.1",), "nested": "1,0.8"}, "--nested and --protect exclude each other"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(given, told: str):
    with pytest.raises(RecipeError) as caught:
        resolve(given, environment={})
    assert told in str(caught.value)


def test_texts_of_a_protected_domain_join_behind_all_others_which_stay_as_they_were():
    parts, protect = np.array([0.8, 0.2, 0.0]), {"c": POOLS[2:], "b": POOLS[1:2]}
    before, after = (draw_splits(OWN, parts, POOLS, 0, *more) for more in ((), (protect,)))
    assert (after.guard, after.judge, after.off) == (before.guard, before.judge, before.off)
    assert after.fit[: len(before.fit)] == before.fit and before.protected == () and before.of_protected == ()
    added = after.of_protected
    assert len(added) / len(after.fit) == pytest.approx(PROTECTED_SHARE, abs=0.01)
    assert abs(sum(text.startswith("c") for text in added) - sum(text.startswith("b") for text in added)) <= 1
    fit, guard, judge = (set(part) for part in split(POOLS[2].prompts))
    (spared, _) = after.protected
    assert set(spared.guard) <= guard and set(spared.judge) <= judge and set(added) & guard == set()
    assert len(spared.guard) == min(GUARD_PROMPTS, len(guard)) and len(spared.judge) == min(JUDGE_PROMPTS, len(judge))
    assert {text for text in added if text.startswith("c")} <= fit
    assert "protected_fit" not in before.counts() and after.counts()["protected_fit"] == len(added)


def test_general_is_what_the_scenario_is_not_about_and_nothing_where_it_is_about_all():
    pools = pools_of(Options()).candidates
    parts = np.zeros(len(pools))
    parts[0] = 1.0
    options = Options(size=0.9, protect={"general": 0.1, "law": 0.1})
    with pytest.raises(InputError, match="names no known domain: law"):
        protected_pools(options, parts, pools)
    found = protected_pools(Options(size=0.9, protect={"general": 0.1, "sports": 0.1}), parts, pools)
    assert found["general"] == pools[1:] and [pool.name for pool in found["sports"]] == ["sports"]
    with pytest.raises(InputError, match="about all of them"):
        protected_pools(Options(size=0.9, protect={"general": 0.1}), np.full(len(pools), 1 / len(pools)), pools)


def test_cached_scores_count_a_protected_domain_for_its_share_of_the_texts():
    mixture = Mixture(NAMES, np.array([1.0, 0.0, 0.0]), 0.0, 0.0)
    used = protecting(mixture, {"c": ["c"]}, PROTECTED_SHARE)
    assert used.parts.tolist() == pytest.approx([1 - PROTECTED_SHARE, 0.0, PROTECTED_SHARE])
    assert protecting(mixture, {"x": ["x"]}, PROTECTED_SHARE) is mixture is protecting(mixture, {}, PROTECTED_SHARE)


def choice_of(share: float) -> Choice:
    return choose(MERIT, 8, share, "per-layer")


def test_a_mask_counts_only_where_all_floors_hold_and_the_error_names_those_that_do_not():
    """Each loss falls with what is kept; the protected domain's is the one that stops the walk."""

    def measure(choices, number):
        return [Rung(one.ratio, Estimate(0.02), (Estimate(0.05 + 2.0 * (0.8 - one.ratio)),)) for one in choices]

    allowed = Allowed(0.05, {"law": 0.05})
    tried, keep, failed = descend(choice_of, measure, lambda choice: choice.ratio, 1 / 8, allowed)
    assert keep and failed < 0.8 <= keep < 0.83 and all(one.loss.value <= 0.05 for one in tried)
    _, keep, _ = descend(choice_of, measure, lambda choice: choice.ratio, 1 / 8, Allowed(0.05, {"law": 0.9}))
    assert keep and keep < 0.5
    error = nothing_within(allowed, tuple(one for one in tried if one.kept < 0.8), "heads")
    assert "at most 5 % of the next tokens and 5 % of those of law: the nearest" in str(error)
    assert "--protect law=0.0" in str(error) and "--max-loss" not in str(error)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small model at random, and a recipe that says itself what it is about, so that no pool is read to find out."""
    home = tmp_path_factory.mktemp("home")
    make_checkpoint(home / "model", Shape(layers=2, hidden=32, kv_heads=2, group_size=2, head_dim=8))
    scenario = {"prompts": [f"How much is {n} times {n + 3}?" for n in range(64)], "domains": {"math": 1}}
    recipe = {"schema_version": 1, "name": "sums", "description": "Sums.", "scenario": scenario, "model": "model"}
    fast = {"max_tokens": 24, "continuation_tokens": 4, "baselines": "none", "repair": "none", "layout": "per-layer"}
    (home / "sums.yaml").write_text(json.dumps(recipe | fast))
    return home


def test_a_build_holds_the_floor_where_it_decides_and_reports_it_on_other_texts(run, home, monkeypatch):
    monkeypatch.chdir(home)
    wanted = ("--size", "0.95", "--protect", "law=0.9", "--protect", "general=0.9")
    code, _, err = run("build", "--scenario", "sums.yaml", *wanted, "--out", "cut", "--quiet")
    assert code == 0, err
    report, recipe = read_report(home / "cut" / "report.json"), load_recipe(home / "cut" / "recipe.yaml")
    assert recipe.protect == {"general": 0.9, "law": 0.9} and recipe.size == 0.95 and recipe.max_loss is None
    assert [one.domain for one in report.protected] == ["general", "law"]
    for one in report.protected:
        assert 0 < one.guard_loss <= one.max_loss == 0.9 and one.loss.low is not None and one.texts > 8
    assert json.loads((home / "cut" / "mask.json").read_text())["scenario"]["protect"] == recipe.protect
    assert report.budget and report.budget.size_achieved and 0.9 < report.budget.size_achieved <= 0.95
    markdown = (home / "cut" / "report.md").read_text()
    assert (
        "Protected: next tokens that change" in markdown and "of the scenario's own prompts and prompts of" in markdown
    )


def test_a_floor_that_a_size_cannot_hold_is_refused_with_the_smallest_size_that_was_measured_to(run, home, monkeypatch):
    monkeypatch.chdir(home)
    wanted = ("--size", "0.95", "--protect", "law=0.2", "--out", "none", "--quiet")
    code, _, err = run("build", "--scenario", "sums.yaml", *wanted)
    assert code == 3 and not (home / "none").exists()
    assert "No mask within --size 0.95 changes at most" in err and "of the next tokens of law" in err
    assert "the smallest that holds, as measured, keeps 9" in err and "or --size 0.9" in err


def test_an_unknown_domain_is_refused_before_any_work_with_the_known_ones(run, home, monkeypatch):
    monkeypatch.chdir(home)
    for command in (("build", "--dry-run", "--scenario", "sums.yaml"), ("plan",)):
        code, _, err = run(*command, "--model", "model", "--size", "0.9", "--protect", "lav=0.1", "--quiet")
        assert code == 2 and "no known domain: lav. Known: astronomy," in err and "law," in err


def test_what_the_floor_costs_is_foretold(home, monkeypatch):
    monkeypatch.chdir(home)
    from sspcompile.api.cost import cost_of
    from sspcompile.request.request import read_request
    from sspcompile.workspace import Workspace

    dense, names = open_dense("model"), []
    for given in ({"size": 0.9}, {"size": 0.9, "protect": {"law": 0.1, "general": 0.1}}):
        found = cost_of(read_request("sums.yaml", given, {}), dense, Workspace(home))
        names.append({stage.name: stage.texts for stage in found.stages})
    assert set(names[1]) - set(names[0]) == {"measuring what is protected", "judging what is protected"}
    assert names[1]["continuations"] > names[0]["continuations"]


@pytest.mark.parametrize(
    ("loss", "said", "conclusion"),
    [
        (Estimate(0.04, 0.02, 0.06), "law is protected: 4 % (2 % to 6 %)", "QUALITY HOLDS"),
        (Estimate(0.06, 0.04, 0.08), "LOSS: law was to be protected: 6 % (4 % to 8 %)", "QUALITY HOLDS"),
        (
            Estimate(0.08, 0.06, 0.1),
            "LOSS: law was to be protected: 8 %",
            "SHIP FOR THIS SCENARIO ONLY: loses more of law",
        ),
    ],
)
def test_the_verdict_says_when_it_did_not_hold(loss: Estimate, said: str, conclusion: str):
    ours = QualityRow(name="this build", role="ours", mean_kl=Estimate(0.1), top1_agreement=Estimate(0.97))
    row = ProtectedRow(domain="law", max_loss=0.05, guard_loss=0.03, loss=loss, texts=24)
    report = Report(title="x", quality=(ours,), protected=(row,))
    found = verdict(report)
    assert found[0].startswith(conclusion) and any(sentence.startswith(said) for sentence in found)
    chance = [sentence for sentence in found if "by no more than chance" in sentence]
    assert bool(chance) == (loss.value == 0.06)
    quality = next(block for block in report_page(report).blocks if block.title == "Quality")
    assert quality.tables[1].rows[0][:3] == ("law", "5 %", "3 %")
