"""GGUF exports read back by `gguf`: tensors, settings, tokenizer, refusals. What llama.cpp makes of them is tested in
test_gguf_llama.py."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_models import PRE_TOKENIZERS, VOCAB, config_for, cut, dense, tokenizer, with_digits
from safetensors.torch import load_file
from tokenizers import pre_tokenizers

from sspcompile.api.arguments import named
from sspcompile.api.export import ExportRequest, export
from sspcompile.errors import CheckpointError, InputError, UnsupportedModelError
from sspcompile.export.gguf import publish
from sspcompile.export.gguf.publish import GgufExport, export_gguf
from sspcompile.export.gguf.rounding import TYPES
from sspcompile.export.gguf.source import read_source
from sspcompile.export.gguf.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary
from sspcompile.families import FAMILIES, family_of
from sspcompile.families.gguf import PER_LAYER, UNIFORM
from sspcompile.model.llama_session import MODEL, has_llama_cpp
from sspcompile.workspace import Workspace

SIZE = 64


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    """What is published is the same whether llama.cpp is installed here or not."""
    monkeypatch.setattr(publish, "has_llama_cpp", lambda: False)


def written(model: Path, out: Path, kind: str | None = None, **origin: object) -> tuple[GGUFReader, GgufExport]:
    _, done = export_gguf(
        model, out, kind=kind, probes=[[1]], origin=origin, card=lambda done: "", trust_remote_code=True
    )
    return GGUFReader(out / MODEL), done


def said(reader: GGUFReader, key: str) -> object:
    return reader.fields[key].contents()


def tensors_of(reader: GGUFReader) -> dict[str, np.ndarray]:
    return {one.name: one.data for one in reader.tensors}


def paired(rows: torch.Tensor) -> np.ndarray:
    """Rows r and r + SIZE/2 of every head beside each other: how llama.cpp turns them."""
    order = [
        head * SIZE + half * SIZE // 2 + r
        for head in range(len(rows) // SIZE)
        for r in range(SIZE // 2)
        for half in (0, 1)
    ]
    return rows[order].numpy()


@pytest.mark.parametrize(("layout", "architecture"), [("uniform", "llama"), ("per-layer", "deci")])
def test_a_cut_is_written_tensor_by_tensor(layout, architecture, tmp_path):
    source = dense(tmp_path / "dense", config_for("llama", bias=True))
    plan = cut(source, tmp_path / "cut", layout)
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    reader, done = written(tmp_path / "cut", tmp_path / "out")
    found = tensors_of(reader)
    assert done.kind.name == "f32" and said(reader, "general.architecture") == done.architecture == architecture
    for layer in range(4):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, to in {"q_proj": "attn_q", "k_proj": "attn_k"}.items():
            for kind in ("weight", "bias"):  # without the bias: 4 of the logits
                assert np.array_equal(found[f"{ours}{to}.{kind}"], paired(stored[f"{theirs}self_attn.{name}.{kind}"]))
        straight = {"self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate"}
        straight |= {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
        for name, to in straight.items():
            for kind in ("weight", "bias"):
                assert np.array_equal(found[f"{ours}{to}.{kind}"], stored[f"{theirs}{name}.{kind}"].numpy())
        assert np.array_equal(
            found[f"{ours}ffn_norm.weight"], stored[f"{theirs}post_attention_layernorm.weight"].numpy()
        )
    assert np.array_equal(found["token_embd.weight"], stored["model.embed_tokens.weight"].numpy())
    assert np.array_equal(found["output.weight"], stored["lm_head.weight"].numpy())
    heads, widths = [heads for heads, _ in plan.counts], list(plan.widths)
    per_layer = layout == "per-layer"
    assert said(reader, f"{architecture}.attention.head_count") == (heads if per_layer else heads[0])
    assert said(reader, f"{architecture}.feed_forward_length") == (widths if per_layer else widths[0])
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert said(reader, f"{architecture}.{key}") == SIZE


def test_sixteen_bits_pass_through_and_vectors_become_fp32(tmp_path):
    source = dense(tmp_path / "dense", config_for("llama", tied=True), dtype=torch.bfloat16)
    stored = load_file(source / "model.safetensors")
    reader, done = written(source, tmp_path / "out")
    found = {one.name: one for one in reader.tensors}
    assert done.kind.name == "bf16" and "output.weight" not in found
    down = stored["model.layers.0.mlp.down_proj.weight"].view(torch.uint16).numpy()
    assert np.array_equal(np.ascontiguousarray(found["blk.0.ffn_down.weight"].data).view(np.uint16), down)
    norm = stored["model.norm.weight"].float().numpy()
    assert found["output_norm.weight"].data.dtype == np.float32
    assert np.array_equal(found["output_norm.weight"].data, norm)


@pytest.mark.parametrize(("kind", "step"), [("q8_0", 0.01), ("q4_0", 0.15), ("f16", 0.001)])
def test_rounded_types_are_near_what_they_round(kind, step, tmp_path):
    from gguf.quants import dequantize

    source = dense(tmp_path / "dense", config_for("llama"))
    stored = load_file(source / "model.safetensors")
    reader, _ = written(source, tmp_path / "out", kind)
    one = next(one for one in reader.tensors if one.name == "blk.1.ffn_up.weight")
    assert one.tensor_type.name.lower() == kind
    wanted = stored["model.layers.1.mlp.up_proj.weight"].numpy()
    assert np.abs(dequantize(one.data, one.tensor_type) - wanted).max() < step * np.abs(wanted).max()


def test_qwen3_per_layer_has_q_k_and_v_in_one_matrix_in_their_own_order(tmp_path):
    source = dense(tmp_path / "dense", config_for("qwen3", tied=True))
    cut(source, tmp_path / "cut", "per-layer")
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    reader, done = written(tmp_path / "cut", tmp_path / "out")
    parts = [stored[f"model.layers.2.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert done.architecture == "openelm"
    assert np.array_equal(tensors_of(reader)["blk.2.attn_qkv.weight"], torch.cat(parts).numpy())


def test_gemma_norms_are_shifted_scaled_and_layers_padded(tmp_path):
    source = dense(tmp_path / "dense", config_for("gemma3_text", tied=True))
    plan = cut(source, tmp_path / "cut", "per-layer")
    stored = load_file(tmp_path / "cut" / "model.safetensors")
    reader, done = written(tmp_path / "cut", tmp_path / "out")
    found = tensors_of(reader)
    assert done.architecture == "gemma3" and said(reader, "gemma3.feed_forward_length") == max(plan.widths)
    assert np.allclose(found["output_norm.weight"], stored["model.norm.weight"].numpy() + 1)
    q = stored["model.layers.0.self_attn.q_norm.weight"].numpy()
    assert np.allclose(found["blk.0.attn_q_norm.weight"], (q + 1) * math.sqrt(SIZE / 16), rtol=1e-6)
    narrow = min(range(4), key=lambda layer: plan.widths[layer])
    down = found[f"blk.{narrow}.ffn_down.weight"]
    assert np.array_equal(down[:, : plan.widths[narrow]], stored[f"model.layers.{narrow}.mlp.down_proj.weight"].numpy())
    assert not down[:, plan.widths[narrow] :].any()


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_the_tokenizer_is_inside_under_the_name_that_llama_cpp_knows(name, tmp_path):
    source = dense(tmp_path / "dense", config_for("llama"), tokenizer(name, bos=True))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    reader, _ = written(source, tmp_path / "out", licence={"license": "apache-2.0"})
    assert said(reader, "tokenizer.ggml.model") == "gpt2" and said(reader, "tokenizer.ggml.pre") == name
    tokens, types = said(reader, "tokenizer.ggml.tokens"), said(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(set(tokens)) == len(types) == VOCAB + 8
    wanted = {"<s>": CONTROL, "</s>": CONTROL, "<tool>": USER_DEFINED, "a": NORMAL}
    assert {token: types[tokens.index(token)] for token in wanted} == wanted
    assert types[-8:] == [UNUSED] * 8
    ends = {key: said(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding")}
    assert ends == {"bos": 0, "eos": 1, "padding": 2} and said(reader, "tokenizer.ggml.add_bos_token") is True
    assert said(reader, "tokenizer.chat_template") == "{{ messages }}"
    assert said(reader, "general.license") == "apache-2.0"


def edited(folder: Path, **changes: object) -> Path:
    """The folder with other parts of tokenizer.json; `model` is merged."""
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    held["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(held | changes))
    return folder


BROKEN = {
    "sentencepiece": ({"model": {"byte_fallback": True}}, "SentencePiece"),
    "another model": ({"model": {"type": "Unigram"}}, "'Unigram'"),
    "unknown words": ({"pre_tokenizer": {"type": "Whitespace"}}, "cuts texts into words by 'Whitespace"),
    "words skip the merges": ({"model": {"ignore_merges": True}}, "skip the merges"),
    "no merges": ({"model": {"merges": []}}, "no merges"),
    "changed texts": ({"normalizer": {"type": "Lowercase"}}, "'Lowercase'"),
    "another end": ({"post_processor": {"type": "BertProcessing"}}, "'BertProcessing'"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return dense(tmp_path_factory.mktemp("plain") / "dense", config_for("llama"))


@pytest.mark.parametrize("case", BROKEN)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(case, plain, tmp_path):
    changes, reason = BROKEN[case]
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(UnsupportedModelError, match=reason):
        read_vocabulary(edited(tmp_path, **dict(changes)), VOCAB, FAMILIES["llama"])


def test_a_class_with_a_pipeline_of_its_own_counts_more_than_its_file(tmp_path):
    """transformers reads every tokenizer of a Qwen2 in Qwen2's way."""
    source = dense(tmp_path / "dense", config_for("qwen2"), tokenizer("gpt-2"))
    assert read_vocabulary(source, VOCAB, FAMILIES["qwen2"]).pre == "qwen2"


def test_steps_of_sequences_in_sequences_are_the_same_steps(tmp_path, plain):
    reads = tokenizer()
    reads.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([with_digits()])
    reads.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    assert read_vocabulary(tmp_path, VOCAB, FAMILIES["llama"]).pre == "smollm"


UNHELD = {
    "a family without a form": ("phi3", "uniform", {}, 1.0, "no GGUF of a uniform Phi3ForCausalLM"),
    "a layout without one": ("smollm3", "per-layer", {"no_rope_layers": [1, 1, 1, 0]}, 1.0, "per-layer SmolLM3"),
    "layers without positions": ("smollm3", "uniform", {"no_rope_layers": [1, 0, 1, 0]}, 1.0, "every 4th layer"),
    "biases": ("qwen3", "uniform", {"bias": True}, 1.0, "biases of qkv"),
    "widths of an untied Qwen3": ("qwen3", "per-layer", {}, 0.6, "embeddings are tied"),
    "multipliers": ("granite", "per-layer", {}, 0.6, "embedding_multiplier = 1"),
    "another activation": ("llama", "uniform", {"hidden_act": "gelu"}, 1.0, "'gelu'"),
    "yarn": (
        "llama",
        "uniform",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
        1.0,
        "'yarn' positions",
    ),
    "windows": ("mistral", "uniform", {"sliding_window": 8}, 1.0, "sliding windows"),
    "experts": ("mixtral", "uniform", {}, 1.0, "experts"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_what_llama_cpp_does_not_hold_is_refused_before_anything_is_written_and_the_plan_says_so(case, tmp_path):
    family, layout, settings, width, reason = UNHELD[case]
    source = dense(tmp_path / "dense", config_for(family, **settings))
    plan = cut(source, tmp_path / "cut", layout, width=width)
    with pytest.raises(UnsupportedModelError, match=reason) as refused:
        written(tmp_path / "cut", tmp_path / "out")
    verdict = next(one for one in plan.runtimes if one.runtime == "llama.cpp")
    assert not verdict.loads and verdict.reason + "." == refused.value.message
    assert "--format" in refused.value.hint or "--layout" in refused.value.hint
    assert not [path for path in tmp_path.iterdir() if path.name not in ("dense", "cut")]


@pytest.mark.parametrize("family", sorted(set(UNIFORM)))
def test_plan_and_export_agree_on_what_is_held(family, tmp_path):
    more = {"no_rope_layers": [1, 1, 1, 0]} if family == "smollm3" else {}
    tied = family == "gemma3_text"
    source = dense(tmp_path / "dense", config_for(family, tied=tied, **more))
    plan = cut(source, tmp_path / "cut", "uniform")
    _, done = written(tmp_path / "cut", tmp_path / "out")
    verdict = next(one for one in plan.runtimes if one.runtime == "llama.cpp")
    assert verdict.loads and f"as architecture {done.architecture}" in verdict.reason


def test_every_form_is_of_a_family():
    assert set(UNIFORM) | set(PER_LAYER) <= set(FAMILIES) and family_of({"model_type": "llama"})


def test_types_are_refused_in_words(plain, tmp_path):
    with pytest.raises(InputError, match="no GGUF type 'q9'"):
        written(plain, tmp_path / "out", "q9")
    with pytest.raises(InputError, match=r"own quantiser, and llama\.cpp is not installed"):
        written(plain, tmp_path / "out", "q4_k_m")
    assert not list(tmp_path.iterdir()) and all(kind.here or kind.rounded for kind in TYPES.values())


def test_an_export_without_llama_cpp_says_that_nobody_has_loaded_it(plain, tmp_path, run):
    out = tmp_path / "out"
    code, shown, _ = run("export", plain, "--format", "gguf", "--out", out)
    assert code == 0 and shown.count("UNPROVEN") == 1
    assert "**Unproven**" in (out / "README.md").read_text()
    manifest = json.loads((out / "manifest.json").read_text())["origin"]
    assert manifest["proven"] is False and manifest["architecture"] == "llama" and manifest["type"] == "f32"
    assert (out / "Modelfile").read_text().startswith("FROM ./model.gguf")
    assert not list(out.glob("*.safetensors"))
    code, shown, _ = run("export", plain, "--format", "gguf", "--out", out, "--overwrite", "--json")
    assert code == 0 and json.loads(shown)["proven"] is False


def test_an_export_is_named_and_not_exported_again(plain, tmp_path):
    out = tmp_path / "out"
    found = named(str(plain), Workspace(tmp_path))
    done = export(found, ExportRequest("gguf", type="q8_0"), Workspace(tmp_path), out=out)
    assert done.gguf is not None and done.gguf.kind.name == "q8_0"
    again = named(str(out), Workspace(tmp_path))
    assert again.kind == "export" and again.gguf and not again.onnx
    with pytest.raises(InputError, match="a GGUF export already"):
        export(again, ExportRequest("gguf"), Workspace(tmp_path))
    with pytest.raises(InputError, match="--type belongs to --format gguf"):
        ExportRequest("onnx", type="f16").check()


def test_equal_inputs_give_equal_bytes(plain, tmp_path):
    for out in ("a", "b"):
        written(plain, tmp_path / out / "same")
    assert (tmp_path / "a" / "same" / MODEL).read_bytes() == (tmp_path / "b" / "same" / MODEL).read_bytes()


def test_a_checkpoint_whose_counts_contradict_its_tensors_is_refused(plain, tmp_path):
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((plain / "config.json").read_text()) | {"intermediate_size": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="asks for"):
        read_source(tmp_path)


@pytest.mark.skipif(has_llama_cpp(), reason="what runs the file loads torch")
def test_writing_waits_for_no_torch(plain, tmp_path):
    """Nor is its memory taken: the whole command stays far below that of an import of torch."""
    command = ["export", str(plain), "--format", "gguf", "--out", str(tmp_path / "out")]
    run = f"from sspcompile.cli.main import main\ntry:\n    main({command!r})\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{run}"], capture_output=True, text=True, check=False)
    assert (tmp_path / "out" / MODEL).is_file(), done.stderr
    assert "torch" not in done.stdout.split()
