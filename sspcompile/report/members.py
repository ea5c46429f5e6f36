"""The sizes of a nested artifact side by side: what each costs, as a table and as a curve."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

from sspcompile.nested.index import Member, Nested
from sspcompile.report.blocks import Block, Page, Table, page
from sspcompile.report.first import Picture
from sspcompile.report.format import count, percent, size, with_interval

FRONTIER = "frontier"


def members_page(title: str, nested: Nested) -> Page:
    """One row per member, the whole model first, and the picture."""
    whole = nested.members[0]
    columns: tuple[tuple[str, Callable[[Member], str]], ...] = (
        ("--size", lambda one: f"{one.share:g}"),
        ("parameters", lambda one: count(one.parameters)),
        ("KV/token", lambda one: size(one.kv_bytes_per_token)),
        ("repair", lambda one: size(one.repair_bytes) if one.repair else "-"),
        ("FLOPs", lambda one: percent(one.flops_per_token / whole.flops_per_token)),
        ("in place", lambda one: percent(one.flops_in_place / whole.flops_per_token)),
        ("mean KL", lambda one: with_interval(one.own.mean_kl)),
        ("same next token", lambda one: with_interval(one.own.top1_agreement, percent)),
        ("KL off domain", lambda one: "-" if one.off is None else with_interval(one.off.mean_kl)),
    )
    table = Table(
        "Members on held-out texts against the dense model: KL in nats per token, 95 % intervals; FLOPs of a token, "
        "cut out and where sizes are switched",
        tuple(label for label, _ in columns),
        tuple(tuple(show(one) for _, show in columns) for one in nested.members),
    )
    told = "Each member is a prefix of the larger ones, its repair beside it. A size in between takes the next smaller."
    picture = Picture(f"{FRONTIER}.svg", draw_members(nested), "what every size loses, against what it takes")
    return page(title, (Block(FRONTIER, "Members", (told,), (table,), picture),))


def members_json(nested: Nested) -> str:
    """What the whole and all repairs take, and the members without their counts by layer; the keys are promised."""
    members = [one.model_dump(mode="json", exclude={"groups", "widths", "refitted"}) for one in nested.members]
    weights, repairs = nested.members[0].weight_bytes, sum(one.repair_bytes for one in nested.members)
    data = {"schema_version": 1, "weight_bytes": weights, "repair_bytes": repairs, "members": members}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def draw_members(nested: Nested) -> str:
    """SVG: mean KL against parameters, KV bytes per token and FLOPs; the same members give the same bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels: tuple[tuple[str, Callable[[Member], float]], ...] = (
        ("parameters, millions", lambda one: one.parameters / 1e6),
        ("KV cache per token, KiB", lambda one: one.kv_bytes_per_token / 1024),
        ("FLOPs per token in place, millions", lambda one: one.flops_in_place / 1e6),
    )
    with matplotlib.rc_context({"svg.hashsalt": FRONTIER, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(10.5, 3.4), sharey=True)
        for axis, (label, place) in zip(axes, panels, strict=True):
            places = [place(one) for one in nested.members]
            for name, losses, color in (
                ("scenario", [one.own for one in nested.members], "#1f66a5"),
                ("off domain", [one.off for one in nested.members], "#b0b0b0"),
            ):
                found = [(x, loss.mean_kl) for x, loss in zip(places, losses, strict=True) if loss is not None]
                spread = [
                    [max(0.0, kl.value - (kl.value if kl.low is None else kl.low)) for _, kl in found],
                    [max(0.0, (kl.value if kl.high is None else kl.high) - kl.value) for _, kl in found],
                ]
                if found:
                    x, y = [x for x, _ in found], [kl.value for _, kl in found]
                    axis.errorbar(x, y, yerr=spread, fmt="o-", color=color, capsize=2, markersize=4, label=name)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("mean KL, nats per token")
        axes[0].legend(frameon=False, fontsize=8)
        figure.tight_layout()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    text = drawn.getvalue()
    return text[text.index("<svg") :]
