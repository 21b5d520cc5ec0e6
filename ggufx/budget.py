"""Choose a type for every tensor so that a model becomes as small as asked for, and its error the least at that size.

:class:`Budget` finds what can be chosen, measures every candidate type on a sample of every tensor's rows, and makes a recipe
of the choice. No type is built in: candidates are what the registry can encode and the target holds.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod, sqrt
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from ggufx import execute, kernels, quantize, types
from ggufx import imatrix as imatrix_module
from ggufx import recipe as recipe_module
from ggufx.checkpoint import Checkpoint
from ggufx.container import Value, align_up
from ggufx.dialects import Dialect
from ggufx.errors import CodecError, GGUFError, PlanError, RecipeError
from ggufx.factors import factor_of, is_applied
from ggufx.file import File, open
from ggufx.imatrix import ImportanceMatrix
from ggufx.plan import Matrix, Plan
from ggufx.quantize import Choice, Quantization, Source
from ggufx.recipe import NATIVE, Recipe, Rule
from ggufx.transforms import ColumnEnergy, decode_source
from ggufx.types import Codec

__all__ = ["SAMPLE_LEN", "Budget", "Estimate", "Fit", "Per", "choose"]

F32 = npt.NDArray[np.float32]
Per = Literal["family", "tensor"]
"""What gets a type of its own: a run of layers of the tensors that differ in their layer only, or every tensor."""

SAMPLE_LEN: Final = 1 << 18
"""Weights of a tensor that are measured, about."""
_SAMPLED_MATRICES: Final = 16
"""Stacked matrices (experts) that a sample is taken from."""
_LAYER_RUNS: Final = 8
"""Runs that a family's layers are cut into: enough to meet a size, few enough to read."""
_TRIAL_ROWS: Final = 4
"""Rows of 4096 weights by which a type's speed is told."""
_EXCHANGED: Final = 3000
"""Options up to which exchanges of two are tried; with more of them a size is met without."""

_MAKESHIFTS: Final = (quantize.ONES, quantize.ENERGY)
_INTEGER = re.compile(r"I\d+")
_STEERS = re.compile(r"blk\.\d+\.(indexer\.)?attn_(q|k|q_a|q_b|k_b)\.weight$")
_STEERING_WEIGHT: Final = 0.25
_LAYER = re.compile(r"^blk\.(\d+)\.(.+)$")


# The optimiser --------------------------------------------------------------------------------------------------


def choose(groups: Sequence[Sequence[tuple[int, float]]], limit: int) -> list[int]:
    """Choose one option of every group, so that their bytes add up to no more than ``limit`` and their costs to little.

    A Lagrange multiplier decides on the lower convex hulls of the groups: the steps of all hulls are taken in the order of the
    cost that they save a byte, which is optimal for every size at which a step ends. What is left of the limit is filled
    greedily, with options off the hulls, too, and then by exchanges (a group up, another down) while they save anything. So
    the result is the optimum, or dearer by less than one step of one group.

    Parameters
    ----------
    groups
        Of each, its options: (bytes, cost).
    limit
        Bytes.

    Returns
    -------
    list of int
        The number of each group's option. It depends on the arguments alone.

    Raises
    ------
    PlanError
        Even the smallest options take more.
    """
    useful = [_useful(options) for options in groups]
    state = [held[0] for held in useful]
    left = limit - sum(options[number][0] for options, number in zip(groups, state, strict=True))
    if left < 0:
        raise PlanError(f"the smallest options take {limit - left} bytes, more than {limit}")
    steps = []
    for group, (options, held) in enumerate(zip(groups, useful, strict=True)):
        for low, high in pairwise(_hull(options, held)):
            more = options[high][0] - options[low][0]
            steps.append(((options[high][1] - options[low][1]) / more, group, more, high))
    closed: set[int] = set()
    for _, group, more, high in sorted(steps):
        if group not in closed and more <= left:
            left -= more
            state[group] = high
        else:
            closed.add(group)
    moves = [(group, number) for group, held in enumerate(useful) for number in held]
    sizes = np.array([groups[group][number][0] for group, number in moves], np.int64)
    costs = np.array([groups[group][number][1] for group, number in moves])
    owners = np.array([group for group, _ in moves])
    while moves:
        now = np.array([groups[group][number] for group, number in enumerate(state)])
        more, gain = sizes - now[owners, 0].astype(np.int64), now[owners, 1] - costs
        fits = np.flatnonzero((gain > 0) & (more <= left))
        if fits.size:
            # What costs no bytes first, then what saves most a byte.
            taken = [int(fits[np.argmax(gain[fits] / np.maximum(more[fits], 1e-9))])]
        else:
            taken = _exchange(more, gain, owners, left) if len(moves) <= _EXCHANGED else []
        if not taken:
            break
        for move in taken:
            left -= int(more[move])
            state[moves[move][0]] = moves[move][1]
    return state


def _useful(options: Sequence[tuple[int, float]]) -> list[int]:
    """Return the options that no other one beats in bytes and cost, smallest first."""
    held: list[int] = []
    for number in sorted(range(len(options)), key=lambda n: (*options[n], n)):
        if not held or options[number][1] < options[held[-1]][1]:
            held.append(number)
    return held


def _hull(options: Sequence[tuple[int, float]], useful: Sequence[int]) -> list[int]:
    """Return those of the useful options that some multiplier chooses, smallest first."""
    hull: list[int] = []
    for number in useful:
        x, y = options[number]
        while len(hull) > 1:
            (x0, y0), (x1, y1) = options[hull[-2]], options[hull[-1]]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append(number)
    return hull


def _exchange(
    more: npt.NDArray[np.int64], gain: npt.NDArray[np.float64], owners: npt.NDArray[np.int64], left: int
) -> list[int]:
    """Return the moves of two groups that save most together and fit, or nothing."""
    ups, downs = np.flatnonzero(gain > 0), np.flatnonzero(more < 0)
    best, found = 1e-12 * float(np.abs(gain).max(initial=0.0)), []
    for up in ups:
        able = downs[(more[downs] + more[up] <= left) & (owners[downs] != owners[up])]
        if able.size:
            down = int(able[np.argmax(gain[able])])
            if gain[up] + gain[down] > best:
                best, found = float(gain[up] + gain[down]), [int(up), down]
    return found


# What can be chosen ---------------------------------------------------------------------------------------------


@dataclass
class _Free:
    """A tensor whose type is to be chosen: the bytes that it takes in each, padding included, and later the errors."""

    choice: Choice
    group: tuple[object, ...]
    weight: float
    nbytes: dict[str, int]
    errors: dict[str, float]

    @property
    def name(self) -> str:
        return self.choice.source.name

    @property
    def smallest(self) -> str:
        return min(self.nbytes, key=lambda kind: (self.nbytes[kind], kind))

    def cost(self, kind: str) -> float:
        return self.weight * self.errors[kind]


@dataclass(frozen=True)
class Fit:
    """A choice of types for a size.

    Attributes
    ----------
    recipe
        The rules given, then those chosen.
    quantization
        What quantizing with it will do.
    nbytes, limit
        Bytes of all files, and what was asked for.
    bits_per_weight
        Of all tensors.
    types
        Tensor name -> type chosen.
    errors
        Tensor name -> relative squared error of that type.
    """

    recipe: Recipe
    quantization: Quantization
    nbytes: int
    limit: int
    bits_per_weight: float
    types: Mapping[str, str]
    errors: Mapping[str, float]

    def families(self) -> list[dict[str, Any]]:
        """Return a record for the tensors that differ in their layer only, with their types, bits per weight and error.

        ``relative_rms`` is the root of the mean of the relative squared errors.
        """
        planned = {tensor.name: tensor for tensor in self.quantization.tensors}
        families: dict[str, list[str]] = {}
        for name in self.types:
            families.setdefault(_family(name)[0], []).append(name)
        records = []
        for family, names in families.items():
            n_weights = sum(prod(planned[name].shape) for name in names)
            nbytes = sum(planned[name].nbytes for name in names)
            records.append(
                {
                    "family": family,
                    "n_tensors": len(names),
                    "n_weights": n_weights,
                    "nbytes": nbytes,
                    "types": dict(Counter(self.types[name] for name in names).most_common()),
                    "bits_per_weight": nbytes * 8 / n_weights,
                    "relative_rms": sqrt(sum(self.errors[name] for name in names) / len(names)),
                }
            )
        return records

    def text(self) -> str:
        """Return the recipe with a line in front that says what it is for."""
        name = "".join(c if c.isprintable() else "?" for c in self.quantization.path.name)  # a line must not end in it
        return (
            f"# {name}, {self.quantization.dialect.name}: {self.nbytes} bytes, "
            f"{self.bits_per_weight:.4f} bits per weight\n{self.recipe.text()}"
        )


@dataclass(frozen=True)
class Estimate:
    """About how long measuring takes.

    Attributes
    ----------
    seconds
        ``None`` where nothing says.
    tried
        Types whose encoders were tried for it.
    not_compiled
        Types that are reckoned as the mean of those; compiling them takes some seconds each, once, which comes on top.
    """

    seconds: float | None
    tried: tuple[str, ...]
    not_compiled: tuple[str, ...]


class Budget:
    """What can be chosen for a model, and what every choice costs.

    The error of a type for a tensor is that of what the tensor does to its input, relative,

        t = sum m (w - w')^2 / sum m w^2

    over a sample of its rows, ``m`` being the importance matrix's mean squares of the inputs (1 without one): noise over signal
    in the tensor's output. Relative, because what follows (a norm, a softmax, a sum) sees an output in proportion: absolute
    errors of different tensors have no common unit. Of a stack of experts it is the mean over the experts. The sum of ``t``
    over all tensors is made least, whatever their sizes: small errors of independent tensors add up in what a model says,
    and a stack of 256 experts makes no more noise for a token than a dense layer. But two kinds of tensors count otherwise:

    * The embeddings and the head, each twice for every layer (a tensor that is both, four times): all of a hidden state passes
      through them, and a layer adds two parts of it.
    * What makes only queries and keys, a quarter: its errors move the weights of an average.

    How that was chosen, with gemma3-270m (18 layers, tied): the divergence of the predictions per ``t`` is 7.2 for the head,
    5.9 for the embeddings, 0.06 for a layer's queries or keys, and 0.2 (output, gate) to 0.5 (values, down) for its others.
    Choices by absolute errors of the outputs did far worse than one type for all of the same size. Those by ``t`` times the
    number of weights, or its root, were worse than those by ``t`` at four bits, and within a tenth of them either way at five.

    Parameters
    ----------
    source
        As for :func:`ggufx.quantize.prepare`; so are ``imatrix``, ``target``, ``output_type``, ``embedding_type`` and
        ``leave_output``, and ``options``.
    type_names
        Candidates; ``native`` is the source's own bits, and counts as exact. By default that, and every lossy type that ggufx
        encodes and the target holds.
    rules
        What they decide is not chosen, and counts.
    per
        See :data:`Per`.
    sample_len
        Weights to measure of each tensor, about.
    split_max_nbytes, overrides
        As for :meth:`ggufx.quantize.Quantization.plan`: both take bytes.

    Raises
    ------
    RecipeError, PlanError, GGUFError
        As from prepare; a candidate that cannot be encoded, or nothing to choose for.

    Attributes
    ----------
    dialect
        To be written.
    candidates
        Names of the types that may be chosen.
    left_out
        Candidates -> tensors that they cannot be used for, as they demand importance and there is none.
    """

    def __init__(
        self,
        source: str | Path | Checkpoint | File,
        *,
        type_names: Sequence[str] | None = None,
        rules: Recipe | None = None,
        imatrix: ImportanceMatrix | str | Path | None = None,
        target: str | None = None,
        per: Per = "family",
        sample_len: int = SAMPLE_LEN,
        output_type: str | None = None,
        embedding_type: str | None = None,
        leave_output: bool = False,
        split_max_nbytes: int | None = None,
        overrides: Mapping[str, Value] | None = None,
        **options: Any,
    ) -> None:
        if per not in get_args(Per):
            raise PlanError(f"{per!r} is no way to group tensors; choose {' or '.join(get_args(Per))}")
        if isinstance(source, str | Path):
            path = Path(source)
            source = Checkpoint(path) if path.is_dir() else open(path, dialect=options.get("dialect"))
        given = rules or Recipe()
        asked = None if type_names is None else [quantize.codec_name(name, "--types") for name in type_names]
        if asked is not None and not asked:
            raise RecipeError("--types names no type")
        self.dialect = quantize.target_dialect(given, [n for n in asked or () if n != NATIVE], source, target)
        self._codecs = _codecs(asked, self.dialect)
        self._native = asked is None or NATIVE in asked
        self.candidates = [*(codec.name for codec in self._codecs), *([NATIVE] if self._native else [])]
        self._matrix: Any = imatrix
        if imatrix is not None and not isinstance(imatrix, ImportanceMatrix) and str(imatrix) not in _MAKESHIFTS:
            self._matrix = imatrix_module.load(imatrix)
        self._options = options | {"pure": True, "imatrix": self._matrix, "target": self.dialect.name}
        self._source, self._sample_len = source, sample_len
        self._split_max_nbytes, self._overrides = split_max_nbytes, overrides
        # What takes part and how its columns are weighed is what quantizing all of it to one type would find.
        probe = quantize.prepare(
            source, recipe=given, default=_probe(source, self.dialect),
            **self._options | {"allow_requantize": True},
        )  # fmt: skip
        self._source_files, alignment = probe.source_files, probe.alignment
        self._architecture = probe.facts().get("general.architecture")
        self._fixed = given + _ends([c.source.name for c in probe.choices], output_type, embedding_type, leave_output)
        self.left_out: Counter[str] = Counter()
        self._free = self._take_part(probe, per, alignment)
        smallest = self._prepared({item.name: item.smallest for item in self._free})
        smallest.check()
        planned = self._planned(smallest)
        self._base = planned.nbytes - sum(item.nbytes[item.smallest] for item in self._free)
        self._n_weights = sum(prod(tensor.shape) for tensor in planned.tensors)
        self._overhead = planned.nbytes - sum(tensor.nbytes for tensor in planned.tensors)

    def _take_part(self, probe: Quantization, per: Per, alignment: int) -> list[_Free]:
        chosen: list[Choice] = []
        for choice in probe.choices:
            item = choice.source
            if item.stays or 0 in item.shape or self._fixed.find(item.name) is not None:
                continue
            if item.stack and not _INTEGER.fullmatch(item.kind):
                chosen.append(choice)
            else:  # a family's rule must not reach it
                self._fixed += Recipe((Rule(f"^{re.escape(item.name)}$", (NATIVE,)),))
        if not chosen:
            raise PlanError(f"{probe.path}: there is no tensor whose type is left to choose")
        alike: dict[tuple[object, ...], list[int]] = {}
        for choice in chosen:
            family, layer = _family(choice.source.name)
            alike.setdefault((family, choice.source.shape, choice.source.kind), []).append(layer)
        weights = _weights([choice.source.name for choice in probe.choices])
        free = []
        for choice in chosen:
            family, layer = _family(choice.source.name)
            group: tuple[object, ...] = (family, choice.source.shape, choice.source.kind)
            layers = sorted(alike[group])
            run = layers.index(layer) * _LAYER_RUNS // max(_LAYER_RUNS, len(layers))
            group = (*group, layer if per == "tensor" else run)
            free.append(_Free(choice, group, weights[choice.source.name], self._sizes(choice, alignment), {}))
        for members in _groups(free):
            common = [kind for kind in members[0].nbytes if all(kind in one.nbytes for one in members)]
            for one in members:  # importance may be recorded for some of them only
                self.left_out.update(kind for kind in one.nbytes if kind not in common)
                one.nbytes = {kind: one.nbytes[kind] for kind in common}
        return free

    def _sizes(self, choice: Choice, alignment: int) -> dict[str, int]:
        """Return the types that a tensor may become, with their bytes."""
        source = choice.source
        found: dict[str, int] = {}
        if self._native:
            with suppress(PlanError):  # the target has no type for its bits
                found[NATIVE] = align_up(source.keep().nbytes, alignment)
        for codec in self._codecs:
            if source.shape[-1] % codec.layout.block_len:
                continue
            nbytes = align_up(codec.layout.nbytes(source.shape), alignment)
            if self._has_factor(source, codec.name):
                nbytes += align_up(4 * len(source.stack), alignment)
            if codec.name == source.kind:  # its own bits, called by their type
                if nbytes != found.get(NATIVE):
                    found[codec.name] = nbytes
                continue
            if codec.needs_importance and not choice.weights and self._matrix not in _MAKESHIFTS:
                self.left_out[codec.name] += 1
                continue
            found[codec.name] = nbytes
        if not found:
            raise PlanError(
                f"{source.name} {list(source.shape)}: none of {', '.join(self.candidates)} fits; add a type to --types, such "
                "as q8_0 or native, or decide the tensor by a rule"
            )
        return found

    def _has_factor(self, source: Source, kind: str) -> bool:
        """Return whether a tensor of this type gets a factor beside it, as :func:`ggufx.quantize.prepare` gives it."""
        return (
            kind == "NVFP4"
            and not source.scaled
            and is_applied(source.name, kind, self.dialect.name, self._architecture)
        )

    # Sizes ------------------------------------------------------------------------------------------------------

    @property
    def smallest_nbytes(self) -> int:
        """Bytes of the smallest file that the candidates make."""
        return self._base + sum(min(item.nbytes.values()) for item in self._free)

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest one."""
        return self._base + sum(max(item.nbytes.values()) for item in self._free)

    def nbytes_at(self, bits_per_weight: float) -> int:
        """Return the bytes of files whose tensors take so many bits a weight; headers come on top."""
        return self._overhead + int(bits_per_weight * self._n_weights / 8)

    def check(self, limit: int) -> None:
        """Raise PlanError for a size that is too small to be reached."""
        if limit < self.smallest_nbytes:
            low, high = (
                (n, (n - self._overhead) * 8 / self._n_weights) for n in (self.smallest_nbytes, self.largest_nbytes)
            )
            raise PlanError(
                f"{limit} bytes cannot be reached: with these types and rules the files take from {low[0]} bytes ({low[1]:.4f} "
                f"bits per weight) to {high[0]} bytes ({high[1]:.4f})"
            )

    # Errors -----------------------------------------------------------------------------------------------------

    @property
    def n_tensors(self) -> int:
        """Number of tensors whose type is chosen."""
        return len(self._free)

    @property
    def n_sampled(self) -> int:
        """Weights that will be measured, each with every candidate of its tensor: about."""
        return sum(min(self._sample_len, prod(item.choice.source.shape)) for item in self._free)

    def to_json(self) -> dict[str, Any]:
        """Return what can be chosen as plain JSON data."""
        return {
            "target": self.dialect.name,
            "candidates": self.candidates,
            "left_out": dict(self.left_out),
            "n_tensors": self.n_tensors,
            "n_sampled": self.n_sampled,
            "smallest_nbytes": self.smallest_nbytes,
            "largest_nbytes": self.largest_nbytes,
        }

    def estimate(self, threads: int | None = None) -> Estimate:
        """Return about how long :meth:`measure` takes here, from a short trial of the candidates that are compiled.

        Nothing is compiled for it: that takes some seconds a type, once, and would be most of the time of a dry run.
        """
        noise = np.random.default_rng(0).standard_normal((_TRIAL_ROWS, 4096), np.float32)
        seconds: dict[str, float] = {}
        for codec in self._codecs:
            values = noise[:, : 4096 // codec.layout.block_len * codec.layout.block_len]
            ones = np.ones(values.shape[1], np.float32)
            with suppress(kernels.NotCompiledError), kernels.compiling_refused():
                for rows in (values[:1], values):  # the first one loads the kernels
                    start = time.perf_counter()
                    codec.decode(codec.encode(rows, ones, effort="fast", threads=1), dtype=np.float32, threads=1)
                    taken = (time.perf_counter() - start) / rows.size
                seconds[codec.name] = taken
        untried = tuple(codec.name for codec in self._codecs if codec.name not in seconds)
        if self._codecs and not seconds:
            return Estimate(None, (), untried)
        # Those that are not compiled are reckoned as the mean of the others.
        mean = sum(seconds.values()) / max(1, len(seconds))
        total = sum(
            min(self._sample_len, prod(item.choice.source.shape))
            * sum(seconds.get(kind, mean) for kind in item.nbytes if kind not in (NATIVE, item.choice.source.kind))
            for item in self._free
        )
        return Estimate(total / min(threads or execute.default_workers(), len(self._free)), tuple(seconds), untried)

    def measure(self, *, threads: int | None = None, progress: execute.Progress | None = None) -> None:
        """Measure every type that a tensor may become on the tensor's sample; the result does not depend on ``threads``.

        Parameters
        ----------
        progress
            Called with (tensors done, tensors in all).

        Raises
        ------
        GGUFError
            The source cannot be read, or has values that are not finite.
        """
        with execute.open_files(), ThreadPoolExecutor(threads or execute.default_workers()) as pool:
            futures = [pool.submit(self._measure, item) for item in self._free]
            try:
                for done, (item, future) in enumerate(zip(self._free, futures, strict=True), 1):
                    item.errors = future.result()
                    if progress is not None:
                        progress(done, len(futures))
            finally:
                pool.shutdown(cancel_futures=True)

    def _measure(self, item: _Free) -> dict[str, float]:
        source = item.choice.source
        sums = dict.fromkeys(item.nbytes, 0.0)
        count = 0
        try:
            for number, rows in self._sampled(source):
                count += 1
                recorded = self._weights(item.choice, number, rows.shape[1])
                makeshift = self._makeshift(rows)
                m = np.ones(rows.shape[1]) if recorded is None else recorded.astype(np.float64)
                signal = _weighed(rows, m)
                for kind in item.nbytes:
                    if kind in (NATIVE, source.kind) or not signal:
                        continue
                    codec = types.get(kind)
                    weights = makeshift if recorded is None and codec.needs_importance else recorded
                    if weights is not None:
                        weights, _ = codec.usable_importance(weights)
                    values, factor = rows, None
                    if self._has_factor(source, kind):
                        # The sample's own: the whole matrix is not read.
                        factor = factor_of(float(np.abs(rows).max()))
                        values = rows / factor
                    packed = codec.encode(values, weights, effort="fast", threads=1)
                    decoded = codec.decode(packed, dtype=np.float32, threads=1)
                    error = rows - (decoded if factor is None else decoded * factor)
                    sums[kind] += _weighed(error, m) / signal
        except CodecError as error:
            raise GGUFError(f"{source.name}: cannot be measured: {error}") from None
        return {kind: total / count for kind, total in sums.items()}

    def _makeshift(self, rows: F32) -> F32:
        """Return what weighs the columns for types that demand importance where none is recorded."""
        if self._matrix != quantize.ENERGY:
            return np.ones(rows.shape[1], np.float32)
        columns = ColumnEnergy()
        columns.add(rows)
        return columns.result()

    def _weights(self, choice: Choice, number: int, row_len: int) -> F32 | None:
        """Return the recorded importance of a matrix's columns, if there is any for its tensor."""
        if not choice.weights:
            return None
        held = choice.weights[number]
        if held is None:
            return np.ones(row_len, np.float32)
        found = np.empty(row_len, np.float32)
        execute.read_into(self._source_files[held.span.file], held.span.offset, found.view(np.uint8))
        found /= np.float32(held.divisor)
        return found

    def _sampled(self, source: Source) -> Iterator[tuple[int, F32]]:
        """Decode evenly spread rows of evenly spread matrices; yields (number of the matrix, float32 [n, row_len])."""
        matrices = min(len(source.stack), _SAMPLED_MATRICES)
        for number in _spread(len(source.stack), matrices):
            parts = source.stack[number]
            rows = parts[0].row_len if parts[0].transposed else parts[0].rows
            wanted = _spread(rows, min(rows, ceil(self._sample_len / (matrices * source.shape[-1]))))
            if parts[0].transposed:  # small, and every row has something of each
                (part,) = parts
                whole = self._rows(part, list(range(part.rows)))
                yield number, np.ascontiguousarray(whole.T[wanted])
            else:
                columns = [self._rows(part, wanted) for part in parts]
                yield number, np.ascontiguousarray(np.concatenate(columns, axis=1))

    def _rows(self, matrix: Matrix, wanted: Sequence[int]) -> F32:
        """Read and decode single rows: float32 [len(wanted), row_len]."""
        widths = [matrix.row_nbytes, *([] if matrix.scales is None else [matrix.scales_nbytes])]
        inputs = [np.empty((len(wanted), width), np.uint8) for width in widths]
        for at, row in enumerate(wanted):
            for buffer, span in zip(inputs, matrix.cut(row, row + 1), strict=True):
                execute.read_into(self._source_files[span.file], span.offset, buffer[at])
        # Each row has come with the row of scales that it shares.
        values, bad_codes, bad_scales = decode_source(
            matrix.kind, len(wanted), matrix.row_len, [buffer.reshape(-1) for buffer in inputs], 1
        )
        if bad_codes or bad_scales:
            raise CodecError(f"{matrix.name} has codes or scales that are NaN")
        return values

    # The choice -------------------------------------------------------------------------------------------------

    def fit(self, limit: int) -> Fit:
        """Choose the types for files of at most ``limit`` bytes in all; :meth:`measure` first.

        Raises
        ------
        PlanError
            It cannot be reached.
        """
        self.check(limit)
        groups = _groups(self._free)
        kinds = [list(members[0].nbytes) for members in groups]
        options = [
            [(sum(item.nbytes[kind] for item in members), sum(item.cost(kind) for item in members)) for kind in names]
            for members, names in zip(groups, kinds, strict=True)
        ]
        least = sum(min(option[0] for option in held) for held in options)
        room = limit - self._base
        while True:
            chosen = choose(options, room)
            found = {
                item.name: names[number]
                for members, names, number in zip(groups, kinds, chosen, strict=True)
                for item in members
            }
            prepared = self._prepared(found)
            planned = self._planned(prepared)
            if planned.nbytes <= limit:
                break
            if room == least:
                raise PlanError(f"{limit} bytes cannot be reached: the smallest choice takes {planned.nbytes}")
            # A few keys, or the ends of one more file of a split.
            room = max(least, room - (planned.nbytes - limit))
        nbytes = sum(tensor.nbytes for tensor in planned.tensors)
        errors = {item.name: item.errors[found[item.name]] for item in self._free}
        return Fit(self._recipe(found), prepared, planned.nbytes, limit, nbytes * 8 / self._n_weights, found, errors)

    def _recipe(self, found: Mapping[str, str]) -> Recipe:
        shapes = {item.name: item.choice.source.shape for item in self._free}
        return self._fixed + recipe_module.from_tensors((name, shapes[name], kind) for name, kind in found.items())

    def _prepared(self, found: Mapping[str, str]) -> Quantization:
        return quantize.prepare(self._source, recipe=self._recipe(found), **self._options)

    def _planned(self, prepared: Quantization) -> Plan:
        beside = prepared.path if prepared.path.is_dir() else prepared.path.parent
        return prepared.plan(
            beside / "ggufx-budget.gguf", split_max_nbytes=self._split_max_nbytes, overrides=self._overrides
        )


def _weighed(values: F32, m: npt.NDArray[np.float64]) -> float:
    """Return sum m x^2; not as a product of matrices, whose order of adding depends on the machine's threads."""
    return float((np.square(values, dtype=np.float64).sum(axis=0) * m).sum())


def _groups(free: Sequence[_Free]) -> list[list[_Free]]:
    """Return the tensors that get one type together."""
    groups: dict[tuple[object, ...], list[_Free]] = {}
    for item in free:
        groups.setdefault(item.group, []).append(item)
    return list(groups.values())


def _family(name: str) -> tuple[str, int]:
    """Return a tensor's name without its layer, and the layer."""
    match = _LAYER.match(name)
    return (name, 0) if match is None else (f"blk.N.{match[2]}", int(match[1]))


def _weights(names: Sequence[str]) -> dict[str, float]:
    """Return what the errors of tensors count, as :class:`Budget` says."""
    layers = len({layer for family, layer in map(_family, names) if family.startswith("blk.")}) or 1
    found = {name: _STEERING_WEIGHT if _STEERS.match(name) else 1.0 for name in names}
    found["token_embd.weight"] = 2.0 * layers if "output.weight" in found else 4.0 * layers
    found["output.weight"] = 2.0 * layers
    return found


def _spread(total: int, count: int) -> list[int]:
    """Return ``count`` of the numbers below ``total``, in the middles of as many equal parts."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def _codecs(asked: Sequence[str] | None, dialect: Dialect) -> list[Codec]:
    """Return the candidates: those asked for, or all that there are."""
    if asked is None:
        return [codec for codec in types.all_codecs() if _is_quantized(codec) and dialect.type_id(codec) is not None]
    codecs = [types.get(name) for name in dict.fromkeys(asked) if name != NATIVE]
    for codec in codecs:
        if not codec.can_encode or not codec.can_decode or np.dtype(codec.value_dtype).kind != "f":
            raise RecipeError(f"--types: ggufx cannot encode {codec.name}; `ggufx types` lists what it can")
        if dialect.type_id(codec) is None:
            raise RecipeError(f"--types: {dialect.name} cannot hold {codec.name}; choose another --target")
    return codecs


def _is_quantized(codec: Codec) -> bool:
    return codec.can_encode and codec.can_decode and codec.lossy and codec.layout.block_len > 1


def _probe(source: Checkpoint | File, dialect: Dialect) -> str:
    """Return a type that all rows fit and that nothing has already: whatever takes part would change to it."""
    held = {tensor.type for tensor in source.tensors} if isinstance(source, File) else set()
    codecs = [codec for codec in types.all_codecs() if _is_quantized(codec) and dialect.type_id(codec) is not None]
    return min(codecs, key=lambda codec: (codec.name in held, codec.layout.block_len, codec.name)).name


def _ends(names: Sequence[str], output_type: str | None, embedding_type: str | None, leave: bool) -> Recipe:
    """Return the rules that say the same as the options for a model's two ends."""
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    wanted = [(head, NATIVE if leave else output_type), ("token_embd.weight", embedding_type)]
    return Recipe(
        tuple(Rule(f"^{re.escape(name)}$", (quantize.codec_name(kind),)) for name, kind in wanted if kind is not None)
    )
