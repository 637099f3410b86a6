"""LlamaTokenizer: the tokenizer built on the `sentencepiece` library."""

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import sentencepiece
from tokenizers import AddedToken

from . import loading, pieces
from .base import LlamaTokenizerBase
from .batch import Frame, Pieces
from .model_file import SentencePieceFile, is_ranks, read_model
from .special import copy_of

SP_OPTIONS = {"enable_sampling", "nbest_size", "alpha", "num_threads", "reverse", "add_bos", "add_eos"}


def framed(tokenizer: Any, pair: bool) -> Frame:
    """[bos] A [eos], followed for a pair by [bos] B [eos]; each token only if its flag is set."""
    bos = tokenizer.bos_token_id if tokenizer.add_bos_token else -1
    eos = tokenizer.eos_token_id if tokenizer.add_eos_token else -1
    for name, number in (("bos", bos), ("eos", eos)):
        if number is None:
            raise ValueError(f"add_{name}_token = True but {name}_token = None")
    return _frame_of(bos, eos, pair)


@lru_cache(maxsize=64)
def _frame_of(bos: int, eos: int, pair: bool) -> Frame:
    """Build a frame from ids, where -1 means none."""

    def mark(number: int, type_: int) -> list[tuple[int, int]]:
        return [(number, type_)] if number >= 0 else []

    if not pair:
        return Frame(mark(bos, 0), [], mark(eos, 0))
    return Frame(mark(bos, 0), mark(eos, 0) + mark(bos, 1), mark(eos, 1))


class LlamaTokenizer(LlamaTokenizerBase):
    """Tokenization with SentencePiece. `LlamaTokenizerFast` gives the same ids faster.

    Args:
        vocab_file: the `.model` file.
        sp_model_kwargs: arguments of SentencePieceProcessor: `enable_sampling`, `nbest_size`, `alpha`, ...
        add_bos_token: begin every text with `bos_token`.
        add_eos_token: end every text with `eos_token`.
        use_default_system_prompt: begin conversations with Meta's system prompt.
        spaces_between_special_tokens: whether decoding puts spaces around added tokens.
        legacy: True, the default, encodes each part between special tokens as if a text began there: with a space in
            front of it. False puts one in front of the whole text only, unless that begins with a special token.
        add_prefix_space: False adds no space anywhere.

    Also accepted: `chat_template`, `padding_side` (default "right"), `truncation_side`, `model_max_length`,
    `additional_special_tokens`, `split_special_tokens` and the other special tokens.
    """

    is_fast = False

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        unk_token: str | AddedToken | None = "<unk>",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        pad_token: str | AddedToken | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = True,
        **kwargs: Any,
    ):
        if not isinstance(vocab_file, str | os.PathLike):
            raise ValueError(f"vocab_file must be the path of a .model file, got {vocab_file!r}")
        data = read_model(vocab_file)
        settings = self._meant(kwargs, ()) | dict(
            unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces, add_prefix_space=add_prefix_space,
            use_default_system_prompt=use_default_system_prompt, legacy=legacy, sp_model_kwargs=sp_model_kwargs,
            spaces_between_special_tokens=spaces_between_special_tokens,
            add_bos_token=add_bos_token, add_eos_token=add_eos_token,
        )  # fmt: skip
        self._build(data, str(vocab_file), settings)

    def _build(self, data: bytes, name: str, settings: Mapping[str, Any]) -> None:
        self._set_up(settings, "right")
        if is_ranks(data):
            raise ValueError(f"{name} is a Llama 3 tokenizer, not a SentencePiece model; use LlamaTokenizerFast")
        self.vocab_file = name
        self._file = SentencePieceFile.parse(data, name)
        self.sp_model_kwargs = dict(settings.get("sp_model_kwargs") or {})
        if unknown := self.sp_model_kwargs.keys() - SP_OPTIONS:
            legal = ", ".join(sorted(SP_OPTIONS))
            raise ValueError(
                f"sp_model_kwargs: {min(unknown)!r} is not an option of SentencePieceProcessor; legal: {legal}"
            )
        said = settings.get("legacy")
        self.legacy = True if said is None else bool(said)
        self.add_prefix_space = settings.get("add_prefix_space") is not False
        self.add_bos_token = bool(settings.get("add_bos_token", True))
        self.add_eos_token = bool(settings.get("add_eos_token", False))
        self._load_models()
        self._added: dict[int, AddedToken] = {}
        self._numbers: dict[str, int] = {}
        self._size = self.vocab_size
        loading.register(self, settings)

    def _load_models(self) -> None:
        """Load the processors that encode with and without a space in front; `sp_model` is one of them."""
        as_written = self.legacy and self._file.add_dummy_prefix

        def load(prefix: bool) -> Any:
            try:
                data = self._file.with_dummy_prefix(prefix)
                return sentencepiece.SentencePieceProcessor(model_proto=data, **self.sp_model_kwargs)
            except (RuntimeError, TypeError, ValueError, OSError) as error:
                raise ValueError(f"{self.vocab_file} is damaged or not a SentencePiece model ({error})") from error

        self._plain = load(False)
        self._prefixed = load(True) if self._prefixes else self._plain
        self.sp_model = self._prefixed if as_written else self._plain
        self._pattern: re.Pattern[str] | None = None

    @property
    def _prefixes(self) -> bool:
        """Whether encoding adds a space in front of anything. With `legacy`, the model file may turn it off."""
        return self.add_prefix_space and (self._file.add_dummy_prefix or not self.legacy)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("sp_model", "_plain", "_prefixed", "_pattern")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load_models()

    # Text to ids

    def _encode_texts(self, texts: list[str], split_special_tokens: bool) -> list[Pieces]:
        search = self._splitter().search
        whole = [not search(text) for text in texts]  # without added tokens, as most texts are
        try:
            ids = iter(self._encode_whole([text for text, is_ in zip(texts, whole, strict=True) if is_]))
            return [
                Pieces(next(ids) if is_ else self._encode_parts(text, split_special_tokens))
                for text, is_ in zip(texts, whole, strict=True)
            ]
        except (UnicodeEncodeError, RuntimeError) as error:  # raised for surrogates, by version of the library
            raise ValueError("the text is not valid Unicode: it contains surrogates") from error

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        if len(texts) < 16:  # the library starts threads for a list
            return [self._prefixed.encode(text, out_type=int) for text in texts]
        return self._prefixed.encode(texts, out_type=int)

    def _encode_parts(self, text: str, split_special_tokens: bool) -> list[int]:
        """Encode a text that contains added tokens."""
        ids: list[int] = []
        prefixed = self._prefixes
        for number, part in enumerate(self._parts(text, split_special_tokens)):
            if isinstance(part, int):
                if number == 0 and prefixed and not self.legacy and not self._is_special(part):
                    ids += self._plain.encode(pieces.SPACE, out_type=int)
                ids.append(part)
            else:
                model = self._prefixed if self.legacy or number == 0 else self._plain
                ids += model.encode(part, out_type=int)
        return ids

    def _is_special(self, number: int) -> bool:
        token = self._added[number]
        return (token.special and token.content not in self._demoted) or token.content in self.special_names

    def _splitter(self) -> re.Pattern[str]:
        if self._pattern is None:
            longest_first = sorted(self._numbers, key=len, reverse=True)
            self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        return self._pattern

    def _parts(self, text: str, split_special_tokens: bool) -> list[str | int]:
        """Split the text at added tokens, which are returned as ids."""
        parts: list[str | int] = []
        done = 0
        for match in self._splitter().finditer(text):
            number = self._numbers[match[0]]
            token, (start, stop) = self._added[number], match.span()
            if split_special_tokens and token.special:
                continue
            if token.single_word and (WORD.match(text[start - 1 : start]) or WORD.match(text[stop : stop + 1])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip(WHITE)))
            if token.rstrip:
                stop += len(text) - stop - len(text[stop:].lstrip(WHITE))
            if done < start:
                parts.append(text[done:start])
            parts.append(number)
            done = stop
        if done < len(text):
            parts.append(text[done:])
        return parts

    def _frame(self, pair: bool) -> Frame:
        return framed(self, pair)

    # Ids to text

    def _join(self, ids: list[int], spaces: bool) -> str:
        return self._join_tokens([self._name(number) for number in ids], spaces)

    def _join_tokens(self, tokens: list[str], spaces: bool) -> str:
        apart = {t for t, n in self._numbers.items() if n >= self.vocab_size} if spaces else set()
        apart -= {token.content for token in self._named.values()}
        return pieces.join(tokens, self._numbers, apart, self._prefixes, self.legacy)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens into text."""
        return self._join_tokens(tokens, self.spaces_between_special_tokens)

    # The vocabulary

    def _flagged(self) -> dict[int, AddedToken]:
        return self._added

    def _id_of(self, token: str) -> int | None:
        if token in self._numbers:
            return self._numbers[token]
        number = self._plain.piece_to_id(token)
        return number if self._plain.id_to_piece(number) == token else None

    def _token_of(self, number: int) -> str | None:
        if number in self._added:
            return self._added[number].content
        return self._plain.id_to_piece(int(number)) if 0 <= number < self.vocab_size else None

    def _add(self, *tokens: AddedToken) -> None:
        for token in tokens:
            if token.content in self._numbers:
                continue
            found = self._id_of(token.content)
            number = len(self) if found is None else found
            self._added[number], self._numbers[token.content] = copy_of(token), number
            self._size = max(self._size, number + 1)
        self._pattern = None
        self._forget()

    @property
    def vocab_size(self) -> int:
        return len(self._file.pieces)

    def __len__(self) -> int:
        return self._size

    def get_vocab(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate(self._file.pieces)} | self._numbers

    # Files

    def _settings(self) -> dict[str, Any]:
        names = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "sp_model_kwargs")
        return super()._settings() | {name: getattr(self, name) for name in names}

    def _vocabulary_files(self, folder: Path, prefix: str) -> list[Path]:
        path = folder / f"{prefix}tokenizer.model"
        path.write_bytes(self._file.data)
        return [path]

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str]:
        """Write the `.model` file to a folder, byte for byte, and return its path."""
        folder = loading.existing_folder(save_directory)
        return (str(self._vocabulary_files(folder, f"{filename_prefix}-" if filename_prefix else "")[0]),)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a tokenizer.model, or that of a model, found as by `load_tokenizer`.

        Args:
            kwargs: constructor arguments, which override tokenizer_config.json, and those for the Hub.

        Raises:
            ValueError, OSError: there is no tokenizer, or it is damaged; the message names the file.
        """
        path = loading.found(pretrained_model_name_or_path, kwargs)
        options = cls._meant(kwargs, ("from_slow",))
        model = path / "tokenizer.model" if path.is_dir() else path
        if path.is_dir() and not model.exists():
            raise FileNotFoundError(f"{model} does not exist; LlamaTokenizer needs it, LlamaTokenizerFast may not")
        settings = loading.folder_settings(path) if path.is_dir() else {}
        made = cls.__new__(cls)
        defaults = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        made._build(read_model(model), str(model), defaults | settings | options)
        made.name_or_path = str(pretrained_model_name_or_path)
        return made


# Unicode white space, as the `tokenizers` library defines it.
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
WORD = re.compile(r"\w")
