"""Incremental decoding of ids into text."""

import re
from typing import Any

BYTE = re.compile("<0x[0-9A-F]{2}>")


class TextStream:
    """Decode ids incrementally: text comes out as early as possible, and never half a character.

    A token may hold only part of a character's bytes, or a space that shows only next to other tokens. So each step
    decodes the few ids since the last safe boundary together, and returns the new part of their text once it is whole.

    The pieces concatenate to `decode` of all ids, without `clean_up_tokenization_spaces`. Where one invalid byte makes
    its neighbours invalid too, which is how `tokenizers` decodes SentencePiece's bytes, a run of bytes is held back
    until it ends.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True):
        self._knows = getattr(tokenizer, "knows", lambda token: True)  # transformers' decode accepts any id
        self._silent = set(getattr(tokenizer, "_silent", tokenizer.all_special_ids)) if skip_special_tokens else set()
        self._decode = lambda ids: tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        self._waits = getattr(tokenizer, "_judges_runs_of_bytes", False)
        self._name = getattr(tokenizer, "_token_of", None)
        self._ids: list[int] = []  # since the last safe boundary; the text of the first `_told` is out
        self._told = 0

    def put(self, token: int) -> str:
        """Return the text that `token` completes: often its own, sometimes "" or more; "" for an id without a token."""
        if int(token) in self._silent or not self._knows(int(token)):
            return ""
        self._ids.append(int(token))
        if self._waits and self._name is not None and BYTE.fullmatch(self._name(int(token)) or ""):
            return ""
        told, text = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or len(text) <= len(told):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return text[len(told) :]

    def end(self) -> str:
        """Return the remaining text; an incomplete character becomes U+FFFD."""
        rest = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        self._ids, self._told = [], 0
        return rest
