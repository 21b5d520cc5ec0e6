"""llama.cpp by llama-cpp-python's low-level API: logits and tokens, nothing sampled, nothing cached in half floats.

Also `in_float32`, which rewrites a GGUF so that llama.cpp computes with the file's exact values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter


@llama_cpp.llama_log_callback
def _errors_only(level: int, text: bytes, _user: ctypes.c_void_p) -> None:
    """Print llama.cpp's warnings and errors; its info lines would bury the tests' output."""
    if level in (3, 4):
        print(text.decode(errors="replace"), end="")


llama_cpp.llama_log_set(_errors_only, ctypes.c_void_p(0))


@contextmanager
def recorded_log() -> Iterator[list[str]]:
    """Collect everything that llama.cpp logs, as the pieces that it logs."""
    pieces: list[str] = []

    @llama_cpp.llama_log_callback
    def record(_level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        pieces.append(text.decode(errors="replace"))

    llama_cpp.llama_log_set(record, ctypes.c_void_p(0))
    try:
        yield pieces
    finally:
        llama_cpp.llama_log_set(_errors_only, ctypes.c_void_p(0))


class Model:
    """A GGUF file opened by llama.cpp on the CPU.

    Raises
    ------
    ValueError
        llama.cpp refuses the file.
    """

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = vocab_only
        # Repacked buffers use other kernels, whose sums are rounded otherwise.
        params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp does not load {path}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int], *, chunk: int = 512) -> np.ndarray:
        """Logits of every position: float32 [tokens, vocab], the prompt fed in pieces of `chunk` tokens."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(512, len(tokens))
        params.n_batch = params.n_ubatch = chunk
        params.n_threads = params.n_threads_batch = 2
        params.type_k = params.type_v = int(GGMLQuantizationType.F32)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError("llama.cpp makes no context")
        batch = llama_cpp.llama_batch_init(chunk, 0, 1)
        try:
            rows = []
            for start in range(0, len(tokens), chunk):
                piece = tokens[start : start + chunk]
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i] = token
                    batch.pos[i] = start + i
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = 0
                    batch.logits[i] = True
                if status := llama_cpp.llama_decode(context, batch):
                    raise ValueError(f"llama_decode returned {status}")
                pointer = llama_cpp.llama_get_logits(context)
                rows.append(np.ctypeslib.as_array(pointer, (len(piece), self.vocab_size)).copy())
            return np.concatenate(rows)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text; `special` reads the names of special tokens as those tokens."""
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, False, special)
        if count < 0:
            raise ValueError(f"{-count} tokens for {len(data)} bytes")
        return list(ids[:count])


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Model]:
    """Open a GGUF file for the time of a with statement."""
    model = Model(path, **options)
    try:
        yield model
    finally:
        model.close()


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, changed: Mapping[str, Any]) -> None:
    """Copy all metadata but what the writer writes by itself, with the values of `changed` in place of their own."""
    for key, entry in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = entry.types[0]
        writer.add_key_value(
            key, changed.get(key, entry.contents()), kind, entry.types[-1] if kind == GGUFValueType.ARRAY else None
        )


def in_float32(source: Path, target: Path, changed: Mapping[str, Any] | None = None) -> Path:
    """Rewrite a GGUF with every quantized or BF16 tensor as the F32 values that it stands for.

    llama.cpp's CPU kernels round the *activations* to the weights' partner type before they multiply (BF16 weights:
    to BF16, MXFP4 and Q8_0 weights: to Q8_0), an error far above that of the order of F32 sums and not one of the file.
    With F32 weights nothing is rounded, so that a difference to the reference is one of the file's values or metadata.

    Parameters
    ----------
    source, target
        File to read and file to write.
    changed
        Metadata values to write in place of the file's, to see what a wrong one does.
    """
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer, changed or {})
    for tensor in reader.tensors:
        values = tensor.data
        if tensor.tensor_type not in (GGMLQuantizationType.F32, GGMLQuantizationType.I32):
            values = gguf.quants.dequantize(values, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
