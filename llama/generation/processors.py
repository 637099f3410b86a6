"""Logits processors, bit for bit equal to those of transformers.

A processor takes `input_ids` (B, S), the text so far, and `scores` (B, V), and returns new scores (B, V), which are -∞
for forbidden tokens. It never modifies `scores` in place, but may return it as it is. `processors_for` builds those
that a GenerationConfig asks for.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import GenerationConfig, check, require, whole

TokenIds = int | list[int] | Tensor


class LogitsProcessor:
    """Base class; a function of the same two arguments works as well."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(input_ids, scores)")


class LogitsProcessorList(list):
    """Processors, applied in order."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """`kwargs` are passed to the processors that take more than two arguments, and must include all of those."""
        for processor in self:
            kind: Any = type(processor)
            more = _further_arguments(kind)
            if missing := [name for name in more if name not in kwargs]:
                raise ValueError(f"{kind.__name__} needs {', '.join(missing)} besides input_ids and scores")
            scores = processor(input_ids, scores, **kwargs) if more else processor(input_ids, scores)
        return scores


@lru_cache(maxsize=64)  # bounded: a class may be created for one call
def _further_arguments(kind: Any) -> tuple[str, ...]:
    """The parameters of a processor's `__call__` after self, input_ids and scores."""
    return tuple(inspect.signature(kind.__call__).parameters)[3:]


def as_ids(name: str, ids: TokenIds, device: Any = None, least: int = -1) -> Tensor:
    """Convert one id, a list or a tensor to token ids (N,), each at least `least`."""
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    ids = list(ids) if isinstance(ids, Iterable) else [ids]
    require(all(whole(token, least) for token in ids), name, f"a token id or a list of them, at least {least}", ids)
    return torch.tensor(ids, dtype=torch.long, device=device)


def _count(name: str, value: Any, least: int) -> int:
    require(whole(value, least), name, f"an integer of at least {least}", value)
    return value


def _only(ids: Any, scores: Tensor) -> Tensor:
    """Scores that forbid everything but `ids`."""
    forced = torch.full_like(scores, -math.inf)
    forced[:, ids] = 0
    return forced


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbid these tokens; those beyond the vocabulary are ignored."""

    def __init__(self, suppress_tokens: TokenIds, device: Any = "cpu"):
        self._ids = as_ids("suppress_tokens", suppress_tokens, device)
        self._mask: Tensor | None = None

    def _applies(self, length: int) -> bool:
        return True

    def __call__(self, input_ids, scores):
        if not self._applies(input_ids.shape[-1]):
            return scores
        if self._mask is None or self._mask.shape != scores.shape[-1:] or self._mask.device != scores.device:
            vocabulary = torch.arange(scores.shape[-1], device=scores.device)
            self._mask = torch.isin(vocabulary, self._ids.to(scores.device))
        return scores.masked_fill(self._mask, -math.inf)


class SuppressTokensAtBeginLogitsProcessor(SuppressTokensLogitsProcessor):
    """Forbid these tokens at position `begin_index`, that of the first new token."""

    def __init__(self, begin_suppress_tokens: TokenIds, begin_index: int, device: Any = "cpu"):
        super().__init__(begin_suppress_tokens, device)
        self.begin_index = begin_index

    def set_begin_index(self, begin_index: int) -> None:
        self.begin_index = begin_index

    def _applies(self, length):
        return length == self.begin_index


class MinLengthLogitsProcessor(SuppressTokensLogitsProcessor):
    """Forbid end tokens until the text, prompt included, has `min_length` tokens."""

    def __init__(self, min_length: int, eos_token_id: TokenIds, device: Any = "cpu"):
        super().__init__(as_ids("eos_token_id", eos_token_id), device)
        self.min_length = check("min_length", min_length)

    def _applies(self, length):
        return length < self.min_length


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """Forbid end tokens until `min_new_tokens` tokens follow the prompt."""

    def __init__(self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: TokenIds, device: Any = "cpu"):
        prompt = _count("prompt_length_to_skip", prompt_length_to_skip, 0)
        super().__init__(prompt + check("min_new_tokens", min_new_tokens), eos_token_id, device)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Make every token of the text less likely: score / penalty if positive, score · penalty if negative.

    The division is from Keskar et al. (2019), the other branch from transformers. A token counts once, however often it
    occurs. The first `prompt_ignore_length` tokens (one number, or one per row: its padding) are ignored.
    """

    def __init__(self, penalty: float, prompt_ignore_length: int | Tensor | None = None):
        self.penalty = check("repetition_penalty", penalty)
        if isinstance(prompt_ignore_length, Tensor):
            legal = prompt_ignore_length.dim() == 1
        else:
            legal = prompt_ignore_length is None or whole(prompt_ignore_length)
        wanted = "an integer of at least 0 or a tensor (B,) of them"
        require(legal, "prompt_ignore_length", wanted, prompt_ignore_length)
        self.prompt_ignore_length = prompt_ignore_length

    def __call__(self, input_ids, scores):
        vocab_size, ignored = scores.shape[-1], self.prompt_ignore_length
        if isinstance(ignored, Tensor):
            wanted = f"of shape ({len(input_ids)},), one for each row"
            require(len(ignored) == len(input_ids), "prompt_ignore_length", wanted, tuple(ignored.shape))
            places = torch.arange(input_ids.shape[1], device=input_ids.device)
            input_ids = input_ids.masked_fill(places < ignored.to(input_ids.device)[:, None], vocab_size)
        elif ignored is not None:
            input_ids = input_ids[:, ignored:]
        input_ids = input_ids.clamp(max=vocab_size)  # ignored tokens share a column that is dropped
        padded = F.pad(scores, (0, 1))
        seen = padded.gather(1, input_ids)
        seen = torch.where(seen < 0, seen * self.penalty, seen / self.penalty)
        return padded.scatter(1, input_ids, seen)[:, :vocab_size]


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbid repeating any `ngram_size` tokens in a row (Paulus et al. 2017, §2.5), prompt included."""

    def __init__(self, ngram_size: int):
        self.ngram_size = _count("ngram_size", ngram_size, 1)

    def __call__(self, input_ids, scores):
        length, vocab_size = input_ids.shape[-1], scores.shape[-1]
        if length < self.ngram_size:
            return scores
        ngrams = input_ids.unfold(1, self.ngram_size, 1)  # (B, S - n + 1, n)
        begun = (ngrams[..., :-1] == input_ids[:, None, length - self.ngram_size + 1 :]).all(-1)
        last = torch.where(begun, ngrams[..., -1].clamp(max=vocab_size), vocab_size)
        banned = scores.new_zeros(len(scores), vocab_size + 1, dtype=torch.bool).scatter_(1, last, True)
        return scores.masked_fill(banned[:, :vocab_size], -math.inf)


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Add a bias to the last token of each sequence whenever its other tokens have just been generated.

    `sequence_bias`: {(ids): bias, ...} or [[[ids], bias], ...]. A sequence of one token is always biased.
    """

    def __init__(self, sequence_bias: dict[tuple[int, ...], float] | list):
        pairs = check("sequence_bias", sequence_bias)
        pairs = pairs.items() if isinstance(pairs, dict) else pairs
        self.sequence_bias = {tuple(ids): float(bias) for ids, bias in pairs}
        self._tables: tuple[Any, ...] = ()

    def __call__(self, input_ids, scores):
        where = (scores.shape[-1], scores.device, scores.dtype)
        if self._tables[:1] != (where,):
            self._tables = (where, *self._prepare(*where))
        _, everywhere, groups = self._tables
        bias = everywhere.repeat(len(scores), 1)
        for prefixes, last, values in groups:
            if prefixes.shape[1] <= input_ids.shape[1]:
                here = (input_ids[:, None, -prefixes.shape[1] :] == prefixes).all(-1)  # (B, sequences)
                bias.index_add_(1, last, torch.where(here, values, 0.0).to(bias.dtype))
        return scores + bias

    def _prepare(self, vocab_size: int, device: Any, dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The biases (V,) of single tokens; then, for each length, (prefixes, last tokens, biases)."""
        beyond = [token for ids in self.sequence_bias for token in ids if token >= vocab_size]
        require(not beyond, "sequence_bias", f"of tokens below the vocabulary's size, {vocab_size}", beyond)
        everywhere = torch.zeros(vocab_size)
        groups: dict[int, list] = {}
        for ids, bias in self.sequence_bias.items():
            if len(ids) == 1:
                everywhere[ids[0]] = bias
            else:
                groups.setdefault(len(ids), []).append((ids[:-1], ids[-1], bias))
        return everywhere.to(device, dtype), [
            tuple(torch.tensor(column, device=device) for column in zip(*group, strict=True))
            for group in groups.values()
        ]


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbid these sequences of tokens; one that is just an end token is ignored."""

    def __init__(self, bad_words_ids: list[list[int]], eos_token_id: TokenIds | None = None):
        ends = [] if eos_token_id is None else as_ids("eos_token_id", eos_token_id).tolist()
        words = check("bad_words_ids", bad_words_ids)
        kept = {tuple(ids): -math.inf for ids in words if len(ids) > 1 or ids[0] not in ends}
        require(bool(kept), "bad_words_ids", "more than the end tokens", bad_words_ids)
        super().__init__(kept)


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allow only the tokens that `prefix_allowed_tokens_fn(batch_id, row)` returns (De Cao et al. 2020).

    If that leaves only scores of -∞ in all beams of a prompt, the allowed tokens get equal scores.
    """

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]], num_beams: int):
        self._allowed = prefix_allowed_tokens_fn
        self._num_beams = num_beams

    def __call__(self, input_ids, scores):
        mask = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids):
            allowed = self._allowed(row // self._num_beams, ids)
            wanted = f"a function that allows at least one token (batch ID {row // self._num_beams})"
            require(len(allowed) > 0, "prefix_allowed_tokens_fn", wanted, "one that returned an empty list")
            mask[row, allowed] = 0
        constrained = scores + mask
        hopeless = constrained.amax(-1).isneginf().view(-1, self._num_beams).all(-1, keepdim=True)
        return torch.where(hopeless.repeat_interleave(self._num_beams, 0), mask, constrained)


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """Force this token after a text of one token."""

    def __init__(self, bos_token_id: int):
        self.bos_token_id = check("forced_bos_token_id", bos_token_id)

    def __call__(self, input_ids, scores):
        return _only(self.bos_token_id, scores) if input_ids.shape[-1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """Force one of these tokens as the last that fits into `max_length`."""

    def __init__(self, max_length: int, eos_token_id: TokenIds, device: Any = "cpu"):
        self.max_length = max_length
        self.eos_token_id = as_ids("eos_token_id", eos_token_id, device, least=0)

    def __call__(self, input_ids, scores):
        last = input_ids.shape[-1] == self.max_length - 1
        return _only(self.eos_token_id.to(scores.device), scores) if last else scores


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """Replace NaN with 0 and ±∞ with the largest and smallest finite number of the dtype."""

    def __call__(self, input_ids, scores):
        return torch.nan_to_num(scores)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """From new token `start` on, raise the scores of the end tokens by |score| · (factor^steps − 1)."""

    def __init__(
        self, exponential_decay_length_penalty: tuple[int, float], eos_token_id: TokenIds, input_ids_seq_length: int
    ):
        option = "exponential_decay_length_penalty"
        start, self.regulation_factor = check(option, exponential_decay_length_penalty)
        self.regulation_start = start + input_ids_seq_length
        self.eos_token_id = as_ids("eos_token_id", eos_token_id, least=0)

    def __call__(self, input_ids, scores):
        steps = input_ids.shape[-1] - self.regulation_start
        if steps <= 0:
            return scores
        ends = self.eos_token_id = self.eos_token_id.to(scores.device)
        raised = torch.abs(scores[:, ends]) * (pow(self.regulation_factor, steps) - 1)
        penalties = torch.zeros_like(scores)
        penalties[:, ends] = raised.masked_fill(~torch.isfinite(scores[:, ends]), 0.0)
        return scores + penalties


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Steer away from what the model would generate after the negative prompt (Sanchez et al. 2023).

        u + guidance_scale · (c − u),      c, u: log softmax of the scores, of those after the negative prompt

    Without `unconditional_ids` the negative prompt is the prompt's last token. Every call runs the model once more, on
    the tokens generated since the previous call, with a separate cache.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Any,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool = True,
    ):
        self.guidance_scale = check("guidance_scale", guidance_scale)
        self.model = model
        self._ids: Any = unconditional_ids
        self._mask: Any = unconditional_attention_mask
        self._cached = {"use_cache": use_cache, "past_key_values": None}
        self._begun = False

    def get_unconditional_logits(self, input_ids: Tensor) -> Tensor:
        last = input_ids[:, -1:]
        if self._begun:
            self._ids = last if self._cached["use_cache"] else torch.cat([self._ids, last], 1)
            self._mask = torch.cat([self._mask, torch.ones_like(last)], 1)
        else:
            self._ids = last if self._ids is None else self._ids
            self._mask = torch.ones_like(self._ids) if self._mask is None else self._mask
            self._begun = True
        out = self.model(self._ids, attention_mask=self._mask, **self._cached)
        self._cached["past_key_values"] = getattr(out, "past_key_values", None)
        return out.logits

    def __call__(self, input_ids, scores):
        scores = scores.log_softmax(-1)
        if self.guidance_scale == 1:
            return scores
        unconditional = self.get_unconditional_logits(input_ids)[:, -1].log_softmax(-1)
        return self.guidance_scale * (scores - unconditional) + unconditional


class TemperatureLogitsWarper(LogitsProcessor):
    """Sharpen the distribution (below 1) or flatten it (above 1)."""

    def __init__(self, temperature: float):
        self.temperature = check("temperature", temperature)

    def __call__(self, input_ids, scores):
        return scores / self.temperature


class _Filter(LogitsProcessor):
    """Give all tokens in the mask `_removed` (B, V) the score `filter_value`."""

    def __init__(self, filter_value: float, min_tokens_to_keep: int):
        self.filter_value = filter_value
        self.min_tokens_to_keep = _count("min_tokens_to_keep", min_tokens_to_keep, 1)

    def _removed(self, scores: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, input_ids, scores):
        return scores.masked_fill(self._removed(scores), self.filter_value)


def _below_best(scores: Tensor, k: int) -> Tensor:
    """Mask of the scores (B, V) strictly below the k-th best of their row."""
    return scores < torch.topk(scores, min(k, scores.shape[-1]))[0][..., -1:]


class TopKLogitsWarper(_Filter):
    """Keep the k likeliest tokens (and all ties with the last of them)         (Fan et al. 2018)"""

    def __init__(self, top_k: int, filter_value: float = -math.inf, min_tokens_to_keep: int = 1):
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_k = max(_count("top_k", top_k, 1), min_tokens_to_keep)

    def _removed(self, scores):
        return _below_best(scores, self.top_k)


class TopPLogitsWarper(_Filter):
    """Keep the smallest set of likeliest tokens whose probabilities reach p    (Holtzman et al. 2020)"""

    def __init__(self, top_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1):
        super().__init__(filter_value, min_tokens_to_keep)
        self.top_p = check("top_p", top_p)

    def _removed(self, scores):
        ascending, order = torch.sort(scores)
        removed = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
        removed[..., -self.min_tokens_to_keep :] = False
        return removed.scatter(1, order, removed)


class MinPLogitsWarper(_Filter):
    """Keep the tokens at least p times as likely as the likeliest              (Nguyen et al. 2024)"""

    def __init__(self, min_p: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1):
        super().__init__(filter_value, min_tokens_to_keep)
        self.min_p = check("min_p", min_p)

    def _removed(self, scores):
        probabilities = scores.softmax(-1)
        removed = probabilities < self.min_p * probabilities.amax(-1, keepdim=True)
        best = torch.topk(probabilities, min(self.min_tokens_to_keep, scores.shape[-1]))[1]
        return removed.scatter_(-1, best, False)


class TypicalLogitsWarper(_Filter):
    """Keep the tokens whose surprise is nearest the expected one, up to a mass (Meister et al. 2022)"""

    def __init__(self, mass: float = 0.9, filter_value: float = -math.inf, min_tokens_to_keep: int = 1):
        super().__init__(filter_value, min_tokens_to_keep)
        self.mass = check("typical_p", mass)

    def _removed(self, scores):
        logs = scores.log_softmax(-1)
        entropy = -(logs * logs.exp()).nansum(-1, keepdim=True)
        distance, order = torch.sort(torch.abs(-logs - entropy))
        mass = scores.gather(-1, order).softmax(-1).cumsum(-1)
        last = (mass < self.mass).sum(1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
        removed = distance > distance.gather(1, last)
        removed[..., : self.min_tokens_to_keep] = False
        return removed.scatter(1, order, removed)


class EpsilonLogitsWarper(_Filter):
    """Keep the tokens of probability ε or more                                 (Hewitt et al. 2022)"""

    def __init__(self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1):
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = check("epsilon_cutoff", epsilon)

    def _removed(self, scores):
        return (scores.softmax(-1) < self.epsilon) & _below_best(scores, self.min_tokens_to_keep)


class EtaLogitsWarper(_Filter):
    """Keep the tokens of probability min(ε, √ε · exp(−entropy)) or more        (Hewitt et al. 2022)"""

    def __init__(
        self, epsilon: float, filter_value: float = -math.inf, min_tokens_to_keep: int = 1, device: Any = "cpu"
    ):
        super().__init__(filter_value, min_tokens_to_keep)
        self.epsilon = torch.tensor(float(check("eta_cutoff", epsilon)), device=device)

    def _removed(self, scores):
        logs = scores - scores.logsumexp(-1, keepdim=True)
        entropy = -(logs.clamp(min=torch.finfo(logs.dtype).min) * logs.softmax(-1)).sum(-1)
        eta = torch.min(self.epsilon, self.epsilon.sqrt() * torch.exp(-entropy))[..., None]
        return (scores.softmax(-1) < eta) & _below_best(scores, self.min_tokens_to_keep)


class LogitNormalization(LogitsProcessor):
    """Renormalize to log probabilities, so that beams that were filtered differently can be compared."""

    def __call__(self, input_ids, scores):
        return scores.log_softmax(-1)


def merge(built: list, own: Iterable) -> list:
    """Append the user's own processors (or criteria); one of exactly the same class as a built one replaces it."""
    own = list(own)
    merged = [next((mine for mine in own if type(mine) is type(one)), one) for one in built]
    return merged + [mine for mine in own if not any(mine is one for one in merged)]


def processors_for(
    config: GenerationConfig,
    prompt_length: int,
    *,
    device: Any,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    extra: Iterable = (),
    model: Any = None,
    attention_mask: Tensor | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    max_position_embeddings: int | None = None,
) -> LogitsProcessorList:
    """Build the processors of `config` in transformers' order, without those that have no effect.

    Args:
        prompt_length: S of the ids that `generate` begins with.
        extra: the user's own processors, placed before those of sampling.
        model: the model that guidance runs.
        attention_mask: (B, S) of the prompt, one row per generated text: the repetition penalty skips its padding, so
            that a text is the same as without a batch.
        max_position_embeddings: see `GenerationConfig.total_length`.
    """
    c, eos = config, config.eos_token_id
    built: list[LogitsProcessor] = []
    add = built.append
    if c.guidance_scale is not None and c.guidance_scale != 1:
        require(model is not None, "model", "given where `guidance_scale` is", model)
        negative = (negative_prompt_ids, negative_prompt_attention_mask)
        add(UnbatchedClassifierFreeGuidanceLogitsProcessor(c.guidance_scale, model, *negative, c.use_cache))
    if c.sequence_bias is not None:
        add(SequenceBiasLogitsProcessor(c.sequence_bias))
    if c.repetition_penalty != 1:
        padding = None if attention_mask is None else (attention_mask != 0).int().argmax(1)
        add(RepetitionPenaltyLogitsProcessor(c.repetition_penalty, padding))
    if c.no_repeat_ngram_size > 0:
        add(NoRepeatNGramLogitsProcessor(c.no_repeat_ngram_size))
    if c.bad_words_ids is not None:
        add(NoBadWordsLogitsProcessor(c.bad_words_ids, eos))
    min_length = c.min_length if c.min_new_tokens is None else prompt_length + c.min_new_tokens
    if eos is not None and min_length > 0:
        add(MinLengthLogitsProcessor(min_length, eos, device))
    if eos is not None and c.min_new_tokens:
        add(MinNewTokensLengthLogitsProcessor(prompt_length, c.min_new_tokens, eos, device))
    if prefix_allowed_tokens_fn is not None:
        add(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, c.num_beams))
    if c.forced_bos_token_id is not None:
        add(ForcedBOSTokenLogitsProcessor(c.forced_bos_token_id))
    if c.forced_eos_token_id is not None:
        end = c.total_length(prompt_length, max_position_embeddings)
        add(ForcedEOSTokenLogitsProcessor(end, c.forced_eos_token_id, device))
    if c.remove_invalid_values:
        add(InfNanRemoveLogitsProcessor())
    if c.exponential_decay_length_penalty is not None:
        if eos is None:
            raise ValueError("`exponential_decay_length_penalty` needs an `eos_token_id`")
        add(ExponentialDecayLengthPenalty(c.exponential_decay_length_penalty, eos, prompt_length))
    if c.suppress_tokens is not None:
        add(SuppressTokensLogitsProcessor(c.suppress_tokens, device))
    if c.begin_suppress_tokens is not None:
        after_bos = prompt_length <= 1 and c.forced_bos_token_id is not None
        add(SuppressTokensAtBeginLogitsProcessor(c.begin_suppress_tokens, prompt_length + after_bos, device))

    built = merge(built, extra)
    if c.do_sample:
        if c.temperature != 1:
            built.append(TemperatureLogitsWarper(c.temperature))
        # A beam needs one token to continue with, however many of the likeliest end the text.
        ends = 1 if eos is None or isinstance(eos, int) else len(eos)
        keep = ends + 1 if c.num_beams > 1 else 1
        filters: list[tuple[bool, Callable[..., LogitsProcessor], float | None]] = [
            (c.top_k > 0, TopKLogitsWarper, c.top_k),
            (c.top_p < 1, TopPLogitsWarper, c.top_p),
            (bool(c.min_p), MinPLogitsWarper, c.min_p),
            (c.typical_p < 1, TypicalLogitsWarper, c.typical_p),
            (c.epsilon_cutoff > 0, EpsilonLogitsWarper, c.epsilon_cutoff),
            (c.eta_cutoff > 0, partial(EtaLogitsWarper, device=device), c.eta_cutoff),
        ]
        built += [make(value, min_tokens_to_keep=keep) for wanted, make, value in filters if wanted]
    if c.renormalize_logits:
        built.append(LogitNormalization())
    return LogitsProcessorList(built)
