"""`--max-latency`: the table that a bound on the time of a token counts by.

A table is measured once for a model, a load and the conditions of this machine, and kept: a build that goes on, or the
command that an error names, counts by the same numbers. Remove the file to measure it again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path

from sspcompile.checkpoint.publish import write_atomically
from sspcompile.checkpoint.source import Checkpoint
from sspcompile.errors import InputError
from sspcompile.machine import processor_name
from sspcompile.model.placement import ANYWHERE, Place, Placement, resolve
from sspcompile.progress import Progress, silent
from sspcompile.request.options import LATENCY_RUNTIME, Options
from sspcompile.request.request import Request
from sspcompile.select.budget import bounds_of, cuts_channels, serving_of
from sspcompile.slicing.latency import Conditions, LatencyTable, dump_table, read_table
from sspcompile.slicing.plan import plan_within
from sspcompile.workspace import Workspace

# Of the tables on disk; what is timed, or how, changes it.
VERSION = 2
PACKAGES = ("torch", "transformers")


def table_for(
    options: Options,
    checkpoint: Checkpoint,
    workspace: Workspace,
    placement: Placement = ANYWHERE,
    progress: Progress = silent,
) -> LatencyTable | None:
    """The table of a model under the load that the options state, measured here unless it was before; None where no
    bound on time is asked for. A configuration is enough.

    Raises InputError for what cannot be timed, and CheckpointError for a configuration that transformers cannot make
    sense of.
    """
    if options.max_latency is None:
        return None
    if placement.device_map is not None:
        raise InputError("--max-latency is measured on one device.", hint="Leave --device-map out.")
    conditions = conditions_of(options, checkpoint, placement)
    path = table_path(checkpoint, workspace, conditions)
    if path.is_file():
        return read_table(path)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "The processes of torchrun would time layers against each other.",
            hint="Measure first, in one process: `sspcompile plan` with the same options.",
        )
    from sspcompile.bench.layer_times import layer_table
    from sspcompile.model.placement import use_threads

    use_threads(placement)
    table = layer_table(checkpoint, conditions, resolve(placement), progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_table(table))
    return table


def conditions_of(options: Options, checkpoint: Checkpoint, placement: Placement = ANYWHERE) -> Conditions:
    """What times are measured under. Raises InputError for a device that is not there."""
    place = resolve(placement)
    facts = place.facts()
    return Conditions(
        runtime=options.latency_runtime or LATENCY_RUNTIME,
        versions={name: metadata.version(name) for name in PACKAGES},
        device=facts["device"],
        processor=_processor(place),
        dtype=facts["dtype"],
        threads=place.threads,
        serving=serving_of(options, checkpoint.config),
    )


def _processor(place: Place) -> str:
    if place.device.type != "cuda":
        return processor_name()
    import torch

    return torch.cuda.get_device_name(place.device)


def table_path(checkpoint: Checkpoint, workspace: Workspace, conditions: Conditions) -> Path:
    """Where the table of a model is kept: whatever its times depend on is in the name."""
    depends = json.dumps([VERSION, checkpoint.config, asdict(conditions)], sort_keys=True)
    return workspace.latency_tables / f"{hashlib.sha256(depends.encode()).hexdigest()[:16]}.json"


def in_parameters(request: Request, checkpoint: Checkpoint, table: LatencyTable | None) -> Request:
    """The request with the share of parameters that its bound on time leaves by counts alone, in place of that bound.

    Raises BudgetError.
    """
    options, g = request.options, checkpoint.geometry
    if table is None:
        return request
    plan = plan_within(
        checkpoint,
        bounds_of(options, checkpoint, table),
        "per-layer",
        channels=cuts_channels(options, g),
        whole=options.whole,
        groups_only=options.granularity == "group",
    )
    return replace(request, options=options.model_copy(update={"max_latency": None, "size": plan.size}))
