"""LlamaTokenizerFast: the tokenizer built on the `tokenizers` library."""

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from tokenizers import AddedToken, Tokenizer, processors

from . import building, loading, pieces
from .base import LlamaTokenizerBase
from .batch import Frame, Pieces, Places
from .model_file import SentencePieceFile, is_ranks, read_model, read_ranks
from .slow import framed
from .special import NAMES, copy_of

# Key of tokenizer_config.json: this tokenizer.json was built here from a .model file, so SentencePiece's rules apply
# where the library lacks them.
BUILT = "built_from_sentencepiece"
# Keys of tokenizer_config.json that list tokens.
LISTED = {
    *NAMES, "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "model_specific_special_tokens",
}  # fmt: skip
USUAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


class LlamaTokenizerFast(LlamaTokenizerBase):
    """Byte-pair encoding with the `tokenizers` library.

    A tokenizer.json is followed exactly. A tokenizer built from a `.model` file gives the results of `LlamaTokenizer`.

    Args:
        vocab_file: a `.model` file, SentencePiece's or Llama 3's; or a `tokenizers.Tokenizer`.
        tokenizer_file: a tokenizer.json; or, with a `tokenizers.Tokenizer`, the contents of tokenizer_config.json.
        add_bos_token, add_eos_token: as for `LlamaTokenizer`. By default, a tokenizer.json decides.
        legacy, add_prefix_space: as for `LlamaTokenizer`; without effect on a tokenizer.json.

    The other arguments are those of `LlamaTokenizer`. `padding_side` defaults to "left".
    """

    vocab_files_names: ClassVar = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    is_fast = True

    def __init__(
        self,
        vocab_file: "str | os.PathLike[str] | Tokenizer | None" = None,
        tokenizer_file: "str | os.PathLike[str] | Mapping[str, Any] | None" = None,
        clean_up_tokenization_spaces: bool = False,
        unk_token: str | AddedToken | None = "<unk>",
        bos_token: str | AddedToken | None = "<s>",
        eos_token: str | AddedToken | None = "</s>",
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        use_default_system_prompt: bool = False,
        legacy: bool | None = None,
        add_prefix_space: bool | None = None,
        **kwargs: Any,
    ):
        kwargs = self._meant(kwargs, ("tokenizer_object",))
        given = kwargs.pop("tokenizer_object", None) or vocab_file
        if isinstance(given, Tokenizer):
            said = dict(tokenizer_file) if isinstance(tokenizer_file, Mapping) else {}
            self._take(given, said | kwargs, None)
            return
        settings = kwargs | dict(
            clean_up_tokenization_spaces=clean_up_tokenization_spaces, legacy=legacy, add_prefix_space=add_prefix_space,
            unk_token=unk_token, bos_token=bos_token, eos_token=eos_token, add_bos_token=add_bos_token,
            add_eos_token=add_eos_token, use_default_system_prompt=use_default_system_prompt,
        )  # fmt: skip
        if tokenizer_file is not None and not isinstance(tokenizer_file, Mapping):
            library = read_tokenizer_json(Path(tokenizer_file))
            model = None if vocab_file is None else read_model(vocab_file)  # type: ignore[arg-type]
            said = {name: value for name, value in settings.items() if name not in USUAL or value != USUAL[name]}
            self._take(library, with_known_names(library, said), model)
            if add_bos_token is not None or add_eos_token is not None:
                self.update_post_processor()
        elif vocab_file is not None and not isinstance(vocab_file, Tokenizer):
            self._build(read_model(vocab_file), str(vocab_file), settings)
        else:
            raise ValueError("pass vocab_file, a .model file, or tokenizer_file, a tokenizer.json")

    def _take(self, library: Tokenizer, settings: Mapping[str, Any], model: bytes | None) -> None:
        """Wrap a tokenizer of the library."""
        self._set_up(settings, "left")
        self._tokenizer = library
        library.no_truncation()
        library.no_padding()
        self._model = model
        self._rules = dict(settings[BUILT]) if isinstance(settings.get(BUILT), Mapping) else None
        self._flags: dict[str, bool] | None = None
        self._frames: dict[bool, Frame] = {}
        loading.register(self, settings, obeyed=True)
        if self._rules:
            said = {name: settings.get(f"add_{name}_token") for name in ("bos", "eos")}
            if said != {"bos": None, "eos": None}:  # transformers 5 leaves both out and keeps the template
                self._flags = {name: bool(value) for name, value in said.items()}
            listed = settings.get("added_tokens_decoder") or {}
            self._demoted = {token["content"] for token in listed.values() if token.get("special") is False}
            self._forget()

    def _build(self, model: bytes, name: str, settings: Mapping[str, Any], llama_version: str | None = None) -> None:
        """Build a tokenizer from a `.model` file."""
        if is_ranks(model):
            special = building.LLAMA3_SPECIAL if llama_version == "3" else building.LLAMA31_SPECIAL
            library, defaults = building.from_ranks(read_ranks(model, name), special), LLAMA_3
            self._take(library, {n: v for n, v in settings.items() if n not in LISTED}, model)
            self._flags = {"bos": True, "eos": False}
            named = {n: v for n, v in settings.items() if n in NAMES and v not in ("<unk>", "<s>", "</s>")}
            settings = {n: v for n, v in settings.items() if n not in NAMES} | {"unk_token": None} | defaults | named
        else:
            file = SentencePieceFile.parse(model, name)
            legacy = settings.get("legacy") is not False
            prefix = settings.get("add_prefix_space") is not False and (file.add_dummy_prefix or not legacy)
            library = building.from_sentencepiece(file, name, legacy, prefix)
            self._take(library, {n: v for n, v in settings.items() if n not in LISTED}, model)
            self._rules = {"legacy": legacy, "add_prefix_space": prefix, "vocab_size": len(file.pieces)}
        self._additional = []
        loading.register(self, settings)
        said = {"bos": settings.get("add_bos_token"), "eos": settings.get("add_eos_token")}
        self._flags = {"bos": said["bos"] is not False, "eos": bool(said["eos"])}
        if not self._named.get("bos_token") and said["bos"] is None:
            self._flags["bos"] = False
        self.update_post_processor()

    @cached_property
    def _plain_added(self) -> frozenset[int]:
        return frozenset(n for n, token in self.added_tokens_decoder.items() if not token.special)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_literal"}
        return kept | {"_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_tokenizer": Tokenizer.from_str(state["_tokenizer"])})

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The underlying `tokenizers.Tokenizer`."""
        self._forget()  # the caller may change it
        return self._tokenizer

    @cached_property
    def _literal(self) -> Tokenizer:
        """A copy of the library's tokenizer for `split_special_tokens`: other threads may be using the original."""
        made = Tokenizer.from_str(self._tokenizer.to_str())
        made.encode_special_tokens = True
        return made

    # Text to ids

    def _encode_texts(self, texts: list[str], split_special_tokens: bool) -> list[Pieces]:
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"text must be a string, got {type(text).__name__}")
        library = self._literal if split_special_tokens else self._tokenizer
        try:
            # Twice as fast as encode_batch, since it does not compute offsets.
            found = [e.ids for e in library.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:  # raised by the library for surrogates
            raise ValueError("the text is not valid Unicode: it contains surrogates") from error
        except Exception as error:  # the library raises plain Exception where a tokenizer's parts do not fit together
            raise ValueError(f"{self.name_or_path}: the tokenizer cannot encode the text ({error})") from error
        if self._rules is not None:
            found = [self._by_the_rules(text, ids) for text, ids in zip(texts, found, strict=True)]
        return [
            Pieces(ids, LaterPlaces(self, text, ids, split_special_tokens))
            for text, ids in zip(texts, found, strict=True)
        ]

    def _by_the_rules(self, text: str, ids: list[int]) -> list[int]:
        """Add the space that the library omits in front of a text that begins with a non-special added token."""
        if not text or not ids:
            return []
        assert self._rules is not None
        if ids[0] in self._plain_added and self._rules["add_prefix_space"] and not self._rules["legacy"]:
            token = self._name(ids[0])
            if token not in self.special_names and text.lstrip().startswith(token.strip()):
                (start, stop) = self._tokenizer.encode(text, add_special_tokens=False).offsets[0]
                if start == 0 and text[:stop].strip() == token.strip():
                    return self._space() + ids
        return ids

    def _space(self) -> list[int]:
        space = self._id_of(pieces.SPACE)
        names = [pieces.SPACE] if space is not None else [f"<0x{byte:02X}>" for byte in pieces.SPACE.encode()]
        return [number for name in names if (number := self._id_of(name)) is not None]

    def _frame(self, pair: bool) -> Frame:
        if self._flags is not None:
            return framed(self, pair)
        if pair not in self._frames:
            self._frames[pair] = _written_frame(self._tokenizer, pair)
        return self._frames[pair]

    def _before_change(self, name: str) -> None:
        """If texts begin or end with the current bos_token or eos_token, make them do so with the new one."""
        if name in ("bos_token", "eos_token") and self._flags is None:
            flags = {"bos": self.add_bos_token, "eos": self.add_eos_token}
            if flags[name[:3]]:
                self._flags = flags

    def _set_named(self, name: str, token: Any) -> None:
        super()._set_named(name, token)
        if name in ("bos_token", "eos_token") and self._flags is not None and None not in self._missing():
            self._write_post_processor()

    def _missing(self) -> list[Any]:
        assert self._flags is not None
        return [getattr(self, f"{name}_token_id") for name, wanted in self._flags.items() if wanted]

    def update_post_processor(self) -> None:
        """Add the current bos_token and eos_token around texts, as `add_bos_token` and `add_eos_token` say.

        Setting any of these does so too.

        Raises:
            ValueError: a token that is to be added is None.
        """
        if self._flags is None:
            self._flags = {"bos": self.add_bos_token, "eos": self.add_eos_token}
        self._frame(pair=False)
        self._write_post_processor()

    def _write_post_processor(self) -> None:
        """Update the library's post-processor, for tokenizer.json, keeping its ByteLevel steps."""
        alone, both = framed(self, pair=False), framed(self, pair=True)
        named = {number: self._name(number) for marks in (alone.marks[0], alone.marks[2]) for number, _ in marks}
        piece = lambda marks: [f"{named[number]}:{type_}" for number, type_ in marks]  # noqa: E731
        template = processors.TemplateProcessing(
            single=[*piece(alone.marks[0]), "$A:0", *piece(alone.marks[2])],
            pair=[*piece(both.marks[0]), "$A:0", *piece(both.marks[1]), "$B:1", *piece(both.marks[2])],
            special_tokens=[(token, number) for number, token in named.items()],
        )
        rest = [processors.ByteLevel(**kept) for kept in _byte_level(self._tokenizer)]
        self._tokenizer.post_processor = processors.Sequence([*rest, template]) if rest else template

    @property
    def add_bos_token(self) -> bool:
        """Whether a text begins with `bos_token`."""
        if self._flags is not None:
            return self._flags["bos"]
        return self.bos_token_id is not None and self.bos_token_id in self._frame(pair=False).ids[0]

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._flags = {"bos": bool(value), "eos": self.add_eos_token}
        self.update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        """Whether a text ends with `eos_token`."""
        if self._flags is not None:
            return self._flags["eos"]
        return self.eos_token_id is not None and self.eos_token_id in self._frame(pair=False).ids[2]

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._flags = {"bos": self.add_bos_token, "eos": bool(value)}
        self.update_post_processor()

    @property
    def legacy(self) -> bool:
        """Whether each part between special tokens is encoded as if a text began there."""
        return True if self._rules is None else self._rules["legacy"]

    @property
    def add_prefix_space(self) -> bool:
        """Whether a space is added in front of the text."""
        return self._rules is None or self._rules["add_prefix_space"]

    # Ids to text

    def _join(self, ids: list[int], spaces: bool) -> str:
        if self._rules is None:
            return self._tokenizer.decode(ids, skip_special_tokens=False)
        return self._join_tokens([self._name(number) for number in ids], spaces)

    def _join_tokens(self, tokens: list[str], spaces: bool) -> str:
        assert self._rules is not None
        added = self._added_ids
        named = {token.content for token in self._named.values()}
        apart = {t for t, n in added.items() if n >= self._rules["vocab_size"]} - named if spaces else set()
        return pieces.join(tokens, added, apart, self._rules["add_prefix_space"], self._rules["legacy"])

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens into text."""
        if self._rules is not None:
            return self._join_tokens(tokens, self.spaces_between_special_tokens)
        decoder = self._tokenizer.decoder
        return decoder.decode(tokens) if decoder is not None else " ".join(tokens)

    @property
    def _keeps_spaces(self) -> bool:
        return "ByteLevel" in str(self._tokenizer.decoder)

    @property
    def _judges_runs_of_bytes(self) -> bool:
        """Whether one invalid byte turns its whole run into U+FFFD, as the library's ByteFallback decoder does."""
        return self._rules is None and "ByteFallback" in str(self._tokenizer.decoder)

    # The vocabulary

    def _flagged(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def _id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def _token_of(self, number: int | None) -> str | None:
        return self._tokenizer.id_to_token(number) if number is not None and 0 <= number < 2**32 else None

    def _add(self, *tokens: AddedToken) -> None:
        known = {token.content for token in self._flagged().values()}
        tokens = tuple(token for token in tokens if token.content not in known)
        if self._rules is not None:
            # SentencePiece does not normalize; in the library, a normalized token would absorb the space in front
            tokens = tuple(copy_of(token, normalized=False) for token in tokens)
        self._tokenizer.add_tokens(list(tokens))
        self._forget()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab(with_added_tokens=True)

    # Files

    def contents(self) -> tuple[Tokenizer, dict[str, Any]]:
        """The library's tokenizer and the contents of tokenizer_config.json, which the constructor accepts."""
        return self._tokenizer, self._settings()

    def _settings(self) -> dict[str, Any]:
        said = super()._settings()
        # With this name, transformers 4 and 5 follow tokenizer.json; with Llama's, 5 substitutes its own rules.
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
        said |= {name: getattr(self, name) for name in ("model_input_names", "padding_side")}  # other defaults there
        if self._rules is not None:
            said |= {"legacy": self.legacy, "add_prefix_space": self.add_prefix_space, BUILT: self._rules}
        elif self.init_kwargs.get("tokenizer_class"):
            said["tokenizer_class"] = self.init_kwargs["tokenizer_class"]
        if self._flags is not None or "add_bos_token" in self.init_kwargs:
            said |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        return said

    def _vocabulary_files(self, folder: Path, prefix: str) -> list[Path]:
        if self._model is None:
            return []
        path = folder / f"{prefix}tokenizer.model"
        path.write_bytes(self._model)
        return [path]

    def _library_files(self, folder: Path, prefix: str) -> list[Path]:
        path = folder / f"{prefix}tokenizer.json"
        self._tokenizer.save(str(path))
        return [path]

    def save_vocabulary(self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None) -> tuple[str]:
        """Write the `.model` file that this was built from to a folder and return its path."""
        if self._model is None:
            raise ValueError(
                "Your fast tokenizer does not have the necessary information to save the vocabulary for a slow "
                "tokenizer: it was not built from a .model file. save_pretrained writes a tokenizer.json"
            )
        path = (
            loading.existing_folder(save_directory)
            / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        )
        path.write_bytes(self._model)
        return (str(path),)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load the tokenizer of a model, found as by `load_tokenizer`.

        Args:
            from_slow: build it from the tokenizer.model even if there is a tokenizer.json.
            llama_version: for the tokenizer.model of a Llama 3, which lacks the special tokens: "3" names them as in
                Llama 3, anything else as in Llama 3.1 and later. Default: as the params.json next to it says.
            kwargs: constructor arguments, which override tokenizer_config.json, and those for the Hub.

        Raises:
            ValueError, OSError: there is no tokenizer, or it is damaged; the message names the file.
        """
        from ..checkpoints.gguf import GGUFFile  # here because of a circular import

        path = loading.found(pretrained_model_name_or_path, kwargs)
        options = cls._meant(kwargs, ("from_slow", "llama_version"))
        rebuild, version = options.pop("from_slow", False), options.pop("llama_version", None)
        made = cls.__new__(cls)
        file, model = (path / "tokenizer.json", path / "tokenizer.model") if path.is_dir() else (path, path)
        settings = loading.folder_settings(path) if path.is_dir() else {}
        if path.is_file() and path.suffix.lower() == ".gguf":
            library, said = GGUFFile(path).tokenizer()
            made._take(library, said | options, None)
        elif (path.is_file() and path.suffix == ".json") or (path.is_dir() and file.exists() and not rebuild):
            library = read_tokenizer_json(file)
            kept = read_model(model) if path.is_dir() and model.is_file() else None
            made._take(library, with_known_names(library, settings | options), kept)
        elif path.is_dir() and not model.exists():
            wanted = model if rebuild else file
            raise FileNotFoundError(f"{wanted} does not exist; a tokenizer needs a tokenizer.json or a tokenizer.model")
        else:
            version = loading.llama_version(model.parent) if version is None else version
            made._build(read_model(model), str(model), USUAL | settings | options, version)
            options = {}
        if any(options.get(f"add_{name}_token") is not None for name in ("bos", "eos")):
            said_bos, said_eos = options.get("add_bos_token"), options.get("add_eos_token")
            made._flags = {
                "bos": made.add_bos_token if said_bos is None else bool(said_bos),
                "eos": made.add_eos_token if said_eos is None else bool(said_eos),
            }
            made.update_post_processor()
        made.name_or_path = str(pretrained_model_name_or_path)
        return made


# Llama 3's special tokens, from Meta's llama-models, tokenizer.py.
LLAMA_3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


class LaterPlaces:
    """Lazily computed `Places` of a text."""

    __slots__ = ("_found", "_ids", "_split", "_text", "_tokenizer")

    def __init__(self, tokenizer: LlamaTokenizerFast, text: str, ids: list[int], split_special_tokens: bool):
        self._tokenizer, self._text, self._ids, self._split = tokenizer, text, ids, split_special_tokens
        self._found: Places | None = None

    @property
    def _places(self) -> Places:
        if self._found is None:
            self._found = self._find()
        return self._found

    def __reduce__(self) -> Any:
        """Pickle as plain `Places`, without the tokenizer."""
        return Places, tuple(self._places)

    def _find(self) -> Places:
        library = self._tokenizer._literal if self._split else self._tokenizer._tokenizer
        encoding = library.encode(self._text, add_special_tokens=False)
        unseen = len(self._ids) - len(encoding.ids)  # a leading space that no character stands for
        if self._ids[max(0, unseen) :] != encoding.ids[max(0, -unseen) :]:
            raise ValueError("the tokenizer has been changed since it encoded this text; encode it again")
        if unseen < 0:  # an empty text, which the library turns into a space
            return Places([], [])
        words: list[int | None] = [None] * unseen
        return Places([(0, 0)] * unseen + encoding.offsets, words + encoding.word_ids)

    @property
    def offsets(self) -> list[tuple[int, int]]:
        return self._places.offsets

    @property
    def word_ids(self) -> list[int | None]:
        return self._places.word_ids


def with_known_names(library: Tokenizer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with Llama's usual special tokens as defaults where a tokenizer.json has them."""
    added = {token.content for token in library.get_added_tokens_decoder().values() if token.special}
    return {name: token for name, token in USUAL.items() if token in added} | dict(settings)


def _written_frame(library: Tokenizer, pair: bool) -> Frame:
    """The special tokens that a tokenizer.json adds around a text, found by encoding a short one."""
    names = (library.id_to_token(number) for number in range(min(50, library.get_vocab_size())))
    samples = (library.encode(text, add_special_tokens=False) for text in ["a", " ", *filter(None, names)])
    sample = next((encoding for encoding in samples if encoding.ids), None)
    if sample is None:
        return Frame([], [], [])
    whole = library.post_process(sample, sample if pair else None, True)
    size, marks = len(sample.ids), list(zip(whole.ids, whole.type_ids, strict=True))
    places = [number for number, special in enumerate(whole.special_tokens_mask) if not special]
    first, last = places[0], places[-1]
    second = places[size] if pair else last + 1
    between = marks[first + size : second] if pair else []
    return Frame(marks[:first], between, marks[last + 1 :], (marks[first][1], marks[second][1] if pair else 1))


def _byte_level(library: Tokenizer) -> list[dict[str, Any]]:
    """The arguments of the ByteLevel post-processors, which a new template leaves in place."""
    if library.post_processor is None:
        return []
    state = json.loads(library.post_processor.__getstate__())
    steps = state["processors"] if state["type"] == "Sequence" else [state]
    names = ("add_prefix_space", "trim_offsets", "use_regex")
    return [{n: step[n] for n in names if n in step} for step in steps if step["type"] == "ByteLevel"]


def read_tokenizer_json(path: Path) -> Tokenizer:
    """Load a tokenizer.json with the library."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it should be a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from error
