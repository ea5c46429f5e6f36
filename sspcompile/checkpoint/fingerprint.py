"""The identity of a checkpoint: what a toolkit or a mask belongs to."""

from __future__ import annotations

import hashlib
import json

from sspcompile.checkpoint.source import Checkpoint

# Small checkpoints are hashed whole; of large ones the first block of every tensor, so that 140 GB take a second.
# The manifest of an artifact, not this identity, is what proves every byte.
WHOLE_BELOW_BYTES = 256 << 20
BLOCK_BYTES = 4096
# Whatever decides how text becomes token ids; chat templates do not.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tekken.json",
    "spiece.model",
)


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over configuration, tokenizer, tensor table and tensor contents (see the constants); hex digits.

    The name of the folder, the grouping into shards and the file times do not enter.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name in TOKENIZER_FILES:
        if (checkpoint.path / name).is_file():
            content = (checkpoint.path / name).read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
    if not checkpoint.has_weights:
        return digest.hexdigest()
    whole = sum(info.nbytes for info in checkpoint.tensors.values()) <= WHOLE_BELOW_BYTES
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, info.dtype, list(info.shape)]).encode())
        if whole:
            for chunk in checkpoint.chunks(name):
                digest.update(chunk)
        elif info.nbytes:
            digest.update(next(checkpoint.chunks(name, BLOCK_BYTES)))
    return digest.hexdigest()
