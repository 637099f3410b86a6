"""Generation options: the part of transformers' GenerationConfig that a Llama needs."""

import copy
import difflib
import json
import math
import os
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..checkpoints import open_checkpoint
from ..checkpoints.huggingface import read_json, write_json
from ..checkpoints.meta import is_meta
from ..checkpoints.where import find, hub_options

FILE = "generation_config.json"
METADATA = ("transformers_version", "_from_model_config", "_commit_hash")
OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")

# Unsupported options of transformers, with the values at which each has no effect.
REFUSED: dict[str, tuple] = {
    "penalty_alpha": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "forced_decoder_ids": (),
    "dola_layers": (),
    "watermarking_config": (),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
}
# Options of transformers that do not affect the tokens a Llama generates: kept but ignored.
WITHOUT_EFFECT = {
    "assistant_lookbehind",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "generation_kwargs",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "target_lookbehind",
    *METADATA,
}


class GenerationConfig:
    """The options of `generate`, with the names and defaults of transformers.

    Options that are not set have their defaults, and setting one to None unsets it: null in a file of transformers 5
    means the same as no entry. `given` tells whether an option was set, where that matters: `max_length` counts the
    prompt, but its default stands for 20 new tokens (`total_length`).

    Unknown keys are kept when they come from a file, and rejected as keywords.

    Raises:
        ValueError: an option has an illegal value, conflicts with another, is not supported, or does not exist.
    """

    max_length: int = 20  # prompt included
    max_new_tokens: int | None = None  # takes precedence over max_length
    min_length: int = 0
    min_new_tokens: int | None = None
    early_stopping: bool | str = False
    max_time: float | None = None  # seconds
    stop_strings: str | list[str] | None = None

    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    use_cache: bool = True
    cache_implementation: str | None = None  # None is "dynamic"
    prefill_chunk_size: int | None = None  # prompt tokens per forward pass, to save memory; None is all of them

    temperature: float = 1.0
    top_k: int = 50  # 0 keeps all
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: list[list[int]] | None = None
    sequence_bias: dict[tuple[int, ...], float] | list | None = None  # or [[[ids], bias], ...], as in a file
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | list[int] | None = None
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None  # first new token affected, factor
    suppress_tokens: list[int] | None = None
    begin_suppress_tokens: list[int] | None = None
    guidance_scale: float | None = None

    output_attentions: bool = False
    output_hidden_states: bool = False
    output_scores: bool = False
    output_logits: bool = False
    return_dict_in_generate: bool = False
    return_legacy_cache: bool | None = None

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 20
    num_assistant_tokens_schedule: str = "constant"
    assistant_confidence_threshold: float = 0.4

    def __init__(self, **kwargs: Any):
        _refuse(self.update(**kwargs))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in FIELDS and hasattr(type(self), name):
            raise ValueError(f"`{name}` is not a generation option, and cannot be kept under that name")
        if hasattr(value, "tolist"):  # tensors, arrays and NumPy scalars are not JSON-serializable
            value = value.tolist()
        if value is None and name in FIELDS:
            vars(self).pop(name, None)
        else:
            super().__setattr__(name, value)

    def given(self, name: str) -> bool:
        """Whether the option was set, even if to its default."""
        return name in vars(self)

    def total_length(self, prompt_length: int, max_position_embeddings: int | None = None) -> int:
        """The length, prompt included, at which generation stops.

        That is `max_new_tokens` beyond the prompt if set, else `max_length` if set, else 20 beyond the prompt, as in
        transformers 5 (20 in all in version 4), but then at most `max_position_embeddings`.
        """
        if self.max_new_tokens is not None:
            return prompt_length + self.max_new_tokens
        if self.given("max_length"):
            return self.max_length
        return min(prompt_length + self.max_length, max_position_embeddings or prompt_length + self.max_length)

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Set options and return the keywords that are not options. An error leaves the config unchanged.

        Args:
            defaults_only: set only options that were not set before.
            allow_custom_entries: also set keywords that are not options.
        """
        new, unused = copy.copy(self), {}
        for name, value in kwargs.items():
            if not (name in KNOWN or self.given(name) or allow_custom_entries):
                unused[name] = value
            elif not (defaults_only and self.given(name)):
                setattr(new, name, value)
        new.validate()
        vars(self).clear()
        vars(self).update(vars(new))
        return unused

    def validate(self) -> None:
        """Raise a ValueError that names the first option with an illegal value, and what is legal."""
        for name, neutral in REFUSED.items():
            value = vars(self).get(name)
            if value is not None and value not in neutral:
                raise ValueError(f"`{name}` is not supported, but is {value!r}; leave it out")
        for name in LEGAL:
            value = getattr(self, name)
            if name == "temperature" and value == 0 and not self.do_sample:
                continue  # found in the files of models that are to be greedy
            if value is not None:
                check(name, value)
        if self.num_return_sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise ValueError(
                "Greedy methods (do_sample != True) without beam search do not support `num_return_sequences` "
                f"different than 1 (got {self.num_return_sequences})"
            )
        if self.num_return_sequences > self.num_beams > 1:
            raise ValueError(
                f"`num_return_sequences` has to be smaller or equal to `num_beams` ({self.num_beams}), "
                f"but is {self.num_return_sequences}"
            )
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            forced = {forced} if isinstance(forced, Integral) else set(forced or ())
            if forced and forced <= set(self.suppress_tokens or ()):
                raise ValueError(f"`{name}` ({sorted(forced)}) is also in `suppress_tokens`: no token would be left")

    def to_dict(self) -> dict[str, Any]:
        """Every option, None if it was not set, and unknown keys."""
        return dict.fromkeys(FIELDS) | self.to_diff_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Only the options that were set, and unknown keys."""
        return copy.deepcopy(vars(self))

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """What `save_pretrained` writes; `ignore_metadata` leaves out version and origin."""
        data = _jsonable(self.to_diff_dict() if use_diff else self.to_dict())
        data = {name: value for name, value in data.items() if not (ignore_metadata and name in METADATA)}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        return self.to_json_string(ignore_metadata=True) == other.to_json_string(ignore_metadata=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(ignore_metadata=True)}"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "GenerationConfig":
        """Build a config from the contents of a file, unknown keys included; `kwargs` override them."""
        config = cls()
        for name, value in config_dict.items():
            setattr(config, name, copy.deepcopy(value))
        _refuse(config.update(**kwargs))
        return config

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], config_file_name: str = FILE, **kwargs: Any
    ) -> "GenerationConfig":
        """Load the config of a model's folder, written by transformers 4 or 5 or by llama, or of a Hugging Face id. A
        `.gguf` file and a folder in Meta's format have none, so it is derived from the checkpoint.

        Args:
            kwargs: options, which override those of the file; and for the Hub `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`, `subfolder`.
        """
        place = find(folder, wanted=config_file_name, **hub_options(kwargs))
        path = place / config_file_name
        derived = place.is_file() or (place.is_dir() and is_meta(place) and not path.exists())
        data = open_checkpoint(place).generation_config if derived else read_json(path)
        try:
            return cls.from_dict(data, **kwargs)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str], config_file_name: str = FILE) -> None:
        """Write the config to `folder`, atomically, in a form that transformers 4 and 5 read."""
        self.validate()
        path = Path(folder) / config_file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            write_json(partial, _jsonable(self.to_diff_dict()))
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "GenerationConfig":
        """Take the generation options of a model's configuration (or its dict): special tokens, in old files more."""
        data = model_config if isinstance(model_config, dict) else model_config.to_dict()
        said = {name: data[name] for name in FIELDS if data.get(name) not in (None, getattr(cls, name))}
        if any(name in said for name in OUTPUTS):
            said["return_dict_in_generate"] = True
        return cls(**said, _from_model_config=True)


def own_copy(config: Any) -> GenerationConfig:
    """Copy `config`, converting it if it is transformers', where an option that is None was not set.

    Raises:
        ValueError: it is not a GenerationConfig.
    """
    if isinstance(config, GenerationConfig):
        return copy.deepcopy(config)
    if not hasattr(config, "to_diff_dict"):
        raise ValueError(f"generation_config must be a GenerationConfig, got {type(config).__name__}")
    return GenerationConfig.from_dict({k: v for k, v in config.to_diff_dict().items() if v is not None})


FIELDS = tuple(GenerationConfig.__annotations__)
KNOWN = {*FIELDS, *REFUSED, *WITHOUT_EFFECT}


def _jsonable(data: dict[str, Any]) -> dict[str, Any]:
    """`data` as transformers 4 and 5 read it: JSON keys cannot be tuples, and in 4 "dynamic" is to be left out."""
    if isinstance(bias := data.get("sequence_bias"), dict):
        data = data | {"sequence_bias": [[list(ids), value] for ids, value in bias.items()]}
    return {name: value for name, value in data.items() if (name, value) != ("cache_implementation", "dynamic")}


def whole(value: Any, least: int = 0) -> bool:
    """Whether `value` is an integer of at least `least`, other than True and False."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def real(value: Any) -> bool:
    """Whether `value` is a number other than NaN, True and False."""
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)


def token_ids(value: Any) -> bool:
    """Whether `value` is a list of token ids."""
    return isinstance(value, list | tuple) and all(whole(token) for token in value)


def biases(value: Any) -> bool:
    """Whether `value` is {(ids): bias, ...} or [[[ids], bias], ...], and not empty."""
    if isinstance(value, dict):
        value = [(ids, bias) for ids, bias in value.items()]
    if not isinstance(value, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        return False
    return bool(value) and all(token_ids(ids) and ids and real(bias) for ids, bias in value)


def texts(value: Any) -> bool:
    """Whether `value` is a string or a list of strings, none of them empty."""
    value = [value] if isinstance(value, str) else value
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(text, str) and text for text in value)


Check = tuple[Callable[[Any], bool], str]


def _at_least(least: int) -> Check:
    return lambda value: whole(value, least), f"an integer of at least {least}"


def _number(wanted: str, legal: Callable[[Any], bool] = lambda value: True) -> Check:
    return lambda value: real(value) and legal(value), wanted


def _one_of(*values: Any) -> Check:
    return lambda value: any(type(value) is type(v) and value == v for v in values), f"one of {values}"


def _ids(least: int) -> Check:
    one = lambda value: whole(value, least)  # noqa: E731
    some = lambda value: isinstance(value, list | tuple) and bool(value) and all(map(one, value))  # noqa: E731
    return lambda value: one(value) or some(value), "a token id or a non-empty list of token ids"


_IDS: Check = token_ids, "a list of token ids"
_ID: Check = lambda value: whole(value, -1), "a token id, or -1 for none"

# The legal values of each option; None, which unsets it, is always legal.
LEGAL: dict[str, Check] = {
    "max_length": _at_least(1),
    "max_new_tokens": _at_least(1),
    "min_length": _at_least(0),
    "min_new_tokens": _at_least(0),
    "early_stopping": _one_of(True, False, "never"),
    "max_time": _number("a number of seconds, at least 0", lambda value: value >= 0),
    "stop_strings": (texts, "a non-empty string or a non-empty list of them"),
    "num_beams": _at_least(1),
    "num_return_sequences": _at_least(1),
    "cache_implementation": _one_of("dynamic", "static"),
    "prefill_chunk_size": _at_least(1),
    "temperature": _number(
        "a strictly positive float (for greedy decoding set do_sample=False)", lambda value: 0 < value < math.inf
    ),
    "top_k": _at_least(0),
    "top_p": _number("a float from 0 to 1", lambda value: 0 <= value <= 1),
    "min_p": _number("a float from 0 to 1", lambda value: 0 <= value <= 1),
    "typical_p": _number("a float above 0 and at most 1", lambda value: 0 < value <= 1),
    "epsilon_cutoff": _number("a float of at least 0 and below 1", lambda value: 0 <= value < 1),
    "eta_cutoff": _number("a float of at least 0 and below 1", lambda value: 0 <= value < 1),
    "repetition_penalty": _number("a strictly positive float", lambda value: 0 < value < math.inf),
    "length_penalty": _number("a float"),
    "no_repeat_ngram_size": _at_least(0),
    "bad_words_ids": (
        lambda value: isinstance(value, list) and bool(value) and all(token_ids(ids) and ids for ids in value),
        "a non-empty list of non-empty lists of token ids",
    ),
    "sequence_bias": (biases, "a non-empty dict {(ids): bias} or list [[[ids], bias]] of token ids and floats"),
    "forced_bos_token_id": _at_least(0),
    "forced_eos_token_id": _ids(0),
    "exponential_decay_length_penalty": (
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and whole(value[0]) and real(value[1]),
        "(start, factor), an integer of at least 0 and a float",
    ),
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "guidance_scale": _number("a float"),
    "pad_token_id": _ID,
    "bos_token_id": _ID,
    "eos_token_id": _ids(-1),  # -1 never occurs
    "prompt_lookup_num_tokens": _at_least(1),
    "max_matching_ngram_size": _at_least(1),
    "num_assistant_tokens": _at_least(1),
    "num_assistant_tokens_schedule": _one_of("constant", "heuristic", "heuristic_transient"),
    "assistant_confidence_threshold": _number("a float from 0 to 1", lambda value: 0 <= value <= 1),
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "return_dict_in_generate",
         "return_legacy_cache", *OUTPUTS),
        _one_of(True, False),
    ),
}  # fmt: skip


def _refuse(unknown: dict[str, Any]) -> None:
    """Raise a ValueError that names the first keyword in `unknown` and suggests a similar option."""
    for name in unknown:
        near = difflib.get_close_matches(name, FIELDS, 1)
        raise ValueError(f"`{name}` is not a generation option" + (f"; did you mean `{near[0]}`?" if near else ""))


def check(name: str, value: Any) -> Any:
    """Return `value`, or raise a ValueError that names the option if the value is not legal."""
    legal, wanted = LEGAL[name]
    require(legal(value), name, wanted, value)
    return value


def require(legal: bool, name: str, wanted: str, value: Any) -> None:
    if not legal:
        raise ValueError(f"`{name}` has to be {wanted}, but is {value!r}")
