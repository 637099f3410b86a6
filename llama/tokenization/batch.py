"""Tokenizer output: the pieces of a text, the rows of a batch, and the batch itself."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

Marks = list[tuple[int, int]]  # special tokens as (id, token type)


class Places(NamedTuple):
    """Where the pieces of a text come from, named as in the `Encoding` of `tokenizers`."""

    offsets: list[tuple[int, int]]  # (start, end) in characters
    word_ids: list[int | None]


class Pieces(NamedTuple):
    """The ids of a text and, where known, its `Places` or `LaterPlaces`."""

    ids: list[int]
    places: Any = None


class Frame:
    """The special tokens around a text (`between` is empty) or a pair, and the token types of the texts."""

    def __init__(self, before: Marks, between: Marks, after: Marks, types: tuple[int, int] = (0, 1)):
        self.marks, self.types = (before, between, after), types
        self.ids = tuple([number for number, _ in marks] for marks in self.marks)

    def __len__(self) -> int:
        return sum(map(len, self.marks))


BARE = Frame([], [], [])


class Row:
    """One text, or a pair, with special tokens around it and padding at one end.

    Args:
        texts: the pieces of each text.
        kept: which pieces of each text are in this row; None for all.
        sample: the index of the text in its batch.
        extra: further outputs of this row, by name.
    """

    __slots__ = ("extra", "frame", "ids", "kept", "left", "right", "sample", "texts")

    def __init__(
        self,
        texts: tuple[Pieces, ...],
        kept: Sequence[range] | None,
        frame: Frame,
        sample: int = 0,
        extra: dict[str, Any] | None = None,
    ):
        self.texts, self.frame, self.sample, self.extra = texts, frame, sample, extra
        self.kept = [range(len(text.ids)) for text in texts] if kept is None else kept
        before, between, after = frame.ids
        first = texts[0].ids if kept is None else texts[0].ids[kept[0].start : kept[0].stop]
        if len(texts) == 1:
            self.ids = before + first + after
        else:
            self.ids = before + first + between + texts[1].ids[self.kept[1].start : self.kept[1].stop] + after
        self.left = self.right = 0  # amount of padding

    def pad(self, length: int, side: str, token: int) -> None:
        """Pad to `length`."""
        if (count := length - len(self.ids)) > 0:
            if side == "left":
                self.left, self.ids = count, [token] * count + self.ids
            else:
                self.right, self.ids = count, self.ids + [token] * count

    def _laid_out(self, mark: Callable[[int], Any], text: Callable[[int], list[Any]], padding: Any) -> list[Any]:
        """One value per id: `mark(type)` for special tokens, `text(n)` for text n, `padding` for padding."""
        before, between, after = ([mark(type_) for _, type_ in marks] for marks in self.frame.marks)
        inner = text(0) if len(self.texts) == 1 else [*text(0), *between, *text(1)]
        return [padding] * self.left + before + inner + after + [padding] * self.right

    @property
    def attention(self) -> list[int]:
        return [0] * self.left + [1] * (len(self.ids) - self.left - self.right) + [0] * self.right

    def types(self, padding: int) -> list[int]:
        return self._laid_out(lambda type_: type_, lambda n: [self.frame.types[n]] * len(self.kept[n]), padding)

    @property
    def special(self) -> list[int]:
        return self._laid_out(lambda _: 1, lambda n: [0] * len(self.kept[n]), 1)

    @property
    def sequences(self) -> list[int | None]:
        return self._laid_out(lambda _: None, lambda n: [n] * len(self.kept[n]), None)

    def _places(self, name: str, missing: Any) -> list[Any]:
        def of(n: int) -> list[Any]:
            kept, places = self.kept[n], self.texts[n].places
            return [missing] * len(kept) if places is None else getattr(places, name)[kept.start : kept.stop]

        return self._laid_out(lambda _: missing, of, missing)

    @property
    def spans(self) -> list[tuple[int, int]]:
        return self._places("offsets", (0, 0))

    @property
    def words(self) -> list[int | None]:
        return self._places("word_ids", None)

    def of_word(self, word: int, sequence: int) -> list[int]:
        """The positions of a word's tokens."""
        pairs = zip(self.words, self.sequences, strict=True)
        return [place for place, pair in enumerate(pairs) if pair == (word, sequence)]


class BatchEncoding(dict):
    """Model inputs by name, accessible as keys and as attributes.

    Output of the fast tokenizer also maps between tokens, words and characters: `tokens`, `word_ids`, `sequence_ids`,
    `char_to_token`, `token_to_chars`, `char_to_word` and so on; `encodings` holds all of it, row by row.
    """

    def __init__(
        self, data: Any = None, rows: Callable[[], list[Row]] | None = None, names: Callable[[int], str] | None = None
    ):
        super().__init__(data or {})
        self._rows, self._names = rows, names
        self._made: list[Row] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from error

    def __missing__(self, item: Any) -> Any:
        """Return the `Encoding` of a row if the key is an integer."""
        if isinstance(item, int):
            return Encoding(self._row(item), self._names)
        raise KeyError(item)

    def __copy__(self) -> "BatchEncoding":
        return BatchEncoding(self, self._rows, self._names)

    copy = __copy__

    def __reduce__(self) -> Any:
        """Pickle without the tokenizer: offsets are computed first and pickled along."""
        if self._rows is None:
            return BatchEncoding, (dict(self),)
        names = {number: self._names(number) for row in self._all_rows() for number in row.ids}  # type: ignore[misc]
        return BatchEncoding, (dict(self), partial(list, self._all_rows()), names.__getitem__)

    @property
    def data(self) -> dict[str, Any]:
        """The values: this dictionary itself."""
        return self

    @property
    def is_fast(self) -> bool:
        """Whether tokens can be mapped to characters."""
        return self._rows is not None

    @property
    def encodings(self) -> "list[Encoding] | None":
        """The `Encoding` of each row; None from `LlamaTokenizer`."""
        return None if self._rows is None else [Encoding(row, self._names) for row in self._all_rows()]

    @property
    def n_sequences(self) -> int | None:
        """1, or 2 for pairs; None from `LlamaTokenizer`."""
        return None if self._rows is None else len(self._row(0).texts)

    def to(self, device: Any, *, non_blocking: bool = False) -> "BatchEncoding":
        """Return a copy with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in self.items()}
        return BatchEncoding(moved, self._rows, self._names)

    def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> "BatchEncoding":
        """Convert the values to "np" arrays or "pt" tensors in place; with `prepend_batch_axis`, a batch of one."""
        self.update(as_tensors(dict(self), getattr(tensor_type, "value", tensor_type), prepend_batch_axis))
        return self

    def _all_rows(self) -> list[Row]:
        if self._rows is None:
            raise ValueError("mapping tokens to words or characters needs an encoding by LlamaTokenizerFast")
        if self._made is None:
            self._made = self._rows()
        return self._made

    def _row(self, batch_index: int) -> Row:
        return self._all_rows()[batch_index]

    def _at(self, batch_or_token_index: int, token_index: int | None) -> tuple[Row, int]:
        """A row, the first if only a token is given, and the token's position in it."""
        at, token = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        row = self._row(at)
        return row, token + len(row.ids) if token < 0 else token

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as strings."""
        row = self._row(batch_index)
        assert self._names is not None
        return [self._names(number) for number in row.ids]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which text of the pair each token of a row comes from: 0 or 1, or None for special tokens."""
        return self._row(batch_index).sequences

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The index of each token's word in its text; None for special tokens."""
        return self._row(batch_index).words

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> "CharSpan | None":
        """The characters that a token comes from; None for special tokens."""
        row, token = self._at(batch_or_token_index, token_index)
        return None if row.sequences[token] is None else CharSpan(*row.spans[token])

    def token_to_sequence(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """Which text of the pair a token comes from; None for special tokens."""
        row, token = self._at(batch_or_token_index, token_index)
        return row.sequences[token]

    def token_to_word(self, batch_or_token_index: int, token_index: int | None = None) -> int | None:
        """The index of a token's word in its text; None for special tokens."""
        row, token = self._at(batch_or_token_index, token_index)
        return row.words[token]

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> "TokenSpan | None":
        """The tokens of a word; None if it has none."""
        row, word = self._row_and_word(batch_or_word_index, word_index)
        found = row.of_word(word, sequence_index)
        return TokenSpan(found[0], found[-1] + 1) if found else None

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> "CharSpan | None":
        """The characters of a word; None if it has no tokens."""
        row, word = self._row_and_word(batch_or_word_index, word_index)
        spans = [row.spans[token] for token in row.of_word(word, sequence_index)]
        return CharSpan(spans[0][0], spans[-1][1]) if spans else None

    def _row_and_word(self, batch_or_word_index: int, word_index: int | None) -> tuple[Row, int]:
        at, word = (0, batch_or_word_index) if word_index is None else (batch_or_word_index, word_index)
        return self._row(at), word

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0):
        """The first token that contains a character; None if no token does."""
        at, char = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        row = self._row(at)
        found = zip(row.sequences, row.spans, strict=True)
        return next((n for n, (which, (a, b)) in enumerate(found) if which == sequence_index and a <= char < b), None)

    def char_to_word(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0):
        """The index of the word that contains a character."""
        token = self.char_to_token(batch_or_char_index, char_index, sequence_index)
        return None if token is None else self._row(batch_or_char_index if char_index is not None else 0).words[token]


class CharSpan(NamedTuple):
    start: int
    end: int


class TokenSpan(NamedTuple):
    start: int
    end: int


class Encoding:
    """Everything known about one row, named as in the `Encoding` of `tokenizers`."""

    def __init__(self, row: Row, names: Callable[[int], str] | None):
        assert names is not None
        self.ids, self.tokens = row.ids, [names(number) for number in row.ids]
        self.type_ids, self.attention_mask, self.special_tokens_mask = row.types(0), row.attention, row.special
        self.offsets, self.sequence_ids = row.spans, row.sequences
        self.word_ids = self.words = row.words
        self.n_sequences = len(row.texts)

    def __len__(self) -> int:
        return len(self.ids)


def as_tensors(values: dict[str, Any], kind: str | None, single: bool = False) -> dict[str, Any]:
    """Convert lists to "np" arrays or "pt" tensors; None leaves them as they are. `single` makes a batch of one."""
    if kind is None:
        return values
    if kind not in ("np", "pt"):
        raise ValueError(f'return_tensors must be "pt", "np" or None, got {kind!r}')
    if kind == "pt":
        import torch
    made: dict[str, Any] = {}
    for name, value in values.items():
        value = [value] if single else value
        rows = [len(row) for row in value if isinstance(row, list)]
        if len(set(rows)) > 1:
            raise ValueError("texts of different lengths do not fit into one tensor; pass padding=True")
        dtype = np.int64 if rows and max(rows) == 0 else None
        array = np.array(value, dtype)
        if kind == "np":
            made[name] = array
        else:  # Python floats become PyTorch's default dtype
            floats = isinstance(value, list) and array.dtype == np.float64
            made[name] = torch.tensor(array, dtype=torch.get_default_dtype() if floats else None)
    return made


def kept_range(length: int, keep: int, side: str) -> range:
    """The positions that remain when a text is truncated on `side`."""
    return range(length - keep, length) if side == "left" else range(keep)


def windows(length: int, size: int, stride: int, side: str) -> list[range]:
    """Split a long text into windows of `size` tokens, each sharing `stride` tokens with the one before."""
    if stride >= size:
        way = f"lower stride ({stride}) or raise max_length" if size else "raise max_length"
        raise ValueError(f"max_length leaves room for {size} tokens of text, but stride repeats {stride}; {way}")
    found, step = [], size - stride
    for shift in range(0, length, step):
        if side == "left":
            found.append(range(max(0, length - shift - size), length - shift))
            if length - shift - size <= 0:
                break
        else:
            found.append(range(shift, min(length, shift + size)))
            if shift + size >= length:
                break
    return found or [range(0)]
