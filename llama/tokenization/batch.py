"""A tokenizer's output on its way: pieces of a text, the rows of a batch, and the batch itself."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Marks = list[tuple[int, int]]  # special tokens: each one's id and its token type


class Places(NamedTuple):
    """Where the pieces of a text come from, under the names that the library's `Encoding` has."""

    offsets: list[tuple[int, int]]  # the first character of each and the one after its last
    word_ids: list[int | None]


class Pieces(NamedTuple):
    """The ids of a text, and its `Places`, or an `Encoding`, where they are known."""

    ids: list[int]
    places: Any = None


class Frame:
    """The special tokens around a text (`between` stays empty) or a pair, and the token types of the texts."""

    def __init__(self, before: Marks, between: Marks, after: Marks, types: tuple[int, int] = (0, 1)):
        self.marks, self.types = (before, between, after), types
        self.ids = tuple([number for number, _ in marks] for marks in self.marks)

    def __len__(self) -> int:
        return sum(map(len, self.marks))


BARE = Frame([], [], [])


class Row:
    """One text, or a pair, with special tokens around it and padding at one end.

    Args:
        texts: the pieces of each,
        kept: and which of them are in this row; None for all.
        sample: the number of the text in its batch.
        extra: what else is said of this row, by name.
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
        self.left = self.right = 0  # how much padding there is

    def pad(self, length: int, side: str, token: int) -> None:
        """Fill up to `length`."""
        if (count := length - len(self.ids)) > 0:
            if side == "left":
                self.left, self.ids = count, [token] * count + self.ids
            else:
                self.right, self.ids = count, self.ids + [token] * count

    def _laid_out(self, mark: Callable[[int], Any], text: Callable[[int], list[Any]], padding: Any) -> list[Any]:
        """A value for every id: `mark` of a special token's type, what `text` gives for a text, or `padding`."""
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


class BatchEncoding(dict):
    """A model's inputs by name, as keys and as attributes.

    What the fast tokenizer makes also knows which characters each token comes from: `tokens`, `word_ids`,
    `sequence_ids`, `char_to_token`, `token_to_chars`, `char_to_word`.
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

    def __reduce__(self) -> Any:
        return BatchEncoding, (dict(self),)

    @property
    def data(self) -> dict[str, Any]:
        """The values as a plain dictionary."""
        return dict(self)

    @property
    def is_fast(self) -> bool:
        """Whether the tokens know their characters."""
        return self._rows is not None

    def to(self, device: Any) -> "BatchEncoding":
        """The same, its tensors on `device`."""
        return BatchEncoding(
            {k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()}, self._rows, self._names
        )

    def _row(self, batch_index: int) -> Row:
        if self._rows is None:
            raise ValueError("only what LlamaTokenizerFast has encoded knows where its tokens come from")
        if self._made is None:
            self._made = self._rows()
        return self._made[batch_index]

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as text."""
        row = self._row(batch_index)
        assert self._names is not None
        return [self._names(number) for number in row.ids]

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """Which text of the pair each token of a row is from: 0 or 1, or None for special tokens."""
        return self._row(batch_index).sequences

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """The number of each token's word in its text; None for special tokens."""
        return self._row(batch_index).words

    def token_to_chars(self, batch_or_token_index: int, token_index: int | None = None) -> "CharSpan | None":
        """The characters that a token comes from; None for special tokens."""
        at, token = (0, batch_or_token_index) if token_index is None else (batch_or_token_index, token_index)
        row = self._row(at)
        return None if row.sequences[token] is None else CharSpan(*row.spans[token])

    def char_to_token(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0):
        """The first token that a character is part of; None for one that no token holds."""
        at, char = (0, batch_or_char_index) if char_index is None else (batch_or_char_index, char_index)
        row = self._row(at)
        found = zip(row.sequences, row.spans, strict=True)
        return next((n for n, (which, (a, b)) in enumerate(found) if which == sequence_index and a <= char < b), None)

    def char_to_word(self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0):
        """The number of the word that a character is part of."""
        token = self.char_to_token(batch_or_char_index, char_index, sequence_index)
        return None if token is None else self._row(batch_or_char_index if char_index is not None else 0).words[token]


class CharSpan(NamedTuple):
    start: int
    end: int


def as_tensors(values: dict[str, Any], kind: str | None, single: bool = False) -> dict[str, Any]:
    """Lists as "np" arrays or "pt" tensors; None leaves them. A `single` text becomes a batch of one."""
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
            raise ValueError("texts of different lengths make no tensor; pass padding=True")
        dtype = np.int64 if rows and max(rows) == 0 else None
        array = np.array(value, dtype)
        made[name] = array if kind == "np" else torch.tensor(array)
    return made


def kept_range(length: int, keep: int, side: str) -> range:
    """The places of a text that stay when it is cut on `side`."""
    return range(length - keep, length) if side == "left" else range(keep)


def windows(length: int, size: int, stride: int, side: str) -> list[range]:
    """All of a long text as stretches of `size` that share `stride` tokens with the one before."""
    if stride >= size:
        way = f"lower stride ({stride}) or raise max_length" if size else "raise max_length"
        raise ValueError(f"max_length leaves {size} tokens of room for text, and stride keeps {stride} of them; {way}")
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
