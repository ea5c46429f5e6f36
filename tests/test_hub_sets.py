"""Data sets of the hub as scenarios: from huggingface_hub's own cache, and from a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hub import REVISION, ask, hub

from sspcompile.errors import ScenarioError
from sspcompile.request import hub as hub_sets
from sspcompile.request.hub import RECORDS, tables_of
from sspcompile.request.prompts import Message, Passage, answer_of, asked_of
from sspcompile.request.request import read_request
from sspcompile.request.scenario import Scenario, read_scenario
from sspcompile.request.splits import OWN_FIT_PROMPTS, OWN_GUARD_PROMPTS, OWN_JUDGE_PROMPTS, own_fit_part, split

NAME = "org/questions"
# What a record of each form is asked, and its answer.
FORMS: Mapping[str, tuple[dict[str, Any], object, str | None]] = {
    "prompt": ({"prompt": "Gold?", "answer": "Au", "level": 2}, "Gold?", "Au"),
    "question": ({"question": "Gold?", "answer": "Au"}, "Gold?", "Au"),
    "instruction": ({"instruction": "Name it.", "input": "gold", "output": "Au"}, "Name it.\ngold", "Au"),
    "messages": (
        {"messages": [{"role": "user", "content": "Gold?"}, {"role": "assistant", "content": "Au"}]},
        "Gold?",
        "Au",
    ),
    "conversations": ({"conversations": [{"from": "human", "value": "Gold?"}], "source": "x"}, "Gold?", None),
    "text": ({"text": " Gold is a metal.\n"}, Passage(" Gold is a metal.\n"), None),
}


def cached(cache: Path, files: Mapping[str, bytes], name: str = NAME, commit: str = REVISION) -> None:
    """Lay a data set out as huggingface_hub's cache holds it: blobs by their digest, snapshots of links to them."""
    folder = cache / f"datasets--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "blobs").mkdir(exist_ok=True)
    for path, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


def lines(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is number {n}?", "answer": f"It is {n}."} for n in range(count)]


def parquet(path: Path, records: list[dict[str, Any]], rows: int = 100) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(records), path, row_group_size=rows)
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a hub that is out of reach."""
    ask(monkeypatch, None, tmp_path / "hub")
    return tmp_path / "hub"


def read(value: str) -> Scenario:
    scenario, recipe = read_scenario(value)
    assert recipe is None
    return scenario


def refused(value: str) -> str:
    with pytest.raises(ScenarioError) as caught:
        read_scenario(value)
    assert "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format_", ["jsonl", "json", "parquet"])
def test_columns_are_recognised_as_in_files_of_prompts(cache: Path, tmp_path: Path, form: str, format_: str) -> None:
    record, asked, answer = FORMS[form]
    content = {
        "jsonl": lambda: lines(record),
        "json": lambda: json.dumps([record]).encode(),
        "parquet": lambda: parquet(tmp_path / "x.parquet", [record]),
    }[format_]()
    cached(cache, {f"train.{format_}": content})
    (prompt,) = read(f"hub:{NAME}").prompts
    assert asked_of(prompt) == asked and answer_of(prompt) == answer


@pytest.mark.parametrize("format_", ["jsonl", "json", "parquet"])
def test_as_many_records_as_a_build_can_use_are_drawn_evenly(cache: Path, tmp_path: Path, format_: str) -> None:
    records, rest = numbered(2500), numbered(4000)[2500:]
    content = {
        "jsonl": lambda part, _: lines(*part),
        "json": lambda part, _: json.dumps(part).encode(),
        "parquet": lambda part, name: parquet(tmp_path / name, part),
    }[format_]
    cached(cache, {f"data/train-0.{format_}": content(records, "a"), f"data/train-1.{format_}": content(rest, "b")})
    scenario = read(f"hub:{NAME}:train")
    places = [int(str(asked_of(prompt)).split()[-1][:-1]) for prompt in scenario.prompts]
    assert len(places) == RECORDS and places == [n * 4000 // RECORDS for n in range(RECORDS)]
    fit, guard, judge = split(scenario.prompts)
    assert len(own_fit_part(scenario.prompts)) == OWN_FIT_PROMPTS <= len(fit)
    assert len(guard) == OWN_GUARD_PROMPTS and len(judge) == OWN_JUDGE_PROMPTS
    request = read_request(scenario, {}, {})
    told = "768 of 4000 records: 768 prompts, 768 with answers."
    assert request.description == f"Read from hub:{NAME}@{REVISION[:12]}:default/train, {told}"
    assert scenario.name == "org-questions-train" and request.recipe().scenario.prompts == scenario.prompts


def test_of_many_files_a_few_are_read(cache: Path) -> None:
    cached(cache, {f"train-{n:02}.jsonl": lines({"prompt": f"What is {n}?"}) for n in range(12)})
    scenario = read(f"hub:{NAME}")
    assert scenario.prompts == ("What is 0?", "What is 3?", "What is 6?", "What is 9?")
    assert "4 of 4 records in 4 of 12 files" in (scenario.origin or "")


def test_records_without_a_prompt_are_left_out_and_counted(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached(cache, {"train.jsonl": lines({"text": ""}, {"text": "Gold."}, {"text": "a\x07"}, {"text": "Iron."})})
    caplog.set_level("INFO", "sspcompile")
    scenario = read(f"hub:{NAME}")
    assert scenario.prompts == (Passage("Gold."), Passage("Iron."))
    assert "4 of 4 records, 2 of them left out" in (scenario.origin or "") and len(caplog.records) == 1
    cached(cache, {"train.jsonl": lines({"review": "Good.", "label": 1})}, "org/reviews")
    message = refused("hub:org/reviews")
    assert "has none of the keys prompt, messages" in message and "Recognised columns: prompt" in message


CARD = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/first-*
  - split: test
    path: [main/second.jsonl]
- config_name: short
  data_dir: brief
---
# Questions
"""


def test_the_card_says_which_files_a_split_has(cache: Path) -> None:
    every = {"main/first-1.jsonl": "a b", "main/second.jsonl": "c d", "brief/dev.jsonl": "e f", "other.jsonl": "g h"}
    cached(cache, {"README.md": CARD, **{path: lines({"prompt": text}) for path, text in every.items()}})
    for asked, text in {"main/train": "a b", "main/test": "c d", "main": "a b", "short/validation": "e f"}.items():
        assert read(f"hub:{NAME}:{asked}").prompts == (text,)
    for asked in ("", ":dev", ":main/dev", ":other/train", ":train"):
        message = refused(f"hub:{NAME}{asked}")
        assert "It has :main/train, :main/test, :short/validation." in message and "local cache" in message


def test_a_configuration_that_the_card_marks_needs_no_name(cache: Path) -> None:
    card = CARD.replace(b"- config_name: main", b"- config_name: main\n  default: true")
    files = {"main/first-1.jsonl": lines({"prompt": "a b"}), "brief/train.jsonl": lines({"prompt": "e f"})}
    cached(cache, {"README.md": card, **files})
    assert read(f"hub:{NAME}").prompts == ("a b",) and read(f"hub:{NAME}:train").prompts == ("a b",)
    cached(cache, {"README.md": b"---\n- [\n---\n", "train.jsonl": lines({"prompt": "a"})}, "org/broken")
    assert "README.md of the data set cannot be read" in refused("hub:org/broken")


@pytest.mark.parametrize(
    ("files", "tables"),
    [
        (["train.jsonl", "test.jsonl"], {("default", "train"), ("default", "test")}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {("default", "train")}),
        (["default/train/0000.parquet", "default/dev/0000.parquet"], {("default", "train"), ("default", "validation")}),
        (["en/test.json", "de/test.json"], {("en", "test"), ("de", "test")}),
        (["questions.jsonl"], {("default", "train")}),
        (["validation/a.jsonl", "my-val.jsonl"], {("default", "validation")}),
        (["trainer.jsonl", "valuable.jsonl"], {("default", "train")}),
    ],
)
def test_names_tell_splits_where_no_card_does(files: list[str], tables: set[tuple[str, str]]) -> None:
    found = tables_of(files)
    assert set(found) == tables and sorted(file for part in found.values() for file in part) == sorted(files)


def test_of_two_formats_of_a_split_one_is_read_and_no_file_that_describes_it(cache: Path) -> None:
    every = {
        "train.jsonl": lines({"prompt": "a b"}),
        "train.parquet": b"PAR1",
        "dataset_infos.json": b'{"default": {}}',
    }
    cached(cache, every)
    assert read(f"hub:{NAME}").prompts == ("a b",)


REFUSED = {
    "no owner": ("hub:questions", {}, "names no data set of the hub"),
    "nothing": ("hub:", {}, "names no data set"),
    "words": ("hub: a helpdesk for gold", {}, "names no data set"),
    "way out of the cache": ("hub:org/../../etc", {}, "names no data set"),
    "not in the cache": ("hub:org/none", {}, "offline, and org/none is not in the local cache"),
    "revision that is not there": ("hub:org/questions@v2", {}, "revision v2 of org/questions is not in the local"),
    "other files": (f"hub:{NAME}", {"train.csv": b"a,b"}, "holds no .jsonl, .json, .parquet file"),
    "empty": (f"hub:{NAME}", {"train.jsonl": b"\n"}, "holds no prompts"),
    "not JSON": (f"hub:{NAME}", {"train.jsonl": b'{"prompt": "a"}\n{'}, "train.jsonl, record 2 is not JSON"),
    "not UTF-8": (f"hub:{NAME}", {"train.jsonl": b"\xff\xfe"}, "train.jsonl, record 1 is not JSON"),
    "nested": (f"hub:{NAME}", {"train.json": b'{"data": [{"prompt": "a"}]}'}, "has none of the keys"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(cache: Path, case: str) -> None:
    value, files, expected = REFUSED[case]
    cached(cache, files or {"train.jsonl": lines({"prompt": "a"})})
    assert expected in refused(value)


def test_a_parquet_file_that_is_none_is_refused(cache: Path) -> None:
    pytest.importorskip("pyarrow")
    cached(cache, {"train.parquet": b"PAR1 and no more"})
    assert "train.parquet is not a readable parquet file" in refused(f"hub:{NAME}")


def test_a_file_that_is_too_large_is_not_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(cache, {f"train-{n}.jsonl": lines({"prompt": f"{n} {n}"}) for n in range(4)})
    monkeypatch.setattr(hub_sets, "DOWNLOADED_BYTES", 2 * len(lines({"prompt": "0 0"})))
    assert read(f"hub:{NAME}").prompts == ("0 0", "2 2")
    monkeypatch.setattr(hub_sets, "DOWNLOADED_BYTES", 4)
    assert "is larger than" in refused(f"hub:{NAME}")


def command(cache: Path, *args: object, before: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, the hub out of reach."""
    code = f"import sys\n{before}\nfrom sspcompile.cli.main import main\nmain(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_line_takes_a_cached_data_set(tmp_path: Path) -> None:
    cached(tmp_path / "hub", {"train.jsonl": lines(*numbered(20))})
    done = command(tmp_path / "hub", "build", "--scenario", f"hub:{NAME}", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["name"] == "org-questions" and "20 of 20 records" in told["description"]
    assert told["scenario"]["prompts"][3][-1] == {"role": "assistant", "content": "It is 3."}


def test_without_pyarrow_one_line_names_the_extra(tmp_path: Path) -> None:
    cached(tmp_path / "hub", {"train.parquet": b"PAR1"})
    given = ("build", "--scenario", f"hub:{NAME}", "--dry-run")
    done = command(tmp_path / "hub", *given, before="sys.modules['pyarrow'] = None")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'sspcompile[datasets]'" in done.stderr


def test_only_what_is_read_is_fetched_and_the_commit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in {
        "README.md": b"---\nlicense: mit\n---\n",
        "train.jsonl": lines(*numbered(9)),
        "test.jsonl": lines(*numbered(2)),
        "weights.bin": b"x",
    }.items():
        (folder / name).write_bytes(content)
    with hub(NAME, folder, kind="datasets") as (address, fetched):
        ask(monkeypatch, address, tmp_path / "hub")
        scenario = read(f"hub:{NAME}:train")
        assert sorted(fetched) == ["README.md", "train.jsonl"] and len(scenario.prompts) == 9
        assert "revision v9 on the hub" in refused(f"hub:{NAME}@v9")
    ask(monkeypatch, None, tmp_path / "hub")
    assert read(f"hub:{NAME}:train") == scenario, "the cache answers where the hub does not"
    assert f"What the local cache holds of {NAME} has no split default/test." in refused(f"hub:{NAME}:test")


def test_a_message_of_a_record_keeps_its_role(cache: Path) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Gold?"}]
    cached(cache, {"train.jsonl": lines({"messages": said})})
    assert read(f"hub:{NAME}").prompts == ((Message("system", "Be brief."), Message("user", "Gold?")),)
