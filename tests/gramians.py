"""Gradients whose Gramians are hard on a solver, in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Rows = np.ndarray


def _plain(rng: np.random.Generator, m: int) -> Rows:
    return rng.standard_normal((m, 2 * m + 20))


def _leaning(rng: np.random.Generator, m: int) -> Rows:
    return _plain(rng, m) + 0.5 * rng.standard_normal((1, 2 * m + 20))


def _crossed(rng: np.random.Generator, m: int) -> Rows:
    """Nearly cancelling: most pairs conflict."""
    rows = _plain(rng, m)
    return rows - 0.9 * rows.mean(axis=0)


def _scaled(rng: np.random.Generator, m: int) -> Rows:
    return _plain(rng, m) * rng.permutation(np.logspace(-6, 6, m))[:, None]


def _ill_conditioned(rng: np.random.Generator, m: int) -> Rows:
    """Condition 1e5, so 1e10 of the Gramian."""
    left, _, right = np.linalg.svd(_plain(rng, m), full_matrices=False)
    return (left * np.logspace(0, -5, m)) @ right


def _duplicated(rng: np.random.Generator, m: int) -> Rows:
    rows = _plain(rng, m)
    rows[-1] = rows[0]
    return rows


def _dependent(rng: np.random.Generator, m: int) -> Rows:
    rows = _plain(rng, m)
    rows[-1] = 0.3 * rows[0] + 0.7 * rows[m // 2]
    return rows


def _flat(rng: np.random.Generator, m: int) -> Rows:
    """More rows than dimensions: the hull holds the origin for large m."""
    return rng.standard_normal((m, max(1, m // 3)))


def _with_a_zero(rng: np.random.Generator, m: int) -> Rows:
    rows = _plain(rng, m)
    rows[m // 2 : m // 2 + (m > 1)] = 0.0
    return rows


KINDS: dict[str, Callable[[np.random.Generator, int], Rows]] = {
    "plain": _plain,
    "leaning": _leaning,
    "crossed": _crossed,
    "scaled": _scaled,
    "ill-conditioned": _ill_conditioned,
    "duplicated": _duplicated,
    "dependent": _dependent,
    "flat": _flat,
    "with a zero": _with_a_zero,
}


def rows_of(kind: str, m: int, seed: int = 0) -> Rows:
    """(m, n) float64 gradients of that kind."""
    return KINDS[kind](np.random.default_rng([seed, m]), m)


def terms_of(gramian: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(m,) what rounding of K c is relative to: Σ |K_ij c_j|."""
    return np.abs(gramian) @ np.abs(weights)


NUMBERS: dict[str, tuple[float, ...]] = {
    "constant": (1.0,),
    "inverse_norm": (-1.5,),
    "pcgrad": (),
    "priority": (),
    "mgda": (),
    "cagrad": (0.5, 1.0),
    "imtlg": (),
    "nash": (0.5,),
    "fairgrad": (2.0,),
    "aligned": (1.0,),
    "dualproj": (),
    "upgrad": (),
    "gradvac": (0.3,),
    "sdmgrad": (0.3, 0.1, 0.5, 10.0),
}
"""The kinds of rules, and numbers for each."""


def operand(kind: str, m: int, seed: int = 0) -> np.ndarray | None:
    """What a rule takes besides the Gramian: keys, targets and keys, or weights on the simplex."""
    random = np.random.default_rng(seed)
    keys = random.random((m, m))
    made = {
        "pcgrad": keys,
        "gradvac": np.stack([random.uniform(-0.9, 0.9, (m, m)), keys]),
        "sdmgrad": random.dirichlet(np.ones(m)),
    }
    return made.get(kind)
