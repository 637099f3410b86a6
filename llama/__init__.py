"""Three implementations of LLaMA: `llama.reference` (NumPy, for reading), `llama.kernels` (Triton), and the drop-in
replacements for transformers' classes here.

`import llama` is fast: names, and the libraries they need, are imported lazily.
"""

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .generation import __all__ as _GENERATION

if TYPE_CHECKING:
    from . import kernels as kernels
    from . import reference as reference
    from .acceleration import accelerate as accelerate
    from .auto import AutoConfig as AutoConfig
    from .auto import AutoModel as AutoModel
    from .auto import AutoModelForCausalLM as AutoModelForCausalLM
    from .auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from .auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from .auto import AutoModelForTokenClassification as AutoModelForTokenClassification
    from .auto import AutoTokenizer as AutoTokenizer
    from .cache import Cache as Cache
    from .cache import DynamicCache as DynamicCache
    from .cache import StaticCache as StaticCache
    from .config import LlamaConfig as LlamaConfig
    from .generation import *  # noqa: F403
    from .modeling import LlamaForCausalLM as LlamaForCausalLM
    from .modeling import LlamaForQuestionAnswering as LlamaForQuestionAnswering
    from .modeling import LlamaForSequenceClassification as LlamaForSequenceClassification
    from .modeling import LlamaForTokenClassification as LlamaForTokenClassification
    from .modeling import LlamaModel as LlamaModel
    from .pretrained import LlamaPreTrainedModel as LlamaPreTrainedModel
    from .seed import set_seed as set_seed
    from .tokenization import BatchEncoding as BatchEncoding
    from .tokenization import LlamaTokenizer as LlamaTokenizer
    from .tokenization import LlamaTokenizerFast as LlamaTokenizerFast
    from .tokenization import PreTrainedTokenizerFast as PreTrainedTokenizerFast
    from .tokenization import TextStream as TextStream
    from .tokenization import load_tokenizer as load_tokenizer

# module -> the names it defines
_NAMES: dict[str, Iterable[str]] = {
    "acceleration": ("accelerate",),
    "auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    ),
    "cache": ("Cache", "DynamicCache", "StaticCache"),
    "config": ("LlamaConfig",),
    "generation": _GENERATION,
    "modeling": (
        "LlamaForCausalLM",
        "LlamaForQuestionAnswering",
        "LlamaForSequenceClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
    ),
    "pretrained": ("LlamaPreTrainedModel",),
    "seed": ("set_seed",),
    "tokenization": (
        "BatchEncoding",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "PreTrainedTokenizerFast",
        "TextStream",
        "load_tokenizer",
    ),
}
_HOMES = {name: f"llama.{module}" for module, names in _NAMES.items() for name in names}
_MODULES = ("hf", "kernels", "reference")

__all__ = [*_HOMES, "kernels", "reference"]  # not hf, which needs transformers


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "threadpoolctl"):
                raise
            message = f'llama.{name} needs PyTorch: pip install "llama-triton[torch]"'
            raise ModuleNotFoundError(message, name=error.name) from error
    if name in _MODULES:
        return importlib.import_module(f"llama.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("llama-triton")
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
