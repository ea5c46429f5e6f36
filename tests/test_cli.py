"""The command line as its users meet it: exit codes, one-line refusals, data on stdout, files where promised."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from builders import Shape, make_checkpoint
from commands import Done, shell
from safetensors.numpy import load_file

from sspcompile.cli import main as cli_main
from sspcompile.cli.main import cli, main
from sspcompile.cli.sections import REST, SECTIONS
from sspcompile.criteria import CRITERIA
from sspcompile.model import journal
from sspcompile.model.placement import NAMES as PLACING
from sspcompile.request.domains import load_outside
from sspcompile.request.options import NAMES as OPTION_NAMES
from sspcompile.request.recipe import find_recipe, load_recipe
from sspcompile.request.scenario import read_scenario

SENTENCE = "A helpdesk for questions about chemistry"
# Short texts: what is tested here is the way, not the quality.
FAST = ("--continuation-tokens", "2", "--max-tokens", "48", "--criterion", "subspace")
ARTIFACT_FILES = {
    "recipe.yaml",
    "mask.json",
    "plan.json",
    "mask.svg",
    "report.json",
    "report.md",
    "report.html",
    "manifest.json",
}


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the command line in this process: what it printed, and its exit code."""

    def call(*args: object, home: Path | None = None, env: dict[str, str] | None = None) -> Done:
        with monkeypatch.context() as patch:
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            if home is not None:
                patch.chdir(home)
            capfd.readouterr()
            with pytest.raises(SystemExit) as stop:
                main([str(arg) for arg in args])
            captured = capfd.readouterr()
        return Done(int(stop.value.code or 0), captured.out, captured.err)

    return call


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(done: Done, code: int, *expected: str) -> None:
    """One line on stderr that begins with `Error:`, nothing on stdout, no traceback."""
    assert done.code == code, done
    assert done.err.startswith("Error: ") and done.err.endswith("\n") and done.err.count("\n") == 1, done.err
    assert done.out == "" and "Traceback" not in done.err
    for text in expected:
        assert re.search(text, done.err), (text, done.err)


# --- Bad input -------------------------------------------------------------------------------------------------------


def config_folder(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


TINY = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}


def pool_text(name: str, count: int = 16) -> str:
    """A pool of the user's own, without its first line."""
    prompts = "".join(f"- How many loaves are in {n} baskets?\n" for n in range(count))
    return f"name: {name}\ndescription: Bread.\ndescriptions: [Questions of bakers.]\nprompts:\n{prompts}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Everything that a user could give by mistake."""
    folder = tmp_path_factory.mktemp("inputs")
    for kind in ("gpt2", "gpt_neox", "olmo2", "opt", "cohere", "mamba"):
        config_folder(folder / kind, model_type=kind)
    config_folder(folder / "config-only", **TINY)
    config_folder(folder / "text-heads", **TINY | {"num_attention_heads": "four"})
    (folder / "empty-folder").mkdir()
    (folder / "broken-config").mkdir()
    (folder / "broken-config" / "config.json").write_text("{")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "empty.txt").write_text("\n \n")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "notjson.jsonl").write_text('{"prompt": "one"}\n{"prompt"\n')
    (folder / "noprompt.jsonl").write_text('{"title": "one"}\n')
    (folder / "bad.yaml").write_text(
        "schema_version: 1\nname: bad\ndescription: All wrong.\nkept: 0.5\nlayout: diagonal\nkeep: 7\n"
        "scenario: {text: some words, prompts: [one, two]}\n"
    )
    (folder / "notyaml.yaml").write_text("name: [unclosed\n")
    (folder / "prompts.csv").write_text("a,b\n")
    for name, text in {"own-pools/mine": "name: mine\n", "clash/math": pool_text("math")}.items():
        (folder / name).parent.mkdir()
        (folder / f"{name}.yaml").write_text("schema_version: 1\n" + text)
    checkpoint = make_checkpoint(folder / "no-tokenizer", Shape())
    for path in checkpoint.glob("*token*"):
        path.unlink()
    truncated = make_checkpoint(folder / "truncated", Shape())
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[:-8])
    pickled = config_folder(folder / "pickled", **TINY)
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


BUILD = ("build", "--scenario", SENTENCE)
BAD = {
    "no such model folder": ((*BUILD, "--model", "{in}/nowhere"), 2, ("no model folder", "config.json")),
    "relative model folder": ((*BUILD, "--model", "nowhere"), 2, ("no model folder nowhere",)),
    "unreachable hub name": ((*BUILD, "--model", "some/model"), 2, ("offline", "some/model")),
    "file as model": ((*BUILD, "--model", "{in}/model.safetensors"), 2, ("is a file", "folder")),
    "empty model folder": ((*BUILD, "--model", "{in}/empty-folder"), 2, ("no config.json",)),
    "broken config": ((*BUILD, "--model", "{in}/broken-config"), 2, ("not valid JSON",)),
    "text as head count": ((*BUILD, "--model", "{in}/text-heads"), 2, ("num_attention_heads = 'four'", "whole number")),
    "gpt2": ((*BUILD, "--model", "{in}/gpt2"), 2, ("'gpt2' cannot be cut", "hidden_size / heads", "llama, ministral")),
    "gpt_neox": ((*BUILD, "--model", "{in}/gpt_neox"), 2, ("hidden_size / heads", "Accepted")),
    "olmo2": ((*BUILD, "--model", "{in}/olmo2"), 2, ("q_norm spans all heads", "Accepted")),
    "opt": ((*BUILD, "--model", "{in}/opt"), 2, ("Accepted types",)),
    "cohere": (("plan", "--model", "{in}/cohere"), 2, ("not described", "Accepted types")),
    "mamba": (("plan", "--model", "{in}/mamba"), 2, ("not described", "Accepted types")),
    "no weights": ((*BUILD, "--model", "{in}/config-only"), 2, ("without weights", "sspcompile plan")),
    "pickled weights": ((*BUILD, "--model", "{in}/pickled"), 2, ("pickled", "safetensors")),
    "truncated weights": ((*BUILD, "--model", "{in}/truncated"), 2, ("its header promises",)),
    "no tokenizer": ((*BUILD, "--model", "{in}/no-tokenizer"), 2, ("no tokenizer", "tokenizer.json")),
    "no scenario": (("build",), 2, ("No scenario", "--scenario")),
    "empty scenario": (("build", "--scenario", ""), 2, ("empty",)),
    "one word": (("build", "--scenario", "chemisty-helpdesk"), 2, ("one word", "Did you mean 'chemistry-helpdesk'")),
    "empty prompts": (("build", "--scenario", "{in}/empty.txt"), 2, ("no prompts",)),
    "binary prompts": (("build", "--scenario", "{in}/binary.txt"), 2, ("binary",)),
    "missing prompts": (("build", "--scenario", "{in}/none.jsonl"), 2, ("no file",)),
    "broken jsonl": (("build", "--scenario", "{in}/notjson.jsonl"), 2, ("line 2 is not JSON",)),
    "jsonl without prompt": (("build", "--scenario", "{in}/noprompt.jsonl"), 2, ("line 1", "none of the keys prompt")),
    "unknown prompt format": (("build", "--scenario", "{in}/prompts.csv"), 2, (r"\.csv file", r"\.jsonl")),
    "folder as scenario": (("build", "--scenario", "{in}/gpt2"), 2, ("is a folder",)),
    "recipe errors at once": (
        ("build", "--scenario", "{in}/bad.yaml"),
        2,
        ("4 errors", "kept", "layout", "keep", "needs text, prompts or prompts_file"),
    ),
    "recipe errors when validated": (("recipe", "validate", "{in}/bad.yaml"), 2, ("4 errors", "kept", "layout")),
    "recipe that is no YAML": (("build", "--scenario", "{in}/notyaml.yaml"), 2, ("notyaml.yaml",)),
    "recipe that is not there": (("recipe", "validate", "{in}/none.yaml"), 2, ("no file",)),
    "recipe of unknown name": (("recipe", "show", "nonsense"), 2, ("no shipped recipe", "finance-desk")),
    "keep 0": ((*BUILD, "--keep", "0"), 2, ("--keep", "greater than 0")),
    "keep -1": ((*BUILD, "--keep", "-1"), 2, ("--keep",)),
    "keep 1.5": ((*BUILD, "--keep", "1.5"), 2, ("--keep", "less than or equal to 1")),
    "keep nan": ((*BUILD, "--keep", "nan"), 2, ("--keep",)),
    "keep inf": ((*BUILD, "--keep", "inf"), 2, ("--keep",)),
    "strength 2": ((*BUILD, "--strength", "2"), 2, ("--strength", "1")),
    "keep and strength": ((*BUILD, "--keep", "0.5", "--strength", "0.5"), 2, ("--keep and --strength exclude",)),
    "unknown layout": ((*BUILD, "--layout", "round"), 2, ("--layout", "per-layer")),
    "unknown criterion": ((*BUILD, "--criterion", "taste"), 2, ("criterion 'taste'", "fisher, obs, kl", "criteria`")),
    "unknown criterion in prepare": (("prepare", "--criterion", "taste"), 2, ("criterion 'taste'", "fisher")),
    "unknown repair": ((*BUILD, "--repair", "glue"), 2, ("--repair", "least-squares")),
    "one axis": ((*BUILD, "--axes", "1"), 2, ("--axes", "greater than or equal to 2")),
    "more axes than pools": ((*BUILD, "--axes", "900"), 2, ("more domains than there are pools", "--pools DIR")),
    "no pools": (("prepare", "--pools", "{in}/nowhere"), 2, ("nowhere", r"no \*\.yaml")),
    "pools that are no pools": (("plan", "--pools", "{in}/own-pools"), 2, ("mine.yaml", "prompts", "descriptions")),
    "pools of shipped names": (("plan", "--pools", "{in}/clash"), 2, ("shipped names: math", "Rename")),
    "unknown part": ((*BUILD, "--without", "luck"), 2, (r"--without\[0\]", "'mixing'")),
    "unknown source of importance": ((*BUILD, "--importance-from", "stars"), 2, ("--importance-from", "'prompts'")),
    "importance from no prompts": (
        (*BUILD, "--importance-from", "prompts"),
        2,
        ("has none of its own", "--importance-from domains"),
    ),
    "repair without a place": ((*BUILD, "--repair", "flap-bias"), 2, ("no bias", "--repair least-squares")),
    "repair without a place in plan": (("plan", "--repair", "flap-bias"), 2, ("no bias",)),
    "negative seed": ((*BUILD, "--seed", "-1"), 2, ("--seed",)),
    "several options": ((*BUILD, "--keep", "3", "--layout", "x", "--seed", "-1"), 2, ("3 errors",)),
    "budget below the floors": ((*BUILD, "--keep", "0.01"), 3, ("at least one", "nearest feasible value is --keep")),
    "budget below the floors in plan": (("plan", "--keep", "0.01"), 3, (r"nearest feasible value is --keep 0\.",)),
    "strength without breadth": (("plan", "--strength", "0.5"), 2, ("--strength needs a scenario", "--keep")),
    "unknown format": (("export", "--format", "tflite"), 2, ("'tflite'", "hf")),
    "no last build to export": (("export",), 2, ("no last build", "sspcompile build")),
    "no last build to bench": (("bench",), 2, ("no last build",)),
    "no last build to inspect": (("inspect",), 2, ("no last build",)),
    "no last build to verify": (("verify",), 2, ("no last build",)),
    "unknown artifact": (("verify", "artifacts/none"), 2, ("artifacts/none is neither a build, a cut,",)),
    "model folder as artifact": (("inspect", "{in}/truncated"), 2, ("is a model folder, and .* does not take it",)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line_its_code_and_writes_nothing(case, run, inputs, tmp_path):
    args, code, expected = BAD[case]
    refused(run(*(arg.replace("{in}", str(inputs)) for arg in args), home=tmp_path), code, *expected)
    assert listing(tmp_path) == set()


@pytest.mark.parametrize(
    "args", [("bild",), ("build", "--kep", "1"), ("plan", "--keep", "x"), ("bench", "--batch", "0")]
)
def test_unknown_commands_and_options_exit_2_with_the_usage(args, run):
    done = run(*args)
    assert done.code == 2 and done.out == "" and "Usage: sspcompile" in done.err and "Error: " in done.err


def test_no_command_prints_the_help_and_exits_2(run):
    done = run()
    assert done.code == 2 and "Commands:" in done.out


def test_existing_output_is_kept_before_anything_is_read(run, tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    refused(run(*BUILD, "--out", kept, "--model", "nowhere", home=tmp_path), 2, "exists and is kept", "--overwrite")
    # Nor does --overwrite let a typing error destroy what is not ours.
    refused(run(*BUILD, "--out", kept, "--overwrite", home=tmp_path), 2, "did not write")
    refused(run(*BUILD, "--out", ".", "--overwrite", home=tmp_path), 2, "did not write")
    assert listing(tmp_path) == {"mine", "mine/notes.txt"}


def test_environment_sets_options_and_the_command_line_wins(run, tmp_path):
    dry = ("--dry-run", "--json")
    assert run(*BUILD, *dry, home=tmp_path, env={"SSPCOMPILE_KEEP": "0.25"}).json["keep"] == 0.25
    assert run(*BUILD, "--keep", "0.75", *dry, home=tmp_path, env={"SSPCOMPILE_KEEP": "0.25"}).json["keep"] == 0.75
    refused(run(*BUILD, *dry, home=tmp_path, env={"SSPCOMPILE_KEEP": "lots"}), 2, "SSPCOMPILE_KEEP", "a number")
    refused(run(*BUILD, *dry, home=tmp_path, env={"SSPCOMPILE_KEEP": "7"}), 2, "SSPCOMPILE_KEEP")


def test_dry_run_prints_a_recipe_that_can_be_built_and_writes_nothing(run, tmp_path):
    done = run(*BUILD, "--keep", "0.5", "--dry-run", home=tmp_path)
    assert done.code == 0 and listing(tmp_path) == set()
    (tmp_path / "again.yaml").write_text(done.out)
    assert load_recipe(tmp_path / "again.yaml").keep == 0.5
    refused(run(*BUILD, "--model", "nowhere", "--dry-run", home=tmp_path), 2, "no model folder")


def test_interrupt_exits_130(run, monkeypatch):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_main.doctor, "invoke", interrupted)
    done = run("doctor")
    assert done.code == 130 and "Error: Interrupted" in done.err


def test_interrupt_that_a_library_turns_into_another_error_exits_130(run, monkeypatch):
    def wrapped(*_args: object, **_options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("initialization of a module failed") from error

    monkeypatch.setattr(cli_main.doctor, "invoke", wrapped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run("doctor")
        after = signal.getsignal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 130 and "Error: Interrupted" in done.err and "module" not in done.err
    assert after is signal.default_int_handler


def test_full_disk_exits_1_with_one_line(run, monkeypatch):
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device", "/data/model.safetensors")

    monkeypatch.setattr(cli_main.doctor, "invoke", full)
    refused(run("doctor"), 1, "No space left on device", "/data/model.safetensors")


def commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", commands(cli), ids=lambda path: " ".join(path) or "sspcompile")
def test_help_is_whole_sentences_with_an_example(path, run):
    done = run(*path, "--help")
    assert done.code == 0 and done.err == ""
    command: click.Command = cli
    for name in path:
        command = command.commands[name]
    assert command.help.split("\b")[0].strip().endswith("."), command.help
    for option in command.params:
        if isinstance(option, click.Option):
            text = re.sub(r"  \[default: [^\]]*\]$", "", option.help or "")
            assert text and text[0].isupper() and text.endswith("."), (option.name, option.help)
    assert f"sspcompile {' '.join(path)}".strip() in command.help + (command.epilog or "")


def test_recipes_are_listed_shown_and_valid(run, tmp_path):
    names = run("recipe", "ls", "--json").json
    assert len(names) >= 6
    for name in names:
        shown = run("recipe", "show", name)
        assert shown.code == 0 and name in shown.out
        (tmp_path / "mine.yaml").write_text(shown.out, "utf-8")
        # A copy elsewhere is the same scenario, its file of prompts included.
        assert read_scenario(str(tmp_path / "mine.yaml"))[0] == read_scenario(name)[0]
    assert run("recipe", "validate", tmp_path / "mine.yaml").code == 0
    listed = run("recipe", "ls").out.splitlines()
    assert [line.split()[0] for line in listed] == list(names)
    toys = [load_recipe(find_recipe(name)).model is not None for name in names]
    assert [line.endswith("(embedded model)") for line in listed] == toys and any(toys) and not all(toys)


def test_criteria_lists_every_score_with_its_source_and_cost(run):
    listed = run("criteria", "--json").json
    assert [entry["name"] for entry in listed] == list(CRITERIA)
    assert all(entry["summary"] and entry["source"] and entry["cost"] for entry in listed)
    assert listed[0]["passes_per_prompt"] == {"heads": 1024, "forward": 2, "backward": 1}
    shown = run("criteria", env={"COLUMNS": "200"})
    assert shown.code == 0 and all(name in shown.out for name in CRITERIA)


def test_help_names_the_common_criteria_and_where_to_find_the_rest(run):
    for command in ("build", "plan", "prepare"):
        text = " ".join(run(command, "--help").out.split())
        assert "fisher, obs, kl" in text and "sspcompile criteria" in text


def test_doctor_reports_versions_as_json(run):
    facts = run("doctor", "--json").json
    assert {"versions", "devices", "threads", "problems"} <= set(facts) and facts["versions"]["torch"]


# --- Plan ------------------------------------------------------------------------------------------------------------


def promised_plan(plan: dict) -> None:
    for key in ("parameters", "weight_bytes", "kv_bytes_per_token"):
        assert 0 < plan[key]["sliced"] <= plan[key]["dense"], key
    assert 0 < plan["prunable_share"] < 1
    assert plan["runtimes"] and all({"runtime", "loads", "reason"} <= set(verdict) for verdict in plan["runtimes"])


def test_plan_of_a_bare_configuration_has_the_promised_keys(run, inputs, tmp_path):
    done = run("plan", "--model", inputs / "config-only", "--keep", "0.5", "--json", home=tmp_path)
    promised_plan(done.json)
    assert done.json["kept_heads"] == 4 and done.json["total_heads"] == 8 and listing(tmp_path) == set()
    table = run("plan", "--model", inputs / "config-only", "--keep", "0.5", home=tmp_path)
    assert "KV cache" in table.out and table.err == ""


def test_plan_of_a_scenario_has_the_promised_keys_for_every_layout(run, built, home):
    done = run("plan", "--scenario", SENTENCE, "--keep", "0.5", *FAST, "--json", home=home)
    promised_plan(done.json)
    assert [plan["layout"] for plan in done.json["layouts"]] == ["uniform", "per-layer"]
    for plan in done.json["layouts"]:
        promised_plan(plan)


def test_a_scenario_that_fits_no_domain_is_said_on_stderr(run, built, home):
    done = run("plan", "--scenario", "sports-club", "--keep", "0.5", *FAST, "--json", home=home)
    assert done.code == 0 and done.json["layouts"]
    assert re.fullmatch(r"Warning: \d+% of this scenario fits no known domain .* all domains count alike\.\n", done.err)


# --- The whole way ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def built(home) -> Path:
    """The first build of the embedded model, by the real program; it prepares the toolkit."""
    done = shell(home, "build", "--scenario", SENTENCE, "--keep", "0.5", *FAST, "--json", "--out", "artifacts/first")
    assert done.code == 0, done.err
    assert done.json["mask"]["kept"], "stdout carries data only"
    assert done.err.startswith("Written to artifacts/first; ")
    assert len(done.err.splitlines()) == 1
    return home / "artifacts" / "first"


@pytest.fixture
def copy(built, home, tmp_path) -> Path:
    """An artifact that a test may spoil."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def test_build_writes_every_promised_file_and_nothing_beside(built, home):
    files = listing(built)
    assert files >= ARTIFACT_FILES | {"model/config.json", "model/model.safetensors", "model/tokenizer.json"}
    assert {path.name for path in (home / "artifacts").iterdir()} >= {"first", "toolkits", "last"}
    assert not [path for path in listing(home) if ".partial" in path or ".replaced" in path]
    assert (home / "artifacts" / "last").read_text() == "first\n"
    toolkits = list((home / "artifacts" / "toolkits").iterdir())
    assert len(toolkits) == 1 and listing(toolkits[0]) == {"toolkit.safetensors", "toolkit.json"}


def test_mask_and_plan_of_a_build_are_what_the_model_has(built):
    mask = json.loads((built / "mask.json").read_text())
    assert {
        "schema_version",
        "layers",
        "heads",
        "kv_heads",
        "kept",
        "layout",
        "keep_requested",
        "keep_achieved",
        "scores",
        "whitelist",
        "criterion",
        "scenario",
    } <= set(mask)
    assert {"name", "mixture", "breadth"} <= set(mask["scenario"])
    assert mask["keep_achieved"] <= mask["keep_requested"] == 0.5
    kept = sum(len(row) for row in mask["kept"])
    assert kept == round(mask["keep_achieved"] * mask["layers"] * mask["heads"])
    plan = json.loads((built / "plan.json").read_text())
    promised_plan(plan)
    manifest = json.loads((built / "manifest.json").read_text())
    tensors = manifest["files"]["model/model.safetensors"]["tensors"]
    words = {"F32": 4, "BF16": 2, "F16": 2}
    sizes = [(prod(entry["shape"]), words[entry["dtype"]]) for entry in tensors.values()]
    assert sum(count for count, _ in sizes) == plan["parameters"]["sliced"]
    assert sum(count * width for count, width in sizes) == plan["weight_bytes"]["sliced"]


def prod(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_second_build_is_refused_without_overwrite_and_keeps_the_first(run, built, home):
    before = (built / "manifest.json").read_bytes()
    refused(run(*BUILD, "--out", "artifacts/first", home=home), 2, "exists and is kept", "--overwrite")
    assert (built / "manifest.json").read_bytes() == before


def test_same_build_gives_the_same_bytes_in_another_folder(run, built, home):
    done = run(*BUILD, "--keep", "0.5", *FAST, "--json", "--quiet", "--out", "elsewhere/first", home=home)
    assert done.code == 0, done.err
    places = (home / "artifacts", home / "elsewhere")
    first, second = (json.loads((place / "first" / "manifest.json").read_text()) for place in places)
    differing = [n for n in first["files"] if first["files"][n] != second["files"].get(n)]
    assert not differing and first == second


def test_uniform_layout_without_repair_replaces_an_earlier_build(run, built, home):
    out = Path(shutil.copytree(built, home / "artifacts" / "replaced"))
    args = (*BUILD, "--keep", "0.5", *FAST, "--layout", "uniform", "--repair", "none", "--json", "--out", out)
    (out / "bench.json").write_text("of the earlier build")
    done = run(*args, "--overwrite", home=home)
    assert done.code == 0 and not (out / "bench.json").exists()
    assert done.json["repair"]["used"] is False and done.json["layout"]["chosen"] == "uniform"
    config = json.loads((out / "model" / "config.json").read_text())
    assert "auto_map" not in config and not (out / "model" / "modeling_sspcompile.py").exists()
    assert not [path for path in listing(home / "artifacts") if ".replaced" in path or ".partial" in path]


def test_inspect_shows_table_json_and_heat_map(run, built, home, tmp_path):
    table = run("inspect", "artifacts/first", home=home)
    assert table.code == 0 and "layer" in table.out and table.err == ""
    assert run("inspect", "first", "--json", home=home).json == json.loads((built / "mask.json").read_text())
    svg = tmp_path / "mask.svg"
    assert run("inspect", "first", "--svg", svg, home=home).code == 0
    assert svg.read_text().lstrip().startswith("<") and "<svg" in svg.read_text()
    refused(run("inspect", "first", "--svg", svg, home=home), 2, "exists and is kept")
    refused(run("inspect", "first", "--svg", tmp_path / "none" / "mask.svg", home=home), 2, "existing folder")


def test_verify_passes_and_reports_the_proof(run, built, home):
    done = run("verify", "artifacts/first", "--json", home=home)
    assert done.code == 0 and done.json["same_text"] is True
    assert done.json["relative"] <= done.json["bound"] < 1e-8 and done.json["dtype"] == "float64"
    told = run("verify", "artifacts/first", home=home).out
    assert "largest logit difference" in told and "of the scale in float64, same greedy text" in told


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/config.json", "mask.json", "report.html"])
def test_one_flipped_byte_is_found_and_its_file_named(name, run, copy, home):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for command in ("verify", "bench", "export"):
        refused(run(command, copy, home=home), 2, re.escape(name), "sha256")


def test_damaged_or_strange_manifests_are_refused_in_one_line(run, copy, home):
    for text in ("", "[]", '{"schema_version": 1, "origin": {}, "files": []}', '{"schema_version": 1}', "[" * 100_000):
        (copy / "manifest.json").write_text(text)
        refused(run("verify", copy, home=home), 2, "manifest.json")
    (copy / "manifest.json").write_text('{"schema_version": 9, "origin": {}, "files": {}}')
    refused(run("verify", copy, home=home), 2, "schema version 9")
    (copy / "manifest.json").write_text('{"schema_version": 1, "origin": {}, "files": {}}')
    refused(run("verify", copy, home=home), 2, "does not name the model behind it")


def test_verify_against_another_model_is_refused(run, copy, home, tmp_path):
    other = make_checkpoint(tmp_path / "other", Shape())
    refused(run("verify", copy, "--model", other, home=home), 2, "is not the model")


def test_toolkit_of_another_model_is_refused(run, built, home, tmp_path):
    toolkits = tmp_path / "artifacts" / "toolkits"
    shutil.copytree(home / "artifacts" / "toolkits", toolkits)
    other = next(toolkits.iterdir())
    description = json.loads((other / "toolkit.json").read_text())
    description["fingerprint"] = "0" * 64
    (other / "toolkit.json").write_text(json.dumps(description))
    refused(run(*BUILD, "--keep", "0.5", *FAST, home=tmp_path), 2, "another model")
    assert {path.name for path in (tmp_path / "artifacts").iterdir()} == {"toolkits"}


def test_export_writes_a_folder_that_transformers_loads_and_its_manifest_describes(run, built, home, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sspcompile.checkpoint import check_manifest

    (home / "artifacts" / "last").write_text("first\n")
    done = run("export", "--json", home=home)
    out = home / "exported" / "first-hf"
    assert done.code == 0 and done.err == "" and done.json["folder"] == "exported/first-hf"
    manifest = check_manifest(out)
    assert set(manifest.files) == listing(out) - {"manifest.json"} and "README.md" in manifest.files
    custom = "auto_map" in json.loads((out / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=custom)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model(**tokenizer("A question", return_tensors="pt")).logits.isfinite().all()
    refused(run("export", home=home), 2, "exists and is kept")
    assert run("export", "--overwrite", home=home).code == 0
    refused(run("verify", out, home=home), 2, "is an export, and .* does not take it")


def test_bench_gives_samples_and_intervals_and_leaves_an_artifact_that_verifies(run, copy, home):
    done = run("bench", copy, "--quick", "--json", "--threads", "1", home=home)
    assert done.code == 0, done.err
    text = json.dumps(done.json)
    assert {"dense", "sliced"} <= set(re.findall(r'"(dense|sliced)"', text))
    for key in ("samples", "median", "p10", "p90"):
        assert f'"{key}"' in text, key
    report = json.loads((copy / "report.json").read_text())
    assert report["latency"] and (copy / "bench.json").is_file()
    from sspcompile.checkpoint import check_manifest

    assert "bench.json" in check_manifest(copy).files


def test_export_into_the_artifact_itself_is_refused(run, built, home):
    before = listing(built)
    refused(run("export", "first", "--out", built / "model" / "copy", home=home), 2, "lies inside")
    assert listing(built) == before


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", Shape())


def test_second_criterion_is_added_to_a_toolkit_that_is_there(run, tiny, tmp_path):
    args = ("prepare", "--model", tiny, "--continuation-tokens", "2", "--max-tokens", "32", "--json", "--criterion")
    first, second, third = (run(*args, name, home=tmp_path) for name in ("subspace", "fisher", "subspace"))
    assert [done.code for done in (first, second, third)] == [0, 0, 0], second.err
    assert [done.json["fresh"] for done in (first, second, third)] == [True, False, False]
    assert second.json["criteria"] == third.json["criteria"] == ["fisher", "subspace"]
    assert first.err == second.err == ""


def test_pools_and_axes_of_ones_own_have_a_toolkit_of_their_own(run, tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "baking.yaml").write_text("schema_version: 1\n" + pool_text("baking"))
    args = ("prepare", "--model", tiny, "--continuation-tokens", "1", "--max-tokens", "16", "--json")
    ways = ((), ("--pools", "mine"), ("--pools", "mine", "--axes", "3"))
    found = [run(*args, *way, home=tmp_path) for way in ways]
    assert [done.code for done in found] == [0, 0, 0], found
    default, added, chosen = (done.json for done in found)
    assert len({facts["folder"] for facts in (default, added, chosen)}) == 3
    assert all((tmp_path / facts["folder"] / "toolkit.json").is_file() for facts in (default, added, chosen))
    assert set(added["domains"]) == {*default["domains"], "baking"}
    assert len(chosen["domains"]) == 3 and len(chosen["axes"]["candidates"]) == len(added["domains"]) + len(
        load_outside()
    )
    assert run(*args, *ways[2], home=tmp_path).json["fresh"] is False
    assert run(*args, home=tmp_path).json["fresh"] is False


def test_flap_bias_goes_the_whole_way_where_o_proj_has_a_bias(run, tmp_path):
    model = make_checkpoint(tmp_path / "model", Shape(family="qwen3", bias=True))
    fast = ("--model", model, "--continuation-tokens", "2", "--max-tokens", "32", "--keep", "0.5")
    done = run(*BUILD, *fast, "--repair", "flap-bias", "--out", "out", "--json", home=tmp_path)
    assert done.code == 0 and done.json["parity"]["texts_equal"] is True, done.err
    assert run("verify", "out", home=tmp_path).code == 0


@pytest.mark.parametrize("command", ["build", "plan"])
def test_help_has_every_option_once_and_those_of_a_build_under_what_they_are_about(command, run):
    told = run(command, "--help", env={"COLUMNS": "120"}).out
    sections = {part.split(":\n")[0]: part for part in re.split(r"\n\n(?=\S)", told) if ":\n" in part}
    assert [title for title in sections if title in (*SECTIONS, REST)] == [*SECTIONS, REST]
    for name in (*OPTION_NAMES, *PLACING):
        flag = f"--{name.replace('_', '-')}"
        held = [title for title, part in sections.items() if re.search(rf"^  (-\w, )?{flag}\b(?!-)", part, re.M)]
        assert len(held) == 1 and held != [REST], (flag, held)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_build_leaves_only_what_the_next_one_goes_on_with(number, code, tiny, tmp_path):
    command = [sys.executable, "-m", "sspcompile.cli.main", *BUILD, "--model", str(tiny), "--keep", "0.5"]
    command += ["--out", "deep/out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("deep/.partial-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)  # somewhere inside loading or preparing
        running.send_signal(number)
        out, err = running.communicate(timeout=60)
    assert running.returncode == code and out == "" and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("Error: Interrupted; nothing unfinished was published. A build")
    # Whether a batch, or the toolkit, had been measured by then depends on the machine.
    kept = re.compile(r"artifacts/(toolkits/|(toolkits/)?\.unfinished-)[^/]+/.+")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(kept.fullmatch(path.relative_to(tmp_path).as_posix()) for path in left), left
    for path in left:
        if path.suffix == journal.SUFFIX:
            assert load_file(path), "files are whole or absent"
    assert not (tmp_path / "deep").exists() and (left or not any(tmp_path.iterdir()))


def test_last_build_that_was_deleted_is_named(run, built, home, tmp_path):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "last").write_text("gone\n")
    refused(run("bench", home=tmp_path), 2, "gone", "sspcompile build")


@pytest.fixture(scope="module")
def hosted(tiny, tmp_path_factory) -> Path:
    """A home with a uniform build of a Qwen2 model that another family's class loads."""
    home = tmp_path_factory.mktemp("hosted")
    fast = ("--model", tiny, "--continuation-tokens", "2", "--max-tokens", "32", "--criterion", "fisher")
    args = (*BUILD, *fast, "--keep", "0.5", "--host", "seed_oss", "--out", home / "artifacts" / "cut", "--json")
    code = subprocess.run(
        [sys.executable, "-m", "sspcompile.cli.main", *map(str, args)], cwd=home, capture_output=True, check=False
    ).returncode
    assert code == 0
    return home


def test_build_for_a_host_takes_the_uniform_layout_and_its_class(run, hosted):
    cut = hosted / "artifacts" / "cut"
    config = json.loads((cut / "model" / "config.json").read_text())
    plan = json.loads((cut / "plan.json").read_text())
    assert config["model_type"] == "seed_oss" and "auto_map" not in config
    assert plan["host"] == "SeedOssForCausalLM" and plan["layout"] == "uniform"
    assert "host: seed_oss" in (cut / "recipe.yaml").read_text()
    assert run("verify", cut, home=hosted).code == 0


def test_export_moves_a_uniform_build_to_another_class(run, tiny, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    fast = ("--model", tiny, "--keep", "0.5", "--continuation-tokens", "2", "--max-tokens", "32")
    fast += ("--criterion", "fisher")
    assert run(*BUILD, *fast, "--host", "qwen2", "--out", "artifacts/cut", home=tmp_path).code == 0
    done = run("export", "artifacts/cut", "--host", "granite", "--out", "served", "--json", home=tmp_path)
    assert done.code == 0, done.err
    folders = (tmp_path / "artifacts" / "cut" / "model", tmp_path / "served")
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
    assert type(before).__name__ == "Qwen2ForCausalLM" and type(after).__name__ == "GraniteForCausalLM"
    ids = torch.arange(40)[None]
    difference = (before(ids).logits - after(ids).logits).abs().max() / before(ids).logits.abs().max()
    assert difference <= 1e-5
    assert "GraniteForCausalLM" in (tmp_path / "served" / "README.md").read_text()


def test_host_that_cannot_hold_the_model_is_refused_before_any_work(run, tiny, hosted, tmp_path):
    for extra, word in ((("--host", "mistral"), "Accepted: auto, qwen2, seed_oss"), (("--host", "No!"), "--host")):
        refused(run(*BUILD, "--model", tiny, *extra, "--out", "out", home=tmp_path), 2, word)
    args = (*BUILD, "--model", tiny, "--host", "seed_oss", "--layout", "per-layer", "--out", "out")
    refused(run(*args, home=tmp_path), 2, "uniform cuts")
    refused(run("export", "cut", "--host", "mistral", "--out", "out", home=hosted), 2, "cannot hold")
    assert listing(tmp_path) == set() and not (hosted / "out").exists()
