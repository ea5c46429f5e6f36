"""Teacher-forced scoring of known answers against what the model really writes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_prepare_tools import TEMPLATE, tiny

from sspcompile.errors import InputError
from sspcompile.evaluate.answers import answer_scores, encode_items, encode_references
from sspcompile.model.decoder import LoadedModel
from sspcompile.model.hooks import head_gates
from sspcompile.model.text import encode, greedy, sentences
from sspcompile.repair.fitting import fit_repairs
from sspcompile.repair.repair import repaired
from sspcompile.slicing.mask import Kept
from training.corpus import DOMAINS, items


@dataclass(frozen=True)
class Asked:
    prompt: str
    answer: str | tuple[str, ...]


@pytest.fixture(scope="module")
def asked():
    """Held-out items of all domains, mixed."""
    drawn = zip(*(items(domain, "heldout", 7, 12) for domain in DOMAINS), strict=True)
    return [item for row in drawn for item in row]


def really_written(loaded: LoadedModel, asked, width: int = 16) -> np.ndarray:
    """Whether decoding with a cache, stopped at the end token, writes the reference token by token."""
    references = encode_references(loaded, [a.prompt for a in asked], [a.answer for a in asked])
    expected = [item.ids[item.prompt :] for item in references]
    prompts = sentences(loaded.tokenizer, [a.prompt for a in asked], 512)
    found = []
    for start in range(0, len(asked), width):
        found += greedy(loaded, prompts[start : start + width], max(map(len, expected)) + 2)
    return np.array([tail == reference for tail, reference in zip(found, expected, strict=True)])


def random_gates(loaded: LoadedModel, keep: float, seed: int) -> torch.Tensor:
    g = loaded.geometry
    gates = torch.rand(g.layers, g.heads, generator=torch.Generator().manual_seed(seed))
    return (gates < keep).float()


@pytest.mark.parametrize(("keep", "seed"), [(1.0, 0), (0.95, 1), (0.9, 2), (0.75, 3), (0.5, 4)])
def test_teacher_forced_exact_match_is_what_greedy_decoding_writes(embedded, asked, keep, seed):
    encoded = encode_items(embedded, asked)
    with head_gates(embedded, random_gates(embedded, keep, seed)):
        scores, written = answer_scores(embedded, encoded), really_written(embedded, asked)
    assert scores.right.tolist() == written.tolist()
    assert keep < 1 or scores.exact_match > 0.5


def test_repaired_model_is_scored_as_it_decodes_and_differs_from_the_plain_one(embedded, asked):
    encoded, gates = encode_items(embedded, asked), random_gates(embedded, 0.8, 5)
    texts = encode(embedded, [item.prompt for item in asked])
    (repair,) = fit_repairs(embedded, [Kept(gates.bool().numpy())], texts, dtype=torch.float32)
    with head_gates(embedded, gates):
        plain = answer_scores(embedded, encoded)
        with repaired(embedded, repair):
            with_repair, written = answer_scores(embedded, encoded), really_written(embedded, asked)
    assert with_repair.right.tolist() == written.tolist()
    assert (with_repair.log_likelihood != plain.log_likelihood).all()


def test_scores_follow_the_items_and_not_the_batches(embedded, asked):
    whole = answer_scores(embedded, encode_items(embedded, asked))
    order = np.random.default_rng(0).permutation(len(asked))
    other = answer_scores(embedded, encode_items(embedded, [asked[i] for i in order], batch_tokens=150))
    assert (other.right == whole.right[order]).all()
    np.testing.assert_allclose(other.log_likelihood, whole.log_likelihood[order], atol=1e-4)


def test_log_likelihood_is_the_mean_over_answer_and_end_token(embedded, asked):
    chosen = asked[:5]
    scores = answer_scores(embedded, encode_items(embedded, chosen))
    for item, found in zip(chosen, scores.log_likelihood, strict=True):
        row = encode_references(embedded, [item.prompt], [item.answer])[0]
        assert row.ids[-1] == embedded.tokenizer.eos_token_id
        assert embedded.tokenizer.decode(row.ids[row.prompt : -1]).strip() == item.answer
        with torch.inference_mode():
            logits = embedded.model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
        expected = [float(logits[place - 1, row.ids[place]]) for place in range(row.prompt, len(row.ids))]
        assert found == pytest.approx(np.mean(expected), abs=1e-5)


def test_one_right_alternative_is_enough_and_the_likeliest_is_scored(embedded, asked):
    wrong = [Asked(item.prompt, "nothing of the kind") for item in asked]
    both = [Asked(item.prompt, ("nothing of the kind", item.answer)) for item in asked]
    right, bad, either = (answer_scores(embedded, encode_items(embedded, chosen)) for chosen in (asked, wrong, both))
    assert not bad.right.any() and (either.right == right.right).all()
    np.testing.assert_allclose(either.log_likelihood, np.maximum(right.log_likelihood, bad.log_likelihood), atol=1e-4)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_reference_stands_behind_the_prompt_that_is_decoded_from(template):
    loaded = tiny(template=template)
    prompt = "tell me about the king ?"
    row = encode_references(loaded, [prompt], ["the queen"])[0]
    assert row.ids[: row.prompt] == sentences(loaded.tokenizer, [prompt], 99)[0].ids
    assert row.ids[-1] == loaded.tokenizer.eos_token_id
    assert loaded.tokenizer.convert_ids_to_tokens(list(row.ids[-2:-1])) == ["queen"]


def test_long_prompt_is_cut_and_its_answer_is_not():
    loaded = tiny()
    row = encode_references(loaded, ["what is the sum of a prime ?"], ["war war war"], max_tokens=4)[0]
    tokens = loaded.tokenizer.convert_ids_to_tokens(list(row.ids))
    assert tokens == ["<s>", "a", "prime", "?", "war", "war", "war", "</s>"] and row.prompt == 4


@pytest.mark.parametrize(
    "asked", [[], [Asked("war ?", "")], [Asked(" ", "war")], [Asked("war ?", "king"), Asked("war ?", ())]]
)
def test_items_without_prompt_or_answer_are_refused(asked):
    with pytest.raises(InputError):
        encode_items(tiny(), asked)
