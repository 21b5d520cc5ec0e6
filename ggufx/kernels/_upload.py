"""From files to a device, a thread's share of it: reads into page-locked slots, each copied from while the next is filled.

All in one loop without the GIL, for threads of Python would take turns for it between pieces. The C functions of the system
and of the driver are called by their addresses, which are arguments: the code on disk holds in any process, and tests may
give functions of their own.
"""

from __future__ import annotations

import errno
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ggufx.kernels._jit import kernel, smaller, subroutine

__all__ = ["STOP", "upload"]

STOP = 1 << 40
"""Beyond the number of any piece: as the next piece's number, it tells all threads to end."""

_EINTR = errno.EINTR
_READ, _ERRNO, _MOVE, _ENTER, _COPY, _RECORD, _WAIT = range(7)  # of ``calls``
_FIRST, _FILE, _OFFSET, _TARGET, _DEVICE, _UNITS, _STRIDE, _STEP, _THROUGH, _START, _NBYTES, _START2, _NBYTES2 = range(
    13
)
_DONE, _CALL, _CODE, _PIECE, _AT, _WANTED, _GOT = range(7)  # of ``report``


def _foreign(result: Any, *parameters: Any) -> Any:
    """Return what an intrinsic returns that calls the C function at an address with arguments of these types."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(context.get_value_type(result), [context.get_value_type(p) for p in parameters])
        return builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])

    return result(types.int64, *parameters), codegen


@intrinsic
def _pread(typing_context: Any, address: Any, descriptor: Any, buffer: Any, nbytes: Any, offset: Any) -> Any:
    return _foreign(types.int64, types.int32, types.int64, types.int64, types.int64)


@intrinsic
def _memmove(typing_context: Any, address: Any, target: Any, source: Any, nbytes: Any) -> Any:
    return _foreign(types.int64, types.int64, types.int64, types.int64)


@intrinsic
def _copy(typing_context: Any, address: Any, target: Any, source: Any, nbytes: Any, stream: Any) -> Any:
    return _foreign(types.int32, types.int64, types.int64, types.int64, types.int64)


@intrinsic
def _call1(typing_context: Any, address: Any, handle: Any) -> Any:
    """Call a driver's function of one handle."""
    return _foreign(types.int32, types.int64)


@intrinsic
def _call2(typing_context: Any, address: Any, handle: Any, other: Any) -> Any:
    """Call a driver's function of two handles."""
    return _foreign(types.int32, types.int64, types.int64)


@intrinsic
def _errno(typing_context: Any, address: Any) -> Any:
    """Read this thread's errno, where the function at ``address`` says that it is."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32).as_pointer(), [])
        return builder.load(builder.call(builder.inttoptr(args[0], function.as_pointer()), []))

    return types.int32(types.int64), codegen


@intrinsic
def _add(typing_context: Any, counters: Any, index: Any, count: Any) -> Any:
    """Add to an int64 of a 1-D array that other threads read or add to, at once; returns what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), args[2], "monotonic")

    return types.int64(counters, types.intp, types.int64), codegen


@subroutine
def _fine(report, call, code):
    """Return whether ``code`` is 0; else note whose it is, if nothing failed before."""
    if code != 0 and report[_CALL] < 0:
        report[_CALL] = call
        report[_CODE] = code
    return code == 0


@subroutine
def _read(calls, descriptor, offset, nbytes, slot, report):
    """Read all of ``nbytes`` to address ``slot``; the code of an end that comes early is -1."""
    got = 0
    while got < nbytes:
        count = _pread(calls[_READ], descriptor, slot + got, nbytes - got, offset + got)
        if count > 0:
            got += count
            continue
        code = -1
        if count < 0:
            code = _errno(calls[_ERRNO])
            if code == _EINTR:
                continue
        report[_AT] = offset
        report[_WANTED] = nbytes
        report[_GOT] = got
        return _fine(report, _READ, code)
    return True


@subroutine
def _fill(calls, runs, run, first, count, slot, report):
    """Bring the wanted bytes of ``count`` units to address ``slot``, side by side."""
    descriptor, stride = runs[run, _FILE], runs[run, _STRIDE]
    offset = runs[run, _OFFSET] + first * stride
    start, nbytes = runs[run, _START], runs[run, _NBYTES]
    start2, nbytes2 = runs[run, _START2], runs[run, _NBYTES2]
    unit_nbytes = nbytes + nbytes2
    if runs[run, _THROUGH] != 0:
        # From the first wanted byte to the last one; the rest of the last unit may lie beyond the file.
        end = start2 + nbytes2 if nbytes2 > 0 else start + nbytes
        if not _read(calls, descriptor, offset + start, (count - 1) * stride + end - start, slot, report):
            return False
        if unit_nbytes != stride:
            # Downwards and in order, so that nothing is written over that is still to be moved.
            for unit in range(count):
                target, source = slot + unit * unit_nbytes, slot + unit * stride
                _memmove(calls[_MOVE], target, source, nbytes)
                if nbytes2 > 0:
                    _memmove(calls[_MOVE], target + nbytes, source + start2 - start, nbytes2)
        return True
    for unit in range(count):
        target, source = slot + unit * unit_nbytes, offset + unit * stride
        if not _read(calls, descriptor, source + start, nbytes, target, report):
            return False
        if nbytes2 > 0 and not _read(calls, descriptor, source + start2, nbytes2, target + nbytes, report):
            return False
    return True


@subroutine
def _free(calls, events, busy, turn, report):
    """Wait until the device has read slot ``turn``."""
    device = busy[turn]
    if device < 0:
        return True
    busy[turn] = -1
    return _fine(report, _WAIT, _call1(calls[_WAIT], events[device, turn]))


@kernel
def upload(calls, runs, shared, slots, contexts, streams, events, busy, report):
    """Bring pieces to devices until none is left, one fails here, or another thread says :data:`STOP`; leaves none on its way.

    All arrays are int64, C-contiguous; those of this thread alone are marked.

    calls
        Addresses of pread, __errno_location, memmove, cuCtxSetCurrent, cuMemcpyHtoDAsync, cuEventRecord, cuEventSynchronize.
    runs
        [runs + 1, 13], ascending by the first column: number of the first piece, file descriptor, offset in the file, address
        on the device, number of the device, units, bytes from one unit to the next, units in a piece, whether to read through
        what lies between the wanted parts, and these: offset in the unit and bytes, twice, the second perhaps of no bytes. The
        last row has the number of pieces in its first column. Plain bytes are units of one byte.
    shared
        [1]: the next piece's number.
    slots
        This thread's: addresses of page-locked memory, each for any piece, gaps included where they are read through.
    contexts
        [devices].
    streams, events
        This thread's: [devices], [devices, slots].
    busy
        This thread's: [slots], -1 in each.
    report
        This thread's: [7 or more]; bytes that are on their way or there, the number in ``calls`` of what failed (at first -1),
        its code (of pread errno, or -1 where the file ends), the number of the last piece, and of a read that failed its
        offset, the bytes wanted and those got.
    """
    run, turn, entered = 0, 0, -1
    while True:
        piece = _add(shared, 0, 1)
        if piece >= runs[runs.shape[0] - 1, _FIRST]:
            break
        while runs[run + 1, _FIRST] <= piece:
            run += 1
        report[_PIECE] = piece
        device, slot = runs[run, _DEVICE], slots[turn]
        first = (piece - runs[run, _FIRST]) * runs[run, _STEP]
        count = smaller(runs[run, _UNITS] - first, runs[run, _STEP])
        unit_nbytes = runs[run, _NBYTES] + runs[run, _NBYTES2]
        target = runs[run, _TARGET] + first * unit_nbytes
        if not _free(calls, events, busy, turn, report):
            break
        if not _fill(calls, runs, run, first, count, slot, report):
            break
        if entered != device:
            if not _fine(report, _ENTER, _call1(calls[_ENTER], contexts[device])):
                break
            entered = device
        if not _fine(report, _COPY, _copy(calls[_COPY], target, slot, count * unit_nbytes, streams[device])):
            break
        if not _fine(report, _RECORD, _call2(calls[_RECORD], events[device, turn], streams[device])):
            break
        busy[turn] = device
        _add(report, _DONE, count * unit_nbytes)
        turn += 1
        if turn == slots.size:
            turn = 0
    if report[_CALL] >= 0:
        _add(shared, 0, STOP)
    for turn in range(slots.size):
        _free(calls, events, busy, turn, report)
