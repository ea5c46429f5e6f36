"""The documentation page of the criteria, made from the table.

python -m sspcompile.criteria.page > docs/criteria.md
"""

from __future__ import annotations

from sspcompile.criteria.table import CRITERIA

HEAD = """\
# Head scores

Every criterion gives a score per layer and query head, larger = more needed, for a set of prompts. `--criterion NAME`
of `build`, `plan` and `prepare` chooses one, `sspcompile criteria` lists them. This page is generated from the table
in `sspcompile/criteria/table.py`; the formulas stand in the modules beside it.

* **Text.** Prompts *with the dense model's own greedy continuation*. No labels are needed anywhere.
* **Heads and groups.** Each score exists for query heads and for whole key/value groups. Of a group, what is closed or
  gated is closed or gated as a whole, and what adds up is added; the group's heads get equal parts.
* **Per.** Some scores exist for each prompt, others only for a set of prompts. The toolkit keeps one value per domain
  either way: the mean over its prompts, or the measurement of its prompts by themselves. The whitelist's test needs a
  score for each prompt.
* **Cost** is in passes over the prompts that are looked at, at most `most prompts` of each domain. Writing the
  continuations is not counted; all criteria share them.
"""


def page() -> str:
    """docs/criteria.md"""
    lines = [
        "| name | what | source | cost | needs | per | most prompts | adaptation to heads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in CRITERIA.items():
        most = "all" if entry.max_prompts is None else str(entry.max_prompts)
        cells = (f"`{name}`", entry.summary, entry.source, entry.cost, entry.needs, entry.per, most, entry.adaptation)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return HEAD + "\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
