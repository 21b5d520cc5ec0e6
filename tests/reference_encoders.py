"""The reference encoders of the codebook types in NumPy, ported from docs/formats.md, 6.0, 6.6 and 6.7.

IQ4_NL and IQ4_XS are those of llama.cpp.
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
    step: int = 1


REFERENCES = {
    "IQ2_KS": Reference(tables.IQ2, 5, 32, 0, 1.5, 0.25),
    "IQ3_KS": Reference(tables.IQ3, 4, 32, 5, 2.0, 0.0),
    "IQ4_KS": Reference(tables.IQ4, 4, 32, 7, 2.0, 0.0),
    "IQ4_K": Reference(tables.IQ4, 4, 16, 7, 2.0, 0.0),
    "IQ5_K": Reference(tables.IQ5, 2, 16, 5, 2.0, 0.25),
    "IQ4_NL": Reference(tables.IQ4, None, 32, 7, 2.0, 0.0, 32),
    "IQ4_XS": Reference(tables.IQ4, None, 32, 7, 2.0, 0.0),
    "IQ5_KS": Reference(tables.IQ5, 2, 32, 5, 2.0, 0.0),
    "IQ2_K": Reference(tables.IQ2, 5, 16, 0, 1.5, 0.25),
    "IQ3_K": Reference(tables.IQ3, 4, 16, 3, 1.5, 0.25, step=2),
    "IQ6_K": Reference(tables.IQ6, 1, 16, 5, 2.0, 0.25),
    "IQ4_KSS": Reference(tables.IQ4, 4, 32, 7, 2.0, 0.0),
    "IQ2_KL": Reference(tables.IQ3, None, 32, 5, 2.25, 0.0, root=True),
}
UPSTREAM = frozenset({"IQ4_NL", "IQ4_XS"})
PARTITIONS = frozenset({"IQ2_KS", "IQ2_K"})
HEADERS = frozenset({"IQ4_KS", "IQ4_KSS", "IQ5_KS"})
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
    for k in range(-ref.tries * ref.step, ref.tries * ref.step + 1, ref.step):
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
    n = ref.sub_len
    cuts = [(a, b, c) for a in range(3 * n // 4) for b in range(a, n) for c in range(max(b, n // 4), n)]
    edges = np.array([(0, *cut, n) for cut in cuts])
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


def _fit_integers(scale: np.ndarray, w: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """6.2's search over the scales of a group with the range ``-top .. top - 1``: (integers, D)."""
    where = np.abs(scale).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(scale, where, axis=-1)
    best, d, integers = np.full(len(scale), -1, F), np.zeros(len(scale), F), np.zeros_like(scale)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = _ratio(np.full_like(extreme, -(F(top) + F(0.1) * F(step))), extreme)
        level = np.rint(inverse * scale).clip(-top, top - 1)
        s1, s2 = in_order(w * scale * level), in_order(w * level * level)
        better = (s2 > 0) & (s1 * s1 > best * s2)
        integers = np.where(better[:, None], level, integers)
        d = np.where(better, _ratio(s1, s2), d)
        best = np.where(better, _ratio(s1 * s1, s2), best)
    return integers, d


def _nearest_pairs(z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """IQ2_KL: values of the points nearest to pairs ``z`` [..., 32] under weights ``w``."""
    points = np.array(tables.KL_PAIRS, F)
    pairs, weight = z.reshape(*z.shape[:-1], 16, 1, 2), w.reshape(*w.shape[:-1], 16, 1, 2)
    return points[(weight * (pairs - points) ** 2).sum(axis=-1).argmin(axis=-1)].reshape(z.shape)


def _pairs(x: np.ndarray, w: np.ndarray, tries: int) -> np.ndarray:
    """IQ2_KL of ik_llama.cpp, ``x`` [rows, subs, 32]: 6.6's candidates, one table, and integers next to the rounded ones."""
    where = np.abs(x).argmax(axis=-1)[..., None]
    extreme = np.take_along_axis(x, where, axis=-1)[..., 0]
    best = _Best(extreme.shape)
    for numerator in (63, *(k - 63 for k in range(-tries, tries + 1))):
        inverse = _ratio(np.full_like(extreme, numerator), extreme)[..., None]
        for sign in (1, -1):
            v = _nearest_pairs(F(sign) * inverse * x, w)
            best.offer(in_order(w * v * x), in_order(w * v * v), False)
    widest = np.take_along_axis(best.scale, np.abs(best.scale).argmax(axis=-1)[:, None], axis=-1)
    d = -widest / F(32)
    rounded = np.rint(_ratio(best.scale, d + 0 * best.scale)).clip(-32, 31)
    least = np.full(rounded.shape, np.inf, F)
    s, v = np.zeros_like(rounded), np.zeros_like(x)
    for step in (-1, 0, 1):
        near = (rounded + F(step)).clip(-32, 31)
        scale = (d * near)[..., None]
        values = _nearest_pairs(_ratio(x, scale + 0 * x), w)
        error = in_order(w * (scale * values - x) ** 2)
        s, v = np.where(error < least, near, s), np.where((error < least)[..., None], values, v)
        least = np.minimum(error, least)
    sv = (s[..., None] * v).reshape(len(x), -1)
    wr, xr = w.reshape(sv.shape), x.reshape(sv.shape)
    d = F(1.025) * _ratio(in_order(wr * sv * xr), in_order(wr * sv * sv))
    return d.astype(np.float16).astype(F)[:, None] * sv


_ODD = np.array([code.bit_count() % 2 for code in range(16)], bool)


def _even(table: np.ndarray, x: np.ndarray, w: np.ndarray, scale: np.ndarray, sign: int = 1) -> np.ndarray:
    """IQ4_KSS: nearest values of words ``x`` [..., 8, 4], one of them changed by up to two codes where the parity is odd.

    The reference's cost of a change takes the unshifted table for what is, and no notice of a negative sign.
    """
    base = np.array(tables.IQ4, F)
    codes = nearest(table, F(sign) * _ratio(np.ones_like(scale), scale)[..., None, None] * x)
    odd = _ODD[codes].sum(axis=-1) % 2 == 1
    dl = scale[..., None, None]
    least, choice = np.full(odd.shape, np.inf, F), np.zeros((*odd.shape, 2), int)
    for j in range(4):
        for step in (-2, -1, 1, 2):
            code = codes[..., j]
            other = code + step
            legal = (other >= 0) & (other < 16)
            other = other.clip(0, 15)
            legal &= _ODD[other] != _ODD[code]
            now, then = (dl[..., 0] * t[c] - x[..., j] for t, c in ((base, code), (table, other)))
            cost = np.where(legal, w[..., j] * (then * then - now * now), np.inf)
            choice = np.where((cost < least)[..., None], np.stack([np.full_like(other, j), other], axis=-1), choice)
            least = np.minimum(cost, least)
    changed = np.where(np.arange(4) == choice[..., :1], choice[..., 1:], codes)
    return table[np.where(odd[..., None], changed, codes)]


def _even_words(ref: Reference, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """IQ4_KSS of ik_llama.cpp, ``x`` [rows, subs, 32]: 6.6 with parities, and the better table for the rounded scale."""
    shape = x.shape
    order = np.arange(32).reshape(2, 8, 2).transpose(1, 2, 0).reshape(8, 4)
    x, w = x[..., order], w[..., order]
    base = np.array(ref.table, F)
    flat = x.reshape(*shape[:2], 32)
    extreme = np.take_along_axis(flat, np.abs(flat).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    best = _Best(extreme.shape)
    for k in range(-ref.tries, ref.tries + 1):
        for table in (base, base + F(ref.shift or 0)):
            scale = _ratio(extreme, np.full_like(extreme, F(k) + table[0]))
            for sign in (1, -1):
                v = _even(table, x, w, scale, sign)
                terms = (w * v * x).reshape(flat.shape), (w * v * v).reshape(flat.shape)
                best.offer(in_order(terms[0]), in_order(terms[1]), False)
    d = np.abs(best.scale).max(axis=-1, keepdims=True) / F(127)
    s = F(2) * np.rint((_ratio(best.scale, d + 0 * best.scale) + F(127)) / F(2)).clip(0, 127) - F(127)
    scale = d * s
    values = [_even(table, x, w, scale) for table in (base, base + F(ref.shift or 0))]
    errors = [(w * (x - scale[..., None, None] * v) ** 2).sum(axis=(-2, -1)) for v in values]
    sv = np.where((errors[1] < errors[0])[..., None, None], values[1], values[0]) * s[..., None, None]
    wr, xr, sr = (a.reshape(len(x), -1) for a in (w, x, sv))
    y = (F(1.01) * _ratio(in_order(wr * sr * xr), in_order(wr * sr * sr)))[:, None] * sr
    out = np.empty(shape, F)
    out[..., order] = y.reshape(x.shape)
    return out


def reference_values(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Decode what the reference encoder makes of ``x`` [rows, n]."""
    ref = REFERENCES[name]
    rows = x.astype(F)
    w = weights(name, rows, importance).reshape(len(x), -1, ref.sub_len)
    subs = rows.reshape(w.shape)
    base = np.array(ref.table, F)
    if name == "IQ2_KL":
        return _pairs(subs, w, ref.tries).reshape(x.shape)
    if name == "IQ4_KSS":
        return _even_words(ref, subs, w).reshape(x.shape)
    best = _partitions(ref, subs, w) if name in PARTITIONS else _search(ref, subs, w)
    if name == "IQ4_NL":
        d = best.scale
        codes = nearest(base, subs * _ratio(np.ones_like(d), d)[..., None])
        return (d.astype(np.float16).astype(F)[..., None] * base[codes]).reshape(x.shape)
    shifted = base + F(ref.shift or 0)
    twin = best.twin[..., None]
    if name in {"IQ3_K", "IQ5_K", "IQ6_K"}:  # one more turn with the codes of the winner
        z = subs * _ratio(np.ones_like(best.scale), best.scale)[..., None]
        v = np.where(twin, shifted[nearest(shifted, z)], base[nearest(base, z)]).astype(F)
        best.scale = np.where(best.scale == 0, F(0), _ratio(in_order(w * v * subs), in_order(w * v * v)))
    group = 16 if ref.sub_len == 16 else 8 if name == "IQ4_XS" else subs.shape[1]
    scale = best.scale.reshape(-1, group)
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1)[:, None], axis=-1)[:, 0]
    if name in PARTITIONS:
        top = 16 if name == "IQ2_KS" else 8
        s, d0 = _fit_integers(scale, in_order(w).reshape(scale.shape), top)
        if name == "IQ2_K":
            s = np.rint(_ratio(scale, d0[:, None] + 0 * scale)).clip(-top, top - 1)
    elif name == "IQ3_K":
        d0 = np.abs(extreme) / F(31)
        s = F(2) * np.rint((_ratio(np.abs(scale), d0[:, None] + 0 * scale) - F(1)) / F(2)).clip(0, 15) + F(1)
        s = np.where(scale < 0, -s, s)
    elif name == "IQ6_K":
        d0 = -extreme / F(127)
        s = np.rint(_ratio(scale, d0[:, None] + 0 * scale)).clip(-127, 127)
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
    if name in {"IQ2_KS", "IQ5_K", "IQ6_K"}:
        v = np.where(step[..., None] == 0, np.where(twin, shifted[0], base[0]), v)
    sv = (s.reshape(subs.shape[:2])[..., None] * v).astype(F).reshape(len(scale), -1)
    wg, xg = w.reshape(sv.shape), subs.reshape(sv.shape)
    d = d0 if name == "IQ4_XS" else _ratio(in_order(wg * sv * xg), in_order(wg * sv * sv))
    d = d * F({"IQ2_KS": 1.03, "IQ2_K": 1.03, "IQ3_K": 1.01}.get(name, 1))
    if name not in HEADERS:
        d = d.astype(np.float16).astype(F)
    if name == "IQ6_K":  # searched with rounded values, decoded with the cubic's
        cubic = np.array(tables.P6_BITS, np.uint32).view(F)[np.searchsorted(base, np.where(twin, v - F(1), v))]
        return ((d[:, None] * s).reshape(subs.shape[:2])[..., None] * (cubic + twin.astype(F))).reshape(x.shape)
    return (d[:, None] * sv).reshape(x.shape)
