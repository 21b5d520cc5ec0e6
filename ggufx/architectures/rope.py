"""The rotary embedding in config.json: every spelling that transformers writes, as one.

``rope_scaling`` is the older name and ``rope_parameters`` the newer one, which holds ``rope_theta``, too. Either is flat, or
holds an object for each kind of rotary embedding (DeepSeek-V4's ``main`` and ``compress``) or type of layer
(``full_attention`` ...). What two spellings say of one embedding must agree: a reader would follow the one or the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ggufx.container import Value
from ggufx.errors import CheckpointError
from ggufx.typed import Facts, shown

__all__ = ["Rope", "read_ropes"]

LAYER_TYPES: Final = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
"""Transformers' names of layer types that ``rope_parameters`` may be nested by."""

# What YaRN may have, in upstream's order, and the config's spellings.
_YARN: Final[Mapping[str, tuple[str, ...]]] = {
    "ext_factor": ("extrapolation_factor",),
    "attn_factor": ("attention_factor", "attn_factor"),
    "beta_fast": ("beta_fast",),
    "beta_slow": ("beta_slow",),
}
_MSCALES: Final = ("mscale", "mscale_all_dim")
_LEFT_OVER: Final = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
"""What some versions of transformers leave beside nested objects, and do not read there."""


@dataclass(frozen=True)
class Rope:
    """One rotary embedding, as far as the config states it.

    Attributes
    ----------
    name
        Where it is stated, for errors.
    kind
        ``yarn``, ``default`` (no scaling), or ``None``: not stated.
    theta, partial
        The base, and the part of a head that is rotated; ``None`` where not stated.
    factor, context
        YaRN's factor, and the context length before it in tokens.
    yarn
        YaRN's other numbers that are stated, as a GGUF's keys call them, in upstream's order.
    mscales
        DeepSeek's ``mscale`` and ``mscale_all_dim``, where stated.
    """

    name: str
    kind: str | None = None
    theta: float | None = None
    partial: float | None = None
    factor: float = 1.0
    context: int = 0
    yarn: Mapping[str, float] | None = None
    mscales: Mapping[str, float] | None = None

    @property
    def scales(self) -> bool:
        """Whether the embedding is scaled (by YaRN, the only way that there is)."""
        return self.kind == "yarn"

    @property
    def base(self) -> float:
        """The base, of an embedding from :meth:`with_theta`."""
        assert self.theta is not None
        return self.theta

    def keys(self) -> dict[str, Value]:
        """Return the ``rope.scaling.*`` keys in upstream's order, none without scaling.

        The factors of extrapolation and attention and the two ends of the ramp are written where the config has them: their
        defaults are the programs' own.
        """
        if not self.scales:
            return {}
        return {
            "rope.scaling.type": Value.string("yarn"),
            "rope.scaling.factor": Value.f32(self.factor),
            "rope.scaling.original_context_length": Value.u32(self.context),
            **{f"rope.scaling.yarn_{key}": Value.f32(number) for key, number in (self.yarn or {}).items()},
        }

    def merged(self, other: Rope, config: Facts) -> Rope:
        """Return what two statements of one embedding come to; raises CheckpointError where they contradict each other."""
        found = self
        if self.kind is None:
            found = replace(other, theta=self.theta, partial=self.partial)
        elif other.kind is not None:
            own, others = self._scaling(), other._scaling()
            odd = next((key for key in own | others if own.get(key) != others.get(key)), None)
            if odd is not None:
                raise _contradiction(config, f"{self.name}'s {odd}", own.get(odd), f"{other.name}'s", others.get(odd))
        return replace(
            found,
            theta=self._agreed("rope_theta", self.theta, other.name, other.theta, config),
            partial=self._agreed("partial_rotary_factor", self.partial, other.name, other.partial, config),
        )

    def with_theta(self, config: Facts, key: str) -> Rope:
        """Return the embedding with the base that ``key`` of the config states, or that is stated with it."""
        theta = self._agreed("rope_theta", self.theta, key, config.number(key, None), config)
        return replace(self, theta=config.number(key) if theta is None else theta)

    def _agreed(self, key: str, own: float | None, name: str, others: float | None, config: Facts) -> float | None:
        if own is not None and others is not None and np.float32(own) != np.float32(others):
            raise _contradiction(config, f"{self.name}.{key}", own, name, others)
        return others if own is None else own

    def _scaling(self) -> dict[str, Any]:
        keys = {key.removeprefix("rope.scaling."): value.data for key, value in self.keys().items()}
        return keys | dict(self.mscales or {})


def _contradiction(config: Facts, name: str, value: object, other: str, others: object) -> CheckpointError:
    return CheckpointError(
        f"{config.where}: {name} ({shown(value)}) and {other} ({shown(others)}) contradict each other, and a GGUF "
        "of this model holds one value; correct the file"
    )


def read_ropes(config: Facts, labels: Mapping[str, str], attention: float | None = None) -> dict[str, Rope]:
    """Return the rotary embeddings that a config states.

    Parameters
    ----------
    config
        config.json.
    labels
        Of a model with several rotary embeddings: the name of each in the result, by what nested objects are called. A
        flat object is then the scaling of the last one, as transformers reads it. Empty where all layers share one, which
        is called ``""``.
    attention
        The factor of attention that programs for the model assume whatever a file says: another is an error, and it is not
        written. ``None`` where they read it.

    Returns
    -------
    dict
        Name -> embedding; nothing of those that are not stated.

    Raises
    ------
    CheckpointError
        The layout is not known, the kind of scaling is none that a GGUF of these models holds, a number is missing or of
        another type, or two statements contradict each other.
    """
    found: dict[str, Rope] = {}
    for name in ("rope_parameters", "rope_scaling"):
        stated = config.object(name, None)
        if stated is None:
            continue
        for kind, rope in _stated(config, name, config.find(name), labels, attention):
            found[kind] = found[kind].merged(rope, config) if kind in found else rope
    return found


def _stated(
    config: Facts, name: str, values: Mapping[str, Any], labels: Mapping[str, str], attention: float | None
) -> Iterator[tuple[str, Rope]]:
    known = labels or dict.fromkeys(LAYER_TYPES, "")
    if not any(isinstance(value, dict) for value in values.values()):
        rope = _rope(config, name, values, attention)
        if labels:
            # The base beside the scaling is that of the layers without it.
            *_, last = labels.values()
            first = next(iter(labels.values()))
            yield first, Rope(name, "default", rope.theta, rope.partial)
            rope = replace(rope, theta=None)
            yield last, rope
        elif values:
            yield "", rope
        return
    odd = [
        key for key, value in values.items() if key not in known and (isinstance(value, dict) or key not in _LEFT_OVER)
    ]
    if odd or values.get("rope_type", values.get("type")) not in (None, "default"):
        raise CheckpointError(
            f"{config.where}: {name} has objects and {shown(', '.join(odd) or 'a type')} beside each other, a layout that is "
            f"not known; expected one flat object, or objects called {', '.join(known)}"
        )
    for key, value in values.items():
        if key not in known:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{config.where}: {name}.{key} is {shown(value)}, expected an object: a GGUF of this model has no form for "
                "layers without rotary embedding"
            )
        yield known[key], _rope(config, f"{name}.{key}", value, attention)


def _rope(config: Facts, name: str, values: Mapping[str, Any], attention: float | None) -> Rope:
    """Read one flat object."""
    facts = config.within(f"{name}.", values)
    kind = facts.text("rope_type", facts.text("type", None))
    if kind != facts.text("type", kind):
        raise _contradiction(config, f"{name}.rope_type", kind, f"{name}.type", facts.find("type"))
    lists = [key for key, value in values.items() if isinstance(value, list)]
    if lists or kind not in (None, "default", "yarn"):
        what = f"{lists[0]}, a list" if lists else f"type {kind!r}"
        raise CheckpointError(
            f"{config.where}: {name} has {what}; expected yarn, or default without scaling: a GGUF of this model has no form "
            "for another"
        )
    rope = Rope(name, kind, facts.number("rope_theta", None), facts.number("partial_rotary_factor", None))
    # Its readers disagree on what it means, and programs for GGUF do not know it; but it has a type.
    facts.flag("truncate", None)
    if kind is None and "factor" in facts:
        raise facts.wrong("rope_type", "yarn, or default without scaling, beside a factor")
    if kind != "yarn":
        return rope
    spelled = {
        key: spelling
        for key, spellings in _YARN.items()
        if (spelling := next((s for s in spellings if s in facts), None)) is not None
    }
    if attention is not None:
        for spelling in _YARN["attn_factor"]:
            facts.expect(spelling, attention, "programs for a GGUF of this model assume that value and read no other")
        spelled.pop("attn_factor", None)
    return replace(
        rope,
        factor=facts.number("factor"),
        context=facts.integer("original_max_position_embeddings", least=1),
        yarn={key: facts.number(spelling) for key, spelling in spelled.items()},
        mscales={key: facts.number(key) for key in _MSCALES if key in facts},
    )
