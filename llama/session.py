"""A model, its tokenizer and what it has read: what `llama generate` and `llama chat` run on."""

import sys
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
        self.ids: list[int] = []  # read and written so far; the cache holds a beginning of them
        self.seconds_to_first = self.seconds_after = 0.0
        self.tokens_read = self.tokens_written = 0
        self.was_cut = False

    def render(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation that waits for the assistant's answer."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert isinstance(ids, list)
        return ids

    def answer(self, ids: list[int]) -> Iterator[str]:
        """The model's continuation of `ids`, in pieces of whole characters.

        What `ids` shares with what was read before is not read again, so a long conversation costs only its news. Only
        where RoPE's angles follow the length of the text is all of it read anew.
        """
        if not ids:
            raise ValueError("the prompt is empty; give at least one word")
        if max(ids) >= self.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives {max(ids)}, and the model knows ids below {self.config.vocab_size}: "
                "they do not belong together"
            )
        limit = self.config.max_position_embeddings
        if self.config.rope_parameters["rope_type"] in ("linear", "dynamic"):
            limit = sys.maxsize  # these reach beyond the length the model was trained on
        if len(ids) > limit:
            raise ValueError(f"the text has {len(ids)} tokens, more than the {limit} this model was made for")
        shared = 0
        if self.config.angles_follow_length:
            self.cache.crop(0)
        while shared < min(self.cache.length, len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        self.cache.crop(shared)
        self.ids = list(ids)
        self.tokens_read, self.tokens_written = len(ids) - shared, 0
        room = min(self.max_new_tokens, limit - len(ids) + 1)
        text, start = TextStream(self.tokenizer), time.perf_counter()
        stream = reference.stream(
            self.params, self.config, np.array([ids]), room, self.eos_token_id,
            sampler=self.sampler, cache=self.cache,
        )  # fmt: skip
        for (token,) in stream:
            now = time.perf_counter()
            if self.tokens_written == 0:
                self.seconds_to_first = now - start
            self.seconds_after = now - start - self.seconds_to_first
            self.tokens_written += 1
            self.ids.append(int(token))
            if piece := text.put(token):
                yield piece
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        self.was_cut = self.ids[-1] not in ends
        if piece := text.end():
            yield piece

    def report(self) -> str:
        """How fast the last answer came."""
        steps = self.tokens_written - 1
        rate = f"{steps / self.seconds_after:.1f} tokens/s" if steps else "no more than one step"
        reading = f"prompt of {self.tokens_read} tokens in {self.seconds_to_first:.1f} s"
        at = "--max-new-tokens" if self.tokens_written == self.max_new_tokens else "the end of the model's context"
        cut = f"; cut at {at}" if self.was_cut else ""
        return f"[{self.tokens_written} tokens, {rate}; {reading}{cut}]"
