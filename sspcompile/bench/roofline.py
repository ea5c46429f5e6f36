"""What the bytes that must be read say about decoding, beside what was measured.

Decoding one token reads every matrix and the cache once, and computes little: on most machines the time to read them
bounds it from below (Williams, Waterman and Patterson 2009, "Roofline").
"""

from __future__ import annotations

from dataclasses import dataclass

from sspcompile.bench.ratios import Ratio
from sspcompile.intervals import Interval


@dataclass(frozen=True)
class Roofline:
    """One contender under one load. `bytes_per_step` of the whole batch, `flops_per_token` of one sequence.

    `floor_seconds` = bytes / measured bandwidth; `share` = floor / measured median time per step.
    """

    bytes_per_step: float
    flops_per_token: float | None
    floor_seconds: float
    measured_seconds: float

    @property
    def share(self) -> float:
        return self.floor_seconds / self.measured_seconds


@dataclass(frozen=True)
class Prediction:
    """How many times faster a decode step is by the bytes alone, and as measured.

    `realised` = (1 - 1 / measured) / (1 - 1 / predicted): the share of the predicted saving of time that arrived; None
    when nothing is predicted. `reference_share` is the reference's floor / measured time.
    """

    load: str
    reference: str
    contender: str
    predicted: float
    measured: float
    interval: Interval | None
    realised: float | None
    reference_share: float


def roofline(bytes_per_step: float, flops_per_token: float | None, bandwidth: float, measured: float) -> Roofline:
    """`bandwidth` in bytes per second, `measured` seconds per step."""
    return Roofline(bytes_per_step, flops_per_token, bytes_per_step / bandwidth, measured)


def predict(reference: Roofline, contender: Roofline, ratio: Ratio) -> Prediction:
    """`ratio` is that of the inter-token latency."""
    predicted, measured = reference.bytes_per_step / contender.bytes_per_step, ratio.improvement
    saving = 1 - 1 / predicted
    return Prediction(
        load=str(ratio.load),
        reference=ratio.reference,
        contender=ratio.contender,
        predicted=predicted,
        measured=measured,
        interval=ratio.improvement_interval,
        realised=(1 - 1 / measured) / saving if saving > 1e-6 else None,
        reference_share=reference.share,
    )
