"""The one path of text: template, special tokens, padding, continuation."""

import dataclasses

import pytest
import torch
from test_prepare_tools import TEMPLATE, tiny, word_tokenizer

from sspcompile.errors import InputError
from sspcompile.model import text

PROMPTS = ["tell me about acid ?", "what is the sum of a prime and a root ?", "war", "tell me about the king ?"]


def ids_of(loaded, words):
    return tuple(loaded.tokenizer.convert_tokens_to_ids(words.split()))


def test_raw_prompt_gets_one_bos_and_chat_template_does_not_get_a_second():
    raw, chat = tiny(), tiny(template=TEMPLATE)
    assert text.sentences(raw.tokenizer, ["war ?"], 99)[0].ids == ids_of(raw, "<s> war ?")
    assert text.sentences(chat.tokenizer, ["war ?"], 99)[0].ids == ids_of(chat, "<s> <user> war ? <model>")


def test_eos_that_a_tokenizer_appends_does_not_end_the_prompt():
    tokenizer = word_tokenizer(add_eos=True)
    assert tokenizer("war ?")["input_ids"][-1] == tokenizer.eos_token_id
    assert text.sentences(tokenizer, ["war ?"], 99)[0].ids[-1] != tokenizer.eos_token_id


def test_long_prompt_keeps_its_first_token_and_its_end():
    loaded = tiny()
    found = text.sentences(loaded.tokenizer, ["what is the sum of a prime ?"], 4)[0]
    assert found.ids == ids_of(loaded, "<s> a prime ?")


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt_is_refused(prompt):
    with pytest.raises(InputError, match="empty"):
        text.encode(tiny(), ["war", prompt])


def test_batches_hold_every_prompt_once_sorted_bounded_and_right_padded():
    loaded = tiny()
    batches = text.encode(loaded, PROMPTS * 5, batch_tokens=24)
    assert sorted(row for b in batches for row in b.rows) == list(range(20))
    widths = [b.input_ids.shape[1] for b in batches]
    assert widths == sorted(widths)
    for batch in batches:
        assert batch.input_ids.numel() <= 24
        lengths = batch.attention_mask.sum(-1)
        expected = torch.arange(batch.input_ids.shape[1]) < lengths[:, None]
        assert torch.equal(batch.attention_mask.bool(), expected)
        assert torch.equal(batch.score_mask.nonzero()[:, 1], lengths - 1)


def naive_greedy(loaded, ids, new_tokens):
    ids = list(ids)
    for _ in range(new_tokens):
        token = int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == loaded.tokenizer.eos_token_id:
            break
    return tuple(ids)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_continuation_equals_token_by_token_decoding_without_cache_or_padding(family):
    loaded = tiny(family, seed=1)
    plain = text.sentences(loaded.tokenizer, PROMPTS, 99)
    found = text.continued(loaded, PROMPTS, 5)
    assert [x.ids for x in found] == [naive_greedy(loaded, x.ids, 5) for x in plain]


def test_repetition_penalty_of_the_checkpoint_does_not_change_the_continuation():
    loaded = tiny(seed=1)
    expected = text.continued(loaded, PROMPTS, 6)
    loaded.model.generation_config.repetition_penalty = 5.0
    assert text.continued(loaded, PROMPTS, 6) == expected


def test_continuation_stops_at_eos_and_keeps_it():
    loaded = tiny(seed=1)
    second = text.continued(loaded, PROMPTS[:1], 6)[0]
    stop = second.ids[second.prompt + 1]
    loaded.model.generation_config.eos_token_id = [stop, 1]
    found = text.continued(loaded, PROMPTS[:1], 6)[0]
    first_stop = second.ids.index(stop, second.prompt)
    assert found.ids == second.ids[: first_stop + 1]


def test_scored_positions_are_last_prompt_token_and_continuation_without_its_last():
    loaded = tiny(seed=1)
    items = text.continued(loaded, PROMPTS, 4)
    for batch in text.with_continuations(loaded, PROMPTS, 4):
        for row, mask in zip(batch.rows, batch.score_mask, strict=True):
            item = items[row]
            assert mask.nonzero()[:, 0].tolist() == list(range(item.prompt - 1, len(item.ids) - 1))


def test_large_vocabulary_makes_small_batches():
    loaded = tiny()
    wide = dataclasses.replace(loaded, geometry=dataclasses.replace(loaded.geometry, vocab=2**25))
    assert all(len(b.rows) <= 2 for b in text.encode(wide, PROMPTS))
