"""Rotary positions as config.json spells them: `rope_parameters` (transformers 5), `rope_theta` and `rope_scaling`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from headgrid.errors import InvalidInput
from headgrid.models.fields import Fields
from headgrid.models.files import shown
from headgrid.spec.rope import RopeScaling

MOST_POSITIONS = 1 << 31
_LARGEST = 1e18
Stretched = Literal["linear", "llama3", "yarn"]
_KINDS: Mapping[str, Stretched | None] = {
    "default": None,
    "linear": "linear",
    "llama3": "llama3",
    "yarn": "yarn",
}
_COMMON = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
_KEYS: Mapping[str | None, frozenset[str]] = {
    None: _COMMON,
    "linear": _COMMON | {"factor"},
    "llama3": _COMMON | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _COMMON
    | {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
    | {"beta_fast", "beta_slow", "truncate"},
}
_ABSENT: Mapping[str, object] = dict.fromkeys(frozenset[str]().union(*_KEYS.values()))


@dataclass(frozen=True, slots=True)
class Rotary:
    """theta, and how its frequencies are stretched."""

    theta: float
    scaling: RopeScaling | None


def rotary(config: Fields, default_theta: float = 10_000.0) -> Rotary:
    """Of a family whose layers all have the same rotary positions.

    Raises InvalidInput for kinds that we do not have and for two spellings that contradict each other.
    """
    if config.given("rope_parameters") and config.given("rope_scaling"):
        if config.object("rope_parameters") != config.object("rope_scaling"):
            raise InvalidInput(f"{config.where}: rope_parameters and rope_scaling contradict each other")
    values = config.object("rope_scaling") or config.object("rope_parameters")
    return _rotary(config, values, "rope_theta", default_theta)


def rotary_by_kind(config: Fields) -> tuple[Rotary, Rotary]:
    """Of Gemma 3: of layers with full attention, and of those with a sliding window.

    Raises InvalidInput as `rotary`, and for what transformers' versions understand differently, or not at all.
    """
    nested = config.object("rope_parameters")
    kinds = ("full_attention", "sliding_attention")
    if set(nested) - set(kinds):
        raise InvalidInput(
            f"{config.where}: rope_parameters has {shown(next(iter(set(nested) - set(kinds))))}",
            why="layers with and without a sliding window have rotary positions of their own",
            legal=kinds,
        )
    by_kind = Fields(f"{config.where}: rope_parameters", dict.fromkeys(kinds) | dict(nested))
    if nested and config.given("rope_scaling"):
        raise InvalidInput(f"{config.where} has both rope_parameters and rope_scaling", legal=("one of them",))
    values = config.object("rope_scaling") or by_kind.object("full_attention")
    if "type" in values:
        raise InvalidInput(
            f"{config.where}: rotary positions: the older key type is ambiguous for Gemma 3",
            why="transformers 4 obeys it, transformers 5 does not",
            legal=("rope_type",),
        )
    full = _rotary(config, values, "rope_theta", 1_000_000.0)
    local = _rotary(config, by_kind.object("sliding_attention"), "rope_local_base_freq", 10_000.0)
    if local.scaling is not None:
        raise InvalidInput(f"{config.where}: rotary positions of layers with a sliding window are not stretched")
    if full.scaling is not None and not full.scaling.truncate:
        raise InvalidInput(
            f"{config.where}: truncate = False is not supported",
            why="transformers does not look at it where layers have different rotary positions",
        )
    return full, local


def _rotary(config: Fields, values: Mapping[str, object], theta_key: str, default_theta: float) -> Rotary:
    """`theta_key` is where theta is, if not among the values."""
    rope = Fields(f"{config.where}: rotary positions", {**_ABSENT, **values})
    kind = _kind(rope)
    unknown = sorted(key for key in values if key not in _KEYS[kind])
    if unknown:
        raise InvalidInput(
            f"{rope.where}: {shown(unknown[0])} is not known with rope_type {kind or 'default'}",
            legal=tuple(sorted(_KEYS[kind])),
        )
    for each in (config, rope):
        if each.given("partial_rotary_factor") and each.number("partial_rotary_factor", _LARGEST) != 1:
            each.refuse("partial_rotary_factor", "1: these families turn whole heads")
    theta = default_theta
    for each, key in ((config, theta_key), (rope, "rope_theta")):
        theta = each.number(key, _LARGEST, above=1) if each.given(key) else theta
    if config.given(theta_key) and rope.given("rope_theta") and config.number(theta_key, _LARGEST) != theta:
        config.refuse(theta_key, f"the {theta:g} that the rotary positions have")
    return Rotary(theta, _scaling(kind, rope, config.whole("max_position_embeddings", MOST_POSITIONS)))


def _kind(rope: Fields) -> Stretched | None:
    """`rope_type`, which older files call `type`; None for positions that are not stretched."""
    spelled = [key for key in ("rope_type", "type") if rope.given(key)]
    kinds: list[Stretched | None] = [rope.choice(key, _KINDS) for key in spelled]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        rope.refuse("type", f"the {rope.values['rope_type']} of rope_type")
    return kinds[0] if kinds else None


def _scaling(kind: Stretched | None, rope: Fields, max_positions: int) -> RopeScaling | None:
    if kind is None:
        return None
    original = max_positions
    if rope.given("original_max_position_embeddings"):
        original = rope.whole("original_max_position_embeddings", MOST_POSITIONS)
    if kind == "yarn":
        return _yarn(rope, original, max_positions)
    if kind == "linear":
        return RopeScaling(kind=kind, factor=rope.number("factor", _LARGEST))
    return RopeScaling(
        kind=kind,
        factor=rope.number("factor", _LARGEST),
        original_positions=original,
        low_factor=rope.number("low_freq_factor", _LARGEST),
        high_factor=rope.number("high_freq_factor", _LARGEST),
    )


def _yarn(rope: Fields, original: int, max_positions: int) -> RopeScaling:
    def number(key: str) -> float | None:
        """None where there is null or 0, which say the same."""
        value = rope.values[key]
        return None if value is None or (value == 0 and value is not False) else rope.number(key, _LARGEST)

    factor = rope.number("factor", _LARGEST) if rope.given("factor") else max_positions / original
    mscale, mscale_all = number("mscale"), number("mscale_all_dim")
    if rope.given("attention_factor"):
        amplitude = rope.number("attention_factor", _LARGEST)
    elif mscale and mscale_all:
        amplitude = _amplitude(factor, mscale) / _amplitude(factor, mscale_all)
    else:
        amplitude = _amplitude(factor, 1.0)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_positions=original,
        beta_fast=number("beta_fast") or 32.0,
        beta_slow=number("beta_slow") or 1.0,
        attention_factor=amplitude,
        truncate=rope.flag("truncate") if rope.given("truncate") else True,
    )


def _amplitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
