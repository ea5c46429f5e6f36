"""Domain pools and the strict YAML reader."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sspcompile.embedded import POOLS_DIR
from sspcompile.errors import RecipeError
from sspcompile.request.documents import read_yaml
from sspcompile.request.domains import (
    DomainPool,
    load_outside,
    load_pool,
    load_pools,
    pools_fingerprint,
    recipes_folder,
)
from sspcompile.request.poolcheck import EMBEDDED_NAMES, check, shares_of

GOOD = """\
schema_version: 1
name: {name}
description: What bakers ask.
descriptions: [Answer bakers., Help a bakery.]
prompts:
  - What is rye?
  - What is spelt?
"""


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_pool(path)
    assert "\n" not in str(caught.value)
    return caught.value.problems


def test_pools_come_sorted_by_name(tmp_path: Path) -> None:
    for name in ("rye", "oats"):
        write(tmp_path / f"{name}.yaml", GOOD.format(name=name))
    pools = load_pools(tmp_path)
    assert [pool.name for pool in pools] == ["oats", "rye"]
    assert pools[0].prompts == ("What is rye?", "What is spelt?")
    assert pools_fingerprint(pools) != pools_fingerprint(pools[::-1])


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    write(tmp_path / "rye.yaml", GOOD.format(name="wheat").replace("description:", "descripton:"))
    write(tmp_path / "oats.yaml", GOOD.format(name="oats") + "  - What is rye?\n  - 7\n")
    with pytest.raises(RecipeError) as caught:
        load_pools(tmp_path)
    text = "\n".join(caught.value.problems)
    for expected in (
        "rye.yaml: descripton (line 3): is not a known key; did you mean 'description'?",
        "rye.yaml: description: is missing",
        "rye.yaml: name (line 2): must equal the file's name, 'rye'",
        "oats.yaml: prompts[2] (line 8): repeats item 0",
        "oats.yaml: prompts[3] (line 9): must be text, not 7",
    ):
        assert expected in text


def test_pools_are_read_again_where_a_file_or_what_a_name_leads_to_has_changed(tmp_path: Path, monkeypatch) -> None:
    """A notebook edits its pools between builds, and goes from one folder to another."""
    for place, name in (("here", "oats"), ("there", "rye")):
        (tmp_path / place / "mine").mkdir(parents=True)
        write(tmp_path / place / "mine" / f"{name}.yaml", GOOD.format(name=name))
    for place, name in (("here", "oats"), ("there", "rye")):
        monkeypatch.chdir(tmp_path / place)
        assert [pool.name for pool in load_pools(Path("mine"))] == [name]
    before = load_pools(Path("mine"))
    assert load_pools(Path("mine")) is before, "what has not changed is read once"
    write(Path("mine/rye.yaml"), GOOD.format(name="rye") + "  - And what else?\n")
    assert len(load_pools(Path("mine"))[0].prompts) == len(before[0].prompts) + 1


def test_folder_without_pools_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no"):
        load_outside(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "must be a mapping"),
        (b"- a\n- b\n", "must be a mapping"),
        (b"a: 1\na: 2\n", "a (line 2): repeats the key of line 1"),
        (b"a: {b: 1, b: 2}\n", "a.b (line 1): repeats the key of line 1"),
        (b"a: &x [1]\nb: *x\n", "line 2: aliases"),
        (b"<<: {a: 1}\n", "keys must be plain words"),
        (b"1: a\n", "keys must be plain words"),
        (b"? [a]\n: b\n", "keys must be plain words"),
        (b"a: [" + b"[" * 500 + b"]" * 500 + b"]\n", "nested deeper"),
        (b"a: [1\n", "not valid YAML"),
        (b"a: 2026-02-31\n", "not valid YAML"),
        (b"a: " + b"9" * 6000, "not valid YAML"),
        (b"a: !!python/object:os.system x\n", "not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "not valid YAML"),
        (b"a: \x00\n", "not valid YAML"),
        (b"a: \xff\n", "not UTF-8"),
        ("a: 1\n".encode("utf-16"), "not UTF-8"),
        (b"a: x\n" * 60_000, "larger than 256 KB"),
    ],
)
def test_reader_refuses_what_is_no_plain_yaml_mapping(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_yaml(write(tmp_path / "x.yaml", content))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_reader_refuses_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(RecipeError, match="no such file"):
            read_yaml(path)


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path / "x.yaml", b"\xef\xbb\xbfa: 1\n")).value == {"a": 1}


def test_control_characters_are_refused_with_their_line(tmp_path: Path) -> None:
    content = GOOD.format(name="rye") + '  - "\\e[31mred"\n  - "  "\n'
    assert problems_of(write(tmp_path / "rye.yaml", content)) == [
        "prompts[2] (line 8): must not hold the control character U+001B",
        "prompts[3] (line 9): must not be blank",
    ]


def test_pools_of_the_embedded_model_are_valid() -> None:
    names = [pool.name for pool in load_pools(POOLS_DIR)]
    assert names == ["chemistry", "finance", "history", "math", "philosophy", "technology"]
    assert load_outside(POOLS_DIR / "outside")


# Of every pool that ships, so many prompts have these forms: neither the form nor its absence tells the domain.
FORMS = ("options A, B, C", "? at the end", "several lines", "rows of a table")


def test_the_pools_for_real_models_pass_their_own_check() -> None:
    found = check(recipes_folder() / "domains")
    assert found.problems == () and len(found.files) == len(load_pools()) + len(load_outside())


@pytest.mark.parametrize("pool", [*load_pools(), *load_outside()], ids=lambda pool: pool.name)
def test_pools_for_real_models_are_large_and_alike_in_form(pool: DomainPool) -> None:
    """Many prompts, short and long, of the same forms in every domain: more than is asked of a user's own pools."""
    inside = pool in load_pools()
    assert len(pool.prompts) >= (150 if inside else 50) and len(pool.descriptions) >= (25 if inside else 10)
    lengths = sorted(len(prompt.split()) for prompt in pool.prompts)
    assert lengths[len(lengths) // 10] <= 15 and lengths[-len(lengths) // 20] >= 100 and lengths[-1] <= 400
    shares = shares_of(pool.prompts)
    for name in FORMS:
        assert 0.05 <= shares[name] <= 0.6, f"{shares[name]:.0%} of {pool.name} have the form {name}"
    assert not EMBEDDED_NAMES & set(re.findall(r"\w+", " ".join(pool.prompts).lower()))


def test_at_least_fourteen_domains_ship() -> None:
    assert len(load_pools()) >= 14 and len(load_outside()) >= 8
    assert {pool.name for pool in load_pools(POOLS_DIR)} <= {pool.name for pool in load_pools()}
