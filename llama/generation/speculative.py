"""Speculative decoding: several tokens are drafted, and one pass of the model verifies them all.

The output is that of the model alone: a draft is accepted only as far as the model would have generated it. There are
two drafters: a smaller model (Leviathan et al. 2023; Chen et al. 2023), and the text itself, since phrases tend to
recur (prompt lookup, Saxena 2023).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from ..cache import DynamicCache
from .mixin import Reader, Run


def write_speculatively(run: Run, assistant: Any = None) -> Iterator[torch.Tensor]:
    """Like `write`, for one text. Yields single tokens; a step that accepts n drafted tokens yields n + 1."""
    if len(run.ids) != 1:
        raise ValueError("speculative decoding generates one text: pass one prompt, with num_return_sequences=1")
    if run.reader.cache is None:
        raise ValueError("speculative decoding needs use_cache=True")
    if run.reader.embeds is not None:
        raise ValueError("speculative decoding needs input_ids instead of inputs_embeds")
    if run.config.guidance_scale not in (None, 1):
        raise ValueError("speculative decoding does not support guidance_scale, which cannot undo rejected drafts")
    drafter = PromptLookup(run) if assistant is None else Assistant(run, assistant)
    while run.length < run.limit:
        start = run.length
        guesses, odds = drafter.draft(run.limit - start - 1)
        n = guesses.shape[1]
        text = torch.cat((run.text, guesses), dim=1)
        out = run.reader.read(text, keep=n + 1)
        logits = out.logits[0].float()  # (n + 1, V)
        scores = [run.processors(text[:, : start + i], logits[None, i].clone())[0] for i in range(n + 1)]
        kept, last = _check(run, guesses[0], torch.stack(scores), odds)
        for i in range(kept + 1):
            if run.record:
                run.keep(scores=scores[i][None], logits=logits[None, i], **_step(out, start, n, i))
            token = guesses[0, i : i + 1] if i < kept else last
            run.append(token)
            yield token
            if run.criteria and bool(run.criteria(run.text, run.kept_scores).all()):
                run.reader.cache.crop(run.length - 1)
                return
        run.reader.cache.crop(run.length - 1)  # the last token has been chosen but not read
        drafter.learn(n, kept)


def _check(
    run: Run, guesses: torch.Tensor, scores: torch.Tensor, odds: torch.Tensor | None
) -> tuple[int, torch.Tensor]:
    """Return how many of the n drafted tokens are accepted, and the token that follows them, (1,).

    Sampled drafts are accepted with probability min(1, p / q), where p is the model's probability and q the drafter's;
    the first rejected token is replaced by one sampled from max(p − q, 0), normalized. So the text is distributed as if
    the model had sampled it (Leviathan et al., §2.3).
    """
    n = len(guesses)
    if odds is None or not run.config.do_sample:
        chosen = run.choose(scores)
        kept = int((chosen[:n] == guesses).long().cumprod(0).sum())
        return kept, chosen[kept : kept + 1]
    p = F.softmax(scores, dim=-1)
    at = torch.arange(n, device=p.device)
    ratio = p[at, guesses] / odds[at, guesses]
    kept = int((torch.rand_like(ratio) <= ratio).long().cumprod(0).sum())
    rest = p[kept] if kept == n else (p[kept] - odds[kept]).clamp(min=0)
    return kept, torch.multinomial(rest / rest.sum(), 1)


def _step(out: Any, start: int, n: int, i: int) -> dict[str, Any]:
    """What step i of a pass would have returned by itself: the first reads all new tokens, the others one."""

    def cut(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        T = tensor.shape[axis]
        first = 0 if i == 0 else T - n - 1 + i
        return tensor.narrow(axis, first, T - n + i - first)

    attentions, hidden = out.attentions, out.hidden_states
    return {
        "attentions": attentions and tuple(cut(a, 2)[..., : start + i] for a in attentions),
        "hidden_states": hidden and tuple(cut(h, 1) for h in hidden),
    }


class PromptLookup:
    """Drafts the continuation of an earlier occurrence of the text's last tokens."""

    def __init__(self, run: Run):
        self.run = run

    def draft(self, room: int) -> tuple[torch.Tensor, None]:
        """Return (1, n) ids, n >= 0, that followed the longest repeated ending; and None, as nothing is sampled."""
        config, text = self.run.config, self.run.text[0]
        room = min(room, config.prompt_lookup_num_tokens or 0)
        for size in range(min(config.max_matching_ngram_size, len(text) - 1), 0, -1):
            windows = text.unfold(0, size, 1)[:-1]  # without the ending itself
            for place in (windows == text[-size:]).all(1).nonzero().flatten().tolist():
                guess = text[place + size : place + size + room]
                if self.run.ends is not None:
                    ends = torch.isin(guess, self.run.ends).nonzero().flatten()
                    guess = guess[: int(ends[0])] if len(ends) else guess
                if len(guess):
                    return guess[None], None
        return text[None, :0], None

    def learn(self, drafted: int, kept: int) -> None:
        pass


class Assistant:
    """Drafts with a smaller model, as many tokens as it is confident of."""

    def __init__(self, run: Run, model: Any):
        if model.config.vocab_size != run.model.config.vocab_size:
            raise ValueError(
                f"assistant_model has {model.config.vocab_size} tokens and the model {run.model.config.vocab_size}; "
                "both must have the same vocabulary"
            )
        reader = run.reader
        mask, positions = (
            None if t is None else t[:, : run.length].to(model.device) for t in (reader.mask, reader.positions)
        )
        self.run, self.cache, self.device = run, DynamicCache(), model.device
        self.reader = Reader(model, self.cache, mask, positions, limit=run.limit)
        own = model.generation_config
        self.most = float(own.num_assistant_tokens)
        self.schedule, self.confidence = own.num_assistant_tokens_schedule, own.assistant_confidence_threshold

    def draft(self, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (1, n) ids and the probabilities (n, V) that they were sampled from."""
        run, text = self.run, self.run.text
        self.cache.crop(min(self.cache.get_seq_length(), text.shape[1] - 1))
        odds = []
        for _ in range(min(room, int(self.most))):
            logits = self.reader.read(text.to(self.device)).logits[:, -1].float()
            scores = run.processors(text, logits.to(text.device))
            token = run.choose(scores)
            odds.append(F.softmax(scores, dim=-1)[0])
            text = torch.cat((text, token[:, None]), dim=1)
            unsure = self.confidence and float(odds[-1][token]) < self.confidence
            if unsure or (run.ends is not None and bool(torch.isin(token, run.ends))):
                break
        return text[:, run.length :], torch.stack(odds) if odds else text.new_zeros(0, 0)

    def learn(self, drafted: int, kept: int) -> None:
        """Draft more after a fully accepted draft and less after any other, unless the schedule is constant."""
        if self.schedule != "constant":
            self.most = self.most + 2 if kept == drafted else max(1.0, self.most - 1)
