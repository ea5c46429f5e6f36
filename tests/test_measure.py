"""Intervals, divergences, ratios, and a benchmark of tiny models from end to end."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sspcompile.bench import process
from sspcompile.bench.capacity import capacity
from sspcompile.bench.latency import Contender, bench
from sspcompile.bench.load import Load, Settings
from sspcompile.bench.memory import kv_bytes_per_token, peak_resident_bytes
from sspcompile.bench.metrics import METRICS
from sspcompile.bench.process import Worker
from sspcompile.bench.ratios import compare, compare_all
from sspcompile.bench.roofline import predict, roofline
from sspcompile.errors import CheckpointError, InputError, RunError
from sspcompile.intervals import FEWEST_SAMPLES, Interval, mean_interval, ratio_interval, share_estimate, summarize
from sspcompile.model.divergence import Divergence, DivergenceAccumulator, average, compare_divergences, divergence

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


@pytest.mark.parametrize(("texts", "positions", "share"), [(8, 2, 0.05), (12, 2, 0.1), (8, 16, 0.01), (24, 8, 0.05)])
def test_the_interval_of_a_rare_share_covers_the_truth_about_as_often_as_it_says(texts, positions, share) -> None:
    """Also where most draws see nothing at all."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        found = rng.binomial(positions, share, texts) / positions
        one = share_estimate(found.tolist(), positions * texts, seed=trial)
        assert one.low is not None and one.high is not None and one.low <= one.value <= one.high
        covered += one.low <= share <= one.high
    assert covered / 200 >= 0.9


def test_a_share_of_nothing_is_as_wide_as_its_positions_are_few() -> None:
    few, many = (share_estimate([0.0] * 8, 8 * count, seed=0) for count in (2, 200))
    assert (few.value, few.low, few.high) == (0, 0, pytest.approx(0.1936, abs=1e-4))
    assert many.high is not None and 0 < many.high < 0.003
    turned = share_estimate([1.0] * 8, 16, seed=0).rest
    assert (turned.low, turned.high) == (0, pytest.approx(few.high))
    assert share_estimate([0.0] * 4, 8, seed=0).high is None


def test_few_samples_give_no_interval() -> None:
    assert mean_interval([1.0, 2.0], seed=0) is None
    assert ratio_interval([2.0, 2.0], [1.0, 1.0]) == (2.0, None)
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval([1.0] * 6, [1.0] * 5)


def test_pairing_removes_what_both_share() -> None:
    """A machine that slows down over the trials makes both slower; the ratio must not notice."""
    drift = np.linspace(1, 3, 20)
    value, interval = ratio_interval(2 * drift, drift)
    assert interval is not None
    assert value == interval.low == interval.high == pytest.approx(2)


@pytest.mark.parametrize("pairs", [3, 5])
def test_the_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says(pairs: int) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        top, bottom = np.exp(rng.normal(0.4, 0.1, pairs)), np.exp(rng.normal(0.0, 0.1, pairs))
        interval = ratio_interval(top, bottom)[1]
        assert interval is not None
        covered += interval.covers(math.exp(0.4))
    assert covered / 400 >= 0.975


def test_summaries_keep_samples_and_publish_no_p99_from_few() -> None:
    few = summarize([3.0, 1.0, 2.0])
    assert few.samples == (3.0, 1.0, 2.0)
    assert few.median == 2.0
    assert few.p99 is None
    assert summarize([float(i) for i in range(101)]).p99 == pytest.approx(99)
    with pytest.raises(ValueError, match="no samples"):
        summarize([])


# ---- ratios -------------------------------------------------------------------------------------------------


SESSIONS, TRIALS = 5, 4


@pytest.mark.parametrize("process", [0.0, 0.05])
def test_a_contender_against_itself_shows_no_measurable_change(process: float) -> None:
    """Also where processes differ among themselves, which trials of one process cannot show."""
    rng = np.random.default_rng(0)

    def timings() -> list[float]:
        levels = np.repeat(rng.normal(0, process, SESSIONS), TRIALS)
        return list(np.exp(levels + rng.normal(0, 0.1, SESSIONS * TRIALS)))

    alarms = 0
    for _ in range(400):
        a, b = summarize(timings()), summarize(timings())
        found = compare(METRICS["prefill_seconds"], a, b, sessions=SESSIONS, names=("a", "b"))
        assert found is not None
        alarms += found.verdict != "no measurable change"
    assert alarms / 400 <= 0.02, "the intervals are of 99 %"


def test_less_than_a_percent_is_no_change_however_exactly_it_was_measured() -> None:
    a, b = summarize([1.0, 1.001, 0.999]), summarize([1.006, 1.007, 1.005])
    found = compare(METRICS["prefill_seconds"], a, b, sessions=3, names=("a", "b"))
    assert found is not None and found.interval is not None
    assert found.interval.high < 1
    assert found.verdict == "no measurable change"


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
    samples = summarize(list(dense * noise)), summarize(list(sliced * noise))
    found = compare(METRICS[metric], *samples, sessions=3, names=("d", "s"))
    assert found is not None
    assert found.ratio == pytest.approx(dense / sliced)
    assert found.verdict == verdict
    assert (found.improvement > 1) == (verdict == "better")
    assert found.improvement_interval is not None
    assert found.improvement_interval.covers(found.improvement)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=12, max_size=12), st.integers(1, 4))
def test_a_rate_changes_by_what_its_time_does(values: list[float], batch: int) -> None:
    """Also with an even number of trials in a process, whose middle two differ."""
    seconds, faster = values, [value / (1 + place % 3) for place, value in enumerate(values)]
    ratios = [
        compare(METRICS[name], summarize(before), summarize(after), sessions=3, names=("dense", "cut"))
        for name, before, after in (
            ("inter_token_seconds", seconds, faster),
            ("decode_tokens_per_second", [batch / one for one in seconds], [batch / one for one in faster]),
        )
    ]
    time, rate = ratios
    assert time is not None and rate is not None and time.verdict == rate.verdict
    assert rate.improvement == pytest.approx(time.improvement, rel=1e-9)
    assert rate.improvement_interval is not None and time.improvement_interval is not None
    ends = [(one.low, one.high) for one in (rate.improvement_interval, time.improvement_interval)]
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


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
    found = {r.metric: r for r in compare_all(dense, sliced, sessions=1, names=("d", "s"))}
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
    assert found.mean_kl.value == pytest.approx(kl / 4)
    assert found.top1_agreement.value == 0.75
    assert found.mean_kl.low is None, "two prompts are too few"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 99))
def test_divergence_of_a_model_from_itself_is_zero_and_never_negative(n: int, vocab: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, vocab, generator=generator) * 5 for _ in range(2))
    index = torch.arange(n) // 2
    same = divergence(a, a, index)
    assert same.mean_kl.value == 0
    assert same.top1_agreement.value == 1
    other = divergence(a, b, index)
    assert min(other.kl_per_prompt) >= 0
    shifted = divergence(a, b + 3.0, index)
    assert shifted.mean_kl.value == pytest.approx(other.mean_kl.value, rel=1e-5, abs=1e-9), (
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
    assert found.mean_kl.low is not None
    assert found.mean_kl.low <= found.mean_kl.value <= found.mean_kl.high


def collected(dense: np.ndarray, other: np.ndarray, index: np.ndarray, owners: Sequence[int] = ()) -> Divergence:
    """With a reference for every third of 24 prompts, which may come again."""
    accumulator = DivergenceAccumulator()
    references = torch.arange(len(index)) % 48 % dense.shape[1]
    accumulator.add(dense, other, index, torch.where(torch.from_numpy(index) % 3 == 0, references, -1))
    return accumulator.result(seed=1, owners=owners)


@pytest.mark.parametrize("times", [2, 3, 8])
def test_what_is_told_several_times_in_one_conversation_is_one_text(times: int) -> None:
    rng = np.random.default_rng(0)
    dense, near, far, index = *rng.normal(size=(3, 48, 7)), np.arange(48) // 2
    owners = [n % 24 for n in range(24 * times)]
    repeated = np.concatenate([index + 24 * n for n in range(times)])
    again = [collected(np.tile(dense, (times, 1)), np.tile(o, (times, 1)), repeated, owners) for o in (near, far)]
    once = [collected(dense, other, index) for other in (near, far)]
    found = ((*again, average(again), compare_divergences(*again)), (*once, average(once), compare_divergences(*once)))
    for many, one in zip(*found, strict=True):
        pairs = [(many, one)]
        if isinstance(many, Divergence):
            figures = ("mean_kl", "top1_agreement", "reference_loss", "perplexity")
            pairs = [(getattr(many, figure), getattr(one, figure)) for figure in figures]
        for a, b in pairs:
            assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), rel=1e-9)


def test_texts_of_different_conversations_are_judged_to_the_bit_as_without_any() -> None:
    rng = np.random.default_rng(0)
    dense, other, index = *rng.normal(size=(2, 48, 7)), np.arange(48) // 2
    assert collected(dense, other, index, range(24)) == collected(dense, other, index, range(24, 0, -1))
    assert collected(dense, other, index, range(24)) == collected(dense, other, index)


def test_the_interval_of_many_answers_to_a_few_questions_holds_the_truth() -> None:
    """12 questions with 8 answers each, which a cut changes in about as many places."""
    rng, right, alone = np.random.default_rng(0), 0, 0
    owner = np.repeat(np.arange(12), 8)
    index, dense = np.repeat(np.arange(96), 16), np.tile([1.0, 0.0], (96 * 16, 1))
    for _ in range(100):
        changed = rng.random(96 * 16) < np.repeat(rng.beta(1, 9, 12)[owner], 16)
        other = np.where(changed[:, None], dense[:, ::-1], dense)
        whole, apart = (collected(dense, other, index, owners).changed for owners in (owner.tolist(), ()))
        right += whole.low <= 0.1 <= whole.high
        alone += apart.low <= 0.1 <= apart.high
    assert right >= 85 and alone < 75


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
    assert gap.value > 0
    assert gap.measurable
    assert near.mean_kl.high is not None and far.mean_kl.low is not None
    assert far.mean_kl.low < near.mean_kl.high
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
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=HEAD_DIM,
            vocab_size=50,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
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


def settings_of(**changes: object) -> Settings:
    load = Load(2, changes.pop("prompt_tokens", 8), changes.pop("new_tokens", 3))
    usual = {
        "loads": (load, Load(1, 4, 3)),
        "sessions": 3,
        "trials": 2,
        "warmup": 1,
        "threads": 1,
        "seed": 0,
        "device": "cpu",
        "memory": 10**6,
    }
    return Settings(**(usual | changes))


def test_bench_from_end_to_end(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path))
    said: list[tuple[str, int, int]] = []
    contenders = [
        Contender(name, path, trust_remote_code=name == "sliced", flops=(1000, 10)) for name, path in models.items()
    ]
    kept: list[dict] = []
    result = bench(contenders, settings_of(), progress=lambda *args: said.append(args), keep=kept.append)
    dense, sliced = result.contenders
    assert [what for what, _, _ in said[:4]] == [
        "warm-up of dense",
        "warm-up of sliced",
        "trial of dense",
        "trial of sliced",
    ]
    assert said[13][0] == "warm-up of sliced", "the next session turns the order round"
    assert said[-1] == ("done", 36, 36)
    assert sliced.architecture == "OwnForCausalLM"
    assert dense.metrics["kv_bytes_per_token"].median == 2 * LAYERS * 2 * HEAD_DIM * 4
    assert sliced.metrics["kv_bytes_per_token"].median == 2 * LAYERS * 1 * HEAD_DIM * 4
    stored = models["dense"].joinpath("model.safetensors").stat().st_size
    assert dense.metrics["disk_bytes"].median == stored
    assert 0 < stored - dense.metrics["weight_bytes"].median < 4096, "tied weights count once, as in the file"
    for contender in result.contenders:
        assert len(contender.metrics["peak_resident_bytes"].samples) == 3, "one per process"
        assert contender.metrics["peak_resident_bytes"].median > 5e7
        under = contender.loads[0]
        assert len(under.metrics["prefill_seconds"].samples) == 6
        assert len(under.warmup["prefill_seconds"]) == 3
        prefill = under.metrics["prefill_seconds"].samples[0]
        assert under.metrics["prefill_tokens_per_second"].samples[0] == pytest.approx(16 / prefill)
        p50, p90 = (under.metrics[f"inter_token_{p}_seconds"].samples for p in ("p50", "p90"))
        assert all(a <= b for a, b in zip(p50, p90, strict=True))
        assert under.roofline.flops_per_token == 1000 + 9.5 * 10
        kv = contender.metrics["kv_bytes_per_token"].median
        assert under.roofline.bytes_per_step == pytest.approx(1000 / 2 * 4 + 2 * 9.5 * kv)
    ratios = {(ratio.metric, ratio.load): ratio for ratio in result.ratios}
    assert ratios["kv_bytes_per_token", None].ratio == 2
    assert ratios["prefill_seconds", "batch 2, 8+3 tokens"].interval is not None
    assert {p.load for p in result.predictions} == {"batch 2, 8+3 tokens", "batch 1, 4+3 tokens"}
    assert [c.context for c in result.capacities] == [64, 64]
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["contenders"][0]["loads"][0]["metrics"]["inter_token_seconds"]["samples"]
    assert value["definitions"]["prefill_seconds"]["unit"] == "s"
    assert {"low", "high"} == set(value["ratios"][0]["interval"])
    assert len(kept) == 3
    done = json.loads(json.dumps(kept))
    again = bench(contenders, settings_of(), done=done, progress=lambda *args: said.append(args))
    assert again == result, "a finished measurement is not taken anew"
    assert said[-1][0] == "done" and len(said) == 39


def test_an_onnx_contender_is_measured_like_the_others(tmp_path: Path) -> None:
    from builders import family_config, save_random

    from sspcompile.api.arguments import Named
    from sspcompile.api.export import source_of, to_onnx
    from sspcompile.export.onnx import PRECISIONS, Blocks

    model = save_random(tmp_path / "model", family_config("qwen2", bias=True), seed=1)
    to_onnx(source_of(Named("model", model, model)), tmp_path / "onnx", PRECISIONS["fp32"], blocks=Blocks())
    to_onnx(source_of(Named("model", model, model)), tmp_path / "int4", PRECISIONS["int4"], blocks=Blocks(16))
    contenders = [
        Contender("dense", model),
        Contender("dense, onnx", tmp_path / "onnx", "onnx"),
        Contender("int4, onnx", tmp_path / "int4", "onnx"),
    ]
    result = bench(contenders, settings_of())
    torch_model, plain, rounded = result.contenders
    assert (plain.dtype, rounded.dtype) == ("float32", "int4")
    assert plain.metrics["kv_bytes_per_token"] == torch_model.metrics["kv_bytes_per_token"]
    assert rounded.metrics["weight_bytes"].median < plain.metrics["weight_bytes"].median
    steps = [c.loads[0].roofline.bytes_per_step for c in result.contenders]
    assert steps[1] == pytest.approx(steps[0], rel=0.05), "the same matrices, and the rotary tables"
    assert steps[2] < steps[1]
    assert {(r.reference, r.contender) for r in result.ratios} == {
        ("dense", "dense, onnx"),
        ("dense", "int4, onnx"),
        ("dense, onnx", "int4, onnx"),
    }


def test_a_worker_that_refuses_its_model_is_one_line_with_its_reason(tmp_path: Path, models: dict[str, Path]) -> None:
    config = (models["dense"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"holds no weights.*safetensors") as caught:
        bench([Contender("broken", tmp_path)], settings_of())
    assert "\n" not in caught.value.message


UNFORKED = "from sspcompile.bench import worker; worker.FORKS = False; worker.main()"


def test_every_session_is_a_fresh_process_where_none_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "WORKER", (sys.executable, "-P", "-c", UNFORKED))
    seen = []
    with Worker("small", "onnx", threads=1) as worker:
        worker.wait_ready()
        for _ in range(3):
            with worker.session():
                seen.append(worker._process)
                assert worker.ask("bandwidth", size=1000, threads=1, device="cpu")["bytes_per_second"] > 0
    assert len({one.pid for one in seen}) == 3 and [one.returncode for one in seen] == [0, 0, 0]


def test_a_worker_that_dies_is_one_line_with_its_reason() -> None:
    with (
        pytest.raises(
            RunError, match=r"^The measurement of 'broken' ended with code 1: RuntimeError: a request was made"
        ),
        Worker("broken", "transformers", threads=1) as worker,
    ):
        worker.wait_ready()
        worker.ask("load")  # without a session


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trials": 0}, "--repeats is 0"),
        ({"new_tokens": 1}, "--new-tokens is 1"),
        ({"threads": 0}, "--threads is 0"),
        ({"prompt_tokens": 62}, "62 + 3 tokens exceed dense's 64 positions"),
        ({"loads": ()}, "at least one load"),
    ],
)
def test_impossible_settings_are_refused_before_any_process_starts(models, change, expected) -> None:
    with pytest.raises(InputError) as caught:
        bench([Contender("dense", models["dense"])], settings_of(**change))
    assert expected in str(caught.value)


def test_folders_that_cannot_be_measured_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no config"):
        bench([Contender("x", tmp_path)], settings_of())
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        bench([Contender("x", tmp_path)], settings_of())
    config.write_text('{"per_layer_config": {"0": {"num_attention_heads": 1}}}')
    with pytest.raises(InputError, match="loaded by the class in it"):
        bench([Contender("x", tmp_path)], settings_of())
    twice = Contender("x", models["dense"])
    for contenders in ([], [twice, twice]):
        with pytest.raises(InputError, match="at least one contender"):
            bench(contenders, settings_of())


def test_what_the_bytes_predict_by_hand() -> None:
    """1000 bytes against 800 at 100 bytes a second: 1.25 times; of 10 s against 9 s half of the saving arrived."""
    samples = summarize([10.0] * 3), summarize([9.0] * 3)
    ratio = compare(METRICS["inter_token_seconds"], *samples, sessions=3, names=("d", "s"), load="l")
    assert ratio is not None
    found = predict(roofline(1000, None, 200, 10.0), roofline(800, None, 200, 9.0), ratio)
    assert found.predicted == 1.25
    assert found.measured == pytest.approx(10 / 9)
    assert found.realised == pytest.approx((1 - 0.9) / 0.2)
    assert found.reference_share == 0.5


def test_what_fits_into_a_memory_by_hand() -> None:
    found = capacity("x", memory=1000, weight_bytes=400, kv_bytes_per_token=10, tokens=7, positions=50)
    assert (found.context, found.batch) == (50, 8)
    small = capacity("x", memory=300, weight_bytes=400, kv_bytes_per_token=10, tokens=7, positions=None)
    assert (small.context, small.batch) == (0, 0)


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
