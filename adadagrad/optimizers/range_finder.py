"""A basis of the directions in which a matrix is large, from one random sketch, and how many of them it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Subspace:
    """Orthonormal directions, the ones that carry most first, and what is left of a matrix beside them.

    Args:
        basis: (m, k) orthonormal columns.
        residuals: (k + 1,) share of the squared norm that the first 0, 1, ..., k columns miss, falling from 1.
    """

    basis: Tensor
    residuals: Tensor

    def rank(self, max_residual_energy: float, lowest: int, highest: int) -> int:
        """Return the smallest rank whose columns miss no more than a share of the squared norm.

        Args:
            max_residual_energy: The share.
            lowest: Smallest answer.
            highest: Largest answer, also where it misses more.

        Returns:
            The rank.
        """
        highest = min(highest, self.basis.shape[1])
        enough = (self.residuals <= max_residual_energy).nonzero()
        first = int(enough[0]) if len(enough) else highest
        return min(max(first, lowest), highest)


def find_subspace(matrix: Tensor, size: int, *, power_iterations: int, generator: torch.Generator) -> Subspace | None:
    r"""Find directions that carry most of a matrix: a randomised range finder, turned so that they are in order.

    .. math:: Q = \operatorname{qr}(G \Omega), \qquad Q^\top G = U S V^\top, \qquad
        \text{residual}(r) = 1 - \sum_{i \le r} S_i^2 / \|G\|_F^2

    In code: Omega is Gaussian, (n, size); the columns are those of Q U. One sketch serves every rank: the first r
    columns are the best r within it, where a sketch for each rank would be worse and dearer. About 4 m n size flops.

    Args:
        matrix: G, (m, n) with m <= n, float32 or float64.
        size: Columns wanted, at most m.
        power_iterations: How often G G^T is applied to the sketch first, for slowly falling spectra.
        generator: Draws Omega; on the matrix's device.

    Returns:
        The subspace; None where G is 0 or not finite, or its decomposition does not converge. Whatever else goes wrong
        is raised, running out of memory above all.

    Source: Halko, Martinsson, Tropp (2011), arXiv 0909.4061, algorithms 4.1 and 4.3.

    Example:
        >>> matrix = torch.diag(torch.tensor([3.0, 2.0, 0.1, 0.0]))
        >>> found = find_subspace(matrix, 3, power_iterations=0, generator=torch.Generator().manual_seed(0))
        >>> found.rank(0.01, 1, 3)
        2
    """
    largest = float(matrix.abs().amax())
    if not 0 < largest < math.inf:
        return None
    matrix = matrix / largest  # squares of very large or small gradients leave the range of float32
    sketch = matrix @ torch.randn(matrix.shape[1], size, generator=generator, device=matrix.device, dtype=matrix.dtype)
    try:
        basis = torch.linalg.qr(sketch).Q
        for _ in range(power_iterations):
            basis = torch.linalg.qr(matrix @ (matrix.T @ basis)).Q
        left, values, _ = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    total = torch.linalg.vector_norm(matrix).square()
    captured = torch.cat([values.new_zeros(1), values.square().cumsum(0)]) / total
    return Subspace(basis @ left, (1 - captured).clamp(min=0))
