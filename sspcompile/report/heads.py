"""A mask as the reports and the heat map read it."""

from __future__ import annotations

from sspcompile.report.model import MaskSection
from sspcompile.slicing.mask import HeadMask


def mask_section(mask: HeadMask) -> MaskSection:
    """The mask as the heat map reads it."""
    protected = mask.as_array() & False
    for layer, head in mask.whitelist:
        protected[layer, head] = True
    return MaskSection(
        layers=mask.layers,
        heads=mask.heads,
        kv_heads=mask.kv_heads,
        kept=mask.kept,
        scores=mask.scores,
        whitelist=tuple(map(tuple, protected.tolist())),
        criterion=mask.criterion,
        widths=mask.widths,
        intermediate=mask.intermediate if mask.channels is not None else None,
        removed=mask.removed,
        experts=mask.experts,
    )
