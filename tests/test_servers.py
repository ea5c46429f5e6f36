"""`bench --server` against real HTTP servers on this machine that run the embedded model, and against faulty ones."""

from __future__ import annotations

import json
import re
import socket
from itertools import pairwise
from statistics import median

import jsonschema
import pytest
from serving import serving

from sspcompile.api.servers import ServerRequest, bench_servers, servers_of
from sspcompile.bench.metrics import SERVER_METRICS
from sspcompile.bench.server import Server, address
from sspcompile.bench.words import WORDS, prompt
from sspcompile.errors import InputError, RunError
from sspcompile.report.schema import schema_text

SHORT = ("--prompt-tokens", "12", "--new-tokens", "4", "--repeats", "3", "--concurrency", "1", "-q", "--api-key", "")


def test_two_servers_are_asked_in_turn_and_every_sample_is_kept(run, embedded, tmp_path):
    out = tmp_path / "servers.json"
    with serving(embedded) as dense, serving(embedded, models=("cut",)) as cut:
        args = ("--server", f"dense={dense.url}", "--server", f"cut={cut.url}/v1/", *SHORT, "--concurrency", "1,3")
        code, shown, err = run("bench", *args, "--json", "--out", out)
    assert code == 0, err
    found = json.loads(shown)
    assert json.loads(out.read_text()) == found and err == f"Samples: {out}\n"
    assert [(server["name"], server["model"], server["software"]) for server in found["servers"]] == [
        ("dense", "embedded", "tests"),
        ("cut", "cut", "tests"),
    ]
    assert found["rounds"] == 3
    jsonschema.validate(found, json.loads(schema_text("servers.schema.json")))
    for server, seen in zip(found["servers"], (dense, cut), strict=True):
        assert server["url"] == f"{seen.url}/v1"
        assert len(seen.asked) == (1 + 3) * (1 + 3), "a warm-up and three rounds of 1 and of 3 requests"
        for load, count in zip(server["loads"], (1, 3), strict=True):
            samples = load["metrics"]["first_token_seconds"]["samples"]
            assert len(samples) == 3 * count and len(load["warmup"]["first_token_seconds"]) == count
            assert load["metrics"]["first_token_seconds"]["median"] == pytest.approx(median(samples))
            assert len(load["metrics"]["output_tokens_per_second"]["samples"]) == 3
            assert load["new_tokens"] == [4] * 3 * count and load["fewer"] == 0 and load["counted"]
            assert len(load["prompt_tokens"]) == 3 * count and min(load["prompt_tokens"]) >= 12
    ratios = {(ratio["load"], ratio["metric"]): ratio for ratio in found["ratios"]}
    assert len(ratios) == 2 * len(SERVER_METRICS) == len(found["ratios"])
    assert all(ratio["reference"] == "dense" and ratio["interval"] for ratio in found["ratios"])
    for server in (dense, cut):
        for asked in server.asked:
            assert asked["ignore_eos"] and asked["stream"] and asked["temperature"] == 0 and asked["max_tokens"] == 4
            assert asked["path"] == "/v1/completions" and "messages" not in asked


def test_no_two_prompts_begin_alike_on_any_server_or_in_any_run(embedded):
    request = ServerRequest(concurrency=(1, 4), prompt_tokens=(8,), new_tokens=2, repeats=2)
    with serving(embedded) as server:
        # One server under two names, as one whose cache would answer the second of them.
        for _ in range(2):
            bench_servers(servers_of([f"a={server.url}", f"b={server.url}"], []), request)
    texts = [asked["prompt"].split() for asked in server.asked]
    assert all(len(words) == 8 for words in texts)
    assert len({tuple(words[:4]) for words in texts}) == len(texts)
    per_run = len(texts) // 2
    for part in (texts[:per_run], texts[per_run:]):
        assert len({words[0] for words in part}) == per_run, "nor in the first word, of a few"


def test_numbered_prompts_are_all_different_within_four_words_and_follow_from_the_seed():
    many = [tuple(prompt(5, number, 6).split()) for number in range(3 * len(WORDS))]
    assert len({words[:4] for words in many}) == len(many)
    assert all(one[0] != other[0] for one, other in pairwise(many))
    assert prompt(5, 7, 6) == prompt(5, 7, 6) != prompt(6, 7, 6)


def test_requests_of_a_load_are_at_the_server_at_once(embedded):
    """The server answers nobody before five are there, so a client that waits for one of them would wait forever."""
    request = ServerRequest(concurrency=(5,), prompt_tokens=(8,), new_tokens=3, repeats=2)
    with serving(embedded, together=5) as server:
        result = bench_servers(servers_of([server.url], []), request)
    assert server.peak == 5 and len(server.asked) == 15
    assert result.ratios == () and len(result.servers[0].loads[0].new_tokens) == 10
    for answer in result.servers[0].loads[0].metrics["first_token_seconds"].samples:
        assert answer > 0


def test_throughput_counts_the_tokens_of_all_requests_and_is_no_less_than_each_has(embedded):
    request = ServerRequest(concurrency=(3,), prompt_tokens=(8,), new_tokens=5, repeats=2)
    with serving(embedded) as server:
        (load,) = bench_servers(servers_of([server.url], []), request).servers[0].loads
    bursts = load.metrics["output_tokens_per_second"].samples
    for place, speed in enumerate(bursts):
        own = slice(3 * place, 3 * place + 3)
        first, step = (load.metrics[name].samples[own] for name in ("first_token_seconds", "token_interval_seconds"))
        slowest = max(a + 4 * b for a, b in zip(first, step, strict=True))
        assert speed <= 15 / slowest


def test_a_single_server_prints_its_figures_and_no_ratio(run, embedded):
    with serving(embedded) as server:
        code, out, err = run("bench", "--server", server.url, *SHORT)
    name = server.url.removeprefix("http://")
    assert code == 0 and err == "" and "time to first token" in out and "improvement" not in out.lower(), err
    told = " ".join(out.split())
    assert f"{name}: embedded at {server.url}/v1, by tests." in told and "no two prompts begin alike" in told
    assert "3 rounds" in told and "tokens, as it counts" in told


def test_fewer_tokens_than_asked_are_counted_and_said(run, embedded):
    with serving(embedded, fault="fewer") as server:
        code, out, err = run("bench", "--server", f"it={server.url}", *SHORT)
        found = json.loads(run("bench", "--server", f"it={server.url}", *SHORT, "--json")[1])
    assert code == 0, err
    assert "FEWER TOKENS: it, 1 at once, 12+4 tokens: 3 of 3 answers ended before the 4 tokens" in " ".join(out.split())
    load = found["servers"][0]["loads"][0]
    assert load["fewer"] == 3 and load["new_tokens"] == [2, 2, 2]
    answer = zip(load["metrics"]["output_tokens_per_second"]["samples"], load["new_tokens"], strict=True)
    assert all(speed > 0 for speed, _ in answer)


def test_a_server_that_does_not_count_has_its_pieces_counted_and_that_is_said(run, embedded):
    with serving(embedded, usage=False) as server:
        code, out, err = run("bench", "--server", f"it={server.url}", *SHORT)
    assert code == 0, err
    assert "the pieces of its streams were counted" in " ".join(out.split()) and "as it counts" not in out


def test_chat_is_asked_for_and_never_fallen_back_to(run, embedded):
    with serving(embedded) as server:
        assert run("bench", "--server", server.url, *SHORT, "--chat")[0] == 0
    assert {asked["path"] for asked in server.asked} == {"/v1/chat/completions"}
    assert all([message["role"] for message in asked["messages"]] == ["user"] for asked in server.asked)
    with serving(embedded, fault="no route") as server:
        assert run("bench", "--server", server.url, *SHORT)[0] == 1
    assert {asked["path"] for asked in server.asked} == {"/v1/completions"}


def test_nothing_but_the_question_and_the_key_is_sent(run, embedded, monkeypatch, tmp_path):
    """No proxy and no password of the environment, and the key only where one is given or in OPENAI_API_KEY."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-environment")
    args = SHORT[: SHORT.index("--api-key")]
    keys = []
    for given in ((), ("--api-key", "sk-given"), ("--api-key", "")):
        with serving(embedded) as server:
            code, out, err = run("bench", "--server", server.url, *args, *given, "--json")
        assert code == 0 and "sk-" not in out + err, err
        keys.append({headers.get("Authorization") for headers in server.headers})
        sent = {name.lower() for headers in server.headers for name in headers} - {"authorization"}
        assert sent == {
            "host",
            "accept",
            "accept-encoding",
            "connection",
            "user-agent",
            "content-length",
            "content-type",
        }
        fields = {name for asked in server.asked for name in asked} - {"path"}
        assert fields == {"model", "prompt", "max_tokens", "temperature", "stream", "stream_options", "ignore_eos"}
    assert keys == [{"Bearer sk-environment"}, {"Bearer sk-given"}, {None}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "answers 500 at .*/v1/completions: CUDA out of memory.*log"),
        ("404", "answers 404 .*The model `embedded` does not exist.*--served-model it=MODEL"),
        ("no route", "answers 404 at .*/v1/completions: Not Found.*OpenAI-compatible"),
        ("no key", "answers 401 .*Incorrect API key provided.*--api-key"),
        ("strict", "answers 422 .*ignore_eos.*--stop-at-eos"),
        ("no stream", "with application/json where a stream was asked for"),
        ("other events", "something else than a completion: .*token"),
        ("cut off", "stopped in the middle of an answer"),
        ("error on the way", "stopped after 3 pieces of its answer: The engine died"),
        ("no end", "stopped after 4 pieces of its answer"),
        ("no list", "answers 404 at .*/v1/models: Not Found.*OpenAI-compatible"),
        ("another page", "something else than a list of models"),
    ],
)
def test_a_server_that_cannot_be_measured_is_one_line(run, embedded, tmp_path, fault, message):
    with serving(embedded, fault=fault) as server:
        code, out, err = run("bench", "--server", f"it={server.url}", *SHORT, "--out", tmp_path / "out.json")
    assert code == 1 and out == "" and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_refuses_ignore_eos_is_measured_without_it(run, embedded):
    with serving(embedded, fault="strict") as server:
        assert run("bench", "--server", server.url, *SHORT, "--new-tokens", "2", "--stop-at-eos")[0] == 0
    assert not any("ignore_eos" in asked for asked in server.asked)


def test_nothing_at_the_address_is_one_line(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]  # nobody listens there
        code, out, err = run("bench", "--server", f"http://127.0.0.1:{port}", *SHORT)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert re.search(rf"Nothing answers at http://127.0.0.1:{port}/v1: .*Start the server", err), err


def test_a_server_that_says_nothing_ends_with_the_seconds_that_it_may_take(embedded):
    request = ServerRequest(concurrency=(2,), prompt_tokens=(8,), new_tokens=2, repeats=2, seconds=1.0)
    with serving(embedded, fault="silent") as server, pytest.raises(RunError, match=r"No round.*--max-seconds"):
        bench_servers(servers_of([server.url], []), request)


def test_rounds_that_ended_in_time_are_shown_and_the_others_told_of(run, embedded):
    code, out, err = 1, "", ""
    with serving(embedded) as server:
        args = ("--repeats", "100000", "--max-seconds", "2", "--json")
        code, out, err = run("bench", "--server", server.url, *SHORT, *args)
    found = json.loads(out)
    assert code == 0 and 1 <= found["rounds"] < 100000, err
    samples = found["servers"][0]["loads"][0]["metrics"]["first_token_seconds"]["samples"]
    assert len(samples) == found["rounds"]


@pytest.mark.parametrize(
    ("models", "given", "message"),
    [
        (("a", "b"), (), "it serves a, b.*--served-model it=MODEL"),
        ((), (), "it serves no model"),
        (("a",), ("--served-model", "c"), "it does not serve 'c'.*It serves a"),
        (tuple("abcdefghijk"), (), "and 3 more"),
    ],
)
def test_a_model_that_is_not_there_is_one_line_with_those_that_are(run, embedded, models, given, message):
    with serving(embedded, models=models) as server:
        code, out, err = run("bench", "--server", f"it={server.url}", *SHORT, *given)
    assert code == 1 and out == "" and err.count("\n") == 1 and re.search(message, err), err
    assert server.asked == []


def test_one_server_may_hold_both_models(run, embedded):
    with serving(embedded, models=("a", "b")) as server:
        named = ("--server", f"dense={server.url}", "--server", f"cut={server.url}")
        code, _, err = run("bench", *named, "--served-model", "dense=a", "--served-model", "cut=b", *SHORT)
    assert code == 0, err
    assert [asked["model"] for asked in server.asked] == ["a", "b", "b", "a", "a", "b", "b", "a"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--server", "localhost:8000"), "'localhost:8000' is not an address.*http://localhost:8000"),
        (("--server", "ftp://localhost"), "is not an address"),
        (("--server", "http://name:secret@localhost"), "more than an address.*--api-key"),
        (("--server", "http://localhost?key=1"), "more than an address"),
        (("--server", "http://localhost:99999"), "is not an address"),
        (("--server", "http://a", "--server", "http://a/v1"), "Two servers are called a.*NAME=URL"),
        (("--server", "http://a", "--served-model", ""), "names no model"),
        (("--server", "http://a", "--prompt-tokens", "2"), "--prompt-tokens is 2.*at least 4"),
        (("--server", "http://a", "--api-key", "a\nb"), "--api-key holds characters"),
        (("--server", "http://a", "--batch", "2"), "--batch does not go with --server"),
        (("--server", "http://a", "--threads", "2"), "--threads does not go with --server"),
        (("some-artifact", "--server", "http://a"), "An ARTIFACT does not go with --server"),
        (("--concurrency", "2"), "--concurrency needs a --server"),
        (("--out", "x.json"), "--out needs a --server"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_anything_is_sent(run, args, message):
    code, out, err = run("bench", *args, "-q")
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(message, err), err
    assert "secret" not in err


def test_a_file_that_is_there_is_kept(run, embedded, tmp_path):
    out = tmp_path / "servers.json"
    out.write_text("mine")
    with serving(embedded) as server:
        for place, message in (
            (out, "there already.*--overwrite"),
            (tmp_path, "a folder"),
            (out / "x", "not a folder"),
        ):
            code, _, err = run("bench", "--server", server.url, *SHORT, "--out", place)
            assert code == 2 and re.search(message, err), err
        assert server.asked == [] and out.read_text() == "mine"
        assert run("bench", "--server", server.url, *SHORT, "--out", out, "--overwrite")[0] == 0
    assert json.loads(out.read_text())["rounds"] == 3


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("http://localhost:8000/", "http://localhost:8000/v1"),
        ("https://host/v1/", "https://host/v1"),
        ("http://host/api/v2", "http://host/api/v2"),
        ("http://host/deep/place", "http://host/deep/place/v1"),
    ],
)
def test_an_address_ends_with_its_version(given, found):
    assert address(given) == found


def test_a_model_of_all_servers_and_of_one():
    servers = servers_of(["a=http://x", "http://y:1"], ["m", "a=n"])
    assert servers == (Server("a", "http://x/v1", "n"), Server("y:1", "http://y:1/v1", "m"))
    assert servers_of(["http://x"], ["org/some=model"])[0].model == "org/some=model"
    with pytest.raises(InputError, match="not an address"):
        servers_of(["a="], [])
