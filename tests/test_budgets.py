"""Budgets as numbers: `--max-params` and `--max-memory`, alone, together, and beside a bound on the loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from builders import FAMILY_SETTINGS, expert_config, family_config, save_random
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from sspcompile.api.slice import open_cut, write_cut
from sspcompile.checkpoint import Checkpoint, embedded_model
from sspcompile.checkpoint.source import tensor_table
from sspcompile.errors import BudgetError
from sspcompile.intervals import Estimate
from sspcompile.report.json import read_report
from sspcompile.request.options import Options
from sspcompile.request.sizes import COUNTS, UNITS, parsed
from sspcompile.select.allowed import Allowed, Rung
from sspcompile.select.budget import Budget, bounds_of, serving_of
from sspcompile.select.descent import descend
from sspcompile.select.floor import nothing_within
from sspcompile.slicing.frontier import SHARES, frontier_of
from sspcompile.slicing.layouts import Choice, choose
from sspcompile.slicing.mask import HeadMask, dump_mask, kept_of
from sspcompile.slicing.measures import Bound, Serving, at_most, memory_of, parameters_of, shared
from sspcompile.slicing.plan import plan_within
from sspcompile.slicing.sizes import (
    Bounds,
    Worth,
    channel_step,
    choose_per_layer,
    even_worth,
    smallest_share,
    uniform_sizes,
    widths_of,
)

Run = Callable[..., tuple[int, str, str]]
# Full attention, windows in every layer, in some, and heads without grouped queries among them.
FAMILIES = ("llama", "qwen2", "phi3", "ministral", "gemma2", "gemma3_text", "starcoder2", "mixtral", "qwen3_moe")


class Case(NamedTuple):
    """A checkpoint without weights, what its units are worth, and what it serves."""

    checkpoint: Checkpoint
    worth: Worth
    serving: Serving
    groups_only: bool

    def masks(self, bounds: Bounds) -> list[Choice]:
        g, whole = self.checkpoint.geometry, self.groups_only
        per_layer = choose_per_layer(self.worth, g, bounds, groups_only=whole)
        return [per_layer, *uniform_sizes(self.worth, g, bounds, groups_only=whole)]

    @property
    def channels(self) -> bool:
        return self.worth.channels is not None

    def bound(self, unit: str, share: float) -> Bound:
        """A share of what lies between the smallest model and all of it, as a number."""
        g = self.checkpoint.geometry
        measure = parameters_of(g) if unit == "parameters" else memory_of(self.checkpoint, self.serving)
        least = smallest_share(measure, g, channels=self.channels, groups_only=self.groups_only)
        flag = "--max-params" if unit == "parameters" else "--max-memory"
        return at_most(measure, round((least + share * (1 - least)) * measure.whole), flag)


def kept(bound: Bound, choice: Choice, case: Case) -> int:
    return bound.measure.kept(case.checkpoint.geometry, choice.shapes, choice.widths)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[[dict], Checkpoint]:
    """A checkpoint of a configuration alone."""
    folder = tmp_path_factory.mktemp("bare")

    def of(config: dict) -> Checkpoint:
        (folder / "config.json").write_text(json.dumps(config))
        return Checkpoint(folder)

    return of


@st.composite
def cases(draw: st.DrawFn) -> Callable[[Callable[[dict], Checkpoint]], Case]:
    """What makes a Case of `opened`."""
    shape = {
        "layers": draw(st.integers(1, 4)),
        "kv_heads": draw(st.integers(1, 4)),
        "group_size": draw(st.integers(1, 3)),
    }
    config = expert_config(draw(st.sampled_from(FAMILIES)), bias=draw(st.booleans()), hidden=72, **shape).to_dict()
    width = draw(st.sampled_from((16, 100, 1024)))
    config |= {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "vocab_size": draw(st.sampled_from((10, 4000))),
    }
    config["torch_dtype"] = config["dtype"] = draw(st.sampled_from(("float32", "bfloat16")))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    cut, groups_only = draw(st.booleans()), draw(st.booleans())
    serving = Serving(draw(st.sampled_from((1, 5, 300, 100_000))), draw(st.integers(1, 8)))

    def made(opened: Callable[[dict], Checkpoint]) -> Case:
        checkpoint = opened(config)
        checkpoint.expected()
        g = checkpoint.geometry
        channels = rng.lognormal(0, 2, (g.layers, g.channels)) * 0.01 if cut else None
        return Case(checkpoint, Worth(rng.lognormal(0, 1, (g.layers, g.heads)), channels), serving, groups_only)

    return made


shares = st.floats(0.0, 1.0)
units = st.sampled_from(("parameters", "memory"))


@given(cases(), units, shares)
def test_a_number_is_never_exceeded_and_met_within_one_step(opened, made, unit, share):
    case = made(opened)
    g, bound = case.checkpoint.geometry, case.bound(unit, share)
    per_layer, *uniform = case.masks((bound,))
    least = round(
        smallest_share(bound.measure, g, channels=case.channels, groups_only=case.groups_only) * bound.measure.whole
    )
    # The dearest single step: a head of every group or a group of all its heads, or a step of channels.
    full = bound.measure.attention(0, (g.kv_heads, g.group_size))
    layers = range(g.layers)
    step = max(max(bound.measure.attention(layer, (g.kv_heads, g.group_size)) for layer in layers), full)
    step = max(step, channel_step(g) * max(bound.measure.channel))
    left = kept(bound, per_layer, case)
    assert left <= bound.most and (left == least or bound.most - left < step)
    widths = widths_of(g)
    for choice in uniform:
        assert kept(bound, choice, case) <= bound.most
        if choice.widths and choice.widths[0] < g.width:
            wider = widths[widths.index(choice.widths[0]) - 1]
            assert bound.measure.kept(g, choice.shapes, (wider,) * g.layers) > bound.most


@given(cases(), units, shares, shares)
def test_a_larger_number_never_drops_what_a_smaller_one_kept(opened, made, unit, one, other):
    case = made(opened)
    fewer, more = (case.masks((case.bound(unit, share),)) for share in sorted((one, other)))
    assert not (fewer[0].kept & ~more[0].kept).any()
    if fewer[0].channels is not None and more[0].channels is not None:
        assert not (fewer[0].channels & ~more[0].channels).any()
    value = [sum_of(case.worth, masks[1]) for masks in (fewer, more)]
    assert value[0] <= value[1] * (1 + 1e-9), "uniform, what is kept is worth no less"


def sum_of(worth: Worth, choice: Choice) -> float:
    channels = 0.0 if worth.channels is None or choice.channels is None else worth.channels[choice.channels].sum()
    return float(worth.heads[choice.kept].sum() + channels)


@given(cases(), shares, shares, shares)
def test_of_several_bounds_all_hold_and_slack_ones_change_nothing(opened, made, size, parameters, memory):
    case = made(opened)
    bounds = (case.bound("parameters", size), case.bound("parameters", parameters), case.bound("memory", memory))
    for choice in case.masks(bounds):
        assert all(kept(bound, choice, case) <= bound.most for bound in bounds)
    tight, slack = case.bound("parameters", size), case.bound("memory", 1.0)
    alone, both = case.masks((tight,)), case.masks((slack, tight))
    assert [choice.units.key for choice in alone] == [choice.units.key for choice in both]


@given(cases(), units, st.floats(0.01, 0.99))
def test_an_infeasible_number_is_refused_with_the_smallest_that_works(opened, made, unit, share):
    case = made(opened)
    smallest = case.bound(unit, 0.0)
    most = int(share * smallest.most)
    asked = at_most(smallest.measure, most, smallest.flag)
    with pytest.raises(BudgetError, match=f"{smallest.flag} {most}.* is less than what every layer needs") as refused:
        case.masks((asked,))
    text = (refused.value.hint or "").split(f"{smallest.flag} ")[1].rstrip(".")
    named = parsed(text, UNITS if smallest.flag == "--max-memory" else COUNTS)
    # Memory is named in three digits, as it is typed.
    assert named == smallest.most or (smallest.flag == "--max-memory" and smallest.most < named < 1.01 * smallest.most)
    exact = at_most(smallest.measure, named, smallest.flag)
    assert all(kept(exact, choice, case) <= named for choice in case.masks((exact,)))
    with pytest.raises(BudgetError):
        case.masks((at_most(smallest.measure, smallest.most - 1, smallest.flag),))


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_counted_is_what_the_plan_of_the_files_says(opened, family, bias):
    checkpoint = opened({**family_config(family, bias=bias).to_dict(), "torch_dtype": "bfloat16", "dtype": "bfloat16"})
    g, serving = checkpoint.geometry, Serving(100, 3)
    worth = even_worth(g, channels=g.has_channels)
    for measure in (parameters_of(g), memory_of(checkpoint, serving)):
        bounds = (shared(measure, (1 + smallest_share(measure, g, channels=g.has_channels)) / 2, "--size"),)
        plan = plan_within(checkpoint, bounds, "per-layer", channels=g.has_channels)
        choice = choose_per_layer(worth, g, bounds)
        counted = parameters_of(g).kept(g, choice.shapes, choice.widths)
        assert (plan.sliced.parameters, plan.dense.parameters) == (counted, parameters_of(g).whole)
        memory = memory_of(checkpoint, serving)
        assert plan.memory(serving) == (memory.whole, memory.kept(g, choice.shapes, choice.widths))


def test_biases_that_a_wished_for_host_adds_count(opened):
    """A Qwen2 as Granite has a bias of o_proj in every layer, which the source has not."""
    checkpoint = opened(family_config("qwen2").to_dict())
    g = checkpoint.geometry
    measure = parameters_of(g, checkpoint.expected(), "granite")
    assert measure.added == g.layers * g.hidden
    for most in range(measure.whole - 3 * g.hidden, measure.whole + 2 * g.hidden, 61):
        bounds = (at_most(measure, most, "--max-params"),)
        plan = plan_within(checkpoint, bounds, "uniform", channels=True, host="granite")
        assert plan.host.model_type == "granite" and plan.sliced.parameters <= most


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_files_and_a_cache_take_what_was_allowed(tmp_path, family):
    """Weights to the byte; the cache of a window may hold a key less than the window."""
    save_random(tmp_path / "dense", family_config(family, layers=2))
    serving = Serving(24, 2)
    checkpoint = Checkpoint(tmp_path / "dense")
    g, measure = checkpoint.geometry, memory_of(checkpoint, serving)
    every = uniform_sizes(even_worth(g, channels=True), g, (shared(measure, 0.8, "--max-memory"),))
    choice = next(one for one in every if g.hidden % one.kept[0].sum() == 0)  # what the class of Gemma 2 asks for
    scores, rows = ((0.0,) * g.heads,) * g.layers, kept_of(choice.kept)
    mask = HeadMask("", g.layers, g.heads, g.kv_heads, rows, "uniform", 1.0, 1.0, scores, (), "random", {})
    mask = HeadMask(**{**vars(mask), "intermediate": g.intermediate, "channels": choice.kept_channels})
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    opened = open_cut(str(tmp_path / "dense"), tmp_path / "mask.json", host=None, any_model=True)
    write_cut(opened, tmp_path / "cut")
    weights = sum(info.nbytes for info in tensor_table(tmp_path / "cut").values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    ids = torch.randint(0, 250, (serving.batch, serving.context))
    with torch.no_grad():
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    held = sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
    allowed = measure.kept(g, choice.shapes, choice.widths)
    assert weights + held <= allowed <= 0.8 * measure.whole
    per_key = serving.batch * opened.plan.sliced.kv_bytes_per_token
    assert allowed - weights - held in ((0,) if family == "llama" else range(0, per_key + 1))


def test_memory_takes_the_cache_first_where_texts_are_long(opened):
    """A byte of a head frees more the longer the texts are, a byte of a channel does not."""
    checkpoint = opened({**family_config("llama", kv_heads=4, group_size=1).to_dict(), "intermediate_size": 1024})
    g, worth = checkpoint.geometry, even_worth(checkpoint.geometry, channels=True)
    masks = [
        choose_per_layer(worth, g, (shared(memory_of(checkpoint, Serving(tokens, 1)), 0.7, "--max-memory"),))
        for tokens in (1, 1000, 100_000)
    ]
    few, some, all_of_them = (sum(choice.widths) / (g.layers * g.intermediate) for choice in masks)
    assert few < some <= all_of_them == 1.0 and masks[-1].ratio < 1.0


# --- Options and the walk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "number"),
    [("120M", 120_000_000), ("1.1B", 1_100_000_000), ("120_000_000", 120_000_000), (7, 7), ("2k", 2000)],
)
def test_numbers_are_read_as_they_are_typed(typed, number):
    assert Options(max_params=typed).max_params == number and Options(max_params=typed).max_loss is None


def test_sizes_of_memory_are_exact():
    assert (
        Options(max_memory="6GB").max_memory == 6 * 10**9 and Options(max_memory="0.1GiB").max_memory == (1 << 30) // 10
    )
    assert Options(max_memory="9007199254740993").max_memory == 9007199254740993, "no float in between"


@pytest.mark.parametrize(
    "given", [{"max_params": "many"}, {"max_params": 0}, {"max_memory": "6 apples"}, {"context": 0}]
)
def test_what_is_no_number_is_refused(given):
    with pytest.raises(ValueError, match=r"max_params|max_memory|context"):
        Options(**given)


@pytest.mark.parametrize("typed", ["12", "0.5", " 16 ", "99999"])
def test_a_forgotten_unit_of_memory_is_said_and_what_is_meant(run, typed, monkeypatch):
    said = f"{typed.strip()} has no unit, give it one, as {typed.strip()}GB"
    code, out, err = run("plan", "--max-memory", typed)
    assert code == 2 and out == "" and said in err and "--max-memory: must be a size" in err
    monkeypatch.setenv("SSPCOMPILE_MAX_MEMORY", typed)
    assert said in run("plan")[2]
    assert Options(max_memory=f"{typed}GB").max_memory >= 5 * 10**8


@pytest.mark.parametrize("more", [(), ("--criterion", "fisher"), ("--max-memory", "9GB")])
def test_more_context_than_positions_is_warned_of_in_a_line(run, more):
    code, _, err = run("plan", "--context", 100_000, *more, "--json", "-q")
    said = [
        line for line in err.splitlines() if line.startswith("Warning: --context 100000 is more than the 512 positions")
    ]
    assert code == 0 and len(said) == 1
    assert "Warning: --context" not in run("plan", "--context", 512, *more, "--json", "-q")[2]


def test_bounds_stand_together_and_budgets_of_heads_alone():
    options = Options(size=0.8, max_params="2M", max_memory="1GB", max_loss=0.1)
    checkpoint = Checkpoint(embedded_model())
    found = bounds_of(options, checkpoint)
    assert [bound.flag for bound in found] == ["--size", "--max-params", "--max-memory"]
    assert Budget(bounds=found).size == 0.8 and Budget(bounds=found).unit == "parameters"
    assert bounds_of(Options(), checkpoint) == ()
    for alone in ({"keep": 0.5}, {"strength": 0.5}):
        with pytest.raises(ValueError, match="exclude each other"):
            Options(**alone, max_memory="1GB")


def test_memory_is_counted_for_the_models_positions_unless_it_is_told():
    assert serving_of(Options(), {"max_position_embeddings": 512}) == Serving(512, 1)
    assert serving_of(Options(), {"max_position_embeddings": 32768}) == Serving(4096, 1)
    assert serving_of(Options(context=9000, batch=4), {}) == Serving(9000, 4)


MERIT = np.random.default_rng(0).random((8, 8))


@given(st.floats(0.2, 0.95), st.floats(0.15, 0.95))
def test_beside_a_bound_the_walk_begins_at_the_largest_mask_that_it_allows(most, edge):
    """The smallest mask within the loss if there is one below the bound; otherwise the largest is the nearest."""
    measure = parameters_of(Checkpoint(embedded_model()).geometry)
    asked: list[float] = []

    def choice_of(share: float) -> Choice:
        return choose(MERIT, 8, min(share, most), "per-layer")

    def measured(choices, number):
        asked.extend(choice.ratio for choice in choices)
        return [Rung(choice.ratio, Estimate(0.05 + edge - choice.ratio)) for choice in choices]

    largest = choice_of(1.0).ratio
    bounds = (at_most(measure, 1000, "--max-params"),)
    allowed = Allowed(0.05)
    tried, keep, _ = descend(choice_of, measured, lambda choice: choice.ratio, 1 / 8, allowed, bounded=True)
    if keep is None:
        error = nothing_within(allowed, tried, "heads", bounds)
        assert largest < edge + 1e-9 and "within --max-params 1000" in error.message
        assert f"the nearest, {100 * largest:.1f} %" in error.message and "or a larger --max-params" in (
            error.hint or ""
        )
        return
    assert edge - 1e-9 <= keep <= largest and max(asked) == largest


# --- What people see -------------------------------------------------------------------------------------------------


def planned(run: Run, *words: object) -> dict:
    code, out, err = run("plan", *words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_plan_within_numbers_keeps_no_more(run, layout):
    words = ("--max-params", "1.2M", "--max-memory", "15MB", "--context", 512, "--batch", 4, "--layout", layout)
    plan = planned(run, *words)
    assert 1_000_000 < plan["parameters"]["sliced"] <= 1_200_000
    assert plan["memory"] == {
        "dense": 5784064 + 4096 * 2048,
        "sliced": plan["memory"]["sliced"],
        "context": 512,
        "batch": 4,
    }
    assert plan["memory"]["sliced"] <= 15_000_000
    whole = planned(run, "--max-params", "2M")
    assert whole["parameters"]["sliced"] == whole["parameters"]["dense"], "more than there is takes nothing"


@pytest.mark.parametrize("budget", [("--max-params", 1000), ("--max-memory", "1MB", "--context", 4)])
def test_what_cannot_be_met_exits_with_3_and_a_command_that_can(run, budget):
    code, out, err = run("plan", *budget, "--json")
    assert code == 3 and out == "" and "The nearest feasible value is" in err
    named = err.split(f"{budget[0]} ")[-1].strip().rstrip(".")
    assert run("plan", budget[0], named, *budget[2:], "--json")[0] == 0
    less = parsed(named, UNITS | COUNTS) * 99 // 100
    assert run("plan", budget[0], less, *budget[2:], "--json")[0] == 3
    assert budget[0] != "--max-memory" or named.endswith("MB")


def test_where_several_cannot_be_met_all_are_named_with_what_can(run):
    code, _, err = run("plan", "--size", 0.1, "--max-params", "2M", "--max-memory", "1MB", "--json")
    assert code == 3 and "--size 0.1 and --max-memory 1000000 for a sequence of 512 tokens are less than" in err
    named = err.split("values are ")[1].strip().rstrip(".").split()
    assert named[::2] == ["--size", "--max-memory"] and run("plan", *named, "--json")[0] == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_the_frontier_is_what_plans_of_its_shares_come_to(opened, family):
    checkpoint = opened({**family_config(family).to_dict(), "torch_dtype": "bfloat16", "dtype": "bfloat16"})
    g, serving = checkpoint.geometry, Serving(64, 2)
    found = frontier_of(checkpoint, serving, ("uniform", "per-layer"), channels=g.has_channels)
    assert found.points[-1].share is None and {point.layout for point in found.points} == {"uniform", "per-layer"}
    for point in found.points:
        share = point.size if point.share is None else point.share
        bounds = (shared(parameters_of(g), share, "--size"),)
        plan = plan_within(checkpoint, bounds, point.layout, channels=g.has_channels)
        assert point.parameters == plan.sliced.parameters and point.weight_bytes == plan.sliced.weight_bytes
        assert point.kv_bytes_per_token == plan.sliced.kv_bytes_per_token
        assert point.memory_bytes == plan.memory(serving)[1]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--units", "heads"), "with --units heads"),
        (("--criterion", "magnitude"), "with --criterion magnitude"),
        (("--importance-from", "domains"), "with --importance-from domains"),
    ],
)
def test_a_size_that_heads_alone_must_make_is_warned_of_and_the_table_says_what_goes(run, monkeypatch, options, why):
    """A size is of all parameters: without channels it may leave one head in every layer."""
    monkeypatch.setenv("COLUMNS", "200")
    least = ("--size", "0.84")
    code, out, err = run("plan", *least, *options)
    assert code == 0 and f"Only heads go {why}, and " in err and "reached by cutting heads;" in out
    code, out, err = run("plan", *least)
    assert code == 0 and "Only heads" not in err and "reached by cutting heads and channels;" in out
    code, _, err = run("plan", "--keep", "0.25", *options[:0])
    assert code == 0 and "Only heads" not in err


def test_plan_prints_the_frontier(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    out = " ".join(run("plan", "--size", 0.8, "--batch", 4)[1].split())
    assert "weights and cache for 4 sequences of 512 tokens" in out and "smallest" in out
    points = planned(run, "--size", 0.8)["frontier"]["points"]
    assert {point["share"] for point in points} == {*SHARES, None}
    assert {point["layout"] for point in planned(run, "--layout", "uniform")["frontier"]["points"]} == {"uniform"}


FAST = ("--continuation-tokens", "4", "--max-tokens", "48", "--baselines", "none", "--repair", "none", "--quiet")


def test_a_build_within_numbers_and_a_loss_says_what_was_asked(
    run, toolkits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    toolkits.put(tmp_path, max_tokens=48, continuation_tokens=4)
    monkeypatch.setenv("COLUMNS", "200")
    bounds = ("--max-params", "1.4M", "--max-memory", "21MB", "--context", 512, "--batch", 8, "--max-loss", 0.9)
    code, _, err = run("build", "--scenario", "finance-desk", *bounds, "--layout", "per-layer", "--out", "cut", *FAST)
    assert code == 0, err
    mask, plan = (json.loads((tmp_path / "cut" / name).read_text()) for name in ("mask.json", "plan.json"))
    assert mask["params_requested"] == 1_400_000
    assert mask["memory_requested"] == {"bytes": 21_000_000, "context": 512, "batch": 8}
    assert mask["scenario"]["floor"]["unit"] == "memory"
    assert plan["parameters"]["sliced"] <= 1_400_000 and plan["memory"]["sliced"] <= 21_000_000
    budget = read_report(tmp_path / "cut" / "report.json").budget
    assert (budget.memory_achieved, budget.context, budget.batch) == (plan["memory"]["sliced"], 512, 8)
    told = (tmp_path / "cut" / "report.md").read_text()
    assert "within a loss of 90 % of the next tokens and 1,400,000 parameters and 20.03 MiB of memory" in told
    shown = "90% of the next tokens changed, 1,400,000 parameters, 21,000,000 bytes for 8 sequences of 512 tokens"
    assert f"asked for: at most {shown}\n" in run("inspect", "cut")[1]
    assert run("slice", "--mask", "cut/mask.json", "--out", "elsewhere")[0] == 0
    again = json.loads((tmp_path / "elsewhere" / "plan.json").read_text())
    assert again["memory"] == plan["memory"], "a cut elsewhere serves what the build was asked for"
