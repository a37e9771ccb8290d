"""Rotary positions in `config.json`: `rope_parameters`, flat or by type of layer, and the older `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.models.llama_config import LlamaConfig
from jaxcl.models.rotary import RopeScaling
from jaxcl.weights.families.base import Fields, HfConfig

FULL, WINDOW = "full_attention", "sliding_attention"
_TYPES = ("default", "linear", "llama3", "dynamic", "yarn", "longrope")
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}


def read_rope(config: HfConfig, *, theta: float, window_theta: float | None = None, partial: bool = False) -> Fields:
    """Fields for rotary positions.

    Args:
      config: the file.
      theta: base that it means if it gives none.
      window_theta: the same for layers with a window, where these have frequencies of their own, unstretched.
      partial: whether the family can rotate a share of a head.

    Raises:
      UserError: a rule that jaxcl lacks, or a missing key.
    """
    given = config.get("rope_parameters", {})
    by_type = {name: given[name] for name in (FULL, WINDOW) if isinstance(given.get(name), Mapping)}
    rope = by_type.get(FULL, {}) if by_type else given or config.get("rope_scaling", {})
    base = rope.get("rope_theta") or config.get("rope_theta", theta)
    fields = {"rope_theta": base, "rope_scaling": _read_scaling(config, rope)}
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial:
        fields["rotary_share"] = share
    elif share != 1.0:
        raise UserError(f"{config.where}: partial_rotary_factor={share} is not supported; allowed is 1.0")
    if window_theta is not None:
        local = by_type.get(WINDOW, {})
        if (kind := _kind(local)) != "default":
            raise UserError(f"{config.where}: rope_type={kind} in {WINDOW} is not supported; allowed is default")
        fields["window_rope_theta"] = local.get("rope_theta") or config.get("rope_local_base_freq", window_theta)
    elif WINDOW in by_type and by_type[WINDOW] != by_type.get(FULL):
        raise UserError(f"{config.where}: rope_parameters that differ by type of layer are not supported here")
    return fields


def _kind(rope: Mapping[str, Any]) -> str:
    # Older files call the key `type`, and longrope `su`.
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    return "longrope" if kind == "su" else kind


def _read_scaling(config: HfConfig, rope: Mapping[str, Any]) -> Fields | None:
    kind, longest = _kind(rope), config.get("max_position_embeddings", 2048)
    if kind not in _TYPES:
        raise UserError(f"{config.where}: rope_type={kind} is not supported; allowed are {', '.join(_TYPES)}")
    if kind == "default":
        return None
    original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings", longest)
    stretch = rope.get("factor") or longest / original
    try:
        fields: Fields = {"type": kind}
        if kind != "longrope":
            fields["factor"] = stretch if kind == "yarn" else rope["factor"]
        if kind == "llama3":
            fields |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            fields |= {key: default if rope.get(key) is None else rope[key] for key, default in _YARN.items()}
        if kind == "longrope":
            fields |= {f"{name}_factors": tuple(rope[f"{name}_factor"]) for name in ("short", "long")}
    except KeyError as error:
        raise UserError(f"{config.where}: rope_scaling: the key {error} is missing") from None
    if kind in ("yarn", "longrope"):
        fields["attention_factor"] = rope.get("attention_factor") or _attention_factor(kind, rope, stretch, original)
    if kind != "linear":
        fields["original_max_length"] = longest if kind == "dynamic" else original
    return fields


def _attention_factor(kind: str, rope: Mapping[str, Any], stretch: float, original: int) -> float:
    """What the papers suggest where a file gives none (arXiv 2309.00071, section 3.4; arXiv 2402.13753)."""
    if stretch <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(stretch) / math.log(original))
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    if above and below:
        return (0.1 * above * math.log(stretch) + 1) / (0.1 * below * math.log(stretch) + 1)
    return 0.1 * math.log(stretch) + 1


def write_rope(config: LlamaConfig) -> Fields:
    """The keys that all releases of transformers understand."""
    scaling = config.rope_scaling
    keys: Fields = {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else write_scaling(scaling),
    }
    return keys | ({"partial_rotary_factor": config.rotary_share} if config.rotary_share != 1 else {})


def write_scaling(scaling: RopeScaling) -> Fields:
    """The object `rope_scaling`."""
    rope: Fields = {"rope_type": scaling.type}
    if scaling.type != "longrope":
        rope["factor"] = scaling.factor
    if scaling.type == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.type == "yarn":
        rope |= {key: getattr(scaling, key) for key in _YARN}
    if scaling.type == "longrope":
        rope |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.type in ("yarn", "longrope"):
        rope["attention_factor"] = scaling.attention_factor
    if scaling.type not in ("linear", "dynamic"):
        rope["original_max_position_embeddings"] = scaling.original_max_length
    return rope
