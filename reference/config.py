"""The hyperparameters of a LLaMA and their validation."""

import difflib
import math
import sys
import warnings
from dataclasses import dataclass, fields
from typing import Any

from .feed_forward import ACTIVATIONS

# Keys of `rope_parameters` by RoPE type: (required, optional); `rope_theta` is always optional. longrope's lists hold
# one factor for each of the head_dim / 2 frequencies.
ROPE_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, {"original_max_position_embeddings"}),  # accepted but unused, as in transformers
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor", "original_max_position_embeddings"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
}
ROPE_RANGES: dict[str, dict[str, float]] = {
    "rope_theta": {"above": 1},
    "factor": {"low": 1},
    "low_freq_factor": {"above": 0},
    "high_freq_factor": {"above": 0},
}
# Keys of other types, or found in published configurations, are ignored with a warning; any other key is an error.
NAMES_OF_OTHERS = {"finetuned"}.union(*(required | optional for required, optional in ROPE_KEYS.values()))


@dataclass(frozen=True)
class Config:
    """transformers' `LlamaConfig`, field by field: same names, same defaults (those of LLaMA 7B).

    `num_key_value_heads` defaults to `num_attention_heads`, `head_dim` to `hidden_size // num_attention_heads`.
    `rope_parameters` is transformers 5's spelling; `from_dict` also accepts 4.x's `rope_theta` and `rope_scaling`.
    An invalid value raises a `ValueError` that names its field.

    The fields from `bos_token_id` on are validated and stored, but do not change what `forward` computes.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # set in __post_init__, never None afterwards
    head_dim: int = None  # type: ignore[assignment]  # likewise
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any] = None  # type: ignore[assignment]  # likewise
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = None
    num_labels: int = 2
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    use_cache: bool = True
    pretraining_tp: int = 1

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings", "num_labels", "pretraining_tp"):  # fmt: skip
            _check_positive_int(name, getattr(self, name))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                    f"({self.num_attention_heads}), or head_dim must be given"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _check_positive_int("num_key_value_heads", self.num_key_value_heads)
        _check_positive_int("head_dim", self.head_dim, high=2**16)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, since RoPE rotates pairs; got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads}): every key/value head serves an equal group of query heads"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown; choose from {', '.join(sorted(ACTIVATIONS))}")
        _check_number("rms_norm_eps", self.rms_norm_eps, low=0)
        _check_number("initializer_range", self.initializer_range, low=0, high=1)
        _check_number("attention_dropout", self.attention_dropout, low=0, high=1)
        for name in ("rms_norm_eps", "initializer_range", "attention_dropout"):
            object.__setattr__(self, name, float(getattr(self, name)))  # a NumPy float64 would promote float32 arrays
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if not all(i is None or _is_int(i) for i in ids):
                raise ValueError(f"{name} must be a token id or null, got {value!r}")
        object.__setattr__(self, "rope_parameters", self._checked_rope(self.rope_parameters))

    def _checked_rope(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """Return `given` with its type and defaults filled in; raise `ValueError` if it is invalid."""
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"rope_parameters must be a dictionary, got {given!r}")
        rope = {key: value for key, value in (given or {}).items() if value is not None}
        legacy_kind = rope.pop("type", "default")
        kind = rope.pop("rope_type", legacy_kind)
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise ValueError(f"rope_type {kind!r} is unknown; choose from {', '.join(ROPE_KEYS)}")
        if rope.pop("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("partial_rotary_factor must be 1.0: LLaMA rotates the whole head")
        rope.setdefault("rope_theta", 10000.0)

        if kind in ("yarn", "longrope", "llama3"):
            original = rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
            _check_positive_int("rope_parameters['original_max_position_embeddings']", original, low=2)
            if kind != "llama3" and original != self.max_position_embeddings:
                rope.setdefault("factor", self.max_position_embeddings / original)
        required, optional = ROPE_KEYS[kind]
        if missing := required - rope.keys():
            raise ValueError(f"rope_parameters of type {kind!r} lack {', '.join(sorted(missing))}")
        known = required | optional | {"rope_theta"}
        if unused := rope.keys() - known:
            what = f"rope_parameters of type {kind!r} do not accept {', '.join(sorted(unused))}"
            if unused - NAMES_OF_OTHERS:
                raise ValueError(f"{what}; valid keys are {', '.join(sorted(known))}")
            warnings.warn(what, stacklevel=4)
            rope = {key: value for key, value in rope.items() if key in known}

        for key, value in rope.items():
            name = f"rope_parameters[{key!r}]"
            if key in ("short_factor", "long_factor"):
                if not isinstance(value, list) or len(value) != self.head_dim // 2:
                    length = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
                    raise ValueError(f"{name} must contain head_dim / 2 = {self.head_dim // 2} numbers, got {length}")
                for number in value:
                    _check_number(f"each number of {name}", number, above=0)
            elif key == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, got {value!r}")
            elif key == "original_max_position_embeddings":
                _check_positive_int(name, value)
            elif kind == "longrope" and key == "factor":  # usually the ratio of two lengths; may be below 1
                _check_number(name, value, above=0)
            else:
                _check_number(name, value, **ROPE_RANGES.get(key, {"low": 0}))
        if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
            raise ValueError(
                f"rope_parameters['low_freq_factor'] ({rope['low_freq_factor']}) must be below "
                f"['high_freq_factor'] ({rope['high_freq_factor']})"
            )
        return {"rope_type": kind} | rope

    @property
    def angles_follow_length(self) -> bool:
        """Whether RoPE's angles depend on the length of the text, which must then be processed in one pass."""
        rope = self.rope_parameters
        return rope["rope_type"] == "dynamic" or rope.get("short_factor") != rope.get("long_factor")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Config":
        """Build a Config from the contents of a config.json, as written by transformers 4.x or 5.x.

        Keys that do not affect the computation (`architectures`, `torch_dtype` ...) are ignored, but a likely
        misspelling of a field raises an error. Both spellings of RoPE are accepted: `rope_theta` and `rope_scaling`
        (`type` or `rope_type`), or `rope_parameters`; given both, `rope_scaling` wins, as in transformers.
        """
        if not isinstance(data, dict):
            raise ValueError(f"a configuration must be a dictionary, got {type(data).__name__}")
        if data.get("model_type") not in (None, "llama"):
            raise ValueError(f"model_type is {data['model_type']!r}; only 'llama' models can be read")
        rope = data.get("rope_scaling") or data.get("rope_parameters")
        if rope is not None and not isinstance(rope, dict):
            raise ValueError(f"rope_scaling must be a dictionary, got {rope!r}")
        rope = dict(rope or {})
        if data.get("rope_theta") is not None:
            rope.setdefault("rope_theta", data["rope_theta"])
        if data.get("partial_rotary_factor") is not None:
            rope.setdefault("partial_rotary_factor", data["partial_rotary_factor"])
        scaled = rope.get("rope_type", rope.get("type")) in ("yarn", "longrope", "llama3")
        if scaled and data.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = data["original_max_position_embeddings"]

        if not data.get("model_type") and data.get("architectures") and "Llama" not in str(data["architectures"]):
            raise ValueError(f"architectures are {data['architectures']}; only Llama models can be read")
        known = {field.name for field in fields(cls)}
        for key in data.keys() - known:
            if meant := difflib.get_close_matches(key, known, n=1, cutoff=0.92):
                raise ValueError(f"{key} is unknown; did you mean {meant[0]}?")
        values = {key: value for key, value in data.items() if key in known}
        if data.get("id2label") and isinstance(data["id2label"], dict):
            values["num_labels"] = len(data["id2label"])
        for name in ("pretraining_tp", "attention_dropout"):  # null means the default in transformers
            if values.get(name, 0) is None:
                del values[name]
        return cls(**(values | {"rope_parameters": rope}))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_positive_int(name: str, value: Any, low: int = 1, high: int = 2**31 - 1) -> None:
    if not _is_int(value) or not low <= value <= high:
        wanted = "a positive integer" if low == 1 else f"an integer of at least {low}"
        if _is_int(value) and value > high:
            wanted = f"at most {high}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _check_number(name: str, value: Any, low=-math.inf, high=math.inf, above=-math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not number or not low <= value <= high or not value > above:
        bounds = [f"above {above:g}"] * (above > -math.inf) + [f"of at least {low:g}"] * (low > -math.inf)
        bounds += [f"at most {high:g}"] * (high < math.inf)
        raise ValueError(f"{name} must be a number {' and '.join(bounds)}, got {value!r}")
