"""The cut as bytes: any float dtype, any mask, any sharding gives what indexing the whole tensors would give."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sspcompile.checkpoint import Checkpoint, Extent, OutputTensor, write_checkpoint
from sspcompile.checkpoint.headers import FLOATS, WORD_BYTES, WORD_DTYPE, read_header
from sspcompile.checkpoint.tensors import attention_blocks
from sspcompile.checkpoint.transfer import _buffered_copy, copy_extent, hard_link
from sspcompile.errors import ArtifactError, CheckpointError, InputError, UnsupportedModelError
from sspcompile.slicing import cut as cutting
from sspcompile.slicing.mask import HeadMask, dump_mask, parse_mask
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

CONFIG = {
    "model_type": "mistral",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 20,
    "vocab_size": 9,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "sliding_window": None,
}


def raw_checkpoint(folder: Path, config: dict, dtype: str, *, shard_bytes: int | None = None, seed: int = 0) -> Path:
    """Tensors of random bytes, NaN patterns included, written without any framework."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)

    def content(count: int):
        return lambda: [rng.bytes(count)]

    tensors = [
        OutputTensor(name, dtype, shape, content(int(np.prod(shape)) * WORD_BYTES[dtype]))
        for name, (shape, _) in Checkpoint(folder).expected().items()
    ]
    write_checkpoint(folder, tensors, max_shard_bytes=shard_bytes)
    return folder


def mask_of(config: dict, kept: list[tuple[int, ...]], channels: list[tuple[int, ...]] | None = None) -> HeadMask:
    layers, heads, kv = (config[k] for k in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"))
    narrower = None if channels is None else tuple(channels)
    return HeadMask(
        "",
        layers,
        heads,
        kv,
        tuple(kept),
        "per-layer",
        1.0,
        1.0,
        ((0.0,) * heads,) * layers,
        (),
        "none",
        {},
        intermediate=config["intermediate_size"],
        channels=narrower,
    )


def words(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        for name, info in read_header(file).items():
            raw = np.frombuffer(data, WORD_DTYPE[info.word_bytes], int(np.prod(info.shape)), info.offset)
            found[name] = raw.reshape(info.shape)
    return found


@st.composite
def regular_rows(draw) -> tuple[int, ...]:
    """Kept heads of one layer of CONFIG: some groups, the same number of heads in each."""
    groups = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    each = draw(st.integers(1, 2))
    heads = [2 * g + n for g in groups for n in draw(st.permutations(range(2)))[:each]]
    return tuple(sorted(heads))


# Kept channels of one layer of CONFIG.
some_channels = st.sets(st.integers(0, CONFIG["intermediate_size"] - 1), min_size=1).map(lambda s: tuple(sorted(s)))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(FLOATS),
    kept=st.lists(st.one_of(st.just(()), regular_rows()), min_size=2, max_size=2).filter(any),
    channels=st.one_of(st.none(), st.lists(some_channels, min_size=2, max_size=2)),
    source_shard=st.sampled_from([None, 1, 700, 4000]),
    target_shard=st.sampled_from([None, 1, 900]),
    band=st.sampled_from([1, 100, 1 << 22]),
    fused=st.booleans(),
)
def test_cut_is_what_indexing_the_whole_tensors_gives(
    tmp_path_factory, dtype, kept, channels, source_shard, target_shard, band, fused
):
    folder = tmp_path_factory.mktemp("bytes")
    config = CONFIG | ({"model_type": "phi3"} if fused else {})
    source = raw_checkpoint(folder / "dense", config, dtype, shard_bytes=source_shard)
    checkpoint = Checkpoint(source)
    plan = make_plan(checkpoint, mask_of(config, kept, channels))
    whole, cutting.BAND_BYTES = cutting.BAND_BYTES, band
    try:
        write_model(checkpoint, plan, folder / "cut", max_shard_bytes=target_shard)
    finally:
        cutting.BAND_BYTES = whole
    before, after = words(source), words(folder / "cut")
    for layer in plan.silent:
        for name in [n for n in before if n.startswith(f"model.layers.{layer}.") and ("attn" in n or "input" in n)]:
            del before[name]
    assert set(before) == set(after)
    for layer, cut in enumerate(plan.layers):
        for name, (axis, blocks, size) in attention_blocks(plan.geometry, layer, cut.heads, cut.groups).items():
            assert size == 4
            if name in before:
                index = np.concatenate([np.arange(4 * block, 4 * block + 4) for block in blocks])
                expected = np.take(before.pop(name), index, axis=axis)
                assert np.array_equal(after[name], expected), name
        if channels is None:
            continue
        mlp, wide, stays = f"model.layers.{layer}.mlp.", config["intermediate_size"], list(channels[layer])
        rows = {"gate_up_proj": stays + [wide + channel for channel in stays]} if fused else {}
        rows = rows or {"gate_proj": stays, "up_proj": stays}
        for part, index in rows.items():
            assert np.array_equal(after[f"{mlp}{part}.weight"], before.pop(f"{mlp}{part}.weight")[index])
        assert np.array_equal(after[mlp + "down_proj.weight"], before.pop(mlp + "down_proj.weight")[:, stays])
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_of_a_layer_without_heads_the_mlp_and_its_norm_are_all_that_is_written(tmp_path):
    source = raw_checkpoint(tmp_path / "dense", CONFIG, "BF16")
    plan = make_plan(Checkpoint(source), mask_of(CONFIG, [(), (0, 1, 2, 3, 4, 5)]))
    assert plan.counts == ((0, 0), (6, 3)) and plan.silent == (0,) and plan.custom_code
    write_model(Checkpoint(source), plan, tmp_path / "cut")
    left = {name.split(".", 3)[3] for name in words(tmp_path / "cut") if name.startswith("model.layers.0.")}
    assert left == {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")} | {"post_attention_layernorm.weight"}


def test_a_mask_of_the_first_schema_is_read_as_one_that_keeps_every_channel():
    mask = mask_of(CONFIG, [(0, 1), (2, 3, 4, 5)])
    older = json.loads(dump_mask(mask))
    for name in ("intermediate", "channels", "size_requested"):
        del older[name]
    read = parse_mask(json.dumps({**older, "schema_version": 1}))
    assert (read.kept, read.channels, read.size_requested) == (mask.kept, None, None)
    assert parse_mask(dump_mask(mask)) == mask


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([(), (1, 2)], "keeps no channel"),
        ([(2, 1), (1, 2)], "out of range, double or unsorted"),
        ([(1, 1), (1, 2)], "out of range, double or unsorted"),
        ([(0, 99), (1, 2)], "out of range, double or unsorted"),
        ([(0, 1)], "1 rows of channels"),
    ],
)
def test_channels_that_make_no_sense_are_refused(channels, said):
    whole = [tuple(range(6))] * 2
    with pytest.raises(ArtifactError, match=said):
        parse_mask(dump_mask(mask_of(CONFIG, whole, channels)))


def test_channels_of_another_width_or_of_no_experts_are_refused(tmp_path):
    checkpoint = Checkpoint(raw_checkpoint(tmp_path / "dense", CONFIG, "F16"))
    mask = mask_of(CONFIG | {"intermediate_size": 30}, [tuple(range(6))] * 2, [(0, 1), (2, 29)])
    with pytest.raises(ArtifactError, match="MLPs of 30 channels; the model has MLPs of 20"):
        make_plan(checkpoint, mask)
    experts = CONFIG | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    sparse = Checkpoint(raw_checkpoint(tmp_path / "sparse", experts, "F16"))
    with pytest.raises(ArtifactError, match="MLPs of 20 channels; the model has 2 experts of 20 channels"):
        make_plan(sparse, mask_of(experts, [tuple(range(6))] * 2, [(0, 1), (2, 3)]))
    mixed = experts | {"model_type": "qwen3_moe", "moe_intermediate_size": 20, "mlp_only_layers": [1]}
    some = Checkpoint(raw_checkpoint(tmp_path / "mixed", mixed, "F16"))
    with pytest.raises(UnsupportedModelError, match="experts in some layers and one MLP in others"):
        make_plan(some, mask_of(mixed, [tuple(range(6))] * 2, [(0, 1), (2, 3)]))


def test_ragged_mask_is_refused(tmp_path):
    source = raw_checkpoint(tmp_path / "dense", CONFIG, "F16")
    with pytest.raises(ArtifactError, match="different numbers of heads"):
        make_plan(Checkpoint(source), mask_of(CONFIG, [(0, 1, 2), (0,)]))


@pytest.mark.parametrize("link", [False, True])
def test_shards_without_a_change_are_the_source_files(link, tmp_path):
    source = raw_checkpoint(tmp_path / "dense", CONFIG, "F32", shard_bytes=700)
    (tmp_path / "linked").mkdir()
    for file in source.iterdir():  # a hub cache: names are links to blobs
        (tmp_path / "linked" / file.name).symlink_to(file)
    checkpoint = Checkpoint(tmp_path / "linked")
    plan = make_plan(checkpoint, mask_of(CONFIG, [(0, 1), (0, 2)]))
    write_model(checkpoint, plan, tmp_path / "cut", link_unchanged=link)
    for file in source.glob("*.safetensors"):
        name, copy = file.name, tmp_path / "cut" / file.name
        changed = any("self_attn" in tensor for tensor in read_header(file))
        assert changed != (file.read_bytes() == copy.read_bytes()), name
        assert (file.stat().st_ino == copy.stat().st_ino) == (link and not changed)
        assert not copy.is_symlink()


def test_memory_of_a_cut_does_not_grow_with_the_model(tmp_path):
    config = CONFIG | {"hidden_size": 512, "head_dim": 128, "intermediate_size": 600, "vocab_size": 6000}
    peaks = {}
    for layers in (2, 6):
        config = config | {"num_hidden_layers": layers}
        source = raw_checkpoint(tmp_path / f"dense{layers}", config, "F32")
        checkpoint = Checkpoint(source)
        plan = make_plan(checkpoint, mask_of(config, [(0, 1)] * layers))
        tracemalloc.start()
        write_model(checkpoint, plan, tmp_path / f"cut{layers}")
        peaks[layers] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # o_proj is 1.5 MB: one band of it, and what was gathered from that.
    assert peaks[6] < 3e6 and peaks[6] < 1.2 * peaks[2], peaks


def test_copies_by_kernel_and_by_buffer_are_the_same_bytes(tmp_path):
    data = np.random.default_rng(0).bytes(9 << 20)
    (tmp_path / "source").write_bytes(data)
    extent = Extent(tmp_path / "source", 12345, 8 << 20)
    for copy in (copy_extent, lambda s, t, e: _buffered_copy(s, t, e, 0, None)):
        with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb", buffering=0) as target:
            target.write(b"head")
            copy(source.fileno(), target.fileno(), extent)
        assert (tmp_path / "target").read_bytes() == b"head" + data[12345 : 12345 + (8 << 20)]
        with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb", buffering=0) as target:
            beyond = Extent(tmp_path / "source", len(data) - 10, 20)
            with pytest.raises(CheckpointError, match="shorter than its header says"):
                copy(source.fileno(), target.fileno(), beyond)


def test_hard_link_says_whether_the_file_system_has_them(tmp_path):
    (tmp_path / "one").write_text("x")
    assert hard_link(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two").read_text() == "x"
    assert not hard_link(Path("/proc/version"), tmp_path / "three")


HOSTS = {
    "llama as mistral": ("llama", "mistral", {}),
    "llama as seed_oss, with biases": ("llama", "seed_oss", {"attention_bias": True, "mlp_bias": True}),
    "llama as granite": ("llama", "granite", {}),
    "qwen2 as seed_oss": ("qwen2", "seed_oss", {}),
    "qwen2 as granite": ("qwen2", "granite", {}),
    "mistral as seed_oss": ("mistral", "seed_oss", {"sliding_window": None}),
}


@pytest.mark.parametrize("case", HOSTS)
def test_model_in_another_class_equals_its_masked_self(case, tmp_path):
    from builders import family_config, save_random
    from test_slicing_exact import assert_equal_to_masked, mask_for

    family, host, settings = HOSTS[case]
    config = family_config(family)
    for key, value in settings.items():
        setattr(config, key, value)
    source = save_random(tmp_path / "dense", config, seed=4)
    checkpoint = Checkpoint(source)
    for keep in (0.4, 1.0):
        mask = mask_for(checkpoint, keep, "uniform", 5)
        plan = make_plan(checkpoint, mask, host=host)
        assert plan.host.model_type == host and not plan.custom_code and not plan.keeps_everything
        write_model(checkpoint, plan, tmp_path / f"cut{keep}")
        assert_equal_to_masked(source, tmp_path / f"cut{keep}", mask, custom=False)
        held = sum(value.nbytes for value in words(tmp_path / f"cut{keep}").values())
        assert held == plan.sliced.weight_bytes


@pytest.mark.parametrize(
    ("config", "host"),
    [
        (CONFIG | {"sliding_window": 16}, "granite"),
        ({key: value for key, value in CONFIG.items() if key != "sliding_window"}, "seed_oss"),
        (CONFIG | {"model_type": "llama", "attention_bias": True}, "mistral"),
        (
            CONFIG | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
            "seed_oss",
        ),
        (CONFIG | {"model_type": "llama", "sliding_window": 16}, "mistral"),
        (CONFIG | {"model_type": "llama", "layer_types": ["sliding_attention"] * 2}, "mistral"),
        (CONFIG | {"model_type": "llama", "hidden_size": 23, "num_attention_heads": 6}, "llama"),
        (CONFIG, "gpt2"),
        (CONFIG, "llama2"),
    ],
)
def test_host_that_would_not_be_lossless_is_refused_with_the_accepted_ones(config, host, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"--host {host} cannot hold.*Accepted: auto, "):
        make_plan(Checkpoint(tmp_path), mask_of(config, [(0, 1, 2, 3)] * 2), host=host)
    with pytest.raises(InputError, match="is for uniform cuts"):
        make_plan(Checkpoint(tmp_path), mask_of(config, [(0, 1), (0, 1, 2, 3)]), host=host + "x")
