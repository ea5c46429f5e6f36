"""The bytes of a GGUF's settings are those of `gguf`'s own writer, whatever the values."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import example, given
from hypothesis import strategies as st

from sspcompile.export.gguf.packing import Writer, packed_array

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
numbers = st.integers(-(2**31), 2**31 - 1)
arrays = st.one_of(
    st.lists(texts, min_size=1),
    st.lists(numbers, min_size=1),
    st.lists(st.booleans(), min_size=1),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1),
    st.lists(st.binary(), min_size=1),
    st.lists(st.lists(numbers, min_size=1), min_size=1),
)


def settings_of(writer: GGUFWriter, path: Path, values: Any) -> bytes:
    writer.add_array("a", values)
    writer.add_string("b", "after it")
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.close()
    return path.read_bytes()


@given(arrays)
@example(["", "a", "Ġ", "\x00", "é" * 300])
@example([True, False])
@example([0, -1, 2**31 - 1, -(2**31)])
def test_arrays_are_packed_as_gguf_packs_them(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("packed") / "file.gguf"
    wanted = settings_of(GGUFWriter(None, "llama"), path, values)
    assert settings_of(Writer(None, "llama"), path, values) == wanted


def test_a_vocabulary_is_packed_at_once():
    assert packed_array(["a", "bc"], GGUFValueType.ARRAY) == struct.pack("<IQQ1sQ2s", 8, 2, 1, b"a", 2, b"bc")
    assert packed_array([1, -2], GGUFValueType.ARRAY) == struct.pack("<IQii", 5, 2, 1, -2)


@pytest.mark.parametrize("values", [[], [True], [1.5], [b"a"], ["a", b"b"], ["a", 1], (1, 2), "text", None])
def test_every_other_value_is_left_to_gguf(values):
    assert packed_array(values, GGUFValueType.ARRAY) is None


def test_a_number_beyond_32_bits_is_refused_as_gguf_refuses_it(tmp_path):
    for kind in (GGUFWriter, Writer):
        with pytest.raises(struct.error):
            settings_of(kind(None, "llama"), tmp_path / "file.gguf", [2**31])
