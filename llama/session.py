"""A model with its tokenizer and cached text, on which `llama generate` and `llama chat` run."""

import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from . import reference
from .checkpoints import Checkpoint, open_checkpoint
from .tokenization import LlamaTokenizerFast, TextStream

Ends = int | list[int] | None
BACKENDS = ("auto", "torch", "triton", "reference")


class Engine(Protocol):
    """A model that continues one text, and caches what it has read."""

    config: reference.Config

    @property
    def length(self) -> int:
        """The number of cached tokens."""

    def crop(self, length: int) -> None:
        """Drop all cached tokens from position `length` on."""

    def stream(self, ids: list[int], room: int, ends: Ends) -> Iterator[int]:
        """Yield up to `room` tokens after `ids`, whose first `length` are cached; stop after an end token."""


class ReferenceEngine:
    """The NumPy reference."""

    def __init__(self, checkpoint: Checkpoint, sampler: reference.Sampler):
        self.params, self.config = reference.load(checkpoint)
        self.sampler = sampler
        self.cache = reference.KVCache(self.config.num_hidden_layers)

    @property
    def length(self) -> int:
        return self.cache.length

    def crop(self, length: int) -> None:
        self.cache.crop(length)

    def stream(self, ids: list[int], room: int, ends: Ends) -> Iterator[int]:
        steps = reference.stream(
            self.params, self.config, np.array([ids]), room, ends, sampler=self.sampler, cache=self.cache
        )
        return (int(token) for (token,) in steps)


class TorchEngine:
    """The PyTorch model, on a GPU if there is one, with the kernels if the backend says so."""

    def __init__(self, checkpoint: Checkpoint, sampler: reference.Sampler, backend: str = "auto"):
        import torch

        from . import DynamicCache, GenerationConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM.from_pretrained(checkpoint, device="auto", backend=backend)
        self.config = self.model.config.checked()
        self.model.generation_config = GenerationConfig(
            do_sample=sampler.temperature > 0,
            temperature=sampler.temperature or 1.0,
            top_k=sampler.top_k or 0,
            top_p=sampler.top_p,
            min_p=sampler.min_p,
            repetition_penalty=sampler.repetition_penalty,
        )
        self._new_cache = DynamicCache
        self.cache, self.seed, self._torch = DynamicCache(), sampler.seed, torch

    @property
    def length(self) -> int:
        layers = self.cache.layers  # Ctrl-C may have stopped a pass between two layers
        return min(layer.length for layer in layers) if len(layers) == self.config.num_hidden_layers else 0

    def crop(self, length: int) -> None:
        if length:
            self.cache.crop(length)
        else:
            self.cache = self._new_cache()

    def stream(self, ids: list[int], room: int, ends: Ends) -> Iterator[int]:
        if self.seed is not None:
            self._torch.manual_seed(self.seed)
        steps = self.model.steps(
            self._torch.tensor([ids]), max_new_tokens=room, eos_token_id=ends, past_key_values=self.cache
        )
        return (int(token) for token in steps)


def engine(checkpoint: Checkpoint, backend: str, sampler: reference.Sampler) -> Engine:
    """The model of a checkpoint on the chosen backend; "auto" is PyTorch if it is installed."""
    installed = importlib.util.find_spec("torch") is not None
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and not installed):
        return ReferenceEngine(checkpoint, sampler)
    if not installed:
        raise ValueError(
            f'the {backend} backend needs PyTorch: pip install "llama-triton[torch]", or --backend reference'
        )
    return TorchEngine(checkpoint, sampler, backend)


class Session:
    """A conversation with one model.

    Args:
        model: a model folder, a `.gguf` file, a Hugging Face id or an alias.
        backend: "torch", "triton", "reference", or "auto": PyTorch if it is installed, with Triton on a GPU.
        max_new_tokens: the maximum length of an answer.
        sampler: how its tokens are chosen.
    """

    def __init__(self, model: str, backend: str, max_new_tokens: int, sampler: reference.Sampler):
        checkpoint = open_checkpoint(model)
        self.engine = engine(checkpoint, backend, sampler)
        self.config = self.engine.config
        self.tokenizer = LlamaTokenizerFast(*checkpoint.tokenizer())
        self.eos_token_id = checkpoint.generation_config.get("eos_token_id", self.config.eos_token_id)
        self.max_new_tokens = max_new_tokens
        self.ids: list[int] = []  # read and written so far; the engine caches a prefix of them
        self.seconds_to_first = self.seconds_after = 0.0
        self.tokens_read = self.tokens_written = 0
        self.was_cut = False

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the assistant's answer begins."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert isinstance(ids, list)
        return ids

    def answer(self, ids: list[int]) -> Iterator[str]:
        """Yield the model's continuation of `ids`, in pieces of whole characters.

        The prefix that `ids` shares with the previous call is cached, so each turn of a long conversation only costs
        its new tokens. Only where RoPE's angles depend on the length of the text is everything read again.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one word")
        if max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives {max(ids)}, but the model only knows ids below {self.config.vocab_size}: "
                "they do not belong together"
            )
        limit = self.config.max_position_embeddings
        if self.config.rope_parameters["rope_type"] in ("linear", "dynamic"):
            limit = sys.maxsize  # these reach beyond the length the model was trained on
        if len(ids) > limit:
            raise ValueError(f"the text has {len(ids)} tokens, more than the {limit} this model was made for")
        shared = 0
        if self.config.angles_follow_length:
            self.engine.crop(0)
        while shared < min(self.engine.length, len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        self.engine.crop(shared)
        self.ids = list(ids)
        self.tokens_read, self.tokens_written = len(ids) - shared, 0
        room = min(self.max_new_tokens, limit - len(ids) + 1)
        text, start = TextStream(self.tokenizer), time.perf_counter()
        for token in self.engine.stream(ids, room, self.eos_token_id):
            now = time.perf_counter()
            if self.tokens_written == 0:
                self.seconds_to_first = now - start
            self.seconds_after = now - start - self.seconds_to_first
            self.tokens_written += 1
            self.ids.append(token)
            if piece := text.put(token):
                yield piece
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        self.was_cut = self.ids[-1] not in ends
        if piece := text.end():
            yield piece

    def report(self) -> str:
        """The speed of the last answer."""
        steps = self.tokens_written - 1
        rate = f"{steps / self.seconds_after:.1f} tokens/s" if steps else "no more than one step"
        reading = f"prompt of {self.tokens_read} tokens in {self.seconds_to_first:.1f} s"
        at = "--max-new-tokens" if self.tokens_written == self.max_new_tokens else "the end of the model's context"
        cut = f"; cut at {at}" if self.was_cut else ""
        return f"[{self.tokens_written} tokens, {rate}; {reading}{cut}]"
