"""Where an output goes: a name as it is given, one with a file type in it, or a directory in which it gets a name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ggufx import model_card
from ggufx.errors import OptionError
from ggufx.values import Value, ValueType

__all__ = ["directory", "fill_file_type", "is_directory", "output_path"]


def is_directory(outfile: str | Path) -> bool:
    """Return whether a directory is meant: one that exists, or a name with a slash at its end."""
    return str(outfile).endswith("/") or Path(outfile).is_dir()


def fill_file_type(outfile: str | Path, file_type: str, *, parameter: str = "outfile") -> Path:
    """Return a path with ``{ftype}`` of its last part replaced.

    Raises
    ------
    OptionError
        The path has another placeholder, or is ``-``: outputs are written in any order, which no pipe allows.
    """
    import gguf

    path = Path(outfile)
    if str(outfile) == "-":
        raise OptionError(
            f"{{{parameter}}} -: an output is written at many places at a time, so it cannot go through a pipe; name a file"
        )
    try:
        return path.with_name(gguf.fill_templated_filename(path.name, file_type))
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise OptionError(
            f"{{{parameter}}} {{0}}: {{1}} is no placeholder; {{2}} is", outfile, repr(error), "{ftype}"
        ) from None


def output_path(
    outfile: str | Path,
    metadata: Mapping[str, Value],
    file_type: str,
    *,
    named: str,
    prefix: str = "",
    with_size: bool = True,
    parameter: str = "outfile",
) -> Path:
    """Return where a file goes: ``outfile``, or, of a directory, a name in it by the GGUF convention.

    Parameters
    ----------
    outfile
        A file, with ``{ftype}`` filled in; or a directory, which exists or is spelled with a slash at its end.
    metadata
        The name's words come from its ``general.*``.
    file_type
        What stands for ``{ftype}``, and at the end of a name.
    named
        Name of the model where the metadata has none.
    prefix, with_size
        Begins the name; whether it tells the model's size.
    parameter
        What a function calls ``outfile``.
    """
    if not is_directory(outfile):
        return fill_file_type(outfile, file_type, parameter=parameter)
    keys = ("basename", "size_label", "finetune", "version", "name")
    found = {key: metadata.get(f"general.{key}") for key in keys}
    label = {key: value.data for key, value in found.items() if value is not None and value.type is ValueType.STRING}
    if not with_size:
        label.pop("size_label", None)
    words = [label.get(key) for key in keys[1:4]]
    name = model_card.file_name(label.get("basename") or label.get("name") or named, *words, file_type.upper())
    return Path(outfile) / f"{prefix}{name}.gguf"


def directory(outfile: str | Path, *, parameter: str = "outfile") -> Path:
    """Return the directory that an output is; raises OptionError for ``-`` and for placeholders, which it has no use for."""
    if str(outfile) == "-" or "{ftype}" in str(outfile):
        what = "an output is a directory, so it cannot go through a pipe" if str(outfile) == "-" else "is no file"
        raise OptionError(f"{{{parameter}}} {{0}}: {what}; name a directory, without placeholders", outfile)
    return Path(outfile)
