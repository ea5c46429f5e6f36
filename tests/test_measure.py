"""Intervals, divergences, ratios, and a benchmark of tiny models from end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspcompile.errors import CheckpointError, InputError, RunError
from sspcompile.measure.compare import compare, compare_all
from sspcompile.measure.intervals import FEWEST_SAMPLES, Interval, mean_interval, ratio_interval, summarize
from sspcompile.measure.latency import Contender, bench
from sspcompile.measure.metrics import METRICS
from sspcompile.measure.quality import DivergenceAccumulator, compare_divergences, divergence
from sspcompile.measure.worker import kv_bytes_per_token, peak_resident_bytes

# ---- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 40])
def test_the_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says(count: int) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        interval = mean_interval(rng.normal(3.0, 1.0, count), seed=trial)
        assert interval is not None
        covered += interval.covers(3.0)
    assert 0.9 <= covered / 200 <= 0.99


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=FEWEST_SAMPLES, max_size=30))
def test_an_interval_lies_within_the_samples_and_is_repeatable(values: list[float]) -> None:
    first, second = mean_interval(values, seed=7), mean_interval(values, seed=7)
    assert first == second
    assert first is not None
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def test_few_samples_give_no_interval() -> None:
    assert mean_interval([1.0, 2.0], seed=0) is None
    assert ratio_interval([1.0] * 4, [1.0] * 4, seed=0) is None
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval([1.0] * 6, [1.0] * 5, seed=0)


def test_pairing_removes_what_both_share() -> None:
    """A machine that slows down over the trials makes both slower; the ratio must not notice."""
    drift = np.linspace(1, 3, 20)
    interval = ratio_interval(2 * drift, drift, seed=0)
    assert interval is not None
    assert interval.low == interval.high == pytest.approx(2)


def test_summaries_keep_samples_and_publish_no_p99_from_few() -> None:
    few = summarize([3.0, 1.0, 2.0])
    assert few.samples == (3.0, 1.0, 2.0)
    assert few.median == 2.0
    assert few.p99 is None
    assert summarize([float(i) for i in range(101)]).p99 == pytest.approx(99)
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


# ---- ratios -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [7, 20])
def test_a_contender_against_itself_shows_no_measurable_change(repeats: int) -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        a, b = (summarize(list(np.exp(rng.normal(0, 0.1, repeats)))) for _ in range(2))
        found = compare(METRICS["prefill_seconds"], a, b, names=("a", "b"))
        assert found is not None
        alarms += found.verdict != "no measurable change"
    assert alarms / 200 <= 0.08


@pytest.mark.parametrize(
    ("metric", "dense", "sliced", "verdict"),
    [
        ("inter_token_seconds", 2.0, 1.0, "better"),
        ("inter_token_seconds", 1.0, 2.0, "worse"),
        ("decode_tokens_per_second", 1.0, 2.0, "better"),
        ("decode_tokens_per_second", 2.0, 1.0, "worse"),
    ],
)
def test_better_and_worse_follow_the_metrics_direction(metric, dense, sliced, verdict) -> None:
    noise = np.linspace(0.98, 1.02, 9)
    found = compare(METRICS[metric], summarize(list(dense * noise)), summarize(list(sliced * noise)), names=("d", "s"))
    assert found is not None
    assert found.ratio == pytest.approx(dense / sliced)
    assert found.verdict == verdict
    assert (found.improvement > 1) == (verdict == "better")
    assert found.improvement_interval is not None
    assert found.improvement_interval.covers(found.improvement)


def test_counted_metrics_need_no_interval_and_single_timings_claim_nothing() -> None:
    dense = {
        "weight_bytes": summarize([100.0]),
        "load_seconds": summarize([1.0]),
        "peak_device_bytes": summarize([0.0]),
    }
    sliced = {
        "weight_bytes": summarize([80.0]),
        "load_seconds": summarize([0.5]),
        "peak_device_bytes": summarize([0.0]),
    }
    found = {r.metric: r for r in compare_all(dense, sliced, names=("d", "s"))}
    assert found["weight_bytes"].verdict == "better"
    assert found["weight_bytes"].interval is None
    assert found["load_seconds"].verdict == "too few samples"
    assert "peak_device_bytes" not in found


# ---- quality ------------------------------------------------------------------------------------------------


def test_divergence_by_hand() -> None:
    dense = torch.log(torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5]]))
    other = torch.log(torch.tensor([[0.25, 0.75], [0.75, 0.25], [0.5, 0.5]]))
    found = divergence(dense, other, torch.tensor([4, 4, 2]))
    kl = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert found.prompts == (2, 4)
    assert found.kl_per_prompt == pytest.approx((0.0, kl / 2), abs=1e-7)
    assert found.agreement_per_prompt == (1.0, 0.5)
    assert found.positions_per_prompt == (1, 2)
    assert found.mean_kl == pytest.approx(kl / 4)
    assert found.top1_agreement == 0.75
    assert found.mean_kl_interval is None, "two prompts are too few"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 99))
def test_divergence_of_a_model_from_itself_is_zero_and_never_negative(n: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, vocab, generator=generator) * 5 for _ in range(2))
    index = torch.arange(n) // 2
    same = divergence(a, a, index)
    assert same.mean_kl == 0
    assert same.top1_agreement == 1
    other = divergence(a, b, index)
    assert min(other.kl_per_prompt) >= 0
    shifted = divergence(a, b + 3.0, index)
    assert shifted.mean_kl == pytest.approx(other.mean_kl, rel=1e-5, abs=1e-9), (
        "a constant shift changes no probability"
    )


def test_batches_give_what_one_call_gives() -> None:
    rng = np.random.default_rng(0)
    dense, other, index = rng.normal(size=(20, 7)), rng.normal(size=(20, 7)), np.arange(20) % 6
    accumulator = DivergenceAccumulator()
    for part in np.array_split(np.arange(20), 3):
        accumulator.add(dense[part], other[part], index[part])
    assert accumulator.result(seed=3) == divergence(dense, other, index, seed=3)


def test_the_interval_is_over_prompts_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    dense, other = rng.normal(size=(60, 7)), rng.normal(size=(60, 7))
    found = divergence(dense, other, np.arange(60) // 3)
    assert len(found.prompts) == 20
    assert found.mean_kl_interval is not None
    assert found.mean_kl_interval.covers(found.mean_kl)


def test_divergence_refuses_what_cannot_be_compared() -> None:
    ones = np.ones((2, 3))
    for dense, other, index in ((ones, ones[:1], [0, 0]), (ones, ones, [0]), (ones[0], ones[0], [0, 0, 0])):
        with pytest.raises(ValueError, match="positions"):
            divergence(dense, other, np.array(index))
    for bad in (np.nan, np.inf):
        with pytest.raises(RunError, match="NaN or infinite"):
            divergence(ones, ones * bad, np.zeros(2, int))
    with pytest.raises(RunError, match="no scored positions"):
        DivergenceAccumulator().result()


def test_paired_differences_see_what_separate_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(40, 5))
    hard = np.repeat(rng.uniform(0.1, 3, 20), 2)[:, None]  # prompts differ much more than the models do
    noise = rng.normal(size=(40, 5))
    index = np.arange(40) // 2
    near = divergence(dense, dense + 0.9 * hard * noise, index)
    far = divergence(dense, dense + 1.0 * hard * noise, index)
    gap = compare_divergences(far, near)
    assert gap.mean > 0
    assert gap.measurable
    assert near.mean_kl_interval is not None and far.mean_kl_interval is not None
    assert far.mean_kl_interval.low < near.mean_kl_interval.high
    assert not compare_divergences(near, near).measurable
    with pytest.raises(ValueError, match="different prompts"):
        compare_divergences(near, divergence(dense[:2], dense[:2], index[:2]))


# ---- the benchmark ------------------------------------------------------------------------------------------

LAYERS, HEAD_DIM = 2, 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folders = {}
    for name, (heads, kv_heads) in {"dense": (4, 2), "sliced": (2, 1)}.items():
        config = Qwen2Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=heads,
            num_key_value_heads=kv_heads, head_dim=HEAD_DIM, vocab_size=50, max_position_embeddings=64,
            tie_word_embeddings=True,
        )  # fmt: skip
        folders[name] = tmp_path_factory.mktemp(name)
        Qwen2ForCausalLM(config).save_pretrained(folders[name])
    ship_own_code(folders["sliced"])
    return folders


def ship_own_code(folder: Path) -> None:
    """What a per-layer cut looks like to a loader: a class of its own beside the weights."""
    code = "from transformers import Qwen2ForCausalLM\n\n\nclass OwnForCausalLM(Qwen2ForCausalLM):\n    pass\n"
    (folder / "modeling_own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))


SHAPE = {"prompt_tokens": 8, "new_tokens": 3, "batch": 2, "repeats": 5, "threads": 1}


def test_bench_from_end_to_end(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    said: list[tuple[int, int, str]] = []
    contenders = [Contender(name, path, trust_remote_code=name == "sliced") for name, path in models.items()]
    result = bench(contenders, **SHAPE, warmup=1, progress=lambda *args: said.append(args))
    dense, sliced = result.contenders
    assert [what for _, _, what in said[:4]] == [
        "warm-up of dense", "warm-up of sliced", "trial of dense", "trial of sliced",
    ]  # fmt: skip
    assert said[-1][0] == said[-1][1] == 12
    assert sliced.architecture == "OwnForCausalLM"
    assert dense.metrics["kv_bytes_per_token"].median == 2 * LAYERS * 2 * HEAD_DIM * 4
    assert sliced.metrics["kv_bytes_per_token"].median == 2 * LAYERS * 1 * HEAD_DIM * 4
    stored = models["dense"].joinpath("model.safetensors").stat().st_size
    assert 0 < stored - dense.metrics["weight_bytes"].median < 4096, "tied weights count once, as in the file"
    for contender in result.contenders:
        assert len(contender.metrics["prefill_seconds"].samples) == 5
        assert len(contender.warmup["prefill_seconds"]) == 1
        assert contender.metrics["peak_resident_bytes"].median > 5e7
        prefill = contender.metrics["prefill_seconds"].samples[0]
        assert contender.metrics["prefill_tokens_per_second"].samples[0] == pytest.approx(16 / prefill)
    ratios = {ratio.metric: ratio for ratio in result.ratios}
    assert ratios["kv_bytes_per_token"].ratio == 2
    assert ratios["prefill_seconds"].interval is not None
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["contenders"][0]["metrics"]["inter_token_seconds"]["samples"]
    assert value["definitions"]["prefill_seconds"]["unit"] == "s"
    assert {"low", "high"} == set(value["ratios"][0]["interval"])


def test_a_worker_that_dies_is_one_line_with_its_reason(tmp_path: Path, models: dict[str, Path]) -> None:
    config = (models["dense"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(RunError, match=r"measurement of 'broken' ended with code 1: .*safetensors") as caught:
        bench([Contender("broken", tmp_path)], **SHAPE)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"repeats": 0}, "--repeats is 0"),
        ({"new_tokens": 1}, "--new-tokens is 1"),
        ({"threads": 0}, "--threads is 0"),
        ({"prompt_tokens": 62}, "62 + 3 tokens exceed dense's 64 positions"),
    ],
)
def test_impossible_settings_are_refused_before_any_process_starts(models, change, expected) -> None:
    with pytest.raises(InputError) as caught:
        bench([Contender("dense", models["dense"])], **(SHAPE | change))
    assert expected in str(caught.value)


def test_folders_that_cannot_be_measured_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        bench([Contender("x", tmp_path)], **SHAPE)
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        bench([Contender("x", tmp_path)], **SHAPE)
    config.write_text('{"auto_map": {"AutoModelForCausalLM": "m.M"}}')
    with pytest.raises(InputError, match="--trust-remote-code"):
        bench([Contender("x", tmp_path)], **SHAPE)
    twice = Contender("x", models["dense"])
    for contenders in ([], [twice, twice]):
        with pytest.raises(InputError, match="at least one contender"):
            bench(contenders, **SHAPE)


def test_kv_bytes_skip_layers_that_hold_nothing() -> None:
    class Layer:
        keys: torch.Tensor | None = None
        values: torch.Tensor | None = None

    full = Layer()
    full.keys = full.values = torch.zeros(2, 3, 5, 4, dtype=torch.bfloat16)

    class Cache:
        layers = (full, Layer())

    assert kv_bytes_per_token(Cache()) == 2 * 3 * 4 * 2


def test_peak_memory_is_in_bytes() -> None:
    assert 1e7 < peak_resident_bytes() < 1e12


def test_interval_covers_its_ends() -> None:
    assert Interval(1.0, 2.0).covers(1.0)
    assert not Interval(1.0, 2.0).covers(2.1)
