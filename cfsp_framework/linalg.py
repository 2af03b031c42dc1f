"""Second-order algebra of removing channels from ``y = W h``: removal order, error curves, least-squares updates.

``W (D, F)`` is a down projection, ``G (F, F)`` the Gram matrix ``sum_t h_t h_t^T`` of its inputs, ``K`` the channels
kept and ``P`` those removed. A constant factor in G changes nothing. Damping adds ``damping * mean(diag G)`` to the
diagonal. Everything is computed in float64. Sources: block OBS as in SlimGPT (arXiv 2412.18110) and OSSCAR (arXiv
2403.12983), least squares as in GRAIL (arXiv 2602.23795), but damped toward the original weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RAISES = 5


def damped(gram: Tensor, damping: float) -> Tensor:
    """Add ``damping`` times the mean diagonal to that of ``G (F, F)``, float64; entries that are still 0 become 1."""
    exact = gram.double()
    diagonal = exact.diagonal()
    added = damping * diagonal.mean()
    return exact + (added + (diagonal + added <= 0)).diag_embed()  # inputs that are always 0 must stay invertible


def positive_inverse(matrix: Tensor) -> Tensor:
    """Invert a positive definite matrix ``(F, F)`` through its Cholesky factor."""
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """Invert the damped Gram matrix ``(F, F)``; the damping grows tenfold until it is positive definite.

    Raises:
        torch.linalg.LinAlgError: it is not, after five times.
    """
    for attempt in range(_RAISES):
        try:
            return positive_inverse(damped(gram, damping * 10**attempt))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    return positive_inverse(damped(gram, damping * 10**_RAISES))


def greedy_removal(weight: Tensor, gram: Tensor, damping: float = 1e-2, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Return the order of removal ``(F,)``, first removed first, and the squared output error after each, ``(F + 1,)``.

    Each step removes the ``batch`` channels with the least loss after re-fitting all others, and updates the weights and
    the inverse of the remaining ones. The order is nested: the kept channels of any width are its tail. Inside a batch
    the error is interpolated.
    """
    weights = weight.double().clone()  # (D, A), A channels still in the arrays
    inverse = damped_inverse(gram, damping)  # (A, A)
    alive = torch.arange(weight.shape[1], device=weight.device)  # (A,) their indices
    removed = torch.zeros_like(alive, dtype=torch.bool)  # (A,) since the arrays were last made smaller
    order: list[Tensor] = []
    errors = [weights.new_zeros(1)]
    for left in range(len(alive), 0, -batch):
        losses = weights.square().sum(0) / inverse.diagonal()  # (A,)
        chosen = losses.masked_fill(removed, torch.inf).argsort(stable=True)[: min(batch, left)]  # (B,)
        rows, columns = inverse[chosen], weights[:, chosen]  # (B, A), (D, B)
        coupling = torch.linalg.inv(rows[:, chosen])  # (B, B)
        lost = ((columns @ coupling) * columns).sum()
        steps = torch.arange(1, len(chosen) + 1, device=weight.device, dtype=torch.float64) / len(chosen)
        errors.append(errors[-1][-1] + lost * steps)
        order.append(alive[chosen])
        correction = coupling @ rows  # (B, A)
        weights.addmm_(columns, correction, alpha=-1)
        inverse.addmm_(rows.mT, correction, alpha=-1)
        removed[chosen] = True
        if 4 * int(removed.sum()) >= len(alive):  # copying at every step would take longer than the algebra
            weights, alive = weights[:, ~removed], alive[~removed]
            inverse = inverse[~removed][:, ~removed]
            inverse = (inverse + inverse.mT) / 2
            removed = torch.zeros_like(alive, dtype=torch.bool)
    return torch.cat(order), torch.cat(errors)


def plain_curve(weight: Tensor, gram: Tensor, order: Tensor) -> Tensor:
    """Return the squared output error after removing the first k channels of ``order (F,)`` only, for k = 0..F.

    ``trace(W_P G_PP W_P^T)``, ``(F + 1,)`` float64.
    """
    ordered = weight.double()[:, order]  # (D, F), first removed first
    products = (ordered.mT @ ordered) * gram.double()[order][:, order]  # (F, F)
    return _summed(products.tril(-1).sum(1) * 2 + products.diagonal())  # (F,): what each further removal adds


def compensated_curve(weight: Tensor, inverse: Tensor, order: Tensor) -> Tensor:
    """Return ``plain_curve`` with the kept weights re-fitted, from the ``inverse (F, F)`` of the damped Gram matrix ``H``.

    ``trace(W_P ([H^-1]_PP)^-1 W_P^T)``; one factorisation serves all k.
    """
    ordered = weight.double()[:, order]  # (D, F), first removed first
    factor = torch.linalg.cholesky(inverse[order][:, order])
    return _summed(torch.linalg.solve_triangular(factor, ordered.mT, upper=False).square().sum(1))  # (F,)


def _summed(steps: Tensor) -> Tensor:
    return torch.cat([steps.new_zeros(1), steps.cumsum(0)])


def least_squares(weight: Tensor, gram: Tensor, cross: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return the kept weights ``(D, K)`` that map ``h_K`` closest to a target ``t``, damped toward the original ones.

    ``cross (D, F)`` is ``sum_t t h^T``; ``W G`` if the target is the dense output itself. Minimises
    ``|t - (W_K + U) h_K|^2 + damping * mean(diag G) |U|^2`` over the update U, so a large damping is plain pruning.
    """
    exact = gram.double()
    own = weight.double()[:, kept]  # (D, K)
    inner = exact[kept][:, kept]  # (K, K)
    residual = cross.double()[:, kept] - own @ inner  # (D, K)
    shift = damping * exact.diagonal().mean() + (inner.diagonal() <= 0)  # (K,)
    factor = torch.linalg.cholesky(inner + shift.diag_embed())
    return own + torch.cholesky_solve(residual.mT, factor).mT


def output_square(weight: Tensor, gram: Tensor) -> float:
    """Return the squared output ``trace(W G W^T)`` of all F channels."""
    exact = weight.double()
    return ((exact @ gram.double()) * exact).sum().item()


def output_error(weight: Tensor, kept_weight: Tensor, kept: Tensor, gram: Tensor, cross: Tensor | None = None) -> float:
    """Return the squared error of ``W'_K h_K`` against the target, minus the target's square if ``cross`` is given.

    Without ``cross`` the target is ``W h`` and the value is ``trace(R G R^T)``, R the change of all F weights.
    """
    change = weight.double().clone()  # (D, F)
    change[:, kept] -= kept_weight.double()
    exact = gram.double()
    if cross is None:
        return ((change @ exact) * change).sum().item()
    new = kept_weight.double()  # (D, K)
    inner = exact[kept][:, kept]  # (K, K)
    return ((new @ inner) * new).sum().item() - 2 * (new * cross.double()[:, kept]).sum().item()
