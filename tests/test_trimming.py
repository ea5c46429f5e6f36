"""A model with fewer tokens: its tokenizer, its files, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from builders import family_config, stated
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sspcompile.checkpoint import Checkpoint
from sspcompile.errors import BudgetError, InputError, ParityError, UnsupportedModelError
from sspcompile.slicing.cut import runs
from sspcompile.trimming.proof import check_rows, check_tokenizer
from sspcompile.trimming.tokenizer import Bpe, read_bpe, with_parts
from sspcompile.trimming.tokens import MULTIPLE, TokenOrder, Use, token_order
from sspcompile.trimming.write import named_ids, write_trimmed
from sspcompile.workspace import TRIM

SPECIAL = ["<s>", "</s>", "<pad>"]
TEXTS = [
    "The students counted their apples, and the teacher counted the students.",
    "How many minutes are there in an hour and a half? There are ninety minutes.",
    "def counted(students): return [one for one in students if one.there]",
    "Die Schüler zählten ihre Äpfel; naïve café, 10 €, 3 × 4 = 12 ✓",
    "interesting interest interested interests counting count counter counted",
] * 3


def byte_level(*, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As tokenizers that were SentencePiece's: no words, characters beside bytes, every way to make a token a merge."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    pieces = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    names = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {
    "bytes": byte_level(),
    "whole words first": byte_level(ignore_merges=True),
    "characters, then bytes": byte_fallback(),
}


def bpe_of(tokenizer: Tokenizer, folder: Path) -> Bpe:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return read_bpe(folder)


@pytest.fixture(scope="module")
def bpes(tmp_path_factory) -> dict[str, Bpe]:
    home = tmp_path_factory.mktemp("tokenizers")
    return {name: bpe_of(tokenizer, home / name) for name, tokenizer in TOKENIZERS.items()}


def some(bpe: Bpe, share: float, seed: int) -> list[int]:
    """Needed tokens and a share of the others with their parts, ascending."""
    rng = np.random.default_rng(seed)
    kept = dict.fromkeys(sorted(bpe.needed()))
    for number in sorted(bpe.tokens):
        if rng.random() < share:
            kept.update(dict.fromkeys(with_parts(bpe, number, kept)))
    return sorted(kept)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    text=st.one_of(
        st.text(max_size=40),
        st.lists(st.sampled_from(" ".join(TEXTS).split()), max_size=12).map(" ".join),
        st.sampled_from(TEXTS),
    ),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 3),
)
def test_a_text_has_its_tokens_or_at_least_its_letters(bpes, name, text, share, seed):
    bpe, source = bpes[name], TOKENIZERS[name]
    kept = some(bpe, share, seed)
    places = {number: place for place, number in enumerate(kept)}
    written = Tokenizer.from_str(json.dumps(bpe.written(places)))
    assert written.get_vocab_size() == len(kept)
    old, new = source.encode(text, add_special_tokens=False).ids, written.encode(text, add_special_tokens=False).ids
    if all(number in places for number in old):
        assert new == [places[number] for number in old]
    assert written.decode(new) == source.decode(old)


# A word that is a token needs no merge where whole words come first.
@pytest.mark.parametrize("name", ["bytes", "characters, then bytes"])
def test_without_the_parts_of_a_token_no_text_would_have_it(bpes, name):
    """The closure is needed: a kept token whose parts went is never written again."""
    bpe, source = bpes[name], TOKENIZERS[name]
    text = "The students counted"
    read = source.encode(text, add_special_tokens=False).ids
    number = max(read, key=lambda one: len(bpe.tokens[one]))
    assert bpe.parts(number) - bpe.needed()

    def reads(kept: set[int]) -> bool:
        places = {old: new for new, old in enumerate(sorted(kept))}
        written = Tokenizer.from_str(json.dumps(bpe.written(places)))
        return places[number] in written.encode(text, add_special_tokens=False).ids

    assert not reads({*bpe.needed(), number})
    assert reads({*bpe.needed(), *(part for one in read for part in with_parts(bpe, one, ()))})


def model(
    folder: Path, tokenizer: Tokenizer, *, family: str = "llama", tied: bool = True, rows: int = 0, **more: object
) -> Path:
    """A random model with a tokenizer and `rows` rows without a token."""
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = family_config(family, layers=2, hidden=32, kv_heads=2, head_dim=8, tied=tied)
    config.vocab_size = tokenizer.get_vocab_size() + rows
    config.bos_token_id, config.eos_token_id, config.pad_token_id = (tokenizer.token_to_id(one) for one in SPECIAL)
    for key, value in more.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "tied", "rows", "name"),
    [
        ("llama", True, 0, "bytes"),
        ("qwen2", False, 37, "whole words first"),
        ("gemma2", True, 5, "characters, then bytes"),
        ("mixtral", False, 0, "bytes"),
    ],
)
def test_logits_are_those_of_the_tokens_that_stay(tmp_path, family, tied, rows, name):
    dense = model(tmp_path / "dense", TOKENIZERS[name], family=family, tied=tied, rows=rows)
    checkpoint, bpe = Checkpoint(dense), read_bpe(dense)
    kept = sorted({*some(bpe, 0.4, seed=1), *bpe.unnamed(AutoTokenizer.from_pretrained(dense).get_vocab())})
    (out := tmp_path / "out").mkdir()
    write_trimmed(checkpoint, bpe, kept, out)
    assert check_rows(checkpoint, Checkpoint(out), kept) == len(checkpoint.tensors)
    assert check_tokenizer(AutoTokenizer.from_pretrained(dense), out, kept, TEXTS)[1] == len(TEXTS)
    one, two = (AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, out))
    assert two.config.vocab_size == len(kept) == two.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, len(kept), (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = one(torch.tensor(kept)[ids]).logits[..., kept]
        torch.testing.assert_close(two(ids).logits, wanted)


def test_every_file_names_the_new_ids(tmp_path):
    tokenizer = byte_level()
    end, stop = tokenizer.token_to_id("</s>"), tokenizer.token_to_id("Ġcounted")
    dense = model(tmp_path / "dense", tokenizer, eos_token_id=[end, stop])
    settings = json.loads((dense / "generation_config.json").read_text())
    gone = tokenizer.token_to_id("Ġinterest")
    settings |= {"eos_token_id": [end, stop], "suppress_tokens": [gone, stop], "pad_token_id": 9999}
    (dense / "generation_config.json").write_text(json.dumps(settings))
    (dense / "added_tokens.json").write_text(json.dumps({"</s>": end}))
    (dense / "merges.txt").write_text("#version: 0.2\n")
    checkpoint, bpe = Checkpoint(dense), read_bpe(dense)
    # Tokens in front of the special ones move them.
    needed = bpe.needed() | named_ids(checkpoint)
    assert {end, stop, tokenizer.token_to_id("<s>")} <= needed and gone not in needed
    kept = sorted({*needed, *bpe.parts(stop)})
    (out := tmp_path / "out").mkdir()
    write_trimmed(checkpoint, bpe, kept, out)
    places = {number: place for place, number in enumerate(kept)}
    written = AutoTokenizer.from_pretrained(out)
    config, generation = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["eos_token_id"] == generation["eos_token_id"] == [places[end], places[stop]]
    assert generation["suppress_tokens"] == [places[stop]] and generation["pad_token_id"] is None
    assert written(" counted")["input_ids"] == [places[tokenizer.token_to_id("<s>")], places[stop]]
    assert (written.bos_token_id, written.eos_token_id) == (places[tokenizer.token_to_id("<s>")], places[end])
    assert json.loads((out / "added_tokens.json").read_text()) == {"</s>": places[end]}
    assert not (out / "merges.txt").exists()


def test_a_wrong_row_and_a_wrong_token_are_found(tmp_path):
    dense = model(tmp_path / "dense", TOKENIZERS["bytes"], tied=False)
    checkpoint, bpe = Checkpoint(dense), read_bpe(dense)
    kept = some(bpe, 0.4, seed=1)
    (out := tmp_path / "out").mkdir()
    write_trimmed(checkpoint, bpe, kept, out)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        right = (out / "model.safetensors").read_bytes()
        tensors = load_file(out / "model.safetensors")
        tensors[name][-1, -1] += 1
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ParityError, match=name):
            check_rows(checkpoint, Checkpoint(out), kept)
        (out / "model.safetensors").write_bytes(right)
    said = json.loads((out / "tokenizer.json").read_text())
    vocab, (one, two) = said["model"]["vocab"], list(said["model"]["vocab"])[-2:]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (out / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(ParityError, match="tokenizer differs at"):
        check_tokenizer(AutoTokenizer.from_pretrained(dense), out, kept, TEXTS)


def test_tokens_behind_the_last_row_are_left_out(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<late>"])
    dense = model(tmp_path / "dense", tokenizer, rows=-1)
    checkpoint, bpe = Checkpoint(dense), read_bpe(dense)
    late = tokenizer.token_to_id("<late>")
    assert late == checkpoint.geometry.vocab and late in bpe.needed()
    kept = [number for number in some(bpe, 0.4, seed=1) if number < late]
    (out := tmp_path / "out").mkdir()
    write_trimmed(checkpoint, bpe, kept, out)
    assert check_tokenizer(AutoTokenizer.from_pretrained(dense), out, kept, TEXTS)[1] == len(TEXTS)
    assert "<late>" not in AutoTokenizer.from_pretrained(out).get_vocab()


def use(rows: int, first: dict[int, int], read: dict[int, int]) -> Use:
    arrays = [np.zeros(rows), np.zeros(rows)]
    for array, values in zip(arrays, (first, read), strict=True):
        for number, count in values.items():
            array[number] = count
    return Use(arrays[1], arrays[0].copy(), arrays[0])


def test_as_few_tokens_stay_as_the_bound_allows(bpes):
    bpe = bpes["bytes"]
    rows = len(bpe.tokens)
    chosen, rare = [bpe.ids[name] for name in ("Ġcounted", "Ġthere")]
    order = token_order(bpe, use(rows, {chosen: 9, rare: 1}, {chosen: 1}), use(rows, {}, {}), bpe.needed())
    listed = order.order.tolist()
    assert sorted(listed) == sorted(bpe.tokens) and set(listed[: order.needed]) == set(bpe.needed())
    assert set(bpe.parts(chosen)) <= set(listed[: listed.index(chosen)])
    guard = use(rows, {chosen: 90, rare: 10}, {chosen: 100})
    whole, most = order.within(guard, 0.0), order.within(guard, 0.1)
    assert most <= whole and whole % MULTIPLE == most % MULTIPLE == 0
    exact = TokenOrder(order.order, order.needed, rows)
    assert guard.loss(exact.first(whole)).worst == 0 and guard.loss(exact.first(most)).worst <= 0.1
    assert guard.loss(exact.first(listed.index(chosen))).changed == 1.0
    assert order.within(guard, 1.0) == order.rounded(order.needed)
    with pytest.raises(BudgetError, match="less than the 259 that any text needs"):
        order.demand(100)
    assert order.demand(order.needed + 1) == order.needed + 1 and order.demand(400) == 384


@pytest.mark.parametrize(("kept", "found"), [([0, 1, 4], [(0, 2), (4, 5)]), ([3], [(3, 4)]), ([], [])])
def test_neighbours_are_one_run(kept, found):
    assert list(runs(kept)) == found


def test_what_is_not_a_byte_pair_encoding_is_refused(tmp_path):
    dense = model(tmp_path / "dense", TOKENIZERS["bytes"])
    said = json.loads((dense / "tokenizer.json").read_text())
    for change, message in (
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, "is not a byte-pair encoding but Unigram"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix"),
    ):
        (dense / "tokenizer.json").write_text(json.dumps({**said, "model": {**said["model"], **change}}))
        with pytest.raises(UnsupportedModelError, match=message):
            read_bpe(dense)
    (dense / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"has no tokenizer\.json"):
        read_bpe(dense)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    model(home / "dense", TOKENIZERS["bytes"], rows=3)
    stated(home / "sums.yaml", max_tokens=32, continuation_tokens=2)
    return home


@pytest.fixture(scope="module")
def trimmed(home) -> Path:
    from sspcompile.cli.main import main

    words = ["trim", "--scenario", home / "sums.yaml", "--model", home / "dense", "--tokens", "350"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in (*words, "--out", home / "small", "--quiet")])
    assert ended.value.code in (0, None)
    return home / "small"


def test_a_trimmed_model_says_what_it_lost_and_is_proven_again(run, trimmed, home):
    said = json.loads((trimmed / TRIM).read_text())
    assert said["tokens"] == {"dense": 399, "trimmed": 320} and len(said["kept"]) == 320
    assert said["parameters"]["dense"] - said["parameters"]["trimmed"] == (399 - 320) * 32
    assert {"judge", "off"} >= set(said["judged"]) and said["judged"]["judge"]["texts"] > 0
    code, out, _ = run("verify", trimmed, "--json", "--quiet")
    assert code == 0 and json.loads(out)["tensors"] == said["proof"]["tensors"]
    assert "320 of its 399 tokens" in (trimmed / "README.md").read_text()
    moved = home / "other"
    model(moved, TOKENIZERS["bytes"], rows=3, rope_theta=77.0)
    code, _, err = run("verify", trimmed, "--model", moved, "--quiet")
    assert code != 0 and "is not the model that" in err


def test_a_trimmed_model_is_an_ordinary_one(run, trimmed, home):
    assert run("run", trimmed, "--prompt", "How much?", "--max-new-tokens", "2", "--quiet")[0] == 0
    words = ("--scenario", home / "sums.yaml", "--size", "0.9", "--baselines", "none", "--out", home / "cut", "--quiet")
    assert run("build", "--model", trimmed, *words)[0] == 0
    plan = json.loads((home / "cut" / "plan.json").read_text())
    said = json.loads((trimmed / TRIM).read_text())
    assert plan["parameters"]["dense"] == said["parameters"]["trimmed"]


@pytest.mark.parametrize("place", ["max_loss of the recipe", "SSPCOMPILE_MAX_LOSS"])
def test_the_bound_of_builds_is_not_taken_for_its_own_without_a_word(run, home, monkeypatch, place):
    recipe = home / "sums.yaml"
    if place.startswith("SSPCOMPILE"):
        monkeypatch.setenv(place, "0.4")
    else:
        recipe = stated(home / "bounded.yaml", max_loss=0.4)
    words = ("trim", "--scenario", recipe, "--model", home / "dense", "--out", home / "never", "--quiet")
    monkeypatch.setattr("sspcompile.model.dense.DenseModel.load", Mock(side_effect=InputError("enough seen")))
    said = f"{place} is about builds"
    assert run(*words)[2].count(said) == 1
    for own in (("--max-loss", "0.3"), ("--tokens", "350")):
        assert said not in run(*words, *own)[2]


def test_what_cannot_be_trimmed_is_refused(run, trimmed, home):
    words = ("trim", "--scenario", home / "sums.yaml", "--model", home / "dense", "--out")
    refused(run(*words, home / "x", "--tokens", "400", "--max-loss", "0.1"), "do not go together")
    refused(run(*words, home / "x", "--tokens", "400", "--max-loss-off", "0.1"), "do not go together")
    refused(run(*words, trimmed, "--tokens", "400"), "--overwrite")
    code, _, err = run(*words, home / "x", "--tokens", "100", "--quiet")
    assert code == 3 and "any text needs" in err and not (home / "x").exists()
    refused(run("eval", trimmed, "--scenario", home / "sums.yaml", "--quiet"), "has other tokens than", TRIM)
