"""Quantised weights: who says so, and what to do instead. A cut is exact, so it starts from weights in plain floats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.headers import FLOATS, TensorInfo
from sspcompile.errors import CheckpointError, UnsupportedModelError

# The keys of config.json that describe one: transformers', an older one of compressed-tensors, MLX's.
KEYS = ("quantization_config", "compression_config", "quantization")
# Files beside config.json that do, and the method that writes them.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
NAMES = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "gptq or awq": "GPTQ- or AWQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "mlx": "MLX",
}
# Names of tensors that stand beside or in place of a plain weight, and the method that writes them where it is known.
MARKS = (
    (
        re.compile(r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$|\.quant_state\."),
        "bitsandbytes",
    ),
    (re.compile(r"\.g_idx$"), "gptq"),
    (re.compile(r"\.(qweight|qzeros)$"), "gptq or awq"),
    (re.compile(r"_scale_inv$"), "fp8"),
    (re.compile(r"\.weight_(packed|shape|zero_point|g_idx|global_scale)$"), "compressed-tensors"),
    (
        re.compile(
            r"(\.|_)(weight_scale|weight_scale_2|input_scale|output_scale|blocks|scales|biases|qdata|W_q|codes)$"
        ),
        "",
    ),
)
# A key/value cache in fewer bits: scales alone, beside plain weights.
CACHE_MARK = re.compile(r"\.(q|k|v|kv|prob)_(scale|zero_point)$")
ORIGINAL = "Cut the model that it was made from, and quantise the cut"
# What transformers can turn back, each with its library installed: the arguments of from_pretrained, and what follows.
TURNED_BACK = {
    "bitsandbytes": ("", ".dequantize()"),
    "fp8": (", quantization_config=t.FineGrainedFP8Config(dequantize=True)", ""),
    "mxfp4": (", quantization_config=t.Mxfp4Config(dequantize=True)", ""),
    "compressed-tensors": (", quantization_config=t.CompressedTensorsConfig(run_compressed=False)", ""),
}
# Without `save_original_format=False`, transformers quantises again what it saves, or ends with an error.
SAVE = (
    "import transformers as t; t.AutoModelForCausalLM.from_pretrained({source!r}{arguments}){call}"
    ".save_pretrained('plain', save_original_format=False); "
    "t.AutoTokenizer.from_pretrained({source!r}).save_pretrained('plain')"
)


@dataclass(frozen=True)
class Quantisation:
    """What a model folder says of its weights. `where`: the key of config.json, or the file, that says it."""

    where: str
    method: str
    bits: int | None = None

    def __str__(self) -> str:
        name = NAMES.get(self.method, self.method)
        return (f"{name}-quantised" if name else "quantised") + (f" ({self.bits} bits)" if self.bits else "")


def declared(config: Mapping[str, Any]) -> Quantisation | None:
    """What config.json says. A key that is null says nothing."""
    for key in KEYS:
        said = config.get(key)
        if said is None:
            continue
        said = said if isinstance(said, Mapping) else {}
        if said.get("load_in_4bit") or said.get("load_in_8bit"):
            return Quantisation(key, "bitsandbytes", 4 if said.get("load_in_4bit") else 8)
        bits = next((said[name] for name in ("bits", "w_bit", "nbits") if isinstance(said.get(name), int)), None)
        return Quantisation(key, str(said.get("quant_method") or ("mlx" if key == "quantization" else "")), bits)
    return None


def refuse_quantised(config: Mapping[str, Any], table: Mapping[str, TensorInfo], folder: Path) -> None:
    """`table`: what is stored, by its name.

    Raises UnsupportedModelError for quantised weights, and CheckpointError for plain ones that config.json calls
    quantised: transformers would look for the others in every cut of them.
    """
    said = declared(config)
    for pattern, method in MARKS:
        mark = next((name for name in table if pattern.search(name)), None)
        if mark is not None:
            found = said or _beside(folder) or Quantisation("", method)
            raise quantised_error(found, f"it stores {mark}", folder, cut_off=_cut_off(config, table))
    scale = next((name for name in table if CACHE_MARK.search(name)), None)
    if scale is not None:
        raise UnsupportedModelError(
            f"{folder} holds {scale}, a scale of a quantised key/value cache, which a cut would lose.",
            hint="Cut the model without these scales, and calibrate the cut.",
        )
    if said is None:
        return
    odd = next((f"it stores {name} as {info.dtype}" for name, info in table.items() if info.dtype not in FLOATS), None)
    if odd is not None:
        raise quantised_error(said, odd, folder)
    raise CheckpointError(
        f"config.json of {folder} calls the model {said}, in {said.where}, and all of its weights are plain.",
        hint=f"Remove {said.where} from config.json if they were dequantised or merged.",
    )


def refuse_declared(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a configuration, without weights, of a quantised model."""
    said = declared(config)
    if said is not None:
        raise UnsupportedModelError(
            f"config.json of {folder} describes a {said} model, in {said.where}.",
            hint=f"{ORIGINAL}; or remove {said.where} from config.json if the weights are plain.",
        )


def _cut_off(config: Mapping[str, Any], table: Mapping[str, TensorInfo]) -> bool:
    """Whether blocks with a scale end outside of their matrix.

    transformers 5.23 takes the size of a block for that of the matrix by their number, so that it turns these back into
    other numbers.
    """
    said = config.get(KEYS[0])
    block = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        return False
    scaled = [
        table[name.removesuffix("_scale_inv")].shape
        for name in table
        if name.removesuffix("_scale_inv") in table and name.endswith("_scale_inv")
    ]
    return any(size % step for shape in scaled for size, step in zip(shape[-2:], block, strict=False))


def quantised_error(said: Quantisation, shown: str, folder: Path, *, cut_off: bool = False) -> UnsupportedModelError:
    """Quantised weights; `shown` says what shows it. `cut_off`: see `_cut_off`."""
    hint = ORIGINAL
    if said.method in TURNED_BACK and not cut_off:
        arguments, call = TURNED_BACK[said.method]
        command = SAVE.format(source=str(folder), arguments=arguments, call=call)
        return UnsupportedModelError(
            f"{folder} is {said}: {shown}.", hint=f'{hint}; or save plain weights and cut those: python -c "{command}"'
        )
    return UnsupportedModelError(f"{folder} is {said}: {shown}.", hint=f"{hint}.")


def _beside(folder: Path) -> Quantisation | None:
    return next((Quantisation(name, method) for name, method in FILES.items() if (folder / name).is_file()), None)
