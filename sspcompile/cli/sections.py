"""The help of commands with many options, in sections."""

from __future__ import annotations

from collections.abc import Mapping

import click

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Scenario and model": (
        *("scenario", "model", "revision", "pools", "axes", "chat_template", "raw", "max_tokens"),
        "continuation_tokens",
    ),
    "Budget": (
        *("max_loss", "max_perplexity", "size", "max_params", "max_memory", "max_latency", "latency_runtime"),
        *("context", "batch"),
        *("protect", "keep", "strength", "nested", "sweep", "no_bench"),
    ),
    "What goes, and how": (
        *("units", "layout", "host", "granularity", "criterion", "importance_from", "repair", "quantize", "baselines"),
        *("without", "seed"),
    ),
    "Machine": ("device", "dtype", "device_map", "memory", "threads"),
}
REST = "Output"


class Sectioned(click.Command):
    """A command whose help has its options in SECTIONS, what stands in none of them under REST."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each that has options."""
        records = ((one.name or "", one.get_help_record(ctx)) for one in self.get_params(ctx))
        left = {name: record for name, record in records if record is not None}
        for title, names in SECTIONS.items():
            rows = [left.pop(name) for name in names if name in left]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if left:
            with formatter.section(REST):
                formatter.write_dl([*left.values()])
