"""Write a GGUF tensor by tensor, from arrays or packed bytes, with bounded memory.

A GGUF has its directory before its data, so a writer has to know names, shapes and types first, or to leave room for them:

- Tensors that are declared first (:meth:`Writer.declare`) are written where they belong, in any order.
- Without declarations the header is written when all tensors are there, into room that was left for it (see
  :mod:`ggufx.partial`): a file of more than 64 MB then has a key ``ggufx.padding``.

Files grow under names that nobody can guess and get their own when all of them are complete, checked and on the disk.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypedDict

import numpy.typing as npt

from ggufx import arrays, container, dialects, outputs, plan, types
from ggufx.arrays import Described
from ggufx.container import SPLIT_PATTERN, Value, align_up
from ggufx.dialects import Dialect
from ggufx.errors import (
    CodecError,
    DiskError,
    GGUFError,
    OutputExists,
    PlanError,
    UnknownDialect,
    quoted,
)
from ggufx.file import DIALECT_KEY
from ggufx.partial import ROOM_NBYTES, Member
from ggufx.plan import Plan, PlannedTensor, Transform
from ggufx.types import Codec, Effort, Objective
from ggufx.values import KeyValues, as_value, check_name

__all__ = ["Writer", "WriterOptions"]

_DUPLICATE: Final = "a tensor of that name was {} already; names are unique in a GGUF"


class WriterOptions(TypedDict, total=False):
    """Options of :class:`Writer` that :func:`ggufx.save` and its like pass on."""

    dialect: str | None
    alignment: int | None
    split_max_nbytes: int | None
    split_max_tensors: int | None
    overwrite: bool
    threads: int | None


class _Metadata(KeyValues, MutableMapping[str, Any]):
    """Metadata that is still being made: a value is checked, and gets its type, when it is set."""

    def __init__(self) -> None:
        super().__init__({})
        self.fixed = False

    def __setitem__(self, key: str, data: Any) -> None:
        self._change(key)
        if key.startswith("split."):
            raise PlanError(f"key {quoted(key)}: the writer sets the keys of a split itself; leave it out")
        self._values[key] = as_value(key, data)

    def __delitem__(self, key: str) -> None:
        self._change(key)
        del self._values[key]

    def _change(self, key: str) -> None:
        check_name(key, "key")
        if self.fixed:
            raise PlanError(
                f"key {quoted(key)}: the size of the header is fixed since the first declared tensor was written; set all keys "
                "before that"
            )


@dataclass
class _Declared:
    """A tensor of the output."""

    name: str
    shape: tuple[int, ...]
    codec: Codec
    written: bool = False
    place: tuple[int, int] = field(default=(0, 0))
    """Number of its member, and offset within the member's data."""

    @property
    def nbytes(self) -> int:
        return self.codec.layout.nbytes(self.shape)


class Writer:
    """Writes a GGUF, split or not, tensor by tensor.

    As a context manager it finishes the file at the end of the ``with``. An exception within it leaves nothing behind. Memory
    holds the piece of a tensor that is being written, some hundred megabytes at most beside the caller's arrays.

    Parameters
    ----------
    path
        The output; with a split its prefix, and the members get ``-NNNNN-of-NNNNN`` names.
    metadata
        Key -> Python value or :class:`ggufx.values.Value`; :func:`ggufx.values.as_value` says which type a Python value gets.
        The metadata of an open file is taken as it is, but for its ``split.`` keys.
    architecture
        ``general.architecture``, which llama.cpp wants.
    dialect
        Whose type ids to write: ``"llama.cpp"``, ``"ik_llama.cpp"``, ``"nisparks"`` or ``"ds4"``; by default the first that has
        all types. Another one than llama.cpp is stamped as the key ``ggufx.dialect``.
    alignment
        Of the tensors, in bytes, a power of two; by default ``general.alignment`` of the metadata, or 32.
    split_max_nbytes, split_max_tensors
        Begin a new member before a tensor would take it past so many bytes of data, or tensors.
    overwrite
        Replace existing files, when the new ones are complete.
    threads
        Of the encoders; default: up to the CPU count.

    Attributes
    ----------
    metadata : MutableMapping
        Keys that are set here get into the header, too: until :meth:`close`, or until the first tensor is written where
        tensors are declared.

    Raises
    ------
    OutputExists
        The output exists, and ``overwrite`` was not asked for.
    PlanError
        A key or value that a GGUF cannot hold, a bad alignment, or a folder that is not there.
    UnknownDialect
        There is no dialect of that name.

    Warns
    -----
    OutputWarning
        llama.cpp's loader refuses something that other readers take: a name longer than 63 bytes, more than four axes.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> with ggufx.Writer("tiny.gguf", {"general.name": "Tiny"}, architecture="llama") as writer:
    ...     writer.add("output_norm.weight", np.ones(256, np.float32))
    ...     writer.add("output.weight", np.ones((8, 256), np.float32), "Q4_K")
    >>> [(tensor.name, tensor.type) for tensor in ggufx.open("tiny.gguf").tensors]
    [('output_norm.weight', 'F32'), ('output.weight', 'Q4_K')]
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Mapping[str, Any] | None = None,
        *,
        architecture: str | None = None,
        dialect: str | None = None,
        alignment: int | None = None,
        split_max_nbytes: int | None = None,
        split_max_tensors: int | None = None,
        overwrite: bool = False,
        threads: int | None = None,
    ) -> None:
        self._members: list[Member] = []
        self._state = "open"
        self._path = Path(path)
        self._split = (split_max_nbytes, split_max_tensors)
        self._overwrite, self._threads = overwrite, threads
        self._tensors: dict[str, _Declared] = {}
        self._planned: Plan | None = None
        self._declares = False
        self.metadata: MutableMapping[str, Any] = _Metadata()
        if architecture is not None:
            self.metadata["general.architecture"] = architecture
        given = metadata or {}
        if isinstance(given, KeyValues):
            given = {key: value for key, value in given.typed().items() if not key.startswith("split.")}
        for key, value in given.items():
            if key != "general.architecture" or architecture is None:
                self.metadata[key] = value
        stamped = self.metadata.get(DIALECT_KEY)
        # A stamp that is not known here counts as none, as for a reader, and is replaced.
        self._dialects = _dialects(stamped if dialect is None and stamped in dialects.TARGETS else dialect)
        self._alignment = self._aligned(alignment)
        self._check_path()

    def _aligned(self, alignment: int | None) -> int:
        """Return the alignment, asked for or in the metadata, and write it there where it is not the default."""
        key = "general.alignment"
        held = self.metadata.get(key)
        chosen = held if alignment is None else alignment
        if chosen is None:
            return container.DEFAULT_ALIGNMENT
        if type(chosen) is not int or not 0 < chosen <= container.MAX_ALIGNMENT or chosen & (chosen - 1):
            raise PlanError(f"{key} is {chosen!r}; it must be a power of two, at most {container.MAX_ALIGNMENT}")
        if held not in (None, chosen):
            raise PlanError(f"alignment={chosen}, but {key} of the metadata is {held}; give one of them")
        if held is not None or chosen != container.DEFAULT_ALIGNMENT:
            self.metadata[key] = Value.u32(chosen)
        return chosen

    def _check_path(self) -> None:
        path, parent = self._path, self._path.parent
        if any(limit is not None and limit < 1 for limit in self._split):
            raise PlanError(f"{path}: split_max_nbytes and split_max_tensors must be at least 1, got {self._split}")
        if not path.name:
            raise PlanError(f"{path}: is a directory; name a file")
        if not parent.is_dir():
            raise PlanError(f"{path}: there is no folder {parent}; make it first")
        if not any(self._split):
            outputs.refuse_existing(path, overwrite=self._overwrite)
            return
        prefix = path.name.removesuffix(".gguf")
        for found in parent.iterdir():
            member = SPLIT_PATTERN.match(found.name)
            if member is not None and member["prefix"] == prefix and not self._overwrite:
                raise OutputExists(f"{found}: exists, a member of such a split; choose another name, or overwrite=True")

    # Tensors ----------------------------------------------------------------------------------------------------

    def declare(self, name: str, shape: Sequence[int], type: str) -> None:
        """Say that a tensor will be written; all must be declared before the first is written.

        The directory is then known, so that each tensor goes to its final place whatever the order, and the header has its
        exact size.

        Parameters
        ----------
        name
            Of the tensor.
        shape
            Numpy order: the last axis is the row.
        type
            Name of the type, in any case.

        Raises
        ------
        PlanError
            A tensor of that name was declared, or tensors were written before.
        CodecError
            A row is no multiple of the type's block.
        UnknownType
            There is no type of that name.
        """
        self._require_open()
        if self._planned is not None or (self._tensors and not self._declares):
            raise PlanError(f"tensor {quoted(name)}: declare all tensors before the first one is written")
        self._new(name, tuple(int(n) for n in shape), types.get(type), "declared")
        self._declares = True

    def add(
        self,
        name: str,
        data: Any,
        type: str | None = None,
        *,
        importance: npt.ArrayLike | None = None,
        effort: Effort = "normal",
        objective: Objective = "reference",
    ) -> None:
        """Write a tensor.

        Parameters
        ----------
        name
            Of the tensor.
        data
            A NumPy or ``ml_dtypes`` array, a torch tensor, a :class:`ggufx.Packed`, a tensor of an open file, whose bytes are
            copied, a :class:`ggufx.Lazy`, or a callable without parameters that returns one of these.
            Without axes it gets one of length 1.
        type
            Name of the type, in any case. By default the declared one, or the one that keeps every bit: float32 is F32, packed
            rows keep their type. Bits that are kept are not looked at, so NaN stays NaN.
        importance
            Weights of the columns, for types that search: [row_len], or [experts, row_len] for stacked experts.
        effort, objective
            As in :func:`ggufx.quantize_array`.

        Raises
        ------
        PlanError
            A tensor of that name was written, or not declared where others were; no dialect has all types together; data is no
            array, of another shape than declared, or packed as another type.
        CodecError
            A dtype that a GGUF does not have, a row that is no multiple of the block, NaN or infinity.
        OutOfRangeError
            A value is beyond what the type can hold.
        DiskError
            The disk is full, or fails.
        """
        self._require_open()
        check_name(name, "tensor")
        if callable(data) and not hasattr(data, "shape"):
            data = data()
        described = arrays.describe(name, data)
        declared = self._tensors.get(name)
        if declared is not None and declared.written:
            raise PlanError(f"tensor {quoted(name)}: " + _DUPLICATE.format("written"))
        if declared is None and self._declares:
            raise PlanError(f"tensor {quoted(name)}: was not declared; of a file with declarations all tensors are")
        shape = described.shape or (1,)
        if declared is not None and declared.shape != shape:
            raise PlanError(f"tensor {quoted(name)}: was declared as {list(declared.shape)}, and has {list(shape)}")
        wanted = declared.codec.name if type is None and declared is not None else type
        codec = arrays.type_for(name, described, wanted)
        if declared is not None and codec is not declared.codec:
            raise PlanError(f"tensor {quoted(name)}: was declared as {declared.codec.name}, not as {codec.name}")
        if declared is None:
            self._append(name, described, codec, importance, effort, objective)
        else:
            self._lay_out()
            self._stream(declared, described, importance, effort, objective)
            declared.written = True

    def _new(self, name: str, shape: tuple[int, ...], codec: Codec, verb: str) -> _Declared:
        """Take a tensor into the directory."""
        check_name(name, "tensor")
        # ggml has no tensors without axes, and the gguf package cannot open a file with one of BF16.
        shape = shape or (1,)
        if name in self._tensors:
            raise PlanError(f"tensor {quoted(name)}: " + _DUPLICATE.format(verb))
        if any(n < 0 for n in shape) or len(shape) > container.MAX_DIMS or prod(n or 1 for n in shape) >= 2**60:
            raise PlanError(
                f"tensor {quoted(name)}: {list(shape)[:8]} is no shape of a GGUF, which has at most {container.MAX_DIMS} axes "
                "and less than 2^60 elements"
            )
        try:
            codec.layout.nbytes(shape)
        except CodecError as error:
            raise _named(error, name, f"; {codec.name} does not fit, give it another type") from None
        holding = [dialect for dialect in self._dialects if dialect.type_id(codec) is not None]
        if not holding:
            among = ", ".join(dict.fromkeys(tensor.codec.name for tensor in self._tensors.values())) or "no other types"
            raise PlanError(
                f"tensor {quoted(name)}: {' and '.join(dialect.name for dialect in self._dialects)} cannot hold {codec.name} "
                f"(beside {among}); choose another type, or another dialect"
            )
        self._dialects = holding
        self._tensors[name] = found = _Declared(name, shape, codec)
        return found

    def _append(
        self,
        name: str,
        described: Described,
        codec: Codec,
        importance: npt.ArrayLike | None,
        effort: Effort,
        objective: Objective,
    ) -> None:
        before = self._dialects
        tensor = self._new(name, described.shape, codec, "written")
        try:
            member = self._member_for(tensor.nbytes)
            tensor.place = len(self._members) - 1, member.end
            self._stream(tensor, described, importance, effort, objective)
        except BaseException:
            # The caller may go on: nothing of the tensor stays.
            del self._tensors[name]
            self._dialects = before
            if self._members:
                self._members[-1].forget_rest()
            if len(self._members) > 1 and not self._members[-1].count:
                self._members.pop().discard()
            raise
        tensor.written = True
        member.end += align_up(tensor.nbytes, self._alignment)
        member.count += 1

    def _member_for(self, nbytes: int) -> Member:
        """Return the member that takes the next tensor; the rule is that of :func:`ggufx.plan.build`."""
        max_nbytes, max_tensors = self._split
        member = self._members[-1] if self._members else None
        full = member is not None and (
            (max_nbytes is not None and member.end + nbytes > max_nbytes) or member.count == max_tensors
        )
        if member is None or (full and member.count):
            keys = {} if self._members else self._typed()
            room = len(container.encode_header(keys, (), self._alignment)) + ROOM_NBYTES
            member = self._create(align_up(room, self._alignment))
        return member

    def _create(self, room: int) -> Member:
        path = self._path.resolve() if self._path.is_symlink() else self._path
        with self._disk():
            member = Member(path, room)
        self._members.append(member)
        return member

    def _lay_out(self) -> None:
        """Fix the header and make the files, when the first declared tensor is written."""
        if self._planned is not None:
            return
        self._planned = self._plan()
        assert isinstance(self.metadata, _Metadata)
        self.metadata.fixed = True
        for number, file in enumerate(self._planned.files):
            member = self._create(len(file.header))
            with self._disk():
                outputs.reserve(member.descriptor, file.nbytes)
            for planned in file.tensors:
                self._tensors[planned.name].place = number, planned.offset

    def _stream(
        self,
        tensor: _Declared,
        described: Described,
        importance: npt.ArrayLike | None,
        effort: Effort,
        objective: Objective,
    ) -> None:
        """Write a tensor's rows to its place."""
        number, offset = tensor.place
        member = self._members[number]
        position, expected = member.room + offset, tensor.nbytes
        start = position
        try:
            for piece in arrays.packed_rows(
                tensor.shape, tensor.codec, described, importance, effort, objective, self._threads
            ):
                if position + piece.size > start + expected:
                    raise PlanError(f"more rows than {list(tensor.shape)} has")
                with self._disk():
                    member.write(position, piece)
                position += piece.size
            if position != start + expected:
                row_nbytes = max(1, expected // max(1, described.n_rows))
                raise PlanError(
                    f"{(position - start) // row_nbytes} rows came, {list(tensor.shape)} has {described.n_rows}"
                )
        except GGUFError as error:
            raise _named(error, tensor.name) from None

    # The end ----------------------------------------------------------------------------------------------------

    def close(self) -> list[Path]:
        """Finish the files, check their headers, bring them to the disk and give them their names.

        Returns
        -------
        list of Path
            The file, or the members of the split.

        Raises
        ------
        PlanError
            A declared tensor was not written.
        OutputExists
            A file of that name came into being meanwhile.
        DiskError
            The disk is full, or fails. Nothing is left then, as after every other error.
        """
        self._require_open()
        try:
            missing = [tensor.name for tensor in self._tensors.values() if not tensor.written]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise PlanError(f"{self._path}: tensor {quoted(missing[0])}{more} was declared and is not written")
            with self._disk():
                return self._finish()
        except BaseException:
            self.discard()
            raise

    def _finish(self) -> list[Path]:
        planned = self._planned or self._plan()
        if not self._members:
            self._create(len(planned.files[0].header))
        paths = []
        for file, member in zip(planned.files, self._members, strict=True):
            member.finish(file)
            outputs.refuse_existing(file.path, overwrite=self._overwrite)
            paths.append(file.path)
        named: list[Path] = []
        try:
            for path, member in zip(paths, self._members, strict=True):
                outputs.give_name(member.partial, path, overwrite=self._overwrite)
                named.append(path)
        except BaseException:
            for path in named if not self._overwrite else ():
                path.unlink(missing_ok=True)
            raise
        for member in self._members:
            member.close()
        folder = os.open(paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._state = "closed"
        return paths

    def discard(self) -> None:
        """Give up: remove what was written. After :meth:`close` there is nothing to remove."""
        if self._state != "open":
            return
        self._state = "discarded"
        for member in self._members:
            member.discard()

    def _typed(self) -> dict[str, Value]:
        """Return the metadata with what the writer adds to it."""
        assert isinstance(self.metadata, _Metadata)
        keys = self.metadata.typed()
        quantized = any(arrays.native_dtype(tensor.codec) is None for tensor in self._tensors.values())
        if quantized:
            keys.setdefault("general.quantization_version", Value.u32(plan.QUANTIZATION_VERSION))
        if self._dialects[0].name != "llama.cpp" or DIALECT_KEY in keys:
            keys[DIALECT_KEY] = Value.string(self._dialects[0].name)
        return keys

    def _plan(self) -> Plan:
        dialect = self._dialects[0]
        tensors = []
        for tensor in self._tensors.values():
            type_id = dialect.type_id(tensor.codec)
            assert type_id is not None
            name = tensor.codec.name
            transform = Transform("copy", name, name, tensor.shape[-1:])
            tensors.append(PlannedTensor(tensor.name, tensor.shape, name, type_id, tensor.nbytes, transform, (), ()))
        max_nbytes, max_tensors = self._split
        built = plan.build(
            self._path,
            self._typed(),
            tensors,
            source_files=(),
            dialect=dialect.name,
            alignment=self._alignment,
            split_max_nbytes=max_nbytes,
            split_max_tensors=max_tensors,
        )
        longest = max(len(file.header) for file in built.files)
        if longest > container.MAX_HEADER_NBYTES:
            raise PlanError(
                f"{self._path}: keys and directory take {longest} bytes; no more than {container.MAX_HEADER_NBYTES} are read"
            )
        for note in built.notes:
            warnings.warn(f"{self._path}: {note}", outputs.OutputWarning, stacklevel=4)
        return built

    def _require_open(self) -> None:
        if self._state != "open":
            raise ValueError(f"the writer of {self._path} is {self._state}")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"{self._path}: cannot be written ({error.strerror or error}); free some space, or choose another place, and "
                "write it again"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        elif self._state == "open":
            self.close()

    def __del__(self) -> None:
        # A writer that is neither closed nor used as a context manager leaves nothing behind either.
        if getattr(self, "_members", None):
            self.discard()

    def __repr__(self) -> str:
        return f"<Writer {str(self._path)!r}: {len(self._tensors)} tensors, {self._state}>"


def _dialects(name: str | None) -> list[Dialect]:
    """Return the dialects to choose from: the one of a name, or all."""
    types.all_codecs()  # a plug-in may bring a dialect
    if name is None:
        return list(dialects.DIALECTS.values())
    if name not in dialects.TARGETS:
        raise UnknownDialect(f"{name!r} is not a known dialect; known: {', '.join(dialects.TARGETS)}")
    return [dialects.TARGETS[name]]


def _named(error: GGUFError, name: str, more: str = "") -> GGUFError:
    """Return an error of the same kind whose message names the tensor."""
    if not str(error).startswith("tensor "):
        error.args = (f"tensor {quoted(name)}: {error}{more}",)
    return error
