"""Base class of the tokenizers: everything except the conversion between text and ids."""

import json
import os
import sys
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import AddedToken

from . import chat, special
from .batch import BARE, BatchEncoding, Frame, Pieces, Places, Row, as_tensors, kept_range, windows
from .options import VERY_LARGE, Options, check_side
from .special import NAMES, as_token, flags_of

# from_pretrained keywords of transformers that are ignored: no remote code is run, downloads always resume, and the
# requested class is the one that is instantiated.
IDLE = {"trust_remote_code", "resume_download", "proxies", "use_fast", "config", "_commit_hash"}
SAVED_ANYHOW = {"safe_serialization", "save_jinja_files"}  # save_pretrained keywords that are ignored: there are no
# weights, and the template goes into tokenizer_config.json, which every version of transformers reads
OPTIONS = [field.name for field in fields(Options)]
# Keys of tokenizer_config.json that are options of the tokenizer; all others are saved back unchanged.
SETTINGS = {
    "additional_special_tokens", "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder",
    "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens", "legacy", "model_input_names",
    "model_max_length", "model_specific_special_tokens", "padding_side", "sp_model_kwargs",
    "spaces_between_special_tokens", "split_special_tokens",
    "truncation_side", "use_default_system_prompt", *NAMES,
}  # fmt: skip


class LlamaTokenizerBase(chat.ChatTemplates, special.SpecialTokens):
    """The tokenizer interface of transformers. Subclasses convert between text and ids."""

    vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model"}
    is_fast: bool
    pad_token_type_id = 0
    name_or_path = ""

    def _set_up(self, settings: Mapping[str, Any], padding_side: str) -> None:
        """Apply the settings of a constructor or tokenizer_config.json; subclasses register the special tokens."""
        self.init_kwargs = dict(settings)
        self._named, self._additional, self._demoted, self._own = {}, [], set(), {}
        self.padding_side = settings.get("padding_side") or padding_side
        self.truncation_side = settings.get("truncation_side") or "right"
        longest = settings.get("model_max_length") or VERY_LARGE
        if not isinstance(longest, int | float) or not abs(longest) <= sys.float_info.max:
            raise ValueError(f"model_max_length must be a number, got {longest!r}")
        self.model_max_length = int(longest)
        inputs = settings.get("model_input_names") or ["input_ids", "attention_mask"]
        if not isinstance(inputs, list | tuple):
            raise ValueError(f"model_input_names must be a list of names, got {inputs!r}")
        self.model_input_names = list(inputs)
        self.clean_up_tokenization_spaces = bool(settings.get("clean_up_tokenization_spaces", False))
        self.spaces_between_special_tokens = bool(settings.get("spaces_between_special_tokens", False))
        self.split_special_tokens = bool(settings.get("split_special_tokens", False))
        self.use_default_system_prompt = bool(settings.get("use_default_system_prompt", False))
        self.chat_template = chat.templates(settings.get("chat_template"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("padding_side", "truncation_side"):
            check_side(name, value)
        super().__setattr__(name, value)

    # Implemented by subclasses

    @abstractmethod
    def _encode_texts(self, texts: list[str], split_special_tokens: bool) -> list[Pieces]:
        """Encode each text, without adding special tokens."""

    @abstractmethod
    def _frame(self, pair: bool) -> Frame:
        """The special tokens added around a text or a pair."""

    @abstractmethod
    def _join(self, ids: list[int], spaces: bool) -> str:
        """Decode ids, each of which has a token."""

    @abstractmethod
    def _add(self, *tokens: AddedToken) -> None:
        """Add tokens; those already in the vocabulary are only marked as added."""

    @property
    def _keeps_spaces(self) -> bool:
        """Whether decoding inserts no spaces, so that clean-up would remove spaces of the text itself."""
        return False

    @abstractmethod
    def _vocabulary_files(self, folder: Path, prefix: str) -> list[Path]:
        """Write the vocabulary and return the files."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The size of the vocabulary, without added tokens."""

    @abstractmethod
    def __len__(self) -> int:
        """The size of the vocabulary, added tokens included."""

    @abstractmethod
    def get_vocab(self) -> dict[str, int]:
        """The id of every token, added tokens included."""

    @property
    def vocab(self) -> dict[str, int]:
        """Same as `get_vocab()`."""
        return self.get_vocab()

    @abstractmethod
    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens into text."""

    # Text to ids

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        text_pair_target: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
    ) -> BatchEncoding:
        """Encode one or more texts into model inputs: `input_ids`, `attention_mask` and what else is requested.

        Args:
            text: a text, or a list of them; with `is_split_into_words` a list of words, or a list of such lists.
            text_pair: a second text for each.
            text_target: texts whose ids are returned as `labels`.
            text_pair_target: a second text for each of those.

        See `Options` for the other arguments.
        """
        given = locals()
        options = Options(**{name: given[name] for name in OPTIONS})
        if text is None and text_target is None:
            raise ValueError("text must be a string or a list of strings, got NoneType")
        made = None if text is None else self._call(text, text_pair, options)
        if text_target is None:
            assert made is not None
            return made
        target = self._call(text_target, text_pair_target, Options(**{name: given[name] for name in OPTIONS}))
        if made is None:
            return target
        made["labels"] = target["input_ids"]
        return made

    def _call(self, text: Any, pair: Any, options: Options) -> BatchEncoding:
        many = isinstance(text, list | tuple) and not (
            options.is_split_into_words and (not text or isinstance(text[0], str))
        )
        if not many:
            if not isinstance(text, str | list | tuple):
                raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
            return self._batch([_item(text, pair)], options, single=True)
        if pair is None:
            return self._batch([self._split_pair(item, options) for item in text], options)
        if not isinstance(pair, list | tuple) or len(pair) != len(text):
            raise ValueError("text_pair must be a list as long as text when that is a list")
        return self._batch(list(zip(text, pair, strict=True)), options)

    @staticmethod
    def _split_pair(item: Any, options: Options) -> Any:
        """An item as `_batch` takes it: a list of two strings, or of two lists of words, is a pair."""
        if isinstance(item, str):
            return item
        if item is None:
            raise ValueError("text must be a string or a list of strings, got a list with NoneType in it")
        inner = list if options.is_split_into_words else str
        is_pair = isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], inner)
        return (item[0], item[1]) if is_pair else (item, None)

    def _batch(
        self,
        items: list[Any],
        options: Options,
        single: bool = False,
        direct: bool = False,
        given_ids: bool = False,
    ) -> BatchEncoding:
        """Encode, truncate, add special tokens and pad: strings, and pairs whose second half may be None. With
        `direct`, lists may also be tokens or ids."""
        if not items:
            raise ValueError("text is an empty list; give at least one string")
        options.resolve(self)
        if options.is_plain and all(isinstance(item, str) for item in items):
            return self._plainly(items, options, single)
        items = [(item, None) if isinstance(item, str) else item for item in items]
        if options.return_offsets_mapping and not self.is_fast:
            raise ValueError("return_offsets_mapping needs LlamaTokenizerFast: LlamaTokenizer does not track offsets")
        windowed = self.is_fast and options.return_overflowing_tokens and not given_ids
        halves = [half for pair in items for half in pair if half is not None]
        encoded = iter(self._encode_all(halves, options, direct))
        frames = {pair: self._frame(pair) if options.add_special_tokens else BARE
                  for pair in {second is not None for _, second in items}}  # fmt: skip
        rows: list[Row] = []
        for number, (_, second) in enumerate(items):
            texts = (next(encoded),) if second is None else (next(encoded), next(encoded))
            rows += self._rows(texts, frames[second is not None], options, number, windowed)
        if options.padding != "do_not_pad":
            self._pad_rows(rows, options)
        return self._finished(rows, options, single, windowed)

    def _encode_all(self, items: list[Any], options: Options, direct: bool) -> list[Pieces]:
        flat: list[str] = []
        plan: list[Pieces | int | None] = []  # encoded already; a number of words; None for one text
        for item in items:
            words = isinstance(item, list | tuple)
            if isinstance(item, str):
                plan.append(None)
                flat.append(item)
            elif words and options.is_split_into_words and all(isinstance(word, str) for word in item):
                plan.append(len(item))
                flat += item
            elif words and direct and all(isinstance(token, str) for token in item):
                plan.append(Pieces([self._id_or_unk(token) for token in item]))
            elif words and direct and all(isinstance(number, int | np.integer) for number in item):
                plan.append(Pieces(self._checked(item)))
            else:
                wanted = "a list of words" if options.is_split_into_words else "a string"
                found = f"a list of {type(item[0]).__name__}" if words and item else type(item).__name__
                raise ValueError(f"text must be {wanted}, got {found}")
        encoded = iter(self._encode_texts(flat, bool(options.split_special_tokens)) if flat else [])
        made: list[Pieces] = []
        for one in plan:
            if isinstance(one, Pieces):
                made.append(one)
            else:
                made.append(next(encoded) if one is None else _joined([next(encoded) for _ in range(one)]))
        return made

    def _rows(
        self, texts: tuple[Pieces, ...], frame: Frame, options: Options, sample: int, windowed: bool
    ) -> list[Row]:
        """The row of a text or a pair. What is truncated becomes further rows if `windowed`, else an extra list."""
        overflowing = options.return_overflowing_tokens
        if options.truncation == "do_not_truncate" and not overflowing:
            return [Row(texts, None, frame, sample)]
        if overflowing and len(texts) > 1 and options.truncation == "longest_first":
            raise ValueError(
                "return_overflowing_tokens needs truncation='only_first' or 'only_second' for a pair of texts"
            )
        lengths = [len(text.ids) for text in texts]
        cut = options.truncation != "do_not_truncate" and options.max_length is not None
        excess = sum(lengths) + len(frame) - options.max_length if cut else 0  # type: ignore[operator]
        if excess <= 0 and not overflowing:
            return [Row(texts, None, frame, sample)]
        removed = _removals(lengths, excess, options.truncation)
        side = self.truncation_side
        kept = [kept_range(length, length - out, side) for length, out in zip(lengths, removed, strict=True)]
        if not overflowing:
            return [Row(texts, kept, frame, sample)]
        if windowed:
            which = 1 if options.truncation == "only_second" else 0
            stretches = [kept[which]]
            if removed[which]:
                stretches = windows(lengths[which], len(kept[which]), options.stride, side)
            return [Row(texts, [*kept[:which], one, *kept[which + 1 :]], frame, sample) for one in stretches]
        rest = [_overflow(text.ids, out, options.stride, side) for text, out in zip(texts, removed, strict=True)]
        extra = {"overflowing_tokens": [i for part in rest for i in part], "num_truncated_tokens": sum(removed)}
        return [Row(texts, kept, frame, sample, extra)]

    def _plainly(self, strings: list[str], options: Options, single: bool) -> BatchEncoding:
        """Fast path of `_batch` for most calls: no truncation, no padding, no extra outputs."""
        texts = self._encode_texts(strings, bool(options.split_special_tokens))
        frame = self._frame(False) if options.add_special_tokens else BARE
        before, _, after = frame.ids
        values: dict[str, Any] = {"input_ids": [before + text.ids + after for text in texts]}
        if options.return_attention_mask:
            values["attention_mask"] = [[1] * len(ids) for ids in values["input_ids"]]
        if single and options.return_tensors is None:
            values = {name: value[0] for name, value in values.items()}
        rows = (lambda: [Row((text,), None, frame, n) for n, text in enumerate(texts)]) if self.is_fast else None
        return BatchEncoding(as_tensors(values, options.return_tensors), rows, self._name)

    def _pad_rows(self, rows: list[Row], options: Options) -> None:
        length = max(len(row.ids) for row in rows)
        if options.padding == "max_length" and options.max_length is not None:
            length = options.max_length
        length = _multiple(length, options.pad_to_multiple_of)
        assert self.pad_token_id is not None
        assert options.padding_side is not None
        side, token = options.padding_side, self.pad_token_id
        for row in rows:
            row.pad(length, side, token)

    def _finished(self, rows: list[Row], options: Options, single: bool, windowed: bool) -> BatchEncoding:
        values: dict[str, list[Any]] = {
            name: [row.extra[name] for row in rows if row.extra] for name in rows[0].extra or ()
        }
        values["input_ids"] = [row.ids for row in rows]
        if options.return_token_type_ids:
            values["token_type_ids"] = [row.types(self.pad_token_type_id) for row in rows]
        if options.return_special_tokens_mask:
            values["special_tokens_mask"] = [row.special for row in rows]
        if options.return_attention_mask:
            values["attention_mask"] = [row.attention for row in rows]
        if options.return_offsets_mapping:
            values["offset_mapping"] = [row.spans for row in rows]
        if options.return_length:
            values["length"] = [sum(row.attention) for row in rows]
        if windowed:
            values["overflow_to_sample_mapping"] = [row.sample for row in rows]
        finished: dict[str, Any] = values
        if single and options.return_tensors is None and not windowed:
            finished = {name: value[0] for name, value in values.items()}
            if self.is_fast and options.return_length:
                finished["length"] = values["length"]  # a list, as in transformers' fast class
        finished = as_tensors(finished, options.return_tensors)
        return BatchEncoding(finished, (lambda: rows) if self.is_fast else None, self._name)

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        stride: int = 0,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode a text into ids, by default with special tokens. The text may also be a list of tokens or ids."""
        options = kwargs | dict(
            add_special_tokens=add_special_tokens, padding=padding, truncation=truncation, max_length=max_length,
            stride=stride, padding_side=padding_side, return_tensors=return_tensors,
        )  # fmt: skip
        return self.encode_plus(text, text_pair, **options)["input_ids"]

    def encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        """`__call__` for one text, which may also be a list of tokens or ids."""
        if not isinstance(text, str | list | tuple):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        return self._batch([_item(text, text_pair)], self._options(kwargs), single=True, direct=True)

    def batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **kwargs: Any) -> BatchEncoding:
        """`__call__` for several texts, or pairs of them."""
        options = self._options(kwargs)
        if not isinstance(batch_text_or_text_pairs, list | tuple):
            raise ValueError(f"a batch must be a list, got {type(batch_text_or_text_pairs).__name__}")
        return self._batch([self._split_pair(item, options) for item in batch_text_or_text_pairs], options, direct=True)

    def prepare_for_model(
        self, ids: list[int], pair_ids: list[int] | None = None, prepend_batch_axis: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        """`__call__` for ids: truncate, add special tokens and pad."""
        if not isinstance(ids, list | tuple) or not all(
            isinstance(i, int | np.integer) for i in [*ids, *(pair_ids or [])]
        ):
            raise ValueError(f"ids must be a list of integers, got {ids!r}")
        return self._batch(
            [(ids, pair_ids)], self._options(kwargs), single=not prepend_batch_axis, direct=True, given_ids=True
        )

    @staticmethod
    def _options(kwargs: dict[str, Any]) -> Options:
        for name in kwargs:
            if name not in OPTIONS:
                raise ValueError(f"{name!r} is not a tokenizer option; the options are {', '.join(OPTIONS)}")
        return Options(**kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Split a text into tokens, as strings."""
        options = self._options(kwargs | {"add_special_tokens": add_special_tokens})
        encoded = [one for one in (text, pair) if one is not None]
        if not all(isinstance(one, str) for one in encoded):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        split = self.split_special_tokens if options.split_special_tokens is None else options.split_special_tokens
        found = self._encode_texts([*encoded], split)
        frame = self._frame(pair is not None) if add_special_tokens else BARE
        names = [[self._name(number) for number in ids] for ids in frame.ids]
        texts = [[self._name(number) for number in one.ids] for one in found]
        return [*names[0], *texts[0], *names[1], *(texts[1] if pair is not None else []), *names[2]]

    def pad(
        self,
        encoded_inputs: Any,
        padding: Any = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad what has been encoded: one dictionary of lists or of lists of lists, or a list of dictionaries."""
        if isinstance(encoded_inputs, list | tuple) and encoded_inputs and isinstance(encoded_inputs[0], Mapping):
            encoded_inputs = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        if not isinstance(encoded_inputs, Mapping) or "input_ids" not in encoded_inputs:
            raise ValueError("encoded_inputs must be an encoding or a list of encodings, each with input_ids")
        values = {name: _as_lists(value) for name, value in encoded_inputs.items()}
        options = Options(
            padding=padding, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of, padding_side=padding_side,
            return_attention_mask=return_attention_mask, return_tensors=return_tensors, truncation=False,
        ).resolve(self)  # fmt: skip
        single = not values["input_ids"] or not isinstance(values["input_ids"][0], list)
        rows = {name: [value] if single else value for name, value in values.items()}
        if options.return_attention_mask and "attention_mask" not in rows:
            rows["attention_mask"] = [[1] * len(row) for row in rows["input_ids"]]
        lengths = [len(row) for row in rows["input_ids"]]
        length = max(lengths, default=0)
        if options.padding == "max_length" and options.max_length is not None:
            length = options.max_length
        if options.padding != "do_not_pad":
            length = _multiple(length, pad_to_multiple_of)
            fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "special_tokens_mask": 1}
            fill |= {"token_type_ids": self.pad_token_type_id, "offset_mapping": (0, 0)}  # type: ignore[dict-item]
            for name in fill.keys() & rows.keys():
                rows[name] = [
                    _filled(row, length - size, fill[name], options.padding_side == "left")
                    for row, size in zip(rows[name], lengths, strict=True)
                ]
        alone = single and return_tensors is None
        return BatchEncoding(as_tensors({n: v[0] if alone else v for n, v in rows.items()}, return_tensors))

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """The truncated ids, the pair's, and the removed tokens with `stride` kept ones next to them."""
        strategy = getattr(truncation_strategy, "value", truncation_strategy)
        texts = [ids] if pair_ids is None else [ids, pair_ids]
        removed = _removals([len(text) for text in texts], num_tokens_to_remove, strategy)
        side = self.truncation_side
        kept = [
            [text[i] for i in kept_range(len(text), len(text) - out, side)]
            for text, out in zip(texts, removed, strict=True)
        ]
        overflow: list[int] = []
        if pair_ids is None or strategy != "longest_first":
            overflow = [i for t, out in zip(texts, removed, strict=True) for i in _overflow(t, out, stride, side)]
        return kept[0], None if pair_ids is None else kept[1], overflow

    # Special tokens around a text

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """The number of special tokens added around a text or a pair."""
        return len(self._frame(pair))

    @property
    def max_len_single_sentence(self) -> int:
        """The maximum number of tokens in a text, special tokens excluded."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """The maximum number of tokens in a pair, special tokens excluded."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    def _framed(self, first: list[int], second: list[int] | None) -> Row:
        texts = tuple(Pieces(list(ids)) for ids in (first, second) if ids is not None)
        return Row(texts, None, self._frame(second is not None))

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add special tokens to the ids of a text or a pair."""
        return self._framed(token_ids_0, token_ids_1).ids

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Token types for the output of `build_inputs_with_special_tokens`: 0 for the first text, 1 for the second."""
        return self._framed(token_ids_0, token_ids_1).types(self.pad_token_type_id)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Mask for the output of `build_inputs_with_special_tokens`: 1 for special tokens, 0 for text.

        Args:
            already_has_special_tokens: whether `token_ids_0` is such an output.
        """
        if not already_has_special_tokens:
            return self._framed(token_ids_0, token_ids_1).special
        if token_ids_1 is not None:
            raise ValueError(
                "You should not supply a second sequence if the provided sequence of ids is already formatted with "
                "special tokens for the model."
            )
        special_ids = set(self.all_special_ids)
        return [int(number in special_ids) for number in token_ids_0]

    # Ids to text

    def knows(self, token: int) -> bool:
        """Whether a token has this id. A model's vocabulary may be padded beyond its tokenizer's."""
        return token >= 0 and self._token_of(token) is not None

    def _name(self, number: int) -> str:
        token = self._token_of(number)
        assert token is not None
        return token

    @cached_property
    def _added_ids(self) -> dict[str, int]:
        return self.added_tokens_encoder

    def _checked(self, ids: Iterable[Any]) -> list[int]:
        numbers = [int(i) for i in ids]
        for number in numbers:
            if not self.knows(number):
                raise ValueError(f"ids must be those of tokens, normally below {len(self)}; got {number}")
        return numbers

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool | None = None,
        use_source_tokenizer: bool = False,
    ) -> Any:
        """Decode ids into text, or a list of lists into a list of texts. Invalid UTF-8 becomes U+FFFD.

        Args:
            clean_up_tokenization_spaces: remove the space before punctuation and English contractions. Ignored for
                byte-level vocabularies, as in transformers 5.
            spaces_between_special_tokens: put a space on both sides of added tokens; SentencePiece vocabularies only.
            use_source_tokenizer: ignored.

        The first two default to the tokenizer's settings.
        """
        ids = _as_lists(token_ids)
        if isinstance(ids, list) and ids and isinstance(ids[0], list):
            return self.batch_decode(
                ids, skip_special_tokens, clean_up_tokenization_spaces, spaces_between_special_tokens
            )
        if isinstance(ids, str | Mapping) or not isinstance(ids, int | Iterable):
            raise ValueError(f"ids must be integers, got {type(token_ids).__name__}")
        numbers = self._checked([ids] if isinstance(ids, int) else ids)
        if skip_special_tokens:
            numbers = [number for number in numbers if number not in self._silent]
        spaces = spaces_between_special_tokens
        text = self._join(numbers, self.spaces_between_special_tokens if spaces is None else spaces)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean and not self._keeps_spaces else text

    def batch_decode(
        self, sequences: Iterable, skip_special_tokens: bool = False, *args: Any, **kwargs: Any
    ) -> list[str]:
        """Apply `decode` to each sequence."""
        return [self.decode(ids, skip_special_tokens, *args, **kwargs) for ids in sequences]

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Remove the space before punctuation and English contractions."""
        for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
            out_string = out_string.replace(spaced, spaced.strip())
        return out_string

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Convert an id, or a list of ids, to tokens."""
        ids = _as_lists(ids)
        if isinstance(ids, int):
            return self._name(self._checked([ids])[0])
        silent = set(self.all_special_ids) if skip_special_tokens else ()
        return [self._name(number) for number in self._checked(ids) if number not in silent]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Convert a token, or a list of tokens, to ids; unknown ones become `unk_token_id`."""
        if tokens is None or isinstance(tokens, str):
            return None if tokens is None else self._id_or_unk(tokens)
        return [self._id_or_unk(token) for token in tokens]

    def _id_or_unk(self, token: str) -> Any:
        if not isinstance(token, str):
            raise ValueError(f"a token must be a string, got {type(token).__name__}")
        number = self._id_of(token)
        return self.unk_token_id if number is None else number

    # Adding tokens

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens, which are matched in a text before anything else, and return how many are new.

        Args:
            special_tokens: whether `skip_special_tokens` skips them.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens or [])
        before, known, listed, new = len(self), set(self.all_special_tokens), self.special_names, []
        for token in tokens:
            named = str(token) in known or special_tokens
            made = as_token(token, "a new token", normalized=not named, special=named)
            if special_tokens and not made.special:
                made = special.copy_of(made, special=True)
            if not made.content:
                continue
            new.append(made)
            if made.special and made.content not in listed:
                self._additional.append(made)
                listed.add(made.content)
        self._add(*new)
        return len(self) - before

    @property
    def special_names(self) -> set[str]:
        """The named special tokens and the additional ones."""
        return {token.content for token in [*self._named.values(), *self._additional]}

    def add_special_tokens(
        self, special_tokens_dict: Mapping[str, Any], replace_additional_special_tokens: bool = True
    ) -> int:
        """Set special tokens by name ("bos_token", ..., "additional_special_tokens"), adding them where needed.

        Returns:
            The number of tokens added to the vocabulary.
        """
        before = len(self)
        for name, value in special_tokens_dict.items():
            if name in NAMES:
                token = as_token(value, name, normalized=False, special=True)
                self._add(special.copy_of(token, special=True))
                setattr(self, name, token)
            elif name in ("additional_special_tokens", "extra_special_tokens"):
                made = [as_token(token, name, normalized=False, special=True) for token in value]
                self._add(*(special.copy_of(token, special=True) for token in made))
                kept = [] if replace_additional_special_tokens else self._additional
                names = {token.content for token in kept}
                self._replace_additional([*kept, *(token for token in made if token.content not in names)])
            else:
                raise ValueError(
                    f"{name!r} is not a special token; use one of {', '.join(NAMES)}, additional_special_tokens"
                )
        return len(self) - before

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the added tokens, special tokens included."""
        return {token.content: number for number, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the added tokens, special tokens included."""
        return self.added_tokens_encoder

    # Files

    def _settings(self) -> dict[str, Any]:
        """The contents of tokenizer_config.json."""
        said: dict[str, Any] = {name: value for name, value in self.init_kwargs.items() if name not in SETTINGS}
        said |= {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        for name in ("vocab_file", "tokenizer_file", "name_or_path"):
            said.pop(name, None)
        if self._additional:
            said["additional_special_tokens"] = self.additional_special_tokens
        if self._own:
            said["model_specific_special_tokens"] = self._own
        said["added_tokens_decoder"] = {str(number): flags_of(t) for number, t in self.added_tokens_decoder.items()}
        for name in ("clean_up_tokenization_spaces", "model_max_length", "spaces_between_special_tokens"):
            said[name] = getattr(self, name)
        said["use_default_system_prompt"] = self.use_default_system_prompt
        said |= {n: getattr(self, n) for n in ("padding_side", "truncation_side") if n in self.init_kwargs}
        default = "left" if self.is_fast else "right"
        if self.padding_side != default:
            said["padding_side"] = self.padding_side
        if self.truncation_side != "right":
            said["truncation_side"] = self.truncation_side
        if self.split_special_tokens:
            said["split_special_tokens"] = True
        if self.chat_template:
            said["chat_template"] = chat.as_saved(self.chat_template)
        said["tokenizer_class"] = type(self).__name__
        return said

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Save the tokenizer to a folder in the format of transformers and return the paths written."""
        if unknown := kwargs.keys() - SAVED_ANYHOW:
            raise ValueError(f"{min(unknown)!r} is not an option of the tokenizer's save_pretrained")
        if push_to_hub:
            raise ValueError("push_to_hub is not supported; upload the folder yourself")
        if legacy_format is False and not self.is_fast:
            raise ValueError("legacy_format=False: only LlamaTokenizerFast can write a tokenizer.json")
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory ({folder}) is a file; pass a folder")
        folder.mkdir(parents=True, exist_ok=True)
        start = f"{filename_prefix}-" if filename_prefix else ""
        said = {
            "tokenizer_config.json": self._settings(),
            "special_tokens_map.json": {
                name: [flags(t) for t in value] if isinstance(value, list) else flags(value)
                for name, value in self.special_tokens_map_extended.items()
            },
        }
        added = {t: n for t, n in self.get_added_vocab().items() if n >= self.vocab_size}
        further = () if start else (folder / "additional_chat_templates").glob("*.jinja")
        for stale in (folder / f"{start}chat_template.jinja", *further):
            stale.unlink(missing_ok=True)  # from an earlier save; would take precedence over tokenizer_config.json
        paths = [_written(folder / f"{start}{name}", content) for name, content in said.items()]
        paths += self._vocabulary_files(folder, start)
        if added:
            paths.append(_written(folder / f"{start}added_tokens.json", added))
        return tuple(str(path) for path in [*paths, *self._library_files(folder, start)])

    def _library_files(self, folder: Path, prefix: str) -> list[Path]:
        """Write tokenizer.json, if this tokenizer has one, and return the files."""
        return []

    @classmethod
    @abstractmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load the tokenizer of a model."""

    @staticmethod
    def _meant(kwargs: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
        """Return the options without those that are ignored.

        Raises:
            ValueError: an option does not exist.
        """
        legal = {*SETTINGS, *known}
        for name in kwargs:
            if name not in legal and name not in IDLE:
                raise ValueError(f"{name!r} is not a tokenizer option; the options are {', '.join(sorted(legal))}")
        return {name: value for name, value in kwargs.items() if name in legal}

    def __repr__(self) -> str:
        named = {name: token.content for name, token in self._named.items()}
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, vocab_size={self.vocab_size}, "
            f"model_max_length={self.model_max_length}, is_fast={self.is_fast}, padding_side={self.padding_side!r}, "
            f"truncation_side={self.truncation_side!r}, special_tokens={named})"
        )


def flags(token: AddedToken) -> dict[str, Any]:
    """A token's entry in special_tokens_map.json."""
    return {name: value for name, value in flags_of(token).items() if name != "special"}


def _written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _item(text: Any, pair: Any) -> Any:
    return text if pair is None and isinstance(text, str) else (text, pair)


def _removals(lengths: list[int], count: int, strategy: str) -> list[int]:
    """The number of tokens to remove from each text, `count` in all."""
    removed = [0] * len(lengths)
    if count <= 0 or strategy == "do_not_truncate":
        return removed
    if strategy == "only_second" and len(lengths) == 1:
        raise ValueError("truncation='only_second' needs a second text; use 'only_first' or 'longest_first'")
    if strategy == "longest_first" and len(lengths) == 2:
        # As if removing one at a time from the longer text, from the second when both are equally long.
        ahead = min(abs(lengths[0] - lengths[1]), count)
        removed = [(count - ahead) // 2, (count - ahead + 1) // 2]
        removed[0 if lengths[0] > lengths[1] else 1] += ahead
    else:
        removed[1 if strategy == "only_second" else 0] = count
    for length, out in zip(lengths, removed, strict=True):
        if out > length:
            raise ValueError(
                f"max_length is too small: {out} tokens would have to be removed from a text of {length}; raise it"
                + (", or use truncation='longest_first'" if len(lengths) == 2 and strategy != "longest_first" else "")
            )
    return removed


def _overflow(ids: list[int], out: int, stride: int, side: str) -> list[int]:
    """The removed tokens, with `stride` kept ones next to them."""
    if not out:
        return []
    size = min(len(ids), stride + out)
    return ids[:size] if side == "left" else ids[-size:]


def _joined(words: list[Pieces]) -> Pieces:
    """Join the pieces of words into those of one text. Offsets are relative to each word."""
    ids = [number for word in words for number in word.ids]
    if not words or any(word.places is None for word in words):
        return Pieces(ids)
    spans = [span for word in words for span in word.places.offsets]
    return Pieces(ids, Places(spans, [number for number, word in enumerate(words) for _ in word.ids]))


def _multiple(length: int, of: int | None) -> int:
    return length if not of else -(-length // of) * of


def _filled(row: list[Any], count: int, value: Any, left: bool) -> list[Any]:
    return [value] * count + list(row) if left else list(row) + [value] * count


def _as_lists(value: Any) -> Any:
    """Convert arrays and tensors to nested lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_as_lists(item) for item in value] if isinstance(value, list | tuple) else value
