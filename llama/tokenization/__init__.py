"""Text to ids and back: `LlamaTokenizer` on SentencePiece, `LlamaTokenizerFast` on the library `tokenizers`."""

from .batch import BatchEncoding
from .fast import LlamaTokenizerFast
from .loading import AutoTokenizer, load_tokenizer
from .slow import LlamaTokenizer
from .stream import TextStream

PreTrainedTokenizerFast = LlamaTokenizerFast  # what tokenizer_config.json calls it as a rule

__all__ = [
    "AutoTokenizer",
    "BatchEncoding",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "TextStream",
    "load_tokenizer",
]
