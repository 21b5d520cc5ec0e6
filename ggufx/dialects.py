"""Dialects: which type an id means, in which llama.cpp fork. The only place where an id is resolved.

An id is not a type until its dialect is named: 42 is F8_E4M3_B128 in the nisparks fork, Q2_0 upstream, and other things
elsewhere. Sizes tell them apart, because GGUF stores offsets: a tensor's span is its size rounded up to the alignment.

Ids up to :data:`LAST_COMMON_ID` mean the same in every program; of a later one, another fork's meaning hides the tensors of
that id, not the file.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Literal

from ggufx import types
from ggufx.container import Entry, align_up
from ggufx.errors import AmbiguousDialect, CodecError, UnknownDialect, quoted
from ggufx.named_types import FOREIGN, OWNED, NamedType
from ggufx.types import Codec

__all__ = ["DIALECTS", "DS4", "OPAQUE", "TARGETS", "Dialect", "Resolution", "fits", "get", "register", "resolve"]

LAST_COMMON_ID = 30
"""BF16: the last id that no program has given another meaning (31 to 38 were given, taken back, and given anew)."""


@dataclass(frozen=True)
class Dialect:
    """A fork's numbering of types and file types.

    Attributes
    ----------
    name
        Spelling for ``--target`` and ``dialect=``.
    parent
        Dialect whose ids are inherited.
    lacks
        Inherited ids that this fork does not have.
    file_types
        ``general.file_type`` numbers that no type is called by and that differ from the parent's; ``None`` for those that it
        does not have.
    only
        Inherited ids that this program reads, where it is easier to say than :attr:`lacks`; ``None`` for all.
    """

    name: str
    parent: str | None = None
    lacks: frozenset[int] = frozenset()
    file_types: Mapping[int, str | None] = field(default_factory=dict)
    only: frozenset[int] | None = None

    def meaning(self, type_id: int) -> Codec | NamedType | None:
        """Return the type of ``type_id``, with a codec or without, or ``None`` when this dialect does not have the id."""
        own = types.by_id(self.name, type_id) or OWNED.get(self.name, {}).get(type_id)
        if own is not None or self.parent is None or type_id in self.lacks:
            return own
        if self.only is not None and type_id not in self.only:
            return None
        return DIALECTS[self.parent].meaning(type_id)

    def codec(self, type_id: int) -> Codec | None:
        """Return the codec of ``type_id``, or ``None`` when this dialect does not know it."""
        meaning = self.meaning(type_id)
        return meaning if isinstance(meaning, Codec) else None

    def type_id(self, codec: Codec) -> int | None:
        """Return the id of ``codec`` here, or ``None`` when this dialect cannot hold it."""
        dialect: Dialect | None = self
        while dialect is not None:
            type_id = codec.ids.get(dialect.name)
            if type_id is not None:
                # A parent's id may mean something else here, or nothing.
                return type_id if self.codec(type_id) is codec else None
            dialect = None if dialect.parent is None else DIALECTS[dialect.parent]
        return None

    def fallback(self, codec: Codec) -> Codec | None:
        """Return the type for rows that no block of ``codec`` divides, or ``None`` where the dialect's programs have none."""
        name = codec.fallbacks.get(self.name)
        if name is not None:
            return types.get(name)
        return None if self.parent is None else DIALECTS[self.parent].fallback(codec)

    def file_type_name(self, number: int) -> str | None:
        """Return the spelling of a ``general.file_type`` number, such as ``"MXFP4_MOE"``."""
        if number in self.file_types:
            return self.file_types[number]
        codec = next((codec for codec in types.all_codecs() if codec.file_types.get(self.name) == number), None)
        if codec is not None:
            return codec.name
        return None if self.parent is None else DIALECTS[self.parent].file_type_name(number)

    def file_type_number(self, name: str) -> int | None:
        """Return the ``general.file_type`` number spelled ``name``, or ``None``."""
        number = next((number for number, spelling in self.file_types.items() if spelling == name), None)
        if number is None:
            number = next((c.file_types.get(self.name) for c in types.all_codecs() if c.name == name), None)
        if number is not None or self.parent is None:
            return number
        inherited = DIALECTS[self.parent].file_type_number(name)
        # A parent's number may mean something else here.
        held = None if inherited is None else self.file_type_name(inherited)
        return inherited if held == name or (name, held) in _SAME_FILE_TYPE else None


# llama.h's llama_ftype, but for those that a type is called by (Codec.file_types); file names carry the names.
_UPSTREAM_FILE_TYPES = {
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 21: "Q2_K_S", 22:
    "IQ3_XS", 27: "IQ3_M", 29: "IQ2_M", 38: "MXFP4_MOE",
}  # fmt: skip

_SAME_FILE_TYPE = {("MXFP4_MOE", "MXFP4")}
"""Upstream's and ik_llama.cpp's names of one number."""

# The same of ik_llama.cpp's llama.h.
_IK_FILE_TYPES = {
    33: "Q4_0_4_4", 34: "Q4_0_4_8", 35: "Q4_0_8_8", 36: None, 37: None, 39: None, 40: None, 41: "Q1_0_G128", 136:
    "IQ1_BN", 137: "IQ2_BN", 146: "IQ3_KL", 149: "Q8_KV", 156: "IQ1_KT", 202: "Q4_0_R8", 207: "Q8_0_R8", 208: "Q5_0_R4",
    210: "Q2_K_R4", 211: "Q3_K_R4", 214: "Q4_K_R4", 216: "Q5_K_R4", 218: "Q6_K_R4", 219: "IQ2_XXS_R4", 220: "IQ2_XS_R4",
    223: "IQ3_XXS_R4", 224: "IQ1_S_R4", 225: "IQ4_NL_R4", 226: "IQ3_S_R4", 229: "IQ2_M_R4", 230: "IQ4_XS_R8", 231:
    "IQ1_M_R4", 232: "BF16_R16", 335: "Q6_0_R4", 337: "IQ2_BN_R4", 338: "IQ2_K_R4", 339: "IQ3_K_R4", 340: "IQ4_K_R4", 341:
    "IQ5_K_R4", 345: "IQ4_KS_R4", 350: "IQ5_KS_R4", 351: "MXFP4_R8", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip

_dialects = {
    dialect.name: dialect
    for dialect in (
        Dialect("llama.cpp", file_types=_UPSTREAM_FILE_TYPES),
        Dialect("ik_llama.cpp", parent="llama.cpp", lacks=frozenset({34, 35, 40, 42}), file_types=_IK_FILE_TYPES),
        Dialect("nisparks", parent="llama.cpp", file_types={41: "F8_E4M3_MXFP4"}),
    )
}
DIALECTS: Mapping[str, Dialect] = MappingProxyType(_dialects)
"""Those that files are read as; :func:`register` adds to them."""


DS4 = Dialect("ds4", parent="llama.cpp", only=frozenset({0, 1, 2, 8, 10, 12, 13, 14, 16, 26, 39}))
"""antirez/ds4: upstream's numbers and file types, of which its loader takes a few; BF16 (30) is not among them.

It gives no id a meaning of its own, so it is a target to write for, not a candidate when a file is read.
"""

TARGETS: Mapping[str, Dialect] = ChainMap(_dialects, {DS4.name: DS4})
"""What a GGUF can be moved to."""

OPAQUE = "opaque"
"""In place of a dialect's name: resolve no id at all."""


def get(name: str) -> Dialect:
    """Return the dialect called ``name``; raises UnknownDialect."""
    types.all_codecs()  # a plug-in may bring a dialect
    if name not in DIALECTS:
        raise UnknownDialect(f"{name!r} is not a known dialect; known: {', '.join(DIALECTS)}")
    return DIALECTS[name]


def register(dialect: Dialect) -> Dialect:
    """Add a dialect, of a fork that ggufx does not know, to those that files are read as; returns it.

    A type of it names the dialect in :attr:`ggufx.types.Codec.ids`. The module that a type's entry point is in may register the
    dialect when it is imported.

    Parameters
    ----------
    dialect
        Its parent, if it has one, must be known.

    Raises
    ------
    ValueError
        The name is taken, or is none; or the parent is not known.

    Examples
    --------
    >>> import ggufx
    >>> ggufx.dialects.register(ggufx.dialects.Dialect("my-fork", parent="llama.cpp")).name
    'my-fork'
    """
    if not dialect.name or dialect.name in (*TARGETS, OPAQUE):
        raise ValueError(f"{dialect.name!r} cannot be the name of a dialect: it is taken, or empty")
    if dialect.parent is not None and dialect.parent not in _dialects:
        raise ValueError(f"{dialect.name}: its parent {dialect.parent!r} is not a known dialect")
    _dialects[dialect.name] = dialect
    return dialect


Kind = Codec | NamedType
End = Literal["exact", "longer", "shorter"]
"""What the last tensor's span may be: the tensor's bytes and at most their padding; more, as other bytes may follow; less, as
the file may be incomplete."""


def _has_whole_rows(kind: Kind, entry: Entry) -> bool:
    """Return whether the entry's rows are whole blocks of ``kind``."""
    return (entry.shape[-1] if entry.shape else 1) % kind.layout.block_len == 0


def fits(kind: Kind, entry: Entry, end: End = "exact") -> bool:
    """Return whether a tensor of a type tiles the entry's span exactly, final padding aside.

    Parameters
    ----------
    end
        Of which kind the span of a file's last tensor may be; each kind includes those before it.
    """
    if not _has_whole_rows(kind, entry):
        return False
    nbytes = kind.layout.nbytes(entry.shape)
    padded = align_up(nbytes, entry.alignment)
    if not entry.last:
        return entry.span == padded
    # Writers may or may not pad the last tensor.
    return (end == "shorter" or nbytes <= entry.span) and (end != "exact" or entry.span <= padded)


@dataclass(frozen=True)
class Resolution:
    """What :func:`resolve` found.

    Attributes
    ----------
    dialect
        The dialect, or ``None`` when no single one knows every id of the file (each id is then resolved on its own).
    codecs
        Type id -> codec; ids that no dialect knows are absent.
    equivalent
        Names of all dialects that explain the file equally well.
    named
        Type id -> type without a codec.
    notes
        A sentence for every id whose tensors no dialect's layout fits.
    """

    dialect: Dialect | None
    codecs: Mapping[int, Codec]
    equivalent: tuple[str, ...]
    named: Mapping[int, NamedType] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def resolve(
    path: object,
    entries: Sequence[Entry],
    *,
    dialect: str | None = None,
    stamped: str | None = None,
    incomplete: bool = False,
) -> Resolution:
    """Find the dialect of a file from its ids and spans.

    Parameters
    ----------
    path
        For error messages.
    entries
        The tensor directory, all splits.
    dialect
        Explicit choice; nothing is guessed then. :data:`OPAQUE` resolves nothing: every tensor is a span of bytes, so that a
        file of an unknown fork can be listed and copied.
    stamped
        Value of the file's ``ggufx.dialect`` key; one that is not registered here (a newer ggufx wrote it) counts as none.
    incomplete
        The file may end before its last tensor does.

    Raises
    ------
    UnknownDialect
        The chosen dialect is not registered or does not fit, or a known id fits none of its meanings.
    AmbiguousDialect
        Several dialects fit and disagree on an id of the file.
    """
    if dialect == OPAQUE:
        return Resolution(None, {}, ())
    types.all_codecs()  # a plug-in may bring a dialect
    by_id: dict[int, list[Entry]] = {}
    for entry in entries:
        by_id.setdefault(entry.type_id, []).append(entry)
    chosen = dialect or (stamped if stamped in DIALECTS else None)
    candidates = [get(chosen)] if chosen else list(DIALECTS.values())
    meanings = {i: _meanings(candidates, i) for i in by_id}
    valid: dict[int, dict[str, Kind]] = {}
    named: dict[int, NamedType] = {}
    notes = []
    for type_id, its in by_id.items():
        held = meanings[type_id]
        valid[type_id] = _fitting(held, its, incomplete=incomplete)
        if valid[type_id]:
            continue
        foreign = next((t for t in FOREIGN if t.type_id == type_id and all(fits(t, e) for e in its)), None)
        if held and (chosen or not (foreign or _may_differ(held, its))):
            raise UnknownDialect(_misfit(path, type_id, held, its))
        if foreign is not None:
            named[type_id] = foreign
        if held:
            notes.append(_hidden(type_id, held, its, foreign))
    known = [type_id for type_id in by_id if valid[type_id]]
    survivors = [d for d in candidates if all(d.name in valid[i] for i in known)]
    if survivors:
        for type_id in known:
            _agreed(path, type_id, {d.name: valid[type_id][d.name] for d in survivors}, by_id[type_id])
        found = {i: valid[i][survivors[0].name] for i in known}
    else:
        # A file that mixes forks' types: each id stands for itself where its meanings agree.
        found = {i: _agreed(path, i, valid[i], by_id[i]) for i in known}
    named |= {i: kind for i, kind in found.items() if isinstance(kind, NamedType)}
    codecs = {i: kind for i, kind in found.items() if isinstance(kind, Codec)}
    dialect_found = survivors[0] if survivors else None
    return Resolution(dialect_found, codecs, tuple(d.name for d in survivors), named, tuple(notes))


def _meanings(candidates: Iterable[Dialect], type_id: int) -> dict[str, Kind]:
    found = {d.name: d.meaning(type_id) for d in candidates}
    return {name: kind for name, kind in found.items() if kind is not None}


def _fitting(held: Mapping[str, Kind], entries: Sequence[Entry], *, incomplete: bool) -> dict[str, Kind]:
    """Return the meanings whose sizes are the entries' spans, of the last tensor as nearly as any meaning has it."""
    ends: tuple[End, ...] = ("exact", "longer", "shorter") if incomplete else ("exact", "longer")
    type_id = entries[0].type_id
    for end in ends:
        found = {name: kind for name, kind in held.items() if all(fits(kind, entry, end) for entry in entries)}
        if found:
            return found
        # Other bytes may follow the last tensor, but rather it is what a fork means whose sizes are the spans.
        others = [*_meanings(DIALECTS.values(), type_id).values(), *(t for t in FOREIGN if t.type_id == type_id)]
        if any(all(fits(kind, entry) for entry in entries) for kind in others):
            break
    return {}


def _may_differ(held: Mapping[str, Kind], entries: Sequence[Entry]) -> bool:
    """Return whether tensors that fit no meaning of their id may be a type of another fork, and not the end of a download."""
    if all(isinstance(kind, NamedType) for kind in held.values()):
        return True
    if entries[0].type_id <= LAST_COMMON_ID:
        return False
    # A file that was cut off ends within a tensor.
    misfits = [e for e in entries if not any(fits(kind, e) for kind in held.values())]
    return not misfits or any(not entry.last for entry in misfits)


def _agreed(path: object, type_id: int, named: Mapping[str, Kind], entries: Sequence[Entry]) -> Kind:
    distinct = dict.fromkeys(named.values())
    if len(distinct) == 1 or not any(prod(entry.shape) for entry in entries):
        return next(iter(distinct))  # tensors without elements are the same in every type
    claims = ", ".join(f"{codec.name} in {name}" for name, codec in named.items())
    raise AmbiguousDialect(
        f"{path}: id {type_id} of tensor {quoted(entries[0].name)} and {len(entries) - 1} more fits several types: {claims}; "
        "say which with --dialect or open(..., dialect=...)"
    )


def _misfit(path: object, type_id: int, held: Mapping[str, Kind], entries: Sequence[Entry]) -> str:
    entry, sizes = _sizes(held, entries)
    shown = f"{path}: tensor {quoted(entry.name)} {list(entry.shape)} of type id {type_id} has {entry.span} bytes"
    listed = f"--dialect {OPAQUE} lists it all the same"
    needs = [kind.layout.nbytes(entry.shape) for kind in held.values() if _has_whole_rows(kind, entry)]
    if needs and not entry.last and entry.span > max(needs):
        return (
            f"{shown} before the next tensor starts but takes {sizes}: there is a gap between the tensors, which llama.cpp "
            f"refuses, too; or a fork wrote the file that gives this id another meaning ({listed})"
        )
    where = "the file ends there" if entry.last else "the next tensor starts there"
    return (
        f"{shown} ({where}) but takes {sizes}: the model is corrupted or incomplete, or written by a fork that gives this id "
        f"another meaning ({listed})"
    )


def _hidden(type_id: int, named: Mapping[str, Kind], entries: Sequence[Entry], foreign: NamedType | None) -> str:
    entry, sizes = _sizes(named, entries)
    more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
    what = (
        "another fork gives this id another meaning, or they are damaged"
        if foreign is None
        else f"they fit {foreign.name} of {foreign.program} ({foreign.layout.nbytes(entry.shape)} bytes; {foreign.what})"
    )
    return (
        f"type id {type_id} of tensor {quoted(entry.name)} {list(entry.shape)}{more}: has {entry.span} bytes but takes "
        f"{sizes}; {what}. These tensors are listed and copied, not decoded"
    )


def _sizes(held: Mapping[str, Kind], entries: Sequence[Entry]) -> tuple[Entry, str]:
    """Return the entry that tells most, and the bytes that it takes as each of its id's types."""
    kinds = dict.fromkeys(held.values())
    odd = [e for e in entries if not any(fits(kind, e) for kind in kinds)] or list(entries)
    entry = next((e for e in odd if not any(fits(kind, e, "longer") for kind in kinds)), odd[0])
    sizes = []
    for kind in kinds:
        try:
            kind.layout.row_nbytes(entry.shape[-1] if entry.shape else 1)
            sizes.append(f"{kind.layout.nbytes(entry.shape)} bytes as {kind.name}")
        except CodecError as error:
            sizes.append(f"impossible as {kind.name} ({error})")
    return entry, " or ".join(sizes)
