"""Write what the second environment will load: `python tests/compat/write.py FOLDER`.

For each family and layout a cut checkpoint, with the masked dense model's logits and greedy text beside it, computed
by the transformers of this environment.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from builders import CONFIGS, FAMILY_SETTINGS, Shape, expert_config, family_config, make_checkpoint, save_random
from stored import decoder_as, stacked, stored_as
from test_slicing_exact import channels_for, without, without_attention

from sspcompile.checkpoint import Checkpoint
from sspcompile.model.loading import load
from sspcompile.proof.reload import respond
from sspcompile.repair.repair import masked
from sspcompile.slicing.layouts import choose
from sspcompile.slicing.mask import HeadMask, kept_of
from sspcompile.slicing.plan import make_plan
from sspcompile.slicing.write import write_model

IDS = [(7 * n) % 250 for n in range(24)]
NEW_TOKENS = 12
# Scaled positions that the two versions spell in their own ways.
SCALED = {
    "phi3": {
        "rope_type": "longrope",
        "rope_theta": 5e4,
        "partial_rotary_factor": 1.0,
        "short_factor": [1.0 + n / 8 for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
    },
    "gemma3_text": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
    },
}

# Settings in two places of which the versions would take another one each.
TWICE = {
    "positions": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 3e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_theta": 1e3,
    },
    "head": {"tie_word_embeddings": True},
    "silence": {"rope_parameters": None, "rope_theta": None, "rms_norm_eps": None, "max_position_embeddings": None},
}


def write(folder: Path, family: str, layout: str, rope_scaling: bool) -> None:
    """One case: `cut` is the model, `expected.npz` what it must compute."""
    shape = Shape(
        family=family,
        layers=3,
        hidden=64,
        kv_heads=4,
        group_size=2,
        head_dim=16,
        tied=family == "qwen2",
        bias=family == "qwen3",
        shard_bytes=40_000,
        rope_scaling=rope_scaling,
    )
    record(folder, make_checkpoint(folder / "dense", shape), layout)


def write_family(folder: Path, family: str, layout: str, host: str | None = None) -> None:
    """A family of the table with settings that are not neutral, in its own class or in another."""
    record(folder, save_random(folder / "dense", family_config(family, bias=host is None)), layout, host)


def write_experts(folder: Path, family: str, layout: str) -> None:
    """A cut of experts in every layer."""
    record(folder, save_random(folder / "dense", expert_config(family)), layout)


def write_twice(folder: Path, family: str, what: str, layout: str) -> None:
    """Settings that contradict each other, or say nothing; a null here takes the key out."""
    dense = save_random(folder / "dense", family_config(family))
    file = dense / "config.json"
    config = json.loads(file.read_text()) | TWICE[what]
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    record(folder, dense, layout)


def write_shallower(folder: Path, family: str, layout: str) -> None:
    """A cut without its first and third layer; what a configuration says by number is said of the others."""
    record(folder, save_random(folder / "dense", family_config(family, layers=5)), layout, removed=(0, 2))


def write_silent(folder: Path, family: str, silent: tuple[int, ...]) -> None:
    """A cut in which some layers have no attention: others keep their keys in the first places of a cache."""
    record(folder, save_random(folder / "dense", family_config(family, layers=5)), "per-layer", silent=silent)


def record(
    folder: Path,
    dense: Path,
    layout: str,
    host: str | None = None,
    removed: tuple[int, ...] = (),
    silent: tuple[int, ...] = (),
) -> None:
    checkpoint = Checkpoint(dense)
    g = checkpoint.geometry
    scores = np.random.default_rng(1).random((g.layers, g.heads))
    # Some stock classes refuse head counts that do not divide hidden_size: 4 of 8 heads do, 6 do not.
    divides = layout == "uniform" and g.family.hidden_must_divide and not g.family.hosts
    keep = 0.5 if divides else 0.75
    choice = choose(scores, g.kv_heads, keep, layout)
    channels = channels_for(checkpoint, 0.6, layout, 1)
    mask = HeadMask(
        "",
        g.layers,
        g.heads,
        g.kv_heads,
        kept_of(choice.kept),
        layout,
        keep,
        choice.ratio,
        tuple(map(tuple, scores.tolist())),
        (),
        "random",
        {},
        intermediate=g.width,
        channels=channels,
        experts=g.mlps if channels is not None else 1,
    )
    mask = without(mask, *removed)
    mask = without_attention(mask, *silent) if silent else mask
    plan = make_plan(checkpoint, mask, host=host)
    write_model(checkpoint, plan, folder / "cut", max_shard_bytes=60_000)
    loaded = load(folder / "dense", fingerprint="")
    with masked(loaded, mask.units):
        answer = [logits[0] for logits in respond(loaded.model, [IDS], NEW_TOKENS)]
    tokens = np.array([int(logits[-1].argmax()) for logits in answer])
    np.savez(folder / "expected.npz", ids=np.array(IDS), logits=answer[0].numpy(), tokens=tokens)
    (folder / "case.json").write_text(json.dumps({"custom_code": plan.custom_code, "attention": g.family.attention}))


def main(target: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for family in CONFIGS:
        for layout in ("uniform", "per-layer"):
            for rope_scaling in (False, True):
                name = f"{family}-{layout}-{'llama3' if rope_scaling else 'plain'}"
                write(Path(target) / name, family, layout, rope_scaling)
    for family in FAMILY_SETTINGS:
        for layout in ("uniform", "per-layer"):
            write_family(Path(target) / f"{family}-{layout}-own", family, layout)
    for layout in ("uniform", "per-layer"):  # Mixtral's have experts in every layer anyway
        write_experts(Path(target) / f"qwen3_moe-{layout}-experts", "qwen3_moe", layout)
    for family in ("llama", "qwen2", "gemma2", "gemma3_text", "smollm3", "qwen3_moe"):
        for layout in ("uniform", "per-layer"):
            write_shallower(Path(target) / f"{family}-{layout}-shallower", family, layout)
    for family in FAMILY_SETTINGS:
        for silent in ((0, 2), (1, 4)):
            write_silent(Path(target) / f"{family}-per-layer-silent-{'-'.join(map(str, silent))}", family, silent)
    for family in ("llama", "qwen2", "smollm3", "mixtral"):
        for what in TWICE:
            for layout in ("uniform", "per-layer"):
                write_twice(Path(target) / f"{family}-{layout}-{what}", family, what, layout)
    for family, rope in SCALED.items():
        config = family_config(family, hidden=128)
        config.rope_parameters = rope
        if family == "phi3":
            config.original_max_position_embeddings = 16
        folder = Path(target) / f"{family}-per-layer-scaled"
        record(folder, save_random(folder / "dense", config), "per-layer")
    # Sources that 4.57 itself would load with random weights.
    for family, change in (("qwen3", decoder_as("model.language_model.")), ("mixtral", stacked("mixtral", "mlp"))):
        folder = Path(target) / f"{family}-stored-otherwise"
        usual = save_random(folder / "usual", family_config(family))
        record(folder, stored_as(usual, folder / "dense", change), "uniform")
    for family, host in (("llama", "seed_oss"), ("llama", "granite"), ("qwen2", "seed_oss"), ("qwen2", "granite")):
        write_family(Path(target) / f"{family}-uniform-{host}", family, "uniform", host)


if __name__ == "__main__":
    main(sys.argv[1])
