"""What a quant type is: its layout as data, and the verbs decode, encode, pack and unpack over rows.

A type is one file with one subclass of :class:`Codec`. It writes the specification of its decoder (``decode_blocks``), which
runs on NumPy and on torch, and maybe ``encode_rows``, ``pack_rows`` and ``unpack_rows``; validation, allocation, kernels and
threads are in the base class.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, NamedTuple, get_args

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ggufx import kernels, stopping
from ggufx.errors import CodecError, NonFiniteError, OutOfRangeError, UnsupportedType
from ggufx.types._effort import Weighting, errors, unusual
from ggufx.types.words import Array, Fields, NumpyWords, Words

__all__ = ["Codec", "Effort", "ImportanceWarning", "Layout", "Objective", "Search", "Weighting"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_CHUNK_NBYTES = 1 << 22
"""Output bytes of a row chunk: a few hundred microseconds of work, so that handing over the GIL costs nothing."""

_NUMPY: Final = NumpyWords()

_RANGE_SLACK: Final = 2.0**-10
"""Part of a block's energy that its error may be more than at another magnitude: scales are rounded elsewhere."""

_LEAST = float(np.finfo(np.float32).smallest_subnormal)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FLOATS = frozenset((np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)))


Effort = Literal["fast", "normal", "high", "reference"]
"""How long an encoder searches; ``reference`` gives the C library's bytes, where a type promises them."""
Objective = Literal["reference", "mse"]
"""What an encoder minimises: ``sum w (x - y)^2`` with the reference encoder's own weights ``w`` (docs/formats.md, 6), or with
the importance alone (1 without one)."""

EFFORTS: Final[tuple[Effort, ...]] = get_args(Effort)
OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)
_LOWER: Final[Mapping[Effort, Effort]] = {"normal": "fast", "high": "normal"}


class Search(NamedTuple):
    """Wishes for an encoder."""

    effort: Effort = "normal"
    objective: Objective = "reference"


class ImportanceWarning(UserWarning):
    """Importance weights are all zero over a block, so that block is encoded as if it had none."""


@dataclass(frozen=True)
class Layout:
    """Bytes of a type, written once as data.

    Attributes
    ----------
    block_len
        Elements per block.
    block
        Packed structured dtype of a block: its ``itemsize`` is the bytes per block, its field names are upstream's.
    header
        Packed dtype at the start of every row (ik_llama.cpp's ``IQ*_KS`` and alike), or ``None``.
    """

    block_len: int
    block: np.dtype[Any]
    header: np.dtype[Any] | None = None

    @property
    def header_nbytes(self) -> int:
        """Bytes of the row header; 0 without one."""
        return 0 if self.header is None else self.header.itemsize

    def row_nbytes(self, row_len: int) -> int:
        """Return the bytes of a row of ``row_len`` elements: the only size arithmetic in the project.

        Raises
        ------
        CodecError
            ``row_len`` is not a multiple of the block length.
        """
        if row_len < 0 or row_len % self.block_len:
            raise CodecError(f"a row of {row_len} elements is not a multiple of the block of {self.block_len} elements")
        return self.header_nbytes + row_len // self.block_len * self.block.itemsize

    def row_len(self, row_nbytes: int) -> int:
        """Return the elements of a row of ``row_nbytes`` bytes; raises CodecError when none fits."""
        blocks, rest = divmod(row_nbytes - self.header_nbytes, self.block.itemsize)
        if rest or blocks < 0:
            raise CodecError(
                f"a row of {row_nbytes} bytes is not {self.header_nbytes} header bytes and blocks of "
                f"{self.block.itemsize} bytes"
            )
        return blocks * self.block_len

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a tensor of ``shape`` (numpy order; the row is the last axis, a scalar is one row)."""
        if not shape:
            shape = (1,)
        if any(n < 0 for n in shape):
            raise CodecError(f"a shape has no negative dims, got {list(shape)}")
        if prod(shape[:-1]) == 0:
            return 0
        return prod(shape[:-1]) * self.row_nbytes(shape[-1])

    def bits_per_weight(self, row_len: int | None = None) -> float:
        """Return bits per element, row headers included when ``row_len`` is given."""
        if row_len:
            return self.row_nbytes(row_len) * 8 / row_len
        return self.block.itemsize * 8 / self.block_len

    def split(self, rows: U8) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any]]:
        """Return views ``(headers [R] or None, blocks [R, n])`` of packed rows uint8 [R, row_nbytes], no copy."""
        headers = None if self.header is None else rows[:, : self.header_nbytes].view(self.header)[:, 0]
        blocks = rows[:, self.header_nbytes :].view(self.block)
        return headers, blocks

    def fields(self, rows: Array) -> tuple[Fields, Fields]:
        """Return the fields of blocks and of row headers as bytes, of packed rows uint8 [R, row_nbytes] in any library.

        Returns
        -------
        (name -> uint8 [R, n, nbytes of the field], name -> uint8 [R, nbytes of the field])
        """
        blocks = rows[:, self.header_nbytes :]
        blocks = blocks.reshape(blocks.shape[0], blocks.shape[1] // self.block.itemsize, self.block.itemsize)
        header = {} if self.header is None else _fields(self.header, rows[:, : self.header_nbytes])
        return _fields(self.block, blocks), header


def _fields(dtype: np.dtype[Any], data: Array) -> Fields:
    assert dtype.fields is not None
    return {name: data[..., at : at + field.itemsize] for name, (field, at, *_) in dtype.fields.items()}


_ENCODERS: list[tuple[type, Callable[..., Any]]] = []


def encode_arrays_by(kind: type, encoder: Callable[..., Any]) -> None:
    """Have :meth:`Codec.encode` hand arrays of another library's class to ``encoder(values, codec, importance, ...)``.

    The library's module registers itself so: this package imports nothing that is above it.
    """
    _ENCODERS.append((kind, encoder))


class Codec(ABC):
    """A type of GGUF: layout, ids per dialect, and its verbs.

    Subclasses are stateless; one instance of each is registered. The class name is the type's upstream spelling.

    Attributes
    ----------
    layout : Layout
    ids : mapping of str to int
        Dialect name -> type id. A dialect inherits its parent's ids.
    file_types : mapping of str to int
        Dialect name -> ``general.file_type`` of a file that is called by this type; inherited, too.
    fallbacks : mapping of str to str
        Dialect name -> name of the type that rows take which no block divides, as that program's quantizer has it;
        inherited, too.
    value_dtype : numpy dtype
        What :meth:`decode` gives by default: float32 for every quant and float type, the stored dtype for integers and
        float64.
    needs_importance : bool
        Whether encoding without importance weights is refused.
    lossy : bool
        Whether encoding loses bits of float32 values in general.
    reproduces : bool
        Whether ``effort="reference"`` gives the bytes of the C library's encoder.
    nested : bool
        Whether a higher effort tries all that a lower one does, block by block, so that it is never worse. For other types
        :meth:`encode` compares what efforts give and keeps the better row: ``high`` with ``normal``, and ``normal`` with
        ``fast`` where a row is unlike a model's weights.
    weighting : Weighting
        What the encoder weighs errors by under the objective ``reference``.
    safe_magnitude : float
        Values up to here are within what the type's scales can hold, whatever else is in the block: binary16's largest by
        default. Of greater ones it is tested.
    planes : pair of str or None
        Fields of codes (a byte an element) and of scales (a byte a block) that :mod:`ggufx.torch` may keep apart, for
        products that want both in one piece.
    kernel_module, cuda_module : str or None
        Of a type of another package: name of the module with its Numba kernels (see :mod:`ggufx.kernels`), and of that with its
        Triton kernels (see ``ggufx.kernels.cuda``). Types of ggufx have theirs by their own name.
    rms_bound : float or None
        Promise of the encoder: on rows of standard normal values the root mean square of the error is at most this part of
        the values'. ``None`` promises nothing; the test kit holds what is promised.
    """

    layout: ClassVar[Layout]
    ids: ClassVar[Mapping[str, int]]
    file_types: ClassVar[Mapping[str, int]] = MappingProxyType({})
    fallbacks: ClassVar[Mapping[str, str]] = MappingProxyType({})
    value_dtype: ClassVar[np.dtype[Any]] = np.dtype(np.float32)
    needs_importance: ClassVar[bool] = False
    lossy: ClassVar[bool] = True
    reproduces: ClassVar[bool] = False
    nested: ClassVar[bool] = False
    weighting: ClassVar[Weighting] = Weighting()
    safe_magnitude: ClassVar[float] = 65504.0
    planes: ClassVar[tuple[str, str] | None] = None
    kernel_module: ClassVar[str | None] = None
    cuda_module: ClassVar[str | None] = None
    rms_bound: ClassVar[float | None] = None

    # What a type writes -----------------------------------------------------------------------------------------

    def decode_blocks(self, block: Fields, header: Fields, w: Words) -> Array:
        """Return the values [R, n, block_len] of ``value_dtype`` that blocks hold: the specification, in any library.

        Parameters
        ----------
        block, header
            Fields of the block and of the row header by name, as bytes: uint8 [R, n, nbytes] and [R, nbytes].
        w
            The operations that differ between libraries, and the words that formats share (:mod:`ggufx.types.words`).
        """
        raise UnsupportedType(f"{self.name} is known by its layout only; decoding it is not implemented")

    def encode_rows(self, values: F32, out: U8, importance: F32 | None, search: Search) -> None:
        """Fill ``out`` uint8 [R, row_nbytes] from finite, read-only ``values`` float32 [R, row_len].

        ``importance`` is float32 [row_len], not all zero over any block. A row's bytes must depend on that row alone.
        """
        raise UnsupportedType(f"encoding to {self.name} is not implemented")

    def pack_rows(self, codes: U8, scales: U8, out: U8, rows_per_scale: int) -> tuple[int, int]:
        """Fill ``out`` from native codes and scales, exactly; see :meth:`pack`. Returns (bad codes, bad scales)."""
        raise UnsupportedType(f"{self.name} has no native packing")

    def unpack_rows(self, rows: U8) -> tuple[U8, U8]:
        """Return native (codes, scales) of ``rows``; see :meth:`unpack`."""
        raise UnsupportedType(f"{self.name} has no native packing")

    # Derived ----------------------------------------------------------------------------------------------------

    def decode_rows(self, rows: U8, out: npt.NDArray[Any]) -> None:
        """Fill ``out`` [R, row_len] of ``value_dtype`` from ``rows`` uint8 [R, row_nbytes]: the specification on NumPy.

        A type whose specification is written for NumPy alone writes this instead of :meth:`decode_blocks`; torch then has the
        CPU decode it.
        """
        block, header = self.layout.fields(rows)
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.decode_blocks(block, header, _NUMPY)
        if values.dtype != self.value_dtype:
            raise TypeError(f"{self.name}.decode_blocks gives {values.dtype}, it must give {self.value_dtype}")
        out[...] = values.reshape(out.shape)

    @property
    def name(self) -> str:
        """Upstream spelling of the type."""
        return type(self).__name__

    def __repr__(self) -> str:
        return f"<Codec {self.name}>"

    def _implements(self, verb: str) -> bool:
        return getattr(type(self), verb) is not getattr(Codec, verb)

    @property
    def can_decode(self) -> bool:
        """Whether :meth:`decode` works."""
        return self._implements("decode_blocks") or self._implements("decode_rows")

    @property
    def can_encode(self) -> bool:
        """Whether :meth:`encode` works."""
        return self._implements("encode_rows")

    @property
    def can_pack(self) -> bool:
        """Whether :meth:`pack` and :meth:`unpack` work."""
        return self._implements("pack_rows")

    @property
    def has_kernel(self) -> bool:
        """Whether a Numba kernel decodes the type; asking loads no compiler."""
        return (self._own or self.kernel_module is not None) and self.can_decode and kernels.exists(self.name)

    @property
    def has_cuda(self) -> bool:
        """Whether a CUDA kernel decodes the type; asking loads no compiler."""
        own = self._own or self.cuda_module is not None
        return own and self.can_decode and kernels.exists(self.name, cuda=True)

    @property
    def searches(self) -> bool:
        """Whether effort, objective and importance may change what :meth:`encode` gives."""
        return self.can_encode and self.layout.block_len > 1 and "encode" not in self._kernels

    @property
    def has_torch(self) -> bool:
        """Whether plain torch decodes the type, on any device of torch's: its specification is written for any library."""
        return self._implements("decode_blocks")

    @property
    def _own(self) -> bool:
        return type(self).__module__.startswith("ggufx.")

    @cached_property
    def _kernels(self) -> Mapping[str, Callable[..., Any]]:
        module = kernels.find(self.name) if self._own or self.kernel_module is not None else None
        if module is None:
            return {}
        return {verb: getattr(module, verb) for verb in ("decode", "encode", "pack", "unpack") if hasattr(module, verb)}

    @cached_property
    def _kernel_outputs(self) -> Collection[str]:
        """Dtypes that the kernel decodes to: of types of ggufx all that there are."""
        return kernels.OUTPUTS if self._own else getattr(kernels.find(self.name), "OUTPUTS", ("float32",))

    # Final ------------------------------------------------------------------------------------------------------

    def decode(
        self,
        data: npt.ArrayLike,
        shape: tuple[int, ...] | None = None,
        *,
        dtype: npt.DTypeLike | None = None,
        out: npt.NDArray[Any] | None = None,
        threads: int | None = None,
        use_kernel: bool = True,
    ) -> npt.NDArray[Any]:
        """Decode packed bytes.

        Parameters
        ----------
        data
            uint8 [..., row_nbytes], or any uint8 array of the right total length when ``shape`` is given. Read-only,
            unaligned and memory-mapped arrays are fine.
        shape
            Logical shape, numpy order; by default ``data.shape[:-1] + (row_len,)``.
        dtype
            float32, float16, bfloat16 (``ml_dtypes``) or float64; default :attr:`value_dtype`.
        out
            C-contiguous array of ``shape`` and ``dtype`` to fill: fresh memory costs more than decoding.
        threads
            Row chunks at a time; default: up to the CPU count, for large tensors.
        use_kernel
            ``False`` runs the NumPy specification even where a kernel exists.

        Returns
        -------
        ndarray of ``shape``: ``out`` when given.

        Raises
        ------
        CodecError
            Lengths, shapes or dtypes do not fit.
        UnsupportedType
            The type is known by its layout only.
        """
        rows, shape = self._packed_rows(data, shape)
        target = self._decode_target(shape, dtype, out)
        if rows.size:
            self._decode_rows_of(lambda start, stop: rows[start:stop], shape, target, threads, use_kernel=use_kernel)
        return target

    def decode_from(
        self,
        rows_of: Callable[[int, int], U8],
        shape: tuple[int, ...],
        *,
        dtype: npt.DTypeLike | None = None,
        out: npt.NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> npt.NDArray[Any]:
        """Decode rows that are fetched piece by piece, so that the packed tensor need not be in memory as a whole.

        Parameters
        ----------
        rows_of
            ``rows_of(start, stop)`` returns the packed rows ``start`` to ``stop``, uint8 [stop - start, row_nbytes],
            contiguous; called from several threads at a time, each of which is done with the rows at its next call.
        shape
            Logical shape, numpy order.
        dtype, out, threads
            As in :meth:`decode`.

        Returns
        -------
        ndarray of ``shape``: ``out`` when given.

        Raises
        ------
        CodecError, UnsupportedType
            As :meth:`decode`.
        """
        target = self._decode_target(shape, dtype, out)
        if self.layout.nbytes(shape):
            self._decode_rows_of(lambda start, stop: _readonly(rows_of(start, stop)), shape, target, threads)
        return target

    def _decode_target(
        self, shape: tuple[int, ...], dtype: npt.DTypeLike | None, out: npt.NDArray[Any] | None
    ) -> npt.NDArray[Any]:
        """Return what to decode into, checked."""
        wanted = self.value_dtype if dtype is None else np.dtype(dtype)
        if out is None:
            out = np.empty(shape, wanted)
        elif (
            out.shape != shape
            or not out.flags.c_contiguous
            or not out.flags.writeable
            or (dtype is not None and out.dtype != wanted)
        ):
            raise CodecError(
                f"out is {out.dtype}{list(out.shape)}, it must be a writeable C-contiguous array of {wanted}{list(shape)}"
            )
        if out.dtype != self.value_dtype and out.dtype not in _FLOATS:
            raise CodecError(
                f"{self.name} decodes to {self.value_dtype}, or to float32, float16, bfloat16 or float64 on request; not "
                f"to {out.dtype}"
            )
        if not self.can_decode:
            self.decode_rows(np.empty((0, 0), np.uint8), out)  # raises the type's own reason
        return out

    def _decode_rows_of(
        self,
        rows_of: Callable[[int, int], U8],
        shape: tuple[int, ...],
        out: npt.NDArray[Any],
        threads: int | None,
        *,
        use_kernel: bool = True,
    ) -> None:
        """Fill ``out`` from ``rows_of(start, stop)``: contiguous read-only rows, uint8 [stop - start, row_nbytes]."""
        target = out.reshape(prod(shape[:-1]), -1)
        # Plain numbers that stay or grow are copied: no kernel is faster, and a compiler is slow to load.
        is_plain = self.layout.block == np.dtype([("value", self.value_dtype)])
        copies = is_plain and target.dtype.itemsize >= self.value_dtype.itemsize
        function = self._kernels.get("decode") if use_kernel and not copies else None
        narrows = function is not None and target.dtype.name in self._kernel_outputs
        direct = target.flags.aligned and (narrows or target.dtype == self.value_dtype)

        def decode_chunk(start: int, stop: int) -> None:
            part = target[start:stop]
            buffer = part if direct else np.empty(part.shape, self.value_dtype)
            if function is not None:
                function(rows_of(start, stop), buffer.view(kernels.OUTPUTS[buffer.dtype.name]), self.layout.block_len)
            else:
                self.decode_rows(rows_of(start, stop), buffer)
            if not direct:
                # Overflow on the way to a narrower float is the caller's wish, as with astype.
                with np.errstate(over="ignore", invalid="ignore"):
                    part[...] = buffer

        self._in_chunks(decode_chunk, target.shape[0], target.shape[1] * 4, threads)

    def encode(
        self,
        values: npt.ArrayLike,
        importance: npt.ArrayLike | None = None,
        *,
        effort: Effort = "normal",
        objective: Objective = "reference",
        out: U8 | None = None,
        saturate: bool = True,
        threads: int | None = None,
        use_kernel: bool = True,
    ) -> U8:
        """Encode floats.

        Parameters
        ----------
        values
            Real array [..., row_len]. Must be finite. Converted to float32 first, except for integer types and float64,
            which take the numbers as they are. A torch tensor gives a torch tensor on the same device: see
            :func:`ggufx.torch.encode`.
        importance
            Non-negative weights [row_len] of the columns (a row of an importance matrix). Types without a search ignore
            them. Blocks of columns whose weights are all zero get the mean weight, with an :class:`ImportanceWarning`.
        effort
            ``fast``, ``normal`` or ``high``: less error for more time; see :meth:`keep_better`. ``reference``: the C library's
            bytes, for types that promise them (:attr:`reproduces`). Types without a search give the same for all.
        objective
            ``reference``: minimise ``sum w (x - y)^2`` with the weights of the type's reference encoder; ``mse``: with the
            importance itself.
        out
            C-contiguous uint8 [..., row_nbytes] to fill.
        saturate
            ``True``: a block with a value beyond the type's scales gets the largest scale, and a float type infinity.
            ``False`` raises instead, as quantizing a model does.
        threads, use_kernel
            As in :meth:`decode`. The bytes do not depend on either.

        Returns
        -------
        uint8 [..., row_nbytes]

        Raises
        ------
        CodecError
            NaN or infinity (naming row and column), a row that is no multiple of the block, bad weights.
        OutOfRangeError
            Without ``saturate``, a value is beyond what the type's scales can hold (naming row and column).
        UnsupportedType
            The type has no encoder.
        """
        for kind, encoder in _ENCODERS:
            if isinstance(values, kind):
                packed: U8 = encoder(
                    values, self, importance, effort=effort, objective=objective, out=out, threads=threads, saturate=saturate,
                    use_kernel=use_kernel,
                )  # fmt: skip
                return packed
        if type(values).__module__.partition(".")[0] == "torch":
            raise CodecError("the values are a torch tensor: import ggufx.torch first, which encodes it where it is")
        array = np.asarray(values)
        if array.ndim == 0:
            raise CodecError("a row has at least one axis; got a scalar")
        if not self.can_encode:
            raise UnsupportedType(f"encoding to {self.name} is not implemented")
        if not np.can_cast(array.dtype, np.float32, "same_kind"):
            raise CodecError(f"values must be real numbers, got {array.dtype}")
        row_len = array.shape[-1]
        row_nbytes = self.layout.row_nbytes(row_len)
        shape = (*array.shape[:-1], row_nbytes)
        if out is None:
            out = np.empty(shape, np.uint8)
        self._check_packed_out(out, shape)
        if effort not in EFFORTS or objective not in OBJECTIVES:
            raise CodecError(
                f"effort {effort!r}, objective {objective!r}: expected one of {', '.join(EFFORTS)}, one of "
                f"{', '.join(OBJECTIVES)}"
            )
        if effort == "reference" and not self.reproduces:
            raise UnsupportedType(f"{self.name} does not promise the reference encoder's bytes; use another effort")
        weights = self._importance(importance, row_len)
        search = Search(effort, objective)
        if array.size == 0:
            return out
        flat, target = array.reshape(-1, row_len), out.reshape(-1, row_nbytes)

        def encode_chunk(start: int, stop: int) -> None:
            part = self._finite(flat[start:stop], start)
            self._encode_part(part, target[start:stop], weights, search, use_kernel=use_kernel)
            if not saturate:
                self.check_range(part, target[start:stop], weights, search, start)

        # A search takes far longer than a decoder: smaller pieces share better. Plain encoders are as quick as one.
        plain = (use_kernel and "encode" in self._kernels) or effort == "reference"
        cost = 4 if plain else 32
        self._in_chunks(encode_chunk, flat.shape[0], row_len * cost, threads)
        return out

    def pack(
        self,
        codes: U8,
        scales: U8,
        *,
        rows_per_scale: int = 1,
        out: U8 | None = None,
        use_kernel: bool = True,
    ) -> tuple[U8, int, int]:
        """Pack native codes and scales without touching a float.

        Parameters
        ----------
        codes
            uint8 [R, n] as the checkpoint has them: one FP8 code a byte, or FP4 pairs (element 2i in the low nibble).
        scales
            uint8 E8M0 [ceil(R / rows_per_scale), ceil(row_len / block_len)].
        rows_per_scale
            Rows that share a row of ``scales`` (128 for 128x128 tiles).
        out
            uint8 [R, row_nbytes] to fill.

        Returns
        -------
        (packed uint8 [R, row_nbytes], number of NaN codes, number of scales 255)
        """
        if not self.can_pack:
            self.pack_rows(codes, scales, codes, rows_per_scale)  # raises the type's own reason
        if codes.dtype != np.uint8 or scales.dtype != np.uint8 or codes.ndim != 2 or scales.ndim != 2:
            raise CodecError(
                f"codes and scales must be uint8 with two axes (view other 8-bit dtypes as uint8), got "
                f"{codes.dtype}{list(codes.shape)} and {scales.dtype}{list(scales.shape)}"
            )
        if rows_per_scale < 1:
            raise CodecError(f"rows_per_scale is {rows_per_scale}, it must be at least 1")
        count = scales.shape[1] * self.layout.block_len
        expected = -(-codes.shape[0] // rows_per_scale)
        codes_nbytes = count * self._code_bits // 8
        if codes.shape[1] != codes_nbytes or scales.shape[0] != expected:
            raise CodecError(
                f"codes uint8{list(codes.shape)} and scales uint8{list(scales.shape)} do not fit {self.name} with "
                f"{rows_per_scale} rows a scale: expected codes [R, {codes_nbytes}] and {expected} rows of scales"
            )
        shape = (codes.shape[0], self.layout.row_nbytes(count))
        if out is None:
            out = np.empty(shape, np.uint8)
        self._check_packed_out(out, shape)  # the kernel writes where it is told to
        arguments = (_readonly(codes), _readonly(scales), out)
        function = self._kernels.get("pack") if use_kernel else None
        if function is not None:
            bad_codes, bad_scales = function(*arguments, self.layout.block_len, int(rows_per_scale))
        else:
            bad_codes, bad_scales = self.pack_rows(*arguments, rows_per_scale)
        return out, int(bad_codes), int(bad_scales)

    def unpack(self, data: npt.ArrayLike, *, use_kernel: bool = True) -> tuple[U8, U8]:
        """Return native ``(codes [R, n], scales [R, n_blocks])`` of packed rows uint8 [R, row_nbytes]: pack reversed."""
        if not self.can_pack:
            raise UnsupportedType(f"{self.name} has no native packing")
        rows, shape = self._packed_rows(data, None)
        function = self._kernels.get("unpack") if use_kernel else None
        if function is None:
            return self.unpack_rows(rows)
        codes = np.empty((rows.shape[0], shape[-1] * self._code_bits // 8), np.uint8)
        scales = np.empty((rows.shape[0], shape[-1] // self.layout.block_len), np.uint8)
        function(rows, codes, scales, self.layout.block_len)
        return codes, scales

    # Help -------------------------------------------------------------------------------------------------------

    @property
    def _code_bits(self) -> int:
        """Bits of one native code, from the layout: a packable block is one scale byte and codes."""
        return (self.layout.block.itemsize - 1) * 8 // self.layout.block_len

    @staticmethod
    def _check_packed_out(out: U8, shape: tuple[int, ...]) -> None:
        if out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
            raise CodecError(
                f"out is {out.dtype}{list(out.shape)}, it must be a writeable C-contiguous uint8{list(shape)}"
            )

    def _packed_rows(self, data: npt.ArrayLike, shape: tuple[int, ...] | None) -> tuple[U8, tuple[int, ...]]:
        array = np.asarray(data)
        if array.dtype != np.uint8:
            raise CodecError(f"packed data must be uint8, got {array.dtype}")
        if shape is None:
            if array.ndim == 0:
                raise CodecError("packed data has at least one axis; got a scalar")
            shape = (*array.shape[:-1], self.layout.row_len(array.shape[-1]))
        nbytes = self.layout.nbytes(tuple(shape))
        if array.size != nbytes:
            raise CodecError(f"{self.name}{list(shape)} takes {nbytes} bytes, got {array.size}")
        n_rows = prod(shape[:-1])
        rows = np.ascontiguousarray(array).reshape(n_rows, self.layout.row_nbytes(shape[-1] if shape else 1))
        return _readonly(rows), tuple(shape)

    def _importance(self, importance: npt.ArrayLike | None, row_len: int) -> F32 | None:
        if importance is None:
            if self.needs_importance:
                raise CodecError(f"{self.name} needs importance weights (an importance matrix)")
            return None
        weights = np.ascontiguousarray(importance, np.float32)
        if weights.shape != (row_len,) or not np.isfinite(weights).all() or (weights < 0).any():
            raise CodecError(f"importance must be {row_len} finite weights >= 0, got an array of {list(weights.shape)}")
        weights, dead = self.usable_importance(weights)
        if dead:
            warnings.warn(
                f"importance is all zero over {dead} of {row_len // self.layout.block_len} blocks of "
                f"{self.layout.block_len} columns; they are encoded with the mean weight",
                ImportanceWarning,
                stacklevel=3,
            )
        return weights

    def usable_importance(self, weights: F32) -> tuple[F32, int]:
        """Return ``weights`` [row_len] with the mean in blocks that are all zero (1 if all are), and their number."""
        dead = ~weights.reshape(-1, self.layout.block_len).any(axis=1)
        count = int(dead.sum())
        if count:
            # In float64, and not 0: the mean of finite weights may overflow float32, or vanish in it.
            mean = max(float(weights.mean(dtype=np.float64)), _LEAST) if weights.any() else 1
            weights = weights.copy()
            weights.reshape(-1, self.layout.block_len)[dead] = mean
        return weights, count

    def _finite(self, part: npt.NDArray[Any], first_row: int) -> F32:
        with np.errstate(over="ignore"):
            # A float32 on the way would round large integers and float64 in silence.
            exact = self.value_dtype != np.float32
            # Aligned and read-only for the same reason as packed rows: one overload per kernel.
            values = np.require(part, None if exact else np.float32, ("C_CONTIGUOUS", "ALIGNED")).view()
            values.flags.writeable = False
        if not np.isfinite(values).all():
            row, column = (int(n) for n in np.argwhere(~np.isfinite(values))[0])
            raise NonFiniteError(first_row + row, column, values[row, column], self.name)
        return values

    def _encode_part(self, part: F32, out: U8, weights: F32 | None, search: Search, *, use_kernel: bool = True) -> None:
        function = self._kernels.get("encode") if use_kernel else None
        if function is not None:
            function(part, out, self.layout.block_len)
            return
        with kernels.of_type(self.name):
            self.encode_rows(part, out, weights, search)
        self.keep_better(part, out, weights, search)

    def keep_better(self, values: F32, packed: U8, weights: F32 | None, search: Search) -> None:
        """Replace rows of ``packed`` by those of the next lower effort where these have less error.

        ``high`` is compared with ``normal`` in every row. ``normal`` is compared with ``fast`` in rows unlike a model's weights
        only: of those that are alike, ``fast`` is better by a percent or two at most, and comparing takes half as long as the
        search.

        Parameters
        ----------
        values
            float32 [R, row_len], finite.
        packed
            uint8 [R, row_nbytes]: what :meth:`encode_rows` made of them with ``weights`` and ``search``.
        """
        if search.effort not in _LOWER or self.nested or not self.searches or not self.can_decode:
            return
        rows = np.flatnonzero(unusual(values)) if search.effort == "normal" else np.arange(len(values))
        if not rows.size:
            return
        if rows.size < len(values):
            values = values[rows]
            values.flags.writeable = False
        other = packed[rows]
        self._encode_part(values, other, weights, search._replace(effort=_LOWER[search.effort]))
        differs = np.flatnonzero((packed[rows] != other).any(axis=1))
        if differs.size:
            weighting = self.weighting if search.objective == "reference" else None
            ours, theirs = (
                errors(values[differs], self.decode(part, dtype=np.float32, threads=1), weights, weighting)
                for part in (packed[rows[differs]], other[differs])
            )
            better = differs[theirs < ours]
            packed[rows[better]] = other[better]

    def check_range(
        self, values: F32, packed: U8, weights: F32 | None = None, search: Search | None = None, first_row: int = 0
    ) -> None:
        """Raise OutOfRangeError where values were too large for the type's scales.

        Only rows with values beyond :attr:`safe_magnitude` are looked at, which few models have. Brought down by a power of
        two, such a row must leave about the error that it left as it is: encoders do the same at every magnitude that the
        scales can hold.

        Parameters
        ----------
        values
            float32 [R, row_len], finite.
        packed
            uint8 [R, row_nbytes]: what they were encoded to, with ``weights`` and ``search``.
        first_row
            Of what the rows are a part of, for the error.
        """
        if self.value_dtype != np.float32:
            return
        tops = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
        for row in np.flatnonzero(tops > self.safe_magnitude):
            shift = np.float32(2.0 ** -int(np.frexp(tops[row])[1]))
            small = np.require(values[row : row + 1] * shift, np.float32, ("C_CONTIGUOUS", "ALIGNED"))
            small.flags.writeable = False
            again = np.empty((1, packed.shape[1]), np.uint8)
            self._encode_part(small, again, weights, search or Search())
            with np.errstate(over="ignore", invalid="ignore"):
                found = self.decode(packed[row], dtype=np.float64).reshape(-1, self.layout.block_len) * float(shift)
                best = self.decode(again, dtype=np.float64).reshape(found.shape)
                wanted = small.astype(np.float64).reshape(found.shape)
                error, least = ((found - wanted) ** 2).sum(axis=1), ((best - wanted) ** 2).sum(axis=1)
                # A type of few codes leaves nearly all of a block with one large value either way, but not as little of it.
                clipped = np.abs(found).max(axis=1) < np.abs(best).max(axis=1) / 2
            bad = np.flatnonzero(~(error <= 2 * least + _RANGE_SLACK * (wanted**2).sum(axis=1)) | clipped)
            if bad.size:
                # A row with one scale for all suffers from its largest value wherever that is.
                whole = self.layout.header is not None
                start = 0 if whole else int(bad[0]) * self.layout.block_len
                part = values[row] if whole else wanted[bad[0]]
                column = start + int(np.abs(part).argmax())
                raise OutOfRangeError(first_row + int(row), column, values[row, column], self.name)

    @staticmethod
    def _in_chunks(work: Callable[[int, int], None], n_rows: int, row_cost: int, threads: int | None) -> None:
        step = max(1, _CHUNK_NBYTES // max(1, row_cost))
        starts = range(0, n_rows, step)
        workers = min(len(starts), threads or os.cpu_count() or 1)

        def work_from(start: int) -> None:
            stopping.check()
            work(start, min(start + step, n_rows))

        if workers <= 1:
            # One call would do for a kernel, but chunks keep the scratch of specifications and casts small.
            for start in starts:
                work_from(start)
            return
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work_from, starts))


def _readonly(array: U8) -> U8:
    # One overload per kernel: always contiguous and read-only, whatever the caller has.
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
