"""ONNX exports run in the real runtimes and compute what transformers computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
import torch
from builders import family_config, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slicing_exact import mask_for
from transformers import AutoModelForCausalLM

from sspcompile.checkpoint import Checkpoint, check_manifest
from sspcompile.errors import CheckpointError, InputError, ParityError, UnsupportedModelError
from sspcompile.export.agreement import Agreement
from sspcompile.export.onnx import PRECISIONS, Blocks, Exported, export_onnx
from sspcompile.export.onnx.check import ROUNDING_FACTOR, padded
from sspcompile.export.onnx.decoder import read_decoder
from sspcompile.export.onnx.weights import write_rotary
from sspcompile.families import ONNX_FAMILIES
from sspcompile.model.onnx_session import OnnxModel, demand_kernels
from sspcompile.model.onnx_text import load_onnx
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

RNG = np.random.default_rng(0)
PROBES = [RNG.integers(0, 256, length).tolist() for length in (1, 7, 40)]
SCALE_BOUND = 1e-4
SMALL_BLOCKS = Blocks(16)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS: dict[str, tuple[str, dict]] = {
    **{family: (family, {}) for family in ONNX_FAMILIES},
    "llama with biases, llama3 positions": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "llama, linear positions": ("llama", {"rope_parameters": LINEAR}),
    "qwen3 tied, yarn positions": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "mistral, sliding window": ("mistral", {"sliding_window": 9}),
    "phi3, sliding window": ("phi3", {"sliding_window": 9}),
    "smollm3, some layers without positions": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "granite, multipliers": (
        "granite",
        {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    # Head sizes that the attention does not rotate.
    "llama with biases, heads of 8": ("llama", {"head_dim": 8, "attention_bias": True, "mlp_bias": True}),
    "qwen3, heads of 24, sliding window": (
        "qwen3",
        {"head_dim": 24, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "phi3, heads of 8": ("phi3", {"head_dim": 8}),
    "smollm3, heads of 8, some layers without positions": ("smollm3", {"head_dim": 8, "no_rope_layers": [1, 0, 1]}),
}


def make(folder: Path, variant: str, **options: object) -> Path:
    family, values = VARIANTS[variant]
    size = {"head_dim": values["head_dim"]} if "head_dim" in values else {}
    config = family_config(family, bias=bool(values.get("attention_bias")), **size)
    for key, value in values.items():
        setattr(config, key, value)
    return save_random(folder, config, seed=3, **options)


def cut(source: Path, out: Path, layout: str) -> Path:
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_for(checkpoint, 0.6, layout, 4, width=0.7))
    write_model(checkpoint, plan, out)
    return out


def export(
    model: Path, out: Path, precision: str = "fp32", blocks: Blocks = SMALL_BLOCKS, **options: object
) -> Exported:
    return export_onnx(
        model,
        out,
        precision=PRECISIONS[precision],
        blocks=blocks,
        probes=PROBES,
        origin={},
        card=lambda *_: "card\n",
        **{"trust_remote_code": True, **options},
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@torch.inference_mode()
def expected(model: Path, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and 12 greedy tokens by transformers' own generate."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=True).eval()
    ids, mask = torch.from_numpy(ids), torch.from_numpy(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = reference(input_ids=ids, attention_mask=mask, position_ids=positions).logits.numpy()
    reference.generation_config.eos_token_id = None
    text = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=258)
    return logits, text[:, ids.shape[1] :].numpy()


def greedy(session: OnnxModel, ids: np.ndarray, mask: np.ndarray, count: int) -> list[list[int]]:
    logits, cache = session.prefill(ids, mask, capacity=ids.shape[1] + count)
    tokens = [logits[:, -1].argmax(-1)]
    for _ in range(count - 1):
        tokens.append(session.step(tokens[-1], cache).argmax(-1))
    return np.stack(tokens, axis=1).tolist()


def assert_same(model: Path, out: Path, rows: list[list[int]]) -> None:
    ids, mask = padded(rows, 258)
    logits, text = expected(model, ids, mask)
    session = OnnxModel.open(out, spin=False)
    found = session.logits(ids, mask)
    real = mask.astype(bool)
    assert np.abs(found - logits)[real].max() <= SCALE_BOUND * np.abs(logits[real]).max()
    assert greedy(session, ids, mask, 12) == text.tolist()


@pytest.mark.parametrize("layout", ["dense", "uniform", "per-layer"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_export_computes_what_transformers_computes_in_a_padded_batch(variant, layout, tmp_path):
    model = make(tmp_path / "dense", variant)
    if layout != "dense":
        model = cut(model, tmp_path / "cut", layout)
    done = export(model, tmp_path / "out")
    assert done.agreement.relative <= SCALE_BOUND and done.agreement.same_text and done.agreement.texts == 5
    assert_same(model, tmp_path / "out", [PROBES[1], PROBES[2], PROBES[0]])
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"))
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    layers = Checkpoint(tmp_path / "dense").geometry.layers
    caches = {f"past_key_values.{n}.{part}" for n in range(layers) for part in ("key", "value")}
    assert {value.name for value in graph.input} == {"input_ids", "attention_mask"} | caches
    assert set(check_manifest(tmp_path / "out").files) == names(tmp_path / "out") - {"manifest.json"}


def test_largest_counts_of_two_layers_need_not_fit_each_other(tmp_path):
    """4 heads in 4 groups beside 6 heads in 3: config.json then says 6 query heads for 4 key/value heads."""
    model = make(tmp_path / "dense", "qwen2")
    checkpoint = Checkpoint(model)
    kept = ((0, 2, 4, 6), (0, 1, 2, 3, 6, 7), (1, 3))
    mask = replace(mask_for(checkpoint, 0.6, "per-layer", 0), kept=kept)
    write_model(checkpoint, make_plan(checkpoint, mask), tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (6, 4)
    export(tmp_path / "cut", tmp_path / "out")
    assert_same(tmp_path / "cut", tmp_path / "out", [PROBES[1], PROBES[2]])


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4), right=st.booleans(), seed=st.integers(0, 100))
def test_padding_on_either_side_changes_nothing(lengths, right, seed, exported):
    out = exported[1]
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 256, length).tolist() for length in lengths]
    ids, mask = padded(rows, 258)
    if right:
        ids, mask = (
            np.stack([np.roll(line, -int((row == 0).sum())) for line, row in zip(values, mask, strict=True)])
            for values in (ids, mask)
        )
    session = OnnxModel.open(out, spin=False)
    together = session.logits(ids, mask)
    for row, alone in enumerate(rows):
        single = session.logits(np.array([alone]))[0]
        assert np.abs(together[row][mask[row].astype(bool)] - single).max() <= SCALE_BOUND * np.abs(single).max()


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exported")
    model = cut(make(folder / "dense", "qwen3"), folder / "cut", "per-layer")
    export(model, folder / "out")
    return model, folder / "out"


@pytest.mark.parametrize("right", [False, True], ids=["padded on the left", "padded on the right"])
def test_last_logits_are_those_of_every_rows_last_token(right, exported, tmp_path):
    model, whole = exported
    done = export(model, tmp_path / "out", last_logits=True)
    assert done.manifest.origin["last_logits"] and done.agreement.same_text
    ids, mask = padded(PROBES, 258)
    last = np.full(len(PROBES), ids.shape[1] - 1)
    if right:
        last = mask.sum(axis=1) - 1
        ids, mask = (
            np.stack([np.roll(line, -int((row == 0).sum())) for line, row in zip(values, mask, strict=True)])
            for values in (ids, mask)
        )
    expected = OnnxModel.open(whole).logits(ids, mask)[np.arange(len(last)), last]
    session = OnnxModel.open(tmp_path / "out")
    found, _ = session.prefill(ids, mask)
    assert found.shape == (len(PROBES), 1, session.vocab)
    assert np.abs(found[:, 0] - expected).max() <= SCALE_BOUND * np.abs(expected).max()
    with pytest.raises(InputError, match="last token alone"):
        session.logits(ids, mask)


def test_a_graph_of_last_logits_that_is_wrong_is_not_published(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sspcompile.export.onnx.graph._last",
        lambda graph, hidden, tail: graph.node(
            "Slice", [hidden, graph.integers(0), graph.integers(1), graph.integers(1)], "hidden.first"
        ),
    )
    with pytest.raises(ParityError):
        export(exported[0], tmp_path / "out", last_logits=True)
    assert names(tmp_path) == set()


def test_cuda_is_refused_where_it_would_attend_on_the_processor(exported, tmp_path):
    with pytest.raises(InputError, match="this export computes in fp32"):
        demand_kernels(OnnxModel.open(exported[1]).session, "cuda")
    export(exported[0], tmp_path / "half", "fp16")
    demand_kernels(OnnxModel.open(tmp_path / "half").session, "cuda")


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_rounded_matrices_between_fp16_activations(bits, exported, tmp_path):
    model, _ = exported
    cost = {}
    for dtype in ("F32", "F16"):
        done = export_onnx(
            model,
            tmp_path / dtype,
            precision=replace(PRECISIONS[bits], dtype=dtype),
            blocks=SMALL_BLOCKS,
            probes=PROBES,
            origin={},
            card=lambda *_: "card\n",
            trust_remote_code=True,
        )
        assert done.manifest.origin["activations"] == {"F32": "fp32", "F16": "fp16"}[dtype]
        cost[dtype] = done.agreement.mean_kl
        caches = {value.type for value in OnnxModel.open(tmp_path / dtype).session.get_inputs()[2:]}
        assert caches == {{"F32": "tensor(float)", "F16": "tensor(float16)"}[dtype]}
    assert cost["F16"] == pytest.approx(cost["F32"], rel=0.2)


def test_steps_after_a_prefill_equal_one_prefill(exported):
    session = OnnxModel.open(exported[1], spin=False)
    ids = np.array([PROBES[2]])
    whole = session.logits(ids)
    first, cache = session.prefill(ids[:, :25], capacity=ids.shape[1])
    rest = [session.step(ids[:, position], cache) for position in range(25, ids.shape[1])]
    stepped = np.concatenate([first, np.stack(rest, axis=1)], axis=1)
    assert np.abs(whole - stepped).max() <= SCALE_BOUND * np.abs(whole).max()
    with pytest.raises(InputError, match="room for 40 tokens"):
        session.step(ids[:, 0], cache)


@pytest.mark.parametrize("last_logits", [False, True], ids=["all logits", "last logits"])
def test_genai_writes_the_same_text_with_head_counts_that_differ_by_layer(last_logits, exported, tmp_path):
    model, out = exported
    if last_logits:
        out = tmp_path / "out"
        export(model, out, last_logits=True)
    counts = json.loads((model / "config.json").read_text())["per_layer_config"].values()
    assert len({tuple(pair.values()) for pair in counts}) > 1
    ids = torch.tensor([PROBES[1]])
    assert [genai_text(out, PROBES[1], 20)] == load_onnx(out).continuations(ids, torch.ones_like(ids), 20)


def genai_text(folder: Path, prompt: list[int], count: int | None) -> list[int]:
    """What onnxruntime-genai writes behind a prompt: `count` tokens, or as many as its settings allow."""
    runtime = og.Model(str(folder))
    parameters = og.GeneratorParams(runtime)
    if count is not None:
        parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(runtime, parameters)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return list(map(int, generator.get_sequence(0)))[len(prompt) :]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("variant", ["llama", "phi3, heads of 8", "qwen3, heads of 24, sliding window"])
def test_genai_stops_at_the_context_with_the_same_text_as_run(variant, precision, tmp_path):
    export(make(tmp_path / "model", variant), tmp_path / "out", precision, positions=30)
    ids = torch.tensor([PROBES[1]])
    text = load_onnx(tmp_path / "out").continuations(ids, torch.ones_like(ids), 30 - ids.shape[1])
    assert [genai_text(tmp_path / "out", PROBES[1], None)] == text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_dtypes_are_shared_or_converted_once(dtype, precision, tmp_path):
    model = make(tmp_path / "model", "llama with biases, llama3 positions", dtype=dtype, max_shard_size=40_000)
    export(model, tmp_path / "out", precision)
    same = (dtype, precision) in ((torch.float32, "fp32"), (torch.float16, "fp16"))
    assert (tmp_path / "out" / "model.onnx.data").exists() != same
    for file in (tmp_path / "model").glob("*.safetensors"):
        copied = tmp_path / "out" / file.name
        assert copied.exists() == same and (not same or copied.read_bytes() == file.read_bytes())
    if precision == "fp32":
        assert_same(model, tmp_path / "out", [PROBES[1], PROBES[2]])


def test_hard_link_writes_no_weights(tmp_path):
    model = make(tmp_path / "model", "qwen2 tied")
    export(model, tmp_path / "out", link=True)
    assert (tmp_path / "out" / "model.safetensors").samefile(model / "model.safetensors")


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "variant",
    [
        "qwen2 tied",
        "phi3",
        "llama with biases, llama3 positions",
        "llama with biases, heads of 8",
        "phi3, heads of 8",
        "qwen3, heads of 24, sliding window",
    ],
)
def test_rounded_graph_computes_what_the_model_with_rounded_matrices_computes(precision, variant, tmp_path):
    """With products in floats (accuracy level 0) nothing is left but the rounding that the file itself states."""
    from safetensors.numpy import load_file, save_file

    model = make(tmp_path / "model", variant)
    export(model, tmp_path / "out", precision, Blocks(16, accuracy_level=0))
    weights = OnnxWeights(tmp_path / "out")
    tensors = load_file(model / "model.safetensors")
    tied = "lm_head.weight" not in tensors
    shapes = {name: value.shape for name, value in tensors.items() if value.ndim == 2}
    rounded = {
        name: weights.rounded(name, 8 if precision == "int8" else 4, shapes)
        for name in shapes
        if not (name.startswith("model.embed") and not tied)
    }
    head = rounded["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert all(0 < np.abs(value - tensors[name]).max() < 0.3 for name, value in rounded.items())
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": False}
    (model / "config.json").write_text(json.dumps(config))
    save_file(tensors | rounded | {"lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    assert_same(model, tmp_path / "out", [PROBES[1], PROBES[2]])


def test_a_tied_table_is_rounded_once_unless_embeddings_are_kept(tmp_path):
    model = make(tmp_path / "model", "qwen2 tied")
    shared = export(model, tmp_path / "shared", "int4").agreement
    kept = export(model, tmp_path / "kept", "int4", Blocks(16, keep_embeddings=True)).agreement
    assert kept.mean_kl < shared.mean_kl
    sizes = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("shared", "kept")]
    config = json.loads((model / "config.json").read_text())
    assert 0 <= sizes[1] - sizes[0] - 4 * config["vocab_size"] * config["hidden_size"] < 64 * 4


def test_products_in_int8_cost_more_and_the_cost_is_reported(tmp_path):
    model = make(tmp_path / "model", "llama")
    levels = {level: export(model, tmp_path / f"{level}", "int8", Blocks(16, level)).agreement for level in (0, 4)}
    assert 0 < levels[0].mean_kl < levels[4].mean_kl < 0.1


def test_rounding_is_onnx_runtimes_own_to_the_bit(tmp_path):
    """Against the library's quantiser on the whole model: the same packed weights, scales and zero points."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    model = make(tmp_path / "model", "llama")
    export(model, tmp_path / "out", "int4")
    weights = OnnxWeights(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    from safetensors.numpy import load_file

    matrix = load_file(model / "model.safetensors")[name].T.copy()
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="m")],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, matrix.shape[0]])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, matrix.shape[1]])],
        [onnx.numpy_helper.from_array(matrix, "w")],
    )
    whole = MatMulNBitsQuantizer(onnx.helper.make_model(graph), block_size=16, is_symmetric=False, accuracy_level=4)
    whole.process()
    theirs = {t.name: onnx.numpy_helper.to_array(t) for t in whole.model.model.graph.initializer}
    for part, theirs_name in (("packed", "w_Q4"), ("scales", "w_scales"), ("zeros", "w_zero_points")):
        assert np.array_equal(weights[f"{name}.{part}"].ravel(), theirs[theirs_name].ravel())


JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}


class OnnxWeights:
    """The initializers of an export, read from its files."""

    def __init__(self, folder: Path) -> None:
        self._arrays = {
            tensor.name: onnx.numpy_helper.to_array(tensor, str(folder))
            for tensor in onnx.load(folder / "model.onnx").graph.initializer
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def rounded(self, name: str, bits: int, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
        """The matrix that packed codes, scales and zero points stand for: scale * (code - zero point).

        Matrices with the same input lie one below the other in a joined one.
        """
        stem, part = name.removesuffix(".weight").rpartition(".")[::2]
        together = next((parts for parts in JOINED if part in parts), ())
        joined = f"{stem}.{JOINED[together]}.weight" if together else name
        above = [shapes[f"{stem}.{other}.weight"][0] for other in together[: together.index(part)]] if together else []
        return self._whole(joined, bits, shapes[name][1])[sum(above) :][: shapes[name][0]]

    def _whole(self, name: str, bits: int, columns: int) -> np.ndarray:
        packed, scales, zeros = (self[f"{name}.{part}"] for part in ("packed", "scales", "zeros"))

        def unpacked(codes: np.ndarray, count: int) -> np.ndarray:
            if bits == 4:
                codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
            return codes[..., :count].astype(np.float32)

        rows, blocks = packed.shape[:2]
        codes = unpacked(packed, packed.shape[2] * 8 // bits)
        zero = unpacked(zeros.reshape(rows, -1), blocks)
        values = scales.reshape(rows, blocks, 1) * (codes - zero[..., None])
        return values.reshape(rows, -1)[:, :columns].astype(np.float32)


REFUSED = {
    "head size of 4": ("llama", {"head_dim": 4}, "multiples of 8, not 4"),
    "head size of 12": ("qwen3", {"head_dim": 12}, "multiples of 8, not 12"),
    "positions": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "'dynamic' positions",
    ),
    "partial rotary": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "a part of the head",
    ),
    "family": ("gemma", {}, "does not know GemmaForCausalLM"),
    "activation": ("llama", {"hidden_act": "gelu"}, "not 'gelu'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_cannot_compute_is_refused_before_anything_is_written(case, tmp_path):
    family, values, message = REFUSED[case]
    config = family_config(family, **{key: values[key] for key in ("head_dim",) if key in values})
    for key, value in values.items():
        setattr(config, key, value)
    model = save_random(tmp_path / "model", config)
    with pytest.raises(UnsupportedModelError, match=message):
        export(model, tmp_path / "out")
    assert names(tmp_path) == {"model"}


def test_a_graph_that_computes_something_else_is_not_published(tmp_path, monkeypatch):
    """Wrong angles, as from a bug in this code: the run before publication finds them."""
    from sspcompile.export.onnx import decoder

    true = decoder._rotary
    monkeypatch.setattr(decoder, "_rotary", lambda *args: (true(*args)[0] * np.float32(1.01), 1.0))
    model = make(tmp_path / "model", "llama")
    with pytest.raises(ParityError, match="Nothing was published"):
        export(model, tmp_path / "out")
    assert names(tmp_path) == {"model"}


def noisy(folder: Path, family: str) -> Path:
    """Sharp attention makes thousandths of the logits' scale out of what fp32 rounds."""
    config = family_config(family, layers=4, kv_heads=8, head_dim=64)
    config.initializer_range = 1.0
    return save_random(folder, config, seed=1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_a_right_graph_is_published_however_much_its_model_rounds(family, tmp_path):
    done = export(noisy(tmp_path / "model", family), tmp_path / "out")
    a = done.agreement
    assert a.rounding is not None and not a.meets(PRECISIONS["fp32"].gate)
    assert a.relative <= 2 * ROUNDING_FACTOR * a.rounding < 0.1
    assert json.loads((tmp_path / "out" / "check.json").read_text())["rounding"] == a.rounding


def test_a_wrong_graph_of_a_noisy_model_is_not_published(tmp_path, monkeypatch):
    from sspcompile.export.onnx import decoder

    true = decoder._rotary
    monkeypatch.setattr(decoder, "_rotary", lambda *args: (true(*args)[0] * np.float32(1.001), 1.0))
    with pytest.raises(ParityError, match=r"model in float64 by .*Nothing was published"):
        export(noisy(tmp_path / "model", "llama"), tmp_path / "out")
    assert names(tmp_path) == {"model"}


def test_where_rounding_is_all_there_is_nothing_is_published(tmp_path):
    with pytest.raises(ParityError, match=r"In fp16 .* cannot be told .*--precision fp32"):
        export(noisy(tmp_path / "model", "granite"), tmp_path / "out", "fp16")
    assert names(tmp_path) == {"model"}


def test_values_beyond_fp16_are_refused_with_their_tensor(tmp_path):
    from safetensors.numpy import load_file, save_file

    model = make(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e6
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight has values beyond 65504"):
        export(model, tmp_path / "out", "fp16")
    assert names(tmp_path) == {"model"}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize(("positions", "written", "read"), [(2, 1, 1), (3, 1, 2), (32, 16, 16), (128, 32, 40)])
def test_a_short_context_is_run_to_its_end_and_stated_everywhere(positions, written, read, precision, tmp_path):
    model = make(tmp_path / "model", "llama")
    texts = []

    def card(agreement: Agreement, context_length: int) -> str:
        texts.append((agreement.new_tokens, context_length))
        return "card\n"

    done = export_onnx(
        model,
        tmp_path / "out",
        precision=PRECISIONS[precision],
        blocks=SMALL_BLOCKS,
        probes=PROBES,
        origin={},
        card=card,
        trust_remote_code=False,
        positions=positions,
    )
    assert texts == [(written, positions)] and done.agreement.padded == (read > 1)
    assert done.context_length == positions == check_manifest(tmp_path / "out").origin["context_length"]
    settings = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert settings["model"]["context_length"] == settings["search"]["max_length"] == positions
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == positions
    width = 2 if precision == "fp16" else 4
    tables = {t.name: t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer if "rotary" in t.name}
    assert {tuple(table.dims) for table in tables.values()} == {(positions, 8)} and len(tables) == 2
    assert {len(table.raw_data) for table in tables.values()} == {positions * 8 * width}
    session = OnnxModel.open(tmp_path / "out")
    assert session.positions == positions
    assert session.logits(np.full((1, positions), 7)).shape[1] == positions


@pytest.mark.parametrize("probes", [[[5] * 300] * 3, [[5] * 40], [[5]]], ids=["all alike", "one", "one token"])
def test_probes_of_one_length_are_padded_as_well(probes, tmp_path):
    model = make(tmp_path / "model", "llama")
    done = export_onnx(
        model,
        tmp_path / "out",
        precision=PRECISIONS["fp32"],
        blocks=SMALL_BLOCKS,
        probes=probes,
        origin={},
        card=lambda *_: "card\n",
        trust_remote_code=False,
    )
    assert done.agreement.padded == (len(probes[0]) > 1)
    assert done.agreement.texts == len(probes) + 2 * done.agreement.padded


def test_context_can_be_shortened_but_not_stretched(tmp_path):
    model = make(tmp_path / "model", "llama")
    export(model, tmp_path / "out", positions=128)
    assert (tmp_path / "out" / "rotary.bin").stat().st_size == 2 * 128 * 8 * 4
    for wrong in (257, 1):
        with pytest.raises(InputError, match="at least 2 and at most 256"):
            export(model, tmp_path / "wrong", positions=wrong)
    assert names(tmp_path) == {"model", "out"}


@pytest.mark.parametrize("positions", [0, 1, -5])
def test_positions_that_are_no_number_of_tokens_are_refused(positions, tmp_path):
    model = make(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": positions}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="max_position_embeddings"):
        read_decoder(model)


def test_yarn_reaches_as_far_as_its_factor_says(tmp_path):
    model = make(tmp_path / "model", "qwen3 tied, yarn positions")
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(config))
    assert read_decoder(model).positions == 256


def test_tables_are_written_in_bands_as_they_would_be_at_once(tmp_path):
    """20,000 positions of 128 angles take two bands; the second must go on where the first one ended."""
    frequencies = (1e4 ** -(np.arange(128) / 128)).astype(np.float32)
    angles = np.arange(20_000, dtype=np.float32)[:, None] * frequencies
    for dtype, numpy in (("F32", np.float32), ("F16", np.float16)):
        found = write_rotary(tmp_path, frequencies, 1.25, 20_000, dtype)
        for name, function in (("rotary.cos", np.cos), ("rotary.sin", np.sin)):
            placed = found[name]
            stored = np.fromfile(tmp_path / placed.file, numpy, count=20_000 * 128, offset=placed.offset)
            expected = (function(angles) * np.float32(1.25)).astype(numpy)
            assert placed.shape == (20_000, 128) and np.array_equal(stored.reshape(placed.shape), expected)


@pytest.mark.parametrize("head_dim", [4, 8, 12, 16, 24, 32, 40])
def test_verdict_on_a_head_size_is_what_the_export_does(head_dim, tmp_path):
    model = save_random(tmp_path / "model", family_config("llama", head_dim=head_dim), seed=3)
    plan = make_plan(Checkpoint(model), mask_for(Checkpoint(model), 0.6, "uniform", 4))
    (verdict,) = [one for one in plan.runtimes if one.runtime == "ONNX Runtime"]
    try:
        done = export(model, tmp_path / "out")
    except UnsupportedModelError:
        assert not verdict.loads
    else:
        assert verdict.loads and done.agreement.same_text
