"""The options of encoding, checked."""

import logging
from dataclasses import dataclass
from operator import index
from typing import Any

LARGE = 10**20  # a `model_max_length` above this means that there is none
VERY_LARGE = 10**30
PADDINGS = ("longest", "max_length", "do_not_pad")
TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")

logger = logging.getLogger(__name__)


def one_of(name: str, value: Any, legal: tuple[str, ...]) -> str:
    value = getattr(value, "value", value)  # transformers' own enumerations
    if value not in legal:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, legal))}, True or False, got {value!r}")
    return value


def whole(name: str, value: Any, least: int) -> int:
    """`value`, an int or a NumPy integer, as an int.

    Raises:
        ValueError: it is none, or below `least`.
    """
    try:
        number = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        number = -1
    if number < least:
        raise ValueError(f"{name} must be a whole number of tokens, at least {least}, got {value!r}")
    return number


@dataclass(kw_only=True)
class Options:
    """The arguments of `__call__` that say how, under transformers' names.

    Args:
        add_special_tokens: put the tokens around a text that the model expects there.
        padding: True or "longest" fills shorter texts up; "max_length" all to `max_length`.
        truncation: True or "longest_first" shortens what is longer than `max_length`, of a pair the longer one;
            "only_first" and "only_second" always the same one.
        max_length: in tokens, with special ones. Default: `model_max_length`.
        stride: how many tokens the parts of a text share that `return_overflowing_tokens` gives.
        is_split_into_words: texts are lists of words, each encoded by itself.
        pad_to_multiple_of: fill up to a multiple of this length.
        padding_side: "left" or "right", instead of the tokenizer's.
        return_tensors: "np" or "pt"; None gives lists.
        split_special_tokens: whether special tokens written in the text are text like any other.
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
        """Put the values in force in place of defaults and shorthands."""
        given = self.max_length is not None
        if given:
            self.max_length = whole("max_length", self.max_length, 0)
        if self.stride != 0:
            self.stride = whole("stride", self.stride, 0)
        if self.truncation is None:
            # as transformers has it: a length alone cuts, and one for padding does not
            self.truncation = given and self.padding is False
        said = {True: "longest_first", False: "do_not_truncate"}
        self.truncation = one_of("truncation", said.get(self.truncation, self.truncation), TRUNCATIONS)
        said = {True: "longest", False: "do_not_pad"}
        self.padding = one_of("padding", said.get(self.padding, self.padding), PADDINGS)
        if not given and (self.padding == "max_length" or self.truncation != "do_not_truncate"):
            self._take_models(tokenizer)
        if self.padding != "do_not_pad" and tokenizer.pad_token_id is None:
            raise ValueError(
                "Asking to pad but the tokenizer does not have a padding token. Set `pad_token`, to `eos_token` say, "
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
        """Whether only ids and attention masks are asked for, and nothing is to be cut or filled up."""
        more = (
            self.return_overflowing_tokens, self.return_special_tokens_mask, self.return_offsets_mapping,
            self.return_length, self.return_token_type_ids,
        )  # fmt: skip
        return self.padding == "do_not_pad" and self.truncation == "do_not_truncate" and not any(more)

    def _take_models(self, tokenizer: Any) -> None:
        """The model's length as `max_length`; where it has none, nothing is cut or filled up."""
        if tokenizer.model_max_length <= LARGE:
            self.max_length = tokenizer.model_max_length
            return
        for name, none in (("padding", "do_not_pad"), ("truncation", "do_not_truncate")):
            if getattr(self, name) not in (none, "longest"):
                logger.warning("%s does nothing: neither max_length nor model_max_length is set", name)
                setattr(self, name, none)


def check_side(name: str, side: Any) -> str:
    if side not in ("left", "right"):
        raise ValueError(f'{name} must be "left" or "right", got {side!r}')
    return side
