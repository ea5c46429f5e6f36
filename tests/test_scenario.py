"""What `--scenario` accepts and how it refuses the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sspcompile.errors import RecipeError, ScenarioError
from sspcompile.request.request import read_request
from sspcompile.request.scenario import LINE_BYTES, of_prompts, read_scenario, scenario_of, slug


def refused(value: str | Path) -> str:
    with pytest.raises(ScenarioError) as caught:
        read_scenario(str(value))
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert caught.value.hint
    return message


def test_a_sentence() -> None:
    scenario, recipe = read_scenario("  Answer questions\nabout TCP/IP networks. ")
    assert recipe is None
    assert scenario.source == "sentence"
    assert scenario.text == "Answer questions about TCP/IP networks."
    assert scenario.name == "answer-questions-about-tcp-ip-networks"
    assert scenario.prompts == ()


def test_a_long_sentence_is_no_path() -> None:
    assert read_scenario("word " * 2000)[0].source == "sentence"


def test_a_recipe_file_with_prompts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a b"}\n\n{"prompt": "c", "id": 2}\n', "utf-8")
    path = tmp_path / "r.yml"
    path.write_text("schema_version: 1\nname: x\ndescription: y\nscenario: {prompts_file: p.jsonl}\n", "utf-8")
    scenario, recipe = read_scenario(str(path))
    assert scenario.source == "recipe"
    assert scenario.prompts == ("a b", "c")
    assert recipe is not None
    assert recipe.scenario.prompts == scenario.prompts
    assert scenario_of(recipe) == scenario


def test_prompts_in_python_are_texts_or_mappings_like_lines_of_a_file(tmp_path: Path) -> None:
    lines = [
        {"prompt": "Gold?", "answer": "Au"},
        {"messages": [{"role": "user", "content": "Iron?"}]},
        {"text": "Tin."},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\r\n" for line in lines), "utf-8")
    read = read_scenario(str(tmp_path / "p.jsonl"))[0].prompts
    assert of_prompts(lines).prompts == of_prompts(line for line in lines).prompts == read
    assert of_prompts(["a\r\nb\r\n", "c"]).prompts == ("a\nb", "c")
    assert of_prompts(lines[0]).prompts == read[:1], "a mapping by itself is no list of its keys"
    for wrong, told in (
        ([], "no prompts"),
        (iter(()), "no prompts"),
        ([3], "neither text"),
        ([{"a": 1}], "Prompt 1 has"),
    ):
        with pytest.raises(ScenarioError, match=told):
            of_prompts(wrong)


@pytest.mark.parametrize("own", ["text: two words", "prompts: [a b, c]", "prompts_file: p.txt"])
def test_domains_may_stand_beside_a_description(tmp_path: Path, own: str) -> None:
    (tmp_path / "p.txt").write_text("a b\nc\n", "utf-8")
    path = tmp_path / "r.yaml"
    path.write_text(
        f"schema_version: 1\nname: x\ndescription: y\nscenario: {{{own}, domains: {{law: 1, math: 3}}}}\n", "utf-8"
    )
    scenario, recipe = read_scenario(str(path))
    assert scenario.domains == {"law": 0.25, "math": 0.75}
    assert scenario.texts == (("two words",) if own.startswith("text") else ("a b", "c"))
    assert recipe is not None
    assert scenario_of(recipe) == scenario


def test_domain_weights_are_scaled_to_sum_one() -> None:
    scenario, _ = read_scenario("chemistry-and-finance")
    assert scenario.domains is not None
    assert sum(scenario.domains.values()) == pytest.approx(1)
    with pytest.raises(TypeError):
        scenario.domains["math"] = 1.0  # type: ignore[index]


def test_prompt_files(tmp_path: Path) -> None:
    txt = tmp_path / "My Prompts.txt"
    txt.write_bytes("\ufeffWhat is rye?\r\n\r\n  Was ist Öl\u2028heute?  \n".encode())
    scenario, recipe = read_scenario(str(txt))
    assert recipe is None
    assert scenario.name == "my-prompts"
    assert scenario.source == "prompts"
    assert scenario.prompts == ("What is rye?", "Was ist Öl\u2028heute?")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", b" \n\n", "holds no prompts"),
        ("a.jsonl", b"\n", "holds no prompts"),
        ("a.txt", b"\x7fELF\x00\x01", "binary"),
        ("a.txt", "hello there".encode("utf-16"), "binary"),
        ("a.txt", b"fine\nM\xfcnchen\n", "line 2 is not UTF-8"),
        ("a.txt", b"fine\n\x1b[2Jhidden\n", "line 2 must not hold the control character U+001B"),
        ("a.txt", b"x" * (LINE_BYTES + 1), "line 1 is longer than"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2 is not JSON (Expecting value)"),
        ("a.jsonl", b'{"content": "a"}\n', "line 1 has none of the keys prompt, messages"),
        ("a.jsonl", b'{"prompt": 7}\n', "line 1 has no text under the key 'prompt'"),
        ("a.jsonl", b'["prompt"]\n', "line 1 must be a JSON object"),
        ("a.jsonl", b'{"prompt": "\\ud800"}\n', "lone surrogate"),
        ("a.jsonl", b'{"prompt": "\\u0007"}\n', "control character U+0007"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b"9" * 10_000, "is not JSON"),
        ("a.csv", b"a,b", "is a .csv file"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in refused(path)


def test_values_that_are_neither_file_nor_sentence(tmp_path: Path) -> None:
    assert "is empty" in refused(" ")
    assert "Did you mean 'chemistry-lab'" in refused("chemistry")
    assert "one word" in refused("xyzzy")
    assert "is a folder" in refused(tmp_path)
    for missing in ("none.txt", "none.jsonl", "none.yaml", "my prompts.txt", "some/where"):
        assert "There is no file" in refused(missing)
    assert "U+001B" in refused("look \x1b[31m red")
    assert "longer than" in refused("many words " * 100_000)


def test_a_broken_recipe_stays_a_recipe_error(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\n", "utf-8")
    with pytest.raises(RecipeError):
        read_scenario(str(path))


@pytest.mark.parametrize(("file", "expected"), [("no.txt", "There is no file"), ("r.yaml", "is not a .txt or .jsonl")])
def test_a_recipe_whose_prompt_file_is_unusable_names_it(tmp_path: Path, file: str, expected: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f"schema_version: 1\nname: x\ndescription: y\nscenario: {{prompts_file: {file}}}\n", "utf-8")
    message = refused(path)
    assert file in message and expected in message


@pytest.mark.parametrize("value", ["Answer bakers about flour.", "chemistry-and-finance"])
def test_the_recipe_of_a_request_says_the_same_scenario(value: str) -> None:
    scenario, _ = read_scenario(value)
    again = scenario_of(read_request(value, {}, {}).recipe())
    assert (again.name, again.text, again.prompts) == (scenario.name, scenario.text, scenario.prompts)
    assert again.domains == scenario.domains


@given(st.text())
def test_slug_is_always_a_safe_folder_name(text: str) -> None:
    name = slug(text)
    assert 0 < len(name) <= 64
    assert all(c in "abcdefghijklmnopqrstuvwxyz0123456789-" for c in name)
    assert name[0] != "-"


def test_slugs_of_different_long_or_foreign_texts_differ() -> None:
    long = "answer " * 20
    assert slug(long + "a") != slug(long + "b")
    assert slug("化学") != slug("历史")
    assert json.dumps(slug("Ärzte fragen"), ensure_ascii=True) == '"arzte-fragen"'
