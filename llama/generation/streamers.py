"""Text from `generate` while it is being generated: transformers' streamers, built on `TextStream`."""

from queue import Queue
from typing import Any

import torch

from ..tokenization import LlamaTokenizerFast, TextStream


class BaseStreamer:
    """Interface of `streamer`: `put` receives the prompts (B, T), then each step's tokens (B,); `end` comes last."""

    def put(self, value: torch.Tensor) -> None:
        raise NotImplementedError(f"{type(self).__name__} has to define put(value)")

    def end(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} has to define end()")


class TextStreamer(BaseStreamer):
    """Print a text to stdout, followed by a newline. An object can be reused for one text after another.

    transformers' class waits for the end of each word; this one emits every character as soon as it is complete.
    Override `on_finalized_text` to send the text elsewhere.

    Args:
        skip_prompt: leave out the prompt, which `put` receives first.
        decode_kwargs: `skip_special_tokens`, False by default; `clean_up_tokenization_spaces` can only be False.
    """

    def __init__(self, tokenizer: LlamaTokenizerFast, skip_prompt: bool = False, **decode_kwargs: Any):
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, dict(decode_kwargs)
        silent = decode_kwargs.pop("skip_special_tokens", False)
        if decode_kwargs.pop("clean_up_tokenization_spaces", False):
            raise ValueError("clean_up_tokenization_spaces would change text that is already out; leave it out")
        if decode_kwargs:
            raise ValueError(f"`{next(iter(decode_kwargs))}` is not supported; only `skip_special_tokens` is")
        self.next_tokens_are_prompt = True
        self._text = TextStream(tokenizer, silent)

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token after another: (T,) or (1, T) ids."""
        if value.dim() > 1 and len(value) > 1:
            raise ValueError(f"{type(self).__name__} only supports batch size 1, got {len(value)} texts at once")
        skipped = self.skip_prompt and self.next_tokens_are_prompt
        self.next_tokens_are_prompt = False
        if not skipped:
            self.on_finalized_text("".join(map(self._text.put, value.reshape(-1).tolist())))

    def end(self) -> None:
        """Emit the remaining text; the next `put` starts a new text with its prompt."""
        self.next_tokens_are_prompt = True
        self.on_finalized_text(self._text.end(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print `text`, which may be empty."""
        print(text, end="\n" if stream_end else "", flush=True)


class TextIteratorStreamer(TextStreamer):
    """Pass the text to another thread, which iterates over this object while `generate` runs.

    Args:
        timeout: seconds to wait for a piece before `queue.Empty` is raised. By default the wait is unlimited, and never
            ends if `generate` fails in its thread.
    """

    def __init__(
        self,
        tokenizer: LlamaTokenizerFast,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ):
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue `text`, unless it is empty, and at the end the stop signal."""
        if text:
            self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(self.stop_signal)

    def __iter__(self) -> "TextIteratorStreamer":
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece == self.stop_signal:
            raise StopIteration
        return piece
