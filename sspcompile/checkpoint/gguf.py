"""A GGUF file in place of a model: what it holds, and whether transformers reads it right. Told by its header alone.

transformers' reader overlooks what it does not know: settings, tensors, the way a tokenizer splits text. What it would
read wrongly is refused here, by name.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sspcompile.errors import CheckpointError, UnsupportedModelError

# What is read: the values of general.architecture with which transformers was tried.
ARCHITECTURES = ("llama", "qwen2", "qwen3")
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Setting of a GGUF, below its architecture -> that of config.json.
SETTINGS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# Settings that change nothing at these values.
NEUTRAL = {"rope.scaling.type": "none", "expert_count": 0, "expert_used_count": 0, "attention.causal": True}
# Byte-level tokenizers of which transformers makes what the model has, by how they say that they split text. Of the
# texts with which llama.cpp tests itself, it reads some otherwise with sentencepiece, and with llama-bpe.
SPLITS = ("qwen2", "gpt-2")
ORIGINAL = "Give the safetensors checkpoint that it was made from."
# Types of whole numbers in blocks become fp16: see docs/checkpoints.md.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROUNDED = "float16"


@dataclass(frozen=True)
class Gguf:
    """A GGUF file that is read. `typed`: what the user called it. `types`: how many tensors have which type, `matrices`
    the same for those of more than one dimension; `elements`: numbers in all tensors.
    """

    path: Path
    typed: str
    fields: Mapping[str, Any]
    types: Mapping[str, int]
    matrices: Mapping[str, int]
    elements: int

    @property
    def architecture(self) -> str:
        return str(self.fields["general.architecture"])

    @property
    def dtype(self) -> str:
        """The dtype in which its matrices lose nothing, or of rounded ones nothing that could be measured."""
        if set(self.matrices) <= set(PLAIN):
            kinds = {PLAIN[name] for name in self.matrices}
            return kinds.pop() if len(kinds) == 1 else "float32"
        return ROUNDED

    @property
    def rounded(self) -> bool:
        """Whether it holds whole numbers in blocks."""
        return not set(self.types) <= set(PLAIN)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the file; hex digits."""
        with self.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedModelError where transformers made another setting of what the file says."""
        rope = config.get("rope_parameters") or {}
        said = {
            "rope_theta": rope.get("rope_theta"),
            "head_dim": config["hidden_size"] // config["num_attention_heads"],
            **{key: config[key] for key in SETTINGS.values() if config.get(key) is not None},
        }
        for name, key in SETTINGS.items():
            value = self.fields.get(f"{self.architecture}.{name}")
            if value is not None and (not isinstance(value, int | float) or abs(said[key] - value) > 1e-6 * value):
                raise self._unread(f"says {name} {value!r:.40}, and transformers reads {key} {said[key]!r:.40}")

    def _unread(self, problem: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.typed} {problem}.", hint=ORIGINAL)

    def check(self, *, own_tokenizer: bool) -> None:
        """Raise UnsupportedModelError for what transformers would overlook, with the first such thing.

        `own_tokenizer`: whether the file's is needed.
        """
        if self.architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.typed} holds a model of the architecture {self.architecture!r:.40}, which is not read.",
                hint=f"Read are {', '.join(ARCHITECTURES)}. {ORIGINAL}",
            )
        for problem in self._problems():
            raise self._unread(problem)
        model, split = (self.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
        if own_tokenizer and (model != "gpt2" or split not in SPLITS):
            raise UnsupportedModelError(
                f"{self.typed} has a tokenizer ({model!s:.40}, {split!s:.40}) that transformers reads otherwise "
                "than the model does.",
                hint="Put the model's own tokenizer.json and tokenizer_config.json beside the file: those are taken.",
            )

    def _problems(self) -> Iterator[str]:
        prefix = f"{self.architecture}."
        for key, value in self.fields.items():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in SETTINGS and (name not in NEUTRAL or value != NEUTRAL[name]):
                yield f"sets {key} to {value!r:.40}, which transformers does not read"


def is_gguf(path: Path) -> bool:
    """Whether a path is called as a GGUF file is."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def read_gguf(path: Path, typed: str) -> Gguf:
    """What the header of a GGUF file says. Raises CheckpointError for a damaged one, or one of several parts."""
    from gguf import GGUFReader

    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{typed} is no GGUF file, whatever it is called.", hint="Download it again.")
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if _told(name)}
    except (ValueError, IndexError, KeyError, OverflowError, TypeError, OSError) as error:
        raise CheckpointError(f"{typed} is damaged or cut off: {error!s:.80}.", hint="Download it again.") from error
    if PART.search(path.name) or fields.get("split.count", 0) > 1:
        raise CheckpointError(
            f"{typed} is one part of several.",
            hint="Join them with llama.cpp: llama-gguf-split --merge FIRST-PART joined.gguf; and give that.",
        )
    if not isinstance(fields.get("general.architecture"), str):
        raise CheckpointError(f"{typed} does not say what model it holds.", hint="Download it again.")
    for tensor in reader.tensors:
        if tensor.name.startswith("rope_f"):
            raise UnsupportedModelError(
                f"{typed} scales its positions by the tensor {tensor.name}, which transformers does not read.",
                hint=ORIGINAL,
            )
    return Gguf(
        path,
        typed,
        fields,
        Counter(tensor.tensor_type.name for tensor in reader.tensors),
        Counter(tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1),
        sum(int(tensor.n_elements) for tensor in reader.tensors),
    )


def _told(name: str) -> bool:
    # Vocabularies are long, and nothing here asks for them.
    return not name.startswith("tokenizer.ggml.") or name.endswith((".model", ".pre"))
