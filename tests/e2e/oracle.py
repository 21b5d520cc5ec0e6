"""What the tests compare with: the checkpoint's and the GGUF's bytes, read without any of ggufx's code.

Names, order and types come from fixtures/dsv4; values from numpy and ml_dtypes.
"""

from __future__ import annotations

import csv
import json
import re
import struct
import sys
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures" / "dsv4"
sys.path.insert(0, str(ROOT / "tools"))

# Type name -> id in the file (nisparks' 42), values and bytes of a block.
TYPES = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q8_0": (8, 32, 34),
    "I32": (26, 1, 4),
    "BF16": (30, 1, 2),
    "MXFP4": (39, 32, 17),
    "F8_E4M3_B128": (42, 128, 129),
}
TYPE_NAMES = {number: name for name, (number, _, _) in TYPES.items()}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nbytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    _, block, nbytes = TYPES[kind]
    assert shape[-1] % block == 0
    return prod(shape) // block * nbytes


# The checkpoint -------------------------------------------------------------------------------------------------


@dataclass
class Stored:
    """A tensor of a checkpoint: dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass
class Source:
    """A checkpoint, all of it in memory; can be changed and written back."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, dict[str, Stored]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        for path in sorted(self.path.glob("*.safetensors")):
            raw = path.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            data = np.frombuffer(raw, np.uint8)[8 + length :]
            shard = {}
            for name, entry in json.loads(raw[8 : 8 + length]).items():
                begin, end = entry["data_offsets"]
                shard[name] = Stored(entry["dtype"], tuple(entry["shape"]), data[begin:end])
            self.shards[path.name] = shard

    @property
    def tensors(self) -> dict[str, Stored]:
        """All tensors."""
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.items()}

    def shard_of(self, name: str) -> str:
        """File of a tensor."""
        return next(shard for shard, tensors in self.shards.items() if name in tensors)

    def bytes_of(self, name: str) -> np.ndarray:
        """A tensor's bytes, ready to be changed in place (see :meth:`save`)."""
        tensor = self.tensors[name]
        tensor.data = tensor.data.copy()
        return tensor.data

    def put(self, name: str, dtype: str, shape: tuple[int, ...], data: np.ndarray, *, shard: str | None = None) -> None:
        """Add or replace a tensor."""
        found = shard or self.shard_of(name)
        self.shards[found][name] = Stored(dtype, shape, np.ascontiguousarray(data).reshape(-1).view(np.uint8))

    def drop(self, *names: str) -> None:
        """Remove tensors."""
        for name in names:
            del self.shards[self.shard_of(name)][name]

    def save(self) -> None:
        """Write shards, index and config."""
        (self.path / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        weight_map = {}
        for file, tensors in self.shards.items():
            header, end = {}, 0
            for name, tensor in tensors.items():
                span = [end, end + tensor.data.size]
                header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
                end = span[1]
                weight_map[name] = file
            text = json.dumps(header).encode()
            with (self.path / file).open("wb") as out:
                out.write(struct.pack("<Q", len(text)) + text)
                for tensor in tensors.values():
                    out.write(tensor.data.tobytes())
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")

    def scale_of(self, name: str) -> str:
        """Name of a weight's scales."""
        return name.removesuffix(".weight") + ".scale"

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Logical shape: FP4 counted in values."""
        tensor = self.tensors[name]
        return (*tensor.shape[:-1], tensor.shape[-1] * 2) if tensor.dtype == "I8" else tensor.shape

    def decode(self, name: str, *, high_first: bool = False) -> np.ndarray:
        """Values of a tensor: float32 or integers; ``high_first`` is the wrong order of FP4 nibbles."""
        tensor = self.tensors[name]
        raw, shape = tensor.data, tensor.shape
        if tensor.dtype == "BF16":
            return raw.view(ml_dtypes.bfloat16).reshape(shape).astype(np.float32)
        if tensor.dtype in ("F32", "I64"):
            return raw.view({"F32": "<f4", "I64": "<i8"}[tensor.dtype]).reshape(shape)
        scale = self.tensors[self.scale_of(name)]
        # 2 ** (e - 127): 0 gives a subnormal that ldexp rounds correctly.
        scales = np.ldexp(np.float32(1), scale.data.reshape(scale.shape).astype(np.int32) - 127)
        if tensor.dtype == "F8_E4M3":
            values = raw.view(ml_dtypes.float8_e4m3fn).reshape(shape).astype(np.float32)
            grown = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
            return values * grown
        assert tensor.dtype == "I8"
        pairs = raw.reshape(shape)
        values = np.empty((shape[0], shape[1] * 2), np.float32)
        low, high = E2M1[pairs & 15], E2M1[pairs >> 4]
        values[:, 0::2], values[:, 1::2] = (high, low) if high_first else (low, high)
        with np.errstate(over="ignore"):
            return values * np.repeat(scales, 32, 1)


# Names, order and types -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A tensor that the output must have."""

    name: str
    shape: tuple[int, ...]
    type: str
    sources: tuple[str, ...]
    """Weights, in stacking order."""
    transform: str


def _rows() -> list[tuple[re.Pattern[str], dict[str, str]]]:
    with (FIXTURES / "map.tsv").open(encoding="utf-8") as file:
        rows = []
        for row in csv.DictReader(file, delimiter="\t"):
            pattern = (
                re.escape(row["hf_name_pattern"]).replace(r"\{L\}", r"(?P<L>\d+)").replace(r"\{E\}", r"(?P<E>\d+)")
            )
            rows.append((re.compile(pattern), row))
        return rows


MAP = _rows()


def rule(name: str) -> tuple[dict[str, str], str, int]:
    """Return the row of map.tsv for a checkpoint tensor, its layer and its expert (-1)."""
    for pattern, row in MAP:
        match = pattern.fullmatch(name)
        if match:
            groups = match.groupdict()
            return row, groups.get("L") or "", int(groups.get("E") or -1)
    raise KeyError(name)


def expected(
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    dtypes: dict[str, str],
    target: str,
    *,
    dense: str = "Q8_0",
    mtp: bool = False,
    n_layers: int = 43,
) -> list[Expected]:
    """Expand map.tsv for a checkpoint whose tensors are ``names``, in shard order and sorted within."""
    column = "nisparks" if target == "nisparks" else "upstream_llamacpp"
    kinds = "nisparks_type" if target == "nisparks" else "upstream_type"
    plain: list[Expected] = []
    stacks: dict[str, tuple[int, dict[str, dict[int, str]]]] = {}
    joined: dict[str, list[str]] = {}
    for name in names:
        row, layer, expert = rule(name)
        gguf_name = row[f"{column}_name"]
        shared = name in ("embed.weight", "head.weight", "norm.weight")  # an MTP file has these three of the main model
        if gguf_name == "-" or (mtp != name.startswith("mtp.") and not (mtp and shared)):
            continue
        gguf_name = gguf_name.replace("{L}", layer).replace("blk.43.", f"blk.{n_layers}.")
        kind = _type(row[kinds], dtypes[name], shapes[name][-1], target, dense)
        if row["transform"].endswith("stack_experts"):
            block = gguf_name.rsplit(".", 2)[0]
            place = stacks.setdefault(block, (len(plain), {}))
            place[1].setdefault(gguf_name, {})[expert] = name
        elif gguf_name.endswith("nextn.eh_proj.weight"):
            joined.setdefault(gguf_name, []).append(name)
        else:
            plain.append(Expected(gguf_name, shapes[name], kind, (name,), row["transform"]))

    def stack(gguf_name: str, members: dict[int, str]) -> Expected:
        names = tuple(members[expert] for expert in range(len(members)))
        shape = (len(names), *shapes[names[0]])
        kind = _type("MXFP4", dtypes[names[0]], shape[-1], target, dense)
        return Expected(gguf_name, shape, kind, names, "stack")

    order = ("down", "gate", "up") if target == "nisparks" else ("gate", "down", "up")
    groups = {
        block: [stack(f"{block}.ffn_{p}_exps.weight", by_name[f"{block}.ffn_{p}_exps.weight"]) for p in order]
        for block, (_, by_name) in stacks.items()
    }
    if target == "nisparks":
        for block, (place, _) in sorted(stacks.items(), key=lambda item: -item[1][0]):
            plain[place:place] = groups[block]
        return plain
    tables = [t for t in plain if t.transform == "i64_to_i32"]
    pairs = []
    for gguf_name, members in joined.items():
        e, h = sorted(members)  # e_proj before h_proj
        rows, width = shapes[e]
        kind = _type("Q8_0", dtypes[e], 2 * width, target, dense)
        pairs.append(Expected(gguf_name, (rows, 2 * width), kind, (e, h), "join"))
    by_layer = sorted(groups, key=lambda block: int(block.split(".")[1]))
    rest = [t for t in plain if t.transform != "i64_to_i32"]
    return [*tables, *(t for block in by_layer for t in groups[block]), *pairs, *rest]


def _type(listed: str, dtype: str, row_len: int, target: str, dense: str) -> str:
    if dtype == "F8_E4M3":  # experts of the Base checkpoints too, which map.tsv does not list
        wanted = "F8_E4M3_B128" if target == "nisparks" else dense
        return wanted if row_len % TYPES[wanted][1] == 0 else "BF16"
    return listed


def expected_of(source: Source, target: str, *, dense: str = "Q8_0", mtp: bool = False) -> list[Expected]:
    """Expand map.tsv for a checkpoint on disk."""
    names = [name for shard in sorted(source.shards) for name in sorted(source.shards[shard])]
    shapes = {name: source.shape_of(name) for name in names}
    dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
    layers = source.config["num_hidden_layers"]
    return expected(names, shapes, dtypes, target, dense=dense, mtp=mtp, n_layers=layers)


def values_of(source: Source, tensor: Expected, *, high_first: bool = False) -> np.ndarray:
    """Values that an output tensor must have."""
    parts = [source.decode(name, high_first=high_first) for name in tensor.sources]
    if tensor.transform == "stack":
        return np.stack(parts)
    return np.concatenate(parts, axis=1) if tensor.transform == "join" else parts[0]


# The GGUF -------------------------------------------------------------------------------------------------------

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
KV_TYPES = {"u32": 4, "i32": 5, "f32": 6, "bool": 7, "str": 8, "arr": 9, "u16": 2}


@dataclass
class Raw:
    """A tensor of a GGUF: numpy shape, type name, absolute offset, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    data: np.ndarray

    def decode(self) -> np.ndarray:
        """Values: float32 or int32."""
        if self.type == "F32":
            return self.data.view("<f4").reshape(self.shape)
        if self.type == "I32":
            return self.data.view("<i4").reshape(self.shape)
        if self.type == "BF16":
            return self.data.view(ml_dtypes.bfloat16).reshape(self.shape).astype(np.float32)
        _, block, nbytes = TYPES[self.type]
        blocks = self.data.reshape(-1, nbytes)
        if self.type == "Q8_0":
            d = blocks[:, :2].copy().view("<f2").astype(np.float32)
            return (blocks[:, 2:].view(np.int8) * d).reshape(self.shape)
        scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 127)
        if self.type == "MXFP4":
            values = np.concatenate([E2M1[blocks[:, 1:] & 15], E2M1[blocks[:, 1:] >> 4]], axis=1)
        else:
            values = blocks[:, 1:].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert values.shape[1] == block
        with np.errstate(over="ignore"):
            return (values * scale).reshape(self.shape)


class Gguf:
    """A GGUF v3 file, parsed by the letter of the format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = path.read_bytes()
        self.at = 0
        assert self.raw[:4] == b"GGUF"
        self.at = 4
        version, n_tensors, n_kv = self._take("<IQQ")
        assert version == 3
        self.kv: dict[str, tuple[int, Any]] = {}
        for _ in range(n_kv):
            key = self._string()
            (kind,) = self._take("<I")
            assert key not in self.kv
            self.kv[key] = (kind, self._value(kind))
        infos = []
        for _ in range(n_tensors):
            name = self._string()
            (n_dims,) = self._take("<I")
            dims = self._take(f"<{n_dims}Q")
            kind, offset = self._take("<IQ")
            infos.append((name, tuple(reversed(dims)), TYPE_NAMES[kind], offset))
        self.data_offset = -(-self.at // 32) * 32
        assert set(self.raw[self.at : self.data_offset]) <= {0}
        self.tensors: dict[str, Raw] = {}
        end = 0
        data = np.frombuffer(self.raw, np.uint8)
        for name, shape, kind, offset in infos:
            assert offset == end, f"{name} leaves a hole"
            nbytes = nbytes_of(kind, shape)
            start = self.data_offset + offset
            self.tensors[name] = Raw(name, shape, kind, start, data[start : start + nbytes])
            end = -(-(offset + nbytes) // 32) * 32
        assert len(self.raw) == self.data_offset + end

    def _take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.raw, self.at)
        self.at += struct.calcsize(form)
        return found

    def _string(self) -> str:
        (length,) = self._take("<Q")
        self.at += length
        return self.raw[self.at - length : self.at].decode()

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._string()
        if kind == 9:
            element, count = self._take("<IQ")
            return element, [self._value(element) for _ in range(count)]
        return self._take(_SCALARS[kind])[0]
