"""What is learned once per model: capture -> axes -> probes -> calibration -> importance -> whitelist -> Toolkit."""

from sspcompile.model.capture import features
from sspcompile.model.text import encode, with_continuations
from sspcompile.prepare.importance import importance_of
from sspcompile.prepare.probes import probabilities
from sspcompile.prepare.run import prepare, with_scores
from sspcompile.prepare.toolkit import REGIMES, Toolkit, is_outdated, load, save, with_importance

__all__ = [
    "REGIMES",
    "Toolkit",
    "encode",
    "features",
    "importance_of",
    "is_outdated",
    "load",
    "prepare",
    "probabilities",
    "save",
    "with_continuations",
    "with_importance",
    "with_scores",
]
