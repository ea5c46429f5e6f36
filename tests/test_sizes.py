"""One budget over heads and channels: what every mask of `slicing/sizes.py` must hold, and builds by `--size`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from builders import FAMILY_SETTINGS, expert_config, family_config, save_random, stated
from hypothesis import assume, given
from hypothesis import strategies as st
from toolkits import Toolkits

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import BudgetError
from sspcompile.families import Geometry, geometry_of
from sspcompile.report.json import read_report
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.measures import of_size
from sspcompile.slicing.plan import plan_within
from sspcompile.slicing.sizes import (
    Worth,
    all_parameters,
    channel_parameters,
    channel_step,
    choose_per_layer,
    even_worth,
    head_parameters,
    share_of,
    smallest_size,
    uniform_sizes,
    widths_of,
)

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "starcoder2", "gemma2", "mixtral", "qwen3_moe")
BASES = {family: geometry_of(expert_config(family).to_dict()) for family in FAMILIES}

# The shape of Qwen2.5-72B.
LARGE = {
    "model_type": "qwen2",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "vocab_size": 152064,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


class Case(NamedTuple):
    """A model, what its units are worth, and which of them may go."""

    geometry: Geometry
    worth: Worth
    groups_only: bool

    def per_layer(self, size: float) -> Choice:
        return choose_per_layer(
            self.worth, self.geometry, (of_size(self.geometry, size),), groups_only=self.groups_only
        )

    def uniform(self, size: float) -> tuple[Choice, ...]:
        return uniform_sizes(self.worth, self.geometry, (of_size(self.geometry, size),), groups_only=self.groups_only)

    @property
    def smallest(self) -> float:
        channels = self.worth.channels is not None
        return smallest_size(self.geometry, channels=channels, groups_only=self.groups_only)

    @property
    def steps(self) -> list[int]:
        """Parameters that a layer loses with one step of either kind."""
        g, (groups, each) = self.geometry, (self.geometry.kv_heads, self.geometry.group_size)
        shapes = [(n, r) for n in range(1, groups + 1) for r in range(1, each + 1) if r == each or not self.groups_only]
        heads = [head_parameters(g, shape) for shape in shapes]
        smaller = [head_parameters(g, (n - 1, r)) for n, r in shapes if n > 1]
        smaller += [head_parameters(g, (n, r - 1)) for n, r in shapes if r > 1]
        return [max(heads) - min([*smaller, *heads]), channel_step(g) * channel_parameters(g)]


@st.composite
def cases(draw: st.DrawFn, *, channels: bool | None = None) -> Case:
    kv_heads, group_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    base, layers = BASES[draw(st.sampled_from(FAMILIES))], draw(st.integers(1, 4))
    width = draw(st.sampled_from((16, 48, 100, 255, 1024, 1536)))
    geometry = replace(
        base,
        layers=layers,
        sparse=frozenset() if base.is_dense else frozenset(range(layers)),
        kv_heads=kv_heads,
        heads=kv_heads * group_size,
        intermediate=width,
        expert_intermediate=width,
        vocab=draw(st.sampled_from((10, 260, 4000))),
    )
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    # Real scores spread over orders of magnitude, and some tie.
    heads = np.round(rng.lognormal(0, draw(st.sampled_from((0.0, 1.0, 4.0))), (geometry.layers, geometry.heads)), 3)
    worth = rng.lognormal(0, 2, (geometry.layers, geometry.channels)) * draw(st.sampled_from((1e-6, 1e-2, 1.0)))
    cut = draw(st.booleans()) if channels is None else channels
    return Case(geometry, Worth(heads, worth if cut else None), draw(st.booleans()))


sizes = st.floats(0.05, 1.0)


@given(cases(), sizes)
def test_a_budget_is_never_exceeded_and_met_within_one_step(case, size):
    assume(size >= case.smallest)
    g = case.geometry
    choice = case.per_layer(size)
    assert share_of(g, choice) <= size + 1e-9
    least = share_of(g, choice) <= case.smallest + 1e-9
    assert least or size - share_of(g, choice) <= max(case.steps) / all_parameters(g) + 1e-9
    for choice in case.uniform(size):
        assert share_of(g, choice) <= size + 1e-9


@given(cases(channels=True), sizes)
def test_every_uniform_mask_has_the_widest_mlps_that_its_heads_leave(case, size):
    assume(size >= case.smallest)
    g, widths = case.geometry, widths_of(case.geometry)
    for choice in case.uniform(size):
        assert len(set(choice.shapes)) == 1 and len(set(choice.widths)) == 1
        width = choice.widths[0]
        if width < g.width:
            wider = widths[widths.index(width) - 1]
            more = g.layers * channel_parameters(g) * (wider - width) / all_parameters(g)
            assert share_of(g, choice) + more > size


@given(cases(), sizes, sizes)
def test_per_layer_masks_are_nested_in_the_budget(case, one, other):
    small, large = sorted((one, other))
    assume(small >= case.smallest)
    fewer, more = case.per_layer(small), case.per_layer(large)
    assert not (fewer.kept & ~more.kept).any()
    if fewer.channels is not None and more.channels is not None:
        assert not (fewer.channels & ~more.channels).any()


@given(cases(), sizes)
def test_layers_are_regular_and_none_is_emptied(case, size):
    assume(size >= case.smallest)
    g = case.geometry
    for choice in (case.per_layer(size), *case.uniform(size)):
        by_group = choice.kept.reshape(g.layers, g.kv_heads, g.group_size).sum(-1)
        for row, (groups, each) in zip(by_group, choice.shapes, strict=True):
            assert sorted(row[row > 0].tolist()) == [each] * groups and groups >= 1
        if case.groups_only:
            assert set(by_group.flatten().tolist()) <= {0, g.group_size}
        if case.worth.channels is None:
            assert choice.channels is None and choice.widths == ()
        else:
            assert all(width in widths_of(g) for width in choice.widths)
            of_each = choice.channels.reshape(g.layers, g.mlps, g.width).sum(2)
            assert (of_each == np.array(choice.widths)[:, None]).all(), "all experts of a layer stay equally wide"


@given(cases(channels=True), sizes)
def test_of_every_layer_the_channels_stay_that_are_worth_most(case, size):
    assume(size >= case.smallest)
    choice, values = case.per_layer(size), case.worth.channels
    assert choice.channels is not None
    mlps = (-1, case.geometry.width)
    for kept, layer in zip(choice.channels.reshape(mlps), values.reshape(mlps), strict=True):
        assert kept.all() or layer[kept].min() >= layer[~kept].max()


@given(removed=st.integers(1, 10**9))
def test_a_share_that_was_worked_out_from_a_count_allows_that_count(removed):
    """Where a bound on the loss found a mask, its share is the budget: one parameter less would be another mask."""
    g = geometry_of(LARGE)
    whole = all_parameters(g)
    assert of_size(g, 1 - removed / whole).most == whole - removed


@given(cases(), st.floats(0.01, 1.0))
def test_a_budget_below_the_floors_is_refused_with_a_value_that_works(case, share):
    size = share * case.smallest
    assume(of_size(case.geometry, size).most < round(case.smallest * all_parameters(case.geometry)))
    for choose in (case.per_layer, case.uniform):
        with pytest.raises(BudgetError, match="less than what every layer needs") as refused:
            choose(size)
        named = float((refused.value.hint or "").split("--size ")[1].rstrip("."))
        assert case.smallest <= named <= case.smallest + 1e-4 + 1e-9
        assume(named <= 1)
        assert share_of(case.geometry, case.per_layer(named)) <= named
        assert case.uniform(named), "both layouts can"


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_share_is_what_the_plan_of_the_files_counts(family, bias, tmp_path):
    config = family_config(family, bias=bias).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    checkpoint = Checkpoint(tmp_path)
    g = checkpoint.geometry
    size = smallest_size(g, channels=g.has_channels) + 0.05
    plan = plan_within(checkpoint, (of_size(g, size),), "per-layer", channels=g.has_channels)
    choice = choose_per_layer(even_worth(g, channels=g.has_channels), g, (of_size(g, size),))
    assert plan.size == pytest.approx(share_of(g, choice), abs=1e-12) and plan.size <= size
    assert plan.dense.parameters == all_parameters(g)


# --- Builds ----------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]
FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--baselines", "few", "--quiet")


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_build_by_size_keeps_no_more_and_is_what_was_proven(run: Run, toolkits: Toolkits, at: Path, layout: str):
    toolkits.put(at, max_tokens=48, continuation_tokens=4)
    code, _, err = run("build", "--scenario", "finance-desk", "--size", 0.8, "--layout", layout, "--out", "cut", *FAST)
    assert code == 0, err
    plan, mask = (json.loads((at / "cut" / name).read_text()) for name in ("plan.json", "mask.json"))
    report = read_report(at / "cut" / "report.json")
    share = plan["parameters"]["sliced"] / plan["parameters"]["dense"]
    assert 0.75 < share <= 0.8 and mask["size_requested"] == 0.8
    assert report.budget.unit == "parameters" and report.budget.size_achieved == pytest.approx(share)
    assert report.mask.widths == tuple(plan["widths"]) and min(plan["widths"]) < plan["dense_width"]
    assert report.title == f"finance-desk: {share:.1%} of the parameters kept"
    assert run("verify", "cut", "-q")[0] == 0
    assert "MLP (of 256)" in run("inspect", "cut")[1]


@pytest.mark.whole
def test_a_size_of_heads_alone_leaves_the_mlps_whole(run: Run, at: Path):
    asked = ("--size", 0.85, "--units", "heads")
    code, _, err = run("build", "--scenario", "finance-desk", *asked, "--out", "cut", *FAST)
    assert code == 0, err
    mask, report = json.loads((at / "cut" / "mask.json").read_text()), read_report(at / "cut" / "report.json")
    assert mask["channels"] is None and report.mask.widths is None
    assert report.budget.size_achieved <= 0.85 and report.title.endswith("of the attention heads kept")
    assert "so no more could go" in (at / "cut" / "report.md").read_text()
    assert "At most 85 % of the parameters were allowed" in (at / "cut" / "report.md").read_text()
    assert run("verify", "cut", "-q")[0] == 0


def test_a_mixture_with_dense_layers_loses_heads_alone_or_is_refused_with_what_is_feasible(run: Run, at: Path):
    save_random(at / "model", family_config("qwen3_moe", layers=2, kv_heads=4, group_size=2))
    build = ("build", "--model", "model", "--scenario", stated(at / "sums.yaml"), "--out", "cut", *FAST)
    code, _, err = run(*build, "--size", 0.2)
    assert code == 3 and "a head and its whole MLP" in err and not (at / "cut").exists()
    nearest = float(err.split("--size ")[-1].strip().rstrip("."))
    size = round((1 + nearest) / 2, 3)
    code, _, err = run(*build, "--size", size)
    assert code == 0, err
    plan, mask = (json.loads((at / "cut" / name).read_text()) for name in ("plan.json", "mask.json"))
    assert mask["channels"] is None and mask["keep_achieved"] < 1
    assert plan["parameters"]["sliced"] <= size * plan["parameters"]["dense"]
