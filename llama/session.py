"""A model, its tokenizer and what it has read: what `llama generate` and `llama chat` run on."""

import time
from collections.abc import Iterator

import numpy as np

from . import reference
from .checkpoints import open_checkpoint
from .tokenizer import LlamaTokenizerFast, TextStream


class Session:
    """A conversation with one model.

    Args:
        model: a model folder, a `.gguf` file or an alias.
        backend: "reference" or "auto", which is the same for now.
        max_new_tokens: the longest answer.
        sampler: how its tokens are chosen.
    """

    def __init__(self, model: str, backend: str, max_new_tokens: int, sampler: reference.Sampler):
        if backend == "torch":
            raise ValueError("the torch backend is not there yet; use --backend reference")
        checkpoint = open_checkpoint(model)
        self.params, self.config = reference.load(checkpoint)
        self.tokenizer = LlamaTokenizerFast(*checkpoint.tokenizer())
        self.eos_token_id = checkpoint.generation_config.get("eos_token_id", self.config.eos_token_id)
        self.max_new_tokens, self.sampler = max_new_tokens, sampler
        self.cache = reference.KVCache(self.config.num_hidden_layers)
        self.read: list[int] = []  # the ids whose keys and values the cache holds
        self.first, self.rest, self.counts = 0.0, 0.0, (0, 0)

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation that waits for the assistant's answer."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert isinstance(ids, list)
        return ids

    def answer(self, ids: list[int]) -> Iterator[str]:
        """The model's continuation of `ids`, in pieces of whole characters.

        What `ids` shares with what was read before is not read again, so a long conversation costs only its news.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one word")
        if len(ids) > self.config.max_position_embeddings:
            limit = self.config.max_position_embeddings
            raise ValueError(f"the text has {len(ids)} tokens, more than the {limit} this model was made for")
        shared = 0
        while shared < min(len(self.read), len(ids) - 1) and self.read[shared] == ids[shared]:
            shared += 1
        self.cache.crop(min(shared, self.cache.length))
        self.read = list(ids)
        text, count, started = TextStream(self.tokenizer), 0, time.perf_counter()
        stream = reference.stream(
            self.params, self.config, np.array([ids]), self.max_new_tokens, self.eos_token_id,
            sampler=self.sampler, cache=self.cache,
        )  # fmt: skip
        for count, token in enumerate(stream, start=1):
            now = time.perf_counter()
            if count == 1:
                self.first, begun = now - started, now
            self.rest, self.counts = now - begun, (len(ids) - shared, count)
            self.read.append(int(token[0]))
            if piece := text.put(int(token[0])):
                yield piece
        if piece := text.end():
            yield piece

    def report(self) -> str:
        """How fast the last answer came."""
        read, written = self.counts
        rate = f"{(written - 1) / self.rest:.1f} tokens/s" if written > 1 else "one step"
        return f"[{written} tokens, {rate}; prompt of {read} tokens in {self.first:.1f} s]"
