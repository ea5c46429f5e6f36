"""What is not a whole language model in safetensors: its cause in one sentence, and the way from it to one.

Files of other formats, adapters, models with another head. All of it is told by the names of files and tensors, before
a value is read. `quantised` does the same for quantised weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sspcompile.errors import CheckpointError, InputError, UnsupportedModelError


@dataclass(frozen=True)
class Form:
    """Weights of another format: the files that show it, what they hold, and the way to what is read."""

    patterns: tuple[str, ...]
    what: str
    way: str


RESAVE = "Save it as safetensors first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
GGUF = Form(
    ("*.gguf",),
    "GGUF weights",
    "Give one such file by its path to --model; or, better, the safetensors checkpoint that they were made from.",
)
# The first that fits is named.
FORMS = (
    Form(("pytorch_model*.bin", "pytorch_model*.json"), "pickled .bin weights, which are never opened", RESAVE),
    GGUF,
    Form(
        ("consolidated*.safetensors",),
        "weights in Mistral's own format (consolidated*.safetensors)",
        "Give the same model in transformers' format: config.json with model*.safetensors.",
    ),
    Form(
        ("consolidated*.pth", "model*.pth", "model*.pt", "pytorch_model*.pt"),
        "pickled weights of torch, which are never opened",
        RESAVE,
    ),
    Form(("tf_model*.h5",), "weights of TensorFlow", RESAVE),
    Form(("flax_model*.msgpack",), "weights of Flax", RESAVE),
    Form(("model-*-of-*.safetensors",), "shards without an index", "Download model.safetensors.index.json too."),
    Form(
        ("*.safetensors",),
        "safetensors under names that transformers does not look for",
        "Expected model.safetensors, or model.safetensors.index.json with its shards.",
    ),
)


def other_weights(names: Collection[str]) -> Form | None:
    """The format of the weights among files of these names, in a folder without safetensors that are read."""
    return next((form for form in FORMS if any(fnmatchcase(n, p) for p in form.patterns for n in names)), None)


def files_in(folder: Path) -> list[str]:
    """Names of the files that lie in a folder itself."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def no_weights(folder: Path) -> InputError:
    """Why a folder with a config.json has no weights that are read."""
    names = files_in(folder)
    if is_adapter(names):
        return adapter_error(folder, str(folder))
    if (form := other_weights(names)) is not None:
        return CheckpointError(f"{folder} holds {form.what}.", hint=form.way)
    return CheckpointError(
        f"{folder} holds no weights.",
        hint="Expected model.safetensors, or model.safetensors.index.json with its shards.",
    )


def other_format(path: Path, typed: str) -> InputError | None:
    """What the file or folder that the user called `typed` holds in place of a model folder, where that can be told."""
    if path.is_file():
        return CheckpointError(f"{typed} holds {GGUF.what}.", hint=GGUF.way) if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    names = files_in(path)
    if is_adapter(names):
        return adapter_error(path, typed)
    if (form := other_weights(names)) is not None:
        return CheckpointError(f"{typed} has no config.json; it holds {form.what}.", hint=form.way)
    if snapshots := snapshots_in(path):
        places = " or ".join(f"{typed}/snapshots/{name}" for name in snapshots)
        return CheckpointError(f"{typed} is a hub cache of {len(snapshots)} revisions.", hint=f"Give {places}.")
    return None


def snapshots_in(folder: Path) -> list[str]:
    """The commits of which a repository's folder in a hub cache (`models--OWNER--NAME`) holds a snapshot, sorted."""
    return sorted(found.name for found in folder.glob("snapshots/*") if found.is_dir())


def chosen_snapshot(folder: Path) -> Path | None:
    """The snapshot that a repository's folder in a hub cache stands for: that of `refs/main`, or the only one."""
    names = snapshots_in(folder)
    main = folder / "refs" / "main"
    named = main.read_text("utf-8", errors="replace").strip() if main.is_file() else ""
    chosen = named if named in names else names[0] if len(names) == 1 else None
    return folder / "snapshots" / chosen if chosen is not None else None


# --- Adapters --------------------------------------------------------------------------------------------------------

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin", "adapters.safetensors")
# Kinds that add tokens or layers of their own, so that there is nothing to merge into.
UNMERGEABLE = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
UNMERGED = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer|modules_to_save)\.")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether files of these names are an adapter, in a folder without whole weights."""
    return any(name in ADAPTER_FILES for name in names)


def adapter_error(folder: Path, typed: str) -> UnsupportedModelError:
    """An adapter in place of a model."""
    kind, base = _adapter(folder)
    if kind in UNMERGEABLE:
        return UnsupportedModelError(
            f"{typed} is a {kind} adapter of {base}, which no weights can be merged with.", hint=f"Cut {base} itself."
        )
    return UnsupportedModelError(
        f"{typed} is a {kind} adapter of {base}, not a whole model.",
        hint=f"Merge it: peft.AutoPeftModelForCausalLM.from_pretrained({typed!r}).merge_and_unload()"
        ".save_pretrained('merged'); then copy the tokenizer into that folder.",
    )


def refuse_adapted(folder: Path, stored: Iterable[str]) -> None:
    """Raise for an adapter inside of the weights, whose names are `stored`, or beside them.

    Beside them, transformers with peft loads the base model and the adapter, and without it the weights alone.
    """
    kind, base = _adapter(folder)
    unmerged = next((name for name in stored if UNMERGED.search(name)), None)
    if unmerged is not None:
        raise UnsupportedModelError(
            f"{folder} holds {unmerged}, a part of an adapter that was not merged.",
            hint="Merge it with peft's merge_and_unload() and save again.",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds whole weights and, in {ADAPTER_CONFIG}, a {kind} adapter of {base}.",
            hint=f"Merge it with peft's merge_and_unload(), or remove {ADAPTER_CONFIG} if the weights are merged.",
        )


def _adapter(folder: Path) -> tuple[str, str]:
    """(kind, base model) as its configuration says."""
    try:
        said = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        said = None
    said = said if isinstance(said, dict) else {}
    kind, base = str(said.get("peft_type") or "LORA"), said.get("base_model_name_or_path") or "another model"
    return "LoRA" if kind == "LORA" else kind, str(base)


# --- Models that do something else than writing ----------------------------------------------------------------------

OTHER_TASK = re.compile(r"For(\w*Classification|QuestionAnswering|\w*Reward\w*|\w*Embedding)$|RewardModel$")
# Modules beside the decoder that turn its last states into something else than logits.
SCORING = ("score", "classifier", "classification_head", "qa_outputs", "reward_head", "regression_head", "rm_head")
VALUE = ("v_head", "value_head")
TOWERS = re.compile(
    r"(^|\.)(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|mm_projector|embed_vision|embed_audio)\."
)


def refuse_other_task(config: Mapping[str, Any], stored: Iterable[str], prefix: str, folder: Path) -> None:
    """Raise UnsupportedModelError for a model with another head, or with a tower beside it.

    `stored` are the names of its tensors, and `prefix` stands in front of those of the decoder.
    """
    for name in stored:
        module = name.removeprefix(prefix).partition(".")[0]
        if module in SCORING:
            raise _scores(config, f" ({name})", folder)
        if module in VALUE:
            raise UnsupportedModelError(
                f"{folder} has a value head ({name}) beside its language model, which a cut would lose.",
                hint="Save it by itself first: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...).",
            )
        if TOWERS.search(name):
            raise UnsupportedModelError(
                f"{folder} holds {name}, a part that sees or hears, beside its language model.",
                hint="Save the language model by itself first.",
            )


def refuse_other_architecture(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UnsupportedModelError for a configuration, without weights, of a model that writes no text."""
    if OTHER_TASK.search(_architecture(config)):
        raise _scores(config, "", folder)


def no_head(config: Mapping[str, Any], folder: Path) -> UnsupportedModelError:
    """A decoder without a head, whose embeddings are not tied to one."""
    if OTHER_TASK.search(_architecture(config)):
        return _scores(config, "", folder)
    return UnsupportedModelError(
        f"{folder} has no lm_head.weight, and its config.json does not tie one to the embeddings: it is a decoder "
        "alone, which writes no text.",
        hint="Save it with its head (AutoModelForCausalLM), or set tie_word_embeddings to true if they share a matrix.",
    )


def _scores(config: Mapping[str, Any], where: str, folder: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{folder} is a {_architecture(config) or 'classifier'}: its head scores a text{where} and does not write one, "
        "so that nothing could be measured or proven.",
        hint="Give the language model (...ForCausalLM) that it was trained from.",
    )


def _architecture(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""
