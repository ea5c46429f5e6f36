"""Tokenizers longer than the embedding table, or without special tokens: refused is only what a text really uses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from builders import VOCAB, Shape, make_checkpoint
from test_cli import refused, run  # noqa: F401 (a fixture)
from test_prepare_tools import WORDS, tiny
from transformers import AutoTokenizer

from sspcompile.api.arguments import Named
from sspcompile.api.run import Sampling, open_model, write
from sspcompile.errors import CheckpointError, InputError
from sspcompile.evaluate.answers import answer_scores, encode_items, encode_references
from sspcompile.evaluate.asking import Limits, ask
from sspcompile.evaluate.questions import Question, single
from sspcompile.export.onnx import PRECISIONS, Blocks, export_onnx
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.loading import load
from sspcompile.model.text import continued, encode, with_continuations
from sspcompile.model.vocabulary import end_id, padding_id, same_tokens

PROMPTS = ["war ?", "tell me about the king and the queen ?", "what is a sum ?"]


def pad_beyond(tokenizer) -> None:
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})


def pad_and_end_beyond(tokenizer) -> None:
    tokenizer.add_special_tokens({"pad_token": "<beyond>", "eos_token": "<last>"})


def no_pad(tokenizer) -> None:
    tokenizer.pad_token = None


def no_pad_no_end(tokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token = None


def unused_beyond(tokenizer) -> None:
    tokenizer.add_tokens(["<image>"], special_tokens=True)


CHANGES = [pad_beyond, pad_and_end_beyond, no_pad, no_pad_no_end, unused_beyond]


def changed(change) -> LoadedModel:
    loaded = tiny(seed=1)
    change(loaded.tokenizer)
    return loaded


@pytest.mark.parametrize("change", CHANGES)
def test_padding_is_a_row_of_the_table_and_changes_nothing(change) -> None:
    plain, loaded = tiny(seed=1), changed(change)
    assert 0 <= padding_id(loaded.tokenizer, loaded.vocab) < loaded.vocab
    for batch in with_continuations(loaded, PROMPTS, 3):
        assert int(batch.input_ids.max()) < loaded.vocab
    assert continued(loaded, PROMPTS, 5) == continued(plain, PROMPTS, 5)
    limits = Limits(64, 5, 3)
    questions = single([Question(prompt, ("a king",)) for prompt in PROMPTS])
    assert ask(loaded, questions, limits, lambda *_: None).texts == ask(plain, questions, limits, lambda *_: None).texts


@pytest.mark.parametrize("change", CHANGES)
def test_references_end_with_an_end_that_the_model_can_write(change) -> None:
    loaded = changed(change)
    (row,) = encode_references(loaded, ["war ?"], ["king"])
    assert max(row.ids) < loaded.vocab and row.ids[-1] == 1  # the end token of the generation configuration
    found = answer_scores(loaded, encode_items(loaded, [Item("war ?", "king")]))
    assert np.isfinite(found.log_likelihood).all()


class Item:
    def __init__(self, prompt: str, answer: str) -> None:
        self.prompt, self.answer = prompt, answer


def test_a_model_without_any_end_token_scores_the_answer_alone() -> None:
    loaded = changed(no_pad_no_end)
    loaded.model.generation_config.eos_token_id = None
    assert end_id(loaded.tokenizer, loaded.ends, loaded.vocab) is None
    (row,) = encode_references(loaded, ["war ?"], ["king"])
    assert loaded.tokenizer.convert_ids_to_tokens(row.ids[-1]) == "king"
    assert all(len(item.ids) == item.prompt + 4 for item in continued(loaded, PROMPTS, 4))


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<image> {{ m.content }}{% endfor %}"])
def test_only_a_token_without_a_row_that_a_text_uses_is_refused_and_it_is_named(template: str | None) -> None:
    loaded = tiny(template=template)
    unused_beyond(loaded.tokenizer)
    asked = ["war ?", "war ?" if template else "tell me about <image> ?"]
    with pytest.raises(InputError, match=rf"holds the token '<image>' \(id {len(WORDS)}\).* {len(WORDS)} tokens") as no:
        encode(loaded, asked)
    assert "\n" not in str(no.value) and "<image>" in str(no.value).split("holds")[0]


def test_a_token_that_was_cut_out_of_a_long_text_is_not_refused() -> None:
    loaded = changed(unused_beyond)
    assert encode(loaded, ["war <image> tell me about the king ?"], max_tokens=4)


def test_tokens_without_rows_do_not_tell_tokenizers_apart() -> None:
    loaded, other = tiny(), changed(unused_beyond)
    assert same_tokens(loaded.tokenizer, other.tokenizer, loaded.vocab)
    assert not same_tokens(loaded.tokenizer, other.tokenizer, loaded.vocab + 1)


# --- Folders ---------------------------------------------------------------------------------------------------------


def export(folder: Path, out: Path, probes: list[list[int]]) -> None:
    export_onnx(
        folder,
        out,
        precision=PRECISIONS["fp32"],
        blocks=Blocks(16),
        probes=probes,
        origin={},
        card=lambda *_: "",
        trust_remote_code=False,
    )


def settings(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def model_with(folder: Path, change) -> Path:
    make_checkpoint(folder, Shape(family="llama", head_dim=16))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_folders_load_run_and_export_alike(change, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", change)
    loaded = load(folder, fingerprint="")
    plain = load(model_with(tmp_path / "plain", lambda _: None), fingerprint="")
    asked = ["What is gold?", "A gas"]
    assert continued(loaded, asked, 4) == continued(plain, asked, 4)
    # Of two lengths, so that one is padded: the check before publishing is itself what must not stumble.
    export(folder, tmp_path / "onnx", [[5, 6, 7], list(range(40, 60))])
    written = [
        write(open_model(found)[1], "What is gold?", new_tokens=6, sampling=Sampling()).tokens
        for found in (Named("model", folder, folder), Named("export", tmp_path / "onnx", tmp_path / "onnx"))
    ]
    assert written[0] == written[1]


def genai_ends(folder: Path) -> tuple[int, list[int]]:
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    ends = model["eos_token_id"]
    return model["pad_token_id"], ends if isinstance(ends, list) else [ends]


@pytest.mark.parametrize(
    ("config", "change", "expected"),
    [
        ({"eos_token_id": 257, "pad_token_id": 258}, no_pad, [257]),
        ({"eos_token_id": [9999, 257], "pad_token_id": None}, no_pad, [257]),
        ({"eos_token_id": None, "pad_token_id": None}, no_pad, [257]),  # the tokenizer's
        ({"eos_token_id": 9999, "pad_token_id": 9999}, no_pad, [257]),
        ({"eos_token_id": None, "pad_token_id": None}, no_pad_no_end, []),
        ({"eos_token_id": -1, "pad_token_id": -1}, no_pad_no_end, []),
    ],
)
def test_an_export_names_ids_that_its_runtime_takes_and_stops_where_transformers_does(
    config: dict, change, expected: list[int], tmp_path: Path
) -> None:
    folder = model_with(tmp_path / "model", change)
    settings(folder, "generation_config.json", **config)
    export(folder, tmp_path / "onnx", [[5], [6, 7]])
    pad, ends = genai_ends(tmp_path / "onnx")
    assert 0 <= pad < VOCAB and ends == expected
    og.Model(str(tmp_path / "onnx"))  # refuses ends outside the table
    _, opened = open_model(Named("export", tmp_path / "onnx", tmp_path / "onnx"))
    assert {i for i in opened.ends if i < VOCAB} == set(ends)


@pytest.mark.parametrize("pad", [VOCAB, 32000])
def test_a_padding_id_that_transformers_cannot_load_is_refused_with_the_cure(pad: int, tmp_path: Path, run) -> None:  # noqa: F811
    folder = make_checkpoint(tmp_path / "model", Shape())
    settings(folder, "config.json", pad_token_id=pad)
    with pytest.raises(CheckpointError, match=f"pad_token_id {pad} lies outside the table of {VOCAB} tokens.*null"):
        load(folder, fingerprint="")
    refused(run("run", folder, "--prompt", "x", "-q"), 2, "Set pad_token_id in config.json")
    settings(folder, "config.json", pad_token_id=None)
    load(folder, fingerprint="")


NAMED = [{"name": "rag", "template": "R {{ messages[0].content }}"}, {"name": "tool", "template": "T"}]


def test_run_takes_the_template_that_is_named_or_none(run, tmp_path: Path) -> None:  # noqa: F811
    folder = make_checkpoint(tmp_path / "model", Shape())
    settings(folder, "tokenizer_config.json", chat_template=NAMED)
    asked = ("run", folder, "--prompt", "Gold?", "--max-new-tokens", "2", "-q")
    refused(run(*asked), 2, "'rag', 'tool'", "--chat-template NAME", "--raw")
    refused(run(*asked, "--chat-template", "chatml"), 2, "Accepted: 'rag', 'tool'")
    refused(run(*asked, "--chat-template", "tool"), 2, "leaves the prompt out", "--raw")
    refused(run(*asked, "--chat-template", "rag", "--raw"), 2, "exclude each other")
    counts = []
    for given in (("--chat-template", "rag"), ("--raw",)):
        done = run(*asked, *given, "--json")
        assert done.code == 0, done.err
        counts.append(done.json["texts"][0]["prompt_tokens"])
    assert counts == [len("R Gold?"), len("Gold?")]


def test_run_refuses_a_token_without_a_row_in_one_line(run, tmp_path: Path) -> None:  # noqa: F811
    folder = model_with(tmp_path / "model", unused_beyond)
    asked = ("run", folder, "--max-new-tokens", "2", "-q")
    assert run(*asked, "--prompt", "Gold?").code == 0
    refused(run(*asked, "--prompt", "What is <image>?"), 2, rf"'<image>' \(id {VOCAB}\)")


def test_a_prompt_without_tokens_is_refused_as_such() -> None:
    loaded = tiny()
    silent = replace(loaded, tokenizer=byteless(loaded.tokenizer))
    with pytest.raises(InputError, match="leaves nothing of the prompt 'xyz'"):
        encode(silent, ["xyz"])


def byteless(tokenizer):
    """The same without BOS and without an unknown token: words that it does not know leave nothing."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["post_processor"], state["model"] = None, {**state["model"], "type": "BPE", "merges": [], "unk_token": None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def test_logits_at_padded_rows_are_finite_whatever_stands_there() -> None:
    loaded = changed(pad_beyond)
    for batch in encode(loaded, PROMPTS):
        scored = loaded.scored_logits(batch.input_ids, batch.attention_mask, batch.score_mask)
        assert torch.isfinite(scored).all()
