"""Encoding options and their validation."""

import logging
from dataclasses import dataclass
from operator import index
from typing import Any

LARGE = 10**20  # a `model_max_length` above this means no limit
VERY_LARGE = 10**30
PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")

logger = logging.getLogger(__name__)


def one_of(name: str, value: Any, legal: tuple[str, ...]) -> str:
    value = getattr(value, "value", value)  # transformers' enums
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, True or False, got {value!r}")
    return value


def whole(name: str, value: Any, least: int) -> int:
    """Convert `value`, an int or a NumPy integer, to an int.

    Raises:
        ValueError: it is not an integer, or below `least`.
    """
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return number


@dataclass(kw_only=True)
class Options:
    """The encoding options of `__call__`, named as in transformers.

    Args:
        add_special_tokens: add the special tokens that the model expects around a text.
        padding: True or "longest" pads to the longest text, "max_length" to `max_length`.
        truncation: True or "longest_first" truncates to `max_length`, in a pair the longer text first; "only_first" and
            "only_second" truncate only that text of a pair.
        max_length: in tokens, special tokens included. Default: `model_max_length`.
        stride: overlap, in tokens, of the parts of a text that `return_overflowing_tokens` returns.
        is_split_into_words: texts are lists of words, each encoded separately.
        pad_to_multiple_of: pad to a multiple of this length.
        padding_side: "left" or "right". Default: the tokenizer's.
        return_tensors: "np" or "pt"; None returns lists.
        split_special_tokens: encode special tokens that occur in the text as ordinary text.
    """

    add_special_tokens: bool = True
    padding: Any = False
    truncation: Any = None
    max_length: int | None = None
    stride: int = 0
    is_split_into_words: bool = False
    pad_to_multiple_of: int | None = None
    padding_side: str | None = None
    return_tensors: str | None = None
    return_token_type_ids: bool | None = None
    return_attention_mask: bool | None = None
    return_overflowing_tokens: bool = False
    return_special_tokens_mask: bool = False
    return_offsets_mapping: bool = False
    return_length: bool = False
    verbose: bool = True
    split_special_tokens: bool | None = None

    def resolve(self, tokenizer: Any) -> "Options":
        """Validate the options, and replace defaults and shorthands with their effective values."""
        given = self.max_length is not None
        if given:
            self.max_length = whole("max_length", self.max_length, 0)
        if self.stride != 0:
            self.stride = whole("stride", self.stride, 0)
        if self.truncation is None:
            # as in transformers: max_length truncates by itself, but not when it is there for padding
            self.truncation = given and self.padding is False
        said = {True: "longest_first", False: "do_not_truncate"}
        self.truncation = one_of("truncation", said.get(self.truncation, self.truncation), TRUNCATIONS)
        said = {True: "longest", False: "do_not_pad"}
        self.padding = one_of("padding", said.get(self.padding, self.padding), PADDINGS)
        if not given and (self.padding == "max_length" or self.truncation != "do_not_truncate"):
            self._take_models(tokenizer)
        if self.padding != "do_not_pad" and tokenizer.pad_token_id is None:
            raise ValueError(
                "Asking to pad but the tokenizer does not have a padding token. Set `pad_token`, e.g. to `eos_token`, "
                "or add one with tokenizer.add_special_tokens({'pad_token': '<pad>'})"
            )
        if self.padding_side is None:
            self.padding_side = tokenizer.padding_side
        check_side("padding_side", self.padding_side)
        multiple = self.pad_to_multiple_of
        if multiple is not None:
            multiple = self.pad_to_multiple_of = whole("pad_to_multiple_of", multiple, 1)
        both = self.padding != "do_not_pad" and self.truncation != "do_not_truncate"
        if both and multiple and self.max_length is not None and self.max_length % multiple:
            raise ValueError(f"max_length ({self.max_length}) must be a multiple of pad_to_multiple_of ({multiple})")
        if self.return_tensors not in (None, "np", "pt"):
            raise ValueError(f'return_tensors must be "pt", "np" or None, got {self.return_tensors!r}')
        if self.return_attention_mask is None:
            self.return_attention_mask = "attention_mask" in tokenizer.model_input_names
        if self.return_token_type_ids is None:
            self.return_token_type_ids = "token_type_ids" in tokenizer.model_input_names
        if self.split_special_tokens is None:
            self.split_special_tokens = tokenizer.split_special_tokens
        return self

    @property
    def is_plain(self) -> bool:
        """Whether only ids and attention masks are requested, without truncation or padding."""
        more = (
            self.return_overflowing_tokens, self.return_special_tokens_mask, self.return_offsets_mapping,
            self.return_length, self.return_token_type_ids,
        )  # fmt: skip
        return self.padding == "do_not_pad" and self.truncation == "do_not_truncate" and not any(more)

    def _take_models(self, tokenizer: Any) -> None:
        """Use `model_max_length` as `max_length`; if there is none, do not truncate or pad to it."""
        if tokenizer.model_max_length <= LARGE:
            self.max_length = tokenizer.model_max_length
            return
        for name, none in (("padding", "do_not_pad"), ("truncation", "do_not_truncate")):
            if getattr(self, name) not in (none, "longest"):
                logger.warning("%s has no effect: neither max_length nor model_max_length is set", name)
                setattr(self, name, none)


def check_side(name: str, side: Any) -> str:
    if side not in ("left", "right"):
        raise ValueError(f'{name} must be "left" or "right", got {side!r}')
    return side
