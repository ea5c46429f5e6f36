"""lm-evaluation-harness on an artifact and on its dense model, with the same settings; its own metrics side by side."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sspcompile.errors import InputError
from sspcompile.model.opening import readable
from sspcompile.model.placement import ANYWHERE, Placement, resolve, use_threads


@dataclass(frozen=True)
class HarnessRow:
    """One metric of one task, named as the harness names it (`exact_match,none`). A stderr is None when it has none."""

    task: str
    metric: str
    dense: float
    dense_stderr: float | None
    sliced: float
    sliced_stderr: float | None


def require_harness() -> None:
    """Raise InputError when the extra is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm-evaluation-harness is not installed.", hint="pip install 'sspcompile[eval]'")


def run_harness(
    models: Sequence[tuple[Path, bool]],
    tasks: Sequence[str],
    *,
    tasks_folder: Path | None,
    items: int | None,
    batch_size: int,
    seed: int,
    placement: Placement = ANYWHERE,
) -> list[HarnessRow]:
    """Run tasks on the dense and on the sliced model, each a folder and whether its own code may run.

    `tasks_folder` holds further task definitions; `items` limits each task's documents.

    Raises InputError for an unknown task, or a folder that is not there, and CheckpointError for a model that
    transformers refuses.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoConfig

    if tasks_folder is not None and not tasks_folder.is_dir():
        raise InputError(f"There is no folder {tasks_folder}.", hint="--lm-eval-tasks-dir takes a folder of tasks.")
    place = resolve(placement)
    use_threads(placement)
    manager = TaskManager(include_path=None if tasks_folder is None else str(tasks_folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise InputError(f"The harness has no task {unknown[0]!r}.", hint="`lm_eval ls tasks` lists them.")
    found = []
    for folder, trust in models:
        arguments = {
            "pretrained": str(folder),
            "dtype": str(place.dtype).removeprefix("torch."),
            "trust_remote_code": trust,
        }
        if place.device_map is not None:
            arguments |= {"parallelize": True}
        with readable(folder):  # before the harness reads data: it loads by the folder's own class alone
            AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        result = simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(tasks),
            task_manager=manager,
            limit=items,
            batch_size=batch_size,
            device=str(place.device),
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
        found.append(result["results"])
    return _rows(*found)


def _rows(dense: Mapping[str, Mapping[str, Any]], sliced: Mapping[str, Mapping[str, Any]]) -> list[HarnessRow]:
    rows = []
    for task, metrics in dense.items():
        for name, value in metrics.items():
            kind, _, rest = name.partition(",")
            if not rest or kind.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{kind}_stderr,{rest}"
            errors = (_number(found.get(error)) for found in (metrics, sliced[task]))
            rows.append(HarnessRow(task, name, value, next(errors), float(sliced[task][name]), next(errors)))
    return rows


def _number(value: object) -> float | None:
    """What the harness calls "N/A" is None."""
    return float(value) if isinstance(value, int | float) else None


def rows_json(rows: Sequence[HarnessRow]) -> dict[str, Any]:
    """The rows under `lm_eval`."""
    return {"lm_eval": [asdict(row) for row in rows]}
