"""Mixes: which type llama-quantize gives each tensor of a model under one name, such as Q4_K_M.

A name like Q4_K_M says two things: the type of most weights, and which tensors get a finer or a coarser one: the values of
attention, projections down by their layer, the head, the embeddings. Models with few heads of values, with eight experts or
with 80 layers have exceptions of their own.

The facts are those of ``llama_tensor_get_type_impl``, ``llama_tensor_get_type``, ``tensor_allows_quantization`` and
``llama_ftype_get_default_type`` in llama.cpp's ``src/llama-quant.cpp``, with ``load_hparams`` of ``src/llama-model.cpp`` and
``src/models``, at commit 0c1e57098 of 2026-10-01 (which llama-cpp-python 0.3.36 carries). ``fixtures/mixes.json`` has the
answers of that very code for models of several kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from ggufx import types
from ggufx.typed import Facts, architecture_of

__all__ = ["MIXES", "Mix", "Model", "assign", "find"]


@dataclass(frozen=True)
class Model:
    """What a mix asks of a model.

    Attributes
    ----------
    architecture
        ``general.architecture``.
    n_layers
        Blocks, those of multi-token prediction among them.
    n_experts
        Routed experts of a layer; 0 for a dense model.
    n_heads, n_value_heads
        Heads of queries, and of keys and values, in the first layer; 0 without attention.
    n_predicting
        Blocks that predict further tokens.
    """

    architecture: str = ""
    n_layers: int = 0
    n_experts: int = 0
    n_heads: int = 0
    n_value_heads: int = 0
    n_predicting: int = 0

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any], names: Collection[str] = (), where: object = "the model") -> Model:
        """Read a model's facts off its metadata.

        Parameters
        ----------
        keys
            Metadata as Python values.
        names
            The tensors' names: they tell the number of layers where no key does.
        where
            How an error names the file.

        Raises
        ------
        PlanError
            A key has a value of another type than a mix reads there.
        """
        architecture = architecture_of(where, keys) or ""
        facts = Facts.of_metadata(where, keys, f"{architecture}.")

        def number(key: str, missing: int) -> int:
            if isinstance(facts.find(key), int | None):
                return facts.integer(key, missing)
            # A number for each layer, in some models: the first layer's counts.
            return next(iter(facts.integers(key)), missing)

        n_heads = number("attention.head_count", 0)
        counted = 1 + max((_layer(name) for name in names), default=-1)
        return cls(
            architecture, number("block_count", counted), number("expert_count", 0), n_heads,
            number("attention.head_count_kv", n_heads), number("nextn_predict_layers", 0),
        )  # fmt: skip

    @property
    def n_sharing(self) -> int:
        """Heads of queries that share one of keys and values (upstream's ``n_gqa``)."""
        return self.n_heads // self.n_value_heads if self.n_value_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether upstream takes it for a model of 70 billion weights: by its family and the number of its layers."""
        n_layers = self.n_layers - self.n_predicting
        if self.architecture in ("llama", "llama-embed"):
            return n_layers == 80 and self.n_experts != 8 and self.n_heads != self.n_value_heads
        return n_layers == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.architecture)


# Conditions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A tensor's place among those of its role: ``layer`` of ``n_layers``."""

    layer: int
    n_layers: int
    model: Model
    has_imatrix: bool


_Condition = Callable[[_Place], bool]


def _first(part: int) -> _Condition:
    """In the first of so many parts of the layers."""
    return lambda place: place.layer < place.n_layers // part


def _below(count: int) -> _Condition:
    """One of the first so many."""
    return lambda place: place.layer < count


def _outer(place: _Place) -> bool:
    """In the first eighth or the last one, or every third layer between them (upstream's ``use_more_bits``)."""
    eighth = place.n_layers // 8
    return place.layer < eighth or place.layer >= 7 * place.n_layers // 8 or (place.layer - eighth) % 3 == 2


def _middle(place: _Place) -> bool:
    """Between the first eighth and the last."""
    return place.n_layers // 8 <= place.layer < 7 * place.n_layers // 8


def _few_values(place: _Place) -> bool:
    """Four heads of queries or more to one of values: its matrix is small."""
    return place.model.n_sharing >= 4


def _few_values_or_experts(place: _Place) -> bool:
    """Values that are a small part of the model."""
    return place.model.n_sharing >= 4 or place.model.n_experts >= 4


def _eight_experts(place: _Place) -> bool:
    """Mixtral and its kind: attention is a small part of the model."""
    return place.model.n_experts == 8


def _falcon(place: _Place) -> bool:
    """The architecture that the K types' mixes were tried on apart."""
    return place.model.architecture == "falcon"


def _not_falcon(place: _Place) -> bool:
    return not _falcon(place)


def _imatrix(place: _Place) -> bool:
    """There is an importance matrix."""
    return place.has_imatrix


def _no_imatrix(place: _Place) -> bool:
    return not place.has_imatrix


# The table ------------------------------------------------------------------------------------------------------

# A type and the conditions that all must hold for it.
_Row = tuple[str | _Condition, ...]


@dataclass(frozen=True)
class Mix:
    """A mix of types: for each role rows of (type, condition, ...), of which the first that holds decides.

    Attributes
    ----------
    name
        Upstream's spelling, also that of ``general.file_type``.
    type
        What no row decides.
    head
        Type of ``output.weight``, and of the embeddings where a model has no head of its own.
    embedding
        Type of the embeddings otherwise; empty for :attr:`type`.
    value
        ``attn_v``, ``attn_qkv`` and ``attn_kv_b``.
    key, query, attention
        ``attn_k``, ``attn_q`` and ``attn_output``.
    down, up
        ``ffn_down``, and ``ffn_up`` with ``ffn_gate``; those of experts, too.
    low_bit
        About two bits: layers are counted tensor by tensor, and what holds for all other mixes (:func:`_for_all`) does not.
    flat
        Type of everything that is no stack of matrices; empty where that makes no difference.
    """

    name: str
    type: str
    head: str = "Q6_K"
    embedding: str = ""
    value: tuple[_Row, ...] = ()
    key: tuple[_Row, ...] = ()
    query: tuple[_Row, ...] = ()
    attention: tuple[_Row, ...] = ()
    down: tuple[_Row, ...] = ()
    up: tuple[_Row, ...] = ()
    low_bit: bool = False
    flat: str = ""


def _two_bits(name: str, kind: str, finer: str, attention: str = "") -> Mix:
    """Return a mix of about two bits: ``finer`` where errors cost most."""
    return Mix(
        name, kind, "Q5_K", finer,
        value=(("Q4_K", _few_values_or_experts), (finer,)),
        key=(("Q4_K", _eight_experts),),
        attention=(("Q5_K", _eight_experts), (attention or kind,)),
        down=((finer, _first(8)),),
        low_bit=True,
    )  # fmt: skip


_EIGHT_EXPERTS_Q5: Final = ("Q5_K", _eight_experts)

MIXES: Final[Mapping[str, Mix]] = {
    mix.name: mix
    for mix in (
        _two_bits("IQ1_S", "IQ1_S", "Q2_K", "IQ2_XXS"),
        _two_bits("IQ1_M", "IQ1_M", "Q2_K", "IQ2_XXS"),
        _two_bits("IQ2_XXS", "IQ2_XXS", "Q2_K"),
        _two_bits("IQ2_XS", "IQ2_XS", "Q2_K"),
        _two_bits("IQ2_S", "IQ2_XS", "IQ3_S", "IQ3_S"),
        _two_bits("IQ2_M", "IQ2_S", "IQ3_S", "IQ3_S"),
        Mix("TQ1_0", "TQ1_0", embedding="Q4_K"),
        Mix("TQ2_0", "TQ2_0", embedding="Q4_K"),
        Mix("Q1_0", "Q1_0"),
        Mix("Q2_0", "Q2_0", embedding="Q4_K"),
        Mix(
            "Q2_K", "Q2_K",
            value=(("Q4_K", _few_values), ("Q3_K",)),
            attention=(_EIGHT_EXPERTS_Q5, ("Q3_K",)),
            down=(("Q3_K",),),
        ),
        Mix("Q2_K_S", "Q2_K", value=(("Q4_K", _few_values),), down=(("Q4_K", _first(8)),)),
        Mix(
            "IQ3_XXS", "IQ3_XXS", "Q5_K", "IQ3_S",
            value=(("Q4_K", _few_values), ("IQ3_S", _no_imatrix)),
            key=(("IQ2_S",),),
            query=(("IQ2_S",),),
            attention=(_EIGHT_EXPERTS_Q5, ("IQ3_S",)),
            down=(("Q4_K", _no_imatrix, _first(8)), ("Q3_K", _no_imatrix)),
        ),
        Mix(
            "IQ3_XS", "IQ3_S",
            value=(("Q4_K", _few_values),),
            key=(("IQ3_XXS",),),
            query=(("IQ3_XXS",),),
            attention=(_EIGHT_EXPERTS_Q5,),
            up=(("IQ3_XXS", _middle),),
        ),
        Mix("IQ3_S", "IQ3_S", value=(("Q4_K", _few_values),), attention=(_EIGHT_EXPERTS_Q5,)),
        Mix(
            "IQ3_M", "IQ3_S",
            value=(("Q4_K",),),
            attention=(_EIGHT_EXPERTS_Q5, ("Q4_K",)),
            down=(("Q4_K", _first(8)), ("Q4_K", _eight_experts, _outer)),
        ),
        Mix("Q3_K_S", "Q3_K", attention=(_EIGHT_EXPERTS_Q5,)),
        Mix(
            "Q3_K_M", "Q3_K",
            value=(("Q5_K", _below(2)), ("Q4_K",)),
            attention=(_EIGHT_EXPERTS_Q5, ("Q4_K",)),
            down=(("Q5_K", _first(16)), ("Q4_K", _not_falcon), ("Q4_K", _outer)),
        ),
        Mix(
            "Q3_K_L", "Q3_K",
            value=(("Q5_K",),),
            attention=(("Q3_K", _eight_experts), ("Q5_K",)),
            down=(("Q4_K", _falcon), ("Q5_K",)),
        ),
        Mix(
            "IQ4_XS", "IQ4_XS",
            value=(("Q5_K", _few_values),),
            attention=(_EIGHT_EXPERTS_Q5,),
            down=(("Q5_K", _no_imatrix, _first(8)),),
        ),
        Mix(
            "IQ4_NL", "IQ4_NL",
            value=(("Q5_K", _few_values),),
            attention=(_EIGHT_EXPERTS_Q5,),
            down=(("Q5_K", _no_imatrix, _first(8)),),
        ),
        Mix(
            "Q4_K_S", "Q4_K",
            value=(("Q5_K", _below(4)),),
            attention=(_EIGHT_EXPERTS_Q5,),
            down=(("Q5_K", _not_falcon, _first(8)),),
        ),
        Mix(
            "Q4_K_M", "Q4_K",
            value=(("Q6_K", _outer),),
            attention=(_EIGHT_EXPERTS_Q5,),
            down=(("Q6_K", _falcon, _first(16)), ("Q5_K", _falcon, _outer), ("Q4_K", _falcon), ("Q6_K", _outer)),
        ),
        Mix("Q5_K_S", "Q5_K"),
        Mix("Q5_K_M", "Q5_K", value=(("Q6_K", _outer),), down=(("Q6_K", _outer),)),
        Mix("Q6_K", "Q6_K"),
        Mix("Q4_0", "Q4_0", down=(("Q4_1", _imatrix, _first(8)),)),
        Mix("Q4_1", "Q4_1"),
        Mix("Q5_0", "Q5_0", down=(("Q5_1", _imatrix, _first(8)),)),
        Mix("Q5_1", "Q5_1"),
        Mix("Q8_0", "Q8_0", "Q8_0"),
        Mix("MXFP4_MOE", "MXFP4", "Q8_0", flat="Q8_0"),
    )
}  # fmt: skip
"""Name -> mix, as llama-quantize's list has them; F16, BF16 and F32 are types, of which nothing is mixed."""

_ALIASES: Final = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def find(name: str) -> Mix | None:
    """Return the mix that llama-quantize knows by a name (in any case), or ``None``."""
    upper = name.strip().upper()
    return MIXES.get(_ALIASES.get(upper, upper))


# The engine -----------------------------------------------------------------------------------------------------

_LAYER = re.compile(r"blk\.(\d+)")

# Part of a name -> role; the first one found decides.
_ROLES: Final = (
    ("attn_qkv.weight", "value"), ("attn_kv_b.weight", "value"), ("attn_v.weight", "value"), ("attn_k.weight", "key"),
    ("attn_q.weight", "query"), ("attn_output.weight", "attention"), ("ffn_up", "up"), ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)  # fmt: skip

# Of the architecture glm5-next: what is left as it is, and what gets eight bits.
_GLM5_NEXT_STAYS: Final = (
    "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape",
    "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight", "attn_kv_a_mqa.weight",
    "attn_k_b.weight", "attn_v_b.weight",
)  # fmt: skip
_GLM5_NEXT_EIGHT: Final = ("attn_q_a", "attn_q_b", "nextn.eh_proj")


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return -1 if match is None else int(match[1])


def _role(name: str) -> str:
    if name == "output.weight":
        return "head"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "other")


def assign(
    mix: Mix,
    model: Model,
    shapes: Mapping[str, Sequence[int]],
    *,
    has_imatrix: bool = False,
    decided: Collection[str] = (),
) -> dict[str, str]:
    """Return the types that a mix gives to a model's tensors.

    Parameters
    ----------
    mix
        The mix.
    model
        Facts of the model.
    shapes
        All tensors: upstream's name -> shape, numpy order. Tensors are counted in upstream's order, whatever theirs is.
    has_imatrix
        Whether there is an importance matrix.
    decided
        Names that something else decides, or that stay as they are: they are not among the tensors that are counted.

    Returns
    -------
    dict of str to str
        Name -> type. Vectors, matrices of one row and what is ``decided`` are left out. Whether a type fits the rows is not
        looked at, but for the head's, as upstream does.
    """
    roles = {name: _role(name) for name in shapes}
    tied = "head" not in roles.values()
    n_values = sum(role == "value" for role in roles.values())
    seen: Counter[str] = Counter()
    found = {}
    for name in sorted(shapes, key=lambda name: (_layer(name), name)):
        shape, role = shapes[name], roles[name]
        if name in decided or prod(shape[:-1]) <= 1 or _left_alone(model, name):
            continue
        if model.architecture == "glm5-next" and any(part in name for part in _GLM5_NEXT_EIGHT):
            found[name] = "Q8_0"
        elif role == "head" or (tied and role == "embedding"):
            misfit = shape[-1] % types.get(mix.type).layout.block_len != 0
            found[name] = "Q8_0" if misfit or model.architecture == "falcon" else mix.head
        elif mix.flat:
            found[name] = mix.type if _is_expert_stack(model, role, shape) else mix.flat
        elif role == "embedding":
            found[name] = mix.embedding or mix.type
        else:
            count, n_layers = seen[role], n_values if role == "value" else model.n_layers
            if role in ("down", "up", "gate") and model.n_experts > 1 and not mix.low_bit and _layer(name) >= 0:
                count = _layer(name)  # a layer may have several of them
            found[name] = _by_role(mix, role, _Place(count, n_layers, model, has_imatrix))
            seen[role] += 1
    return found


def _left_alone(model: Model, name: str) -> bool:
    return model.architecture == "glm5-next" and any(part in name for part in _GLM5_NEXT_STAYS)


def _is_expert_stack(model: Model, role: str, shape: Sequence[int]) -> bool:
    # Latent attention stacks its heads, and upstream takes those for experts, too, but of one architecture.
    stacked = len(shape) > 2 and shape[-3] > 1
    return stacked and (model.architecture != "bailingmoe3" or role in ("up", "gate", "down"))


def _by_role(mix: Mix, role: str, place: _Place) -> str:
    if role == "attention" and _falcon(place) and not mix.low_bit:
        return "Q4_K" if mix.name == "Q3_K_L" else mix.type
    rows: tuple[_Row, ...] = {
        "value": mix.value, "key": mix.key, "query": mix.query, "attention": mix.attention, "down": mix.down,
        "up": mix.up, "gate": mix.up,
    }.get(role, ())  # fmt: skip
    for kind, *conditions in rows:
        if all(callable(holds) and holds(place) for holds in conditions):
            taken = str(kind)
            break
    else:
        taken = mix.type
    return taken if mix.low_bit else _for_all(role, taken, place)


def _for_all(role: str, taken: str, place: _Place) -> str:
    """Return what becomes of a type in a model whose keys and values are a small part of it."""
    if role in ("value", "key") and _eight_experts(place):
        return "Q8_0"
    if role == "value" and place.model.is_70b and taken in ("Q3_K", "Q4_K"):
        return "Q5_K"
    return taken
