"""From logits to a token: each filter takes and returns logits (B, V), setting those of excluded tokens to -∞.

`Sampler` applies them in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.
"""

from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from jaxtyping import Float, Int

from .attention import softmax

Logits = Float[np.ndarray, "B V"]


def repetition_penalty(
    logits: Logits, seen: Int[np.ndarray, "B S"], penalty: float, attention_mask: Int[np.ndarray, "B S"] | None = None
) -> Logits:
    """Make every token already in the text less likely: logit / penalty if positive, logit · penalty if negative.

    The division is from Keskar et al. (2019), the other branch from transformers. A token counts once however often it
    occurs. Padding does not count, so a padded row generates what it would alone.
    """
    rows, places = np.nonzero(np.ones_like(seen) if attention_mask is None else attention_mask)
    tokens = seen[rows, places]
    out = logits.copy()
    picked = logits[rows, tokens]
    out[rows, tokens] = np.where(picked < 0, picked * penalty, picked / penalty)
    return out


def temperature(logits: Logits, value: float) -> Logits:
    """Divide by `value`: below 1 sharpens the distribution, above 1 flattens it."""
    return logits / value


def top_k(logits: Logits, k: int) -> Logits:
    """Keep the k most likely tokens (and any tied with the last of them)       (Fan et al. 2018)"""
    k = min(k, logits.shape[-1])
    last = np.partition(logits, -k, axis=-1)[:, -k, None]
    return np.where(logits < last, -np.inf, logits)


def top_p(logits: Logits, p: float) -> Logits:
    """Keep the smallest set of most likely tokens whose probabilities reach p  (Holtzman et al. 2020)"""
    order = np.argsort(logits, axis=-1, kind="stable")  # ascending: the least likely are dropped first
    mass = np.cumsum(softmax(np.take_along_axis(logits, order, axis=-1)), axis=-1)
    drop = mass <= 1 - p
    drop[:, -1] = False  # the most likely token always stays
    forbidden = np.empty_like(drop)
    np.put_along_axis(forbidden, order, drop, axis=-1)
    return np.where(forbidden, -np.inf, logits)


def min_p(logits: Logits, p: float) -> Logits:
    """Keep the tokens at least p times as likely as the most likely one        (Nguyen et al. 2024)"""
    probabilities = softmax(logits)
    return np.where(probabilities < p * probabilities.max(axis=-1, keepdims=True), -np.inf, logits)


def draw(logits: Logits, rng: np.random.Generator) -> Int[np.ndarray, "B"]:
    """Draw one token per row with probability softmax(logits), by inverting the cumulative distribution."""
    mass = np.cumsum(softmax(logits.astype(np.float64)), axis=-1)
    dart = rng.random((len(logits), 1)) * mass[:, -1:]
    return np.argmax(mass > dart, axis=-1)


@dataclass(frozen=True)
class Sampler:
    """How to choose the next token; the default is greedy, the most likely token each time.

    temperature: 0 is greedy, above 0 samples. top_k, top_p, min_p restrict the candidates; None, 1 and 0 disable them.
    repetition_penalty: 1 disables it; it also affects the greedy choice.
    seed: the same seed gives the same tokens; None varies from run to run. All rows of a batch share one generator.
    Temperatures above 0 and penalties range from 1e-6 to 1e6: beyond that, dividing by them can overflow float32.

    A value outside its range raises a ValueError that names it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name, kind, legal, wanted in (
            ("temperature", Real, lambda value: value == 0 or 1e-6 <= value <= 1e6, "0 (greedy) or from 1e-6 to 1e6"),
            ("top_k", Integral, lambda value: value >= 1, "None (all) or an integer of at least 1"),
            ("top_p", Real, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("min_p", Real, lambda value: 0 <= value <= 1, "from 0 to 1"),
            ("repetition_penalty", Real, lambda value: 1e-6 <= value <= 1e6, "from 1e-6 to 1e6"),
            ("seed", Integral, lambda value: 0 <= value < 2**64, "None or an integer from 0 to 2**64 - 1"),
        ):
            value = getattr(self, name)
            unset = value is None and kind is Integral
            if not unset and not (isinstance(value, kind) and legal(value)):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")

    def filter(
        self, logits: Logits, seen: Int[np.ndarray, "B S"], attention_mask: Int[np.ndarray, "B S"] | None = None
    ) -> Logits:
        """Apply all filters to `logits`, in transformers' order. `seen` is the text so far."""
        if self.repetition_penalty != 1:
            logits = repetition_penalty(logits, seen, self.repetition_penalty, attention_mask)
        if self.temperature == 0:
            return logits
        logits = temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = top_p(logits, self.top_p)
        if self.min_p > 0:
            logits = min_p(logits, self.min_p)
        return logits

    def pick(
        self,
        logits: Logits,
        rng: np.random.Generator,
        seen: Int[np.ndarray, "B S"],
        attention_mask: Int[np.ndarray, "B S"] | None = None,
    ) -> Int[np.ndarray, "B"]:
        """Choose the next token of every row."""
        logits = self.filter(logits, seen, attention_mask)
        return np.argmax(logits, axis=-1) if self.temperature == 0 else draw(logits, rng)


GREEDY = Sampler()
