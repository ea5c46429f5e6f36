"""A bound on the time of a token: how it is typed, the table that it counts by, and what people see of both.

Where a test is about what follows from times, the table is data: nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import FAMILY_SETTINGS, Shape, family_config, make_checkpoint, save_random, stated
from hypothesis import given
from hypothesis import strategies as st
from test_budgets import FAST, Case, cases, opened

import sspcompile
from sspcompile.api.latency import conditions_of, in_parameters, table_for, table_path
from sspcompile.api.token_time import timed_shape
from sspcompile.bench.layer_times import STAGE, Pool, kinds_of, model_of, timed_models, timed_shapes
from sspcompile.bench.step_times import ROUNDS, step_seconds
from sspcompile.checkpoint import Checkpoint, embedded_model
from sspcompile.checkpoint.tensors import attention_shapes, layer_of, mlp_shapes
from sspcompile.errors import ArtifactError, BudgetError, InputError
from sspcompile.families import Geometry, shallower
from sspcompile.model.cache import cache_of
from sspcompile.model.dense import open_dense, open_sizes
from sspcompile.model.placement import ON_CPU, Placement, resolve
from sspcompile.report.format import seconds
from sspcompile.report.json import read_report
from sspcompile.report.model import Pair, StepTime, TokenTimeSection
from sspcompile.report.token_time import token_time_table, token_time_verdict
from sspcompile.report.verdict import alarming
from sspcompile.request.options import Options
from sspcompile.request.recipe import dump_recipe, load_recipe
from sspcompile.request.request import read_request
from sspcompile.request.sizes import TIMES, parsed, time_text
from sspcompile.select.budget import Budget, bounds_of
from sspcompile.slicing.depth import any_layers
from sspcompile.slicing.latency import (
    Conditions,
    LatencyTable,
    Prices,
    Timed,
    dump_table,
    latency_of,
    read_table,
    seconds_of,
    table_of,
)
from sspcompile.slicing.layouts import Choice
from sspcompile.slicing.measures import NANOSECOND, SECOND, Bound, Serving, at_most, shared
from sspcompile.slicing.plan import plan_within
from sspcompile.slicing.sizes import smallest_counts
from sspcompile.workspace import Workspace

__all__ = ["opened"]  # a fixture of the tests of budgets

Run = Callable[..., tuple[int, str, str]]
PRICES = Prices(layer=1e-4, group=4e-5, head=1e-5, channel=1e-6)
STEP, VOCABULARY = 2e-3, 1e-3
SOMEWHERE = Conditions("torch", {"torch": "2"}, "cpu", "a processor", "float32", 2, Serving(64, 2))


def known(kinds: Sequence[int], prices: Sequence[Prices], conditions: Conditions = SOMEWHERE) -> LatencyTable:
    """A table of these prices, without what they were fitted to."""
    return LatencyTable(conditions, tuple(kinds), (), STEP, VOCABULARY, tuple(prices), 0.0)


def exact(checkpoint: Checkpoint, conditions: Conditions) -> LatencyTable:
    """The table that is fitted to times which obey PRICES, layers of another kind being dearer."""
    g = checkpoint.geometry
    by_layer, kinds = kinds_of(checkpoint.config, g, conditions.serving)
    prices = [replace(PRICES, group=(1 + kind) * PRICES.group) for kind in range(len(kinds))]
    truth = known(by_layer, prices, conditions)
    rows = [replace(row, rounds=(truth.foretold(row),) * 3) for row in timed_models(g, [4] * len(kinds))]
    return table_of(conditions, by_layer, rows)


def inject(home: Path, **asked: object) -> LatencyTable:
    """Leave the exact table where a build or plan with these options under `home` looks for one."""
    options = Options(max_latency="1s", **asked)
    checkpoint = open_sizes(options.source)
    conditions = conditions_of(options, checkpoint)
    path, table = table_path(checkpoint, Workspace(home), conditions), exact(checkpoint, conditions)
    path.parent.mkdir(parents=True)
    path.write_text(dump_table(table))
    return table


# --- What is typed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "nanoseconds"),
    [("35ms", 35_000_000), ("800us", 800_000), ("1.5 s", 1_500_000_000), ("0.25MS", 250_000), (7, 7)],
)
def test_times_are_read_as_they_are_typed(typed, nanoseconds):
    options = Options(max_latency=typed)
    assert options.max_latency == nanoseconds and options.max_loss is None


@pytest.mark.parametrize("typed", ["35", "fast", "0ms", "5 minutes", "-1ms", 0, 1.5])
def test_what_is_no_time_is_refused(typed):
    with pytest.raises(ValueError, match="max_latency"):
        Options(max_latency=typed)


def test_the_error_says_what_is_accepted(run: Run):
    code, _, err = run("plan", "--max-latency", "35")
    assert code == 2 and "--max-latency: must be a time as 35ms, 800us or 1.5s, not '35'" in err
    code, _, err = run("plan", "--max-latency", "35ms", "--latency-runtime", "tensorrt")
    assert code == 2 and "--latency-runtime: must be 'torch'" in err


@given(st.integers(1, 10**18))
def test_a_time_that_is_written_is_read_back(nanoseconds):
    assert parsed(time_text(nanoseconds), TIMES) == nanoseconds


def test_a_recipe_has_the_time_as_people_type_it(tmp_path: Path):
    recipe = load_recipe(
        stated(tmp_path / "sums.yaml", max_latency="12.5ms", latency_runtime="torch", max_memory="1GB")
    )
    text = dump_recipe(recipe)
    assert "max_latency: 12.5ms" in text and "latency_runtime: torch" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_recipe(tmp_path / "again.yaml") == recipe and recipe.max_latency == 12_500_000


# --- The table and what it counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"])
def test_exact_times_give_back_their_prices_for_every_shape(opened, family):
    checkpoint = opened(family_config(family, layers=4, hidden=64, kv_heads=4, group_size=4).to_dict())
    g, table = checkpoint.geometry, exact(checkpoint, SOMEWHERE)
    assert table.worst < 1e-9 and table.step == pytest.approx(STEP) and table.vocabulary == pytest.approx(VOCABULARY)
    windows = family in ("gemma2", "gemma3_text")
    assert len(table.prices) == (2 if windows or family == "qwen3_moe" else 1)
    truth = known(table.kinds, [replace(PRICES, group=(1 + n) * PRICES.group) for n in range(len(table.prices))])
    for kind in range(len(table.prices)):
        for groups in range(1, g.kv_heads + 1):
            for each in range(1, g.group_size + 1):
                for width in (8, g.width) if g.has_channels else (g.width,):
                    row = Timed(kind, 3, groups, each, width, vocabulary=True, rounds=())
                    assert table.foretold(row) == pytest.approx(truth.foretold(row), rel=1e-6)


def test_the_fit_of_noise_has_no_price_below_nothing():
    """Where no shape takes less than another, heads and channels are free."""
    rng = np.random.default_rng(0)
    shapes = [(4, 2, 48), (2, 2, 48), (4, 1, 48), (4, 2, 16), (2, 2, 16)]
    rows = [
        Timed(0, layers, *shape, vocabulary=vocabulary, rounds=tuple(1e-3 + 1e-6 * rng.random(3)))
        for shape in shapes
        for layers, vocabulary in ((4, False), (2, False), (4, True))
    ]
    table = table_of(SOMEWHERE, (0, 0), rows)
    found = (table.step, table.vocabulary, *vars(table.prices[0]).values())
    assert min(found) >= 0 and table.worst < 2e-3
    g = Checkpoint(embedded_model()).geometry
    measure = latency_of(g, replace(table, kinds=(0,) * g.layers))
    assert min(*measure.group, *measure.channel) >= 1, "less is always counted as less"


def random_table(case: Case, seed: int) -> LatencyTable:
    """Of two kinds of layers, with prices of its own for the case."""
    rng = np.random.default_rng(seed)
    prices = [Prices(*rng.lognormal(-12, 2, 4).tolist()) for _ in range(2)]
    kinds = rng.integers(0, 2, case.checkpoint.geometry.layers).tolist()
    return known(kinds, prices)


def bound_of(case: Case, table: LatencyTable, share: float) -> Bound:
    """So much of what lies between the smallest model and all of it."""
    g, measure = case.checkpoint.geometry, latency_of(case.checkpoint.geometry, table)
    least = smallest_counts(g, channels=case.channels, groups_only=case.groups_only)
    smallest = measure.kept(g, least.shapes, least.widths)
    return at_most(measure, smallest + round(share * (measure.whole - smallest)), "--max-latency")


def counted(g: Geometry, table: LatencyTable, choice: Choice) -> int:
    """Picoseconds of a mask, unit by unit."""

    def price(value: float) -> int:
        return max(1, round(value * SECOND))

    total = price(table.step) + price(table.vocabulary)
    for layer in range(g.layers):
        one, heads = table.prices[table.kinds[layer]], np.flatnonzero(choice.kept[layer]).tolist()
        channels = g.width if choice.channels is None else int(choice.channels[layer].sum()) // g.mlps
        total += price(one.layer) + sum(price(one.channel) for _ in range(channels))
        total += sum(price(one.group) for _ in {head // g.group_size for head in heads})
        total += sum(price(one.head) for _ in heads) if g.group_size > 1 else 0
    return total


@given(cases(), st.integers(0, 1 << 16), st.floats(0, 1))
def test_what_is_counted_is_the_price_of_every_unit_and_never_more_than_asked(opened, made, seed, share):
    case = made(opened)
    g, table = case.checkpoint.geometry, random_table(case, seed)
    bound = bound_of(case, table, share)
    for choice in case.masks((bound,)):
        found = bound.measure.kept(g, choice.shapes, choice.widths)
        assert found == counted(g, table, choice) <= bound.most
    plan = plan_within(case.checkpoint, (bound,), "per-layer", channels=case.channels, groups_only=case.groups_only)
    assert seconds_of(plan, table)[0] == bound.measure.whole / SECOND
    assert seconds_of(plan, table)[1] <= bound.most / SECOND


@given(cases(), st.integers(0, 1 << 16), st.floats(0, 1), st.floats(0, 1))
def test_a_bound_on_memory_holds_beside_it(opened, made, seed, share, other):
    case = made(opened)
    g = case.checkpoint.geometry
    bounds = (case.bound("memory", other), bound_of(case, random_table(case, seed), share))
    for choice in case.masks(bounds):
        assert all(bound.measure.kept(g, choice.shapes, choice.widths) <= bound.most for bound in bounds)
    assert {bound.measure.unit for bound in bounds} == {"memory", "latency"}


@given(cases(), st.integers(0, 1 << 16), st.floats(0.01, 0.99))
def test_an_infeasible_time_is_refused_with_one_that_works(opened, made, seed, share):
    case = made(opened)
    smallest = bound_of(case, random_table(case, seed), 0.0)
    asked = replace(smallest, most=int(share * smallest.most))
    with pytest.raises(
        BudgetError, match=r"--max-latency [\d.]+(us|ms|s) for 2 sequences of 64 tokens is less"
    ) as refused:
        case.masks((asked,))
    typed = (refused.value.hint or "").split("--max-latency ")[1].removesuffix(".")
    named = Options(max_latency=typed).max_latency
    assert named is not None and smallest.most <= named * NANOSECOND <= 1.001 * smallest.most + NANOSECOND
    assert case.masks((at_most(smallest.measure, named * NANOSECOND, "--max-latency"),))


def test_heads_go_where_a_microsecond_of_them_is_worth_least(opened):
    """Dear heads go before channels, and cheap ones stay."""
    checkpoint = opened({**family_config("llama").to_dict(), "intermediate_size": 1024})
    g = checkpoint.geometry
    shares = []
    for head in (1e-7, 1e-3):
        table = known((0,) * g.layers, [replace(PRICES, head=head, group=head)])
        plan = plan_within(
            checkpoint, (shared(latency_of(g, table), 0.7, "--max-latency"),), "per-layer", channels=True
        )
        shares.append(sum(heads for heads, _ in plan.counts) / g.total_heads)
    assert shares[1] < shares[0] == 1.0


def test_whole_layers_go_by_their_time(opened):
    checkpoint = opened(family_config("gemma2", layers=4).to_dict())
    g, table = checkpoint.geometry, exact(checkpoint, SOMEWHERE)
    measure = latency_of(g, table)
    bound = at_most(measure, measure.whole - measure.layer[-1], "--max-latency")
    choice = any_layers(g, (bound,))
    assert choice.units.removed == (3,) and measure.kept(g, choice.shapes) == bound.most


def test_it_is_counted_beside_the_other_bounds_and_by_a_table_alone():
    options = Options(size=0.8, max_memory="1GB", max_latency="5ms", context=64, batch=2)
    checkpoint = Checkpoint(embedded_model())
    found = bounds_of(options, checkpoint, exact(checkpoint, SOMEWHERE))
    assert [bound.flag for bound in found] == ["--size", "--max-memory", "--max-latency"]
    assert found[-1].most == 5_000_000 * NANOSECOND and Budget(bounds=found[-1:]).unit == "latency"
    assert Budget(bounds=found[-1:]).serving == Serving(64, 2)
    with pytest.raises(InputError, match="counts by a table"):
        bounds_of(options, checkpoint)


def test_a_table_is_read_as_it_was_written_and_a_damaged_one_is_refused(opened, tmp_path: Path):
    table = exact(opened(family_config("gemma2").to_dict()), SOMEWHERE)
    path = tmp_path / "table.json"
    path.write_text(dump_table(table))
    assert read_table(path) == table
    for spoiled in (dump_table(table)[:-20], "{}", dump_table(table).replace('"step": 0', '"step": "0')):
        path.write_text(spoiled)
        with pytest.raises(ArtifactError, match="does not hold a table"):
            read_table(path)


# --- What is timed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_the_models_that_are_timed_have_the_shapes_of_their_rows(opened, family):
    """Each with the sizes that a cut of that shape has, in layers of its kind; and it decodes."""
    config = family_config(family, layers=4, tied=family == "llama").to_dict()
    checkpoint = opened(config)
    g, serving, place = checkpoint.geometry, Serving(20, 2), resolve(ON_CPU)
    by_layer, kinds = kinds_of(checkpoint.config, g, serving)
    assert len(by_layer) == g.layers and sum(kind.count for kind in kinds) == g.layers
    pools = [Pool(place.device) for _ in kinds]
    for row in timed_models(g, [2] * len(kinds)):
        kind = kinds[row.kind]
        model = model_of(checkpoint.config, g, row, kind, place, pools[row.kind])
        shapes = {name: tuple(one.shape) for name, one in model.named_parameters()}
        own = shallower(g, [kind.first] * row.layers)
        wanted = attention_shapes(own, 1 % row.layers, row.groups * row.each, row.groups)
        if kind.first not in g.sparse:
            wanted |= mlp_shapes(own, 1 % row.layers, row.width)
        assert wanted.items() <= shapes.items()
        assert {layer_of(name) for name in shapes} == {None, *range(row.layers)}
        assert not any(one.is_meta for one in (*model.parameters(), *model.buffers()))
        assert step_seconds(model, serving, place.device) > 0
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == g.tied


def test_a_cache_is_full_before_the_clock_starts(opened):
    """Of a layer with a window no more than that, of the others the whole context."""
    checkpoint = opened(family_config("gemma2", layers=4).to_dict())
    g, place = checkpoint.geometry, resolve(ON_CPU)
    by_layer, kinds = kinds_of(checkpoint.config, g, Serving(100, 1))
    assert [kind.held for kind in kinds] == [8, 100] and by_layer == (0, 1, 0, 1)
    row = timed_models(g, [2, 2])[-1]
    model = model_of(checkpoint.config, g, row, kinds[1], place, Pool(place.device))
    caches: list[object] = []
    handle = model.register_forward_hook(lambda _module, _inputs, out: caches.append(out))
    step_seconds(model, Serving(100, 1), place.device)
    handle.remove()
    assert {layer.keys.shape[2] for layer in cache_of(caches[-1]).layers} == {104}


def test_shapes_that_a_class_refuses_are_not_timed(opened):
    """The heads of a Llama divide its hidden size."""
    checkpoint = opened(family_config("llama", hidden=72, kv_heads=3, group_size=3, head_dim=8).to_dict())
    g = checkpoint.geometry
    shapes = timed_shapes(g)
    assert shapes[0] == (3, 3, g.intermediate) and len(shapes) == len({*shapes}) >= 4
    assert all(g.hidden % (groups * each) == 0 for groups, each, _ in shapes)


def test_a_table_is_measured_once_and_kept(tmp_path: Path):
    save_random(tmp_path / "model", family_config("qwen2", layers=2))
    options = Options(model=str(tmp_path / "model"), max_latency="1s", context=16)
    checkpoint, workspace = open_sizes(options.source), Workspace(tmp_path)
    told: list[tuple[str, int, int]] = []
    table = table_for(options, checkpoint, workspace, ON_CPU, lambda *step: told.append(step))
    assert table is not None and {len(row.rounds) for row in table.rows} == {ROUNDS}
    assert all(min(row.rounds) > 0 for row in table.rows) and told[-1][0] == STAGE and told[-1][1] == told[-1][2]
    told.clear()
    assert table_for(options, checkpoint, workspace, ON_CPU, lambda *step: told.append(step)) == table and not told
    assert len([*workspace.latency_tables.iterdir()]) == 1
    assert table_for(Options(), checkpoint, workspace, ON_CPU) is None


def test_what_cannot_be_timed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options, workspace = Options(max_latency="1s", context=16), Workspace(tmp_path)
    checkpoint = open_sizes(options.source)
    with pytest.raises(InputError, match="on one device"):
        table_for(options, checkpoint, workspace, Placement(device_map="auto"))
    with pytest.raises(InputError, match="times 2 layers of each kind") as refused:
        table_for(options, checkpoint, workspace, Placement(memory=1))
    assert "--memory" in (refused.value.hint or "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="torchrun"):
        table_for(options, checkpoint, workspace)
    assert inject(tmp_path, context=16) == table_for(options, checkpoint, workspace)


# --- What people see -------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def within(table: LatencyTable, share: float) -> tuple[str, float]:
    """A time as it is typed, of the embedded model a share, and in seconds."""
    measure = latency_of(Checkpoint(embedded_model()).geometry, table)
    nanoseconds = int(share * measure.whole) // NANOSECOND
    return time_text(nanoseconds), nanoseconds / 1e9


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
def test_a_plan_within_a_time_takes_no_more_by_its_table(run: Run, home: Path, layout: str):
    table = inject(home, context=64, batch=2)
    typed, most = within(table, 0.85)
    words = ("--max-latency", typed, "--max-memory", "5.5MB", "--context", 64, "--batch", 2, "--layout", layout)
    code, out, err = run("plan", *words, "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["latency"]["sliced"] <= most < plan["latency"]["dense"]
    assert plan["memory"]["sliced"] <= 5_500_000
    assert plan["latency"]["table"]["worst"] < 1e-9 and len(plan["latency"]["table"]["rows"]) == len(table.rows)
    first, *_, last = plan["frontier"]["points"]
    assert first["token_seconds"] > last["token_seconds"] > 0
    shown = " ".join(run("plan", *words)[1].split())
    assert "a decoded token (ms; fitted within 0.0%)" in shown and "a token" in shown


def test_a_plan_without_it_says_nothing_of_time(run: Run, home: Path):
    plan = json.loads(run("plan", "--size", 0.9, "--json")[1])
    assert "latency" not in plan and {point["token_seconds"] for point in plan["frontier"]["points"]} == {None}
    assert "a token" not in run("plan", "--size", 0.9)[1] and not (home / "artifacts").exists()


def test_a_time_that_cannot_be_met_exits_with_3_and_a_command_that_can(run: Run, home: Path):
    inject(home, context=64)
    code, out, err = run("plan", "--max-latency", "1ms", "--context", 64, "--json")
    assert code == 3 and out == "" and "--max-latency 1ms for a sequence of 64 tokens is less than" in err
    named = err.split("The nearest feasible value is ")[1].strip().removesuffix(".").split()
    assert named[0] == "--max-latency" and run("plan", *named, "--context", 64, "--json")[0] == 0
    recipe = stated(home / "sums.yaml", max_latency="1ms", context=64)
    code, _, err = run("build", "--scenario", recipe, *FAST)
    assert code == 3 and "The nearest feasible value is --max-latency" in err and not (home / "artifacts/sums").exists()


def test_other_bounds_are_refused_before_anything_is_timed(run: Run, home: Path):
    code, _, err = run("plan", "--max-latency", "1s", "--max-params", 1000)
    assert code == 3 and "--max-params 1000 is less than" in err and not (home / "artifacts").exists()


@pytest.mark.parametrize(
    ("layout", "beside"), [("uniform", ()), ("per-layer", ("--max-loss", 0.9, "--max-memory", "5.5MB"))]
)
def test_a_build_says_what_was_asked_foretold_and_measured(run: Run, home: Path, layout: str, beside: tuple):
    table = inject(home, context=64, max_tokens=48, continuation_tokens=4)
    typed, most = within(table, 0.9)
    recipe = stated(home / "sums.yaml", max_latency=typed, context=64)
    words = ("--scenario", recipe, "--layout", layout, *FAST)
    given = ("--max-latency", typed, *beside) if beside else ()
    code, _, err = run("build", *words, *given, "--out", "cut")
    assert code == 0, err
    mask, plan = (json.loads((home / "cut" / name).read_text()) for name in ("mask.json", "plan.json"))
    assert mask["latency_requested"] == {"nanoseconds": round(most * 1e9), "context": 64, "batch": 1}
    assert plan["latency"]["sliced"] <= most < plan["latency"]["dense"] and plan["latency"]["table"]["rows"]
    assert f"max_latency: {typed}" in (home / "cut" / "recipe.yaml").read_text()
    report = read_report(home / "cut" / "report.json")
    found = report.token_time
    assert found is not None and found.sliced is not None and found.dense is not None
    assert (found.requested, found.foretold.sliced) == (pytest.approx(most), plan["latency"]["sliced"])
    assert report.budget is not None and report.budget.latency_achieved == plan["latency"]["sliced"]
    assert (report.budget.memory_achieved is None) == (not beside)
    told = " ".join((home / "cut" / "report.md").read_text().split())
    assert f"{seconds(most)} for a decoded token" in told and "## Time of a token" in told
    assert f"the table foretold {seconds(found.foretold.sliced)}" in told
    assert f"{typed} for a decoded token with 1 sequences of 64 tokens in the cache" in run("inspect", "cut")[1]
    assert run("verify", "cut")[0] == 0


def test_a_build_that_was_interrupted_goes_on_with_the_same_table(home: Path):
    make_checkpoint(home / "model", Shape(layers=3, hidden=64, kv_heads=2, group_size=2, head_dim=16))
    asked = {"max_tokens": 48, "continuation_tokens": 2, "context": 32, "baselines": "none", "repair": "none"}
    table = inject(home, model="model", **asked)
    (kept,) = (home / "artifacts" / "latency-tables").iterdir()
    before = kept.read_bytes()
    most = latency_of(Checkpoint(home / "model").geometry, table).whole * 95 // 100 // NANOSECOND
    recipe, told = stated(home / "sums.yaml"), []

    def build(out: str, stop: str | None = None) -> sspcompile.Artifact:
        def progress(stage: str, _done: int, _total: int) -> None:
            told.append(stage)
            if stage == stop:
                raise KeyboardInterrupt

        return sspcompile.build("model", recipe, out=out, max_latency=time_text(most), progress=progress, **asked)

    with pytest.raises(KeyboardInterrupt):
        build("cut", stop="proving")
    resumed, undisturbed = build("cut"), build("other")
    assert STAGE not in told and kept.read_bytes() == before
    for name in ("mask.json", "plan.json", "recipe.yaml", "model/model.safetensors"):
        assert (Path("cut") / name).read_bytes() == (Path("other") / name).read_bytes()
    assert resumed.report.token_time is not None and undisturbed.report.token_time is not None


def test_python_plans_and_reaches_by_the_same_table(home: Path):
    table = inject(home, context=64)
    typed, most = within(table, 0.85)
    plan = sspcompile.plan(max_latency=typed, context=64, layout="per-layer")
    assert seconds_of(plan, table)[1] <= most
    points = sspcompile.frontier(max_latency=typed, context=64).points
    whole = next(point for point in points if point.share == 1.0)
    assert whole.token_seconds == pytest.approx(seconds_of(plan, table)[0])
    assert all(point.token_seconds is None for point in sspcompile.frontier(context=64).points)


def test_what_a_build_costs_is_counted_by_the_size_that_the_time_comes_to(home: Path):
    table = inject(home, context=64)
    typed, _ = within(table, 0.85)
    given = {"max_latency": typed, "context": 64, "max_params": "1.4M"}
    request = read_request(str(stated(home / "sums.yaml")), given, {})
    dense = open_dense(None)
    plan = sspcompile.plan(layout="per-layer", **given)
    found = in_parameters(request, dense.checkpoint, table).options
    assert (found.max_latency, found.size, found.max_params) == (None, plan.size, 1_400_000)
    assert in_parameters(request, dense.checkpoint, None) is request


def test_a_sweep_takes_times(run: Run, home: Path):
    recipe = stated(home / "sums.yaml")
    words = ("--scenario", recipe, "--sweep", "max-latency=5ms,6500us", "--dry-run", "--out", "artifacts/dry")
    code, out, err = run("build", *words)
    assert code == 0, err
    assert out.splitlines() == ["artifacts/dry/max_latency-5ms", "artifacts/dry/max_latency-6500us"]


def section(sliced: StepTime | None, requested: float = 0.035) -> TokenTimeSection:
    return TokenTimeSection(
        requested=requested,
        foretold=Pair(dense=0.042, sliced=0.0348),
        dense=None if sliced is None else StepTime(median=0.041, p10=0.0405, p90=0.0422),
        sliced=sliced,
        context=4096,
        batch=1,
        conditions={"runtime": "torch", "device": "cpu"},
        worst=0.021,
        rows=(),
    )


@pytest.mark.parametrize(
    ("sliced", "said", "alarm"),
    [
        (
            StepTime(median=0.0339, p10=0.0335, p90=0.0346),
            "takes 33.9 ms (33.5 ms to 34.6 ms) as measured, of 35.0 ms",
            0,
        ),
        (
            StepTime(median=0.0362, p10=0.0358, p90=0.0371),
            "above the 35.0 ms that were asked for; the table foretold",
            1,
        ),
        (StepTime(median=0.0352, p10=0.0345, p90=0.0371), "asked for, by no more than rounds differ; the table", 1),
        (None, "34.8 ms of 35.0 ms by the table alone: the dense model and the cut did not fit", 0),
    ],
)
def test_a_miss_is_said_in_words(sliced, said, alarm):
    sentences = [*token_time_verdict(section(sliced))]
    assert said in sentences[0] and alarming(sentences[0]) == bool(alarm) == sentences[0].startswith(
        "MISSED: a decoded"
    )
    if sliced is not None:
        ratio = f"the cut takes {100 * sliced.median / 0.041:.1f} % of its time, foretold 82.9 %. No row"
        assert f"foretold 42.0 ms; {ratio} of the table is further from its fit than 2.1 %" in sentences[1]
    assert "4,096 tokens in the cache; runtime torch, device cpu" in token_time_table(section(sliced))[0]


def test_the_report_shows_every_row_of_the_table_with_its_error(opened):
    found = exact(opened(family_config("gemma2").to_dict()), SOMEWHERE)
    assert "kind" not in " ".join(row[0] for row in token_time_table(section(None))[2])
    rows = tuple(timed_shape(found, row) for row in found.rows)
    _, headers, cells = token_time_table(section(None).model_copy(update={"rows": rows}))
    assert len(cells) == len(found.rows) and {len(row) for row in cells} == {len(headers)}
    assert "of kind 2" in cells[-1][0] and cells[-1][-1].endswith(" %")
