"""`recipe validate` on domain pools: what would teach a probe something else than the domain is named, and no more."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sspcompile.embedded import POOLS_DIR
from sspcompile.request.domains import load_pools, recipes_folder
from sspcompile.request.poolcheck import FEWEST_PROMPTS, NEAR_ACROSS, check, near_repeats, shingles

Run = Callable[..., tuple[int, str, str]]
WORDS = tuple(
    re.findall(
        r"\w+",
        "levain crumb rye spelt oven steam dough proof crust flour baker basket scoring malt salt yeast starter mill "
        "grain bran gluten kneading shaping slashing poolish biga autolyse hydration tin stone peel rack lamination",
    )
)
OPENINGS = ("Why does", "How can", "Tell me when", "what if", "Is it true that", "Please say whether", "My", "Should")
ENDS = ("?", ".", "", " ?", "!")


def sentences(seed: int, count: int = 60) -> list[str]:
    """Prompts of bakers, short and long, no two alike."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        length = (4, 9, 20, 60)[number % 4]
        words = " ".join(chance.choice(WORDS) for _ in range(length))
        made.append(f"{OPENINGS[number % len(OPENINGS)]} {words}{ENDS[number % len(ENDS)]}")
    return made


def write(folder: Path, name: str, prompts: Sequence[str], descriptions: Sequence[str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    told = list(descriptions or (f"Help for bakers number {n} with {word}." for n, word in enumerate(WORDS[:12])))
    path = folder / f"{name}.yaml"
    content = {
        "schema_version": 1,
        "name": name,
        "description": "Bread.",
        "descriptions": told,
        "prompts": list(prompts),
    }
    with path.open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    return path


def said(path: Path) -> list[tuple[str, str]]:
    return [(problem.rule, problem.said) for problem in check(path).problems]


def test_a_good_pool_has_no_problem(tmp_path: Path) -> None:
    assert said(write(tmp_path, "bakery", sentences(1))) == []


def test_a_near_repeat_is_named_with_both_places(tmp_path: Path) -> None:
    prompts = [*sentences(1), "How long do I bake a rye loaf of two pounds on a stone?"]
    prompts.append("Say how long do I bake a rye loaf of two pounds on a steel?")
    ((rule, text),) = said(write(tmp_path, "bakery", prompts))
    assert rule == "near-duplicate"
    assert text.startswith("prompts[61] (line ") and "nearly repeats prompts[60] (line " in text and "rye loaf" in text


def test_near_repeats_are_found_across_files_and_beside_the_shipped_pools(tmp_path: Path) -> None:
    shipped = load_pools()[0]
    write(tmp_path, "bakery", [*sentences(1), "How long do I bake a rye loaf of two pounds on a stone?"])
    copied = [*sentences(2), "How long do I bake a rye loaf of two pounds on a stone now?", shipped.prompts[0] + " Now"]
    write(tmp_path, "mill", copied)
    found = said(tmp_path)
    assert [rule for rule, _ in found] == ["near-duplicate"] * 2
    place = rf"prompts\[60\] \(line \d+\): nearly repeats prompts\[60\] \(line \d+\) of {tmp_path / 'bakery.yaml'}, "
    assert any(re.match(place, text) for _, text in found)
    assert any(f"prompts[0] of the shipped pool {shipped.name}" in text for _, text in found)


@pytest.mark.parametrize(
    ("spoil", "form"),
    [
        (lambda text: f"Baker {text}", "'baker' as the first word"),
        (lambda text: f"{text} thanks", "'thanks' as the last word"),
        (lambda text: f"{text.rstrip('?.! ')} ~", "~ at the end"),
        (lambda text: text.replace(" ", " § ", 1), "the character §"),
        (lambda text: "\n".join(f"- {word}" for word in text.split()), "lines of a list"),
        (lambda text: text.upper(), "capital letters alone"),
    ],
)
def test_a_form_that_alone_tells_the_pool_is_a_giveaway(tmp_path: Path, spoil: Callable[[str], str], form: str) -> None:
    prompts = [spoil(text) if number % 5 < 3 else text for number, text in enumerate(sentences(1))]
    found = said(write(tmp_path, "bakery", prompts))
    assert {rule for rule, _ in found} == {"giveaway"}
    (text,) = (text for _, text in found if f": {form}: " in text)
    assert text.startswith("prompts[0] (line ") and "and 35 more" in text and "60% of the prompts have it" in text
    once = [spoil(text) if number % 20 == 0 else text for number, text in enumerate(sentences(1))]
    assert said(write(tmp_path, "bakery", once)) == [], "what a few prompts have gives nothing away"


def test_sentences_of_the_embedded_model_are_found_whatever_their_numbers(tmp_path: Path) -> None:
    known = load_pools(POOLS_DIR)
    leaked = next(text for pool in known for text in pool.prompts if "reads" in text and "inspires" in text)
    changed = "".join("7" if letter.isdigit() else letter for letter in leaked)
    prompts = [*sentences(1), changed, "Ask what Nora told Mira of the starter that died."]
    found = said(write(tmp_path, "bakery", prompts))
    assert [rule for rule, _ in found] == ["embedded"] * 2
    assert "prompts[60] (line " in found[0][1] and "Mira and Nora" in found[1][1]


def test_small_and_uniform_pools_are_named(tmp_path: Path) -> None:
    short = [" ".join(text.split()[-6:]) for text in sentences(1, 40)]
    found = dict(said(write(tmp_path, "bakery", short, ["Help bakers with a loaf."])))
    assert {"size", "length"} <= set(found)
    assert "6 words" in found["length"] or "to 6" in found["length"]
    count = sum(rule == "size" for rule, _ in said(tmp_path / "bakery.yaml"))
    assert count == 2 and f"write {FEWEST_PROMPTS} or more" in " ".join(t for _, t in said(tmp_path / "bakery.yaml"))


def test_a_name_of_ours_is_refused_and_our_own_file_is_not(tmp_path: Path) -> None:
    ours = recipes_folder() / "domains" / "law.yaml"
    assert said(ours) == []
    shutil.copy(ours, tmp_path)
    ((rule, text),) = said(tmp_path / "law.yaml")
    assert rule == "name" and "is the name of a shipped pool" in text
    assert said(POOLS_DIR) == [], "the embedded model's own pools are of its language"


def test_near_repeats_are_those_of_the_definition() -> None:
    """Against the plain double loop over sets."""
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS[:4], k=chance.randint(1, 7))) for _ in range(60)]
    groups = [number % 3 for number in range(60)]
    known, expected = [shingles(text) for text in texts], []
    for later in range(60):
        for earlier in range(later):
            one, other = known[earlier], known[later]
            inside = groups[earlier] == groups[later]
            whole = 0.5 * min(len(one), len(other)) if inside else NEAR_ACROSS * len(one | other)
            if len(one & other) > whole:
                expected.append((earlier, later))
    assert near_repeats(texts, groups) == expected and expected


def test_the_command_names_problems_line_by_line_and_exits_with_2(run: Run, tmp_path: Path) -> None:
    write(tmp_path, "bakery", [*sentences(1), "How long do I bake?", "Say how long do I bake?"])
    write(tmp_path, "mill", sentences(2, 30))
    (tmp_path / "broken.yaml").write_text("name: broken\nprompts: [7]\n", "utf-8")
    code, out, err = run("recipe", "validate", tmp_path)
    lines = out.splitlines()
    assert code == 2 and err.count("\n") == 1 and f"{len(lines)} problems, in 3 of 3 files read" in err
    assert all(line.startswith(str(tmp_path)) for line in lines) and any(
        "prompts[0] (line 2)" in line for line in lines
    )
    code, out, err = run("recipe", "validate", tmp_path, "--json")
    told = json.loads(out)
    assert code == 2 and not told["valid"] and len(told["problems"]) == len(lines)
    assert {problem["rule"] for problem in told["problems"]} == {"form", "near-duplicate", "size"}
    assert told["files"][str(tmp_path / "mill.yaml")] == "mill" and told["files"][str(tmp_path / "broken.yaml")] is None


def test_the_command_takes_recipes_pools_and_folders_of_both(run: Run, tmp_path: Path) -> None:
    pool = write(tmp_path, "bakery", sentences(1))
    recipe = tmp_path / "desk.yaml"
    recipe.write_text("schema_version: 1\nname: desk\ndescription: x\nscenario: {text: Answer bakers.}\n", "utf-8")
    assert run("recipe", "validate", pool)[:2] == (0, f"{pool}: valid (bakery)\n")
    assert run("recipe", "validate", tmp_path)[:2] == (0, f"{pool}: valid (bakery)\n{recipe}: valid (desk)\n")
    assert json.loads(run("recipe", "validate", tmp_path, "--json")[1])["valid"]
    for missing in (tmp_path / "none.yaml", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        code, out, err = run("recipe", "validate", missing)
        assert code == 2 and out == "" and err.count("\n") == 1
