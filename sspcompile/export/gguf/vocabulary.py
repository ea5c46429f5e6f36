"""The tokenizer of a model folder as llama.cpp reads it: tokens, merges, and the name of the pre-tokenizer.

llama.cpp has its own code for every way of cutting a text into words, and a file names the one that it wants. The name
is found by what tokenizer.json does; a tokenizer that does anything else is refused, because a model that reads other
tokens writes nonsense without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sspcompile.checkpoint.references import TOKENIZER_CONFIG, read_settings
from sspcompile.checkpoint.settings import read_generation, read_json
from sspcompile.checkpoint.tokenizers import named_class_counts
from sspcompile.errors import CheckpointError, UnsupportedModelError
from sspcompile.families import Family
from sspcompile.families.table import AS_IN_FILE

FILE = "tokenizer.json"
DEFAULT_TEMPLATE = "default"
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# Token types of a GGUF (llama_token_type).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
QWEN2 = ENDINGS + WORDS % ""
LLAMA3 = ENDINGS + WORDS % "{1,3}"
BYTES, BYTES_OF_WORDS, DIGITS = "bytes", "bytes of words", "digits"
# What a pre-tokenizer does, step by step -> its name in llama.cpp, and the one where whole words skip the merges.
NAMES: Mapping[tuple[str, ...], tuple[str | None, str | None]] = {
    (BYTES_OF_WORDS,): ("gpt-2", None),
    (DIGITS, BYTES_OF_WORDS): ("smollm", None),
    (QWEN2, BYTES): ("qwen2", None),
    (LLAMA3, BYTES): ("smaug-bpe", "llama-bpe"),
}
# A model that can end a text in several ways has a place for each of these, in this order.
ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Vocabulary:
    """`types` and `tokens` have one entry per row of the embeddings. `special`: bos, eos, ... -> token id.

    `composes`: transformers brings a text into Unicode's form NFC before it is cut, which llama.cpp does not.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    pre: str
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]
    composes: bool = False


def read_vocabulary(folder: Path, rows: int, family: Family) -> Vocabulary:
    """The tokenizer of a model folder whose embedding table has `rows` rows.

    Raises UnsupportedModelError for a tokenizer that llama.cpp would read in another way, CheckpointError for a file
    that is missing or broken.
    """
    if not (folder / FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {FILE}, from which the tokenizer of a GGUF is written.",
            hint="Save the tokenizer with transformers first.",
        )
    said, settings = _pipeline(folder, family), read_settings(folder / TOKENIZER_CONFIG)
    model = said.get("model") or {}
    _demand_model(model)
    tokens, types = _tokens(model, said.get("added_tokens") or [], rows)
    special = _special(folder, settings, {token: number for number, token in enumerate(tokens)}, rows)
    add_bos, add_eos = _around(said.get("post_processor"), special, tokens)
    return Vocabulary(
        tokens,
        types,
        [one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        _name(said.get("pre_tokenizer"), ignore_merges=bool(model.get("ignore_merges"))),
        special,
        add_bos,
        add_eos,
        _templates(folder, settings),
        composes=_composes(said.get("normalizer")),
    )


def _pipeline(folder: Path, family: Family) -> Mapping[str, Any]:
    """tokenizer.json as transformers 5 reads it: some classes keep its tokens and cut texts in their own way."""
    said = read_json(folder / FILE)
    named = family.tokenizer == "" and named_class_counts(folder, read_json(folder / "config.json"))
    if family.tokenizer in ("", AS_IN_FILE) and not named:
        return said
    from sspcompile.model.loading import load_tokenizer

    backend = getattr(load_tokenizer(folder), "backend_tokenizer", None)
    if backend is None:
        raise _refused("its class in transformers is written in Python")
    return json.loads(backend.to_str())


def _refused(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The GGUF export cannot write this tokenizer: {why}.", hint="Use --format onnx or hf, which take it as it is."
    )


def _demand_model(model: Mapping[str, Any]) -> None:
    if model.get("type") != "BPE":
        raise _refused(f"its model is {model.get('type')!r:.40}, and byte-level BPE was tried in llama.cpp")
    if model.get("byte_fallback"):
        raise _refused("it is a SentencePiece one, and byte-level BPE was tried in llama.cpp")
    odd = next((key for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout") if model.get(key)), None)
    if odd is not None:
        raise _refused(f"it has {odd} = {model[odd]!r:.40}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise CheckpointError(f"{FILE} holds no vocab and merges.", hint="Download it again.")
    if not model["merges"]:
        raise _refused("it has no merges, and llama.cpp asks for some")


def _name(step: Mapping[str, Any] | None, *, ignore_merges: bool) -> str:
    steps = tuple(map(_step, _flat(step, "pretokenizers")))
    name = NAMES.get(steps, (None, None))[ignore_merges]
    if name is None:
        how = " and has whole words skip the merges" if ignore_merges else ""
        raise _refused(f"it cuts texts into words by {', then '.join(map(repr, steps)) or 'nothing'}{how}".rstrip("."))
    return name


def _flat(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a pipeline, one after the other."""
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for one in step.get(key, []) for inner in _flat(one, key)]
    return [step]


def _step(step: Mapping[str, Any]) -> str:
    """What one step does, in the words of NAMES; its type for anything else."""
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return BYTES_OF_WORDS if step.get("use_regex", True) else BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return DIGITS
    keeps = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    pattern = step.get("pattern")
    if kind == "Split" and keeps and isinstance(pattern, Mapping) and "Regex" in pattern:
        return str(pattern["Regex"])
    return f"{kind} as it is set there"


def _composes(normalizer: Mapping[str, Any] | None) -> bool:
    kinds = [str(one.get("type")) for one in _flat(normalizer, "normalizers")]
    if other := next((kind for kind in kinds if kind != "NFC"), None):
        raise _refused(f"it changes texts by {other!r:.40} before it cuts them")
    return bool(kinds)


def _tokens(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]], rows: int) -> tuple[list[str], list[int]]:
    """One token and its type for every row; a row without one gets a name that no text is cut into."""
    tokens: list[str | None] = [None] * rows
    types = [UNUSED] * rows
    for token, number in model["vocab"].items():
        if not isinstance(number, int) or number < 0:
            raise CheckpointError(f"{FILE} has {number!r:.40} as the id of {token!r:.40}.", hint="Download it again.")
        if number < rows:
            tokens[number], types[number] = token, NORMAL
    for one in added:
        number, token = one.get("id"), one.get("content")
        if not isinstance(number, int) or not isinstance(token, str) or number < 0:
            raise CheckpointError(f"{FILE} has {one!r:.60} among its added_tokens.", hint="Download it again.")
        if odd := next((key for key in ("single_word", "lstrip", "rstrip") if one.get(key)), None):
            raise _refused(f"its token {token!r:.40} has {odd}, which was not tried in llama.cpp")
        if number < rows:
            tokens[number], types[number] = token, CONTROL if one.get("special") else USER_DEFINED
    named = [f"[UNUSED{number}]" if token is None else token for number, token in enumerate(tokens)]
    if len(set(named)) < rows or "" in named:
        twice = next((token for token in named if token == "" or named.count(token) > 1), "")
        raise _refused(f"its token {twice!r:.40} is empty or stands there twice")
    return named, types


def _special(folder: Path, settings: Mapping[str, Any], ids: Mapping[str, int], rows: int) -> dict[str, int]:
    """Name in a GGUF -> token id, of those that the table has. Ends are those at which transformers stops."""
    found = {}
    for name in ("bos", "eos", "pad", "unk"):
        value = settings.get(f"{name}_token")
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
    generation = read_generation(folder)
    declared = (read_json(folder / "config.json") if generation is None else generation).get("eos_token_id")
    declared = declared if isinstance(declared, list) else [declared]
    ends = [number for number in declared if isinstance(number, int) and 0 <= number < rows]
    if found.get("eos") in ends:  # the tokenizer's own comes first
        ends = [found["eos"], *(number for number in ends if number != found["eos"])]
    return found | dict(zip(ENDS, ends, strict=False))


def _around(
    processor: Mapping[str, Any] | None, special: Mapping[str, int], tokens: Sequence[str]
) -> tuple[bool, bool]:
    """Whether texts get a first token in front and an end token behind them."""
    around: dict[str, list[str]] = {"before": [], "behind": []}
    for one in _flat(processor, "processors"):
        if one.get("type") == "ByteLevel":  # about offsets alone
            continue
        if one.get("type") != "TemplateProcessing":
            raise _refused(f"it ends with {one.get('type')!r:.40}")
        side = "before"
        for piece in one.get("single", []):
            if "Sequence" in piece:
                side = "behind"
            else:
                around[side].append(str(piece["SpecialToken"]["id"]))
    allowed = {"before": "bos", "behind": "eos"}
    for side, name in allowed.items():
        wanted = [tokens[special[name]]] if name in special else []
        if around[side] not in ([], wanted):
            raise _refused(f"it puts {', '.join(around[side])!r:.60} {side} every text")
    return bool(around["before"]), bool(around["behind"])


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> chat template; the one that is meant without a name is "default"."""
    said = settings.get("chat_template")
    found = {DEFAULT_TEMPLATE: said} if isinstance(said, str) else {}
    if isinstance(said, list):
        found = {str(one.get("name")): str(one.get("template")) for one in said if isinstance(one, Mapping)}
    if (folder / TEMPLATE_FILE).is_file():
        found[DEFAULT_TEMPLATE] = (folder / TEMPLATE_FILE).read_text("utf-8")
    for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[path.stem] = path.read_text("utf-8")
    return found
