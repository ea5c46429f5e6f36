"""The recall protocol by hand, and what the readers of labelled data accept and refuse."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.errors import InputError
from sspcompile.evaluate.questions import read_data
from sspcompile.evaluate.recall import STOPWORDS, exact_match, keyword_recall, letter


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The capital is Paris.", ["Paris"], 1),
        ("paris", ["The city of Paris"], 1 / 2),  # {city, paris}
        ("copper and zinc", ["copper, zinc, tin"], 2 / 3),
        ("copper copper copper", ["copper tin"], 1 / 2),  # a set: repeating gains nothing
        ("gold", ["silver", "gold"], 1),  # the second alternative counts
        ("gold ring", ["silver spoon", "gold chain"], 1 / 2),
        ("about 3.14", ["3.15"], 1),  # exactly 0.01 apart
        ("about 3.139", ["3.15"], 0),
        ("1,000 kg", ["1000"], 1),
        ("-5", ["5"], 0),
        ("\u22125 degrees", ["-5"], 1),
        ("H2O", ["h2o"], 1),
        ("it is", ["what it is"], 2 / 3),  # nothing but stop words: all words count
        ("not allowed", ["not"], 1),
        ("", ["gold"], 0),
        ("?", ["?"], 1),
    ],
)
def test_keyword_recall_worked_by_hand(prediction, answers, expected):
    assert keyword_recall(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        (" (c) iron", "C"),
        ("D. zinc", "D"),
        ("A) gold", "A"),
        ("The answer is B", "B"),
        ("I think option (c).", "C"),
        ("Answer: d", "D"),
        ("It must be (B), the metal.", "B"),
        ("A metal", None),
        ("Because", None),
        ("gold", None),
        ("", None),
    ],
)
def test_letter_of_a_choice(text, expected):
    assert letter(text) == expected


def test_choices_are_compared_by_letter_and_by_words_without_one():
    assert keyword_recall("B. copper", ["B"], "multiple_choice") == 1
    assert keyword_recall("A. not B", ["B"], "multiple_choice") == 0
    assert keyword_recall("copper", ["B"], "multiple_choice") == 0
    assert keyword_recall("copper", ["copper"], "multiple_choice") == 1


words = st.lists(st.sampled_from(["gold", "iron", "the", "not", "7", "2.5", "zinc"]), min_size=1, max_size=6)


@given(words, words, st.randoms())
def test_recall_ignores_order_case_repetition_and_stop_words(prediction, reference, random):
    plain = keyword_recall(" ".join(prediction), [" ".join(reference)])
    other = [*prediction, *prediction]
    random.shuffle(other)
    if set(prediction) - STOPWORDS:
        other.append("of")
    assert keyword_recall(" ".join(other).upper(), [" ".join(reversed(reference))]) == plain
    assert 0 <= plain <= 1 and keyword_recall(" ".join(reference), [" ".join(reference)]) == 1
    assert keyword_recall(" ".join(prediction), ["nothing", " ".join(reference)]) >= plain


def test_exact_match_takes_any_alternative_and_no_near_miss():
    assert exact_match(" gold ", ["silver", "gold"]) and not exact_match("Gold", ["gold"])


SCENARIO = {
    "scenario_id": "s1",
    "domain": "chemistry",
    "topic_description": "Metals.",
    "turns": [
        {"prompt": "Symbol of gold?", "answer": ["Au", "au"], "task_type": "factual"},
        {"prompt": "And of iron?", "answer": "Fe", "task_type": "multiple_choice"},
    ],
}


def test_scenarios_pools_folders_and_lines_are_read(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.json").write_text(json.dumps(SCENARIO))
    cross = {**SCENARIO, "cross_domains": ["math", "history"]}
    del cross["domain"]
    (tmp_path / "deep" / "b.json").write_text(json.dumps([cross]))
    (tmp_path / "pool.json").write_text('["What is gold?", "What is iron?"]')
    first, second, *pool = read_data(tmp_path)
    assert [turn.answers for turn in first.turns] == [("Au", "au"), ("Fe",)]
    assert [turn.task_type for turn in first.turns] == ["factual", "multiple_choice"]
    assert {turn.domain for turn in second.turns} == {"math+history"}
    assert [c.turns[0].prompt for c in pool] == ["What is gold?", "What is iron?"] and not pool[0].turns[0].answers
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a\u2028b", "answer": "c", "domain": "math"}\n\n')
    (line,) = read_data(tmp_path / "lines.jsonl")
    assert line.turns[0].prompt == "a\u2028b" and line.turns[0].domain == "math"


def changed(**turn: object) -> str:
    return json.dumps({**SCENARIO, "turns": [{**SCENARIO["turns"][0], **turn}]})


MALFORMED = {
    "no JSON": ("s.json", "{", "not JSON"),
    "too deep": ("s.json", "[" * 100_000, "not JSON"),
    "a number": ("s.json", "7", "neither a list nor a scenario"),
    "empty list": ("s.json", "[]", "no prompts"),
    "list of numbers": ("s.json", "[1]", "entry 0"),
    "blank prompt in a pool": ("s.json", '[" "]', "entry 0 must not be blank"),
    "empty turns": ("s.json", json.dumps({**SCENARIO, "turns": []}), "turns needs at least 1"),
    "turns of the wrong type": ("s.json", json.dumps({**SCENARIO, "turns": "none"}), "turns must be a list"),
    "turn that is text": ("s.json", json.dumps({**SCENARIO, "turns": ["hello"]}), r"turns\[0\]"),
    "missing answer": ("s.json", json.dumps({**SCENARIO, "turns": [{"prompt": "a"}]}), r"turns\[0\].answer is missing"),
    "missing turns": ("s.json", json.dumps({"scenario_id": "s", "domain": "a"}), "turns is missing"),
    "answer of the wrong type": ("s.json", changed(answer=[{}, "a"]), r"turns\[0\].answer must be text or a list"),
    "no alternatives": ("s.json", changed(answer=[]), "must be text or a list"),
    "blank alternative": ("s.json", changed(answer=["a", " "]), "blank"),
    "prompt of the wrong type": ("s.json", changed(prompt=None), "prompt must be text"),
    "unknown task_type": ("s.json", changed(task_type="riddle"), "task_type must be one of multiple_choice, factual"),
    "no domain": ("s.json", json.dumps({"scenario_id": "s", "turns": SCENARIO["turns"]}), "domain or cross_domains"),
    "line without answer": ("d.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "line 2: answer is missing"),
    "line that is not valid JSON": ("d.jsonl", '{"prompt"', "line 1 is not JSON"),
    "line that is a list": ("d.jsonl", "[]", "line 1 must be a JSON object"),
    "no lines": ("d.jsonl", "\n", "no prompts"),
    "other file": ("d.csv", "a,b", r"\.csv file"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_data_is_refused_in_one_line_that_names_the_place(case, tmp_path):
    name, content, expected = MALFORMED[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=expected) as caught:
        read_data(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(("answer", "texts"), [(5, ("5",)), ([2.5, "two and a half"], ("2.5", "two and a half"))])
def test_numbers_are_answers_as_they_are_to_a_build(answer, texts, tmp_path):
    (tmp_path / "sums.jsonl").write_text(json.dumps({"prompt": "How many?", "answer": answer}))
    ((question,),) = (one.turns for one in read_data(tmp_path / "sums.jsonl"))
    assert question.answers == texts


def test_binary_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no \.json files"):
        read_data(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        read_data(tmp_path)
