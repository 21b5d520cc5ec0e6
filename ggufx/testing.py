"""The test kit for quant types: the laws that every codec obeys, and Hypothesis strategies for its inputs.

For your own type, in your own test suite::

    from ggufx import testing

    def test_my_type():
        testing.check(MY_TYPE())                    # all laws; LawBroken names the broken one, with the numbers

    @given(testing.rows(MY_TYPE()))                 # pip install "ggufx[testing]"
    def test_my_decoder(rows):
        testing.law_decode_kernel(MY_TYPE(), rows=rows)

``ggufx selftest MY_TYPE`` does the first on the command line. The laws (:data:`LAWS`) draw their inputs from a seeded NumPy
generator, so that they need nothing but NumPy and give the same verdict every time; only the strategies import Hypothesis.
A law looks at one thing, and what it presupposes is another law (:attr:`Law.needs`): a broken codec breaks the law that says
what is wrong with it, and laws that build on that one are left undecided.
"""

from __future__ import annotations

import mmap
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ggufx import dialects, types
from ggufx.container import align_up, encode_header
from ggufx.errors import CodecError, GGUFError, UnsupportedType
from ggufx.types import Codec
from ggufx.types import codec as _codec_module
from ggufx.values import DTYPES, Value, ValueType

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "LAWS",
    "ROW_KINDS",
    "VALUE_KINDS",
    "Law",
    "LawBroken",
    "Verdict",
    "check",
    "gguf_files",
    "importances",
    "law_decode_dtypes",
    "law_decode_inputs",
    "law_decode_kernel",
    "law_decode_refuses",
    "law_decode_rows",
    "law_decode_shapes",
    "law_decode_threads",
    "law_decode_writes",
    "law_encode_deterministic",
    "law_encode_effort",
    "law_encode_error",
    "law_encode_finite",
    "law_encode_importance",
    "law_encode_inputs",
    "law_encode_kernel",
    "law_encode_refuses",
    "law_encode_rows",
    "law_encode_sides",
    "law_encode_threads",
    "law_encode_tiny",
    "law_encode_writes",
    "law_layout",
    "law_misfits",
    "law_missing_verbs",
    "law_pack_inverse",
    "law_pack_kernel",
    "law_pack_refuses",
    "law_pack_writes",
    "law_quiet",
    "law_registered",
    "law_sizes",
    "random_importance",
    "random_rows",
    "random_values",
    "rows",
    "values",
    "verdicts",
]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]
Generator = np.random.Generator

_MARGIN = 4096
"""Bytes of guard before and after an output."""


class LawBroken(AssertionError):
    """A codec breaks a law.

    Attributes
    ----------
    law : str
        Name of the law, a key of :data:`LAWS`.
    codec : Codec
    detail : str
        What was found and what was expected, with the numbers.
    """

    def __init__(self, law: str, codec: Codec, detail: str) -> None:
        super().__init__(f"{codec.name} breaks the law {law}: {detail}")
        self.law = law
        self.codec = codec
        self.detail = detail


class _Broken(Exception):
    """A finding inside a law, which adds its name and the codec."""


@dataclass(frozen=True)
class Law:
    """One law; call it with a codec.

    Attributes
    ----------
    name
        As in :data:`LAWS`; the function is ``law_`` and the name.
    description
        One line.
    applies
        Whether a codec is subject to it at all (a type without an encoder breaks no law of encoding).
    needs
        Laws without which this one decides nothing.
    fuzzed
        Whether other seeds try other data.
    """

    name: str
    description: str
    applies: Callable[[Codec], bool]
    needs: tuple[str, ...]
    fuzzed: bool
    _function: Callable[..., None]

    def __call__(self, codec: Codec, seed: int = 0, **data: Any) -> None:
        """Hold ``codec`` to the law; does nothing where it does not apply.

        Parameters
        ----------
        codec
            The type.
        seed
            Of the inputs.
        data
            Inputs to use instead of the seeded ones, for laws that take them (``rows=`` or ``values=``).

        Raises
        ------
        LawBroken
        """
        if not self.applies(codec):
            return
        try:
            with warnings.catch_warnings():
                # Random bytes make infinite scales; the law `quiet` alone is about warnings.
                warnings.simplefilter("ignore")
                self._function(codec, np.random.default_rng(seed), **data)
        except _Broken as broken:
            raise LawBroken(self.name, codec, str(broken)) from None
        except Exception as error:
            raise LawBroken(self.name, codec, f"raised {type(error).__name__}: {error}") from error


LAWS: Final[dict[str, Law]] = {}
"""Name -> law, in the order in which they are best checked: a law comes after those it needs."""


def _always(_: Codec) -> bool:
    return True


def _decodes(codec: Codec) -> bool:
    return codec.can_decode


def _encodes(codec: Codec) -> bool:
    return codec.can_encode


def _round_trips(codec: Codec) -> bool:
    return codec.can_encode and codec.can_decode


def _packs(codec: Codec) -> bool:
    return codec.can_pack


def _has(*verbs: str) -> Callable[[Codec], bool]:
    able = {"decode": _decodes, "encode": _encodes, "pack": _packs, "unpack": _packs}
    return lambda codec: any(able[verb](codec) and verb in codec._kernels for verb in verbs)


def _law(
    applies: Callable[[Codec], bool] = _always, needs: Sequence[str] = (), *, fuzzed: bool = False
) -> Callable[[Callable[..., None]], Law]:
    def add(function: Callable[..., None]) -> Law:
        name = function.__name__.removeprefix("law_")
        assert function.__doc__
        description = function.__doc__.partition("\n")[0].rstrip(".")
        LAWS[name] = law = Law(name, description, applies, tuple(needs), fuzzed, function)
        law.__dict__["__doc__"] = function.__doc__
        return law

    return add


@dataclass(frozen=True)
class Verdict:
    """What a law says about a codec.

    Attributes
    ----------
    law, codec
        Their names.
    status
        ``kept``; ``broken``; ``inapplicable`` (the type lacks the verb); ``undecided`` (a law that it needs is broken).
    detail
        The findings when broken; the broken law when undecided; else empty.
    seconds
        Time taken.
    """

    law: str
    codec: str
    status: Literal["kept", "broken", "inapplicable", "undecided"]
    detail: str = ""
    seconds: float = 0.0


def verdicts(codec: Codec | type[Codec], *, seed: int = 0, laws: Iterable[str] | None = None) -> Iterator[Verdict]:
    """Try the laws on a codec one by one, whatever breaks.

    Parameters
    ----------
    codec
        The type or its class; it is registered with :func:`ggufx.types.register` or an entry point, as the law `registered`
        wants.
    seed
        Of the inputs.
    laws
        Names; by default all. A law that they need counts only when it is among them.

    Yields
    ------
    Verdict
        In the order of :data:`LAWS`.
    """
    codec = _instance(codec)
    chosen = _chosen(laws)
    fallen: dict[str, str] = {}
    for name, law in LAWS.items():
        if name not in chosen:
            continue
        if not law.applies(codec):
            yield Verdict(name, codec.name, "inapplicable")
            continue
        root = next((fallen[other] for other in law.needs if other in fallen), None)
        if root is not None:
            fallen[name] = root
            yield Verdict(name, codec.name, "undecided", f"needs {root}")
            continue
        start = time.perf_counter()
        try:
            law(codec, seed)
        except LawBroken as broken:
            fallen[name] = name
            yield Verdict(name, codec.name, "broken", broken.detail, time.perf_counter() - start)
        else:
            yield Verdict(name, codec.name, "kept", "", time.perf_counter() - start)


def check(codec: Codec | type[Codec], *, seed: int = 0, laws: Iterable[str] | None = None) -> None:
    """Hold a codec to the laws.

    Parameters
    ----------
    codec, seed, laws
        As in :func:`verdicts`.

    Raises
    ------
    LawBroken
        The first law that it breaks.
    """
    codec = _instance(codec)
    chosen = _chosen(laws)
    for name, law in LAWS.items():
        if name in chosen:
            law(codec, seed)


def _instance(codec: Codec | type[Codec]) -> Codec:
    """Return the codec of a class: the registered one, where it is."""
    if not isinstance(codec, type):
        return codec
    return next((known for known in types.all_codecs() if type(known) is codec), None) or codec()


def _chosen(laws: Iterable[str] | None) -> set[str]:
    chosen = set(LAWS if laws is None else laws)
    if not chosen <= set(LAWS):
        raise ValueError(f"{', '.join(sorted(chosen - set(LAWS)))}: not a law; the laws are {', '.join(LAWS)}")
    return chosen


# Inputs ---------------------------------------------------------------------------------------------------------------


def _bytes_row(rng: Generator, rows: U8, codec: Codec) -> None:
    rows[...] = rng.integers(0, 256, rows.shape, np.uint8)


def _edge_scales(rng: Generator, rows: U8, codec: Codec) -> None:
    """Random codes under scales at the edges: first and last bytes of header and blocks at 0, 1, the largest, infinity."""
    _bytes_row(rng, rows, codec)
    headers, blocks = codec.layout.split(rows)
    for part in filter(lambda p: p is not None and p.size, (headers, blocks)):
        raw = part.view(np.uint8).reshape(*part.shape, part.dtype.itemsize)  # type: ignore[union-attr]
        width = min(2, raw.shape[-1])
        edges = np.array([0, 1, 0x03FF, 0x0400, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0xFBFF, 0xFC00, 0xFFFF], "<u2")
        for side in (slice(0, width), slice(-width, None)):
            chosen = rng.choice(edges, raw.shape[:-1])
            raw[..., side] = chosen[..., None].view(np.uint8)[..., :width]


ROW_KINDS: Final[Mapping[str, Callable[[Generator, U8, Codec], None]]] = {
    "random": _bytes_row,
    "edge scales": _edge_scales,
    "zeros": lambda rng, rows, codec: rows.fill(0),
    "ones": lambda rng, rows, codec: rows.fill(0xFF),
    "one byte": lambda rng, rows, codec: rows.fill(int(rng.integers(256))),
}
"""Name -> function (generator, uint8 [R, row_nbytes] to fill, codec): the packed rows that decoders meet."""


def random_rows(
    codec: Codec, rng: Generator, n_rows: int, n_blocks: int, kinds: Sequence[str] = tuple(ROW_KINDS)
) -> U8:
    """Return packed rows, uint8 [n_rows, row_nbytes], that go through ``kinds`` of :data:`ROW_KINDS` row by row."""
    packed = np.empty((n_rows, codec.layout.row_nbytes(n_blocks * codec.layout.block_len)), np.uint8)
    for number in range(n_rows):
        ROW_KINDS[kinds[number % len(kinds)]](rng, packed[number : number + 1], codec)
    return packed


def _scaled(exponent: float) -> Callable[[Generator, int], Array]:
    return lambda rng, n: rng.standard_normal(n) * 10.0**exponent


def _spike(rng: Generator, n: int) -> Array:
    values = np.zeros(n)
    values[rng.integers(n)] = rng.standard_normal() * 10.0 ** rng.integers(-4, 4)
    return values


def _ramp(rng: Generator, n: int) -> Array:
    """Return values that rise or fall evenly, on one side of zero but for an eighth of them."""
    values: Array = np.linspace(-0.125, 1, n)[:: rng.choice([1, -1])]
    values *= rng.choice([-1.0, 1.0]) * rng.uniform(0.1, 10)
    return values


def _wave(rng: Generator, n: int) -> Array:
    return rng.uniform(-0.5, 0.5) + np.sin(np.arange(n) / rng.uniform(20, 80) + rng.uniform(0, 6))


def _bit_patterns(rng: Generator, n: int) -> Array:
    values = rng.integers(0, 2**32, n, np.uint32).view(np.float32).copy()
    values[~np.isfinite(values)] = 0
    return values


VALUE_KINDS: Final[Mapping[str, Callable[[Generator, int], Array]]] = {
    "normal": _scaled(0),
    "heavy-tailed": lambda rng, n: np.clip(rng.standard_cauchy(n), -1e4, 1e4),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.02, 50, 0.5),
    "mixed": lambda rng, n: rng.standard_normal(n) * np.repeat(10.0 ** rng.integers(-4, 4, -(-n // 32)), 32)[:n],
    "one sign": lambda rng, n: np.abs(rng.standard_normal(n)) * rng.choice([-1.0, 1.0]),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "spike": _spike,
    "ramp": _ramp,
    "wave": _wave,
    "offset": lambda rng, n: rng.choice([-1.0, 1.0]) * (1 + 0.1 * rng.standard_normal(n)),
    "steps": lambda rng, n: np.repeat(rng.standard_normal(-(-n // 32)), 32)[:n],
    "lattice": lambda rng, n: rng.integers(-8, 9, n) / 2.0,
    "zeros": lambda rng, n: np.zeros(n),
    "negative zeros": lambda rng, n: np.full(n, -0.0),
    "largest": lambda rng, n: 65504 * np.append(rng.uniform(-1, 1, n - 1), rng.choice([-1.0, 1.0])),
    "1e-6": _scaled(-6),
    "1e-30": _scaled(-30),
    "denormal": lambda rng, n: rng.integers(-(2**22), 2**22, n) * 2.0**-149,
    "1e30": _scaled(30),
    "any bits": _bit_patterns,
}
"""Name -> function (generator, length) giving finite values: the float rows that encoders meet."""

_TAME: Final = tuple(kind for kind in VALUE_KINDS if kind not in ("1e30", "any bits"))
"""Kinds within +-65504, the largest binary16: beyond, the types whose number or scale is one give infinities."""

_EVEN: Final = ("normal", "one sign", "constant")
_STRUCTURED: Final = ("ramp", "wave", "offset", "steps", "one sign", "constant")
"""Kinds that are unlike a model's weights: what searches that are tuned for noise round zero get wrong."""
_UNEVEN: Final = ("heavy-tailed", "outliers", "mixed")
"""Kinds of ordinary magnitude; in the uneven ones a few values are so large that types without a zero pay for the others."""


def _is_integer(codec: Codec) -> bool:
    return codec.value_dtype.kind in "iu"


def random_values(
    codec: Codec, rng: Generator, n_rows: int, n_blocks: int, kinds: Sequence[str] = tuple(VALUE_KINDS)
) -> Array:
    """Return rows of finite values, float32 [n_rows, row_len], that go through ``kinds`` of :data:`VALUE_KINDS`.

    For integer types they are of the type's own dtype, over its whole range.
    """
    shape = (n_rows, n_blocks * codec.layout.block_len)
    if _is_integer(codec):
        range_ = np.iinfo(codec.value_dtype)
        return rng.integers(range_.min, range_.max, shape, codec.value_dtype, endpoint=True)
    found = np.empty(shape, np.float32)
    for number in range(n_rows):
        found[number] = VALUE_KINDS[kinds[number % len(kinds)]](rng, shape[1])
    return found


def random_importance(rng: Generator, row_len: int) -> F32:
    """Return importance weights, float32 [row_len]: heavy-tailed, a few of them zero, as real ones are."""
    weights = (rng.exponential(1, row_len) ** 3).astype(np.float32)
    weights[rng.random(row_len) < 0.05] = 0
    return weights


# Tools of the laws ----------------------------------------------------------------------------------------------------


def _require(condition: object, detail: str) -> None:
    if not condition:
        raise _Broken(detail)


def _bits(array: Array) -> Array:
    """Bit patterns, with one pattern for every NaN."""
    array = np.ascontiguousarray(array)
    patterns: Array = array.view(f"u{array.dtype.itemsize}").copy()
    if array.dtype.kind not in "iu":
        with np.errstate(invalid="ignore"):  # ml_dtypes' comparisons warn on NaN
            patterns[array != array] = np.iinfo(patterns.dtype).max  # noqa: PLR0124
    return patterns


def _same(actual: Array, expected: Array, what: str) -> None:
    """Require equal dtype, shape and bits (any NaN equals any NaN)."""
    _require(
        actual.dtype == expected.dtype and actual.shape == expected.shape,
        f"{what}: {actual.dtype}{list(actual.shape)}, expected {expected.dtype}{list(expected.shape)}",
    )
    wrong = np.argwhere(_bits(actual) != _bits(expected))
    if wrong.size:
        at = tuple(int(i) for i in wrong[0])
        raise _Broken(
            f"{what}: {len(wrong)} of {expected.size} {'bytes' if expected.dtype == np.uint8 else 'values'} differ, first at "
            f"{list(at)}: {actual[at]}, expected {expected[at]}"
        )


def _refuses(what: str, kind: type[Exception], match: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        _require(re.search(match, str(error)), f"{what}: the error {str(error)!r} does not say {match!r}")
    else:
        raise _Broken(f"{what}: taken, expected {kind.__name__}")


def _guarded(shape: tuple[int, ...], dtype: npt.DTypeLike, poison: int, shift: int = 0) -> tuple[Array, U8]:
    """Return an array to fill, every byte poisoned, and the whole buffer around it."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.full(nbytes + 2 * _MARGIN + shift, poison, np.uint8)
    return buffer[_MARGIN + shift : _MARGIN + shift + nbytes].view(dtype).reshape(shape), buffer


def _intact(buffer: U8, shift: int, poison: int, what: str) -> None:
    for name, guard in (("before", buffer[: _MARGIN + shift]), ("beyond", buffer[-_MARGIN:])):
        count = int(np.count_nonzero(guard != poison))
        _require(count == 0, f"{what}: wrote {count} bytes {name} the output")


def _written(results: Sequence[Array], what: str) -> None:
    """Require that fills over different poison are the same: what was not written shows."""
    wrong = np.argwhere(_bits(results[0]) != _bits(results[1]))
    _require(
        wrong.size == 0,
        f"{what}: {len(wrong)} of {results[0].size} outputs were not written, or differ from call to call; first at "
        f"{wrong[0].tolist() if wrong.size else []}",
    )


@contextmanager
def _chunks_of(n_rows: int, row_cost: int) -> Iterator[None]:
    """Let the base class cut work into chunks of ``n_rows``, so that small data makes many."""
    before = _codec_module._CHUNK_NBYTES
    _codec_module._CHUNK_NBYTES = n_rows * max(1, row_cost)
    try:
        yield
    finally:
        _codec_module._CHUNK_NBYTES = before


def _paths(codec: Codec, *verbs: str) -> dict[str, bool]:
    """Specification, and kernel where there is one: name -> ``use_kernel``."""
    paths = {"specification": False}
    if _has(*verbs)(codec):
        paths["kernel"] = True
    return paths


def _encode(codec: Codec, values: npt.ArrayLike, importance: npt.ArrayLike | None = None, **options: Any) -> U8:
    if importance is None and codec.needs_importance:
        importance = np.ones(np.shape(values)[-1:], np.float32)
    return codec.encode(values, importance, **options)


def _error(codec: Codec, values: Array, packed: U8 | None, importance: F32, objective: str) -> npt.NDArray[np.float64]:
    """Return ``sum w (x - y)^2`` of every row, y what ``packed`` decodes to, or zeros; ``w`` as the objective says."""
    exact, weights = values.astype(np.float64), importance.astype(np.float64)
    decoded = 0 if packed is None else codec.decode(packed, dtype=np.float64)
    span = codec.weighting.span or exact.shape[1]
    if objective == "reference" and codec.weighting.factor is not None:
        energy = (exact**2).reshape(len(exact), -1, span)
        weights = weights * np.sqrt(codec.weighting.factor * energy.mean(axis=2, keepdims=True) + energy).reshape(
            exact.shape
        )
    total: npt.NDArray[np.float64] = (weights * (exact - decoded) ** 2).sum(axis=1)
    return total


def _searches(codec: Codec) -> list[dict[str, Any]]:
    """List every combination of effort and objective that the codec takes."""
    efforts = [effort for effort in _codec_module.EFFORTS if effort != "reference" or codec.reproduces]
    return [{"effort": e, "objective": o} for e, o in product(efforts, _codec_module.OBJECTIVES)]


def _native(codec: Codec, rng: Generator, n_rows: int, n_blocks: int, rows_per_scale: int) -> tuple[U8, U8]:
    n_codes = n_blocks * (codec.layout.block.itemsize - 1)
    codes = rng.integers(0, 256, (n_rows, n_codes), np.uint8)
    codes[: min(n_rows, 1), : min(n_codes, 256)] = np.arange(256, dtype=np.uint8)[:n_codes]
    return codes, rng.integers(0, 256, (-(-n_rows // rows_per_scale), n_blocks), np.uint8)


# Laws of every type ---------------------------------------------------------------------------------------------------


@_law()
def law_registered(codec: Codec, rng: Generator) -> None:
    """Its name finds it in any case, and each of its ids means it in that dialect and in no other type."""
    for name in (codec.name, codec.name.lower(), codec.name.upper()):
        known = types.get(name)
        hint = ": check the class, or what types.register returned" if type(known) is type(codec) else ""
        _require(known is codec, f"types.get({name!r}) is {known!r}, another object{hint}")
    _require(type(codec).__name__ == codec.name, f"the class is called {type(codec).__name__}")
    _require(codec.ids, "it has no id in any dialect")
    for dialect, type_id in codec.ids.items():
        _require(dialect in dialects.DIALECTS, f"{dialect!r} is no dialect; known: {', '.join(dialects.DIALECTS)}")
        _require(isinstance(type_id, int) and 0 <= type_id < 2**32, f"id {type_id!r} of {dialect} is no uint32")
        found = dialects.get(dialect).codec(type_id)
        _require(found is codec, f"id {type_id} of {dialect} is {found!r}")
        _require(dialects.get(dialect).type_id(codec) == type_id, f"{dialect} writes another id than {type_id}")


@_law()
def law_layout(codec: Codec, rng: Generator) -> None:
    """Block and header are packed little-endian dtypes whose fields tile them, and splitting rows gives views."""
    layout = codec.layout
    for part in (layout.block, layout.header):
        if part is None:
            continue
        _require(part.names, f"{part} has no named fields")
        fields = [part[name] for name in part.names or ()]
        total = sum(field.itemsize for field in fields)
        _require(total == part.itemsize, f"fields of {total} bytes in {part.itemsize} bytes: {part} is not packed")
        odd = [str(f) for f in fields if f.base.byteorder == ">"]
        _require(not odd, f"big-endian fields: {odd}")
    packed = rng.integers(0, 256, (3, layout.header_nbytes + 2 * layout.block.itemsize), np.uint8)
    headers, blocks = layout.split(packed)
    _require(blocks.shape == (3, 2), f"split gives blocks of shape {blocks.shape}, expected (3, 2)")
    _require(np.shares_memory(blocks, packed), "split copies")
    at = layout.header_nbytes + layout.block.itemsize
    _require(blocks[1, 1].tobytes() == packed[1, at:].tobytes(), "block 1 of row 1 is not its bytes")
    _require((headers is None) == (layout.header is None), "split and layout disagree about a header")
    if headers is not None:
        _require(headers.shape == (3,), f"split gives headers of shape {headers.shape}, expected (3,)")
        _require(headers[1].tobytes() == packed[1, : layout.header_nbytes].tobytes(), "header 1 is not its bytes")


@_law()
def law_sizes(codec: Codec, rng: Generator) -> None:
    """Bytes of rows and tensors are header and blocks, lengths and bytes are inverses, bits per weight agree."""
    layout = codec.layout
    header = 0 if layout.header is None else layout.header.itemsize
    _require(layout.block_len >= 1 and layout.block.itemsize >= 1, f"a block of {layout.block_len} elements")
    _require(layout.header_nbytes == header, f"header_nbytes is {layout.header_nbytes}, the dtype has {header}")
    for n_blocks in (0, 1, 2, 3, 7, 1000, 2**40):
        row_len = n_blocks * layout.block_len
        expected = header + n_blocks * layout.block.itemsize
        found = layout.row_nbytes(row_len)
        _require(found == expected, f"a row of {row_len} elements takes {found} bytes, expected {expected}")
        back = layout.row_len(found)
        _require(back == row_len, f"{found} bytes are {back} elements, expected {row_len}")
        _require(layout.nbytes((3, 5, row_len)) == 15 * expected, f"[3, 5, {row_len}] is not 15 rows")
        if row_len:
            bits = layout.bits_per_weight(row_len)
            _require(bits == expected * 8 / row_len, f"{bits} bits per weight, expected {expected * 8 / row_len}")
    _require(layout.nbytes((0, layout.block_len)) == 0, "a tensor of no rows takes bytes")
    bits = 8 * layout.block.itemsize / layout.block_len
    _require(layout.bits_per_weight() == bits, f"{layout.bits_per_weight()} bits per weight, expected {bits}")


@_law(needs=("sizes",))
def law_misfits(codec: Codec, rng: Generator) -> None:
    """Lengths that no blocks make are refused, with the numbers."""
    layout = codec.layout
    block, header = layout.block_len, layout.header_nbytes
    if block > 1:
        wanted = f"{block + 1} elements .* block of {block}"
        _refuses(f"a row of {block + 1}", CodecError, wanted, lambda: layout.row_nbytes(block + 1))
        _refuses(f"a tensor [2, {block - 1}]", CodecError, "", lambda: layout.nbytes((2, block - 1)))
    if layout.block.itemsize > 1:
        _refuses(f"{header + 1} bytes", CodecError, str(header + 1), lambda: layout.row_len(header + 1))
    _refuses(f"{header - 1} bytes", CodecError, "", lambda: layout.row_len(header - 1))
    _refuses("negative dims", CodecError, "", lambda: layout.nbytes((-1, -block)))


@_law(needs=("sizes",))
def law_missing_verbs(codec: Codec, rng: Generator) -> None:
    """A verb that the type lacks raises UnsupportedType, naming the type."""
    row = random_rows(codec, rng, 1, 1)
    blank = np.zeros((1, codec.layout.block_len), np.float32)
    calls: list[tuple[bool, str, Callable[[], object]]] = [
        (codec.can_decode, "decode", lambda: codec.decode(row)),
        (codec.can_encode, "encode", lambda: codec.encode(blank)),
        (codec.can_pack, "pack", lambda: codec.pack(row, row)),
        (codec.can_pack, "unpack", lambda: codec.unpack(row)),
    ]
    for able, verb, call in calls:
        if not able:
            _refuses(verb, UnsupportedType, re.escape(codec.name), call)


# Laws of decoding -----------------------------------------------------------------------------------------------------


@_law(_decodes, ("sizes",))
def law_decode_writes(codec: Codec, rng: Generator) -> None:
    """Decoding writes every value and not one byte beyond, for every dtype, aligned or not."""
    packed = random_rows(codec, rng, 5, 3)
    shape = (5, 3 * codec.layout.block_len)
    dtypes = [codec.value_dtype, *map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float64))]
    for (path, use_kernel), dtype, shift in product(_paths(codec, "decode").items(), dtypes, (0, 1)):
        what = f"{path} to {dtype}{' at an odd address' if shift else ''}"
        results = []
        for poison in (0xAA, 0xFF):  # 0xFF is NaN, 0xAA a plain number
            out, buffer = _guarded(shape, dtype, poison, shift)
            _require(codec.decode(packed, out=out, use_kernel=use_kernel) is out, f"{what}: did not return out")
            _intact(buffer, shift, poison, what)
            results.append(out)
        _written(results, what)


_DECODE = ("decode_writes",)


@_law(_decodes, _DECODE)
def law_decode_shapes(codec: Codec, rng: Generator) -> None:
    """Decoded shape and dtype are those of the rows, or as asked; no rows and empty rows are fine."""
    layout = codec.layout
    row_len, row_nbytes = 2 * layout.block_len, layout.row_nbytes(2 * layout.block_len)
    packed = random_rows(codec, rng, 6, 2)
    for path, use_kernel in _paths(codec, "decode").items():
        whole = codec.decode(packed, use_kernel=use_kernel)
        _require(
            whole.shape == (6, row_len) and whole.dtype == codec.value_dtype,
            f"{path}: {whole.dtype}{list(whole.shape)}, expected {codec.value_dtype}[6, {row_len}]",
        )
        expected = whole.reshape(2, 3, row_len)
        _same(codec.decode(packed.ravel(), (2, 3, row_len), use_kernel=use_kernel), expected, f"{path}, shape given")
        _same(codec.decode(packed.reshape(2, 3, -1), use_kernel=use_kernel), expected, f"{path}, three axes")
        for shape, wanted in (
            ((0, row_nbytes), (0, row_len)),
            ((3, 0, row_nbytes), (3, 0, row_len)),
            ((3, layout.header_nbytes), (3, 0)),
        ):
            found = codec.decode(np.zeros(shape, np.uint8), use_kernel=use_kernel).shape
            _require(found == wanted, f"{path} of uint8{list(shape)}: shape {list(found)}, expected {list(wanted)}")


@_law(_has("decode"), _DECODE, fuzzed=True)
def law_decode_kernel(codec: Codec, rng: Generator, rows: U8 | None = None) -> None:
    """The decode kernel equals the NumPy specification, bit for bit, whatever the bytes.

    ``rows``: uint8 [R, row_nbytes] to try instead of seeded ones.
    """
    tries = [rows] if rows is not None else [random_rows(codec, rng, n, b) for n, b in ((1, 1), (11, 3), (7, 5))]
    for packed in tries:
        _same(codec.decode(packed), codec.decode(packed, use_kernel=False), "kernel against specification")


@_law(_decodes, _DECODE, fuzzed=True)
def law_decode_rows(codec: Codec, rng: Generator, rows: U8 | None = None) -> None:
    """A row's values depend on that row alone.

    ``rows``: uint8 [R, row_nbytes] to try instead of seeded ones.
    """
    packed = random_rows(codec, rng, 9, 2) if rows is None else rows
    order = rng.permutation(len(packed))
    for path, use_kernel in _paths(codec, "decode").items():
        whole = codec.decode(packed, use_kernel=use_kernel)
        _same(codec.decode(packed[order], use_kernel=use_kernel), whole[order], f"{path}, rows in another order")
        for number in {0, len(packed) // 2, len(packed) - 1}:
            _same(codec.decode(packed[number], use_kernel=use_kernel), whole[number], f"{path}, row {number} alone")


@_law(_decodes, _DECODE)
def law_decode_inputs(codec: Codec, rng: Generator) -> None:
    """Packed bytes may be read-only, unaligned, strided or memory-mapped, and are left as they are."""
    packed = random_rows(codec, rng, 5, 3)
    before = packed.copy()
    for path, use_kernel in _paths(codec, "decode").items():
        expected = codec.decode(packed, use_kernel=use_kernel)
        _same(packed, before, f"{path}: the input changed")
        for name, array in _input_kinds(packed):
            _same(codec.decode(array, use_kernel=use_kernel), expected, f"{path} of {name} bytes")


def _input_kinds(packed: U8) -> Iterator[tuple[str, U8]]:
    read_only = packed.copy()
    read_only.flags.writeable = False
    yield "read-only", read_only
    for shift in (1, 3):
        buffer = np.empty(packed.size + 8, np.uint8)
        unaligned = buffer[shift : shift + packed.size].reshape(packed.shape)
        unaligned[...] = packed
        yield f"unaligned ({shift})", unaligned
    wide = np.zeros((2 * packed.shape[0], 2 * packed.shape[1]), np.uint8)
    wide[::2, ::2] = packed
    yield "strided", wide[::2, ::2]
    yield "Fortran-ordered", np.asfortranarray(packed)
    with tempfile.TemporaryFile() as file:
        file.write(b"x" + packed.tobytes())
        file.flush()
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield "memory-mapped", np.frombuffer(mapping, np.uint8, offset=1).reshape(packed.shape)


@_law(_decodes, ("decode_rows",))
def law_decode_threads(codec: Codec, rng: Generator) -> None:
    """Decoded values depend neither on threads nor on how rows are cut into chunks."""
    packed = random_rows(codec, rng, 37, 2)
    for path, use_kernel in _paths(codec, "decode").items():
        expected = codec.decode(packed, threads=1, use_kernel=use_kernel)
        with _chunks_of(2, 2 * codec.layout.block_len * 4):
            for threads in (1, 2):
                found = codec.decode(packed, threads=threads, use_kernel=use_kernel)
                _same(found, expected, f"{path}, chunks of 2 rows, {threads} threads")


@_law(_decodes, _DECODE)
def law_decode_dtypes(codec: Codec, rng: Generator) -> None:
    """Decoding to float16, bfloat16 or float64 is decoding and astype; other dtypes are refused."""
    packed = random_rows(codec, rng, 6, 2)
    for path, use_kernel in _paths(codec, "decode").items():
        plain = codec.decode(packed, use_kernel=use_kernel)
        for dtype in map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)):
            with np.errstate(over="ignore", invalid="ignore"):
                cast = plain.astype(dtype)
            out = np.empty(plain.shape, dtype)
            _same(codec.decode(packed, dtype=dtype, use_kernel=use_kernel), cast, f"{path} to {dtype}")
            _same(codec.decode(packed, out=out, use_kernel=use_kernel), cast, f"{path} into {dtype}")
            _same(codec.decode(packed, out=out, dtype=dtype, use_kernel=use_kernel), cast, f"{path} into {dtype}")
    _refuses("dtype complex64", CodecError, "complex64", lambda: codec.decode(packed, dtype=np.complex64))
    out = np.empty(plain.shape, np.uint16)
    _refuses("out of uint16", CodecError, "uint16", lambda: codec.decode(packed, out=out))


@_law(_decodes, ("misfits",))
def law_decode_refuses(codec: Codec, rng: Generator) -> None:
    """Decoding refuses bytes, shapes and outputs that do not fit, with the numbers."""
    packed = random_rows(codec, rng, 4, 2)
    row_len, row_nbytes = 2 * codec.layout.block_len, packed.shape[1]
    wanted = rf"takes {packed.size + row_nbytes} bytes, got {packed.size}"
    _refuses("a shape of 5 rows", CodecError, wanted, lambda: codec.decode(packed, (5, row_len)))
    _refuses("int8 bytes", CodecError, "uint8, got int8", lambda: codec.decode(packed.view(np.int8)))
    floats = np.zeros(packed.shape, np.float32)
    _refuses("float32 bytes", CodecError, "uint8, got float32", lambda: codec.decode(floats))
    _refuses("a scalar", CodecError, "scalar", lambda: codec.decode(np.uint8(1)))
    if codec.layout.block.itemsize > 1:
        _refuses("a row cut short", CodecError, str(row_nbytes - 1), lambda: codec.decode(packed[:, :-1]))
    _refuses("negative dims", CodecError, "", lambda: codec.decode(packed, (-4, -row_len)))
    locked = np.empty((4, row_len), codec.value_dtype)
    locked.flags.writeable = False
    for out in (
        np.empty((3, row_len), codec.value_dtype),
        np.empty(4 * row_len, codec.value_dtype),
        np.empty((row_len, 4), codec.value_dtype).T,
        np.empty((8, row_len), codec.value_dtype)[::2],
        locked,
    ):
        if out.shape == (4, row_len) and out.flags.c_contiguous and out.flags.writeable:
            continue
        what = f"out of strides {out.strides} and shape {out.shape}"
        _refuses(what, CodecError, r"out is .*\[4, ", lambda out=out: codec.decode(packed, out=out))  # type: ignore[misc]
    half = np.empty((4, row_len), np.float16)
    _refuses("out of another dtype", CodecError, "out is", lambda: codec.decode(packed, out=half, dtype=np.float32))


# Laws of encoding -----------------------------------------------------------------------------------------------------


@_law(_encodes, ("sizes",))
def law_encode_deterministic(codec: Codec, rng: Generator) -> None:
    """The same values give the same bytes at every call, for every effort and objective."""
    array = random_values(codec, rng, len(VALUE_KINDS), 2)
    before = array.copy()
    weights = random_importance(rng, array.shape[1])
    for (path, use_kernel), search in product(_paths(codec, "encode").items(), _searches(codec)):
        for name, importance in (("", None), (", importance", weights)):
            calls = []
            for _ in range(2):
                # Into equal memory: a byte that is not written is another law's finding.
                out = np.zeros((len(array), codec.layout.row_nbytes(array.shape[1])), np.uint8)
                calls.append(_encode(codec, array, importance, out=out, use_kernel=use_kernel, **search))
            _same(calls[1], calls[0], f"{path}, {search}{name}, a second call")
    _same(array, before, "the input changed")


_ENCODE = ("encode_deterministic",)


@_law(_encodes, _ENCODE)
def law_encode_writes(codec: Codec, rng: Generator) -> None:
    """Encoding writes every byte and none beyond."""
    array = random_values(codec, rng, len(VALUE_KINDS), 3)
    shape = (len(array), codec.layout.row_nbytes(array.shape[1]))
    for path, use_kernel in _paths(codec, "encode").items():
        results = []
        for poison in (0xAA, 0x55):
            out, buffer = _guarded(shape, np.uint8, poison)
            _require(_encode(codec, array, out=out, use_kernel=use_kernel) is out, f"{path}: did not return out")
            _intact(buffer, 0, poison, path)
            results.append(out)
        _written(results, path)


_ENCODED = ("encode_deterministic", "encode_writes")


@_law(_has("encode"), _ENCODED, fuzzed=True)
def law_encode_kernel(codec: Codec, rng: Generator, values: Array | None = None) -> None:
    """The encode kernel equals the NumPy specification, byte for byte, on any finite values.

    ``values``: float32 [R, row_len] to try instead of seeded ones.
    """
    array = random_values(codec, rng, len(VALUE_KINDS), 2) if values is None else values
    weights = random_importance(rng, array.shape[1])
    for search, importance in product(_searches(codec), (None, weights)):
        what = f"{search}{'' if importance is None else ', importance'}, kernel against specification"
        plain = _encode(codec, array, importance, use_kernel=False, **search)
        _same(_encode(codec, array, importance, **search), plain, what)


@_law(_encodes, _ENCODED, fuzzed=True)
def law_encode_rows(codec: Codec, rng: Generator, values: Array | None = None) -> None:
    """A row's bytes depend on that row alone.

    ``values``: float32 [R, row_len] to try instead of seeded ones.
    """
    array = random_values(codec, rng, 2 * len(VALUE_KINDS), 2) if values is None else values
    order = rng.permutation(len(array))
    weights = random_importance(rng, array.shape[1])
    for (path, use_kernel), importance in product(_paths(codec, "encode").items(), (None, weights)):
        packed = _encode(codec, array, importance, use_kernel=use_kernel)
        shuffled = _encode(codec, array[order], importance, use_kernel=use_kernel)
        _same(shuffled, packed[order], f"{path}, rows in another order")
        for number in {0, len(array) // 2, len(array) - 1}:
            alone = _encode(codec, array[number], importance, use_kernel=use_kernel)
            _same(alone, packed[number], f"{path}, row {number} alone")


@_law(_encodes, _ENCODED)
def law_encode_inputs(codec: Codec, rng: Generator) -> None:
    """Values may be read-only, unaligned, strided, of any axes or real dtype, and none at all."""
    layout = codec.layout
    array = random_values(codec, rng, 6, 2)
    row_len = array.shape[1]
    locked, wide = array.copy(), np.repeat(array, 2, axis=1)[:, ::2]
    locked.flags.writeable = False
    unaligned = np.empty(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    unaligned[...] = array
    for path, use_kernel in _paths(codec, "encode").items():
        packed = _encode(codec, array, use_kernel=use_kernel)
        for name, other in (
            ("read-only", locked), ("strided", wide), ("unaligned", unaligned), ("Fortran-ordered", np.asfortranarray(array))
        ):  # fmt: skip
            _same(_encode(codec, other, use_kernel=use_kernel), packed, f"{path} of {name} values")
        cube = _encode(codec, array.reshape(2, 3, -1), use_kernel=use_kernel)
        _same(cube, packed.reshape(2, 3, -1), f"{path}, three axes")
        if not _is_integer(codec):
            small = random_values(codec, rng, len(_TAME), 2, _TAME)
            for dtype in map(np.dtype, (ml_dtypes.bfloat16, np.float16)):
                with np.errstate(over="ignore", under="ignore"):
                    narrow = small.astype(dtype)
                wide_again = _encode(codec, narrow.astype(np.float32), use_kernel=use_kernel)
                _same(_encode(codec, narrow, use_kernel=use_kernel), wide_again, f"{path} of {dtype} values")
        for shape in ((0, row_len), (2, 0, row_len), (3, 0)):
            found = _encode(codec, np.empty(shape, np.float32), use_kernel=use_kernel).shape
            wanted = (*shape[:-1], layout.row_nbytes(shape[-1]))
            _require(found == wanted, f"{path} of {list(shape)}: shape {list(found)}, expected {list(wanted)}")


@_law(_encodes, ("encode_rows",))
def law_encode_threads(codec: Codec, rng: Generator) -> None:
    """Bytes depend neither on threads nor on how rows are cut into chunks."""
    array = random_values(codec, rng, 2 * len(VALUE_KINDS) + 1, 2)
    weights = random_importance(rng, array.shape[1])
    for (path, use_kernel), importance in product(_paths(codec, "encode").items(), (None, weights)):
        expected = _encode(codec, array, importance, threads=1, use_kernel=use_kernel)
        with _chunks_of(2, array.shape[1] * 4):
            for threads in (1, 2):
                found = _encode(codec, array, importance, threads=threads, use_kernel=use_kernel)
                _same(found, expected, f"{path}, chunks of 2 rows, {threads} threads")


@_law(_round_trips, (*_ENCODED, "decode_writes", "decode_kernel"), fuzzed=True)
def law_encode_finite(codec: Codec, rng: Generator, values: Array | None = None) -> None:
    """Finite values within +-65504 come back finite, for every effort; where nothing is lost, as they were.

    ``values``: float32 [R, row_len] within +-65504 to try instead of seeded ones.
    """
    array = random_values(codec, rng, len(_TAME), 2, _TAME) if values is None else values
    weights = random_importance(rng, array.shape[1])
    for search, importance in product(_searches(codec), (None, weights)):
        decoded = codec.decode(_encode(codec, array, importance, **search))
        bad = np.argwhere(~np.isfinite(decoded))
        if bad.size:
            at = tuple(int(i) for i in bad[0])
            raise _Broken(f"{search}: {array[at]} at {list(at)} comes back as {decoded[at]}, and {len(bad) - 1} more")
        if not codec.lossy:
            same = decoded == array
            _require(same.all(), f"{search}: {np.count_nonzero(~same)} values changed in a type that loses nothing")


@_law(_round_trips, ("encode_finite", "encode_rows", "decode_rows"), fuzzed=True)
def law_encode_error(codec: Codec, rng: Generator) -> None:
    """Encoding beats zeros on rows of even values, and keeps the type's own bound (rms_bound) on normal ones."""
    if _is_integer(codec):
        return
    n_blocks = -(-512 // codec.layout.block_len)
    for search in _searches(codec):
        for kinds, importance, factor in ((_EVEN, False, 1), (_EVEN, True, 1), (_UNEVEN, False, 2)):
            array = random_values(codec, rng, 4 * len(kinds), n_blocks, kinds)
            weights = random_importance(rng, array.shape[1]) if importance else np.ones(array.shape[1], np.float32)
            exact = array.astype(np.float64)
            error = codec.decode(_encode(codec, array, weights if importance else None, **search)) - exact
            lost, whole = (weights * error**2).sum(axis=1), (weights * exact**2).sum(axis=1)
            worse = lost > factor * 1.0001 * whole + 1e-30
            if search.get("objective") == "reference":
                # Such searches weigh by magnitude as well: beside a spike of little importance zeros may be given up.
                weights = weights * np.abs(exact)
                lost_there, whole_there = (weights * error**2).sum(axis=1), (weights * exact**2).sum(axis=1)
                worse &= lost_there > factor * 1.0001 * whole_there + 1e-30
            bad = np.flatnonzero(worse)
            if bad.size:
                raise _Broken(
                    f"{search}{', importance' if importance else ''}: error {lost[bad[0]]:.4g} on a row of "
                    f"{kinds[bad[0] % len(kinds)]} values whose energy is {whole[bad[0]]:.4g}, bound {factor} times that"
                )
        if codec.rms_bound is not None:
            normal = random_values(codec, rng, 64, n_blocks, ("normal",)).astype(np.float64)
            decoded = codec.decode(_encode(codec, normal, **search))
            relative = float(np.sqrt(((decoded - normal) ** 2).mean() / (normal**2).mean()))
            _require(relative <= codec.rms_bound, f"{search}: relative RMS {relative:.5g}, promised {codec.rms_bound}")


@_law(_round_trips, ("encode_error",))
def law_encode_tiny(codec: Codec, rng: Generator) -> None:
    """Rows of values so small that no scale may suit them leave no more error than zeros would."""
    if _is_integer(codec):
        return
    scales = 10.0 ** np.array([-6, -7, -8, -9, -11, -15, -20, -30, -38])
    noise = random_values(codec, rng, len(scales), -(-512 // codec.layout.block_len), ("normal",))
    array = (noise * scales[:, None]).astype(np.float32)
    ones, weights = np.ones(array.shape[1], np.float32), random_importance(rng, array.shape[1])
    for search, importance in product(_searches(codec), (ones, weights)):
        packed = _encode(codec, array, importance, **search)
        lost, whole = (_error(codec, array, p, importance, search["objective"]) for p in (packed, None))
        bad = np.flatnonzero(lost > 1.001 * whole)
        if bad.size and search["effort"] != "reference":
            raise _Broken(
                f"{search}: values of about {scales[bad[0]]:g} leave {lost[bad[0]] / whole[bad[0]]:.4g} times the error of "
                "zeros"
            )


@_law(_round_trips, ("encode_error",))
def law_encode_effort(codec: Codec, rng: Generator) -> None:
    """More effort leaves no row with more error: high of any, normal of those unlike weights; of others 1 % in all."""
    if _is_integer(codec):
        return
    kinds = (*_STRUCTURED, "normal", "normal", "outliers")
    array = random_values(codec, rng, 2 * len(kinds), -(-512 // codec.layout.block_len), kinds)
    strict = np.array([kinds[n % len(kinds)] in _STRUCTURED for n in range(len(array))])
    weights = random_importance(rng, array.shape[1])
    for objective in _codec_module.OBJECTIVES:
        fast, normal, high = (
            _error(codec, array, _encode(codec, array, weights, effort=e, objective=objective), weights, objective)
            for e in ("fast", "normal", "high")
        )
        slack = 1 + 1e-5  # of types that do not compare: they sum float32
        for what, less, more, rows in (
            ("high", high, normal, np.ones(len(array), bool)),
            ("normal", normal, fast, strict),
        ):
            bad = np.flatnonzero(rows & (less > slack * more))
            if bad.size:
                raise _Broken(
                    f"objective {objective}: effort {what} leaves the error {less[bad[0]]:.6g} on a row of "
                    f"{kinds[bad[0] % len(kinds)]} values, the effort below it {more[bad[0]]:.6g}"
                )
        whole = _error(codec, array, None, weights, objective)
        shares = [float((error / whole)[~strict].sum()) for error in (normal, fast)]
        _require(
            shares[0] <= 1.01 * shares[1] + 1e-9,
            f"objective {objective}: effort normal leaves {shares[0]:.6g} of noise, fast {shares[1]:.6g}",
        )


@_law(_round_trips, ("encode_error",))
def law_encode_sides(codec: Codec, rng: Generator) -> None:
    """Rows on one side of zero leave about as much error as their negatives: at most three times that."""
    if _is_integer(codec):
        return
    kinds = ("ramp", "offset", "one sign")
    array = random_values(codec, rng, 2 * len(kinds), -(-1024 // codec.layout.block_len), kinds)
    importance = np.ones(array.shape[1], np.float32)
    # What a scale's own digits leave is chance.
    least = 1e-6 * _error(codec, array, None, importance, "mse")
    for effort in ("fast", "normal", "high"):
        one, other = (
            _error(codec, x, _encode(codec, x, importance, effort=effort, objective="mse"), importance, "mse") + least
            for x in (array, -array)
        )
        bad = np.flatnonzero(np.maximum(one, other) > 3 * np.minimum(one, other))
        if bad.size:
            raise _Broken(
                f"effort {effort}: a row of {kinds[bad[0] % len(kinds)]} values leaves the error {one[bad[0]]:.4g}, its "
                f"negative {other[bad[0]]:.4g}"
            )


@_law(_encodes, ("misfits",))
def law_encode_refuses(codec: Codec, rng: Generator) -> None:
    """Encoding refuses NaN and infinity (naming row and column), and values, outputs and wishes that do not fit."""
    block = codec.layout.block_len
    row_len, row_nbytes = block, codec.layout.row_nbytes(block)
    for (path, use_kernel), bad in product(_paths(codec, "encode").items(), (np.nan, np.inf, -np.inf)):
        array = np.zeros((2, 3, 2 * block), np.float32)
        array[1, 1, 1] = bad
        call = lambda array=array, k=use_kernel: _encode(codec, array, use_kernel=k)  # noqa: E731
        _refuses(f"{path}: {bad}", CodecError, r"at row 4, column 1\b", call)
    late = np.zeros((9, block), np.float32)
    late[8, 0] = np.nan
    with _chunks_of(1, block * 4):
        _refuses("NaN in a later chunk", CodecError, "row 8, column 0", lambda: _encode(codec, late, threads=2))
    good = np.zeros((2, row_len), np.float32)
    _refuses("a scalar", CodecError, "scalar", lambda: codec.encode(np.float32(1)))
    if row_len > 1:
        long = np.zeros((2, row_len + 1), np.float32)
        _refuses("a row too long", CodecError, f"{row_len + 1} elements", lambda: _encode(codec, long))
    for dtype in ("complex64", "<U3", "object"):
        odd = good.astype(dtype)
        wanted = f"real numbers, got {dtype}"
        _refuses(f"{dtype} values", CodecError, wanted, lambda odd=odd: _encode(codec, odd))  # type: ignore[misc]
    for out in (
        np.empty((3, row_nbytes), np.uint8),
        np.empty((2, row_nbytes), np.int8),
        np.empty((4, row_nbytes), np.uint8)[::2],
        np.frombuffer(bytes(2 * row_nbytes), np.uint8).reshape(2, row_nbytes),
    ):
        call_out = lambda out=out: _encode(codec, good, out=out)  # noqa: E731
        _refuses(f"out of {out.dtype}{out.shape}", CodecError, rf"uint8\[2, {row_nbytes}\]", call_out)
    _refuses("an unknown effort", CodecError, "effort", lambda: _encode(codec, good, effort="swift"))
    _refuses("an unknown objective", CodecError, "objective", lambda: _encode(codec, good, objective="max"))
    if not codec.reproduces:
        call_reference = lambda: _encode(codec, good, effort="reference")  # noqa: E731
        _refuses("the reference's bytes, not promised", UnsupportedType, codec.name, call_reference)


@_law(_encodes, _ENCODE)
def law_encode_importance(codec: Codec, rng: Generator) -> None:
    """Importance weights that are not one finite number >= 0 per column are refused; dead blocks are said."""
    block = codec.layout.block_len
    row_len = 2 * block
    array = np.zeros((2, row_len), np.float32)
    good = np.ones(row_len, np.float32)
    for name, bad in (
        ("too few", good[:-1]), ("of two axes", good[None]), ("negative", -good), ("NaN", good * np.nan),
        ("infinite", good * np.inf), ("scalar", np.float32(1)),
    ):  # fmt: skip
        call = lambda bad=bad: codec.encode(array, bad)  # noqa: E731
        _refuses(f"weights that are {name}", CodecError, f"{row_len} finite weights", call)
    if codec.needs_importance:
        _refuses("no weights", CodecError, "importance", lambda: codec.encode(array))
    _same(codec.encode(array, good.tolist()), codec.encode(array, good), "weights in a list")
    dead = good.copy()
    dead[:block] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codec.encode(array, dead)
    said = sum(issubclass(w.category, types.ImportanceWarning) for w in caught)
    _require(said == 1, f"a block whose weights are all zero was said {said} times, expected once")


# Laws of native packing -----------------------------------------------------------------------------------------------


@_law(_packs, ("sizes",))
def law_pack_writes(codec: Codec, rng: Generator) -> None:
    """Packing writes every byte and none beyond, from read-only and strided codes too."""
    codes, scales = _native(codec, rng, 5, 3, 2)
    shape = (5, codec.layout.row_nbytes(3 * codec.layout.block_len))
    locked, wide = codes.copy(), np.repeat(codes, 2, axis=1)[:, ::2]
    locked.flags.writeable = False
    for path, use_kernel in _paths(codec, "pack").items():
        results = []
        for poison in (0xAA, 0x55):
            out, buffer = _guarded(shape, np.uint8, poison)
            packed = codec.pack(codes, scales, rows_per_scale=2, out=out, use_kernel=use_kernel)[0]
            _require(packed is out, f"{path}: did not return out")
            _intact(buffer, 0, poison, path)
            results.append(out)
        _written(results, path)
        for name, other in (("read-only", locked), ("strided", wide)):
            packed = codec.pack(other, scales, rows_per_scale=2, use_kernel=use_kernel)[0]
            _same(packed, results[0], f"{path} of {name} codes")


@_law(_has("pack", "unpack"), ("pack_writes",), fuzzed=True)
def law_pack_kernel(codec: Codec, rng: Generator) -> None:
    """The pack and unpack kernels equal their NumPy specifications, counts of bad codes and scales included."""
    for n_rows, rows_per_scale in ((1, 1), (7, 1), (300, 128), (5, 128)):
        codes, scales = _native(codec, rng, n_rows, 3, rows_per_scale)
        plain, *counts = codec.pack(codes, scales, rows_per_scale=rows_per_scale, use_kernel=False)
        packed, *found = codec.pack(codes, scales, rows_per_scale=rows_per_scale)
        what = f"{n_rows} rows, {rows_per_scale} a scale"
        _same(packed, plain, f"{what}, kernel against specification")
        _require(found == counts, f"{what}: bad codes and scales {found}, the specification counts {counts}")
        for name, kernel, spec in zip(
            ("codes", "scales"), codec.unpack(plain), codec.unpack(plain, use_kernel=False), strict=True
        ):
            _same(kernel, spec, f"{what}, unpacked {name}, kernel against specification")


@_law(_packs, ("pack_writes",), fuzzed=True)
def law_pack_inverse(codec: Codec, rng: Generator) -> None:
    """Unpacking what was packed gives every code and scale back, and packing that again gives the same bytes."""
    for path, use_kernel in _paths(codec, "pack", "unpack").items():
        for n_rows, rows_per_scale in ((1, 1), (7, 1), (128, 128), (300, 128), (129, 128), (5, 128), (0, 1)):
            what = f"{path}, {n_rows} rows, {rows_per_scale} a scale"
            codes, scales = _native(codec, rng, n_rows, 3, rows_per_scale)
            packed, *_ = codec.pack(codes, scales, rows_per_scale=rows_per_scale, use_kernel=use_kernel)
            shape = (n_rows, codec.layout.row_nbytes(3 * codec.layout.block_len))
            _require(packed.shape == shape, f"{what}: packed {list(packed.shape)}, expected {list(shape)}")
            codes_back, scales_back = codec.unpack(packed, use_kernel=use_kernel)
            _same(codes_back, codes, f"{what}, codes")
            _same(scales_back, np.repeat(scales, rows_per_scale, axis=0)[:n_rows], f"{what}, scales")
            again, *_ = codec.pack(codes_back, scales_back, use_kernel=use_kernel)
            _same(again, packed, f"{what}, packed again")


@_law(_packs, ("misfits",))
def law_pack_refuses(codec: Codec, rng: Generator) -> None:
    """Packing refuses codes, scales and outputs that do not fit, with the numbers."""
    codes, scales = _native(codec, rng, 4, 2, 1)
    row_nbytes = codec.layout.row_nbytes(2 * codec.layout.block_len)
    for bad_codes, bad_scales in (
        (codes[:3], scales), (codes[:, :-1], scales), (codes, scales[:, :1]), (codes[0], scales), (codes, scales[0]),
        (codes.view(np.int8), scales), (codes, scales.astype(np.float32)),
    ):  # fmt: skip
        what = f"codes {bad_codes.dtype}{bad_codes.shape}, scales {bad_scales.dtype}{bad_scales.shape}"
        _refuses(what, CodecError, r"\[\d+", lambda c=bad_codes, s=bad_scales: codec.pack(c, s))  # type: ignore[misc]
    _refuses("128 rows a scale", CodecError, "128 rows a scale", lambda: codec.pack(codes, scales, rows_per_scale=128))
    _refuses("0 rows a scale", CodecError, "is 0", lambda: codec.pack(codes, scales, rows_per_scale=0))
    for out in (
        np.empty((3, row_nbytes), np.uint8), np.empty((4, row_nbytes - 1), np.uint8),
        np.empty((4, row_nbytes), np.float32), np.empty((8, row_nbytes), np.uint8)[::2],
    ):  # fmt: skip
        what = f"out {out.dtype}{out.shape}"
        _refuses(what, CodecError, "out is", lambda out=out: codec.pack(codes, scales, out=out))  # type: ignore[misc]
    _refuses("unpacking half a block", GGUFError, "", lambda: codec.unpack(np.zeros((2, row_nbytes - 1), np.uint8)))


# The last law: it runs everything once more.


@_law(_decodes, ("decode_writes",), fuzzed=True)
def law_quiet(codec: Codec, rng: Generator) -> None:
    """Nothing that is legal makes NumPy warn: infinite and NaN scales, overflow, zeros."""
    packed = random_rows(codec, rng, 10, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path, use_kernel in _paths(codec, "decode", "encode").items():
            try:
                for dtype in (codec.value_dtype, np.float16, ml_dtypes.bfloat16):
                    codec.decode(packed, dtype=dtype, use_kernel=use_kernel)
                if codec.can_encode:
                    array = random_values(codec, rng, len(VALUE_KINDS), 2)
                    for search in _searches(codec):
                        _encode(codec, array, use_kernel=use_kernel, **search)
            except Warning as warning:
                raise _Broken(f"{path}: {type(warning).__name__}: {warning}") from warning


# Strategies -----------------------------------------------------------------------------------------------------------


def _hypothesis() -> ModuleType:
    try:
        import hypothesis.strategies
    except ImportError as error:
        raise GGUFError(
            "the strategies of ggufx.testing need Hypothesis, which is not installed: pip install 'ggufx[testing]' (the laws, "
            "check() and ggufx selftest do without)"
        ) from error
    return hypothesis.strategies


def rows(codec: Codec | type[Codec], *, max_rows: int = 7, max_blocks: int = 5) -> SearchStrategy[U8]:
    """Strategy for packed rows of a codec.

    Parameters
    ----------
    codec
        The type or its class.
    max_rows, max_blocks
        Bounds of the number of rows and of blocks in each; at least one of both.

    Returns
    -------
    Strategy of uint8 [R, row_nbytes]: random bytes, all 0, all 0xFF, one byte repeated, scales at their edges, and rows
    whose first 48 bytes are drawn one by one, so that they shrink.

    Raises
    ------
    GGUFError
        Hypothesis is not installed.
    """
    st = _hypothesis()
    codec = _instance(codec)

    def draw_rows(draw: Callable[..., Any]) -> U8:
        n_rows, n_blocks = draw(st.integers(1, max_rows)), draw(st.integers(1, max_blocks))
        kinds = draw(st.lists(st.sampled_from(list(ROW_KINDS)), min_size=1, max_size=n_rows))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        packed = random_rows(codec, rng, n_rows, n_blocks, kinds)
        head = draw(st.binary(max_size=min(48, packed.shape[1])))
        packed[0, : len(head)] = np.frombuffer(head, np.uint8)
        return packed

    found: SearchStrategy[U8] = st.composite(draw_rows)()
    return found


def values(
    row_len: int, *, max_rows: int = 4, limit: float | None = None, kinds: Sequence[str] = tuple(VALUE_KINDS)
) -> SearchStrategy[F32]:
    """Strategy for rows of finite floats with adversarial scales.

    Parameters
    ----------
    row_len
        Elements per row.
    max_rows
        Bound of the number of rows.
    limit
        Clip to ``[-limit, limit]``; 65504 is what every type with a binary16 scale can hold.
    kinds
        Of :data:`VALUE_KINDS`.

    Returns
    -------
    Strategy of float32 [R, row_len]: rows of the kinds, with up to 12 elements of the first drawn one by one.

    Raises
    ------
    GGUFError
        Hypothesis is not installed.
    """
    st = _hypothesis()
    top = float(np.finfo(np.float32).max) if limit is None else float(np.float32(limit))

    def draw_values(draw: Callable[..., Any]) -> F32:
        chosen = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=max_rows))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        found = np.empty((len(chosen), row_len), np.float32)
        for row, kind in zip(found, chosen, strict=True):
            row[...] = np.clip(VALUE_KINDS[kind](rng, row_len), -top, top)
        head = draw(st.lists(st.floats(-top, top, width=32), max_size=min(12, row_len)))
        found[0, : len(head)] = head
        return found

    strategy: SearchStrategy[F32] = st.composite(draw_values)()
    return strategy


def importances(row_len: int) -> SearchStrategy[F32]:
    """Strategy for importance weights, float32 [row_len], none negative and not all zero.

    Uniform, heavy-tailed with zeros as real ones have them, a single column that counts, tiny and huge ones.

    Raises
    ------
    GGUFError
        Hypothesis is not installed.
    """
    st = _hypothesis()

    def draw_weights(draw: Callable[..., Any]) -> F32:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        kind = draw(st.sampled_from(["uniform", "heavy-tailed", "spike"]))
        weights = np.ones(row_len, np.float32) if kind == "uniform" else random_importance(rng, row_len)
        if kind == "spike":
            weights = np.full(row_len, 1e-6, np.float32)
            weights[rng.integers(row_len)] = 1
        if not weights.any():
            weights[0] = 1
        weights *= np.float32(10.0) ** np.float32(draw(st.integers(-12, 12)))
        return weights

    strategy: SearchStrategy[F32] = st.composite(draw_weights)()
    return strategy


_UNKNOWN_ID: Final = 60000
"""Ids from here on are nobody's: forks number from 0 in steps."""


def gguf_files(
    *, dialect: str = "llama.cpp", max_tensors: int = 4, max_keys: int = 4, unknown: bool = True
) -> SearchStrategy[bytes]:
    """Strategy for small valid GGUF files.

    Parameters
    ----------
    dialect
        Whose types and ids; it is written into the key ``ggufx.dialect``, so that no id is ambiguous.
    max_tensors, max_keys
        Bounds of their numbers; both may be 0.
    unknown
        Whether tensors of ids that no dialect knows occur.

    Returns
    -------
    Strategy of the file's bytes: metadata of every value type (arrays and strings of any Unicode included), any
    alignment from 8 to 4096, tensors of 1 to 4 axes, some of them empty, with random bytes, the last one padded or not.

    Raises
    ------
    GGUFError
        Hypothesis is not installed.
    """
    st = _hypothesis()
    codecs = [
        (codec, type_id)
        for codec in types.all_codecs()
        if (type_id := dialects.get(dialect).type_id(codec)) is not None
    ]
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    keys = st.from_regex(r"[a-z]{1,6}\.[a-z_]{1,8}", fullmatch=True).filter(
        lambda key: not key.startswith(("general.", "split.", "ggufx."))
    )

    def scalars(kind: ValueType) -> Any:
        dtype = DTYPES[kind]
        if kind is ValueType.BOOL:
            return st.booleans()
        if dtype.kind == "f":
            return st.floats(width=8 * dtype.itemsize)
        return st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))

    def draw_value(draw: Callable[..., Any]) -> Value:
        kind = draw(st.sampled_from(ValueType))
        if kind is ValueType.STRING:
            return Value.string(draw(text))
        if kind is not ValueType.ARRAY:
            return Value(kind, draw(scalars(kind)))
        element = draw(st.sampled_from([k for k in ValueType if k is not ValueType.ARRAY]))
        items = text if element is ValueType.STRING else scalars(element)
        return Value.array(element, draw(st.lists(items, max_size=5)))

    def draw_file(draw: Callable[..., Any]) -> bytes:
        alignment = draw(st.sampled_from([32, 8, 64, 256, 4096]))
        metadata = {"ggufx.dialect": Value.string(dialect)}
        if alignment != 32 or draw(st.booleans()):
            metadata["general.alignment"] = Value.u32(alignment)
        metadata.update(draw(st.dictionaries(keys, st.composite(draw_value)(), max_size=max_keys)))
        names = draw(st.lists(text, max_size=max_tensors, unique=True))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        directory, parts, offset, padding = [], [], 0, 0
        for name in names:
            outer = draw(st.lists(st.integers(0, 3), max_size=3))
            if unknown and draw(st.integers(0, 4)) == 0:
                shape, type_id = (*outer, draw(st.integers(0, 64))), draw(st.integers(_UNKNOWN_ID, 2**32 - 1))
                nbytes = draw(st.integers(0, 200))
            else:
                codec, type_id = draw(st.sampled_from(codecs))
                shape = (*outer, draw(st.integers(0, 3)) * codec.layout.block_len)
                nbytes = codec.layout.nbytes(shape)
            directory.append((name, shape, type_id, offset))
            padding = align_up(nbytes, alignment) - nbytes
            parts.append(rng.bytes(nbytes) + bytes(padding))
            offset += nbytes + padding
        data = b"".join(parts)
        if padding and draw(st.booleans()):
            data = data[:-padding]
        return encode_header(metadata, directory, alignment) + data

    strategy: SearchStrategy[bytes] = st.composite(draw_file)()
    return strategy
