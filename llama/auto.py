"""transformers' Auto classes, for code that names no architecture; here Llama is the only one."""

from .config import LlamaConfig as AutoConfig
from .modeling import LlamaForCausalLM as AutoModelForCausalLM
from .modeling import LlamaForQuestionAnswering as AutoModelForQuestionAnswering
from .modeling import LlamaForSequenceClassification as AutoModelForSequenceClassification
from .modeling import LlamaForTokenClassification as AutoModelForTokenClassification
from .modeling import LlamaModel as AutoModel
from .tokenization import AutoTokenizer

__all__ = [
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoTokenizer",
]
