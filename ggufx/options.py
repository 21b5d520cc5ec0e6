"""Options that have no effect: where, and what a user is told who gives one there.

A user who asks for something and gets a file without it finds out when the file is in use. So an option that a command has no
use for is an error; it is a note where the result is the one asked for all the same. All cases that hang on which options
are given, and on what kind of source, stand in one table, which the functions and the command line ask. Those that
hang on what is in a file (a ``dense`` type that no tensor takes) are told where they are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from ggufx.errors import OptionError

__all__ = ["USELESS", "Useless", "given", "refuse"]


class Useless(NamedTuple):
    """A case in which options of some commands have no effect.

    Attributes
    ----------
    commands
        As on the command line: ``recipe fit``. Functions have the same names; what hangs on the TYPE of quantize is looked at
        by ``prepare``, which is told what it is.
    options
        Names of the functions' parameters; of options that only the command line has, their names there.
    text
        What is said; ``{option}`` is the one that was given, other parameters stand in braces, too.
    source
        Only for a source of this kind.
    beside, without
        Only where one of these is given; only where none of these is.
    note
        Nothing is lost: it is said, and the work goes on.
    """

    commands: tuple[str, ...]
    options: tuple[str, ...]
    text: str
    source: str = ""
    beside: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    note: bool = False


_SIZES: Final = ("target_size", "target_bpw")

USELESS: Final = (
    Useless(
        ("convert", "retarget", "export", "merge", "split", "merge-splits", "quantize", "recipe fit"), ("as_json",),
        "{option} goes with {dry_run}", without=("dry_run",),
    ),
    Useless(
        ("quantize",), ("skip",),
        "{option} leaves tensors of a checkpoint out, and the source is a GGUF; {only} says which of its tensors are written",
        "gguf",
    ),
    Useless(
        ("quantize",), ("model_name", "chat_template"),
        "{option} is for a checkpoint, and the source is a GGUF, whose keys are kept; {overrides} sets others", "gguf",
    ),
    Useless(("quantize",), ("mtp", "allow_nan"), "{option} is for a checkpoint, and the source is a GGUF", "gguf"),
    Useless(
        ("quantize", "recipe show"), ("dialect",),
        "{option} says whose type ids a GGUF has, and the source is a checkpoint; {target} is the dialect to write",
        "checkpoint",
    ),
    Useless(
        ("quantize", "recipe show"), ("dialect",),
        "{option} comes too late for a file that is open already; give it to ggufx.open", "open",
    ),
    Useless(
        ("quantize",), ("keep_split",),
        "{option} splits as a GGUF is split, and the source is a checkpoint; {split_max_nbytes} splits", "checkpoint",
    ),
    Useless(
        ("quantize",), ("default",),
        "{option} and a size exclude each other; {type_names} names the types to choose from, {outfile} the output",
        beside=_SIZES,
    ),
    Useless(
        ("quantize",), ("mix", "pure"),
        "{option} and a size exclude each other; `ggufx recipe show MIX --for MODEL` gives a mix's rules", beside=_SIZES,
    ),
    Useless(
        ("quantize",), ("type_names", "per", "sample_len"), "{type_names}, {per} and {sample_len} go with {target_size} or "
        "{target_bpw}", without=_SIZES,
    ),
    Useless(("prepare",), ("mix",), "{option} says that {default} is a mix, and there is none", without=("default",)),
    Useless(
        ("prepare",), ("pure",), "{option} gives {default} to the embeddings and the head, too, and there is none",
        without=("default",),
    ),
    Useless(
        ("quantize", "prepare"), ("output_type",), "{option} and {leave_output} exclude each other",
        beside=("leave_output",),
    ),
    Useless(
        ("quantize", "prepare"), ("keep_split",), "{option} and {only} exclude each other: a member without a tensor is none",
        beside=("only",),
    ),
    Useless(("quantize",), ("split_max_nbytes",), "{option} and {keep_split} exclude each other", beside=("keep_split",)),
    Useless(
        ("quantize",), ("report", "measure"), "{option} says what was done, which a dry run does not", beside=("dry_run",),
        note=True,
    ),
    Useless(("recipe show",), ("imatrix", "dialect"), "{option} goes with {model}", without=("model",)),
    Useless(
        ("verify",), ("experts", "skip"),
        "{option} is for a file that is compared with a checkpoint, and {against} is a GGUF", "gguf",
    ),
    Useless(
        ("verify",), ("allow_keys", "ignore_metadata"), "{option} is for a GGUF's keys, and a hybrid has none", "hybrid"
    ),
    Useless(("verify",), ("allow_keys",), "{option} and {ignore_metadata} exclude each other", beside=("ignore_metadata",)),
    Useless(
        ("merge",), ("target", "dense", "model_name", "chat_template", "split_max_nbytes"),
        "{option} goes with {form} gguf; safetensors keep what they are", "safetensors",
    ),
    Useless(
        ("split",), ("split_max_tensors",), "{split_max_nbytes} and {option}: one of them at a time",
        beside=("split_max_nbytes",),
    ),
    Useless(("types",), ("as_json",), "{option} and {markdown}: one of them at a time", beside=("markdown",)),
    Useless(("measure",), ("as_csv",), "{option} and {as_json}: one of them at a time", beside=("as_json",)),
)  # fmt: skip


def given(options: Mapping[str, Any]) -> list[str]:
    """Return the names of the options that are not ``None``, ``False`` or an empty list or tuple."""
    return [name for name, value in options.items() if not (value is None or value is False or value in ((), []))]


def refuse(command: str, options: Iterable[str], source: str = "") -> list[OptionError]:
    """Raise OptionError for an option that has no effect beside the others; return what is only worth a note.

    Parameters
    ----------
    command
        As in :class:`Useless`.
    options
        Names of those that are given.
    source
        Kind of source. Without one the cases that do not hang on it are looked at, else only those that hang on it.
    """
    there = set(options)
    notes = []
    for case in USELESS:
        if command not in case.commands or case.source != source:
            continue
        if (case.beside and not there & set(case.beside)) or there & set(case.without):
            continue
        for option in (option for option in case.options if option in there):
            found = OptionError(case.text.replace("{option}", f"{{{option}}}"))
            if not case.note:
                raise found
            notes.append(found)
    return notes
