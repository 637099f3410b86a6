"""Text to ids and back: `LlamaTokenizer` on SentencePiece, `LlamaTokenizerFast` on the library `tokenizers`."""

from .batch import BatchEncoding
from .fast import LlamaTokenizerFast
from .loading import AutoTokenizer, load_tokenizer
from .slow import LlamaTokenizer
from .stream import TextStream

__all__ = ["AutoTokenizer", "BatchEncoding", "LlamaTokenizer", "LlamaTokenizerFast", "TextStream", "load_tokenizer"]
