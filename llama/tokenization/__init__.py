"""Tokenizers: `LlamaTokenizer`, built on SentencePiece, and `LlamaTokenizerFast`, on the `tokenizers` library."""

from .batch import BatchEncoding
from .fast import LlamaTokenizerFast
from .loading import AutoTokenizer, load_tokenizer
from .slow import LlamaTokenizer
from .stream import TextStream

PreTrainedTokenizerFast = LlamaTokenizerFast  # its usual name in tokenizer_config.json

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TextStream",
    "load_tokenizer",
]
