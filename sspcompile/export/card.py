"""The model card: what a model was cut from, for what, what it lost, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sspcompile.model.onnx_session import graph_name

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from sspcompile.nested.index import Nested
    from sspcompile.slicing.mask import HeadMask

LICENCE_KEYS = ("license", "license_name", "license_link")
TASK = "text-generation"
CARD = "README.md"
PRUNED, HEADS, CHANNELS, LAYERS = "pruned", "attention-head-pruning", "mlp-channel-pruning", "layer-pruning"


def licence_of(folder: Path) -> dict[str, str]:
    """`license`, and where it is `other` its name and link, from the header of a model folder's README.md.

    Empty where there is none to inherit: whoever publishes the model has to say.
    """
    from huggingface_hub import ModelCard

    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        found = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError):  # a README without the header of a card
        return {}
    return {key: str(found[key]) for key in LICENCE_KEYS if found.get(key)}


def model_card(report: Mapping[str, Any], plan: Mapping[str, Any], origin: Mapping[str, Any], name: str) -> str:
    """Markdown with a metadata header. `report`, `plan` and `origin` are the artifact's own."""
    return _card("card.md", origin, name=name, report=report, plan=plan)


def slice_card(plan: Mapping[str, Any], mask: HeadMask, origin: Mapping[str, Any], name: str) -> str:
    """The card of a model that was cut by a mask alone, with nothing measured. `plan` is plan.json."""
    return _card("sliced.md", origin, name=name, plan=plan, report=None, scenario=mask.scenario.get("name"))


def trim_card(trimmed: Mapping[str, Any], places: Mapping[str, str], origin: Mapping[str, Any], name: str) -> str:
    """The card of a model with fewer tokens. `trimmed` is trim.json, `places` says which texts judged it, in words."""
    return _card("trimmed.md", origin, name=name, report=None, plan=None, pruned=False, trimmed=trimmed, places=places)


def nested_card(nested: Nested, origin: Mapping[str, Any], name: str, scenario: str) -> str:
    """The card of a nested model, by its nested.json: what every size takes and loses, and how sizes are switched."""
    return _card("nested.md", origin, name=name, nested=nested, scenario=scenario, report=None, plan=None, pruned=False)


def onnx_card(
    origin: Mapping[str, Any],
    name: str,
    agreement: Any,
    precision: Any,
    *,
    context_length: int,
    report: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
    last_logits: bool = False,
    refitted: bool = False,
    sizes: Sequence[float] = (),
) -> str:
    """The card of an export for ONNX Runtime. `report` and `plan` are an artifact's, None for a plain checkpoint.

    `context_length`: tokens of the longest text. `refitted`: whether a build refitted it for this rounding. `sizes`: of
    a nested model, which has a graph for each. An `origin` without an artifact is that of a model that was not cut.
    """
    return _card(
        "onnx.md",
        origin,
        library="onnx",
        rounded=precision.gate is None,
        name=name,
        agreement=agreement,
        precision=precision,
        context_length=context_length,
        report=report,
        plan=plan,
        pruned="artifact" in origin,
        last_logits=last_logits,
        refitted=refitted,
        sizes=[(share, graph_name(share)) for share in sizes],
    )


def gguf_card(
    origin: Mapping[str, Any], name: str, done: Any, *, report: Mapping[str, Any] | None, plan: Mapping[str, Any] | None
) -> str:
    """The card of an export for llama.cpp, of which `done` says what was written and checked; the rest as for ONNX."""
    pruned = "artifact" in origin
    return _card(
        "gguf.md",
        origin,
        library="gguf",
        rounded=done.kind.rounded,
        name=name,
        done=done,
        report=report,
        plan=plan,
        pruned=pruned,
    )


def _card(
    template: str,
    origin: Mapping[str, Any],
    *,
    name: str,
    report: Mapping[str, Any] | None,
    plan: Mapping[str, Any] | None,
    library: str = "transformers",
    pruned: bool = True,
    rounded: bool = False,
    **values: Any,
) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    source = str(origin["source_name"])
    # The path of a local folder is not a hub name, and stays with whoever built from it.
    named = [name for name in (source, origin.get("adapter", {}).get("base_name")) if name and _at_hub(str(name))]
    measured = [] if rounded else _metrics(report)  # the report is about the model before it was rounded
    data = ModelCardData(
        base_model=named if len(named) > 1 else next(iter(named), None),
        library_name=library,
        pipeline_tag=TASK,
        tags=["sspcompile", *(_pruned_tags(plan) if pruned else ())],
        model_name=name if measured else None,
        eval_results=measured or None,
        **origin.get("licence", {}),
    )
    # Plain Markdown, not HTML: nothing to escape but what could end a table cell or a code span.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    body = environment.get_template(template).render(
        source=source if _at_hub(source) else Path(source).name,
        name=name,
        report=report,
        plan=plan,
        cut=_cut(plan) if plan is not None else "",
        licence=origin.get("licence", {}),
        pruned=pruned,
        rounded=rounded,
        **values,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))


def _removed(plan: Mapping[str, Any]) -> tuple[int, int, int]:
    """Whole layers that a plan.json takes out, and heads and channels out of those that stay; plans of earlier versions
    say nothing of channels. Heads of an attention that goes whole are among them.
    """
    widths, whole, gone = plan.get("widths", []), plan.get("dense_width", 0), len(plan.get("removed_layers", ()))
    mlps = plan.get("experts", 1)
    heads = plan["total_heads"] - plan["kept_heads"] - (gone * plan["total_heads"] // len(widths) if gone else 0)
    return gone, heads, mlps * (whole * (len(widths) - gone) - sum(widths)) if whole else 0


def _cut(plan: Mapping[str, Any]) -> str:
    """What was cut out, in words: `28 of its 64 attention heads and 304 of its 2,048 MLP channels`."""
    layers, heads, channels = _removed(plan)
    told = [f"{layers} of its {len(plan['counts'])} layers"] if layers else []
    told += [f"{heads} of its {plan['total_heads']} attention heads"] if heads or not (channels or layers) else []
    if silent := plan.get("removed_attention"):
        told[-1] += f" (the whole attention of {len(silent)} layer{'s' if len(silent) > 1 else ''} among them)"
    if channels:
        of_all = plan.get("experts", 1) * plan["dense_width"] * len(plan["widths"])
        told.append(f"{channels:,} of its {of_all:,} MLP channels")
    return " and ".join(told)


def _pruned_tags(plan: Mapping[str, Any] | None) -> tuple[str, ...]:
    if plan is None:
        return (PRUNED,)
    layers, heads, channels = _removed(plan)
    found = {LAYERS: layers, HEADS: heads or not (channels or layers), CHANNELS: channels}
    return PRUNED, *(tag for tag, there in found.items() if there)


def _at_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).is_absolute() and not name.startswith(".")


def _metrics(report: Mapping[str, Any] | None) -> list[EvalResult]:
    """The build's own figures, in the form in which the hub shows them."""
    from huggingface_hub import EvalResult

    ours = next((row for row in (report or {}).get("quality", []) if row["role"] == "ours"), None)
    if report is None or ours is None:
        return []
    scenario = str((report.get("scenario") or {}).get("name", "scenario"))
    named = {"mean_kl": "mean KL from the dense model (nats per token)", "top1_agreement": "same next token"}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type="sspcompile-scenario",
            dataset_name=f"held-out texts of {scenario}",
            metric_type=metric,
            metric_name=label,
            metric_value=round(ours[metric]["value"], 6),
        )
        for metric, label in named.items()
    ]
