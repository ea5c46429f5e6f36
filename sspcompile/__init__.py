"""Cut the attention heads and MLP channels that a deployment does not need out of a decoder LLM, without training.

    import sspcompile

    plan = sspcompile.plan("./my-model", size=0.8)
    artifact = sspcompile.build("./my-model", "A helpdesk for questions about chemistry", size=0.8)
    artifact.report, artifact.mask, artifact.verify(), artifact.evaluate(), artifact.export("onnx")
    artifact = sspcompile.load(artifact.path)

Importing this loads nothing heavy; torch comes with the first thing that runs a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sspcompile.api.artifact import Artifact
    from sspcompile.api.library import build, frontier, load, plan, trim
    from sspcompile.api.several import NestedArtifact

__all__ = ["Artifact", "NestedArtifact", "__version__", "build", "frontier", "load", "plan", "trim"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sspcompile.api import library

    return getattr(library, name)


def __dir__() -> list[str]:
    return sorted(__all__)
