"""What an interrupted build leaves for the next run of the same request, and when that goes."""

from __future__ import annotations

from pathlib import Path

from sspcompile.model import journal
from sspcompile.model.dense import DenseModel
from sspcompile.prepare.stages import beside
from sspcompile.prepare.toolkits import toolkit_folder
from sspcompile.request.domains import pools_fingerprint
from sspcompile.request.pools import pools_of
from sspcompile.request.request import Request
from sspcompile.workspace import Workspace


def passes_folder(request: Request, dense: DenseModel, workspace: Workspace) -> Path:
    """Where a build keeps what it measures until it is published: one folder per request, model, pools and versions."""
    made_from = [
        request.recipe().model_dump(mode="json"),
        dense.fingerprint,
        pools_fingerprint(pools_of(request.options).candidates),
        *journal.versions(),
    ]
    return workspace.artifacts / f"{journal.PREFIX}{journal.digest(made_from)}"


def goes_on(request: Request, dense: DenseModel, workspace: Workspace) -> bool:
    """Whether an interrupted run left something that a build of this request will use."""
    toolkit = beside(toolkit_folder(dense, request.options, workspace))
    return any(map(journal.holds_work, (passes_folder(request, dense, workspace), toolkit)))


def remove_old(workspace: Workspace) -> None:
    """Remove what interrupted runs left two weeks ago and nobody went on with."""
    journal.remove_old(workspace.artifacts)
    journal.remove_old(workspace.toolkits)
