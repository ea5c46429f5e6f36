"""The checkpoint room: what it refuses to read, that what it writes is what was meant, whole or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sspcompile.checkpoint import (
    Checkpoint,
    OutputTensor,
    check_manifest,
    fingerprint,
    locate,
    staged,
    write_checkpoint,
    write_manifest,
)
from sspcompile.checkpoint.headers import MAX_HEADER_BYTES, read_header
from sspcompile.checkpoint.publish import write_atomically
from sspcompile.checkpoint.source import INDEX_NAME, SINGLE_NAME
from sspcompile.checkpoint.writer import pieces_of
from sspcompile.errors import ArtifactError, CheckpointError, InputError, OutputExistsError, UnsupportedModelError
from sspcompile.families import FAMILIES, REFUSED

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model", Shape())


@pytest.fixture
def model(dense, tmp_path) -> Path:
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(dense, tmp_path / "model"))


def raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(encoded) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + encoded + data)
    return path


def test_arrays_become_a_safetensors_file_piece_by_piece_without_a_copy(tmp_path):
    kinds = ["bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32", "int64", "float64"]
    arrays = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in kinds}
    arrays |= {"empty": np.zeros((0, 4), np.float32), "scalar": np.array(2.5)}
    pieces = list(pieces_of(arrays, {"say": "so"}))
    assert sum(isinstance(piece, memoryview) for piece in pieces) == len(arrays) - 1
    write_atomically(tmp_path / "file", pieces)
    with safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata() == {"say": "so"}
        assert sorted(file.keys()) == sorted(arrays)
        for name, array in arrays.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(found, array)
    arrays["float64"][:] = 7  # what is written is the array itself
    assert bytes(next(p for p in pieces if isinstance(p, memoryview) and p.format == "d" and p.ndim)) == b"".join(
        [np.float64(7).tobytes()] * 6
    )
    with pytest.raises(ValueError, match="complex64"):
        list(pieces_of({"a": np.zeros(2, np.complex64)}, {}))


# --- Headers ---------------------------------------------------------------------------------------------------------

HEADERS = {
    "empty file": (b"", "not a safetensors file"),
    "a few bytes": (b"\0" * 7, "not a safetensors file"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    "header beyond the format's limit": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        "not a safetensors file",
    ),
    "header of absurd length": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "zip of a pickle": (b"PK\3\4" + b"\0" * 64, "not a safetensors file|unreadable header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_file_that_is_no_safetensors_is_refused(case, tmp_path):
    content, message = HEADERS[case]
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "w.safetensors")


def entry(begin: object, end: object, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


MALFORMED = {
    "not json": (b"{]", 0),
    "not utf-8": (b'{"\xff": 1}', 0),
    "nested beyond reason": (b"[" * 200_000, 0),
    "a list": ([], 0),
    "entry is a number": ({"a": 4}, 4),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "offsets are text": ({"a": entry("0", "4")}, 4),
    "offsets are fractions": ({"a": entry(0.0, 4.0)}, 4),
    "three offsets": ({"a": {**FOUR, "data_offsets": [0, 4, 8]}}, 4),
    "shape is text": ({"a": entry(0, 4, "x")}, 4),
    "shape is a fraction": ({"a": entry(0, 4, (1.0,))}, 4),
    "negative size": ({"a": entry(0, 4, (-1, -1))}, 4),
    "size beyond 64 bits": ({"a": entry(0, 0, (2**40, 2**40))}, 0),
    "size beyond every word": ({"a": entry(0, 4, (2**70,))}, 4),
    "overlap": ({"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))}, 12),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, 12),
    "gap at the start": ({"a": entry(4, 8)}, 8),
    "same place twice": ({"a": FOUR, "b": FOUR}, 4),
    "backwards": ({"a": entry(4, 0)}, 4),
    "shape larger than its bytes": ({"a": entry(0, 4, (2,))}, 4),
    "data missing": ({"a": entry(0, 8, (2,))}, 4),
    "data left over": ({"a": FOUR}, 5),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_header_that_contradicts_its_data_is_refused(case, tmp_path):
    header, size = MALFORMED[case]
    with pytest.raises(CheckpointError):
        read_header(raw(tmp_path / "w.safetensors", header, bytes(size)))


def test_unknown_dtype_is_refused_with_the_accepted_ones(tmp_path):
    path = raw(tmp_path / "w.safetensors", {"a": entry(0, 4, dtype="F6_E2M3")}, bytes(4))
    with pytest.raises(UnsupportedModelError, match=r"a as F6_E2M3.*BF16"):
        read_header(path)


# --- Indices and folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(model) -> Path:
    """The same tensors in two shards with an index."""
    tensors = load_file(model / SINGLE_NAME)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (model / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (model / SINGLE_NAME).unlink()
    return model


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index["weight_map"])
    (folder / INDEX_NAME).write_text(json.dumps(index))


def refuse(folder: Path, message: str, error: type[InputError] = CheckpointError) -> None:
    with pytest.raises(error, match=message):
        _ = Checkpoint(folder).tensors


def test_missing_shard_is_named(sharded):
    (sharded / "b.safetensors").unlink()
    refuse(sharded, "lacks the shard b.safetensors")


def test_tensor_promised_but_absent_is_named(sharded):
    change_index(sharded, lambda weights: weights.update({"model.extra.weight": "a.safetensors"}))
    refuse(sharded, "a.safetensors lacks model.extra.weight")


@pytest.mark.parametrize("place", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "", "..", None, 7])
def test_index_may_not_point_outside_its_folder(place, sharded):
    change_index(sharded, lambda weights: weights.update({"model.norm.weight": place}))
    refuse(sharded, "points to|lacks the shard")


def test_tensor_in_two_shards_is_refused(sharded):
    tensors = load_file(sharded / "a.safetensors")
    other = load_file(sharded / "b.safetensors")
    name = min(tensors)
    save_file({**other, name: tensors[name]}, sharded / "b.safetensors")
    refuse(sharded, f"{name} stands in two shards")


NO_MAPS = ('{"metadata": {}}', '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", "[" * 100_000)


@pytest.mark.parametrize("text", NO_MAPS, ids=range(len(NO_MAPS)))
def test_index_without_a_map_is_refused(text, sharded):
    (sharded / INDEX_NAME).write_text(text)
    refuse(sharded, "weight_map|JSON")


def test_single_file_wins_over_an_index_as_in_transformers(sharded, dense):
    shutil.copy(dense / SINGLE_NAME, sharded / SINGLE_NAME)
    assert {info.file.name for info in Checkpoint(sharded).tensors.values()} == {SINGLE_NAME}


def test_pickled_weights_are_refused_unopened(model):
    (model / SINGLE_NAME).rename(model / "pytorch_model.bin")
    assert Checkpoint(model).has_weights
    refuse(model, "pickled .bin weights.*never opened.*safetensors")


def test_folder_without_weights_serves_its_configuration_only(model):
    (model / SINGLE_NAME).unlink()
    (model / "training_args.bin").write_bytes(b"pickle")
    checkpoint = Checkpoint(model)
    assert not checkpoint.has_weights and "model.norm.weight" in checkpoint.expected()
    refuse(model, "holds no weights.*model.safetensors")


def test_quantised_or_extended_weights_are_refused(model):
    tensors = load_file(model / SINGLE_NAME)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name + "_scale": torch.ones(1)}, model / SINGLE_NAME)
    refuse(model, "is quantised: it stores .*q_proj.weight_scale", UnsupportedModelError)
    save_file({**tensors, "model.layers.0.gate.weight": torch.ones(1)}, model / SINGLE_NAME)
    refuse(model, "holds model.layers.0.gate.weight.*without parts that were added", UnsupportedModelError)


def test_missing_tensor_and_wrong_shape_are_named(model):
    tensors = load_file(model / SINGLE_NAME)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, model / SINGLE_NAME)
    refuse(model, "lacks the tensor model.norm.weight")
    save_file({**tensors, "model.norm.weight": norm[:-1].clone()}, model / SINGLE_NAME)
    refuse(model, r"model.norm.weight has shape \[31\]; config.json asks for \[32\]")


def test_redundant_head_of_a_tied_model_and_rotary_buffers_are_allowed(tmp_path):
    folder = make_checkpoint(tmp_path / "tied", Shape(tied=True))
    tensors = load_file(folder / SINGLE_NAME)
    spare = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    spare["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file({**tensors, **spare}, folder / SINGLE_NAME)
    assert set(spare) <= set(Checkpoint(folder).tensors)


def test_file_cut_short_after_it_was_opened_is_an_error_not_garbage(model):
    checkpoint = Checkpoint(model)
    last = list(checkpoint.tensors)[-1]
    os.truncate(model / SINGLE_NAME, (model / SINGLE_NAME).stat().st_size - 4)
    with pytest.raises(CheckpointError, match="shorter than its header"):
        checkpoint.read(last)
    with pytest.raises(CheckpointError, match="ends inside"):
        list(checkpoint.chunks(last))


# --- Configurations --------------------------------------------------------------------------------------------------

SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "head_dim")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("key", [*SIZES, "num_key_value_heads"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, [8], 10**12])
def test_absurd_sizes_are_refused_with_the_key(key, value, model):
    change_config(model, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key} = .*whole number"):
        Checkpoint(model)


@pytest.mark.parametrize("key", [key for key in SIZES if key != "head_dim"])
@pytest.mark.parametrize("value", [None, "absent"])
def test_missing_sizes_are_refused_with_the_key(key, value, model):
    change_config(model, **{key: value})
    with pytest.raises(CheckpointError, match=key):
        Checkpoint(model)


def test_heads_that_contradict_each_other_are_refused(model):
    change_config(model, num_key_value_heads=3)
    with pytest.raises(CheckpointError, match=r"4 query heads for 3 key/value heads.*multiple"):
        Checkpoint(model)
    change_config(model, num_key_value_heads=5, num_attention_heads=5, head_dim=None)
    with pytest.raises(CheckpointError, match="no head_dim"):
        Checkpoint(model)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_known_misfits_are_refused_with_the_reason(kind, model):
    change_config(model, model_type=kind)
    with pytest.raises(UnsupportedModelError) as refusal:
        Checkpoint(model)
    assert REFUSED[kind] in str(refusal.value) and all(name in str(refusal.value) for name in FAMILIES)


@pytest.mark.parametrize("kind", ["mamba", "", None, 7])
def test_unknown_types_are_refused_with_what_is_accepted(kind, model):
    change_config(model, model_type=kind)
    with pytest.raises(InputError, match=r"Accepted.*llama, ministral, mistral, mixtral, phi3, qwen2, qwen3"):
        Checkpoint(model)


def test_cut_of_a_cut_is_refused(model):
    change_config(model, per_layer_config=[{"num_attention_heads": 2}])
    with pytest.raises(UnsupportedModelError, match="per-layer cut already"):
        Checkpoint(model)


UNREADABLE = (b"", b"{", b"[]", b"\xff\xfe", b"7", b"[" * 100_000)


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_unreadable_configuration_is_refused(content, model):
    (model / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(model)


def test_model_names_that_are_no_folder_are_refused(dense, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "./a/b", "/a/b", "a/b/c", "a/", "~/nowhere-at-all"):
        with pytest.raises(CheckpointError, match="There is no model folder"):
            locate(name)
    for name in ("bad name/with space", "a/..", "-x/y"):
        with pytest.raises(CheckpointError):
            locate(name)
    assert locate(str(dense)) == dense and locate("embedded") == locate(None)


# --- Fingerprints ----------------------------------------------------------------------------------------------------


def identity(folder: Path) -> str:
    return fingerprint(Checkpoint(folder))


def test_fingerprint_is_independent_of_shards_and_folder(dense, sharded):
    assert identity(dense) == identity(sharded)


def test_fingerprint_changes_with_any_tensor_byte(model):
    before, seen = identity(model), set()
    data = bytearray((model / SINGLE_NAME).read_bytes())
    for info in list(Checkpoint(model).tensors.values())[::5]:
        changed = bytearray(data)
        changed[info.offset + info.nbytes - 1] ^= 1
        (model / SINGLE_NAME).write_bytes(changed)
        seen.add(identity(model))
    assert len(seen) > 3 and before not in seen


def test_fingerprint_of_large_models_reads_the_first_block_of_every_tensor(model, monkeypatch):
    whole = identity(model)
    monkeypatch.setattr(sys.modules["sspcompile.checkpoint.fingerprint"], "WHOLE_BELOW_BYTES", 0)
    sampled = identity(model)
    info = Checkpoint(model).tensors["model.layers.1.mlp.up_proj.weight"]
    data = bytearray((model / SINGLE_NAME).read_bytes())
    data[info.offset] ^= 1
    (model / SINGLE_NAME).write_bytes(data)
    assert len({whole, sampled, identity(model)}) == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"])
def test_fingerprint_changes_with_configuration_and_tokenizer(name, model):
    before = identity(model)
    if name == "config.json":
        change_config(model, rope_theta=1234.0)
    else:
        with (model / name).open("ab") as stream:
            stream.write(b" ")
    assert identity(model) != before


# --- Writing ---------------------------------------------------------------------------------------------------------

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    words = torch.from_numpy(np.random.default_rng(seed).integers(0, high, count, dtype=np.uint8))
    return words.view(dtype).reshape(shape)


def outputs(tensors: dict[str, torch.Tensor]) -> list[OutputTensor]:
    name_of = {dtype: name for name, dtype in DTYPES.items()}

    def content(tensor: torch.Tensor):
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        return lambda: [data[:3], data[3:]]

    return [OutputTensor(n, name_of[t.dtype], tuple(t.shape), content(t)) for n, t in tensors.items()]


@pytest.fixture
def everything() -> dict[str, torch.Tensor]:
    """Every dtype, a scalar, an empty tensor and an odd number of bytes, in an order that is not aligned."""
    tensors = {f"t.{name}": random_bytes(dtype, (3, 5), seed) for seed, (name, dtype) in enumerate(DTYPES.items())}
    return {**tensors, "t.scalar": torch.tensor(2.5), "t.empty": torch.zeros(0, 4), "t.ünïcode": torch.ones(1)}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return not a.numel() or a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def test_every_dtype_is_written_as_the_reference_library_reads_it(everything, tmp_path):
    seen = []
    write_checkpoint(tmp_path, outputs(everything), progress=seen.append)
    read = load_file(tmp_path / SINGLE_NAME)
    assert set(read) == set(everything) and all(same_bits(read[n], t) for n, t in everything.items())
    assert sum(seen) == sum(t.nbytes for t in everything.values())
    with safe_open(tmp_path / SINGLE_NAME, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    for name, info in read_header(tmp_path / SINGLE_NAME).items():
        assert info.offset % info.word_bytes == 0, name
    assert not (tmp_path / INDEX_NAME).exists()


def test_shards_follow_the_limit_and_their_index_leads_to_every_tensor(everything, tmp_path):
    write_checkpoint(tmp_path, outputs(everything), max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in everything.values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    for name, file in index["weight_map"].items():
        assert same_bits(load_file(tmp_path / file)[name], everything[name]), name
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= 100 or len([size for size in sizes if size]) == 1


def test_reading_gives_the_words_that_were_written(model):
    checkpoint, expected = Checkpoint(model), load_file(model / SINGLE_NAME)
    for name, tensor in expected.items():
        words = checkpoint.read(name)
        assert words.tobytes() == tensor.numpy().tobytes() and words.shape == tuple(tensor.shape)
        assert b"".join(checkpoint.chunks(name, 100)) == words.tobytes()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert checkpoint.read_rows(name, 3, 7).tobytes() == expected[name][3:7].numpy().tobytes()


@pytest.mark.parametrize("data", [b"", b"123", b"12345"])
def test_tensor_of_another_size_than_planned_is_never_published(data, tmp_path):
    with pytest.raises(ValueError, match="4 were planned"), staged(tmp_path / "out") as folder:
        write_checkpoint(folder, [OutputTensor("a", "F32", (1,), lambda: [data])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_and_folders_follow_the_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        with staged(tmp_path / "out") as folder:
            write_checkpoint(folder, outputs({"a": torch.ones(2)}))
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "out" / SINGLE_NAME).stat().st_mode & 0o777 == 0o666 & ~umask


# --- Publication -----------------------------------------------------------------------------------------------------


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, KeyboardInterrupt, SystemExit, OSError, MemoryError])
def test_failed_run_leaves_nothing(error, tmp_path):
    with pytest.raises(error), staged(tmp_path / "deep" / "er" / "out") as folder:
        (folder / "half").write_text("half")
        assert not (tmp_path / "deep" / "er" / "out").exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_failed_overwrite_keeps_the_old_folder(tmp_path):
    out = make(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), staged(out, overwrite=True) as folder:
        (folder / "file").write_text("new")
        raise KeyboardInterrupt
    assert (out / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def make(out: Path, text: str, *, overwrite: bool = False) -> Path:
    with staged(out, overwrite=overwrite) as folder:
        (folder / "file").write_text(text)
        write_manifest(folder, {})
    return out


def test_existing_folder_is_refused_before_any_work(tmp_path):
    out = make(tmp_path / "out", "old")
    with pytest.raises(OutputExistsError, match=r"exists and is kept.*--overwrite"), staged(out):
        pytest.fail("work was begun")
    assert (out / "file").read_text() == "old"


def test_overwrite_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    with staged(tmp_path / "out") as folder:
        (folder / "more").write_text("old")
        write_manifest(folder, {})
    out = make(tmp_path / "out", "new", overwrite=True)
    assert (out / "file").read_text() == "new" and not (out / "more").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_destroys_what_the_package_did_not_write(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    make(theirs, "empty folders may be filled", overwrite=True)
    (theirs / "manifest.json").unlink()
    link = tmp_path / "link"
    link.symlink_to(theirs)
    (tmp_path / "plain").write_text("text")
    for out in (theirs, link, tmp_path / "plain", tmp_path, Path("/")):
        with pytest.raises(OutputExistsError, match="another --out"), staged(out, overwrite=True):
            pytest.fail("work was begun")
    assert (theirs / "file").exists() and link.is_symlink()


def test_failing_rename_restores_the_old_folder(tmp_path, monkeypatch):
    out = make(tmp_path / "out", "old")
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.startswith(".partial-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(out, "new", overwrite=True)
    assert (out / "file").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_run_leaves_nothing_that_looks_finished_and_the_next_run_cleans_up(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom sspcompile.checkpoint import staged\n"
        "with staged(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    out = tmp_path / "out"
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == -9
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    make(out, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_runs_do_not_spoil_each_other(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OutputExistsError), staged(out) as slow:
        (slow / "file").write_text("slow")
        make(out, "fast")
        assert (slow / "file").read_text() == "slow", "the run that came later removed the folder of the other"
    assert (out / "file").read_text() == "fast" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_that_begin_at_the_same_moment_leave_each_other_alone(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sspcompile.checkpoint.publish import scratch\n"
        "for number in range(150):\n    with scratch(Path(sys.argv[1]), 'place') as folder:\n"
        "        (folder / 'file').write_text(str(number))\n        time.sleep(0.001)\n"
        "        assert (folder / 'file').read_text() == str(number), 'taken for what a dead run left'\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [("", 0)] * 6
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_goes_whatever_moment_they_were_killed_at(tmp_path):
    for number, held in enumerate([(), ("lock",), ("lock", ".partial-out"), (".partial-out",)]):
        for name in held:
            path = tmp_path / f".partial-out-{number:08}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("") if name == "lock" else path.mkdir()
        (tmp_path / f".partial-out-{number:08}").mkdir(exist_ok=True)
    make(tmp_path / "out", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_with_special_characters_clean_up_only_after_themselves(tmp_path):
    other = tmp_path / ".partial-ab-12345678"
    other.mkdir()
    make(tmp_path / "a[b]", "whole")
    make(tmp_path / "a", "whole")
    assert other.exists()


def test_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file" / "out", Path("/proc/sspcompile/out")):
        with pytest.raises(InputError, match=r"Cannot write beside.*another --out"), staged(out):
            pytest.fail("work was begun")


def test_small_files_are_replaced_as_a_whole(tmp_path):
    write_atomically(tmp_path / "last", "one\n")
    write_atomically(tmp_path / "last", "two\n")
    assert (tmp_path / "last").read_text() == "two\n" and len(list(tmp_path.iterdir())) == 1


def write_many_times(path, text):
    for _ in range(200):
        write_atomically(path, text)


def test_small_files_that_several_processes_replace_are_whole_at_every_moment(tmp_path):
    texts = [letter * length for letter, length in (("a", 10), ("b", 5_000), ("c", 100_000))]
    path = tmp_path / "last"
    write_atomically(path, texts[0])
    with ProcessPoolExecutor(len(texts), mp_context=get_context("spawn")) as pool:
        writing = [pool.submit(write_many_times, path, text) for text in texts]
        while not all(one.done() for one in writing):
            assert path.read_text() in texts
        for one in writing:
            one.result()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "last", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "last", "new")
    assert (tmp_path / "last").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# --- Manifests -------------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "model").mkdir(parents=True)
    write_checkpoint(folder / "model", outputs({"a": torch.ones(2, 3)}))
    (folder / "note.txt").write_text("note")
    write_manifest(folder, {"seed": 0})
    return folder


def test_manifest_describes_every_file_and_has_no_clock(artifact):
    first = (artifact / "manifest.json").read_bytes()
    for path in artifact.rglob("*"):
        os.utime(path, (0, 0))
    manifest = write_manifest(artifact, {"seed": 0})
    assert (artifact / "manifest.json").read_bytes() == first
    assert set(manifest.files) == {"model/model.safetensors", "note.txt"}
    assert manifest.files["model/model.safetensors"]["tensors"] == {"a": {"dtype": "F32", "shape": [2, 3]}}
    assert check_manifest(artifact).origin == {"seed": 0}


@pytest.mark.parametrize("name", ["note.txt", "model/model.safetensors"])
def test_any_flipped_byte_is_found(name, artifact):
    data = (artifact / name).read_bytes()
    for place in range(len(data)):
        (artifact / name).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArtifactError, match=name):
            check_manifest(artifact)


def test_missing_and_cut_files_are_found(artifact):
    (artifact / "note.txt").write_text("")
    with pytest.raises(ArtifactError, match=r"note.txt"):
        check_manifest(artifact)
    (artifact / "note.txt").unlink()
    with pytest.raises(ArtifactError, match=r"lacks note.txt"):
        check_manifest(artifact)


def test_added_files_are_no_concern_of_the_manifest(artifact):
    (artifact / "model" / "README.md").write_text("A note that somebody added.")
    assert "model/README.md" not in check_manifest(artifact).files


def test_manifest_cannot_point_outside_its_folder(artifact):
    value = json.loads((artifact / "manifest.json").read_text())
    value["files"]["../outside.txt"] = value["files"]["note.txt"]
    shutil.copy(artifact / "note.txt", artifact.parent / "outside.txt")
    (artifact / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="lacks"):
        check_manifest(artifact)


def test_absent_damaged_and_foreign_manifests_are_refused(artifact):
    path = artifact / "manifest.json"
    wrong_files, no_origin = '{"schema_version": 1, "files": 3, "origin": {}}', '{"schema_version": 1, "files": {}}'
    for text in ("", "[]", "{}", wrong_files, no_origin, "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ArtifactError, match="damaged"):
            check_manifest(artifact)
    path.write_text('{"schema_version": 2, "files": {}, "origin": {}}')
    with pytest.raises(ArtifactError, match=r"schema version 2.*reads 1"):
        check_manifest(artifact)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"no manifest.json"):
        check_manifest(artifact)
