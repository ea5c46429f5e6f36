"""Reference answers of a scenario's prompts: read, scored and judged in the place of the model's own continuations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import Shape, make_checkpoint
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sspcompile.api.evaluate import short_answers
from sspcompile.evaluate.answers import encode_references
from sspcompile.model.chat import Rendering, render, replies
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.divergence import DivergenceAccumulator, average, divergence
from sspcompile.model.loading import load
from sspcompile.model.text import ANSWER_TOKENS, batches_of, continued, sentences
from sspcompile.report.json import read_report
from sspcompile.request.prompts import answered
from sspcompile.select.judging import HeldOut
from sspcompile.slicing.mask import Kept


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    shape = Shape(layers=2, hidden=64, kv_heads=2, group_size=2, head_dim=16)
    return load(make_checkpoint(tmp_path_factory.mktemp("model"), shape), fingerprint="")


PROMPTS = (answered("What is iron?", "A metal."), "What is helium?", answered("Count.", "one two " * 200))


def test_an_answer_stands_behind_its_prompt_and_other_prompts_are_continued(loaded: LoadedModel) -> None:
    asked = sentences(loaded.tokenizer, PROMPTS, 64, loaded.rendering)
    assert asked == sentences(loaded.tokenizer, ("What is iron?", "What is helium?", "Count."), 64, loaded.rendering)
    first, second, third = continued(loaded, PROMPTS, 4, 64)
    assert [one.reference for one in (first, second, third)] == [True, False, True]
    assert second == continued(loaded, PROMPTS[1:2], 4, 64)[0]
    for one, before in zip((first, second, third), asked, strict=True):
        assert one.ids[: one.prompt] == before.ids and one.prompt == before.prompt
    assert loaded.tokenizer.decode(first.ids[first.prompt :]).strip().startswith("A metal.")
    assert len(third.ids) - third.prompt == ANSWER_TOKENS
    assert continued(loaded, PROMPTS, 0, 64) == [first, asked[1], third], "answers are given, not continued"


# How chat models close a reply: with the end token and a line break (ChatML, Gemma), with two ends (Phi-3), at once, or
# not at all.
CLOSINGS = ("<end>\\n", "<end>\\n<eos>", "<end>", "<eos>", "")


def subwords(kind: str, closing: str) -> PreTrainedTokenizerFast:
    """Trained on a few words: by bytes, or with a space in front of every text as SentencePiece has it."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    elif kind == "prepended":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<eos>", "<pad>", "<start>", "<end>"]
    texts = ["user assistant Is the review good or bad ?\n", "positive negative\n"] * 9
    inner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    end = "<eos>" if closing == "<eos>" else "<end>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}CLOSING{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    ).replace("CLOSING", closing.replace("\\n", "\n"))
    return tokenizer


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "prepended", "metaspace"])
@pytest.mark.parametrize("closing", CLOSINGS)
def test_an_answer_is_read_as_decoding_from_the_prompt_writes_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, kind: str, closing: str, raw: bool
) -> None:
    """Each token behind the prompt's own, up to the end: nothing that a template writes behind it, and no space that a
    tokenizer puts in front of a text that stands alone.
    """
    tokenizer = subwords(kind, closing)
    model = replace(loaded, tokenizer=tokenizer, rendering=Rendering(raw=raw))
    declared = tokenizer.convert_tokens_to_ids(["<end>", "<eos>"])
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", declared)
    ends = frozenset(declared)
    prompt = answered("Is the review good or bad ?", "positive")
    (item,) = continued(model, [prompt], 4, 64)
    reply, opened = item.ids[item.prompt :], item.ids[: item.prompt]
    body = [token for token in reply if token not in ends]
    assert "".join(tokenizer.convert_ids_to_tokens(body)).strip("▁Ġ") == "positive"
    assert sum(token in ends for token in reply) == (not raw and closing != "")
    assert not raw or reply[-1] not in ends
    # The whole text, tokenised at once, begins with just this wherever the prompt's tokens begin it.
    (text,) = render(tokenizer, ["Is the review good or bad ?"], model.rendering)
    (behind,) = replies(tokenizer, ["Is the review good or bad ?"], [text], ["positive"], model.rendering)
    whole = tuple(tokenizer(text + behind, add_special_tokens=False)["input_ids"])
    assert whole[: len(item.ids)] == opened + reply
    (asked,) = encode_references(model, ["Is the review good or bad ?"], ["positive"])
    assert asked.ids[: len(item.ids)] == item.ids and asked.prompt == item.prompt, "eval asks what a build reads"
    assert asked.ids[-1] in ends and len(asked.ids) - len(item.ids) == (reply[-1] not in ends)


def test_perplexity_is_that_of_the_answers_alone_against_the_dense_models(loaded: LoadedModel) -> None:
    texts = continued(loaded, PROMPTS, 4, 64)
    held = HeldOut(loaded, texts)
    kept = np.ones((2, 4), dtype=bool)
    whole = held.divergence(Kept(kept))
    assert whole.perplexity is not None and whole.perplexity.value == pytest.approx(1)
    assert len(whole.reference_per_prompt) == 2
    kept[0, :2] = False
    found = held.divergence(Kept(kept))
    # The same by hand: cross-entropy of the answers' tokens, mean within an answer, then over answers.
    logits = {}
    for name, mask in (("dense", np.ones((2, 4), dtype=bool)), ("cut", kept)):
        from sspcompile.model.hooks import head_gates

        losses = []
        for one in (texts[0], texts[2]):
            (batch,) = batches_of(loaded, [one])
            with torch.inference_mode(), head_gates(loaded, torch.from_numpy(mask).float()):
                out = loaded.model(batch.input_ids).logits[0].double().log_softmax(-1)
            places = range(one.prompt - 1, len(one.ids) - 1)
            losses.append(-float(np.mean([float(out[place, one.ids[place + 1]]) for place in places])))
        logits[name] = losses
    gaps = np.subtract(logits["cut"], logits["dense"])
    np.testing.assert_allclose(found.reference_per_prompt, gaps, rtol=1e-4, atol=1e-6)
    assert found.perplexity.value == pytest.approx(float(np.exp(gaps.mean())), rel=1e-4)
    both = average([whole, found])
    np.testing.assert_allclose(both.reference_per_prompt, gaps / 2, rtol=1e-4, atol=1e-6)
    # Where there is no answer it is what the dense model would write: e to the KL.
    assert len(texts) == 3 and found.kl_per_prompt[1] > 0
    of_all = [gaps[0], found.kl_per_prompt[1], gaps[1]]
    np.testing.assert_allclose(found.replies_per_prompt, of_all, rtol=1e-4, atol=1e-6)
    assert found.reply_perplexity.value == pytest.approx(float(np.exp(np.mean(of_all))), rel=1e-4)
    assert whole.reply_perplexity.value == pytest.approx(1)
    np.testing.assert_allclose(both.replies_per_prompt, np.divide(of_all, 2), rtol=1e-4, atol=1e-6)


def test_positions_without_a_reference_count_for_no_perplexity() -> None:
    dense, other = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)).unbind()
    alone = divergence(dense, other, torch.arange(6))
    assert alone.perplexity is None
    assert alone.reply_perplexity.value == pytest.approx(float(np.exp(alone.mean_kl.value)))
    collected = DivergenceAccumulator()
    collected.add(dense, other, torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([-1, -1, -1, 2, 0, -1]))
    losses = [one.double().log_softmax(-1)[[3, 4], [2, 0]].mean() for one in (dense, other)]
    assert collected.result().reference_per_prompt == pytest.approx([float(losses[0] - losses[1])])


def test_only_an_answer_of_few_words_is_asked_for_word_by_word() -> None:
    assert short_answers(answered("Gold?", "Au")) == ("Au",)
    assert short_answers(answered("Why?", "Because it rained all day long yesterday.")) == () == short_answers("Why?")


def test_a_build_reports_the_perplexity_of_its_answers_and_keeps_them_in_its_recipe(run, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} plus {n + 2}?", "answer": f"It is {2 * n + 2}."} for n in range(64)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fast = ("--continuation-tokens", "4", "--max-tokens", "48", "--baselines", "none", "--quiet")
    code, _, err = run("build", "--scenario", "sums.jsonl", "--keep", "0.6", "--out", "cut", *fast)
    assert code == 0, err
    (ours,) = (row for row in read_report(tmp_path / "cut" / "report.json").quality if row.role == "ours")
    assert ours.answer_perplexity is not None and ours.answer_perplexity.value > 0
    assert "The perplexity of the reference answers is" in (tmp_path / "cut" / "report.md").read_text()
    assert "role: assistant" in (tmp_path / "cut" / "recipe.yaml").read_text()
