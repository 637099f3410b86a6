"""The special tokens of a tokenizer, under their names in transformers."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def as_token(value: Any, name: str, **flags: Any) -> AddedToken:
    """Convert a string or a token's entry in tokenizer_config.json to an AddedToken, with `flags` as its defaults.

    Raises:
        ValueError: `value` is neither of these nor an AddedToken.
    """
    if isinstance(value, str):
        return AddedToken(value, **flags)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        known = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return AddedToken(value["content"], **(flags | {key: bool(value[key]) for key in known if key in value}))
    if isinstance(value, AddedToken):
        return value
    raise ValueError(f"{name} must be a string, got {value!r}")


def copy_of(token: AddedToken, **changed: bool) -> AddedToken:
    """Copy a token, changing some flags."""
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(token.content, **(flags | changed))


def flags_of(token: AddedToken) -> dict[str, Any]:
    """A token's entry in tokenizer_config.json."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {name: getattr(token, name) for name in names}


class SpecialTokens:
    """`bos_token`, `eos_token`, `unk_token`, `pad_token` and the like, each with its id, such as `bos_token_id`.

    Setting one takes effect immediately: on the ids added around a text, on padding and on what decoding skips.
    """

    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    sep_token: str | None
    pad_token: str | None
    cls_token: str | None
    mask_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    unk_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None
    cls_token_id: int | None
    mask_token_id: int | None

    _named: dict[str, AddedToken]
    _additional: list[AddedToken]
    _own: dict[str, str]  # additional tokens with model-specific names, such as image_token
    _demoted: set[str]  # added tokens that are no longer special

    def _id_of(self, token: str) -> int | None:
        raise NotImplementedError

    def _token_of(self, number: int) -> str | None:
        raise NotImplementedError

    def _flagged(self) -> dict[int, AddedToken]:
        """The added tokens, by id."""
        raise NotImplementedError

    def _before_change(self, name: str) -> None:
        """Hook that runs before a special token changes."""

    def _forget(self) -> None:
        """Drop what is cached about the added tokens, because they have changed."""
        for name in ("_silent", "_added_ids", "_plain_added", "_literal"):
            vars(self).pop(name, None)

    @cached_property
    def _silent(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` skips: special tokens, and added tokens marked as special."""
        marked = {number for number, token in self.added_tokens_decoder.items() if token.special}
        return frozenset(marked | set(self.all_special_ids))

    def _set_named(self, name: str, token: Any) -> None:
        self._forget()
        if token is None:
            self._before_change(name)
            self._named.pop(name, None)
            return
        made = as_token(token, name, normalized=False, special=True)
        if self._id_of(made.content) is None:
            raise ValueError(
                f"{name} {made.content!r} is not in the vocabulary; "
                f"add it with tokenizer.add_special_tokens({{'{name}': {made.content!r}}})"
            )
        self._before_change(name)
        self._named[name] = made

    def _set_named_id(self, name: str, number: int | None) -> None:
        token = None if number is None else self._token_of(number)
        if number is not None and token is None:
            raise ValueError(f"{name}_id must be the id of a token, got {number}")
        setattr(self, name, token)

    def _named_id(self, name: str) -> int | None:
        token = self._named.get(name)
        return None if token is None else self._id_of(token.content)

    @property
    def additional_special_tokens(self) -> list[str]:
        """Special tokens without a named role."""
        return [token.content for token in self._additional]

    @additional_special_tokens.setter
    def additional_special_tokens(self, tokens: Iterable[Any] | None) -> None:
        made = [as_token(token, "additional_special_tokens", special=True) for token in tokens or []]
        for token in made:
            if self._id_of(token.content) is None:
                raise ValueError(
                    f"additional_special_tokens: {token.content!r} is not in the vocabulary; "
                    "add it with tokenizer.add_special_tokens"
                )
        self._replace_additional(made)

    def _replace_additional(self, tokens: list[AddedToken]) -> None:
        """Replace the additional tokens; those no longer listed stay tokens but are no longer special."""
        self._demoted |= {token.content for token in self._additional}
        self._additional = tokens
        self._demoted -= {token.content for token in [*tokens, *self._named.values()]}
        self._forget()

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """The ids of `additional_special_tokens`."""
        return [self._id_of(token) for token in self.additional_special_tokens]  # type: ignore[misc]

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id, special tokens included."""
        plain = lambda token: copy_of(token, special=False) if token.content in self._demoted else token  # noqa: E731
        return {number: plain(token) for number, token in sorted(self._flagged().items())}

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """All special tokens by name, as strings."""
        named = {name: self._named[name].content for name in NAMES if name in self._named}
        return named | ({"additional_special_tokens": self.additional_special_tokens} if self._additional else {})

    @property
    def special_tokens_map_extended(self) -> dict[str, Any]:
        """All special tokens by name, as AddedToken objects."""
        named: dict[str, Any] = {name: self._named[name] for name in NAMES if name in self._named}
        return named | ({"additional_special_tokens": list(self._additional)} if self._additional else {})

    @property
    def all_special_tokens(self) -> list[str]:
        """The named special tokens and the additional ones."""
        named = [self._named[name].content for name in NAMES if name in self._named]
        return list(dict.fromkeys(named + self.additional_special_tokens))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of `all_special_tokens`."""
        numbers = (self._id_of(token) for token in self.all_special_tokens)
        return list(dict.fromkeys(number for number in numbers if number is not None))


def _property(name: str) -> property:
    def get(self: SpecialTokens) -> str | None:
        token = self._named.get(name)
        return None if token is None else token.content

    return property(get, lambda self, token: self._set_named(name, token), doc=f"The {name}, None if there is none.")


def _id_property(name: str) -> property:
    return property(
        lambda self: self._named_id(name),
        lambda self, number: self._set_named_id(name, number),
        doc=f"The id of {name}, None if there is none.",
    )


for _name in NAMES:
    setattr(SpecialTokens, _name, _property(_name))
    setattr(SpecialTokens, f"{_name}_id", _id_property(_name))
