"""Recipes: all errors at once, the round trip, precedence, and the recipes that ship."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sspcompile.cli.build import build
from sspcompile.embedded import EMBEDDED, SCENARIOS_DIR
from sspcompile.errors import RecipeError
from sspcompile.request.keywords import Keywords
from sspcompile.request.options import NAMES, PARTS, Options, flag, shown_of
from sspcompile.request.page import files
from sspcompile.request.poolcheck import EMBEDDED_NAMES, embedded_sentence, near_repeats
from sspcompile.request.prompts import Prompt, answer_of, answered, told
from sspcompile.request.recipe import Recipe, ScenarioSpec, dump_recipe, find_recipe, load_recipe, shipped_recipes
from sspcompile.request.resolving import resolve
from sspcompile.request.scenario import read_scenario
from sspcompile.request.splits import own_fit_part
from sspcompile.select.scoring import ENOUGH_PROMPTS

MINIMAL = """\
schema_version: 1
name: bakery
description: What bakers ask.
scenario:
  text: Answer bakers about flour.
"""


def load_text(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, text)
    assert caught.value.exit_code == 2
    return caught.value.problems


def test_minimal_recipe_leaves_every_option_open(tmp_path: Path) -> None:
    recipe = load_text(tmp_path, MINIMAL)
    assert recipe.keep is recipe.model is recipe.layout is recipe.seed is None


def test_all_errors_come_at_once_with_place_and_line(tmp_path: Path) -> None:
    text = """\
schema_version: 2
name: Bad Name
descripton: x
scenario:
  text: hello there
  prompt: [a]
  prompts: [1]
keep: 1.5
strength: "high"
layout: [1]
max_tokens: "12"
seed: true
"""
    assert set(problems(tmp_path, text)) == {
        "schema_version (line 1): must be 1, not 2",
        "name (line 2): must be lower-case letters, digits and hyphens, not 'Bad Name'",
        "descripton (line 3): is not a known key; did you mean 'description'?",
        "description: is missing",
        "scenario (line 4): needs text, prompts or prompts_file, domains, or one with domains; it has text, prompts",
        "scenario.prompt (line 6): is not a known key; did you mean 'prompts'?",
        "scenario.prompts[0] (line 7): must be text, a list of messages, or a mapping with the key text, not 1",
        "keep (line 8): must be less than or equal to 1, not 1.5",
        "strength (line 9): must be a number, not 'high'",
        "strength (line 9): keep and strength exclude each other; give one",
        "layout (line 10): must be 'auto', 'uniform' or 'per-layer', not [1]",
        "max_tokens (line 11): must be a whole number, not '12'",
        "seed (line 12): must be a whole number, not True",
    }


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("keep: 0\n", "keep (line 6): must be greater than 0, not 0"),
        ("keep: .nan\n", "keep (line 6): must be a finite number, not nan"),
        ("strength: -0.1\n", "strength (line 6): must be greater than or equal to 0"),
        ("keep: 0.5\nstrength: 0.5\n", "strength (line 7): keep and strength exclude each other"),
        (
            "repair: bias\n",
            "repair (line 6): must be 'least-squares', 'least-squares-mlp', 'flap-bias' or 'none', not 'bias'",
        ),
        ("criterion: No Such\n", "criterion (line 6): must be lower-case"),
        ("max_tokens: 0\n", "max_tokens (line 6): must be greater than or equal to 8"),
        ("continuation_tokens: 1.5\n", "continuation_tokens (line 6): must be a whole number"),
        ("seed: -1\n", "seed (line 6): must be greater than or equal to 0"),
        ("model: ''\n", "model (line 6): must not be blank"),
        ("zzz: 1\n", "zzz (line 6): is not a known key; known: schema_version, name"),
        ("keep: 0.5\nkeep: 0.6\n", "keep (line 7): repeats the key of line 6"),
    ],
)
def test_each_wrong_option_is_named(tmp_path: Path, extra: str, expected: str) -> None:
    found = problems(tmp_path, MINIMAL + extra)
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("{}", "needs text, prompts or prompts_file, domains, or one with domains; it has none"),
        ("plain words", "must be a mapping"),
        ("{prompts: []}", "needs at least 1 item"),
        ("{domains: {}}", "at least one domain of positive weight"),
        ("{domains: {math: 0}}", "at least one domain of positive weight"),
        ("{domains: {math: -1, art: 2}}", "scenario.domains.math (line 4): must be greater than or equal to 0"),
        ("{domains: {math: .inf}}", "must be a finite number"),
        ("{text: '  '}", "must not be blank"),
    ],
)
def test_scenario_must_be_one_usable_form(tmp_path: Path, scenario: str, expected: str) -> None:
    text = f"schema_version: 1\nname: a\ndescription: b\nscenario: {scenario}\n"
    assert any(expected in problem for problem in problems(tmp_path, text))


def test_hundreds_of_errors_are_told_in_a_line_that_can_be_read(tmp_path: Path) -> None:
    text = f"schema_version: 1\nname: a\ndescription: b\nscenario: {{prompts: {list(range(300))}}}\n"
    with pytest.raises(RecipeError, match=r"has 300 errors: .*prompts\[15\].*; and 284 more\.") as caught:
        load_text(tmp_path, text)
    assert len(caught.value.problems) == 300 and "prompts[16]" not in str(caught.value)


def test_every_missing_required_key_is_named(tmp_path: Path) -> None:
    found = problems(tmp_path, "keep: 0.5\n")
    assert found == [f"{key}: is missing" for key in ("schema_version", "name", "description", "scenario")]


texts = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), include_characters="\n\t"), min_size=1, max_size=60
).filter(lambda text: bool(text.strip()))
specs = st.one_of(
    st.builds(ScenarioSpec, text=texts),
    st.builds(ScenarioSpec, prompts=st.lists(texts, min_size=1, max_size=5).map(tuple)),
    st.builds(ScenarioSpec, prompts_file=texts),
    st.builds(ScenarioSpec, domains=st.dictionaries(texts, st.floats(1e-6, 1e6), min_size=1, max_size=4)),
)
losses = st.floats(0, 1, exclude_min=True, exclude_max=True)
protected = st.dictionaries(st.from_regex(r"[a-z0-9][a-z0-9-]{0,12}", fullmatch=True), losses, min_size=1, max_size=3)
budgets = st.one_of(
    st.fixed_dictionaries({}, optional={"protect": protected}),
    st.fixed_dictionaries({"keep": st.floats(0, 1, exclude_min=True)}),
    st.fixed_dictionaries({"strength": st.floats(0, 1)}),
    st.fixed_dictionaries(
        {"size": st.floats(0, 1, exclude_min=True)},
        optional={
            "max_params": st.integers(1, 10**12),
            "max_memory": st.integers(1, 10**12),
            "max_latency": st.integers(1, 10**18),
            "max_loss": losses,
            "protect": protected,
        },
    ),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "model": texts,
        "units": st.sampled_from(["all", "heads"]),
        "layout": st.sampled_from(["auto", "uniform", "per-layer"]),
        "host": st.sampled_from(["auto", "seed_oss", "granite"]),
        "criterion": st.sampled_from(["fisher", "kl", "subspace"]),
        "pools": texts,
        "axes": st.integers(2, 1000),
        "importance_from": st.sampled_from(["domains", "prompts", "auto"]),
        "without": st.lists(st.sampled_from(PARTS)).map(tuple),
        "repair": st.sampled_from(["least-squares", "least-squares-mlp", "flap-bias", "none"]),
        "max_tokens": st.integers(8, 131072),
        "continuation_tokens": st.integers(0, 4096),
        "seed": st.integers(0, 2**32 - 1),
        "context": st.integers(1, 1 << 24),
        "batch": st.integers(1, 1 << 16),
    },
)


@settings(max_examples=60, deadline=None)
@given(description=texts, spec=specs, budget=budgets, rest=options)
def test_dump_and_load_give_the_same_recipe(tmp_path_factory, description, spec, budget, rest) -> None:
    recipe = Recipe(schema_version=1, name="any-name", description=description, scenario=spec, **budget, **rest)
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_bytes(dump_recipe(recipe).encode())
    assert load_recipe(path) == recipe


def test_default_options() -> None:
    assert (
        Options().model_dump()
        == resolve({}, environment={}).model_dump()
        == {
            "model": None,
            "revision": None,
            "size": None,
            "keep": None,
            "strength": None,
            "max_loss": 0.05,
            "max_perplexity": None,
            "protect": None,
            "max_params": None,
            "max_memory": None,
            "max_latency": None,
            "latency_runtime": None,
            "context": None,
            "batch": None,
            "nested": None,
            "units": "all",
            "layout": "auto",
            "host": "auto",
            "criterion": "auto",
            "pools": None,
            "axes": None,
            "importance_from": "auto",
            "repair": "least-squares",
            "quantize": None,
            "baselines": "few",
            "without": (),
            "chat_template": None,
            "raw": False,
            "max_tokens": 512,
            "granularity": "head",
            "continuation_tokens": 64,
            "seed": 0,
        }
    )


def base(**options) -> Recipe:
    spec = ScenarioSpec(text="Answer bakers.")
    return Recipe(schema_version=1, name="bakery", description="x", scenario=spec, **options)


@pytest.mark.parametrize(
    ("command_line", "environment", "expected"),
    [
        ({"seed": 3}, {"SSPCOMPILE_SEED": "2"}, 3),
        ({"seed": None}, {"SSPCOMPILE_SEED": "2"}, 2),
        ({}, {"SSPCOMPILE_SEED": ""}, 1),
        ({}, {}, 1),
    ],
)
def test_command_line_before_environment_before_recipe(command_line, environment, expected) -> None:
    assert resolve(command_line, environment=environment, recipe={"seed": 1}).seed == expected


@pytest.mark.parametrize(
    ("recipe", "command_line", "environment", "keep", "strength"),
    [
        ({"strength": 0.9}, {"keep": 0.3}, {}, 0.3, None),
        ({"keep": 0.9}, {"strength": 0.3}, {}, None, 0.3),
        ({"keep": 0.9}, {}, {"SSPCOMPILE_STRENGTH": "0.2"}, None, 0.2),
        ({}, {"keep": 0.4}, {"SSPCOMPILE_STRENGTH": "0.2"}, 0.4, None),
        ({"strength": 0.9}, {}, {}, None, 0.9),
    ],
)
def test_a_budget_of_a_higher_level_replaces_either_form(recipe, command_line, environment, keep, strength) -> None:
    resolved = resolve(command_line, environment=environment, recipe=recipe)
    assert (resolved.keep, resolved.strength) == (keep, strength)


def test_resolve_names_the_flag_or_variable_of_every_wrong_value() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve({"keep": 2.0, "strength": 0.5, "layout": "x"}, environment={"SSPCOMPILE_MAX_TOKENS": "4"})
    assert caught.value.problems == [
        "--keep and --strength exclude each other; give one",
        "--keep: must be less than or equal to 1, not 2.0",
        "--layout: must be 'auto', 'uniform' or 'per-layer', not 'x'",
        "SSPCOMPILE_MAX_TOKENS: must be greater than or equal to 8, not 4",
    ]
    with pytest.raises(RecipeError, match=r"SSPCOMPILE_KEEP: must be a number, not 'half'.*SEED: must be a whole"):
        resolve({}, environment={"SSPCOMPILE_KEEP": "half", "SSPCOMPILE_SEED": "1.5"})


def test_parts_that_are_switched_off_are_named_once_and_in_one_order(tmp_path: Path) -> None:
    wanted = ("whitelist", "calibration")
    typed = ("calibration", "whitelist", "calibration")
    assert resolve({"without": typed}, environment={}).without == wanted
    variable = {"SSPCOMPILE_WITHOUT": "calibration, whitelist"}
    assert resolve({}, environment=variable, recipe={"without": ("mixing",)}).without == wanted
    assert resolve({}, environment={}, recipe={"without": ("mixing",)}).without == ("mixing",)
    with pytest.raises(RecipeError, match=r"--without\[1\]: must be 'axes', 'whitelist'.*not 'luck'"):
        resolve({"without": ("mixing", "luck")}, environment={})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"keep": 0.3, "strength": 0.3}, "keep and strength exclude each other"),
        ({"keep": 0.3, "max_loss": 0.3}, "keep and max_loss exclude each other"),
        ({"keep": 0.3, "max_memory": "6GB"}, "keep and max_memory exclude each other"),
        ({"nested": "1,0.8", "max_latency": "6ms"}, "max_latency and nested exclude each other"),
        ({"max_loss": None}, "one of size, keep, strength, max_loss, .*, max_memory, max_latency, nested is needed"),
    ],
)
def test_options_have_one_budget(given, expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Options(**given)


def test_every_option_is_a_flag_a_variable_a_key_and_a_keyword(tmp_path: Path) -> None:
    flags = {name for option in build.params for name in option.opts}
    schema = Recipe.model_json_schema()["properties"]
    for name in NAMES:
        assert flag(name) in flags and name in schema
        # `build(model, ...)` takes the model by its place.
        assert (name in Keywords.__annotations__) == (name != "model")
        assert schema[name]["description"] == shown_of(name).help
        assert name in Recipe.model_fields and Recipe.model_fields[name].default is None


@pytest.mark.parametrize("place", files())
def test_what_is_written_from_the_options_is_up_to_date(place: str) -> None:
    assert (Path(__file__).parents[1] / place).read_text("utf-8") == files()[place], "run `make generated`"


def test_prompts_with_tabs_and_long_lines_come_back_from_a_recipe_as_they_were(tmp_path: Path) -> None:
    """Wherever a writer of YAML might fold a line."""
    tail = ' {\n\thttp.Error(w, "no: url", 1)\n}\n\n\tend'
    texts = ["x " * (length // 2) + "y" * (length % 2) + tail for length in range(160)]
    asked = tuple(answered(text.strip(), text) for text in texts)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(base_of(asked)), "utf-8")
    assert load_recipe(path).scenario.prompts == asked


def base_of(prompts: tuple[Prompt, ...]) -> Recipe:
    return Recipe(schema_version=1, name="bakery", description="x", scenario=ScenarioSpec(prompts=prompts))


def test_recipes_of_the_embedded_model_cover_every_domain_a_mixture_and_the_unknown() -> None:
    names = {path.stem for path in SCENARIOS_DIR.glob("*.yaml")}
    for domain in ("chemistry", "finance", "history", "math", "philosophy", "technology", "sports"):
        assert any(name.startswith(domain) for name in names)
    assert {"chemistry-and-finance", "history-and-philosophy"} <= names


REAL = [path for path in shipped_recipes() if path.parent != SCENARIOS_DIR]


def test_scenarios_of_real_models_come_first_and_those_of_the_embedded_one_name_it() -> None:
    assert len(REAL) >= 9 and list(shipped_recipes()[: len(REAL)]) == REAL
    for path in shipped_recipes():
        assert load_recipe(path).model == (None if path in REAL else EMBEDDED), path


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_real_scenario_has_prompts_as_people_send_them_each_with_its_answer(path: Path) -> None:
    scenario, _ = read_scenario(path.stem)
    asked = [told(prompt) for prompt in scenario.prompts]
    assert len(asked) >= 64 and all(answer_of(prompt) for prompt in scenario.prompts)
    assert len(own_fit_part(scenario.prompts)) >= ENOUGH_PROMPTS, "heads are scored on its own prompts"
    lengths = sorted(len(text.split()) for text in asked)
    assert lengths[0] >= 5 and lengths[-1] <= 400 and sum(length > 60 for length in lengths) >= 16
    assert [(asked[one], asked[other]) for one, other in near_repeats(asked)] == []
    assert [(text, found) for text in asked if (found := embedded_sentence(text)) is not None] == []
    assert not EMBEDDED_NAMES & set(re.findall(r"\w+", " ".join(asked).lower()))


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipe_is_usable(path: Path) -> None:
    scenario, recipe = read_scenario(path.stem)
    assert recipe is not None
    assert scenario.name == recipe.name == path.stem
    assert find_recipe(path.stem) == path
    assert scenario.text or scenario.domains or len(scenario.prompts) >= 16, "repair needs 16 prompts"
    assert len(set(scenario.prompts)) == len(scenario.prompts)
