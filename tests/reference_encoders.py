"""The reference encoders of most codebook types in NumPy, ported from FORMATS.md 6.0, 6.6 and 6.7 (IQ4_NL, IQ4_XS: llama.cpp).

They give decoded values, not bytes: what a search must beat on data that has no vectors. Float32 with sequential sums, no
fused operations; the C libraries fuse some, so last bits of scales and ties differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ggufx import tables

F = np.float32


class Reference(NamedTuple):
    """What distinguishes the types."""

    table: tuple[int, ...]
    shift: int | None
    sub_len: int
    tries: int
    sigma: float
    plain: float
    mean_over: int = 256
    root: bool = False
    ported: bool = True


REFERENCES = {
    "IQ2_KS": Reference(tables.IQ2, 5, 32, 0, 1.5, 0.25),
    "IQ3_KS": Reference(tables.IQ3, 4, 32, 5, 2.0, 0.0),
    "IQ4_KS": Reference(tables.IQ4, 4, 32, 7, 2.0, 0.0),
    "IQ4_K": Reference(tables.IQ4, 4, 16, 7, 2.0, 0.0),
    "IQ5_K": Reference(tables.IQ5, 2, 16, 5, 2.0, 0.25),
    "IQ4_NL": Reference(tables.IQ4, None, 32, 7, 2.0, 0.0, 32),
    "IQ4_XS": Reference(tables.IQ4, None, 32, 7, 2.0, 0.0),
    "IQ5_KS": Reference(tables.IQ5, 2, 32, 5, 2.0, 0.0),
    "IQ2_K": Reference(tables.IQ2, 5, 16, 0, 1.5, 0.25, ported=False),
    "IQ3_K": Reference(tables.IQ3, 4, 16, 0, 1.5, 0.25, ported=False),
    "IQ6_K": Reference(tables.IQ6, 1, 16, 0, 2.0, 0.25, ported=False),
    "IQ4_KSS": Reference(tables.IQ4, 4, 32, 0, 2.0, 0.0, ported=False),
    "IQ2_KL": Reference(tables.IQ3, None, 32, 0, 2.25, 0.0, root=True, ported=False),
}
"""Those that are not ported have weights only."""
PORTED = tuple(name for name, reference in REFERENCES.items() if reference.ported)
UPSTREAM = frozenset({"IQ4_NL", "IQ4_XS"})
HEADERS = frozenset({"IQ4_KS", "IQ5_KS"})
"""With a float32 scale per row, whose last bits depend on the order of sums, and odd sub-scales of 7 bits."""


def in_order(terms: np.ndarray) -> np.ndarray:
    """Sum the last axis as a C loop does."""
    return np.cumsum(terms, axis=-1, dtype=F)[..., -1]


def weights(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Weights of the reference, float32 like ``x`` [rows, n]."""
    ref = REFERENCES[name]
    blocks = x.reshape(len(x), -1, ref.mean_over)
    sigma2 = (F(ref.sigma) * in_order(blocks * blocks) / F(ref.mean_over))[..., None]
    if importance is None:
        plain = F(ref.plain) * sigma2 + blocks * blocks
        return (np.sqrt(plain) if ref.root else plain).reshape(x.shape)
    m = np.broadcast_to(importance, x.shape).reshape(len(x), -1, ref.sub_len)
    if name not in UPSTREAM:
        subs = x.reshape(m.shape)
        sums = (in_order(m * m), in_order(subs * subs), in_order(m * np.abs(subs)))
        dead = np.any([s <= F(ref.sub_len * 1e-18) for s in sums], axis=0)
        m = np.where(dead[..., None], F(1e-9), m)
    return (m.reshape(blocks.shape) * np.sqrt(sigma2 + blocks * blocks)).reshape(x.shape)


def nearest(table: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Index of the nearest entry, the upper one on a midpoint."""
    mids = ((table[1:] + table[:-1]) / 2).astype(F)
    return np.searchsorted(mids, z, side="right")


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


class _Best:
    """Highest explained energy so far, per sub-block."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.energy, self.scale = np.zeros(shape, F), np.zeros(shape, F)
        self.twin = np.zeros(shape, bool)

    def offer(self, s1: np.ndarray, s2: np.ndarray, twin: bool) -> None:
        better = (s2 > 0) & (s1 * s1 > self.energy * s2)
        scale = _ratio(s1, s2)
        self.scale = np.where(better, scale, self.scale)
        self.energy = np.where(better, scale * s1, self.energy)
        self.twin = np.where(better, twin, self.twin)


def _search(ref: Reference, x: np.ndarray, w: np.ndarray) -> _Best:
    """6.6: candidates round the extreme element, both signs, both tables."""
    where = np.abs(x).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(x, where, axis=-1)[..., 0]
    best = _Best(extreme.shape)
    base = np.array(ref.table, F)
    candidates = [(-base[0], base, False)]
    for k in range(-ref.tries, ref.tries + 1):
        candidates.append((F(k) + base[0], base, False))
        if ref.shift is not None:
            candidates.append((F(k) + base[0] + F(ref.shift), base + F(ref.shift), True))
    for numerator, table, twin in candidates:
        inverse = _ratio(np.full_like(extreme, numerator), extreme)[..., None]
        for sign in (1, -1) if ref.shift is not None else (1,):
            v = table[nearest(table, F(sign) * inverse * x)]
            best.offer(in_order(w * v * x), in_order(w * v * v), twin)
    tiny = np.abs(extreme) < F(1e-16 if ref.shift is not None else 1e-15)
    best.scale, best.twin = np.where(tiny, F(0), best.scale), best.twin & ~tiny
    return best


def _partitions(ref: Reference, x: np.ndarray, w: np.ndarray) -> _Best:
    """6.7: every partition of the sorted values, in both directions of both tables."""
    order = np.argsort(x, axis=-1, kind="stable")
    sx, sw = np.take_along_axis(x, order, axis=-1), np.take_along_axis(w, order, axis=-1)
    pad = [(0, 0)] * (x.ndim - 1) + [(1, 0)]
    cum_w = np.pad(np.cumsum(sw, axis=-1, dtype=F), pad)
    cum_wx = np.pad(np.cumsum(sw * sx, axis=-1, dtype=F), pad)
    cuts = [(a, b, c) for a in range(24) for b in range(a, 32) for c in range(max(b, 8), 32)]
    edges = np.array([(0, *cut, 32) for cut in cuts])
    best = _Best(x.shape[:-1])
    for start in range(0, len(edges), 512):
        part = edges[start : start + 512]
        run_w, run_wx = (c[..., part[:, 1:]] - c[..., part[:, :-1]] for c in (cum_w, cum_wx))
        for twin in (False, True):
            table = np.array(ref.table, F) + F(ref.shift if twin else 0)
            for values in (table, table[::-1]):
                s1, s2 = (run_wx * values).sum(axis=-1), (run_w * values * values).sum(axis=-1)
                top = np.where(s2 > 0, s1 * s1 / np.where(s2 > 0, s2, 1), 0).argmax(axis=-1)[..., None]
                best.offer(
                    np.take_along_axis(s1, top, axis=-1)[..., 0], np.take_along_axis(s2, top, axis=-1)[..., 0], twin
                )
    return best


def _fit_integers(scale: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """6.2's search over a row's scales with the range -16..15: (integers, D)."""
    where = np.abs(scale).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(scale, where, axis=-1)
    best, d, integers = np.full(len(scale), -1, F), np.zeros(len(scale), F), np.zeros_like(scale)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = _ratio(np.full_like(extreme, -(F(16) + F(0.1) * F(step))), extreme)
        level = np.rint(inverse * scale).clip(-16, 15)
        s1, s2 = in_order(w * scale * level), in_order(w * level * level)
        better = (s2 > 0) & (s1 * s1 > best * s2)
        integers = np.where(better[:, None], level, integers)
        d = np.where(better, _ratio(s1, s2), d)
        best = np.where(better, _ratio(s1 * s1, s2), best)
    return integers, d


def reference_values(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Decode what the reference encoder makes of ``x`` [rows, n]."""
    ref = REFERENCES[name]
    rows = x.astype(F)
    w = weights(name, rows, importance).reshape(len(x), -1, ref.sub_len)
    subs = rows.reshape(w.shape)
    base = np.array(ref.table, F)
    best = _partitions(ref, subs, w) if name == "IQ2_KS" else _search(ref, subs, w)
    if name == "IQ4_NL":
        d = best.scale
        codes = nearest(base, subs * _ratio(np.ones_like(d), d)[..., None])
        return (d.astype(np.float16).astype(F)[..., None] * base[codes]).reshape(x.shape)
    shifted = base + F(ref.shift or 0)
    twin = best.twin[..., None]
    if name == "IQ5_K":  # one more turn with the codes of the winner
        z = subs * _ratio(np.ones_like(best.scale), best.scale)[..., None]
        v = np.where(twin, shifted[nearest(shifted, z)], base[nearest(base, z)]).astype(F)
        best.scale = np.where(best.scale == 0, F(0), _ratio(in_order(w * v * subs), in_order(w * v * v)))
    group = 16 if name in {"IQ4_K", "IQ5_K"} else 8 if name == "IQ4_XS" else subs.shape[1]
    scale = best.scale.reshape(-1, group)
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1)[:, None], axis=-1)[:, 0]
    if name == "IQ2_KS":
        s, d0 = _fit_integers(scale, in_order(w).reshape(scale.shape))
    elif name in HEADERS:
        d0 = np.abs(extreme) / F(127)
        s = F(2) * np.rint((_ratio(scale, d0[:, None] + 0 * scale) + F(127)) / F(2)).clip(0, 127) - F(127)
    else:
        top = 16 if name == "IQ3_KS" else 32
        d0 = -extreme / F(top)
        s = np.rint(_ratio(scale, d0[:, None] + 0 * scale)).clip(-top, top - 1)
    step = (d0[:, None] * s).reshape(subs.shape[:2])
    z = _ratio(subs, np.broadcast_to(step[..., None], subs.shape).astype(F))
    v = np.where(twin, shifted[nearest(shifted, z)], base[nearest(base, z)]).astype(F)
    if name in {"IQ2_KS", "IQ5_K"}:
        v = np.where(step[..., None] == 0, np.where(twin, shifted[0], base[0]), v)
    sv = (s.reshape(subs.shape[:2])[..., None] * v).astype(F).reshape(len(scale), -1)
    wg, xg = w.reshape(sv.shape), subs.reshape(sv.shape)
    d = d0 if name == "IQ4_XS" else _ratio(in_order(wg * sv * xg), in_order(wg * sv * sv))
    if name == "IQ2_KS":
        d = d * F(1.03)
    if name not in HEADERS:
        d = d.astype(np.float16).astype(F)
    return (d[:, None] * sv).reshape(x.shape)
