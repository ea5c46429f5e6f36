"""The harness on an artifact and its dense model, with a task that is defined here: `make test-lm-eval`."""

from __future__ import annotations

import json

import pytest
from commands import shell
from test_cli import refused, run  # noqa: F401 (a fixture)

from training.corpus import items

pytestmark = pytest.mark.slow

TASK = """\
task: embedded_chemistry
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{{{prompt}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["<|end|>"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: ["^\\\\s+", "\\\\s+$"]
"""


def test_harness_metrics_stand_side_by_side_and_agree_with_our_own(run, tmp_path):  # noqa: F811
    pytest.importorskip("lm_eval", reason="needs the [eval] extra: run `make test-lm-eval`")
    fast = ("--continuation-tokens", "2", "--max-tokens", "48", "--criterion", "subspace", "--repair", "none", "-q")
    build = ("build", "--scenario", "A helpdesk for questions about chemistry", "--keep", "0.25", *fast)
    done = shell(tmp_path, *build, "--out", "artifacts/cut")
    assert done.code == 0, done.err
    lines = [{"prompt": i.prompt, "answer": i.answer} for i in items("chemistry", "heldout", 90, 30)]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "chemistry.yaml").write_text(TASK.format(data=data))
    args = ("eval", "cut", "--lm-eval", "embedded_chemistry", "--lm-eval-tasks-dir", "tasks")
    done = shell(tmp_path, *args, "--json")
    assert done.code == 0, done.err[-2000:]
    (row,) = (row for row in done.json["lm_eval"] if row["metric"].startswith("exact_match"))
    assert row["dense_stderr"] is not None and row["sliced"] < row["dense"]
    ours = run("eval", "cut", "--data", "data.jsonl", "--json", home=tmp_path).json["suites"]["data.jsonl"]
    assert row["dense"] == pytest.approx(ours["dense"]["exact_match"])
    assert row["sliced"] == pytest.approx(ours["sliced"]["exact_match"])
    refused(run("eval", "cut", "--lm-eval", "no_such_task", home=tmp_path), 2, "no_such_task")
