"""The model card: what a model was cut from, for what, what it lost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

if TYPE_CHECKING:
    from sspcompile.compile.mask import HeadMask


def model_card(report: Mapping[str, Any], plan: Mapping[str, Any], origin: Mapping[str, Any], name: str) -> str:
    """Markdown with a metadata header. `report`, `plan` and `origin` are the artifact's own files."""
    source = str(origin["source_name"])
    quality = {row["name"]: row for row in report["quality"]}
    return _card("card.md", source, name=name, report=report, plan=plan, quality=quality)


def slice_card(plan: Mapping[str, Any], mask: HeadMask, source: str, name: str) -> str:
    """The card of a model that was cut by a mask alone, with nothing measured. `plan` is plan.json."""
    return _card("sliced.md", source, name=name, plan=plan, scenario=mask.scenario.get("name"))


def onnx_card(
    source: str, name: str, agreement: Any, precision: Any, *, report: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
) -> str:
    """The card of an export for ONNX Runtime. `report` and `plan` are an artifact's, None for a plain checkpoint."""
    quality = report["quality"] if report is not None else []
    return _card(
        "onnx.md", source, library="onnx", name=name, agreement=agreement, precision=precision, report=report,
        plan=plan, quality=quality,
    )


def _card(template: str, source: str, *, library: str = "transformers", **values: Any) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    # A local folder's path is the builder's business and no hub name.
    is_hub_name = source.count("/") == 1 and not Path(source).is_absolute() and not source.startswith(".")
    data = ModelCardData(
        base_model=source if is_hub_name else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["sspcompile", "pruned", "attention-head-pruning"],
    )
    # Plain Markdown, not HTML: nothing to escape but what could end a table cell or a code span.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=False,
        trim_blocks=True, lstrip_blocks=True,
    )
    body = environment.get_template(template).render(source=source if is_hub_name else Path(source).name, **values)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
