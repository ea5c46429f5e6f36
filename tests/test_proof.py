"""Equal or only rounded: right cuts pass however much their model rounds, wrong ones fail however little."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Shape, family_config, make_checkpoint, save_random
from safetensors.torch import load_file, save_file
from test_slicing_exact import IDS, mask_for
from torch.utils._python_dispatch import TorchDispatchMode

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import ParityError
from sspcompile.families import FAMILIES, layer_prefix
from sspcompile.model.exact import in_float64
from sspcompile.model.hooks import head_gates
from sspcompile.model.loading import load, load_cut
from sspcompile.progress import silent
from sspcompile.proof.claim import Claim
from sspcompile.proof.contents import check_contents
from sspcompile.proof.layerwise import compare_layerwise
from sspcompile.proof.parity import BOUND, Distance
from sspcompile.proof.prove import prove
from sspcompile.proof.reload import respond
from sspcompile.proof.whole import compare_whole
from sspcompile.slicing.mask import HeadMask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

PROBES = [IDS, IDS[:5]]
WAYS = pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layerwise"])
# What fp32 was once given for rounding.
OLD_BOUND = 1e-5


def claimed(source: Path, out: Path, mask: HeadMask, host: str | None = None) -> Claim:
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask, host=host)
    write_model(checkpoint, plan, out)
    return Claim(checkpoint, mask, out, plan.custom_code)


def cut_of(folder: Path, family: str = "llama", layout: str = "per-layer", **options: Any) -> Claim:
    source = save_random(folder / "dense", family_config(family, bias=True), seed=1, **options)
    return claimed(source, folder / "cut", mask_for(Checkpoint(source), 0.6, layout, 3))


def noisy(folder: Path, family: str, layout: str) -> Claim:
    """Sharp attention over wide sums: two right computations of it are 1e-3 of the logits' scale apart in fp32."""
    config = family_config(family, layers=8, kv_heads=8, head_dim=64)
    config.initializer_range = 1.0
    source = save_random(folder / "dense", config, seed=1)
    return claimed(source, folder / "cut", mask_for(Checkpoint(source), 0.6, layout, 3))


def difference_in_fp32(claim: Claim) -> float:
    dense = load(claim.checkpoint.path, fingerprint="")
    cut = load_cut(claim.written, trust_remote_code=claim.custom_code)
    with torch.inference_mode(), head_gates(dense, torch.from_numpy(claim.mask.as_array())):
        expected, found = (one.model(torch.tensor([IDS])).logits for one in (dense, cut))
    return float((expected - found).abs().max() / expected.abs().max())


@WAYS
@pytest.mark.parametrize(("family", "layout"), [("llama", "per-layer"), ("granite", "per-layer"), ("qwen2", "uniform")])
def test_a_right_cut_is_proven_however_much_its_model_rounds(family, layout, layerwise, tmp_path):
    claim = noisy(tmp_path, family, layout)
    assert difference_in_fp32(claim) > OLD_BOUND
    parity = prove(claim, PROBES, silent, layerwise=layerwise)
    assert parity.layerwise == layerwise and parity.dtype == "float64" and parity.bound == BOUND
    assert parity.relative < BOUND / 100


def test_prompts_of_one_length_are_answered_together_as_each_alone(tmp_path):
    loaded = load(save_random(tmp_path / "dense", family_config("qwen3"), seed=1), fingerprint="", dtype=torch.float64)
    prompts = [IDS[:7], IDS[1:8], IDS[2:9]]
    with in_float64():
        together = torch.cat(list(respond(loaded.model, prompts, 6)), 1)
        for ids, answer in zip(prompts, together, strict=True):
            alone, read = torch.cat(list(respond(loaded.model, [ids], 6)), 1)[0], list(ids)
            for _ in range(5):  # without a cache
                with torch.inference_mode():
                    read.append(int(loaded.model(torch.tensor([read]), use_cache=False).logits[0, -1].argmax()))
            with torch.inference_mode():
                whole = loaded.model(torch.tensor([read]), use_cache=False).logits[0]
            assert len(answer) == len(ids) + 5
            assert torch.allclose(answer, alone, atol=1e-12) and torch.allclose(answer, whole, atol=1e-12)


@contextmanager
def tensors_of(claim: Claim) -> Iterator[dict[str, torch.Tensor]]:
    file = claim.written / "model.safetensors"
    tensors = load_file(file)
    yield tensors
    save_file(tensors, file, metadata={"format": "pt"})


@contextmanager
def config_of(claim: Claim) -> Iterator[dict[str, Any]]:
    file = claim.written / "config.json"
    config = json.loads(file.read_text())
    yield config
    file.write_text(json.dumps(config))


def one_weight_is_a_ten_thousandth_larger(claim: Claim) -> None:
    with tensors_of(claim) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[7] *= 1 + 1e-4


def two_heads_are_swapped(claim: Claim) -> None:
    """Their queries alone; swapped everywhere they would compute the same."""
    with tensors_of(claim) as tensors:
        weight = tensors["model.layers.1.self_attn.q_proj.weight"]
        size = claim.geometry.head_dim
        weight[: 2 * size] = torch.cat([weight[size : 2 * size], weight[:size]])


def the_rotary_base_is_another(claim: Claim) -> None:
    with config_of(claim) as config:
        for holder in (config, config["rope_parameters"]):
            holder["rope_theta"] *= 1.0001


def the_norms_have_another_epsilon(claim: Claim) -> None:
    with config_of(claim) as config:
        config["rms_norm_eps"] *= 1.5


FAULTS = [
    one_weight_is_a_ten_thousandth_larger,
    two_heads_are_swapped,
    the_rotary_base_is_another,
    the_norms_have_another_epsilon,
]


@WAYS
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_cut_is_refused_however_little_is_wrong(fault: Callable[[Claim], None], layerwise, tmp_path):
    claim = cut_of(tmp_path)
    fault(claim)
    with pytest.raises(ParityError) as error:
        prove(claim, PROBES, silent, layerwise=layerwise)
    assert "published" not in str(error.value)


@pytest.mark.usefixtures("cold")
@pytest.mark.parametrize("compare", [compare_whole, compare_layerwise])
def test_the_comparison_sees_what_fp32_takes_for_rounding(compare, tmp_path):
    claim = cut_of(tmp_path)
    one_weight_is_a_ten_thousandth_larger(claim)
    assert difference_in_fp32(claim) < OLD_BOUND
    if compare is compare_whole:
        assert not compare(claim, PROBES).holds
    else:
        with pytest.raises(ParityError, match="output of layer 1 differs"):
            compare(claim, PROBES)


@pytest.mark.parametrize("layout", ["uniform", "per-layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2", "mixtral", "qwen3_moe"])
def test_every_flipped_bit_is_found_and_its_tensor_named(family, dtype, layout, tmp_path):
    claim = cut_of(tmp_path, family, layout, dtype=dtype)
    check_contents(claim)
    file = claim.written / "model.safetensors"
    names = sorted(load_file(file))
    for name in names[:: max(1, len(names) // 12)]:
        tensors = load_file(file)
        tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ParityError, match=name):
            check_contents(claim)
        tensors[name].view(torch.uint8).view(-1)[-1] ^= 1
        save_file(tensors, file, metadata={"format": "pt"})
    check_contents(claim)


def test_contents_of_another_class_and_of_a_layer_without_heads(tmp_path):
    source = make_checkpoint(tmp_path / "dense", Shape(family="qwen2", kv_heads=4, shard_bytes=20_000))
    mask = mask_for(Checkpoint(source), 0.5, "uniform", 3)
    hosted = claimed(source, tmp_path / "hosted", mask, host="granite")
    check_contents(hosted)  # its o_proj has biases that Qwen2's has not
    emptied = replace(mask, layout="per-layer", kept=((), *mask.kept[1:]))
    silent_layer = claimed(source, tmp_path / "emptied", emptied)
    check_contents(silent_layer)
    name = layer_prefix(1) + "self_attn.o_proj.bias"
    file = next(path for path in hosted.written.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    assert not tensors[name].any()
    tensors[name].view(-1)[0] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ParityError, match=name):
        check_contents(hosted)
    gone = layer_prefix(0) + "self_attn.o_proj.weight"
    assert not any(gone in load_file(path) for path in silent_layer.written.glob("*.safetensors"))


def test_a_refitted_tensor_is_compared_with_what_was_fitted(tmp_path):
    claim = cut_of(tmp_path)
    name = layer_prefix(1) + "self_attn.o_proj.weight"
    with tensors_of(claim) as tensors:
        tensors[name] += 0.5
        words = tensors[name].view(torch.uint8).numpy().view("uint32").copy()
    with pytest.raises(ParityError, match=name):
        check_contents(claim)
    check_contents(replace(claim, refitted={name: None}))
    check_contents(replace(claim, refitted={name: words}))
    words[0, 0] ^= 1
    with pytest.raises(ParityError, match=name):
        check_contents(replace(claim, refitted={name: words}))


class _Narrow(TorchDispatchMode):
    """Collects what computes fp32 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float32, torch.bfloat16, torch.float16):
            self.seen.add(str(func))
        return result


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_nothing_is_rounded_to_fp32_on_the_way(family, tmp_path):
    source = save_random(tmp_path, family_config(family, bias=True), seed=1, dtype=torch.bfloat16)
    model = load(source, fingerprint="", dtype=torch.float64).model
    with torch.inference_mode(), _Narrow() as plain:
        model(torch.tensor([IDS]))
    with torch.inference_mode(), in_float64(), _Narrow() as narrow:
        model(torch.tensor([IDS]))
    assert plain.seen and not narrow.seen


def test_which_of_two_equal_tokens_comes_first_is_no_text():
    expected = torch.tensor([[1.0, 3.0, 3.0 - 1e-12]], dtype=torch.float64)
    tied, other = expected.clone(), expected.clone()
    tied[0, 2] += 2e-12
    other[0, 0] += 2.1
    for found, same in ((tied, True), (other, False)):
        distance = Distance()
        distance.add(expected, found)
        assert distance.parity(1, layerwise=False).same_text == same
    assert not distance.parity(1, layerwise=False).holds
