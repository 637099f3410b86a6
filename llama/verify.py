"""`llama verify`: check that a backend computes what the reference computes for a model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from . import reference
from .checkpoints import Checkpoint
from .modeling import LlamaForCausalLM
from .progress import progress
from .tokenization import LlamaTokenizerFast

PROMPTS = (
    "The capital of France is Paris, and the capital of Japan is Tokyo. The capital of Italy is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) +",
    "Once upon a time there was a small fox who lived at the edge of a big forest. Every morning the fox",
)
# The largest allowed error of a layer's output, relative to its largest value: about twice the worst of a correct
# model. float32 sums in a different order through a deep stack; float16 and bfloat16 round by up to 2^-11 and 2^-8 each
# time, and in bfloat16 a layer can be off by a tenth where an outlier is about to emerge (NOTES.md).
BUDGET = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2.5e-1}
NEAR = 2e-2  # of the largest logit: tokens this close may swap places in half precision
WAYS = ("prompt at once", "token by token")


@dataclass
class Report:
    """The results for each of `WAYS`.

    largest, relative: the largest error of the layers' inputs, the normalised output and the logits, absolute and
        divided by the largest value there; arrays of shape (ways, layers + 2).
    agree: how many of the `tokens` next tokens are equal. near_ties: how many of the others are within `NEAR` of each
        other in the reference.
    """

    dtype: torch.dtype
    largest: np.ndarray
    relative: np.ndarray
    agree: np.ndarray
    near_ties: np.ndarray
    tokens: int

    @property
    def budget(self) -> float:
        return BUDGET[self.dtype]

    @property
    def passed(self) -> bool:
        """Whether every error is within the budget (NaN is not), and every next token agrees or is a near tie."""
        same = self.agree + self.near_ties == self.tokens
        return bool((self.relative <= self.budget).all() and same.all())

    def lines(self) -> Iterator[str]:
        """The report as a table."""
        yield f"{'':12}" + "".join(f"{way:>26}" for way in WAYS)
        yield f"{'':12}" + f"{'largest':>14}{'relative':>12}" * len(WAYS)
        names = ["embedding", *(f"layer {i}" for i in range(self.largest.shape[1] - 3)), "norm", "logits"]
        for name, largest, relative in zip(names, self.largest.T, self.relative.T, strict=True):
            cells = (f"{a:>14.2e}{b:>12.2e}" for a, b in zip(largest, relative, strict=True))
            yield f"{name:12}" + "".join(cells)
        for way, agree, near in zip(WAYS, self.agree, self.near_ties, strict=True):
            ties = f", {near} nearly tie" if near else ""
            yield f"next token, {way}: {agree} of {self.tokens} agree{ties}"
        verdict = "within" if self.passed else "BEYOND"
        yield f"{verdict} the budget of {self.budget:g}, relative, for {str(self.dtype).removeprefix('torch.')}"


def verify(checkpoint: Checkpoint, backend: str = "auto", dtype: str = "auto", prompts: tuple[str, ...] = ()) -> Report:
    """Run the reference and a backend on the same texts, in one pass and token by token with a cache.

    Args:
        dtype: the backend's; the reference computes in float32 from the stored weights.
        prompts: texts (default: `PROMPTS`); a model without a tokenizer gets random ids instead.
    """
    params, config = reference.load(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype, device="auto", backend=backend)
    texts = _texts(checkpoint, config, prompts or PROMPTS)
    rows = config.num_hidden_layers + 2
    largest, scale = np.zeros((2, rows)), np.zeros((1, rows))
    agree, near_ties, tokens = np.zeros(2, int), np.zeros(2, int), 0
    for ids in progress(texts, "verifying", "texts"):
        truth = reference.forward(params, config, ids, output_hidden_states=True)
        assert truth.hidden_states is not None
        expected = [*truth.hidden_states, truth.logits]
        scale = np.maximum(scale, [[np.abs(array).max() for array in expected]])
        tokens += ids.size
        for way, found in enumerate(_read(model, ids)):
            errors = [np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]
            largest[way] = np.maximum(largest[way], errors)
            best, chosen = truth.logits[0].argmax(-1), found[-1][0].argmax(-1)
            at = np.arange(len(best))
            lead = truth.logits[0, at, best] - truth.logits[0, at, chosen]
            agree[way] += int((best == chosen).sum())
            near = (best != chosen) & (lead <= NEAR * np.abs(truth.logits).max())
            near_ties[way] += int(near.sum())
    return Report(model.dtype, largest, largest / np.maximum(scale, 1e-30), agree, near_ties, tokens)


def _texts(checkpoint: Checkpoint, config: reference.Config, prompts: tuple[str, ...]) -> list[np.ndarray]:
    try:
        tokenizer = LlamaTokenizerFast(*checkpoint.tokenizer())
    except FileNotFoundError:
        rng = np.random.default_rng(0)
        return [rng.integers(0, config.vocab_size, (1, 24)) for _ in prompts]
    texts = [np.array([tokenizer.encode(prompt)[: config.max_position_embeddings]]) for prompt in prompts]
    if any(not ids.size for ids in texts):
        raise ValueError("a prompt is empty; give at least one word")
    if (top := max(int(ids.max()) for ids in texts)) >= config.vocab_size:
        raise ValueError(f"the tokenizer gives {top}, but the model only knows ids below {config.vocab_size}")
    return texts


@torch.inference_mode()
def _read(model: LlamaForCausalLM, ids: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield the layers' inputs, the normalised output and the logits of a text (1, T), for each of `WAYS`.

    Where RoPE's angles depend on the length, cached keys keep those of their own step, so both are the single pass.
    """

    def arrays(out) -> list[np.ndarray]:
        return [tensor.float().cpu().numpy() for tensor in (*out.hidden_states, out.logits)]

    text = torch.from_numpy(ids).to(model.device)
    whole = arrays(model(text, output_hidden_states=True, use_cache=False))
    yield whole
    if model.config.checked().angles_follow_length:
        yield whole
        return
    cache, steps = None, []
    for place in range(text.shape[1]):
        out = model(text[:, place : place + 1], past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = out.past_key_values
        steps.append(arrays(out))
    yield [np.concatenate(parts, axis=1) for parts in zip(*steps, strict=True)]
