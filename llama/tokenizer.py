"""Text to ids and back."""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from .checkpoints import open_checkpoint
from .checkpoints.huggingface import write_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class LlamaTokenizerFast:
    """A tokenizer read from a tokenizer.json, which is obeyed as it is written, or from a GGUF file.

    Args:
        tokenizer: the library's tokenizer object.
        config: the contents of tokenizer_config.json: special tokens, chat template and the like.
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any] | None = None):
        self._tokenizer = tokenizer
        self._config = dict(config or {})
        for name in SPECIAL_TOKENS:
            token = self._config.get(name)  # a string, or an object that says more of the same token
            token = token.get("content") if isinstance(token, dict) else token
            if not isinstance(token, str | None):
                raise ValueError(f"{name} in tokenizer_config.json must be a string, got {token!r}")
            setattr(self, name, token)
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default", template)
        if not isinstance(template, str | None):
            raise ValueError(f"chat_template in tokenizer_config.json must be a string, got {template!r}")
        self.chat_template = template

    @classmethod
    def from_pretrained(cls, where: str | os.PathLike[str]) -> "LlamaTokenizerFast":
        """The tokenizer of the model at `where`: a folder, a `.gguf` file, or the alias "smollm2".

        Raises:
            ValueError, OSError: there is none, or it is damaged; the message names the file.
        """
        return cls(*open_checkpoint(where).tokenizer())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`, as transformers reads them."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(path / "tokenizer.json"))
        write_json(path / "tokenizer_config.json", self._config)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        return self._id_of(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        return self._id_of(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that `skip_special_tokens` skips."""
        return [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    def knows(self, token: int) -> bool:
        """Whether there is a token of this id. A model's vocabulary may be padded beyond its tokenizer's."""
        return 0 <= token < 2**32 and self._tokenizer.id_to_token(token) is not None

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, with those that the tokenizer puts before and after it unless told otherwise."""
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {type(text).__name__}")
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library says of surrogates
            raise ValueError("the text is not valid Unicode: it holds bytes that are no UTF-8") from error

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> "BatchEncoding":
        """One text or several as a model's inputs: `input_ids` and `attention_mask`.

        Args:
            padding: fill shorter texts up, on the left, with `pad_token`.
            return_tensors: "pt" or "np"; None gives lists, and for one text no batch.
        """
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self.encode(one, add_special_tokens) for one in texts]
        masks = [[1] * len(row) for row in rows]
        longest = max((len(row) for row in rows), default=0)
        if padding and any(len(row) < longest for row in rows):
            if self.pad_token_id is None:
                raise ValueError("the tokenizer does not have a padding token; set `pad_token`, to `eos_token` say")
            masks = [[0] * (longest - len(row)) + mask for row, mask in zip(rows, masks, strict=True)]
            rows = [[self.pad_token_id] * (longest - len(row)) + row for row in rows]
        values: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
        if return_tensors is None:
            return BatchEncoding({name: v[0] if isinstance(text, str) else v for name, v in values.items()})
        if any(len(row) < longest for row in rows):
            raise ValueError("texts of different lengths make no tensor; pass padding=True")
        if return_tensors == "np":
            return BatchEncoding({name: np.array(v) for name, v in values.items()})
        if return_tensors != "pt":
            raise ValueError(f'return_tensors must be "pt", "np" or None, got {return_tensors!r}')
        import torch

        return BatchEncoding({name: torch.tensor(v) for name, v in values.items()})

    def batch_decode(self, sequences: Iterable, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """`decode` of each."""
        return [self.decode(ids, skip_special_tokens, **kwargs) for ids in sequences]

    def decode(
        self,
        ids: int | np.integer | Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """The text of `ids`. Bytes that make no character become U+FFFD.

        Args:
            clean_up_tokenization_spaces: take the space before punctuation and English contractions out.
        """
        numbers = [int(ids)] if isinstance(ids, int | np.integer) else [int(i) for i in ids]
        if wrong := [i for i in numbers if not self.knows(i)]:
            raise ValueError(f"ids must be those of tokens, below {len(self)} as a rule; got {wrong[0]}")
        text = self._tokenizer.decode(numbers, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces:
            for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
                text = text.replace(spaced, spaced.strip())
        return text

    def apply_chat_template(
        self,
        conversation: Sequence[dict[str, Any]],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **template_variables: Any,
    ) -> str | list[int]:
        """A conversation, [{"role": "user", "content": "..."}, ...], as the text (or ids) this model was trained on.

        The template comes with the checkpoint, so it runs in jinja2's immutable sandbox. It writes its own special
        tokens; none is added when it is tokenized.

        Args:
            add_generation_prompt: end with the words that open the assistant's answer.
            template_variables: more names for the template to see.

        Raises:
            ValueError: the tokenizer has no template, or the template refuses or fails.
        """
        if not self.chat_template:
            raise ValueError("this tokenizer has no chat template; encode plain text instead")
        names = {"tools": None, "documents": None}
        names |= {name: token for name in SPECIAL_TOKENS if (token := getattr(self, name)) is not None}
        try:
            text = _environment().from_string(self.chat_template).render(
                messages=conversation, add_generation_prompt=add_generation_prompt, **(names | template_variables)
            )  # fmt: skip
        except Exception as error:  # a template is somebody else's program: it can fail in any way
            raise ValueError(f"the chat template fails on this conversation: {error}") from error
        return self.encode(text, add_special_tokens=False) if tokenize else text


class BatchEncoding(dict):
    """A model's inputs by name, as keys and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from error

    def to(self, device: Any) -> "BatchEncoding":
        """The same, its tensors on `device`."""
        return BatchEncoding({name: value.to(device) for name, value in self.items()})


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class TextStream:
    """Ids in, text out, as early as possible and never half a character.

    A token may hold a part of a character's bytes, or a space that only its neighbours bring out. So a few ids back to
    the last safe place are decoded together each time, and what is new in their text is given once it is whole. All
    pieces together are `decode` of all ids; only where bytes make no character can SentencePiece's kind, which judges
    a run of bytes as a whole, change its mind about a part that has been given.
    """

    def __init__(self, tokenizer: LlamaTokenizerFast, skip_special_tokens: bool = True):
        self._knows = getattr(tokenizer, "knows", lambda token: True)  # transformers' decode takes any id
        self._silent = set(tokenizer.all_special_ids) if skip_special_tokens else set()
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []  # those since the last safe place; the first `_told` of them have been given
        self._told = 0

    def put(self, token: int) -> str:
        """The text that `token` completes, often its own, sometimes "" or more; "" for an id without a token."""
        if int(token) in self._silent or not self._knows(int(token)):
            return ""
        self._ids.append(int(token))
        told, text = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(told):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return text[len(told) :]

    def end(self) -> str:
        """What is left at the end of the text: a character that was never finished shows as U+FFFD."""
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        self._ids, self._told = [], 0
        return rest
