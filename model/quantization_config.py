"""quantization_config of a config.json: the one way of quantising that checkpoints may have.

    {"quant_method": "compressed-tensors", "format": "float-quantized",
     "config_groups": {"group_0": {
         "weights": {"num_bits": 8, "type": "float", "strategy": "channel", ...},
         "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                               "dynamic": true, ...}, ...}}, "ignore": [...], ...}

e4m3 weights with a scale per output channel, and activations rounded per token while it runs. Which
layers are quantised is not read here, neither from targets nor from ignore, which may be regular
expressions of somebody else's: the types of the tensors say it (fp8_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from .config import ConfigError

__all__ = ["check_quantization"]

_FLOAT8 = {"num_bits": 8, "type": "float"}
_WEIGHTS = _FLOAT8 | {"strategy": "channel"}
_ACTIVATIONS = _FLOAT8 | {"strategy": "token", "dynamic": True}


def check_quantization(config: object) -> None:
    """Check that it is what fp8_checkpoint.py reads.

    Raises:
        ConfigError: another method, format, type or granularity, or a quantised KV cache.
    """
    name = "quantization_config"
    config = _require(name, config, {"quant_method": "compressed-tensors"})
    _require(name, {"format": "float-quantized"} | config, {"format": "float-quantized"})
    _require(name, {"kv_cache_scheme": None} | config, {"kv_cache_scheme": None})
    groups = _require(f"{name}.config_groups", config.get("config_groups"), {})
    for key, group in groups.items():
        where = f"{name}.config_groups.{key:.40}"
        group = _require(where, group, {})
        _require(f"{where}.weights", group.get("weights"), _WEIGHTS)
        _require(f"{where}.input_activations", group.get("input_activations"), _ACTIVATIONS)


def _require(name: str, value: object, wanted: Mapping[str, object]) -> dict[str, object]:
    """`value`, which must be an object with the entries `wanted`."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {name} must be an object, got {type(value).__name__}")
    for key, want in wanted.items():
        if value.get(key) != want:
            raise ConfigError(f"config: {name}.{key} must be {want!r}, got {value.get(key)!r:.80}")
    return dict(value)
