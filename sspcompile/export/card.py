"""The model card of an export: what it was cut from, for what, what it lost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined


def model_card(report: Mapping[str, Any], plan: Mapping[str, Any], origin: Mapping[str, Any], name: str) -> str:
    """Markdown with a metadata header. `report`, `plan` and `origin` are the artifact's own files."""
    source = str(origin["source_name"])
    # A local folder's path is the builder's business and no hub name.
    is_hub_name = source.count("/") == 1 and not Path(source).is_absolute() and not source.startswith(".")
    data = ModelCardData(
        base_model=source if is_hub_name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sspcompile", "pruned", "attention-head-pruning"],
    )
    # Plain Markdown, not HTML: nothing to escape but what could end a table cell or a code span.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True,
    )
    quality = {row["name"]: row for row in report["quality"]}
    body = environment.get_template("card.md").render(
        name=name, report=report, plan=plan, source=source if is_hub_name else Path(source).name, quality=quality
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
