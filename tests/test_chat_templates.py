"""Chat templates of every kind: what the model reads, and the way out where a template cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_prepare_tools import TEMPLATE, outside, pools, tiny, word_tokenizer

from sspcompile.errors import InputError
from sspcompile.evaluate.answers import encode_references
from sspcompile.evaluate.asking import Limits, ask
from sspcompile.evaluate.questions import Conversation, Question
from sspcompile.model.capture import features
from sspcompile.model.chat import Rendering, render, replies, takes_conversations, template_digest
from sspcompile.model.dense import open_dense
from sspcompile.model.text import demand_readable, sentences
from sspcompile.prepare import prepare
from sspcompile.prepare.stages import Stages
from sspcompile.prepare.toolkits import toolkit_folder
from sspcompile.request.prompts import Message
from sspcompile.request.request import read_request
from sspcompile.workspace import Workspace

OPEN = "{% if add_generation_prompt %}<model>{% endif %}"
LISTS = "{% for m in messages %}<{{ m.role }}> {% for c in m.content %}{{ c['text'] }}{% endfor %} {% endfor %}" + OPEN
STRICT = "{% for m in messages %}<{{ m.role }}> {{ m.content[0]['text'] + ' ' }}{% endfor %}" + OPEN
USER_LISTS = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'user' %}{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %} {% endfor %}" + OPEN
)
EITHER = (
    "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %} {% endfor %}" + OPEN
)
TEXTS = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}" + OPEN
TALK = (Message("system", "acid"), Message("user", "war ?"), Message("assistant", "king"), Message("user", "sum ?"))


@pytest.mark.parametrize("template", [TEXTS, LISTS, STRICT, USER_LISTS, EITHER])
def test_contents_go_in_as_the_template_wants_them(template: str) -> None:
    tokenizer = word_tokenizer(template=template)
    assert render(tokenizer, ["war ?", TALK, "king"]) == [
        "<user> war ? <model>",
        "<system> acid <user> war ? <assistant> king <user> sum ? <model>",
        "<user> king <model>",
    ]
    assert takes_conversations(tokenizer)
    assert replies(tokenizer, ["war ?"], ["<user> war ? "], ["a king"]) == ["<assistant> a king "]


@pytest.mark.parametrize("prompt", ["a", "<", "m", "user", "model"])
def test_a_prompt_that_stands_in_the_template_anyway_is_no_proof_that_it_was_written(prompt: str) -> None:
    assert render(word_tokenizer(template=LISTS), [prompt]) == [f"<user> {prompt} <model>"]


REFUSING = {
    "wants a system message": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('A system message is required.') }}{% endif %}x",
        "A system message is required",
    ),
    "wants tools": ("{{ tools[0]['x'] }}{{ messages[0].content }}", "None has no element 0"),
    "calls what is not there": ("{{ messages[0].content.whole() }}", "has no attribute 'whole'"),
    "adds text to nothing": ("{{ messages[0].content + tools }}", "can only concatenate"),
    "divides by zero": ("{{ 1 // 0 }}{{ messages[0].content }}", "division"),
    "does not end": ("{% for m in messages %}{{ m.content }}", "endfor"),
    "writes nothing": ("{% if false %}{{ messages[0].content }}{% endif %}", "leaves the prompt out"),
    "writes something else": ("<user> <model>", "leaves the prompt out"),
    "writes the system message alone": (
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
        "leaves the prompt out",
    ),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_cannot_be_used_is_refused_in_one_line_with_the_way_out(name: str) -> None:
    template, expected = REFUSING[name]
    loaded = tiny(template=template)
    with pytest.raises(InputError, match=expected) as caught:
        demand_readable(loaded, ["war ?"])
    assert "\n" not in str(caught.value) and "'war ?'" in str(caught.value) and "--raw" in str(caught.value)
    demand_readable(replace(loaded, rendering=Rendering(raw=True)), ["war ?"])


def test_a_template_that_wants_a_system_message_takes_a_conversation_that_has_one() -> None:
    template, _ = REFUSING["wants a system message"]
    tokenizer = word_tokenizer(template=template.removesuffix("x") + TEXTS)
    assert render(tokenizer, [TALK])[0].startswith("<system> acid <user> war")
    assert not takes_conversations(tokenizer)


def test_a_template_that_refuses_a_role_refuses_that_conversation_alone() -> None:
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer = word_tokenizer(template=no_system + TEXTS)
    assert render(tokenizer, ["war ?", TALK[1:]])[0] == "<user> war ? <model>"
    with pytest.raises(InputError, match=r"'system: acid.*System role not supported.*--raw"):
        render(tokenizer, ["war ?", TALK])


NAMED = {"rag": "<rag> " + TEXTS, "tool_use": "<tool> " + TEXTS}


def test_one_of_several_templates_is_named_or_the_default() -> None:
    tokenizer = word_tokenizer(template=NAMED)
    assert render(tokenizer, ["war ?"], Rendering("rag")) == ["<rag> <user> war ? <model>"]
    assert render(tokenizer, ["war ?"], Rendering("tool_use")) == ["<tool> <user> war ? <model>"]
    assert render(tokenizer, ["war ?"], Rendering(raw=True)) == ["war ?"]
    with_default = word_tokenizer(template=NAMED | {"default": TEXTS})
    assert render(with_default, ["war ?"]) == render(with_default, ["war ?"], Rendering("default"))
    assert render(with_default, ["war ?"], Rendering("rag")) == ["<rag> <user> war ? <model>"]
    assert render(word_tokenizer(template=TEXTS), ["war ?"], Rendering("default")) == ["<user> war ? <model>"]


@pytest.mark.parametrize(
    ("template", "rendering", "expected"),
    [
        (NAMED, Rendering(), r"'rag', 'tool_use'.*--chat-template NAME.*--raw"),
        (NAMED, Rendering("chatml"), r"no chat template 'chatml'\. Accepted: 'rag', 'tool_use'"),
        (TEXTS, Rendering("rag"), r"no chat template 'rag'\. Accepted: 'default'"),
        (None, Rendering("rag"), "none at all; leave --chat-template out"),
        (NAMED | {"default": "{{ raise_exception('no') }}"}, Rendering(), r"'war \?': no.*--raw.*'rag', 'tool_use'"),
    ],
)
def test_names_of_templates_are_checked_and_listed(template: object, rendering: Rendering, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        sentences(word_tokenizer(template=template), ["war ?"], 99, rendering)


def test_a_template_and_none_exclude_each_other() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        Rendering("rag", raw=True)


@pytest.mark.parametrize("template", [None, "", {}])
def test_without_a_template_a_conversation_is_its_messages_with_empty_lines_between(template: object) -> None:
    tokenizer = word_tokenizer(template=template)
    expected = ["war ?", "acid\n\nwar ?\n\nking\n\nsum ?"]
    assert render(tokenizer, ["war ?", TALK]) == expected
    assert render(word_tokenizer(template=TEXTS), ["war ?", TALK], Rendering(raw=True)) == expected
    assert render(tokenizer, [(Message("system", ""), Message("user", "war ?"))]) == ["war ?"]


def test_raw_text_gets_the_special_tokens_that_a_model_without_a_template_gets() -> None:
    loaded = tiny(template=TEMPLATE)
    plain, raw = tiny(), Rendering(raw=True)
    assert sentences(loaded.tokenizer, ["war ?"], 99, raw) == sentences(plain.tokenizer, ["war ?"], 99)
    closing = word_tokenizer(template=TEMPLATE, add_eos=True)
    assert sentences(closing, ["war ?"], 99, raw)[0].ids[-1] != closing.eos_token_id
    assert encode_references(replace(loaded, rendering=raw), ["war ?"], ["king"]) == encode_references(
        plain, ["war ?"], ["king"]
    )


@pytest.mark.parametrize(
    "no_history",
    [
        TEXTS.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"),
        "{% if messages[-1].role == 'assistant' %}{{ raise_exception('the user speaks last') }}{% endif %}" + TEXTS,
    ],
)
def test_an_answer_that_the_template_does_not_write_stands_alone(no_history: str) -> None:
    tokenizer = word_tokenizer(template=no_history)
    opened = render(tokenizer, ["war ?"])
    assert replies(tokenizer, ["war ?"], opened, ["a king"]) == ["a king"]


def test_a_conversation_of_the_data_is_asked_whole_and_gone_on_from() -> None:
    loaded = tiny(seed=1, template=TEMPLATE)
    found = ask(loaded, [Conversation((Question(TALK), Question("root ?")))], Limits(64, 3, 2), lambda *_: None)
    assert found.prompts[0] == TALK
    assert found.prompts[1] == (*TALK, Message("assistant", found.texts[0]), Message("user", "root ?"))


def test_other_templates_and_renderings_share_no_toolkit() -> None:
    tokenizer, raw = word_tokenizer(template=NAMED), Rendering(raw=True)
    digests = [template_digest(tokenizer, rendering) for rendering in (Rendering("rag"), Rendering("tool_use"), raw)]
    digests.append(template_digest(word_tokenizer(template=TEXTS)))
    assert len(set(digests)) == 4 and template_digest(word_tokenizer()) == template_digest(tokenizer, raw)
    folders = [rendering.suffix for rendering in (Rendering(), raw, Rendering("rag"), Rendering("../raw"))]
    assert folders[0] == "" and len(set(folders)) == 4 and not any("/" in suffix for suffix in folders)


def test_a_stage_measured_with_one_template_is_not_taken_for_another(tmp_path: Path) -> None:
    first = tiny(template=TEMPLATE)
    found, bare = {}, features(tiny(), ["war ?", "king"])
    for name, loaded in {
        "template": first,
        "raw": replace(first, rendering=Rendering(raw=True)),
        "other template": tiny(template=TEXTS),
    }.items():
        stages = Stages(loaded, tmp_path)
        found[name] = stages.features(["war ?", "king"], 99, lambda *_: None)
        assert (found[name] == stages.features(["war ?", "king"], 99, lambda *_: None)).all()
        assert (stages.features(["war ?", "king"], 99, lambda *_: None, bare=True) == bare).all()
    assert len(list(tmp_path.iterdir())) == 6
    assert not (found["template"] == found["raw"]).all() and not (found["template"] == found["other template"]).all()


def test_recognition_reads_texts_without_the_template_and_every_word_of_a_conversation() -> None:
    with_one, without = tiny(template=TEMPLATE), tiny()
    talk = (Message("user", "war ?"), Message("assistant", "king"), Message("user", "salt"))
    for prompt in ("tell me about acid", talk):
        np.testing.assert_array_equal(features(with_one, [prompt], bare=True), features(without, [prompt]))
    np.testing.assert_array_equal(features(with_one, [talk], bare=True), features(without, ["war ? king salt"]))


def test_toolkits_of_renderings_lie_in_folders_of_their_own_and_know_their_template(tmp_path: Path) -> None:
    subject, workspace = open_dense(None), Workspace(tmp_path)
    options = read_request("no scenario", {}, {}).options
    renderings = ({}, {"raw": True}, {"chat_template": "rag"}, {"chat_template": "tool"})
    asked = [options.model_copy(update=rendering) for rendering in renderings]
    assert len({toolkit_folder(subject, one, workspace) for one in asked}) == 4
    for template in (TEMPLATE, TEXTS):
        loaded = tiny(template=template)
        made = prepare(loaded, pools(), outside(), criteria=["fisher"], continuation_tokens=2)
        assert made.meta["chat_template"] == template_digest(loaded.tokenizer)
