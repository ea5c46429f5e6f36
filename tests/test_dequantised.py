"""The command that a refusal of FP8 weights names writes the numbers that they stand for, and they can be cut."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import family_config, save_random
from safetensors.torch import load_file, save_file
from test_slicing_exact import mask_for
from torch import Tensor

from sspcompile.checkpoint import Checkpoint
from sspcompile.model.stored import read_tensor
from sspcompile.slicing.mask import dump_mask

# What the sizes of a small model are multiples of.
BLOCK = 8
# The largest number of e4m3.
LARGEST = 448.0


def in_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 numbers, a scale per square block of a size (less at the edges), and what both stand for in bfloat16."""
    rows, columns = weight.shape
    numbers, exact = torch.zeros(rows, columns).to(torch.float8_e4m3fn), torch.zeros(rows, columns)
    scales = torch.zeros(-(-rows // size), -(-columns // size))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size))
            scales[i, j] = weight[place].float().abs().max() / LARGEST
            numbers[place] = (weight[place].float() / scales[i, j]).to(torch.float8_e4m3fn)
            exact[place] = numbers[place].float() * scales[i, j]
    return numbers, scales, exact.to(torch.bfloat16)


def fine_grained(folder: Path, family: str, size: int = BLOCK) -> Mapping[str, Tensor]:
    """A random checkpoint in FP8 with block scales, as DeepSeek and Qwen3 publish them; returns what it stands for."""
    save_random(folder, family_config(family, layers=2, bias=False), dtype=torch.bfloat16)
    stored: dict[str, Tensor] = {}
    meant = dict(load_file(folder / "model.safetensors"))
    for name, tensor in meant.items():
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            stored[name], stored[f"{name}_scale_inv"], meant[name] = in_blocks(tensor, size)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [size, size], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return meant


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_fp8_saved_as_the_hint_says_is_what_it_stands_for(family, run, tmp_path, monkeypatch):
    meant = fine_grained(tmp_path / "fp8", family)
    code, out, err = run("plan", "--model", tmp_path / "fp8", "--keep", 0.5)
    assert (code, out, err.count("\n")) == (2, "", 1) and "FP8-quantised" in err, err
    python, option, command = shlex.split(err[err.index("python -c") :])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    plain = Checkpoint(tmp_path / "plain")
    assert plain.tensors.keys() == meant.keys()
    assert [name for name, info in plain.tensors.items() if not torch.equal(read_tensor(info), meant[name])] == []
    (tmp_path / "mask.json").write_text(dump_mask(mask_for(plain, 0.5, "uniform", 3)))
    assert run("slice", "--model", "plain", "--mask", "mask.json", "--out", "cut", "--any-model")[0] == 0
    assert run("verify", "cut", "--layerwise")[0] == 0


def test_blocks_that_are_cut_off_get_no_command(run, tmp_path):
    """48 rows in blocks of 32 are two blocks, which transformers takes for blocks of 24."""
    fine_grained(tmp_path / "fp8", "llama", 32)
    code, _, err = run("plan", "--model", tmp_path / "fp8", "--keep", 0.5)
    assert code == 2 and "FP8-quantised" in err and "Cut the model that it was made from" in err
    assert "python -c" not in err
