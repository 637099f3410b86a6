"""Stopping criteria, which decide from the text so far which rows are done."""

import logging
import time
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from .config import GenerationConfig, check
from .processors import TokenIds, as_ids, merge

logger = logging.getLogger(__name__)


class StoppingCriteria:
    """Base class: maps `input_ids` (B, S) and the scores of each step, if kept, to a mask (B,) of finished rows."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(input_ids, scores, **kwargs)")


class StoppingCriteriaList(list):
    """Criteria, any one of which suffices. A user's criterion may return a single bool for all rows."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        done = _all(input_ids, False)
        for criterion in self:
            said = criterion(input_ids, scores, **kwargs)
            said = _all(input_ids, said) if isinstance(said, bool) else torch.as_tensor(said, device=input_ids.device)
            done = done | said.reshape(-1).bool()
        return done

    @property
    def max_length(self) -> int | None:
        """`max_length` of the first MaxLengthCriteria."""
        return next((criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)), None)


def _all(input_ids: Tensor, done: bool) -> Any:
    """`done` for every row."""
    return torch.full(input_ids.shape[:1], done, dtype=torch.bool, device=input_ids.device)


class MaxLengthCriteria(StoppingCriteria):
    """Stop at `max_length` tokens, prompt included. Warns once if the text exceeds the model's positions."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None):
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings
        self._warned = False

    def __call__(self, input_ids, scores, **kwargs):
        length = input_ids.shape[1]
        done = length >= self.max_length
        if not (done or self._warned or self.max_position_embeddings is None) and length > self.max_position_embeddings:
            logger.warning("the text exceeds the model's %d positions", self.max_position_embeddings)
            self._warned = True
        return _all(input_ids, done)


class MaxTimeCriteria(StoppingCriteria):
    """Stop after `max_time` seconds, counted from construction or from `initial_timestamp`, a `time.time()`."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        check("max_time", max_time)
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids, scores, **kwargs):
        return _all(input_ids, time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Stop at any end token, among the last `new_token_length` tokens if several are generated at once."""

    def __init__(self, eos_token_id: TokenIds):
        self.eos_token_id = as_ids("eos_token_id", eos_token_id)

    def __call__(self, input_ids, scores, new_token_length: int = 1, **kwargs):
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -new_token_length:], self.eos_token_id).any(-1)


class StopStringCriteria(StoppingCriteria):
    """Stop when the last token completes a stop string.

    The string may begin in earlier tokens, even in the prompt, and the last token may extend beyond it ("st" + "opera"
    stops at "stop"); a string that an earlier token completed no longer counts. Every step copies to the CPU a few
    more tokens than the longest string has bytes, since a token has at least one.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | list[str]):
        check("stop_strings", stop_strings)
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        self._knows = getattr(tokenizer, "knows", lambda token: True)
        # One more, since SentencePiece drops the space before the first word that it decodes.
        self._tail = max(len(text.encode()) for text in self.stop_strings) + 1

    def __call__(self, input_ids, scores, **kwargs):
        rows = input_ids[:, -self._tail - 3 :].tolist()
        return torch.tensor([self._ends(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        unknown = [place for place, token in enumerate(ids) if not self._knows(token)]
        ids = ids[unknown[-1] + 1 :] if unknown else ids  # no string extends across an id without a token
        if not ids:
            return False
        # Up to three tokens more, until no character (of at most four bytes) is cut: a tokenizer may decode the bytes
        # next to it as invalid too.
        for first in range(max(0, len(ids) - self._tail), max(-1, len(ids) - self._tail - 4), -1):
            text = self._decode(ids[first:])
            if not text.startswith("\N{REPLACEMENT CHARACTER}"):
                break
        ends = [place + len(stop) for stop in self.stop_strings if (place := text.rfind(stop)) >= 0]
        if not ends:
            return False
        before = self._decode(ids[first:-1])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
        return max(ends) > len(list(same))  # not len(before): a partial character may be complete now


def criteria_for(
    config: GenerationConfig,
    prompt_length: int,
    *,
    tokenizer: Any = None,
    extra: Iterable = (),
    max_position_embeddings: int | None = None,
) -> StoppingCriteriaList:
    """Build the criteria of `config`, followed by the user's own (`extra`); arguments are as in `processors_for`."""
    total = config.total_length(prompt_length, max_position_embeddings)
    built: list[StoppingCriteria] = [MaxLengthCriteria(total, max_position_embeddings)]
    if config.max_time is not None:
        built.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings is not None:
        if tokenizer is None:
            raise ValueError("`stop_strings` needs the model's tokenizer: pass `tokenizer` to `generate` as well")
        built.append(StopStringCriteria(tokenizer, config.stop_strings))
    if config.eos_token_id is not None:
        built.append(EosTokenCriteria(config.eos_token_id))
    return StoppingCriteriaList(merge(built, extra))
