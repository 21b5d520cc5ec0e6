"""What the architectures share: reading config.json, checking a tensor against it, stacking experts, completeness."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple

from ggufx.architectures.rope import Rope, read_ropes
from ggufx.checkpoint import Checkpoint, SourceTensor
from ggufx.container import Value
from ggufx.errors import CheckpointError
from ggufx.plan import FLOAT_SCALES
from ggufx.typed import Facts, shown

__all__ = ["Architecture", "Family", "Output", "Part", "Role", "evaluate"]

Role = Literal["dense", "expert", "matrix", "router", "vector", "table"]
"""What decides a tensor's type: projections; routed experts; matrices that no release quantizes (embeddings); the router's
matrix; norms, scales, biases and hyper-connections (F32 everywhere: BF16 there costs accuracy); the token-to-expert
table."""

FP8_TILE: Final = 128
FP4_BLOCK: Final = 32

_MANY: Final = 1_000_000
"""Missing tensors that are enough to say that they are missing."""

FLOATS: Final = ("BF16", "F16", "F32")
PLAIN: Final[Mapping[Role, tuple[str, ...]]] = {
    "dense": FLOATS,
    "expert": FLOATS,
    "matrix": FLOATS,
    "router": FLOATS,
    "vector": FLOATS,
    "table": ("I64", "I32"),
}


class Family(NamedTuple):
    """One family of a checkpoint's tensors, by its name within a layer or, of the global ones, as it is."""

    source: str
    role: Role
    shape: str
    """Expressions in the architecture's dimensions, one per axis (see :meth:`Architecture.part`)."""


@dataclass(frozen=True)
class Part:
    """Rows of a source tensor with their scales, checked against the config.

    Attributes
    ----------
    tensor
        The source.
    kind
        The plan's (FP8, FP8_F32, FP8_BF16, FP4, BF16 ...).
    shape
        Logical shape of what the part contributes, numpy order, with FP4 counted in elements.
    scale, rows_per_scale, len_per_scale
        The scales and what one of them covers.
    start, step
        Of the source's rows (outer axes flattened) those from ``start``, every ``step``-th.
    transposed
        The rows become columns: ``shape`` is [source row length, source rows].
    elements
        ``start`` and ``step`` count elements instead.
    """

    tensor: SourceTensor
    kind: str
    shape: tuple[int, ...]
    scale: SourceTensor | None = None
    rows_per_scale: int = 1
    len_per_scale: int = 1
    start: int = 0
    step: int = 1
    transposed: bool = False
    elements: bool = False


@dataclass(frozen=True)
class Output:
    """A tensor of the output: its name, role, and the sources that are stacked (outer) and concatenated (inner).

    Without ``stacked`` the outer sequence follows each other along the first axis instead of making a new one.
    """

    name: str
    role: Role
    stack: tuple[tuple[Part, ...], ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, numpy order."""
        first = self.stack[0]
        shape = first[0].shape
        if len(first) > 1:
            shape = (*shape[:-1], sum(part.shape[-1] for part in first))
        if self.stacked:
            return (len(self.stack), *shape)
        return (sum(parts[0].shape[0] for parts in self.stack), *shape[1:]) if len(self.stack) > 1 else shape

    @property
    def parts(self) -> Iterator[Part]:
        """All parts, in order."""
        return (part for parts in self.stack for part in parts)


class Architecture(ABC):
    """An architecture over one checkpoint: what its tensors are called, and what they become.

    Attributes
    ----------
    facts
        config.json.
    notes
        Sentences the user should read, of the keys.

    Raises
    ------
    CheckpointError
        config.json lacks a value, or its values contradict each other.
    """

    name: ClassVar[str]
    """``general.architecture``."""
    tokenizer_pre: ClassVar[str]
    """llama.cpp's name of the pre-tokenizer."""
    dense: ClassVar[str] = "bf16"
    """What FP8 tensors become by default where the target has no FP8 type."""
    dense_is_outtype: ClassVar[bool] = True
    """Whether a type asked for by ``--dense`` is one for unquantized matrices, too, as llama.cpp's ``--outtype`` is."""
    router_in_float32: ClassVar[bool] = True
    """Whether upstream keeps the router's matrix in F32."""
    nisparks_form: ClassVar[bool] = False
    """Whether the nisparks fork has names and keys of its own for it, not upstream's."""
    template_first: ClassVar[bool] = False
    """Whether upstream writes the chat template before everything but the architecture."""
    float_scales: ClassVar[bool] = False
    """Whether FP8 scales may be floats, not powers of two."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.facts = Facts(checkpoint.path / "config.json", checkpoint.config)
        self.notes: list[str] = []

    # What an architecture must say ------------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_experts(self) -> int:
        """Number of routed experts."""

    @abstractmethod
    def outputs(
        self, target: str, *, mtp: bool, skip: Callable[[str], bool]
    ) -> tuple[list[Output], list[tuple[str, str]]]:
        """Map the checkpoint to output tensors, in the target's order.

        Parameters
        ----------
        target
            A dialect.
        mtp
            The file of the multi-token-prediction block instead of the main model's.
        skip
            Names the user asked to leave out.

        Returns
        -------
        outputs, and (name, reason) of every checkpoint tensor that is left out

        Raises
        ------
        CheckpointError
            A tensor is missing, unknown, or its shape or dtype disagrees with the config.
        """

    @abstractmethod
    def keys(self, target: str, *, mtp: bool, file_type: int, chat_template: str | None) -> dict[str, Value]:
        """Return the architecture's metadata in the target's order, ``general.file_type`` among it."""

    def builtin_template(self) -> tuple[str | None, str]:
        """Return the chat template that is written where the checkpoint has none, and a sentence about it for a note."""
        return None, "none is written"

    def target_notes(self, target: str) -> list[str]:
        """Return what a target's programs make of the model that users would not expect."""
        return []

    @abstractmethod
    def scale_name(self, name: str) -> str:
        """Return the name of a weight's scales; empty for a name that can have none."""

    # The config -------------------------------------------------------------------------------------------------

    def integer(self, key: str) -> int:
        """Return a positive integer of config.json that metadata can hold; raises CheckpointError."""
        return self.facts.integer(key, least=1)

    def count(self, key: str) -> int:
        """Return an integer of config.json that may be 0, or missing, which is 0; raises CheckpointError."""
        return self.facts.integer(key, 0)

    def counted(self, key: str) -> int:
        """Return a number of things that have tensors of their own each; raises CheckpointError.

        A damaged config's billions would have billions of missing tensors looked for.
        """
        value = self.integer(key)
        if value > len(self.checkpoint):
            raise CheckpointError(
                f"{self.facts.where}: {key} is {value}, but the checkpoint has {len(self.checkpoint)} "
                "tensors in all: the config and the weights are of different models"
            )
        return value

    def number(self, key: str) -> float:
        """Return a number of config.json that float32 can hold; raises CheckpointError."""
        return self.facts.number(key)

    def rope(self) -> Rope:
        """Return the rotary embedding that all layers share, its base included; raises CheckpointError."""
        found = read_ropes(self.facts, {}).get("", Rope("rope_parameters")).with_theta(self.facts, "rope_theta")
        if found.partial not in (None, 1.0):
            raise CheckpointError(
                f"{self.facts.where}: {found.name}.partial_rotary_factor is {found.partial}; {self.name} files have no form "
                "for heads that are rotated in part"
            )
        return found

    def check_assumed(self, assumed: Mapping[str, object], readers: str) -> None:
        """Raise CheckpointError for a value of config.json that would be lost: no key holds it, and readers assume another.

        Parameters
        ----------
        assumed
            By the config's keys, what readers assume.
        readers
            Whose assumptions they are.
        """
        for key, value in assumed.items():
            self.facts.expect(key, value, f"{readers} assume that, and no key of theirs says otherwise")

    def check_quantization(self, method: str, tile: list[int] | None) -> None:
        """Raise CheckpointError where config.json names another quantization than the native one; it may name none.

        Parameters
        ----------
        method, tile
            Native ``quant_method`` and ``weight_block_size``, rows and columns that share a scale.
        """
        stated = self.quantization
        if stated is None:
            return
        found, block = stated.find("quant_method"), stated.find("weight_block_size")
        if found != method or (tile is not None and block != tile):
            native = method if tile is None else f"{method} with {tile}"
            raise CheckpointError(
                f"{self.facts.where}: quantization_config has quant_method {shown(found)} and weight_block_size "
                f"{shown(block)}; {native} can be converted, or a checkpoint in BF16"
            )

    @property
    def quantization(self) -> Facts | None:
        """``quantization_config`` of config.json, if it has one; raises CheckpointError."""
        return self.facts.object("quantization_config", None)

    def prefixed(self, keys: Mapping[str, Value]) -> dict[str, Value]:
        """Put the architecture's name before every key that is not a general one."""
        shared = ("general.", "tokenizer.")
        return {(key if key.startswith(shared) else f"{self.name}.{key}"): value for key, value in keys.items()}

    # Tensors ----------------------------------------------------------------------------------------------------

    def in_order(self) -> Iterator[SourceTensor]:
        """Shards in order, names sorted within: the order of upstream's files."""
        return iter(sorted(self.checkpoint.values(), key=lambda t: (t.shard, t.name)))

    def where(self, tensor: SourceTensor) -> str:
        """Return how an error names a tensor."""
        return f"{self.checkpoint.shards[tensor.shard]}: tensor {tensor.name!r}"

    def part(self, tensor: SourceTensor, role: Role, expression: str, dims: Mapping[str, int]) -> Part:
        """Check a tensor's dtype, shape and scales.

        Parameters
        ----------
        tensor, role
            The tensor and what it is.
        expression
            Its shape: one product per axis (see :func:`evaluate`), separated by blanks.
        dims
            The numbers that ``expression`` names.

        Raises
        ------
        CheckpointError
            The dtype is none of the role's, the shape is not the config's, or the scales are missing or do not fit.
        """
        expected = tuple(evaluate(axis, dims) for axis in expression.split())
        where = self.where(tensor)
        shape = tensor.shape
        if tensor.dtype in ("I8", "U8", "F4") and role == "expert" and shape:
            if tensor.dtype != "F4":
                shape = (*shape[:-1], shape[-1] * 2)
            kind, rows, width = "FP4", 1, FP4_BLOCK
        elif tensor.dtype == "F8_E4M3" and role in ("dense", "expert"):
            kind, rows, width = "FP8", FP8_TILE, FP8_TILE
        elif tensor.dtype in PLAIN[role]:
            kind, rows, width = tensor.dtype, 1, 1
        else:
            raise CheckpointError(
                f"{where} has dtype {tensor.dtype}; expected {' or '.join(self.accepted(role))} for this tensor"
            )
        if shape != expected:
            raise CheckpointError(
                f"{where} has shape {list(shape)}, config.json says {list(expected)} ({expression}): the config and the "
                "weights are of different models"
            )
        if kind not in ("FP8", "FP4"):
            return Part(tensor, kind, shape)
        if kind == "FP4" and shape[-1] % FP4_BLOCK:
            raise CheckpointError(f"{where} has rows of {shape[-1]} FP4 codes, not a multiple of {FP4_BLOCK}")
        scale_name = self.scale_name(tensor.name)
        scale = self.checkpoint.get(scale_name)
        if scale is None:
            raise CheckpointError(f"{where} is {kind} but its scales {scale_name!r} are missing")
        scale_shape = (-(-shape[0] // rows), -(-shape[1] // width))
        known = {"F8_E8M0": kind, "U8": kind}
        if self.float_scales and kind == "FP8":
            known |= {dtype: kind for kind, dtype in FLOAT_SCALES.items()}
        if scale.dtype not in known or scale.shape != scale_shape:
            expected_dtype = " or ".join(dtype for dtype in reversed(known) if dtype != "U8")
            raise CheckpointError(
                f"{self.checkpoint.shards[scale.shard]}: scales {scale_name!r} are {scale.dtype}{list(scale.shape)}, "
                f"expected {expected_dtype}{list(scale_shape)}: one for each {rows}x{width} of {list(shape)}"
            )
        return Part(tensor, known[scale.dtype], shape, scale, rows, width)

    def accepted(self, role: Role) -> tuple[str, ...]:
        """Return the dtypes that a tensor of a role may have."""
        native: Mapping[Role, tuple[str, ...]] = {"dense": ("F8_E4M3",), "expert": ("I8", "F8_E4M3")}
        return (*native.get(role, ()), *PLAIN[role])

    def stacked(self, name: str, label: str, parts: Mapping[int, Part]) -> Output:
        """Stack the routed experts of one projection.

        Parameters
        ----------
        name
            Of the output.
        label
            How an error names the projection.
        parts
            By the expert's number.

        Raises
        ------
        CheckpointError
            An expert is missing, beyond the count, or stored otherwise than the others.
        """
        count = self.n_experts
        missing = [expert for expert in range(count) if expert not in parts]
        extra = [expert for expert in parts if expert >= count]
        if missing or extra:
            raise CheckpointError(
                f"{self.checkpoint.path}: {label}: config.json says {count} experts, the checkpoint has "
                f"{len(parts)}; missing {missing[:5]}, beyond the count {extra[:5]}"
            )
        kinds = {part.kind for part in parts.values()}
        if len(kinds) > 1:
            raise CheckpointError(f"{self.checkpoint.path}: {label} mix {' and '.join(sorted(kinds))}")
        return Output(name, "expert", tuple((parts[expert],) for expert in range(count)), stacked=True)

    def unmapped(self, unknown: Sequence[str]) -> None:
        """Raise CheckpointError when there are tensors that the architecture does not know."""
        if unknown:
            raise CheckpointError(
                f"{self.checkpoint.path}: Can not map tensor {unknown[0]!r} ({len(unknown)} such tensors); if they are not "
                "needed, leave them out with --skip GLOB"
            )

    def complete(self, expected: Iterable[str], skip: Callable[[str], bool]) -> None:
        """Raise CheckpointError when a tensor that the config implies is not in the checkpoint."""
        missing: list[str] = []
        count = 0
        for name in expected:
            count += 1
            if name not in self.checkpoint and not skip(name):
                missing.append(name)
                if len(missing) == _MANY:
                    break
        if missing:
            raise CheckpointError(
                f"{self.checkpoint.path}: Missing tensors: {missing[:3]} ({len(missing)} of {count} that config.json implies)"
            )


def evaluate(expression: str, dims: Mapping[str, int]) -> int:
    """Evaluate one of the tables' own shape expressions: products, a quotient, and a sum in parentheses."""
    total = 1
    for sign, factor in re.findall(r"([*/]?)(\(\w+\+\w+\)|\w+)", expression):
        names = factor.strip("()").split("+")
        value = sum(int(name) if name.isdigit() else dims[name] for name in names)
        total = total // value if sign == "/" else total * value
    return total
