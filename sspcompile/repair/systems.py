"""Ridge regressions around a start, fed a batch at a time:

    min_W sum_n w_n |x_n W^T - y_n|^2 + ridge * sum_c m_c |W_c - W0_c|^2

with m_c the energy of input c, the diagonal of X^T diag(w) X: no input is damped for how loud others are (Marquardt, An
algorithm for least-squares estimation of nonlinear parameters, 1963).

By the normal equations with as many unknowns per output as there are inputs; or, where there are fewer rows than
inputs, by the same solution in terms of the rows (Saunders, Gammerman and Vovk, Ridge regression learning algorithm in
dual variables, 1998). With n rows, c inputs and d outputs they multiply and add about

    normal    n c^2 + 2/3 c^3 + c^2 d        dual    n^2 c + 2/3 n^3 + 2 n c d
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sspcompile.model.stored import double_device, in_double

# Of the mean over inputs, for one that no text excites.
LEAST_ENERGY = 1e-6
# Of sums that are added to at a time.
BAND_ROWS = 256


class System(Protocol):
    """A regression: rows are added, then it is solved once."""

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Rows x [N, inputs] and y [N, outputs], with a weight [N] each."""

    def solve(self, start: Tensor, ridge: float, least: float = LEAST_ENERGY) -> Tensor:
        """W^T [inputs, outputs] that minimises the ridge problem around `start`, of the same shape, in float64.
        `least`: of the mean energy, what counts at least as the energy of an input.
        """


def system_of(rows: int, inputs: int, outputs: int, device: torch.device) -> System:
    """The cheaper of the two for so many rows of a wide matrix, products of one batch in fp32."""
    if rows < inputs:
        return Dual(device)
    return Normal(inputs, outputs, device, exact=False)


class Normal:
    """Normal equations in float64: X^T diag(w) X and X^T diag(w) Y, summed over batches.

    They are worked out on `device`, or on the CPU for one without float64. Not `exact`: the products of one batch are
    made in fp32, at half of the price; their rounding lies far below the ridge. What they hold is
    `model/working.system_bytes`.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device, *, exact: bool = True) -> None:
        device = double_device(device)
        self._exact = exact
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        given = [one.to(self.xx.device) for one in (x, y, weights)]
        x, y, w = map(in_double if self._exact else Tensor.float, given)
        weighted = x * w.unsqueeze(1)
        _add_by_bands(self.xx, weighted.T @ x)
        _add_by_bands(self.xy, weighted.T @ y)

    def solve(self, start: Tensor, ridge: float, least: float = LEAST_ENERGY) -> Tensor:
        """See `System`. The sums become the system, then its factors, so that no second matrix is held.

        Raises LinAlgError for a system that is singular, which only one without a ridge can be.
        """
        xx, xy = self.xx, self.xy
        del self.xx, self.xy
        start = in_double(start).to(xx.device)
        energy = xx.diagonal()
        if not energy.mean() > 0:
            return start
        strength = ridge * _audible(energy, least)
        energy.add_(strength)
        xy.addcmul_(start, strength[:, None])
        del start
        # Factors are stored by columns: those of the transpose take the place of what is stored by rows.
        factors = xx.mT
        pivots, info = (torch.empty(0, dtype=torch.int32, device=xx.device) for _ in range(2))
        torch.linalg.lu_factor_ex(factors, out=(factors, pivots, info))
        if info.any():
            raise torch.linalg.LinAlgError("The system of a repair is singular.")  # type: ignore[attr-defined]
        return torch.linalg.lu_solve(factors, pivots, xy, adjoint=True)


class Dual:
    """The rows themselves, [N, inputs] and [N, outputs] in fp32, each times the root of its weight."""

    def __init__(self, device: torch.device) -> None:
        self._device = double_device(device)
        self._rows: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        x, y, root = (one.to(self._device).float() for one in (x, y, weights.sqrt()))
        self._rows.append((x * root.unsqueeze(1), y * root.unsqueeze(1)))

    def solve(self, start: Tensor, ridge: float, least: float = LEAST_ENERGY) -> Tensor:
        start = in_double(start).to(self._device)
        x, y = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        energy = in_double(x.square().sum(0))
        if not energy.mean() > 0:
            return start
        missing = in_double(y) - in_double(x @ start.float())
        # With inputs and weights in units of the root of an input's energy all are damped alike.
        unit = _audible(energy, least).sqrt()
        x = x / unit.float()
        system = in_double(x @ x.T) + ridge * torch.eye(len(x), dtype=torch.float64, device=self._device)
        change = in_double(x.T @ torch.linalg.solve(system, missing).float())
        return start + change / unit[:, None]


def _add_by_bands(sums: Tensor, product: Tensor) -> None:
    """torch makes a copy in float64 of all that it adds at a time."""
    for band, part in zip(sums.split(BAND_ROWS), product.split(BAND_ROWS), strict=True):
        band += part


def _audible(energy: Tensor, least: float) -> Tensor:
    """Energies of inputs, with the least that counts for one that no text excites: its weights stay as they were."""
    return energy.clamp_min(least * float(energy.mean()))
