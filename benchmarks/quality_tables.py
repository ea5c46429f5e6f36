"""Tables and figure of `quality.py`: python -m benchmarks.quality_tables [--results benchmarks/results/quality].

Writes `summary.json`, `tables.md` and `docs/images/quality.svg`, and the table of scores in docs/quality.md and on the
embedded model's card. Differences are paired item by item. Two intervals are
computed: over items, taking the masks as given, and over scenarios (domain and seed), taking items with them. A loss
counts as measurable when the narrower one says so, an advantage only when both do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from benchmarks.quality import DOMAIN_FREE, DOMAIN_FREE_MASK, FIRST_LAYER, KEEPS, LAYOUTS, OURS, RANKED_BY
from sspcompile.intervals import Interval, mean_interval

FIGURE = Path("docs/images/quality.svg")
SHOWN = {
    "`auto` (default)": (OURS, "least-squares"),
    "`auto`, `--repair least-squares-mlp`": (OURS, "least-squares-mlp"),
    "`auto`, `--repair none`": (OURS, "none"),
    "`auto`, domain-free": (DOMAIN_FREE, "least-squares"),
    "`greedy-kl`": ("greedy-kl", "least-squares"),
    "`kl`": ("kl", "least-squares"),
    "`llm-pruner`": ("llm-pruner", "least-squares"),
    "`probe-pruning`": ("probe-pruning", "least-squares"),
    "`wanda`": ("wanda", "least-squares"),
    "`flap`": ("flap", "least-squares"),
    "random, first layer kept": (FIRST_LAYER, "least-squares"),
    "`subspace` (published)": ("subspace", "least-squares"),
}
"""Rows of the table that the documents show: label, and the row and repair that it is about."""
RESULTS = Path("benchmarks/results/quality")
DOCUMENTS = (Path("sspcompile/embedded/model/README.md"), Path("docs/quality.md"))
Cells = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Row:
    """One table row at one size. Shares in [0, 1]; `change` is own-domain exact match minus the dense model's."""

    name: str
    layout: str
    keep: float
    repair: str
    ratio: float
    own: float
    off: float
    likelihood: float
    relative: float
    change: float
    change_items: Interval | None
    change_scenarios: Interval | None


def load(results: Path) -> dict[str, Cells]:
    """All finished jobs, `domain/seed` -> cells with unpacked answers."""
    found: dict[str, Cells] = {}
    for path in sorted(results.glob("cells-*.npz")):
        _, seed, domain = path.stem.split("-", 2)
        cells = dict(np.load(path)) | dict(np.load(results / f"default-{seed}-{domain}.npz"))
        own, off = (int(n) for n in cells["counts"])
        sizes = {"own": own, "off": off}
        found[f"{domain}/{seed}"] = {
            key: np.unpackbits(value)[: sizes[key.rsplit("/", 1)[1]]].astype(float)
            if key.endswith(("/own", "/off"))
            else value
            for key, value in cells.items()
        }
    return found


def differences(jobs: Mapping[str, Cells], first: str, second: str, part: str = "own") -> list[np.ndarray]:
    """Per scenario the item-wise difference of two cells."""
    return [cells[f"{first}/{part}"] - cells[f"{second}/{part}"] for cells in jobs.values()]


def both_intervals(parts: list[np.ndarray]) -> tuple[float, Interval | None, Interval | None]:
    """Mean, interval over items, interval over scenarios."""
    items, scenarios = np.concatenate(parts), [float(part.mean()) for part in parts]
    return float(items.mean()), mean_interval(items, seed=0), mean_interval(scenarios, seed=0)


def row_of(jobs: Mapping[str, Cells], key: str) -> Row:
    """The figures of one cell over all scenarios."""
    name, layout, keep, repair = key.split("/")
    mean, items, scenarios = both_intervals(differences(jobs, key, "dense/-/1/none"))
    own = np.mean([cells[f"{key}/own"].mean() for cells in jobs.values()])
    dense = np.mean([cells["dense/-/1/none/own"].mean() for cells in jobs.values()])
    return Row(
        name,
        layout,
        float(keep),
        repair,
        ratio=float(np.mean([cells[f"{key}/facts"][0] for cells in jobs.values()])),
        own=float(own),
        off=float(np.mean([cells[f"{key}/off"].mean() for cells in jobs.values()])),
        likelihood=float(np.mean([cells[f"{key}/facts"][1] for cells in jobs.values()])),
        relative=float(own / dense),
        change=mean,
        change_items=items,
        change_scenarios=scenarios,
    )


@dataclass(frozen=True)
class Claim:
    """A difference between two rows at one size, with both intervals; `holds` when both exclude 0 from above."""

    what: str
    layout: str
    keep: float
    repair: str
    mean: float
    items: Interval | None
    scenarios: Interval | None

    @property
    def holds(self) -> bool:
        return all(interval is not None and interval.low > 0 for interval in (self.items, self.scenarios))


def claims(jobs: Mapping[str, Cells], rows: list[Row]) -> list[Claim]:
    """Ours against the first-layer baseline, the best other row and the domain-free masks, at every size."""
    found = []
    for layout in LAYOUTS:
        for keep in KEEPS:
            for repair in ("none", "least-squares"):
                here = [r for r in rows if (r.layout, r.keep, r.repair) == (layout, keep, repair)]
                others = [r for r in here if r.name != OURS and "domain-free" not in r.name and r.name != RANKED_BY]
                best = max(others, key=lambda r: r.own).name
                for what in dict.fromkeys((FIRST_LAYER, best, DOMAIN_FREE, DOMAIN_FREE_MASK)):
                    size = f"{layout}/{keep:g}/{repair}"
                    parts = differences(jobs, f"{OURS}/{size}", f"{what}/{size}")
                    label = f"{what} (best other)" if what == best else what
                    found.append(Claim(label, layout, keep, repair, *both_intervals(parts)))
    return found


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{100 * interval.low:+.1f} to {100 * interval.high:+.1f}"


def tables(rows: list[Row], found: list[Claim], dense: tuple[float, float]) -> str:
    """Everything as Markdown."""
    lines = [
        f"Dense: exact match {dense[0]:.3f} on the scenario's domain, {dense[1]:.3f} on the others. "
        "Cells: own domain (other domains).",
        "",
    ]
    by = {(r.name, r.layout, r.keep, r.repair): r for r in rows}
    for layout in LAYOUTS:
        for repair in ("none", "least-squares"):
            title = "without repair" if repair == "none" else "with least-squares repair"
            lines += [f"### {layout} layout, {title}", ""]
            lines += ["| score | " + " | ".join(f"keep {k:g}" for k in KEEPS) + " |", "|---" * (len(KEEPS) + 1) + "|"]
            names = dict.fromkeys(r.name for r in rows)
            for name in sorted(names, key=lambda n: -sum(by[n, layout, k, repair].own for k in KEEPS)):
                cells = [by[name, layout, k, repair] for k in KEEPS]
                values = " | ".join(f"{c.own:.3f} ({c.off:.3f})" for c in cells)
                lines.append(f"| `{name}` | {values} |")
            lines.append("")
    lines += [f"### `{OURS}` against others, points of exact match", ""]
    lines += ["| against | layout | keep | repair | points | over items | over scenarios | holds |", "|---" * 8 + "|"]
    lines += [
        f"| `{c.what}` | {c.layout} | {c.keep:g} | {c.repair} | {100 * c.mean:+.1f} | {_interval(c.items)} | "
        f"{_interval(c.scenarios)} | {'yes' if c.holds else 'no'} |"
        for c in found
    ]
    lines += ["", f"### `{OURS}` against the dense model", ""]
    lines += ["| layout | keep | kept | repair | of dense | change | over items | over scenarios |", "|---" * 8 + "|"]
    lines += [
        f"| {r.layout} | {r.keep:g} | {r.ratio:.3f} | {r.repair} | {100 * r.relative:.1f} % | {100 * r.change:+.1f} | "
        f"{_interval(r.change_items)} | {_interval(r.change_scenarios)} |"
        for r in rows
        if r.name == OURS
    ]
    others = [r for r in rows if r.repair in ("flap-bias", "least-squares-mlp")]
    lines += ["", "### Other repairs", ""]
    lines += ["| repair | score | layout | keep | own domain | of dense |", "|---" * 6 + "|"]
    lines += [
        f"| {r.repair} | `{r.name}` | {r.layout} | {r.keep:g} | {r.own:.3f} | {100 * r.relative:.1f} % |"
        for r in others
    ]
    return "\n".join(lines) + "\n"


def shown_table(rows: Mapping[tuple[str, str, float, str], float]) -> str:
    """The table of the documents; `rows` gives exact match by name, layout, keep ratio and repair."""
    columns = [(layout, keep) for layout in LAYOUTS for keep in KEEPS]
    titles = [f"{layout} {keep:g}" if keep == KEEPS[0] else f"{keep:g}" for layout, keep in columns]
    lines = ["| score | " + " | ".join(titles) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, (name, repair) in SHOWN.items():
        values = " | ".join(f"{rows[name, layout, keep, repair]:.3f}" for layout, keep in columns)
        lines.append(f"| {label} | {values} |")
    return "\n".join(lines)


def summarised(summary: Path) -> tuple[str, float]:
    """The table of a `summary.json`, and the dense model's exact match on the scenario's domain."""
    stored = json.loads(summary.read_text("utf-8"))
    shown = shown_table({(r["name"], r["layout"], r["keep"], r["repair"]): r["own"] for r in stored["rows"]})
    return shown, stored["dense"]["own"]


def renew(path: Path, table: str) -> None:
    """Put the table in the place of the one that a document has."""
    text, found = re.subn(r"^\| score \|.*?(?=\n\n)", lambda _: table, path.read_text("utf-8"), flags=re.M | re.S)
    if found != 1:
        raise click.ClickException(f"{path} has {found} tables of scores instead of one.")
    path.write_text(text, "utf-8")


def figure(rows: list[Row], dense: float, path: Path) -> None:
    """Exact match over the keep ratio with repair, one panel per layout."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"
    from matplotlib import pyplot

    shown = {
        OURS: "C0",
        "greedy-kl": "C6",
        "kl": "C1",
        "flap": "C2",
        "wanda": "C3",
        "llm-pruner": "C4",
        "subspace": "C5",
        FIRST_LAYER: "0.4",
    }
    panels, axes = pyplot.subplots(1, len(LAYOUTS), figsize=(9, 3.6), sharey=True)
    for axis, layout in zip(axes, LAYOUTS, strict=True):
        axis.axhline(dense, color="black", linewidth=0.8, linestyle=":", label="dense")
        for name, colour in shown.items():
            line = [r for r in rows if (r.name, r.layout, r.repair) == (name, layout, "least-squares")]
            line.sort(key=lambda r: r.keep)
            axis.plot(
                [r.keep for r in line],
                [r.own for r in line],
                marker="o",
                markersize=3,
                color=colour,
                linewidth=2.2 if name == OURS else 1.2,
                label=name,
            )
        axis.set_title(f"{layout} layout", fontsize=10)
        axis.set_xlabel("kept share of heads")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("exact match, own domain")
    axes[-1].legend(fontsize=7, loc="lower right")
    panels.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    panels.savefig(path, metadata={"Date": None, "Creator": None})


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), default=RESULTS)
def main(results: Path) -> None:
    """Write the tables and the figure."""
    jobs = load(results)
    keys = sorted({k.rsplit("/", 1)[0] for cells in jobs.values() for k in cells if k.endswith("/own")})
    rows = [row_of(jobs, key) for key in keys if not key.startswith("dense")]
    reference = row_of(jobs, "dense/-/1/none")
    found = claims(jobs, rows)
    summary = {
        "scenarios": len(jobs),
        "dense": asdict(reference),
        "rows": [asdict(row) for row in rows],
        "claims": [asdict(claim) | {"holds": claim.holds} for claim in found],
    }
    (results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    text = tables(rows, found, (reference.own, reference.off))
    (results / "tables.md").write_text(text, "utf-8")
    figure(rows, reference.own, FIGURE)
    shown = shown_table({(r.name, r.layout, r.keep, r.repair): r.own for r in rows})
    for path in DOCUMENTS:
        renew(path, shown)
    click.echo(text)


if __name__ == "__main__":
    main()
