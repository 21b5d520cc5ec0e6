"""An output file that has no name of its own yet, and whose header is written last.

A GGUF begins with its directory, which may be known only when the last tensor is there. So data is written behind some room,
and the header goes there at the end. Where the header is shorter, up to :data:`MOVED_NBYTES` of data are moved to its end;
before more data the key :data:`PADDING_KEY` fills the room. Where it is longer, data is moved.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ggufx import outputs
from ggufx.errors import PlanError
from ggufx.plan import PlannedFile
from ggufx.values import Value

__all__ = ["MOVED_NBYTES", "PADDING_KEY", "ROOM_NBYTES", "Member"]

ROOM_NBYTES: Final = 1 << 20
"""Room for a directory that is not known yet: that of some ten thousand tensors, and keys that are set late."""
MOVED_NBYTES: Final = 64 << 20
"""Data that is rather moved than padded."""
PADDING_KEY: Final = "ggufx.padding"
"""A text of spaces. Not an array, of which readers in Python take a second for a hundred thousand elements."""
_PADDING_OVERHEAD: Final = 8 + len(PADDING_KEY) + 4 + 8
"""Bytes of the key with an empty text: length, name, type, length."""
_FLUSH_NBYTES: Final = 32 << 20
"""Bytes after which the disk is told to begin."""
_PIECE_NBYTES: Final = 8 << 20
"""Bytes that are moved at a time."""


class Member:
    """A file that grows under a name that nobody can guess: the output, or a member of a split.

    Parameters
    ----------
    path
        Where it will be; it grows in the same folder.
    room
        Bytes before the data.

    Attributes
    ----------
    descriptor : int
    partial : Path
        Its name until it is complete.
    room : int
    end : int
        Bytes of data, each tensor padded to the alignment.
    count : int
        Tensors.
    """

    def __init__(self, path: Path, room: int) -> None:
        self.descriptor, self.partial = outputs.create_private(path)
        self.room = room
        self.end = self.count = 0
        self._unflushed = (0, 0)

    def write(self, position: int, piece: npt.NDArray[np.uint8]) -> None:
        """Write a piece, uint8 [n], at a byte of the file."""
        outputs.write_at(self.descriptor, position, piece)
        start, stop = self._unflushed
        if position != stop:
            start = position
        stop = position + piece.size
        if stop - start >= _FLUSH_NBYTES:
            outputs.start_writeback(self.descriptor, start, stop - start)
            start = stop
        self._unflushed = start, stop

    def forget_rest(self) -> None:
        """Remove what was written behind the last complete tensor."""
        os.ftruncate(self.descriptor, self.room + self.end)

    def finish(self, file: PlannedFile) -> None:
        """Write the header, bring all to the disk, and read the header back.

        Raises
        ------
        PlanError
            The header does not read back as planned.
        """
        fitted = self._fitted(file)
        outputs.write_at(self.descriptor, 0, fitted.header)
        os.ftruncate(self.descriptor, fitted.nbytes)
        os.fsync(self.descriptor)
        if not fitted.reads_back(self.partial):
            raise PlanError(f"{file.path}: the written header does not read back as planned; this is a bug in ggufx")

    def _fitted(self, file: PlannedFile) -> PlannedFile:
        """Make header and data adjoin."""
        header_nbytes = len(file.header)
        if header_nbytes == self.room:
            return file
        count = self.room - header_nbytes - _PADDING_OVERHEAD
        if file.data_nbytes > MOVED_NBYTES and count >= 0:
            # Both are multiples of the alignment, and so is what the key adds.
            return replace(file, metadata={**file.metadata, PADDING_KEY: Value.string(" " * count)})
        # The padding behind the last tensor was not written: it is moved as zeros.
        os.ftruncate(self.descriptor, self.room + file.data_nbytes)
        self._move(header_nbytes, file.data_nbytes)
        return file

    def _move(self, target: int, nbytes: int) -> None:
        """Move the data to a place that may overlap its own."""
        starts = range(0, nbytes, _PIECE_NBYTES)
        # Nothing may be overwritten before it is read: from the front when moving there, else from the back.
        for start in starts if target < self.room else reversed(starts):
            piece = os.pread(self.descriptor, min(_PIECE_NBYTES, nbytes - start), self.room + start)
            outputs.write_at(self.descriptor, target + start, piece)

    def close(self) -> None:
        """Close the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def discard(self) -> None:
        """Close the file and remove it."""
        self.close()
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)
