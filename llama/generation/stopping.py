"""When to stop: a criterion looks at the text so far and says which rows are done."""

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
    """What a criterion is: from `input_ids` (B, S) and the scores of each step, if kept, to (B,), True where done."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(input_ids, scores, **kwargs)")


class StoppingCriteriaList(list):
    """Criteria of which one is enough. Those of users may give one bool for all rows."""

    def __call__(self, input_ids: Tensor, scores: tuple[Tensor, ...] | None, **kwargs: Any) -> Tensor:
        done = _all(input_ids, False)
        for criterion in self:
            said = criterion(input_ids, scores, **kwargs)
            said = _all(input_ids, said) if isinstance(said, bool) else torch.as_tensor(said, device=input_ids.device)
            done = done | said.reshape(-1).bool()
        return done

    @property
    def max_length(self) -> int | None:
        """That of the first MaxLengthCriteria."""
        return next((criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)), None)


def _all(input_ids: Tensor, done: bool) -> Any:
    """The same for every row."""
    return torch.full(input_ids.shape[:1], done, dtype=torch.bool, device=input_ids.device)


class MaxLengthCriteria(StoppingCriteria):
    """At `max_length` tokens, prompt included. Says once when the text outgrows the positions the model has."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None):
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings
        self._warned = False

    def __call__(self, input_ids, scores, **kwargs):
        length = input_ids.shape[1]
        done = length >= self.max_length
        if not (done or self._warned or self.max_position_embeddings is None) and length > self.max_position_embeddings:
            logger.warning("the text has outgrown the %d positions of the model", self.max_position_embeddings)
            self._warned = True
        return _all(input_ids, done)


class MaxTimeCriteria(StoppingCriteria):
    """After `max_time` seconds, counted from when this is made or from `initial_timestamp`, a `time.time()`."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None):
        check("max_time", max_time)
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids, scores, **kwargs):
        return _all(input_ids, time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """At any of the end tokens, among the last `new_token_length` tokens where several are written at once."""

    def __init__(self, eos_token_id: TokenIds):
        self.eos_token_id = as_ids("eos_token_id", eos_token_id)

    def __call__(self, input_ids, scores, new_token_length: int = 1, **kwargs):
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -new_token_length:], self.eos_token_id).any(-1)


class StopStringCriteria(StoppingCriteria):
    """When the last token brings a stop string to its end.

    The string may begin tokens earlier, in the prompt too, and the last token may go on beyond it ("st" + "opera"
    stops at "stop"); once a token follows that is not needed for it, it no longer counts. Every step looks at as many
    tokens as the longest string has bytes, for a token brings one at least, and brings them to the CPU.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | list[str]):
        check("stop_strings", stop_strings)
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        self._knows = getattr(tokenizer, "knows", lambda token: True)
        # One more, since SentencePiece's kind swallows the space before the first word that it decodes.
        self._tail = max(len(text.encode()) for text in self.stop_strings) + 1

    def __call__(self, input_ids, scores, **kwargs):
        rows = input_ids[:, -self._tail - 3 :].tolist()
        return torch.tensor([self._ends(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        unknown = [place for place, token in enumerate(ids) if not self._knows(token)]
        ids = ids[unknown[-1] + 1 :] if unknown else ids  # no string reaches across an id without a token
        if not ids:
            return False
        # Up to three tokens more, until no character (of at most four bytes) is cut: a tokenizer may show the bytes
        # next to it as broken too.
        for first in range(max(0, len(ids) - self._tail), max(-1, len(ids) - self._tail - 4), -1):
            text = self._decode(ids[first:])
            if not text.startswith("\N{REPLACEMENT CHARACTER}"):
                break
        ends = [place + len(stop) for stop in self.stop_strings if (place := text.rfind(stop)) >= 0]
        if not ends:
            return False
        before = self._decode(ids[first:-1])
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, text, strict=False))
        return max(ends) > len(list(same))  # not len(before): half a character may be whole now


def criteria_for(
    config: GenerationConfig,
    prompt_length: int,
    *,
    tokenizer: Any = None,
    extra: Iterable = (),
    max_position_embeddings: int | None = None,
) -> StoppingCriteriaList:
    """What `config` asks for, then the user's own (`extra`); the arguments are those of `processors_for`."""
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
