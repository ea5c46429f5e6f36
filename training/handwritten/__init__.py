"""What was written by hand for the domain pools: descriptions of deployments and natural questions, per domain."""

from __future__ import annotations

from training.corpus import DOMAINS
from training.handwritten import chemistry, finance, geography, history, math, philosophy, sports, technology
from training.handwritten.shape import Handwritten

HANDWRITTEN: dict[str, Handwritten] = {
    "chemistry": chemistry.TEXT,
    "finance": finance.TEXT,
    "history": history.TEXT,
    "math": math.TEXT,
    "philosophy": philosophy.TEXT,
    "technology": technology.TEXT,
    "geography": geography.TEXT,
    "sports": sports.TEXT,
}
UNSEEN_DESCRIPTION_EVERY = 5
"""One description in five is kept from training, to see whether the model knows the domain of a new sentence."""

__all__ = ["HANDWRITTEN", "Handwritten", "training_descriptions", "unseen_descriptions"]


def _descriptions(unseen: bool) -> list[tuple[str, str]]:
    return [
        (text, domain)
        for domain in DOMAINS
        for index, text in enumerate(HANDWRITTEN[domain].descriptions)
        if (index % UNSEEN_DESCRIPTION_EVERY == UNSEEN_DESCRIPTION_EVERY - 1) == unseen
    ]


def training_descriptions() -> list[tuple[str, str]]:
    """The (description, domain) pairs which the embedded model is trained on."""
    return _descriptions(unseen=False)


def unseen_descriptions() -> list[tuple[str, str]]:
    """The (description, domain) pairs which the embedded model has never seen."""
    return _descriptions(unseen=True)
