"""`plan --size`: counts of heads and channels from a configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import family_config
from transformers import PretrainedConfig

from sspcompile.checkpoint import embedded_model
from sspcompile.request.options import DEFAULT_MAX_LOSS

Run = Callable[..., tuple[int, str, str]]


def bare(folder: Path, config: PretrainedConfig) -> Path:
    """A folder with a configuration and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "torch_dtype": "float32"}))
    return folder


def planned(run: Run, *words: object) -> dict:
    code, out, err = run("plan", *words, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("size", [0.5, 0.8, 0.95])
def test_a_share_of_all_parameters_takes_heads_and_channels_alike(run, layout, size):
    plan = planned(run, "--size", size, "--layout", layout)
    share = plan["parameters"]["sliced"] / plan["parameters"]["dense"]
    assert size - 0.05 < share <= size
    if layout == "uniform":
        assert len(set(plan["widths"])) == 1 and len({tuple(pair) for pair in plan["counts"]}) == 1
    if size == 0.5:
        heads, channels = plan["kept_heads"] / plan["total_heads"], sum(plan["widths"]) / (256 * len(plan["widths"]))
        assert abs(heads - channels) < 0.2, "neither is spared at the price of the other"


def test_heads_alone_are_planned_where_heads_alone_may_go(run):
    plan = planned(run, "--size", 0.85, "--units", "heads")
    assert set(plan["widths"]) == {256} and plan["parameters"]["sliced"] <= 0.85 * plan["parameters"]["dense"]
    plan = planned(run, "--keep", 0.5)
    assert set(plan["widths"]) == {256} and plan["kept_heads"] == plan["total_heads"] / 2


def test_experts_beside_dense_layers_are_planned_by_heads_alone(run, tmp_path):
    folder = bare(tmp_path / "mixed", family_config("qwen3_moe"))
    code, _, err = run("plan", "--model", folder, "--size", 0.5, "--json")
    assert code == 3 and "a head and its whole MLP" in err
    nearest = err.split("--size ")[-1].strip().rstrip(".")
    plan = planned(run, "--model", folder, "--size", nearest)
    assert plan["parameters"]["sliced"] <= float(nearest) * plan["parameters"]["dense"]
    assert plan["kept_heads"] < plan["total_heads"]
    code, _, err = run("plan", "--model", folder)
    assert code == 0 and "--keep 0.75" in err


def test_what_a_build_costs_needs_weights_and_says_so_to_who_plans(run, tmp_path):
    folder = bare(tmp_path / "bare", family_config("llama"))
    code, out, err = run("plan", "--model", folder, "--scenario", "Answer questions of chemistry", "--cost")
    assert code == 2 and out == "" and "Leave out --cost, or name a folder with weights." in err
    assert run("plan", "--model", folder, "--size", 0.8, "--json", "-q")[0] == 0


def test_without_a_budget_a_share_is_assumed_and_named(run):
    code, _, err = run("plan", "--model", embedded_model())
    assert code == 0 and "Sizes are those of --size 0.9" in err and f"--max-loss {DEFAULT_MAX_LOSS:g}" in err
    assert run("plan", "--model", embedded_model(), "--quiet")[2] == ""
    code, _, err = run("plan", "--model", embedded_model(), "--units", "heads")
    assert code == 0 and "Sizes are those of --keep 0.75" in err
    assert run("plan", "--model", embedded_model(), "--size", 0.7)[2] == ""


def test_the_table_has_the_widths_where_channels_go(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = " ".join(run("plan", "--size", 0.8, "--by-layer")[1].split())  # a title is broken where its table ends
    assert "of the parameters, " in out and "of 256 wide" in out and "channels of the MLPs" in out
    assert "MLP width" in out and "256 → " in out and "heads alone" not in out
    out = run("plan", "--keep", 0.5, "--by-layer")[1]
    assert "MLP width" not in out and "channels" not in out and "heads alone are no more than that" in out


def test_groups_stay_whole_in_a_plan_where_whole_groups_are_cut(run):
    for budget in (("--size", 0.8), ("--keep", 0.6)):
        plan = planned(run, *budget, "--granularity", "group")
        assert {heads / kv for heads, kv in plan["counts"]} == {2.0}


def test_runtimes_are_told_of_widths(run):
    verdicts = {one["runtime"]: one for one in planned(run, "--size", 0.8, "--layout", "uniform")["runtimes"]}
    assert "K-quants of o_proj and down_proj fall back" in verdicts["llama.cpp"]["reason"]
    assert verdicts["vLLM"]["tensor_parallel"]["5"]["loads"] is False
    plan = planned(run, "--size", 0.81, "--layout", "per-layer")
    assert len(set(plan["widths"])) > 1, "the case in question"
    verdicts = {one["runtime"]: one for one in plan["runtimes"]}
    assert verdicts["llama.cpp"]["loads"] and "as architecture deci" in verdicts["llama.cpp"]["reason"]
    assert verdicts["vLLM"]["loads"] and "--trust-remote-code" in verdicts["vLLM"]["reason"]
    assert verdicts["ONNX Runtime"]["loads"]
