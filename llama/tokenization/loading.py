"""Load tokenizers from folders, files and aliases, and register the tokens that their settings add."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken

from .special import NAMES, as_token, copy_of

if TYPE_CHECKING:
    from .base import LlamaTokenizerBase
    from .fast import LlamaTokenizerFast
    from .slow import LlamaTokenizer


# Tokenizer classes that pad on the left; a folder that names no class counts as Llama's.
LEFT = (None, "LlamaTokenizer", "LlamaTokenizerFast")


def load_tokenizer(
    where: str | os.PathLike[str], *, use_fast: bool = True, **kwargs: Any
) -> "LlamaTokenizerFast | LlamaTokenizer":
    """Load the tokenizer at `where`: a folder with a tokenizer.json or tokenizer.model, one of these files, a `.gguf`
    file, a Hugging Face id (only the tokenizer's files are downloaded), or the alias "smollm2".

    Unless set, `padding_side` is that of transformers: "left" for Llama's tokenizer classes, "right" for all others
    that tokenizer_config.json names.

    Args:
        use_fast: False returns `LlamaTokenizer`, which needs a SentencePiece tokenizer.model.
        kwargs: tokenizer options, which override those in its files; and for the Hub `revision`, `token`, `cache_dir`,
            `local_files_only`, `force_download`, `subfolder`, `gguf_file`.

    Raises:
        ValueError, OSError: there is no tokenizer, or it is damaged; the message names the file.
    """
    from .fast import LlamaTokenizerFast
    from .slow import LlamaTokenizer

    made = (LlamaTokenizerFast if use_fast else LlamaTokenizer).from_pretrained(where, **kwargs)
    said = made.init_kwargs
    if not said.get("padding_side") and said.get("tokenizer_class") not in LEFT:
        made.padding_side = "right"
    return made


class AutoTokenizer:
    """Counterpart of transformers' AutoTokenizer: `from_pretrained` is `load_tokenizer`."""

    def __init__(self) -> None:
        raise ValueError("AutoTokenizer cannot be instantiated; use AutoTokenizer.from_pretrained")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, use_fast: bool = True, **kwargs: Any
    ) -> "LlamaTokenizerFast | LlamaTokenizer":
        """Same as `load_tokenizer`."""
        return load_tokenizer(pretrained_model_name_or_path, use_fast=use_fast, **kwargs)


def found(where: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """Return the folder or file of a tokenizer, downloading it if needed, and remove the Hub options from `kwargs`.

    LLaMA 1 came as one folder per size, with the tokenizer.model in their parent: such a folder resolves to that file.
    """
    from ..checkpoints.where import find, hub_options  # here because of a circular import

    if (token := kwargs.pop("use_auth_token", None)) is not None:  # the former name of `token`
        kwargs.setdefault("token", token)
    path = find(where, wanted="tokenizer", **hub_options(kwargs))
    above = path.absolute().parent / "tokenizer.model"
    own = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return above if not own and (path / "params.json").exists() and above.exists() else path


def llama_version(folder: Path) -> str | None:
    """Return "3" if params.json says so: the tokenizer.model of Llama 3 and 3.1 is the same."""
    from ..checkpoints.huggingface import read_json

    path = folder / "params.json"
    return "3" if path.exists() and not read_json(path).get("use_scaled_rope") else None


def folder_settings(folder: Path) -> dict[str, Any]:
    """Read a folder's tokenizer settings: tokenizer_config.json and its older companions, and chat templates."""
    from ..checkpoints.huggingface import read_json

    path = folder / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    check_ids(said.get("added_tokens_decoder") or {}, path)
    path = folder / "special_tokens_map.json"
    if path.exists():  # an older format: the entries of tokenizer_config.json take precedence
        named = read_json(path)
        said = {n: v for n, v in named.items() if n in (*NAMES, "additional_special_tokens")} | said
    path = folder / "added_tokens.json"
    if path.exists() and "added_tokens_decoder" not in said:
        said["added_tokens_decoder"] = {number: {"content": token} for token, number in read_json(path).items()}
        check_ids(said["added_tokens_decoder"], path)
    template = folder / "chat_template.jinja"  # where transformers 5 puts it
    if template.exists():
        said["chat_template"] = _read_text(template)
    further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if further:
        default = {"default": said["chat_template"]} if isinstance(said.get("chat_template"), str) else {}
        said["chat_template"] = default | {path.stem: _read_text(path) for path in further}
    return said


def check_ids(listed: Any, path: Path | None = None) -> None:
    """Raise a ValueError that names the file unless `listed` is a mapping from ids."""
    if not isinstance(listed, Mapping) or not all(str(number).isdecimal() for number in listed):
        raise ValueError(
            f"{f'{path}: ' if path else ''}added tokens must be a mapping from ids, which are integers; got {listed!r}"
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 ({error}); download it again") from error


def register(tokenizer: "LlamaTokenizerBase", settings: Mapping[str, Any], obeyed: bool = False) -> None:
    """Add the tokens listed in `settings`, those with ids first, and assign the named special tokens.

    Args:
        obeyed: the tokenizer comes from a tokenizer.json, which takes precedence for the tokens that it has. Otherwise
            the ids must be those listed, and special tokens without a name become additional ones.
    """
    listed = settings.get("added_tokens_decoder") or {}
    check_ids(listed)
    tokens: dict[str, AddedToken] = {}
    size = len(tokenizer)
    for number, said in sorted(listed.items(), key=lambda item: int(item[0])):
        token = as_token(said, "added_tokens_decoder")
        found = tokenizer._id_of(token.content)
        if int(number) != (size if found is None else found) and not (obeyed and found is not None):
            raise ValueError(
                f"added_tokens_decoder gives {token.content!r} the id {number}, which is taken or leaves a gap"
            )
        size += found is None
        tokens[token.content] = token
    for name in NAMES:
        if (value := settings.get(name)) is not None:
            where = f"{name} in tokenizer_config.json" if obeyed else name
            tokenizer._named[name] = as_token(value, where, normalized=False, special=True)
    tokenizer._own = _names_of_its_own(tokenizer, settings)
    further = [*_further(settings), *tokenizer._own.values()]
    made = (as_token(value, "additional_special_tokens", normalized=False, special=True) for value in further)
    tokenizer._additional = list({token.content: token for token in made}.values())
    for token in [*tokenizer._named.values(), *tokenizer._additional]:
        tokens.setdefault(token.content, copy_of(token, special=True))
    tokenizer._add(*tokens.values())
    for name, content in tokenizer._own.items():
        vars(tokenizer).update({name: content, f"{name}_id": tokenizer._id_of(content)})
    if not obeyed:
        names = tokenizer.special_names
        marked = (token for token in tokenizer.added_tokens_decoder.values() if token.special)
        tokenizer._additional += [token for token in marked if token.content not in names]
    tokenizer._forget()


def _further(settings: Mapping[str, Any]) -> list[Any]:
    """The additional special tokens, called extra in transformers 5; if both are listed, both count."""
    found: list[Any] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(name) or []
        if name == "extra_special_tokens" and isinstance(value, Mapping):
            continue
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        found += value
    return found


def _names_of_its_own(tokenizer: "LlamaTokenizerBase", settings: Mapping[str, Any]) -> dict[str, str]:
    """Model-specific named special tokens: `extra_special_tokens={"image_token": ...}` of transformers 5."""
    found: dict[str, str] = {}
    for setting in ("extra_special_tokens", "model_specific_special_tokens"):
        said = settings.get(setting)
        for name, value in said.items() if isinstance(said, Mapping) else ():
            if not isinstance(name, str) or not name.isidentifier() or hasattr(tokenizer, name):
                raise ValueError(f"{setting}: {name!r} cannot be used as the name of a token; choose another")
            found[name] = as_token(value, f"{setting}: {name}").content
    return found


def existing_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"save_directory ({folder}) should be a directory")
    return folder
