"""Toolkits that are learned once for all test processes: a build that finds one reads no pool."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

# With the toolkit of `Shape()` that several files use.
SHARED: dict[str, Any] = {"criteria": ("fisher",), "max_tokens": 16, "continuation_tokens": 1}


class Toolkits:
    """Under one folder that all processes share."""

    def __init__(self, shared: Path) -> None:
        self._shared = shared
        shared.mkdir(exist_ok=True)

    def put(self, home: Path, model: Path | None = None, *, criteria: Sequence[str] = (), **options: Any) -> None:
        """Leave in `home` what `prepare` would leave there, for builds of `model` with these scores and `options`."""
        from sspcompile.model.dense import open_dense
        from sspcompile.prepare.toolkits import toolkit_folder, toolkit_for
        from sspcompile.progress import silent
        from sspcompile.request.options import Options
        from sspcompile.workspace import Workspace

        asked = Options(model=None if model is None else str(model), **options)
        dense = open_dense(asked.source)
        learned, found = (toolkit_folder(dense, asked, Workspace(root)) for root in (self._shared, home))
        with FileLock(self._shared / f"{learned.name}.lock"):
            toolkit_for(dense, dense.load(), asked, Workspace(self._shared), silent, criteria)
            shutil.copytree(learned, found)
