"""Questions with options, answered by likelihood: what of a model's knowledge a cut leaves, on a subject and off it.

The right option counts as found where its mean log-likelihood per token, end token included, is the highest of the
question's options. A reference answer counts as written where greedy decoding would write it token by token. Questions
are asked as a scenario's prompts are, without examples.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sspcompile.evaluate.answers import AnswerScores, EncodedItems, answer_scores, encode_items
from sspcompile.intervals import mean_estimate
from sspcompile.model.decoder import LoadedModel
from sspcompile.repair.repair import Repair, masked
from sspcompile.request.prompts import Prompt, answer_of, asked_of
from sspcompile.slicing.mask import Kept

# Tokens of a question with the passage that it is about.
LONGEST = 320
GENERAL, EXACT = "arc-easy", "exact match"
# Subjects of MMLU by scenario; where there is none, the general questions alone are asked.
SUBJECTS: Mapping[str, str] = {"word-problems": "math", "chemistry": "chemistry"}


@dataclass(frozen=True)
class Asked:
    """A question, its options, and the place of the right one."""

    prompt: str
    options: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class _Item:
    prompt: Prompt
    answer: str


class Exam:
    """Items that are encoded once for all masks of a model."""

    def __init__(self, loaded: LoadedModel, items: Sequence[_Item]) -> None:
        self._loaded = loaded
        self._encoded: EncodedItems = encode_items(loaded, items, LONGEST)

    def found(self, kept: Kept | None = None, repair: Repair | None = None) -> np.ndarray:
        """Bool [questions]: which ones the masked model gets right; the dense one without a mask."""
        if kept is None:
            return self.right(answer_scores(self._loaded, self._encoded))
        with masked(self._loaded, kept, repair):
            return self.right(answer_scores(self._loaded, self._encoded))

    def right(self, scores: AnswerScores) -> np.ndarray:
        """Bool [questions] from the scores of all items: where the reference answer would be written."""
        return scores.right


class Choices(Exam):
    """Questions of which the likeliest option is the answer; every option is an item."""

    def __init__(self, loaded: LoadedModel, asked: Sequence[Asked]) -> None:
        super().__init__(loaded, [_Item(one.prompt, option) for one in asked for option in one.options])
        self._asked = tuple(asked)

    def right(self, scores: AnswerScores) -> np.ndarray:
        likelihoods = iter(scores.log_likelihood.tolist())
        answers = [int(np.argmax([next(likelihoods) for _ in one.options])) for one in self._asked]
        return np.array([answer == one.right for answer, one in zip(answers, self._asked, strict=True)])


def arc_easy(data: Path) -> list[Asked]:
    lines = (data / "arc_csqa" / "arc_easy.jsonl").read_text("utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    return [Asked(row["query"].removeprefix("Question: "), tuple(row["choices"]), row["gold"]) for row in rows]


def mmlu(data: Path, subject: str) -> list[Asked]:
    rows = [json.loads(line) for line in (data / "mmlu" / f"{subject}.jsonl").read_text("utf-8").split("\n") if line]
    usable = [row for row in rows if all(option.strip() for option in row["choices"])]
    return [Asked(row["question"], tuple(row["choices"]), "ABCD".index(row["answer"])) for row in usable]


def exams_of(
    loaded: LoadedModel, data: Path, scenario: str, judged: Sequence[Prompt], count: int, seed: int
) -> dict[str, Exam]:
    """The exams of a scenario by name: `count` questions each, drawn by `seed`, and answers of its `judged` texts."""
    subject = SUBJECTS.get(scenario)
    sets = {GENERAL: arc_easy(data)} | ({} if subject is None else {f"mmlu-{subject}": mmlu(data, subject)})
    draw = random.Random(seed)
    exams: dict[str, Exam] = {
        name: Choices(loaded, draw.sample(asked, min(count, len(asked)))) for name, asked in sets.items()
    }
    known = [_Item(asked_of(prompt), answer) for prompt in judged if (answer := answer_of(prompt)) is not None]
    return exams | ({EXACT: Exam(loaded, known)} if known else {})


def figures(found: Mapping[str, np.ndarray], dense: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, object]:
    """By exam: accuracy of the cut and of the dense model, and the difference, paired, with its interval."""
    told: dict[str, object] = {}
    for name, right in found.items():
        gap = mean_estimate(right.astype(float) - dense[name].astype(float), seed=seed)
        told[name] = {
            "accuracy": float(right.mean()),
            "dense": float(dense[name].mean()),
            "gap": [gap.value, gap.low, gap.high],
            "questions": len(right),
        }
    return told
