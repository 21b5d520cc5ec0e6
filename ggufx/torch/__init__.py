"""GGUF tensors through torch: loaded packed to a device, decoded or multiplied there.

>>> import ggufx.torch
>>> tensors = ggufx.torch.load("model.gguf", device="cuda", dtype=torch.bfloat16)      # doctest: +SKIP
>>> w = tensors["blk.0.ffn_gate.weight"]                                               # doctest: +SKIP
>>> y = ggufx.torch.linear(x, w)                                                       # doctest: +SKIP
>>> gate, up = ggufx.torch.linears(x, [w, tensors["blk.0.ffn_up.weight"]])             # doctest: +SKIP

:func:`open` is the lazy mapping, :func:`load` brings a file, or a part or a shard of it, to one or more devices.
:class:`GGUFLinear`, :class:`GGUFEmbedding` and :class:`GGUFExperts` are the layers; ``torch.ops.ggufx`` has what they are made
of, for torch.compile, export and gradients of activations. :func:`encode` is the way back. :func:`save_file` and
:func:`load_file` write and read plain tensors. On CUDA the types that ``ggufx types`` lists with a CUDA kernel run on Triton
kernels; others, and other devices, in plain torch.
"""

from __future__ import annotations

from ggufx.errors import MissingExtra

try:
    import torch as _torch  # here, once, before the modules need it
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise MissingExtra("ggufx.torch needs torch, which is not installed: pip install 'ggufx[torch]'") from error

from ggufx.torch.encoding import encode
from ggufx.torch.loading import ShardError, TorchFile, load, open
from ggufx.torch.modules import GGUFEmbedding, GGUFExperts, GGUFLinear
from ggufx.torch.saving import load_file, save_file
from ggufx.torch.tensor import GGUFTensor, linear, linears
from ggufx.types.codec import encode_arrays_by

__all__ = [
    "GGUFEmbedding",
    "GGUFExperts",
    "GGUFLinear",
    "GGUFTensor",
    "ShardError",
    "TorchFile",
    "encode",
    "linear",
    "linears",
    "load",
    "load_file",
    "open",
    "save_file",
]

encode_arrays_by(_torch.Tensor, encode)
