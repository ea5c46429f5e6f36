"""Greedy exact match of a model on held-out items: `python -m training.evaluate [--model DIR] [--json]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sspcompile.embedded import MODEL_DIR
from training.corpus import DOMAINS, Item, cross_items, items
from training.tokenizer import QUESTION

ANSWER_TOKENS = 8
BATCH = 64
EVALUATION_ITEMS = 200
EVALUATION_SEED = 20
"""Seed of the items behind the figures of the model card; training looks at another one."""


@dataclass(frozen=True)
class Accuracy:
    """Exact match per (domain, task, form): how many were right, of how many."""

    counts: Mapping[tuple[str, str, str], tuple[int, int]]

    def by(self, *fields: int) -> dict[tuple[str, ...], float]:
        """Exact match per value of the given fields (0 domain, 1 task, 2 form)."""
        sums: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
        for key, (right, total) in self.counts.items():
            group = sums[tuple(key[field] for field in fields)]
            group[0] += right
            group[1] += total
        return {key: right / total for key, (right, total) in sums.items()}

    @property
    def mean(self) -> float:
        """The mean over domains."""
        return fmean(self.by(0).values())

    def table(self) -> str:
        """Markdown: tasks down, domains across, with means and forms."""
        cells, domains = self.by(0, 1), list(dict.fromkeys(key[0] for key in self.counts))
        tasks = list(dict.fromkeys(key[1] for key in self.counts))
        lines = [f"| task | {' | '.join(domains)} | all |", "|---" * (len(domains) + 2) + "|"]
        for task in tasks:
            row = [f"{cells[domain, task]:.2f}" if (domain, task) in cells else "-" for domain in domains]
            lines.append(f"| {task} | {' | '.join(row)} | {self.by(1)[(task,)]:.2f} |")
        means = self.by(0)
        row = [f"{means[(domain,)]:.3f}" for domain in domains]
        lines.append(f"| **mean** | {' | '.join(row)} | **{self.mean:.3f}** |")
        forms = ", ".join(f"{form} {value:.2f}" for (form,), value in self.by(2).items())
        return "\n".join([*lines, "", f"By form: {forms}."])


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy answers to plain-language prompts, in their order."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        texts = [QUESTION.format(prompt=prompts[index]) for index in chosen]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, reply in zip(chosen, replies, strict=True):
            found[index] = reply.strip()
    return found


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Iterable[Item]) -> Accuracy:
    """Exact match on the given items."""
    asked = list(asked)
    counts: dict[tuple[str, str, str], tuple[int, int]] = {}
    for item, answer in zip(asked, answers(model, tokenizer, [item.prompt for item in asked]), strict=True):
        right, total = counts.get((item.domain, item.task, item.form), (0, 0))
        counts[item.domain, item.task, item.form] = (right + (answer == item.answer), total + 1)
    return Accuracy(counts)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, seed: int) -> Accuracy:
    """Exact match on `count` held-out items of each of the six domains."""
    model.eval()
    return score(model, tokenizer, (item for domain in DOMAINS for item in items(domain, "heldout", seed, count)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Exact match of an embedded model on held-out items.")
    parser.add_argument("--model", type=Path, default=MODEL_DIR)
    parser.add_argument("--count", type=int, default=EVALUATION_ITEMS, help="items per domain")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    accuracy = evaluate(model, tokenizer, count=options.count, seed=options.seed)
    crossed = score(model, tokenizer, cross_items("heldout", options.seed, options.count))
    cross = sum(right for right, _ in crossed.counts.values()) / options.count
    if options.json:
        tasks = {f"{domain}/{task}": value for (domain, task), value in accuracy.by(0, 1).items()}
        domains = {domain: value for (domain,), value in accuracy.by(0).items()}
        result = {"mean": accuracy.mean, "cross": cross, "domains": domains, "tasks": tasks}
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(accuracy.table())
        print(f"\nCross-domain items: {cross:.3f}.")


if __name__ == "__main__":
    main()
