"""Lines of prompt files as users have them: what is asked, what is kept as the answer, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.errors import InputError, ScenarioError
from sspcompile.evaluate.questions import read_data
from sspcompile.request.answers import ANSWERS
from sspcompile.request.prompts import Message, answer_of, answered, as_prompt, asked_of, bare, read_line, told
from sspcompile.request.recipe import ScenarioSpec, dump_recipe, load_recipe
from sspcompile.request.request import read_request
from sspcompile.request.scenario import of_prompts, read_scenario, scenario_of
from sspcompile.request.splits import own_fit_part, seen_part, split


def said(*turns: str) -> list[dict[str, str]]:
    """Messages as OpenAI has them, from "user: ..." and so on."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def talk(*turns: str) -> tuple[Message, ...]:
    return tuple(Message(**turn) for turn in said(*turns))


NAN = float("nan")
ASKED = talk("system: Be brief.", "user: Gold?", "assistant: Au", "user: Iron?")
SHAREGPT = [{"from": "human", "value": "Gold?"}, {"from": "gpt", "value": "Au"}]
PARTS = [{"type": "text", "text": "Gold"}, {"type": "text", "text": "?"}]
# line -> what is asked, what is the answer
LINES = {
    "prompt": ({"prompt": "Gold?", "id": 7}, "Gold?", None),
    "prompt and answer": ({"prompt": "Gold?", "answer": ["Au", "au"]}, "Gold?", ["Au", "au"]),
    "prompt and completion": ({"prompt": "Gold?", "completion": "Au"}, "Gold?", "Au"),
    "prompt and the conversation that it opened": ({"prompt": "Gold?", "messages": said("user: x")}, "Gold?", None),
    "prompt of messages": ({"prompt": said("user: Gold?"), "completion": said("assistant: Au")}, "Gold?", "Au"),
    "one message": ({"messages": said("user:  Gold? ")}, "Gold?", None),
    "question and answer": ({"messages": said("user: Gold?", "assistant: Au")}, "Gold?", "Au"),
    "system message": ({"messages": said("system: S", "user: Gold?")}, talk("system: S", "user: Gold?"), None),
    "developer": ({"messages": said("developer: S", "user: Gold?")}, talk("system: S", "user: Gold?"), None),
    "empty system message": ({"messages": said("system: ", "user: Gold?")}, talk("system: ", "user: Gold?"), None),
    "conversation": ({"messages": [{"role": m.role, "content": m.content} for m in ASKED]}, ASKED, None),
    "answered conversation": (
        {"messages": said("system: Be brief.", "user: Gold?", "assistant: Au", "user: Iron?", "assistant: Fe")},
        ASKED,
        "Fe",
    ),
    "empty last answer": ({"messages": said("user: Gold?", "assistant: ")}, "Gold?", None),
    "answer beside messages": ({"messages": said("user: Gold?"), "answer": "Au"}, "Gold?", "Au"),
    "content in parts": ({"messages": [{"role": "user", "content": PARTS}]}, "Gold?", None),
    "further keys of a message": ({"messages": [{"role": "user", "content": "Gold?", "name": "x"}]}, "Gold?", None),
    "ShareGPT": ({"conversations": SHAREGPT}, "Gold?", "Au"),
    "ShareGPT with a system text": ({"conversations": SHAREGPT, "system": "S"}, talk("system: S", "user: Gold?"), "Au"),
    "conversations with roles": ({"conversations": said("user: Gold?", "assistant: Au")}, "Gold?", "Au"),
    "Alpaca": ({"instruction": "Name it.", "input": "gold", "output": "Au"}, "Name it.\ngold", "Au"),
    "Alpaca without input": ({"instruction": "Name gold.", "input": "", "output": "Au"}, "Name gold.", "Au"),
    "Alpaca with system and history": (
        {"instruction": "Iron?", "output": "Fe", "system": "Be brief.", "history": [["Gold?", "Au"]]},
        ASKED,
        "Fe",
    ),
    "question": ({"question": "Gold?", "answer": "Au"}, "Gold?", "Au"),
    "text": ({"text": "Gold?", "answer": "Au", "label": 3}, "Gold?", "Au"),
    **{f"prompt and {key}": ({"prompt": "Gold?", key: "Au"}, "Gold?", "Au") for key in ANSWERS if key != "answer"},
    **{f"question and {key}": ({"question": "Gold?", key: "Au"}, "Gold?", "Au") for key in ANSWERS},
    "instruction and response": ({"instruction": "Gold?", "response": "Au"}, "Gold?", "Au"),
    "input and output": ({"input": "Gold?", "output": "Au"}, "Gold?", "Au"),
    "query and response": ({"query": "Gold?", "response": "Au"}, "Gold?", "Au"),
    "problem and solution": ({"problem": "Gold?", "solution": "Au", "level": 3}, "Gold?", "Au"),
    "preference": ({"prompt": "Gold?", "chosen": "Au", "rejected": "Ag"}, "Gold?", "Au"),
    "preference in messages": (
        {"prompt": "Gold?", "chosen": said("user: Gold?", "assistant: Au"), "rejected": said("assistant: Ag")},
        "Gold?",
        "Au",
    ),
    "SQuAD": ({"question": "Gold?", "answers": {"text": ["Au", "au"], "answer_start": [1, 9]}}, "Gold?", ["Au", "au"]),
    "class beside a conversation": (
        {"messages": said("user: Gold?", "assistant: Au"), "label": "metals"},
        "Gold?",
        "Au",
    ),
    "empty cell beside the answer": ({"prompt": "Gold?", "completion": NAN, "output": "Au"}, "Gold?", "Au"),
    "empty cells of Alpaca": (
        {"instruction": "Name gold.", "input": NAN, "output": "Au", "system": NAN, "history": NAN},
        "Name gold.",
        "Au",
    ),
    "null where another key is meant": ({"prompt": None, "messages": said("user: Gold?")}, "Gold?", None),
    "line ends of Windows": ({"prompt": "Gold?\r\nIron?"}, "Gold?\nIron?", None),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_says_what_is_asked_and_what_the_answer_is(name: str) -> None:
    item, asked, answer = LINES[name]
    found = read_line(item)
    assert (found.prompt, found.answer) == (asked, answer)
    hash(found.prompt)


@pytest.mark.parametrize("name", LINES)
def test_a_file_of_such_lines_is_a_scenario_that_its_recipe_holds(name: str, tmp_path: Path) -> None:
    item, asked, answer = LINES[name]
    (tmp_path / "p.jsonl").write_text(json.dumps(item) + "\n" + json.dumps({"prompt": "Lead?"}) + "\n", "utf-8")
    scenario, _ = read_scenario(str(tmp_path / "p.jsonl"))
    assert scenario.prompts == (answered(asked, answer), "Lead?")
    given = answer[0] if isinstance(answer, list) else answer
    assert asked_of(scenario.prompts[0]) == bare(scenario.prompts[0]) == asked
    assert answer_of(scenario.prompts[0]) == given
    resolved = read_request(scenario, {}, {}).recipe()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(resolved), "utf-8")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again == resolved and scenario_of(again).prompts == scenario.prompts


@pytest.mark.parametrize("name", LINES)
def test_a_file_of_such_lines_is_data_with_the_answers_that_it_holds(name: str, tmp_path: Path) -> None:
    item, asked, answer = LINES[name]
    (tmp_path / "d.jsonl").write_text(json.dumps(item), "utf-8")
    if answer is None and isinstance(item.get("prompt"), str):
        with pytest.raises(InputError, match="answer is missing"):
            read_data(tmp_path / "d.jsonl")
        return
    ((question,),) = (c.turns for c in read_data(tmp_path / "d.jsonl"))
    assert question.prompt == asked
    assert question.answers == (() if answer is None else tuple([answer] if isinstance(answer, str) else answer))


REFUSED = {
    "no object": (["prompt"], "must be a JSON object"),
    "no known key": ({"content": "a"}, "none of the keys prompt, messages, conversations, instruction, question, text"),
    "prompt of another kind": ({"prompt": 7}, "no text under the key 'prompt'"),
    "blank question": ({"question": " "}, "no text under the key 'question'"),
    "no messages": ({"messages": []}, "no list of messages under the key 'messages'"),
    "messages that are text": ({"messages": "user: hello"}, "no list of messages under the key 'messages'"),
    "message that is text": ({"messages": ["hello"]}, "message 1 of 'messages' must be a mapping with role"),
    "unknown role": ({"messages": said("user: a", "tool: b")}, "message 2 of 'messages' has the role 'tool'; accepted"),
    "no role": ({"messages": [{"content": "a"}]}, "has the role None"),
    "call of a tool": ({"messages": [{"role": "assistant", "content": None}]}, "must have text as its content"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "must have text as its content"),
    "nobody asks": ({"messages": said("assistant: Hello.")}, "holds no message of the user"),
    "blank question in messages": ({"messages": said("user: ", "assistant: Hello.")}, "an empty message of the user"),
    "system at the end": ({"messages": said("user: a", "system: b")}, "a system message behind the last message"),
    "control character in messages": ({"messages": said("user: a\x1b[2J")}, "control character U+001B"),
    "half a character": ({"conversations": [{"from": "human", "value": "\ud800"}]}, "lone surrogate"),
    "history of another kind": ({"instruction": "a", "history": "b"}, "no list of pairs"),
    "history that is no pair": ({"instruction": "a", "history": [["b"]]}, "must be a list of two texts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_lines_are_refused_in_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    item, expected = REFUSED[name]
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine", "answer": "yes"}\n' + json.dumps(item) + "\n", "utf-8")
    for read, error in ((lambda: read_scenario(str(path)), ScenarioError), (lambda: read_data(path), InputError)):
        with pytest.raises(error) as caught:
            read()
        message = str(caught.value)
        assert expected in message and "line 2" in message and "\n" not in message and "\x1b" not in message


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=20)
turns = st.builds(Message, st.sampled_from(["system", "user", "assistant"]), words)
conversations = st.builds(
    lambda before, last: (*before, Message("user", last)), st.lists(turns, max_size=4), words.filter(str.strip)
)


@given(conversations)
def test_conversations_come_back_equal_from_a_recipe(prompt: tuple[Message, ...]) -> None:
    spec = ScenarioSpec(prompts=(prompt, "a text"))
    assert ScenarioSpec.model_validate(spec.model_dump(exclude_none=True)) == spec
    assert ScenarioSpec.model_validate_json(spec.model_dump_json(exclude_none=True)) == spec
    assert spec.prompts[0] == as_prompt(prompt) == as_prompt(as_prompt(prompt))


def test_a_recipe_takes_conversations_and_says_what_is_wrong_with_one(tmp_path: Path) -> None:
    text = "schema_version: 1\nname: x\ndescription: y\nscenario:\n  prompts:\n  - Gold?\n  - - role: system\n"
    text += "      content: Be brief.\n    - role: {role}\n      content: Iron?\n"
    (tmp_path / "r.yaml").write_text(text.replace("{role}", "user"))
    assert read_scenario(str(tmp_path / "r.yaml"))[0].prompts == ("Gold?", talk("system: Be brief.", "user: Iron?"))
    (tmp_path / "r.yaml").write_text(text.replace("{role}", "robot"))
    with pytest.raises(InputError, match=r"scenario.prompts\[1\] \(line 7\): message 2 has the role 'robot'"):
        read_scenario(str(tmp_path / "r.yaml"))


def test_conversations_are_split_like_texts_and_told_with_their_roles() -> None:
    many = tuple(talk("system: S", f"user: number {n}") for n in range(12))
    fit, guard, judge = split((*many, "a", "b"))
    assert sorted(map(told, fit + guard + judge)) == sorted(map(told, (*many, "a", "b")))
    assert len(own_fit_part((*many, *many))) == len(split(many)[0])
    assert set(seen_part(many)) < set(many)
    with_answer = answered(many[3], "Seven.")
    assert told(with_answer) == told(many[3]) and bare(with_answer) == many[3] == asked_of(with_answer)
    assert told(many[3]) == "system: S\nuser: number 3" and bare(many[3]) == many[3] and bare(" a ") == "a"


# lines of a file, and what is said of it
TOLD = {
    "a key that could hold the answer": (
        [{"prompt": "Gold?", "my_answer": "Au"}, {"prompt": "Tin?", "my_answer": "Sn"}],
        "p.jsonl: 2 of 2 prompts have no answer that is read, but 'my_answer'. Read are answer, completion, response",
    ),
    "a key of any name": ([{"question": "Gold?", "risposta": "Au"}, {"prompt": "a"}], "1 of 2 prompts has no answer"),
    "a number of a class": ([{"prompt": "Gold?", "label": 3}], "but 'label'"),
    "an answer that is no text": ([{"prompt": "Gold?", "answer": {"name": "Au"}}], "but 'answer'"),
    "an answer that is a truth": ([{"prompt": "Is it?", "answer": True}], "but 'answer'"),
    "a class beside a text": ([{"text": "Gold.", "label": "metals"}], "but 'label'"),
    "a conversation": ([{"prompt": "Gold?", "talk": said("user: Gold?", "assistant: Au")}], "but 'talk'"),
    "empty": (
        [
            {"prompt": "a", "answer": NAN},
            {"prompt": "b", "answer": None},
            {"prompt": "c", "answer": " "},
            {"prompt": "d"},
        ],
        "p.jsonl: 3 of 4 prompts have an empty answer (null, NaN or blank), which counts as none.",
    ),
    "facts": ([{"prompt": "a", "id": 7, "prompt_id": "x", "domain": "d", "source": "s", "safe": True}], None),
    "a corpus": ([{"text": "Gold.", "headline": "Metals", "body": "x"}], None),
    "answered": ([{"prompt": "a", "answer": "b", "expected": "c"}], None),
}


@pytest.mark.parametrize("name", TOLD)
def test_an_answer_that_is_not_read_is_said_once_with_its_key(name: str, tmp_path: Path, caplog) -> None:
    lines, expected = TOLD[name]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    caplog.set_level("INFO", "sspcompile")
    scenario, _ = read_scenario(str(tmp_path / "p.jsonl"))
    assert of_prompts(lines).prompts == scenario.prompts, "in Python as in files"
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("p.jsonl")]
    assert len(told) == (expected is not None) and all("\n" not in one for one in told)
    assert expected is None or expected in told[0]


def test_the_command_says_it_once_however_often_a_file_is_read(tmp_path: Path, run) -> None:
    lines = [{"prompt": "Gold?", "answer": "Au"}, {"prompt": "Tin?", "risposta": "Sn"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    code, out, err = run("build", "-s", tmp_path / "p.jsonl", "--dry-run")
    assert code == 0 and "p: 2 prompts, 1 with answers\n" in err and "Read from p.jsonl: 2 prompts, 1 with" in out
    assert err.count("1 of 2 prompts has no answer that is read, but 'risposta'") == 1
    sweep = ("--sweep", "size=0.8,0.9", "--out", tmp_path / "sweep")
    assert run("build", "-s", tmp_path / "p.jsonl", "--dry-run", *sweep)[2].count("'risposta'") == 1


def test_a_missing_answer_is_refused_as_data_with_the_key_that_may_hold_it(tmp_path: Path) -> None:
    for text in (
        '{"prompt": "a", "answer": NaN}',
        '{"prompt": "a", "answer": null}',
        '{"question": "a", "answer": [NaN]}',
    ):
        (tmp_path / "d.jsonl").write_text(text)
        with pytest.raises(InputError, match="line 1: answer is missing"):
            read_data(tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "expected": "b"}')
    with pytest.raises(InputError, match=r"answer is missing, and 'expected' is not read\. Keys of an answer: answer"):
        read_data(tmp_path / "d.jsonl")


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "1e400"])
def test_an_infinite_answer_is_refused_with_its_line(number: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for answer in (number, f'["Au", {number}]'):
        path.write_text(f'{{"prompt": "a", "answer": "b"}}\n{{"prompt": "Gold?", "answer": {answer}}}')
        for read in (lambda: read_scenario(str(path)), lambda: read_data(path)):
            with pytest.raises(InputError, match=r"line 2.* has an infinite number as its answer"):
                read()
    path.write_text(f'{{"prompt": "a", "answer": "b", "score": {number}}}')
    assert read_data(path), "other keys are the file's own"
    with pytest.raises(InputError, match="Prompt 1 has an infinite number"):
        of_prompts([{"prompt": "a", "answer": float(number)}])


NO_ANSWERS = {
    "quotations": {"question": "Where?", "answers": [{"text": "Paris", "answer_start": 3}]},
    "sources": {"prompt": "Where?", "reference": [{"title": "Atlas", "url": "x"}]},
    "parts": {"prompt": "Where?", "output": [{"type": "message", "text": "Paris"}]},
    "a tool": {"prompt": "Where?", "chosen": [{"role": "tool", "content": "{}"}]},
    "calls": {"prompt": "Where?", "chosen": [{"role": "assistant", "content": None}]},
    "a duration": {"prompt": "Where?", "response_time": 3, "target_lang": "de", "reference_embedding": [{"a": 1}]},
    "depth elsewhere": {"prompt": "Where?", "weights": json.loads("[" * 300 + "]" * 300)},
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_only_is_called_like_an_answer_spoils_no_line(name: str) -> None:
    line = read_line(NO_ANSWERS[name])
    assert line.prompt in ("Where?",) and line.answer is None
    assert name != "a duration" or line.unread == ()


@pytest.mark.parametrize("key", ["target", "output", "reference", "label", "solution"])
def test_a_text_with_its_class_or_source_stays_a_text(key: str) -> None:
    for value in (1, "positive", "Smith 2003"):
        assert read_line({"text": "It rained.", key: value}) == replace(
            read_line({"text": "It rained."}), unread=read_line({"text": "It rained.", key: value}).unread
        )
    assert read_line({"text": "What is gold?", "answer": "A metal."}).answer == "A metal."


@pytest.mark.parametrize("key", ["answer", "output", "system", "else"])
def test_a_line_that_is_nested_too_deep_is_refused_in_words(key: str) -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deep"):
        read_line({"prompt": "Where?", key: deep})


def test_numbers_of_numpy_are_answers_as_those_of_python_are() -> None:
    numbers = [np.float64(2.5), np.float32(2.5), np.int64(5), np.float64("nan")]
    found = of_prompts({"prompt": "How many?", "answer": one} for one in numbers).prompts
    assert [answer_of(prompt) for prompt in found] == ["2.5", "2.5", "5", None]


def test_a_request_says_how_many_prompts_have_answers(tmp_path: Path) -> None:
    lines = [{"prompt": "a", "answer": "b"}, {"prompt": "c"}, {"prompt": "d"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    told = read_request(str(tmp_path / "mine.jsonl"), {}, {}).recipe().description
    assert told == "Read from mine.jsonl: 3 prompts, 1 with answers."
    assert read_request(of_prompts(lines[1:]), {}, {}).description == "Read from a list: 2 prompts, none with answers."
    (tmp_path / "mine.jsonl").write_text('{"text": "Gold."}\n{"prompt": "a"}')
    told = read_request(str(tmp_path / "mine.jsonl"), {}, {}).description
    assert told == "Read from mine.jsonl: 1 prompt, none with answers and 1 passage."


@pytest.mark.parametrize(("answer", "text"), [(5, "5"), (2.5, "2.5"), (["Au", 7], "Au"), ([7, "Au"], "7")])
def test_a_number_is_an_answer_too(answer: object, text: str) -> None:
    assert answer_of(answered("How many?", answer)) == text


@pytest.mark.parametrize("answer", [None, True, [], {"a": 1}, "  "])
def test_what_is_no_text_and_no_number_is_no_answer(answer: object) -> None:
    assert answered("How many?", answer) == "How many?"
