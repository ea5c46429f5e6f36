"""The embedded model: its text keeps its promises, and the shipped weights answer."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from random import Random
from string import Formatter

import pytest
import torch
from ruamel.yaml import YAML

from sspcompile.embedded import MODEL_DIR
from sspcompile.embedded.questions import QUESTIONS_FILE, questions
from training.corpus import DOMAIN_DATA, DOMAINS, FORM_CYCLE, FORMS, OUTSIDE_DOMAINS, TASKS, cross_items, items
from training.corpus.wording import ask
from training.handwritten import HANDWRITTEN
from training.pools import pool_paths, pool_text
from training.questions import QUESTIONS_PER_DOMAIN, questions_text
from training.subjects import draw_description

ALL_DOMAINS = (*DOMAINS, *OUTSIDE_DOMAINS)
WEIGHT_LIMIT_BYTES = 8_000_000
TARGET = 0.85


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_items_are_the_same_every_time_and_differ_from_each_other(domain):
    drawn = items(domain, "train", 3, 120)
    assert drawn == items(domain, "train", 3, 120)
    assert len({item.prompt for item in drawn}) == 120
    assert drawn != items(domain, "train", 4, 120)


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_held_out_prompts_never_occur_in_training(domain):
    seen = {item.prompt for item in items(domain, "train", 5, 900)}
    assert seen.isdisjoint(item.prompt for item in items(domain, "heldout", 5, 300))


def test_held_out_cross_prompts_never_occur_in_training():
    seen = {item.prompt for item in cross_items("train", 5, 2000)}
    assert seen.isdisjoint(item.prompt for item in cross_items("heldout", 5, 200))


def test_held_out_operands_never_occur_in_training():
    def operands(split):
        return {
            tuple(word.strip(".?") for word in item.prompt.split() if word.strip(".?").isdigit())
            for item in items("math", split, 6, 300)
            if item.task == "rule-two" and item.form == "number"
        }

    assert operands("heldout")
    assert operands("train").isdisjoint(operands("heldout"))


def test_held_out_texts_never_occur_in_training():
    def texts(split):
        return {
            item.prompt[: item.prompt.rindex(". ")]
            for item in items("history", split, 6, 300)
            if item.task == "read-near"
        }

    assert texts("heldout")
    assert texts("train").isdisjoint(texts("heldout"))


def test_forms_and_tasks_do_not_give_the_domain_away():
    shapes = [[(item.form, item.task) for item in items(domain, "train", 7, 200)] for domain in ALL_DOMAINS]
    assert all(shape == shapes[0] for shape in shapes)
    forms = Counter(form for form, _ in shapes[0])
    assert set(forms) == set(FORM_CYCLE) <= set(FORMS)
    assert forms["word"] == 200 * FORM_CYCLE.count("word") // len(FORM_CYCLE)


@pytest.mark.parametrize(("form", "answers"), [("yes-no", ("Yes", "No")), ("option", ("A", "B", "C"))])
def test_closed_answers_are_balanced(form, answers):
    rng = Random(8)
    domain, task = DOMAIN_DATA["math"], next(task for task in TASKS if task.name == "recall-first")
    case = task.draw(domain, rng, False, None)
    drawn = Counter(
        ask(case, domain=domain.name, task=task.name, form=form, held_out=False, rng=rng)[1] for _ in range(900)
    )
    assert set(drawn) == set(answers)
    assert max(drawn.values()) - min(drawn.values()) < 90


def test_unknown_domain_and_split_are_refused():
    with pytest.raises(ValueError, match="unknown domain"):
        items("astrology", "train", 0, 1)
    with pytest.raises(ValueError, match="unknown split"):
        items("math", "validation", 0, 1)


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_pool_file_is_what_the_script_writes(domain):
    assert pool_paths()[domain].read_text() == pool_text(domain)


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_pool_is_large_unique_and_apart_from_evaluation(domain):
    pool = YAML(typ="safe").load(pool_paths()[domain])
    assert pool["schema_version"] == 1
    assert pool["name"] == domain
    assert len(pool["descriptions"]) == len(set(pool["descriptions"])) >= 24
    assert len(pool["prompts"]) == len(set(pool["prompts"])) >= 96
    assert set(pool["prompts"]).isdisjoint(item.prompt for item in items(domain, "heldout", 20, 400))


def test_question_file_is_what_the_script_writes():
    assert QUESTIONS_FILE.read_text("utf-8") == questions_text()


@pytest.mark.parametrize("domain", ALL_DOMAINS)
def test_shipped_questions_are_apart_from_pools_and_training(domain):
    prompts = {question.prompt for question in questions(domain)}
    assert len(prompts) == len(questions(domain)) == QUESTIONS_PER_DOMAIN
    assert prompts.isdisjoint(YAML(typ="safe").load(pool_paths()[domain])["prompts"])
    assert prompts.isdisjoint(item.prompt for item in items(domain, "train", 5, 900))


def test_a_domain_of_the_user_s_own_has_no_shipped_questions():
    assert questions("astrology") == ()


def test_handwritten_questions_have_the_same_forms_in_every_domain():
    shapes = {
        tuple(map(len, (w.open_questions, w.number_questions, w.yes_no_questions, w.option_questions)))
        for w in HANDWRITTEN.values()
    }
    assert len(shapes) == 1


def test_weights_fit_into_the_package():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= WEIGHT_LIMIT_BYTES


def test_configuration_is_readable_by_both_generations_of_transformers():
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    tokenizer_config = json.loads((MODEL_DIR / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_model_card_has_the_text_of_its_template():
    from training.card import TEMPLATE

    card, place = (MODEL_DIR / "README.md").read_text("utf-8"), 0
    for text, *_ in Formatter().parse(TEMPLATE):
        place = card.index(text, place) + len(text)
    assert place == len(card)


def test_chat_template_renders_the_prompt_format(tokenizer):
    messages = [{"role": "user", "content": "What is the symbol of iron?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "Question: What is the symbol of iron?\nAnswer:"


def test_tokenizer_encodes_any_text(tokenizer):
    for text in ("plain words", "Ärger über π ≈ 3.14159", "日本語\t\n🙂", "x += 4; y < 3"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_single_tokens_for_whatever_class_loads_the_tokenizer(tokenizer):
    assert len(tokenizer.encode("Question: 12 plus 7 is 19?")) == len(
        ["Question", ":", "12", "plus", "7", "is", "19", "?"]
    )


def test_vocabulary_of_tokenizer_and_model_agree(model, tokenizer):
    assert len(tokenizer) == model.config.vocab_size


def test_training_forward_equals_the_stock_forward(model):
    from training.network import hidden_states

    tokens = torch.randint(2, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, last, _ = hidden_states(model, tokens)
        lean = last @ model.model.embed_tokens.weight.T
        torch.testing.assert_close(lean, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_head_is_active_by_the_norm_of_its_part_of_the_stream(model):
    from training.network import HALF_ACTIVE, HEAD_DIM, HEADS, hidden_states

    tokens = torch.randint(2, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, 7:] = False
    inputs, streams = [], []
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in model.model.layers:
            for module, seen in ((layer.self_attn.o_proj, inputs), (layer.post_attention_layernorm, streams)):
                hooks.enter_context(module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])))
        model(tokens)
        *_, activity = hidden_states(model, tokens, real=real)
        expected = 0.0
        for layer, joined, stream in zip(model.model.layers, inputs, streams, strict=True):
            active = torch.zeros(2)
            for head in range(HEADS):
                columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                part = joined[..., columns] @ layer.self_attn.o_proj.weight[:, columns].T
                share = part.norm(dim=-1) / stream.norm(dim=-1)
                typical = torch.stack([row[own].square().mean().sqrt() for row, own in zip(share, real, strict=True)])
                active += typical / (typical + HALF_ACTIVE)
            expected += active.square().mean()
    torch.testing.assert_close(activity, expected, rtol=1e-3, atol=1e-3)


def test_shipped_weights_answer_held_out_questions(model, tokenizer):
    from training.evaluate import evaluate

    accuracy = evaluate(model, tokenizer, count=40, seed=21)
    assert accuracy.mean >= TARGET, accuracy.table()


@pytest.mark.whole
def test_half_of_the_layers_are_missed():
    """A model in which one layer decides, or any layer stands in for any other, cannot tell head scores apart."""
    from sspcompile.model.dense import open_dense
    from training.card import layer_needs

    needs = layer_needs(open_dense(None).load(), count=60, seed=22)
    costs = [needs.first[-1] - left for left in needs.without]
    assert sum(cost >= 0.05 for cost in costs) >= len(costs) / 2, costs
    assert needs.first[0] < needs.first[-1] / 2, "the first layer alone is not half of it"


def test_the_subject_of_a_newly_composed_sentence_is_named(model, tokenizer):
    right = 0
    for domain in DOMAINS:
        for number in range(20):
            text = draw_description(domain, Random(f"test/{domain}/{number}"))
            ids = tokenizer(f"Question: {text}\nTopic:", return_tensors="pt").input_ids
            with torch.inference_mode():
                right += tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == domain
    assert right >= 0.95 * 20 * len(DOMAINS)


def test_the_domain_of_a_sentence_in_other_words_is_readable_above_chance(model, tokenizer):
    """Not well: the model card says how well. A sentence is only as clear as the words that the corpus knows."""
    from training.probe import separability

    assert separability(model, tokenizer, model.config.num_hidden_layers // 2) > 0.6
