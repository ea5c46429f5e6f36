"""What is no language model in plain safetensors is refused with its cause and the way out, before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import refusals
import torch
from builders import family_config, save_random
from safetensors.torch import load_file, save_file
from stored import below, stored_as
from test_slicing_exact import mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.slicing.mask import dump_mask

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    made: dict[bool, Path] = {}

    def get(tied: bool = False) -> Path:
        if tied not in made:
            folder = tmp_path_factory.mktemp("dense") / str(tied)
            made[tied] = save_random(folder, family_config("llama", layers=2, tied=tied))
        return made[tied]

    return get


def said(**settings: object) -> Change:
    """More in config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def in_place(replace: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Change:
    """Other tensors in place of the weight of every projection."""

    def change(folder: Path) -> None:
        found: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            is_projection = name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS
            found |= replace(name.removesuffix(".weight"), tensor) if is_projection else {name: tensor}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def beside(**tensors: torch.Tensor) -> Change:
    """More tensors; `__` stands for a dot."""

    def change(folder: Path) -> None:
        more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file(
            load_file(folder / "model.safetensors") | more, folder / "model.safetensors", metadata={"format": "pt"}
        )

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        tensors = {name: t for name, t in load_file(folder / "model.safetensors").items() if name not in names}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def files(**contents: bytes | str) -> Change:
    """More files; `__` stands for a dot, `___` for a hyphen."""

    def change(folder: Path) -> None:
        for name, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            (folder / name.replace("___", "-").replace("__", ".")).write_bytes(data)

    return change


def gone(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def renamed(to: str) -> Change:
    return lambda folder: (folder / "model.safetensors").rename(folder / to) and None


def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    return {
        f"{name}.qweight": torch.zeros(columns // 8, rows, dtype=torch.int32),
        f"{name}.qzeros": torch.zeros(1, rows // 8, dtype=torch.int32),
        f"{name}.scales": torch.ones(1, rows, dtype=torch.float16),
        f"{name}.g_idx": torch.zeros(columns, dtype=torch.int32),
    }


def awq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in gptq(name, weight).items() if not key.endswith("g_idx")}


def bnb4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.weight.absmax": torch.zeros(weight.numel() // 64, dtype=torch.uint8),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.zeros(80, dtype=torch.uint8),
    }


def bnb8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": weight.to(torch.int8), f"{name}.SCB": torch.ones(weight.shape[0])}


def fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.ones(1, 1)}


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight_packed": torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.int32),
        f"{name}.weight_scale": torch.ones(weight.shape[0], 1),
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


def mlx(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.zeros(weight.shape[0], weight.shape[1] // 8, dtype=torch.uint32),
        f"{name}.scales": torch.ones(weight.shape[0], 1, dtype=torch.float16),
        f"{name}.biases": torch.ones(weight.shape[0], 1, dtype=torch.float16),
    }


def eight(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn)}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
ORIGINAL, REMOVE = "Cut the model that it was made from, and quantise the cut", "Remove quantization_config"
# What is done to a plain folder -> what the one line says.
QUANTISED: dict[str, tuple[tuple[Change, ...], tuple[str, ...]]] = {
    "GPTQ": ((in_place(gptq), said(quantization_config=GPTQ)), ("GPTQ-quantised (4 bits)", "g_idx", ORIGINAL)),
    "GPTQ, described in a file": ((in_place(gptq), files(quantize_config__json="{}")), ("GPTQ-quantised", ORIGINAL)),
    "GPTQ without a word": ((in_place(gptq),), ("GPTQ-quantised", ORIGINAL)),
    "GPTQ without a prefix": (
        (in_place(gptq), lambda f: re_store(f, lambda t: {n.removeprefix("model."): x for n, x in t.items()})),
        ("GPTQ-quantised", ORIGINAL),
    ),
    "AWQ": (
        (in_place(awq), said(quantization_config={"quant_method": "awq", "bits": 4})),
        ("AWQ-quantised (4 bits)", "q", ORIGINAL),
    ),
    "AWQ without a word": ((in_place(awq),), ("GPTQ- or AWQ-quantised", ORIGINAL)),
    "bitsandbytes, 4 bits": (
        (in_place(bnb4), said(quantization_config=BNB)),
        ("bitsandbytes-quantised (4 bits)", ORIGINAL, ".dequantize()"),
    ),
    "bitsandbytes, 8 bits": (
        (in_place(bnb8), said(quantization_config={"load_in_8bit": True})),
        ("bitsandbytes-quantised (8 bits)", "SCB", ".dequantize()"),
    ),
    "FP8": (
        (in_place(fp8), said(quantization_config={"quant_method": "fp8"})),
        ("FP8-quantised", "weight_scale_inv", "FineGrainedFP8Config(dequantize=True)"),
    ),
    "FP8 without scales": (
        (in_place(eight), said(quantization_config={"quant_method": "fp8"})),
        ("FP8-quantised", "as F8_E4M3", ORIGINAL),
    ),
    "compressed-tensors": (
        (in_place(packed), said(quantization_config=PACKED)),
        ("compressed-tensors-quantised", ".weight_", "CompressedTensorsConfig"),
    ),
    "compressed-tensors, older key": (
        (in_place(packed), said(compression_config=PACKED)),
        ("compressed-tensors-quantised", ORIGINAL),
    ),
    "MLX": ((in_place(mlx), said(quantization={"bits": 4})), ("MLX-quantised (4 bits)", ORIGINAL)),
    "ModelOpt, described in a file": (
        (in_place(lambda n, w: {**eight(n, w), f"{n}.input_scale": torch.ones(1)}), files(hf_quant_config__json="{}")),
        ("ModelOpt-quantised", "input_scale", ORIGINAL),
    ),
    "a method of tomorrow": (
        (in_place(mlx), said(quantization_config={"quant_method": "q9"})),
        ("q9-quantised", ORIGINAL),
    ),
    "a dtype of tomorrow": (
        (said(quantization_config={"quant_method": "mxfp4"}), lambda f: other_dtype(f)),
        ("MXFP4-quantised", "F8_", "Mxfp4Config"),
    ),
    "a configuration alone": (
        (said(quantization_config=GPTQ), gone("model.safetensors")),
        ("a GPTQ-quantised (4 bits) model", "in quantization_config", ORIGINAL),
    ),
    "scales of a key/value cache": (
        (beside(model__layers__0__self_attn__k_scale=torch.ones(1)),),
        ("self_attn.k_scale", "quantised key/value cache"),
    ),
    "left over, bitsandbytes": (
        (said(quantization_config=BNB),),
        ("bitsandbytes-quantised", "quantization_config", "all of its weights are plain", REMOVE),
    ),
    "left over, GPTQ": ((said(quantization_config=GPTQ),), ("GPTQ-quantised", "weights are plain", REMOVE)),
    "left over, no method": ((said(quantization_config={}),), ("quantised", "weights are plain", REMOVE)),
    "left over, older key": ((said(compression_config=PACKED),), ("weights are plain", "Remove compression_config")),
}
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8}
LORA = json.dumps(ADAPTER)
# Merged where the base is to be had and peft is there (test_adapters.py).
WAY = ("is a LoRA adapter of owner/base",)
OTHERS: dict[str, tuple[tuple[Change, ...], tuple[str, ...]]] = {
    "an adapter": (
        (gone("model.safetensors", "config.json"), files(adapter_config__json=LORA, adapter_model__safetensors=b"")),
        WAY,
    ),
    "an adapter with its base's config.json": ((gone("model.safetensors"), files(adapter_config__json=LORA)), WAY),
    "an adapter without a word": (
        (gone("model.safetensors", "config.json"), files(adapter_model__bin=b"")),
        ("is a LoRA adapter of another model", "merge_and_unload()"),
    ),
    "an adapter of prompts": (
        (gone("model.safetensors"), files(adapter_config__json=json.dumps(ADAPTER | {"peft_type": "PROMPT_TUNING"}))),
        ("PROMPT_TUNING adapter of owner/base", "Cut owner/base itself"),
    ),
    "an adapter beside whole weights": (
        (files(adapter_config__json=LORA),),
        ("whole weights and", "LoRA adapter of owner/base", "remove adapter_config.json"),
    ),
    "an adapter inside of the weights": (
        (beside(model__layers__0__self_attn__q_proj__lora_A__default__weight=torch.ones(8, 64)),),
        ("lora_A.default.weight", "not merged", "merge_and_unload()"),
    ),
    "GGUF": (
        (gone("model.safetensors", "config.json"), files(model___Q4__gguf=b"GGUF")),
        ("no config.json", "GGUF weights", "safetensors checkpoint that they were made from"),
    ),
    "GGUF with a config.json": ((gone("model.safetensors"), files(m__gguf=b"GGUF")), ("holds GGUF weights",)),
    "pickles": ((renamed("pytorch_model.bin"),), ("pickled .bin weights", "save_pretrained")),
    "pickles in shards": ((renamed("pytorch_model-00001-of-00002.bin"),), ("pickled .bin weights",)),
    "the index of pickles": (
        (gone("model.safetensors"), files(pytorch_model__bin__index__json="{}")),
        ("pickled .bin weights",),
    ),
    "Meta's format": ((renamed("consolidated.00.pth"),), ("pickled weights of torch", "save_pretrained")),
    "Mistral's format": ((renamed("consolidated.safetensors"),), ("Mistral's own format", "transformers' format")),
    "TensorFlow": ((renamed("tf_model.h5"),), ("weights of TensorFlow",)),
    "Flax": ((renamed("flax_model.msgpack"),), ("weights of Flax",)),
    "shards without an index": (
        (renamed("model-00001-of-00001.safetensors"),),
        ("shards without an index", "model.safetensors.index.json"),
    ),
    "a variant": ((renamed("model.fp16.safetensors"),), ("does not look for", "Expected model.safetensors")),
    "a reward model": (
        (without("lm_head.weight"), beside(score__weight=torch.zeros(1, 64))),
        ("its head scores a text (score.weight)", "ForCausalLM"),
    ),
    "a classifier by name alone": (
        (said(architectures=["LlamaForSequenceClassification"]), without("lm_head.weight")),
        ("is a LlamaForSequenceClassification", "scores a text"),
    ),
    "a configuration of a reward model": (
        (said(architectures=["LlamaForRewardModel"]), gone("model.safetensors")),
        ("is a LlamaForRewardModel", "scores a text"),
    ),
    "one that answers by places": (
        (beside(qa_outputs__weight=torch.zeros(2, 64)),),
        ("scores a text (qa_outputs.weight)",),
    ),
    "a value head": (
        (beside(v_head__summary__weight=torch.zeros(1, 64)),),
        ("value head (v_head.summary.weight)", "by itself"),
    ),
    "a decoder alone": ((without("lm_head.weight"),), ("no lm_head.weight", "decoder alone", "AutoModelForCausalLM")),
    "a tower beside it": (
        (beside(vision_tower__patch__weight=torch.ones(1)),),
        ("vision_tower.patch.weight", "sees or hears", "by itself"),
    ),
    "placeholders of ZeRO-3": (
        (in_place(lambda name, _: {f"{name}.weight": torch.zeros(0)}),),
        ("holds an empty model.layers.0.self_attn.q_proj.weight", "ZeRO-3", "zero_to_fp32.py"),
    ),
}


def re_store(folder: Path, change: Callable) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def other_dtype(folder: Path) -> None:
    """The first tensor in a dtype that no version of this package knows."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"F8_"', 1))


def refused(done: tuple[int, str, str], fragments: tuple[str, ...]) -> None:
    refusals.refused(done, *fragments)
    assert "Download it again" not in done[2]


@pytest.mark.parametrize("case", [*QUANTISED, *OTHERS])
def test_cause_and_way_out_are_named(case, run, dense, tmp_path):
    changes, fragments = (QUANTISED | OTHERS)[case]
    mask = mask_for(Checkpoint(dense()), 0.5, "uniform", 3)
    (tmp_path / "mask.json").write_text(dump_mask(mask))
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    for change in changes:
        change(folder)
    refused(run("plan", "--model", folder, "--keep", 0.5), fragments)
    cut = ("slice", "--model", folder, "--mask", tmp_path / "mask.json", "--any-model", "--out", tmp_path / "cut")
    refused(run(*cut), fragments)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("case", ["GPTQ", "left over, bitsandbytes", "a reward model", "an adapter", "a decoder alone"])
@pytest.mark.parametrize("command", ["prepare", "export"])
def test_other_commands_say_the_same(command, case, run, dense, tmp_path):
    changes, fragments = (QUANTISED | OTHERS)[case]
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    for change in changes:
        change(folder)
    more = ("--format", "onnx", "--out", tmp_path / "out") if command == "export" else ()
    refused(run(command, "--model", folder, *more), fragments)


@pytest.mark.parametrize(
    ("layers", "fragments"),
    [(3, ("lacks the tensor model.layers.2.", "same model")), (1, ("holds model.layers.1.", "same model"))],
)
def test_configuration_of_another_depth_is_refused(layers, fragments, run, dense, tmp_path):
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    said(num_hidden_layers=layers)(folder)
    refused(run("plan", "--model", folder, "--keep", 0.5), fragments)


def test_adapter_with_a_broken_configuration_is_damaged(run, dense, tmp_path):
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    for change in (gone("model.safetensors"), files(adapter_config__json="{")):
        change(folder)
    done = run("plan", "--model", folder, "--keep", 0.5)
    assert done[0] == 2 and done[2].count("\n") == 1 and "adapter_config.json is not valid JSON" in done[2], done


@pytest.mark.parametrize("tied", [False, True])
def test_reward_model_is_refused_however_its_embeddings_are(tied, run, dense, tmp_path):
    folder = stored_as(dense(tied), tmp_path / "model", lambda tensors: tensors)
    for change in (without("lm_head.weight"), beside(score__weight=torch.zeros(1, 64))):
        change(folder)
    refused(run("plan", "--model", folder, "--keep", 0.5), ("scores a text",))


def test_file_in_place_of_a_folder(run, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"GGUF")
    refused(run("plan", "--model", tmp_path / "m.safetensors", "--keep", 0.5), ("is a file", "or a file NAME.gguf"))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_null_says_nothing_and_does_not_go_with_the_cut(key, run, dense, tmp_path):
    """transformers 5 reads a null as none; 4.57 ends with an error that names neither file nor key."""
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    said(**{key: None})(folder)
    (tmp_path / "mask.json").write_text(dump_mask(mask_for(Checkpoint(folder), 0.5, "uniform", 3)))
    cut = ("slice", "--model", folder, "--mask", tmp_path / "mask.json", "--out", tmp_path / "cut", "--any-model")
    assert run(*cut)[0] == 0
    assert key not in json.loads((tmp_path / "cut" / "config.json").read_text())


def test_complete_language_model_is_taken_whatever_class_config_names(run, dense, tmp_path):
    folder = stored_as(dense(), tmp_path / "model", below("module."))
    said(architectures=["LlamaForSequenceClassification"])(folder)
    assert run("plan", "--model", folder, "--keep", 0.5)[0] == 0


def test_both_formats_in_one_folder_are_one_model(dense, tmp_path):
    """What lies beside the weights that are read is neither read nor counted."""
    folder = stored_as(dense(), tmp_path / "model", lambda tensors: tensors)
    before = Checkpoint(folder).expected()
    for name in ("consolidated.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "m.gguf"):
        (folder / name).write_bytes(b"not looked at")
    assert Checkpoint(folder).expected() == before
