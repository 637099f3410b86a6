"""GGUF, llama.cpp's format: weights (often quantised), configuration, tokenizer and chat template in one file.

It differs from Hugging Face's layout in the tensor names, in the rows of q and k, which are interleaved pairs, and in
Llama 3.1's RoPE scaling, which is stored as the resulting divisors.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..reference.config import Config
from ..reference.rope import deinterleave, rope_frequencies
from ..tokenization.building import LLAMA3_WORDS, sentencepiece_bpe
from .names import EMBEDDING, HEAD, rename, rotated_heads
from .stored import MappedFile, Stored, dtype_of, release, unreadable

ROPE_DIVISORS = "rope_freqs.weight"
KINDS = gguf.GGMLQuantizationType
DTYPES = {KINDS.F64: np.dtype(np.float64), KINDS.F32: np.dtype(np.float32), KINDS.F16: np.dtype(np.float16),
          KINDS.BF16: np.dtype(ml_dtypes.bfloat16)}  # fmt: skip

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class GGUFFile:
    """A `Checkpoint` in a `.gguf` file. Quantised tensors are dequantised to float32 when read."""

    def __init__(self, path: Path):
        self.path = path
        check_header(path)
        try:
            reader = gguf.GGUFReader(path)
            self._fields = dict(reader.fields)
            self._tensors = {rename(t.name, "gguf", "hugging_face") or t.name: t for t in reader.tensors}
            self._data = MappedFile(path)
        except Exception as error:  # the library raises all kinds of exceptions on damaged bytes
            raise unreadable(path, "not a GGUF file", error) from error
        ends = 0
        for tensor in sorted(reader.tensors, key=lambda tensor: tensor.data_offset):
            if tensor.data_offset < ends:
                raise ValueError(f"{path} is damaged: {tensor.name} overlaps another tensor; download it again")
            ends = int(tensor.data_offset + tensor.n_bytes)
        parts = self._field("split.count", 0)
        if parts not in (0, 1):
            raise ValueError(
                f"{path} is one of the {parts} parts of a model; join them with llama.cpp's "
                "`llama-gguf-split --merge`, which takes the first part and the file to write"
            )
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path} holds a model of architecture {architecture!r}; only 'llama' is supported")

    def _field(self, name: str, default: Any = None) -> Any:
        if name not in self._fields:
            return default
        try:
            return self._fields[name].contents()
        except Exception as error:
            raise ValueError(f"{self.path} is damaged: its field {name} cannot be read ({error})") from error

    def _number(self, name: str, default: Any = None) -> Any:
        """A number under "llama.", required if without default; float32 as its shortest decimal (1e-05)."""
        value = self._field(f"llama.{name}", default)
        if value is None:
            raise ValueError(f"{self.path} lacks the field llama.{name}")
        if isinstance(value, list):
            raise ValueError(f"{self.path}: llama.{name} differs by layer, which is not supported")
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{self.path}: llama.{name} must be a number, got {value!r}")
        return float(str(np.float32(value))) if isinstance(value, float) else value

    @cached_property
    def config(self) -> dict[str, Any]:
        heads, hidden_size = self._number("attention.head_count"), self._number("embedding_length")
        if EMBEDDING not in self._tensors:
            raise ValueError(f"{self.path} lacks the tensor token_embd.weight")
        theta, scaling = self._number("rope.freq_base", 10000.0), self._rope_scaling()
        head_dim = self._number("attention.key_length", hidden_size // max(heads, 1))
        if self._number("rope.dimension_count", head_dim) != head_dim:
            raise ValueError(
                f"{self.path}: llama.rope.dimension_count must be the head's {head_dim}; LLaMA rotates whole heads"
            )
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": int(self._tensors[EMBEDDING].shape[1]),
            "hidden_size": hidden_size,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._number("context_length"),
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in self._tensors,
            "tie_word_embeddings": HEAD not in self._tensors,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id"),
            # transformers 4 reads the first two, transformers 5 the third
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
            # norms are always float32
            "torch_dtype": dtype_of(stored for stored in self.tensors.values() if len(stored.shape) == 2).name,
        }

    def _rope_scaling(self) -> dict[str, Any] | None:
        if ROPE_DIVISORS in self._tensors:
            array = self._array(self._tensors[ROPE_DIVISORS])
            if np.all(array == 1):
                return None
            divisors = [float(x) for x in array]
            return _as_llama3(array, self._number("rope.freq_base", 10000.0)) or {
                "rope_type": "longrope", "factor": 1.0, "attention_factor": 1.0,
                "short_factor": divisors, "long_factor": divisors,
            }  # fmt: skip
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 0.0))
        kind = self._field("llama.rope.scaling.type", "linear" if factor else "none")  # llama.cpp's default
        if kind == "none":
            return None
        scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._number("rope.scaling.original_context_length")
            for name in ("beta_fast", "beta_slow"):
                if (beta := self._number(f"rope.scaling.yarn_{name}", 0.0)) != 0:
                    scaling[name] = beta
        elif kind != "linear":
            raise ValueError(f"{self.path}: llama.rope.scaling.type {kind!r} is unknown; supported: none, linear, yarn")
        if self._number("rope.scaling.attn_factor", 1.0) != 1:
            raise ValueError(f"{self.path}: llama.rope.scaling.attn_factor other than 1 is not supported")
        return scaling

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        return {key: self.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: _stored(tensor) for name, tensor in self._tensors.items() if name != ROPE_DIVISORS}

    @property
    def kinds(self) -> dict[str, tuple[str, int]]:
        """The type of each tensor in the file, such as "Q4_1", and its size there in bytes."""
        return {name: (self._tensors[name].tensor_type.name, int(self._tensors[name].n_bytes)) for name in self.tensors}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        data = self._array(tensor)
        heads = rotated_heads(name, self.config)
        if heads is None:
            return data
        if len(data) % (2 * heads):
            raise ValueError(f"{self.path}: {tensor.name} has {len(data)} rows, which its heads do not divide evenly")
        reordered = deinterleave(data, heads)
        if not np.shares_memory(reordered, data):
            release(data)
        return reordered

    def _array(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        if tensor.tensor_type in DTYPES:
            return self._data.array(_stored(tensor), tensor.data_offset)
        quantised = self._data.array(Stored(tensor.data.dtype, tensor.data.shape), tensor.data_offset)
        try:
            return gguf.quants.dequantize(quantised, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise ValueError(f"{self.path}: {tensor.name} is stored as {kind}, which cannot be dequantised") from error
        finally:
            release(quantised)

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        if "tokenizer.ggml.model" not in self._fields:
            raise FileNotFoundError(
                f"{self.path} holds no tokenizer; convert it, and add a tokenizer.json to the new folder"
            )
        try:
            return self._build_tokenizer()
        except Exception as error:  # the library raises plain Exception for inconsistent parts
            raise ValueError(f"{self.path}: its tokenizer cannot be used: {error}") from error

    def _build_tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        kind, pre = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre", "default")
        tokens, types = self._field("tokenizer.ggml.tokens"), self._field("tokenizer.ggml.token_type")
        if not tokens or not types or len(tokens) != len(types):
            raise ValueError("tokenizer.ggml.tokens and token_type are missing or differ in length")
        if kind == "gpt2":
            merges = self._field("tokenizer.ggml.merges", [])
            tokenizer = byte_level_bpe(tokens, merges, pre)
        elif kind == "llama":
            scores = self._field("tokenizer.ggml.scores", [])
            tokenizer = sentencepiece_bpe(tokens, scores, self._field("tokenizer.ggml.add_space_prefix", True))
        else:
            raise ValueError(f"tokenizer.ggml.model {kind!r} is unknown; supported: 'gpt2' and 'llama'")
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True)
                                      for t, type_ in zip(tokens, types, strict=True) if type_ == CONTROL])  # fmt: skip
        tokenizer.add_tokens([AddedToken(t, normalized=False)
                              for t, type_ in zip(tokens, types, strict=True) if type_ == USER_DEFINED])  # fmt: skip

        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                                  "model_max_length": self._number("context_length")}  # fmt: skip
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            number = self._field(f"tokenizer.ggml.{key}_token_id")
            if number is not None and 0 <= number < len(tokens):
                config[f"{name}_token"] = tokens[number]
        if template := self._field("tokenizer.chat_template"):
            config["chat_template"] = template
        opens = kind == "llama" or pre in LLAMA3_NAMES  # llama.cpp's default
        before = self._field("tokenizer.ggml.add_bos_token", opens) and config.get("bos_token")
        after = self._field("tokenizer.ggml.add_eos_token", False) and config.get("eos_token")
        if before or after:
            config |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
            framed = " ".join(filter(None, (before, "$A", after))), " ".join(filter(None, (before, "$B:1", after)))
            special = [(token, tokenizer.token_to_id(token)) for token in (before, after) if token]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=framed[0], pair=" ".join(framed), special_tokens=special
            )
        return tokenizer, config


def _as_llama3(divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """The parameters of Llama 3.1's RoPE, which GGUF stores as one divisor per frequency; None if it is another one."""
    scaling = {"rope_type": "llama3", "factor": float(divisors.max(initial=1)), "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip

    def frequencies(**rope: Any) -> np.ndarray:
        sizes = {"hidden_size": 2 * len(divisors), "num_attention_heads": 1, "max_position_embeddings": 131072}
        return rope_frequencies(Config.from_dict({**sizes, "rope_parameters": {"rope_theta": theta, **rope}}))[0]

    try:
        expected = frequencies(rope_type="default") / frequencies(**scaling)
    except ValueError:  # no legal factor or theta
        return None
    return scaling if np.allclose(divisors, expected, rtol=1e-5, atol=0) else None


def _stored(tensor: gguf.ReaderTensor) -> Stored:
    """The shape in NumPy's order, and the dtype that the tensor is read as."""
    dtype = DTYPES.get(tensor.tensor_type, np.dtype(np.float32))
    return Stored(dtype, tuple(int(size) for size in reversed(tensor.shape)))


def check_header(path: Path) -> None:
    """Raise a ValueError unless every length in the metadata fits into the file.

    The library trusts them: a damaged one could keep it running for hours and exhaust memory.
    """
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's scalar types, in bytes
    size = path.stat().st_size
    with open(path, "rb") as file:

        def number(width: int = 8) -> int:
            return int.from_bytes(file.read(width), "little")

        def skip(count: int) -> None:
            if count > size - file.tell():
                raise ValueError(f"{path} is damaged or cut short; download it again")
            file.seek(count, 1)

        def skip_values(kind: int, count: int) -> None:
            if kind in sizes:
                skip(count * sizes[kind])
            elif kind == 8:  # strings, each preceded by its length
                skip(0 if count * 8 <= size else size + 1)
                for _ in range(count):
                    skip(number())
            else:  # nested arrays, which no real file has, or an unknown type
                skip(size + 1)

        if file.read(4) != b"GGUF" or number(4) not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        skip(8)  # the number of tensors
        for _ in range(number()):
            skip(number())
            kind = number(4)
            if kind == 9:  # an array: element type, count, elements
                skip_values(number(4), number())
            else:
                skip_values(kind, 1)


# How text is split before byte-pair encoding, by `tokenizer.ggml.pre`.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
} | dict.fromkeys(
    LLAMA3_NAMES,
    lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
)


def byte_level_bpe(tokens: list[str], merges: list[str], pre: str) -> Tokenizer:
    """A GPT-2-style tokenizer, as used by Llama 3 and SmolLM: pairs are merged in the order of `merges`."""
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is unknown; supported: {', '.join(PRE_TOKENIZERS)}")
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in LLAMA3_NAMES))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
