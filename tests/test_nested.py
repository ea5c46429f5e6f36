"""Nested models: one order of removal, every smaller model a prefix of the larger, and each the masked dense model."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from builders import family_config, save_random
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sspcompile.bench.drafting import PROPOSED, measure_draft
from sspcompile.checkpoint import Checkpoint, write_manifest
from sspcompile.checkpoint.headers import read_words
from sspcompile.errors import ArtifactError, BudgetError, InputError, ParityError, UnsupportedModelError
from sspcompile.export.onnx.sizes import export_sizes
from sspcompile.families import geometry_of
from sspcompile.intervals import Estimate
from sspcompile.model.cache import cache_of
from sspcompile.model.divergence import Divergence
from sspcompile.model.exact import in_float64
from sspcompile.model.loading import load, load_cut
from sspcompile.model.onnx_session import OnnxModel, graph_name
from sspcompile.model.placement import ON_CPU
from sspcompile.model.stored import read_tensor
from sspcompile.nested.adding import add_member, index_of, write_index
from sspcompile.nested.choose import choices_within
from sspcompile.nested.files import write_whole
from sspcompile.nested.index import Nested, read_nested
from sspcompile.nested.low_rank import SCALES, LowRank, Stored, difference, file_tensors, numbers, refitted
from sspcompile.nested.modeling_sspcompile_nested import _with_difference
from sspcompile.nested.order import Order, Size, demand_nestable, order_of, prefix_of
from sspcompile.nested.proving import check_order
from sspcompile.nested.truncating import Energies, Pool, places_of, repair_of
from sspcompile.progress import silent
from sspcompile.proof.parity import BOUND
from sspcompile.repair.repair import Repair, masked
from sspcompile.request.amounts import shares_of
from sspcompile.request.options import Options
from sspcompile.select.budget import Budget
from sspcompile.select.judging import Reported
from sspcompile.slicing.mask import HeadMask, kept_of
from sspcompile.slicing.measures import of_size
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.sizes import Worth, smallest_size
from sspcompile.slicing.write import write_model

IDS = torch.tensor([[(7 * n) % 250 for n in range(12)]])
# Grouped-query attention and MLPs in plain parts: biases (qwen2), norms of queries and keys (qwen3), a multiplier
# behind o_proj (granite), an MLP without a gate (starcoder2), norms that leave no repair (gemma2).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "granite", "starcoder2", "gemma2")
# As most checkpoints are: bfloat16, the head tied to the embeddings, in several files.
BRAIN = "llama in bf16"
# Of float32, through three layers of random weights: 64 units in the last place of the largest logit.
ROUNDING = 2.0**-18
NOTHING = Reported(Divergence(Estimate(0.0), Estimate(1.0), (), (), (), ()), None)


def budgets(g, shares):
    return [Budget(bounds=(of_size(g, share),)) for share in shares]


@st.composite
def worths(draw):
    g = geometry_of(
        family_config("mistral", layers=draw(st.integers(1, 3)), kv_heads=draw(st.integers(1, 4))).to_dict()
    )
    values = st.floats(0, 1, width=16)  # coarse, so that there are ties
    heads = draw(hnp.arrays(np.float64, (g.layers, g.heads), elements=values))
    channels = draw(st.none() | hnp.arrays(np.float64, (g.layers, g.intermediate), elements=values))
    least = smallest_size(g, channels=channels is not None, groups_only=True)
    shares = sorted(draw(st.lists(st.floats(min(1.0, least + 1e-6), 1), min_size=1, max_size=4)), reverse=True)
    return g, Worth(heads, channels), (1.0, *shares)


@given(worths())
@settings(max_examples=60)
def test_every_smaller_mask_is_a_part_of_the_larger_and_a_prefix_of_the_order(problem):
    g, worth, shares = problem
    order, larger = order_of(worth, g), None
    for share, choice in zip(shares, choices_within(worth, g, budgets(g, shares)), strict=True):
        groups = choice.kept.reshape(g.layers, g.kv_heads, g.group_size)
        assert (groups.all(-1) == groups.any(-1)).all(), "a group is kept or goes as a whole"
        prefix = prefix_of(choice, g)
        for layer in range(g.layers):
            assert set(order.groups[layer][: prefix.groups[layer]]) == set(np.flatnonzero(groups[layer].any(-1)))
            if order.channels is not None:
                kept = set(np.flatnonzero(choice.channels[layer]))
                assert set(order.channels[layer][: prefix.widths[layer]]) == kept
        assert share < 1 or choice.kept.all()
        if larger is not None:
            assert (choice.kept <= larger.kept).all()
            assert choice.channels is None or (choice.channels <= larger.channels).all()
        larger = choice


def mask_of(g, choice, share):
    return HeadMask(
        model="",
        layers=g.layers,
        heads=g.heads,
        kv_heads=g.kv_heads,
        kept=kept_of(choice.kept),
        layout="per-layer",
        keep_requested=1.0,
        keep_achieved=choice.ratio,
        scores=((0.0,) * g.heads,) * g.layers,
        whitelist=(),
        criterion="random",
        scenario={},
        intermediate=g.intermediate,
        channels=choice.kept_channels,
        size_requested=share,
    )


@dataclass(frozen=True)
class Made:
    """An artifact of random worth whose smaller members have random matrices in place of o_proj and down_proj, as far
    as there is room for what they differ by. `repairs`: of the masked model, `stored` as they are written.
    """

    source: Path
    folder: Path
    nested: Nested
    order: Order
    sizes: tuple[Size, ...]
    repairs: tuple[Repair | None, ...]
    stored: tuple[dict[str, Stored], ...]


def random_repair(checkpoint, size, rng, dtype):
    """In some layers, as after a build where others lost nothing; what the first changes is worth the most."""
    g, kept = checkpoint.geometry, size.mask.units
    weights, down = {}, {}
    for layer in range(0, g.layers, 2):
        columns = torch.from_numpy(np.repeat(kept.heads[layer], g.head_dim))
        scale = np.float32(0.1 if layer else 1)
        weights[layer] = torch.from_numpy(rng.normal(0, scale, (g.hidden, len(columns))).astype(np.float32)) * columns
        if kept.channels is not None:
            channels = torch.from_numpy(kept.channels[layer])
            down[layer] = (
                torch.from_numpy(rng.normal(0, scale, (g.hidden, len(channels))).astype(np.float32)) * channels
            )
    return Repair(*({layer: one.to(dtype) for layer, one in found.items()} for found in (weights, {}, down)))


def truncated(checkpoint, order, sizes, repairs, share):
    """What is stored of repairs whose differences get a share of what they would take in full."""
    g = checkpoint.geometry
    whole = sum(weight.nbytes for one in repairs if one for weight in (*one.weights.values(), *one.down.values()))
    inputs = torch.rand(g.heads * g.head_dim, dtype=torch.float64), torch.rand(g.intermediate, dtype=torch.float64)
    energies = Energies(*((row + 0.1,) * g.layers for row in inputs))
    pool, places = Pool(checkpoint, int(share * whole)), [places_of(checkpoint, order, size.prefix) for size in sizes]
    for member, repair in enumerate(repairs):
        if repair is not None:
            pool.add(member, places[member], repair, energies, torch.device("cpu"))
    stored = tuple(pool.stored(member) for member in range(len(sizes)))
    assert sum(words.nbytes for one in stored for words in file_tensors(one).values()) <= share * whole
    for found, of_member in zip(stored, places, strict=True):
        # One matrix of each in full, as one is whose factors would take more: the same numbers.
        place = next((one for one in of_member if isinstance(found.get(one.name), LowRank)), None)
        if place is not None:
            prefix = read_words(checkpoint.tensors[place.name])[:, place.columns]
            found[place.name] = refitted(prefix, found[place.name], place.dtype)
    return stored, tuple(repair_of(one, place, checkpoint) for one, place in zip(stored, places, strict=True))


@pytest.fixture(scope="module", params=(*FAMILIES, BRAIN))
def made(request, tmp_path_factory) -> Made:
    family, brain = request.param.split()[0], request.param == BRAIN
    home = tmp_path_factory.mktemp(family)
    config = family_config(family, layers=3, bias=True, tied=brain)
    dtype = torch.bfloat16 if brain else torch.float32
    source = save_random(home / "dense", config, seed=1, dtype=dtype, max_shard_size="50KB" if brain else "1GB")
    assert (len([*source.glob("*.safetensors")]) > 1) == brain
    checkpoint, rng = Checkpoint(source), np.random.default_rng(0)
    g = checkpoint.geometry
    worth = Worth(rng.random((g.layers, g.heads)), 0.1 * rng.random((g.layers, g.intermediate)))
    shares = (1.0, 0.85, 0.7)
    order, folder = order_of(worth, g), home / "nested"
    sizes = tuple(
        Size(share, mask_of(g, choice, share), prefix_of(choice, g))
        for share, choice in zip(shares, choices_within(worth, g, budgets(g, shares)), strict=True)
    )
    fitted = (None, *(random_repair(checkpoint, size, rng, dtype) for size in sizes[1:]))
    stored, repairs = truncated(checkpoint, order, sizes, fitted, 0.3)
    assert {type(one) for found in stored for one in found.values()} == {LowRank, np.ndarray}, "both kinds are there"
    write_whole(checkpoint, order, folder / "model")
    members = [add_member(folder, checkpoint, size, one, NOTHING) for size, one in zip(sizes, stored, strict=True)]
    nested = index_of(g, order, members)
    write_index(folder, nested)
    (folder / "parity.json").write_text(json.dumps({"probes": IDS.tolist()}))
    write_manifest(folder, {"source_name": str(source), "left_out": []})
    return Made(source, folder, nested, order, sizes, repairs, stored)


def switchable(made, dtype=torch.float64):
    return load_cut(made.folder / "model", dtype=dtype, trust_remote_code=True).model


@torch.inference_mode()
def logits(model):
    with in_float64():
        return model(input_ids=IDS, use_cache=False).logits


def unrounded(made, at):
    """A member's repair in float64, before its matrices are rounded to what they are stored in."""
    checkpoint, size = Checkpoint(made.source), made.sizes[at]
    found = ({}, {})
    for place in places_of(checkpoint, made.order, size.prefix):
        one = made.stored[at].get(place.name)
        if one is not None:
            dense = read_tensor(checkpoint.tensors[place.name]).double().numpy()
            full = np.zeros_like(dense)
            if isinstance(one, LowRank):
                outputs, inputs = difference(one)
                full[:, place.columns] = dense[:, place.columns] + outputs @ inputs
            else:
                full[:, place.columns] = numbers(one, place.dtype)
            found[place.down][place.layer] = torch.from_numpy(full)
    return Repair(found[0], down=found[1])


def same(found, expected):
    return float((found - expected).abs().max()) <= BOUND * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_difference_is_added_in_every_dtype_whatever_enters(dtype):
    """Whole numbers times loud inputs are beyond what float16 holds, and scales below it."""
    draw = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8) for shape in ((3, 64), (8, 3)))
    scales, x = torch.tensor([3e-8, 1e-6, 2e-7]), 2000 * torch.rand(2, 64, generator=draw).to(dtype)
    module = torch.nn.Linear(64, 8)
    module.__dict__["difference"] = (inputs, scales, outputs)
    found = _with_difference(module, (x,), torch.ones(2, 8, dtype=dtype))
    expected = 1 + x.double() @ inputs.double().T * scales.double() @ outputs.double().T
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= 0.02 * (expected - 1).abs().max()


def test_an_index_of_another_version_is_named_and_not_called_damaged(made, tmp_path):
    (tmp_path / "model").mkdir()
    index = json.loads((made.folder / "model" / "nested.json").read_text("utf-8"))
    (tmp_path / "model" / "nested.json").write_text(json.dumps({**index, "schema_version": 1}), "utf-8")
    with pytest.raises(ArtifactError, match="schema version 1; this version reads 2"):
        read_nested(tmp_path)


def test_the_whole_is_the_dense_model_with_its_units_permuted(made):
    checkpoint = Checkpoint(made.source)
    check_order(checkpoint, made.folder / "model", made.order)
    assert read_nested(made.folder) == made.nested
    whole = load_cut(made.folder / "model", dtype=torch.float64).model
    assert type(whole).__name__ == checkpoint.geometry.family.architecture, "the stock class loads it"
    assert same(logits(whole), logits(load(made.source, fingerprint="", dtype=torch.float64).model))
    moved = Order(tuple(row[::-1] for row in made.order.groups), made.order.channels)
    with pytest.raises(ParityError, match="order of removal"):
        check_order(checkpoint, made.folder / "model", moved)


def test_a_member_cut_out_has_the_bytes_of_a_cut_of_the_dense_model(run, made, tmp_path):
    checkpoint = Checkpoint(made.source)
    for size, repair in zip(made.sizes, made.repairs, strict=True):
        plan = make_plan(checkpoint, size.mask)
        refitted = repair.replaced(size.mask.units, checkpoint.geometry) if repair is not None else {}
        write_model(checkpoint, plan, tmp_path / f"own-{size.share}", replaced=refitted)
        out = tmp_path / f"member-{size.share}"
        code, _, err = run("slice", "--from", made.folder, "--size", min(1, size.share + 0.01), "--out", out)
        assert code == 0, err
        for path in (tmp_path / f"own-{size.share}").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        assert json.loads((out / "parity.json").read_text())["refitted"] == sorted(refitted)


def test_a_switch_gives_the_masked_and_repaired_model_in_views_of_the_whole(made, tmp_path):
    model = switchable(made)
    dense = load(made.source, fingerprint="", dtype=torch.float64)
    assert model.sizes == (1.0, 0.85, 0.7) and model.size == 1.0
    whole = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for at in (2, 0, 1, 2, 1, 0):
        size = made.sizes[at]
        assert model.set_size(size.share) == size.share == model.size
        with masked(dense, size.mask.units, unrounded(made, at)):
            expected = logits(dense.model)
        assert same(logits(model), expected)
        full = {name for name, one in made.stored[at].items() if not isinstance(one, LowRank)}
        added = [tensor for _, *_, pair in model._states[at] for tensor in pair or ()]
        assert made.nested.members[at].added_flops_per_token == 2 * sum(one.numel() for one in added if one.dim() == 2)
        for name, parameter in model.named_parameters():
            assert (parameter.data_ptr() == whole[name]) == (name not in full), name
        cache = cache_of(model(input_ids=IDS, use_cache=True))
        held = [cache.layers[layer].keys.shape[1] for layer in range(len(size.prefix.groups))]
        assert held == list(size.prefix.groups)
    assert model.set_size(0.8) == 0.7, "a size in between takes the next smaller member"
    with pytest.raises(ValueError, match=r"no member of 0\.5"):
        model.set_size(0.5)
    with pytest.raises(NotImplementedError, match="slice --from"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_a_switch_computes_what_the_member_cut_out_computes_but_for_rounding(made):
    """Prefix and difference are added before the cut, and after the products at run time; both here in float32."""
    model, dense = switchable(made, torch.float32), load(made.source, fingerprint="", dtype=torch.float32)
    for size, repair in zip(made.sizes, made.repairs, strict=True):
        model.set_size(size.share)
        with torch.inference_mode(), masked(dense, size.mask.units, repair):
            found, expected = (one(input_ids=IDS, use_cache=False).logits for one in (model, dense.model))
        assert float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


@pytest.mark.parametrize("made", [BRAIN], indirect=True)
def test_every_size_writes_the_same_with_any_cache_whatever_size_was_before(made):
    model, settings = switchable(made), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = {}
    with in_float64():
        for share in (1.0, 0.7, 1.0, 0.85, 0.7):
            model.set_size(share)
            kinds = ({}, {"use_cache": False}, {"cache_implementation": "static"})
            found = [model.generate(IDS, pad_token_id=258, **settings, **kind)[0].tolist() for kind in kinds]
            assert found[0] == found[1] == found[2] == texts.setdefault(share, found[0])
    assert len(set(map(tuple, texts.values()))) == 3, "sizes differ, or this proves nothing"


def test_the_smallest_size_is_a_draft_for_the_largest_over_the_same_weights(made):
    model = switchable(made, torch.float32)
    draft = model.at(0.7)
    assert (model.size, draft.size) == (1.0, 0.7)
    whole = {parameter.data_ptr() for parameter in (*model.parameters(), *refitted_of(model))}
    assert {tensor.data_ptr() for tensor in (*draft.parameters(), *refitted_of(draft))} <= whole, "nothing is copied"
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    plain = model.generate(IDS, **settings)
    assert model.generate(IDS, assistant_model=draft, **settings).equal(plain)
    assert model.size == 1.0


@pytest.mark.parametrize("made", ["llama"], indirect=True)
def test_accepted_tokens_of_a_draft_are_those_that_the_whole_writes_itself(made):
    model = switchable(made, torch.float32)
    prompt, device, count = IDS[0].tolist(), torch.device("cpu"), 17
    itself = measure_draft(model, model.at(1.0), prompt, new_tokens=count, repeats=1, device=device)
    assert itself.accepted == itself.proposed and itself.passes == 3 and itself.same_text, "6, 6 and 5 tokens"
    draft = model.at(0.7)
    found = measure_draft(model, draft, prompt, new_tokens=count, repeats=1, device=device)
    settings = {"do_sample": False, "pad_token_id": 258}
    written = model.generate(IDS, max_new_tokens=count, **settings)[0].tolist()
    settled, proposed, accepted = len(prompt), 0, 0
    while settled < len(written):
        number = min(PROPOSED, len(written) - settled - 1)
        ids = torch.tensor([written[:settled]])
        guesses = draft.generate(ids, max_new_tokens=number, **settings)[0].tolist()[settled:] if number else []
        right = next((at for at in range(number) if guesses[at] != written[settled + at]), number)
        proposed, accepted, settled = proposed + number, accepted + right, settled + right + 1
    assert (found.proposed, found.accepted, found.same_text) == (proposed, accepted, True)


@pytest.mark.parametrize("made", [BRAIN], indirect=True)
def test_onnx_has_a_graph_for_every_size_over_one_file_of_weights(made, tmp_path):
    out, probes = tmp_path / "out", [IDS[0].tolist()]
    done = export_sizes(
        made.folder, out, probes=probes, origin={}, card=lambda *_: "", placement=ON_CPU, progress=silent
    )
    assert set(done.agreements) == {1.0, 0.85, 0.7} and all(one.same_text for one in done.agreements.values())
    stored = [info.shape for info in Checkpoint(made.folder / "model").tensors.values()]
    repairs = [(name, words) for found in made.stored for name, words in file_tensors(found).items()]
    stored += [words.shape for name, words in repairs if not name.endswith(SCALES)]  # which go into a factor
    elements = sum(int(np.prod(shape)) for shape in stored)
    assert 4 * elements <= (out / "model.onnx.data").stat().st_size < 4 * elements + 64 * len(stored), "each once"
    model = switchable(made, torch.float32)
    for share in (*model.sizes, 0.8):
        with torch.inference_mode():
            expected = model(input_ids=IDS).logits if model.set_size(share) else None
        found = torch.from_numpy(OnnxModel.open(out, size=share).logits(IDS.numpy()))
        assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        graph = onnx.load(out / graph_name(model.size), load_external_data=False).graph
        places = {one.value for tensor in graph.initializer for one in tensor.external_data if one.key == "location"}
        assert places == {"model.onnx.data", "rotary.bin"}
    with pytest.raises(BudgetError, match=r"--size 0\.5"):
        OnnxModel.open(out, size=0.5)
    (out / "sizes.json").write_text("[]")
    with pytest.raises(ArtifactError, match="damaged"):
        OnnxModel.open(out, size=1)


def refitted_of(model):
    return [tensor for repair in model._repairs for tensor in repair.values()]


def test_casts_reach_every_size(made):
    model = switchable(made, torch.float32)
    model.set_size(0.7)
    with torch.inference_mode():
        before = model(input_ids=IDS).logits
    model.to(torch.float64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64} and model.size == 0.7
    assert float((logits(model) - before).abs().max()) < 1e-3 * float(before.abs().max())
    model.set_size(1.0)
    reference = switchable(made)
    assert same(logits(model), logits(reference))


def test_a_switch_takes_less_than_a_millisecond(made):
    model = switchable(made, torch.float32)
    taken = []
    for number in range(60):
        begun = time.perf_counter()
        model.set_size(made.sizes[number % 3].share)
        taken.append(time.perf_counter() - begun)
    assert statistics.median(taken) < 1e-3


@pytest.mark.parametrize(
    ("family", "options", "error", "told"),
    [
        ("phi3", {}, UnsupportedModelError, "fused or stacked"),
        ("mixtral", {}, UnsupportedModelError, "fused or stacked"),
        ("llama", {"layout": "uniform"}, InputError, "--layout uniform"),
        ("llama", {"host": "mistral"}, InputError, "--host mistral"),
        ("llama", {"repair": "flap-bias"}, InputError, "biases"),
    ],
)
def test_what_cannot_be_nested_is_refused(family, options, error, told):
    with pytest.raises(error, match=told):
        demand_nestable(geometry_of(family_config(family).to_dict()), Options(nested="1,0.8", **options))


def test_shares_fall_from_the_whole_and_are_one_request_however_typed():
    assert shares_of("0.7, 0.9,0.7") == (1.0, 0.9, 0.7)
    assert Options(nested="0.7,1.0,0.90").nested == "1,0.9,0.7"
    assert Options(nested="0.7").max_loss is None
    for wrong in ("", "1", "0.5,2", "a,0.5", "0,0.5", ",".join(f"{n / 20}" for n in range(1, 20))):
        with pytest.raises(ValueError, match="shares above 0"):
            Options(nested=wrong)
    with pytest.raises(ValueError, match="exclude"):
        Options(nested="0.7", size=0.5)
    with pytest.raises(ValueError, match="several sizes"):
        Options(nested="0.7", quantize="int4")
