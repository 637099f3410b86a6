"""LLaMA three times: `llama.reference` (NumPy, to read), `llama.kernels` (Triton), and the drop-in classes here.

`import llama` is quick: a name is loaded, with what it needs, when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import reference as reference
    from .tokenizer import LlamaTokenizerFast as LlamaTokenizerFast

# name -> the module it lives in
_HOMES = {"LlamaTokenizerFast": "llama.tokenizer"}
_MODULES = ("kernels", "reference")

__all__ = ["LlamaTokenizerFast", "kernels", "reference"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"llama.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("llama-triton")
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
