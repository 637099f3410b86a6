"""Loading tokenizers from folders, files and aliases, with what their settings say about added tokens."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .special import NAMES, as_token

if TYPE_CHECKING:
    from .base import LlamaTokenizerBase
    from .fast import LlamaTokenizerFast
    from .slow import LlamaTokenizer


def load_tokenizer(
    where: str | os.PathLike[str], *, use_fast: bool = True, **kwargs: Any
) -> "LlamaTokenizerFast | LlamaTokenizer":
    """The tokenizer at `where`: a folder with tokenizer.json or tokenizer.model, one of these files, a `.gguf` file, a
    Hugging Face id, of which the tokenizer's files alone are downloaded, or the alias "smollm2".

    Args:
        use_fast: False gives `LlamaTokenizer`, which needs a tokenizer.model of SentencePiece's.
        kwargs: the tokenizer's options, instead of what its files say; and for the Hub `revision`, `token`,
            `cache_dir`, `local_files_only`, `force_download`, `subfolder`, `gguf_file`.

    Raises:
        ValueError, OSError: there is none, or it is damaged; the message names the file.
    """
    from .fast import LlamaTokenizerFast
    from .slow import LlamaTokenizer

    return (LlamaTokenizerFast if use_fast else LlamaTokenizer).from_pretrained(where, **kwargs)


class AutoTokenizer:
    """transformers' class of this name: `from_pretrained` is `load_tokenizer`."""

    def __init__(self) -> None:
        raise ValueError("AutoTokenizer has no instances; use AutoTokenizer.from_pretrained")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, use_fast: bool = True, **kwargs: Any
    ) -> "LlamaTokenizerFast | LlamaTokenizer":
        """`load_tokenizer`."""
        return load_tokenizer(pretrained_model_name_or_path, use_fast=use_fast, **kwargs)


def found(where: str | os.PathLike[str], kwargs: dict[str, Any]) -> Path:
    """The folder or file of a tokenizer, fetched if need be; what `kwargs` say of the Hub is taken out of them.

    LLaMA 1 came as a folder for each size, and the tokenizer.model above them: for such a folder it is that file.
    """
    from ..checkpoints.where import find, hub_options  # which read tokenizers in their turn

    path = find(where, wanted="tokenizer", **hub_options(kwargs))
    above = path.absolute().parent / "tokenizer.model"
    own = any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return above if not own and (path / "params.json").exists() and above.exists() else path


def llama_version(folder: Path) -> str | None:
    """ "3" where params.json says so: a tokenizer.model is the same in Llama 3 and 3.1."""
    from ..checkpoints.huggingface import read_json

    path = folder / "params.json"
    return "3" if path.exists() and not read_json(path).get("use_scaled_rope") else None


def folder_settings(folder: Path) -> dict[str, Any]:
    """What the files beside a tokenizer say of it: tokenizer_config.json, special_tokens_map.json, templates."""
    from ..checkpoints.huggingface import read_json

    path = folder / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    path = folder / "special_tokens_map.json"
    if path.exists():  # older than tokenizer_config.json's own entries, which win
        named = read_json(path)
        said = {n: v for n, v in named.items() if n in (*NAMES, "additional_special_tokens")} | said
    path = folder / "added_tokens.json"
    if path.exists() and "added_tokens_decoder" not in said:
        said["added_tokens_decoder"] = {number: {"content": token} for token, number in read_json(path).items()}
    template = folder / "chat_template.jinja"  # where transformers 5 puts it
    if template.exists():
        said["chat_template"] = template.read_text(encoding="utf-8")
    further = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if further:
        default = {"default": said["chat_template"]} if isinstance(said.get("chat_template"), str) else {}
        said["chat_template"] = default | {path.stem: path.read_text(encoding="utf-8") for path in further}
    return said


def register(tokenizer: "LlamaTokenizerBase", settings: Mapping[str, Any]) -> None:
    """Add the tokens that `settings` list, those with their ids first, and give the special ones their names."""
    listed = settings.get("added_tokens_decoder") or {}
    if not isinstance(listed, Mapping):
        raise ValueError(f"added_tokens_decoder must list tokens by their ids, got {listed!r}")
    for number, said in sorted(listed.items(), key=lambda item: int(item[0])):
        token = as_token(said, "added_tokens_decoder")
        found = tokenizer._id_of(token.content)
        if int(number) != (len(tokenizer) if found is None else found):
            raise ValueError(
                f"added_tokens_decoder gives {token.content!r} the id {number}, which is taken or leaves a gap"
            )
        tokenizer._add(token)
    for name in NAMES:
        if (value := settings.get(name)) is not None:
            token = as_token(value, name, normalized=False, special=True)
            tokenizer._add(token)
            tokenizer._named[name] = token
    further = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
    if not isinstance(further, list | tuple):
        raise ValueError(f"additional_special_tokens must be a list, got {further!r}")
    for value in further:
        token = as_token(value, "additional_special_tokens", normalized=False, special=True)
        tokenizer._add(token)
        tokenizer._additional.append(token)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content not in tokenizer.special_names:
            tokenizer._additional.append(token)


def existing_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"save_directory ({folder}) should be a directory")
    return folder
