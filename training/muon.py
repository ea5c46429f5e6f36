"""Muon: momentum whose matrices are brought near orthogonality before the step (Jordan et al., 2024).

Matrices of one shape are orthogonalised together, which is most of the time it takes for a small model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration, from the reference description of Muon."""
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each of the [count, rows, columns] matrices with its singular values moved to about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Steps on 2-d weights; `learning_rate` may be changed between steps."""

    def __init__(self, parameters: Iterable[Parameter], learning_rate: float, momentum: float, decay: float) -> None:
        """`decay` is decoupled weight decay, a share of the learning rate."""
        self.learning_rate, self.momentum, self.decay = learning_rate, momentum, decay
        by_shape: dict[torch.Size, list[Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        self._groups = list(by_shape.values())
        self._buffers = [torch.zeros(len(group), *group[0].shape) for group in self._groups]

    @torch.no_grad()
    def step(self) -> None:
        """One step from the gradients in place."""
        for group, buffer in zip(self._groups, self._buffers, strict=True):
            gradient = torch.stack([parameter.grad for parameter in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalised(gradient.lerp(buffer, self.momentum))
            rows, columns = update.shape[1:]
            scale = self.learning_rate * max(1.0, rows / columns) ** 0.5
            for parameter, change in zip(group, update, strict=True):
                parameter.mul_(1 - self.learning_rate * self.decay).sub_(change, alpha=scale)
