"""What is learned once per model: capture -> axes -> recogniser -> importance -> whitelist -> Toolkit."""

from sspcompile.model.capture import features
from sspcompile.model.text import encode, with_continuations
from sspcompile.prepare.importance import importance_of
from sspcompile.prepare.run import prepare, unlearned, with_directions, with_scores
from sspcompile.prepare.toolkit import Toolkit, is_outdated, load, save, with_importance

__all__ = [
    "Toolkit",
    "encode",
    "features",
    "importance_of",
    "is_outdated",
    "load",
    "prepare",
    "save",
    "unlearned",
    "with_continuations",
    "with_directions",
    "with_importance",
    "with_scores",
]
