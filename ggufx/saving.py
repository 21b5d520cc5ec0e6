"""A GGUF from a dict of arrays, and a dict of arrays from a GGUF."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, Unpack

import numpy.typing as npt

from ggufx import arrays, dialects, hybrid, recipe, types
from ggufx.arrays import Described
from ggufx.errors import PlanError, quoted
from ggufx.file import Tensor
from ggufx.imatrix import ImportanceMatrix
from ggufx.recipe import NATIVE, Recipe
from ggufx.types import Effort, Objective
from ggufx.writer import Writer, WriterOptions

__all__ = ["Importance", "Tensors", "load_file", "save", "save_file"]

Tensors: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]
"""Name -> what :meth:`ggufx.Writer.add` takes, or pairs of them."""
Importance: TypeAlias = Mapping[str, npt.ArrayLike] | ImportanceMatrix
"""Name -> weights of the columns, [row_len] or [experts, row_len]."""
_UNNAMED: Final = (".weight", ".bias")


def save(
    path: str | Path,
    tensors: Tensors,
    metadata: Mapping[str, Any] | None = None,
    types: str | Mapping[str, str] | Recipe | None = None,
    *,
    architecture: str | None = None,
    importance: Importance | None = None,
    effort: Effort = "normal",
    objective: Objective = "reference",
    **options: Unpack[WriterOptions],
) -> list[Path]:
    """Write arrays and packed tensors to a GGUF.

    Nothing stands under the final name until the file is complete, checked and on the disk. Memory holds a piece of a tensor
    beside the caller's arrays: give :class:`ggufx.Lazy` arrays, or pairs from a generator, for a model larger than memory.

    Parameters
    ----------
    path
        The output; with a split its prefix, and the members get ``-NNNNN-of-NNNNN`` names.
    tensors
        Name -> array of NumPy, ``ml_dtypes`` or torch, :class:`ggufx.Packed`, tensor of an open file (or the open file itself),
        :class:`ggufx.Lazy`, or callable that returns one of these; or an iterable of such pairs, taken one by one. They are
        written in this order. With pairs and callables the names and shapes are not known before the data: see
        :mod:`ggufx.writer` on the key ``ggufx.padding`` that a file of more than 64 MB then has.
    metadata
        Key -> Python value or :class:`ggufx.values.Value`: see :func:`ggufx.values.as_value`. The metadata of an open file is
        taken as it is.
    types
        ``None`` keeps every tensor's dtype. The name of a type is for all tensors of floats but those that quantizing a model
        leaves as they are: one axis, biases, norms, routers. A mapping gives the types of the tensors that it names. A recipe
        (:func:`ggufx.recipe.load`) gives each tensor the type of the first rule that matches it. Packed tensors of quant
        types stay as they are.
    architecture
        ``general.architecture``, which llama.cpp wants.
    importance
        Weights of the columns: a mapping, or an importance matrix (:func:`ggufx.imatrix.load`).
    effort, objective
        As in :func:`ggufx.quantize_array`.
    **options
        ``dialect``, ``alignment``, ``split_max_nbytes``, ``split_max_tensors``, ``overwrite`` and ``threads`` of
        :class:`ggufx.Writer`.

    Returns
    -------
    list of Path
        The file, or the members of the split.

    Raises
    ------
    OutputExists
        The output exists, and ``overwrite=True`` was not given.
    PlanError, CodecError, OutOfRangeError, DiskError
        As :meth:`ggufx.Writer.add`; nothing is left behind.
    RecipeError
        There is no type of a name that ``types`` has.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> weights = {"blk.0.ffn_up.weight": np.ones((8, 256), np.float32), "output_norm.weight": np.ones(256, np.float16)}
    >>> ggufx.save("small.gguf", weights, {"general.name": "Small"}, "Q4_K", architecture="llama")
    [PosixPath('small.gguf')]
    >>> f = ggufx.open("small.gguf")
    >>> f.metadata["general.name"], f["blk.0.ffn_up.weight"].type, f["output_norm.weight"].type
    ('Small', 'Q4_K', 'F16')
    """
    choose = _Chooser(types, options.get("dialect"))
    with Writer(path, metadata, architecture=architecture, **options) as writer:
        pairs: Iterable[tuple[str, Any]] = tensors.items() if isinstance(tensors, Mapping) else tensors
        if isinstance(tensors, Mapping):
            choose.require(tensors)
            if not any(_is_call(value) for value in tensors.values()):
                described = {name: arrays.describe(name, value) for name, value in tensors.items()}
                for name, one in described.items():
                    writer.declare(name, one.shape, arrays.type_for(name, one, choose(name, one)).name)
                pairs = described.items()
        seen = []
        for name, value in pairs:
            seen.append(name)
            one = arrays.describe(name, value() if _is_call(value) else value)
            weights = None if importance is None else _weights(importance, name, one.shape)
            writer.add(name, one, choose(name, one), importance=weights, effort=effort, objective=objective)
        choose.require(seen)
        return writer.close()


def save_file(
    tensors: Tensors, path: str | Path, metadata: Mapping[str, Any] | None = None, **options: Unpack[WriterOptions]
) -> list[Path]:
    """Write arrays to a GGUF as they are, with the parameters of ``safetensors.numpy.save_file``.

    Parameters
    ----------
    tensors, metadata
        As in :func:`save`.
    path
        The output; unlike safetensors' function this one replaces a file only with ``overwrite=True``.
    **options
        As in :func:`save`.

    Returns
    -------
    list of Path
        The file, or the members of the split.

    Raises
    ------
    OutputExists, PlanError, CodecError, DiskError
        As :func:`save`.

    Examples
    --------
    >>> import numpy as np
    >>> import ggufx
    >>> path, = ggufx.save_file({"w": np.arange(4, dtype=np.int32)}, "plain.gguf", {"general.name": "Plain"})
    >>> ggufx.load_file(path)
    {'w': array([0, 1, 2, 3], dtype=int32)}
    """
    return save(path, tensors, metadata, **options)


def load_file(
    path: str | Path,
    *,
    dtype: npt.DTypeLike | None = None,
    dialect: str | None = None,
    threads: int | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Read all tensors of a GGUF into memory, decoded: name -> array, in file order.

    Parameters
    ----------
    path
        The file; any member opens a whole split file. A directory is a KTransformers hybrid.
    dtype
        float32, float16, bfloat16 (``ml_dtypes``) or float64 for all tensors of floats; by default the stored dtype of float
        and integer types, bit for bit, and float32 for quant types.
    dialect
        As in :func:`ggufx.open`.
    threads
        Decoders at a time.

    Returns
    -------
    dict of name -> ndarray

    Raises
    ------
    ContainerError, UnknownDialect, AmbiguousDialect
        As :func:`ggufx.open`.
    UnknownType, UnsupportedType
        A tensor's type is not known, or has no decoder; :func:`ggufx.open` reads the others.

    Examples
    --------
    >>> import ml_dtypes
    >>> import numpy as np
    >>> import ggufx
    >>> path, = ggufx.save_file({"w": np.ones((2, 32), ml_dtypes.bfloat16)}, "bf16.gguf")
    >>> ggufx.load_file(path)["w"].dtype, ggufx.load_file(path, dtype="float32")["w"].dtype
    (dtype(bfloat16), dtype('float32'))
    """
    with hybrid.open(path, dialect=dialect) as opened:
        return {name: _loaded(tensor, dtype, threads) for name, tensor in opened.items()}


def _loaded(tensor: Tensor, dtype: npt.DTypeLike | None, threads: int | None) -> npt.NDArray[Any]:
    stored = None if tensor.codec is None else arrays.native_dtype(tensor.codec)
    if stored is None or (dtype is not None and tensor.dtype.kind == "f"):
        return tensor.numpy(dtype, threads=threads)
    if tensor.is_big_endian or tensor.factor is not None:
        return tensor.numpy(stored, threads=threads)
    return tensor.packed.reshape(-1).view(stored).reshape(tensor.shape).copy()


# Which type -------------------------------------------------------------------------------------------------------------


class _Chooser:
    """Chooses the type of each tensor; ``None`` keeps what it is."""

    def __init__(self, wanted: str | Mapping[str, str] | Recipe | None, dialect: str | None) -> None:
        self._by_name: dict[str, str] = {}
        self._all: str | None = None
        self._recipe: Recipe | None = None
        if isinstance(wanted, str):
            self._all = recipe.type_named(wanted, "types")
        elif isinstance(wanted, Recipe):
            self._recipe = wanted
        elif wanted is not None:
            self._by_name = {name: recipe.type_named(kind, f"types[{name!r}]") for name, kind in wanted.items()}
        target = dialects.TARGETS.get(dialect or "")
        self._targets = [*dialects.DIALECTS.values()] if target is None else [target]

    def require(self, names: Iterable[str]) -> None:
        """Raise PlanError for a tensor that was given a type and is not there."""
        known = list(names)
        missing = next((name for name in self._by_name if name not in set(known)), None)
        if missing is not None:
            close = difflib.get_close_matches(missing, known, 1)
            raise PlanError(
                f"types names {quoted(missing)}, which is none of the {len(known)} tensors"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )

    def __call__(self, name: str, described: Described) -> str | None:
        wanted = self._wanted(name, described)
        return None if wanted in (None, NATIVE) else wanted

    def _wanted(self, name: str, described: Described) -> str | None:
        if name in self._by_name:
            return self._by_name[name]
        # Whole numbers are no weights, and packed rows would lose twice.
        if described.dtype is None or described.dtype.kind in "iub":
            return None
        # Names of other programs' tensors may end in anything; what a bias or a norm is, is told by the rest of the name.
        stays = recipe.stays(name if name.endswith(_UNNAMED) else f"{name}.weight", described.shape)
        if self._recipe is not None:
            rule = self._recipe.find(name, stays=stays)
            return None if rule is None else next(filter(self._is_held, rule.types), rule.types[0])
        return None if stays else self._all

    def _is_held(self, name: str) -> bool:
        return name == NATIVE or any(target.type_id(types.get(name)) is not None for target in self._targets)


def _is_call(value: Any) -> bool:
    return callable(value) and not hasattr(value, "shape")


def _weights(importance: Importance, name: str, shape: tuple[int, ...]) -> npt.ArrayLike | None:
    if isinstance(importance, ImportanceMatrix):
        found = importance.rows(name, shape)
        return None if found is None else found.values
    return importance.get(name)
