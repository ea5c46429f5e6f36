"""Layer by layer, the proof comes to what the whole models come to, and finds what they would find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import family_config, save_random
from safetensors.torch import load_file, save_file
from test_slicing_exact import IDS, PROMPTS, mask_for

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import ParityError
from sspcompile.families import FAMILIES
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load
from sspcompile.model.placement import Placement
from sspcompile.model.text import with_continuations
from sspcompile.progress import silent
from sspcompile.proof.claim import Claim, any_refitted
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.prove import goes_layerwise, prove
from sspcompile.proof.reload import respond
from sspcompile.proof.whole import whole_bytes
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import masked
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

PROBES = [IDS, IDS[:5], IDS[3:4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layerwise_proof_has_the_logits_of_the_whole_models(family, dtype, tmp_path):
    source = save_random(tmp_path / "dense", family_config(family, bias=True), seed=1, dtype=dtype)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, "per-layer", 3, width=0.7)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code)
    parity = compare_layerwise(claim, PROBES)
    assert parity.holds and parity.layerwise and parity.prompts == 3
    assert parity.relative < 1e-12
    loaded = load(source, fingerprint="", dtype=torch.float64)
    with in_float64(), masked(loaded, mask.units):
        scale = max(float(next(respond(loaded.model, [ids], 1)).abs().max()) for ids in PROBES)
    if family not in ("granite", "gemma2"):  # logits are compared before they are scaled or capped
        assert parity.logit_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", "cpu", "auto", "mps"])
def test_a_proof_goes_layer_by_layer_by_the_memory_of_where_it_is_computed(asked, tmp_path, monkeypatch):
    save_random(tmp_path, family_config("llama"))
    source = Checkpoint(tmp_path)
    needed = whole_bytes(source)
    for device, machine in ((2, 0.5), (0.5, 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, share=device: (int(share * needed), 10 * needed))
        monkeypatch.setattr("sspcompile.model.placement.free_memory", lambda share=machine: int(share * needed))
        room = device if asked.startswith("cuda") else machine
        assert goes_layerwise(source, Placement(device=asked)) == (room < 1)
        assert goes_layerwise(source, Placement(device=asked, memory=needed // 2))
        assert goes_layerwise(source, Placement(device=asked, memory=9 * needed)) == (room < 1)


def test_a_memory_limit_below_the_whole_models_has_them_compared_layer_by_layer(tmp_path):
    source = save_random(tmp_path / "dense", family_config("llama"), seed=1)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, "uniform", 3)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code)
    assert prove(claim, PROBES, silent, placement=Placement(memory=whole_bytes(claim.checkpoint) - 1)).layerwise
    assert not prove(claim, PROBES, silent, placement=Placement(memory=1 << 30)).layerwise


@pytest.mark.parametrize(("mlp", "width"), [(False, 1.0), (True, 1.0), (False, 0.6)])
def test_layerwise_proof_of_a_repaired_cut(mlp, width, tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen2", layers=2), seed=1)
    checkpoint, loaded = Checkpoint(source), load(source, fingerprint="")
    mask = mask_for(checkpoint, 0.5, "uniform", 3, width)
    texts = with_continuations(loaded, PROMPTS, 2)
    (repair,) = fit_repairs(loaded, [mask.units], texts, dtype=torch.float32, mlp=mlp)
    plan = make_plan(checkpoint, mask)
    replaced = repair.replaced(mask.units, plan.geometry)
    write_model(checkpoint, plan, tmp_path / "cut", replaced=replaced)
    claim = Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code, dict.fromkeys(replaced))
    assert compare_layerwise(claim, PROBES).holds
    # Earlier artifacts do not list what was refitted.
    assert compare_layerwise(
        replace(claim, refitted=any_refitted(checkpoint.geometry, down=mlp or width < 1)), PROBES
    ).holds
    with pytest.raises(ParityError, match="output of layer 0 differs"):
        compare_layerwise(replace(claim, refitted={}), PROBES)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.2.mlp.up_proj.weight", 2), ("model.layers.1.self_attn.k_proj.bias", 1), ("lm_head.weight", None)],
)
def test_layerwise_proof_names_the_layer_that_was_changed(name, layer, tmp_path):
    source = save_random(tmp_path / "dense", family_config("qwen2"), seed=1)
    checkpoint = Checkpoint(source)
    mask = mask_for(checkpoint, 0.6, "per-layer", 3)
    plan = make_plan(checkpoint, mask)
    write_model(checkpoint, plan, tmp_path / "cut")
    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    tensors[name].view(-1)[3] += 0.3
    save_file(tensors, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})

    def prove():
        return compare_layerwise(Claim(checkpoint, mask, tmp_path / "cut", plan.custom_code), PROBES)

    if layer is None:
        assert not prove().holds
    else:
        with pytest.raises(ParityError, match=f"output of layer {layer} differs"):
            prove()
