"""Beam search."""

import torch
from torch.nn import functional as F

from .mixin import Run

OUT = -1.0e9  # added to the scores of excluded candidates; transformers' value, so that ties break as they do there


def beam_search(run: Run) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Search with `num_beams` beams per prompt and return the best `num_return_sequences` finished ones.

    Each step scores every continuation of every running beam by the sum of its log probabilities and keeps the best:
    twice as many as beams (or more, with several end tokens), so that enough are left to continue when some finish.
    Finished beams are ranked by their sum divided by length ** length_penalty. A prompt is done when its running beams
    cannot improve on the finished ones: guaranteed only for `early_stopping="never"`, estimated at the current length
    for False; True stops as soon as `num_beams` beams have finished.

    Returns:
        sequences (B · num_return_sequences, length), and their {"sequences_scores", "beam_indices"}.
    """
    config, beams, prompt, limit = run.config, run.config.num_beams, run.length, run.limit
    B, device = len(run.ids) // beams, run.ids.device
    kept = max(2, 1 + (0 if run.ends is None else len(run.ends))) * beams
    first = torch.arange(kept, device=device) < beams

    running = run.ids.view(B, beams, limit)
    running_from = torch.full((B, beams, limit - prompt), -1, dtype=torch.long, device=device)
    running_scores = torch.full((B, beams), OUT, device=device)
    running_scores[:, 0] = 0  # the beams are still identical: only the first counts
    ended, ended_from = running.clone(), running_from.clone()
    ended_scores = torch.full((B, beams), OUT, device=device)
    is_ended = torch.zeros(B, beams, dtype=torch.bool, device=device)
    can_improve = torch.ones(B, 1, dtype=torch.bool, device=device)
    row = torch.arange(B, device=device)[:, None] * beams

    while True:
        # The best (or sampled) continuations of all beams of a prompt.
        text = running.view(B * beams, limit)[:, : run.length]
        out = run.reader.read(text)
        logits = out.logits[:, -1].float()
        scores = run.processors(text, F.log_softmax(logits, dim=-1))
        if run.record:
            run.keep(scores=scores, logits=logits, attentions=out.attentions, hidden_states=out.hidden_states)
        V = scores.shape[-1]
        total = (scores.view(B, beams, V) + running_scores[:, :, None]).view(B, beams * V)
        if config.do_sample:
            picked = torch.multinomial(F.softmax(total, dim=-1), num_samples=kept)
            top = total.gather(1, picked)
        else:
            top, picked = total.topk(kept)
        beam = picked // V
        texts, texts_from = _pick(running, beam), _pick(running_from, beam)
        texts[:, :, run.length] = picked % V
        texts_from[:, :, run.length - prompt] = beam + row
        run.length += 1
        done = run.criteria(texts.view(B * kept, limit)[:, : run.length], run.kept_scores).view(B, kept)
        if run.length >= limit:
            done = torch.ones_like(done)

        # Add those among the best that have finished to the finished ones, and keep the best of both.
        final = top / (run.length - prompt) ** config.length_penalty
        full = is_ended.all(1, keepdim=True) & (config.early_stopping is True)
        final = final + (full | ~can_improve | ~(done & first)) * OUT
        ended_scores, best = torch.cat((ended_scores, final), 1).topk(beams)
        ended = _pick(torch.cat((ended, texts), 1), best)
        ended_from = _pick(torch.cat((ended_from, texts_from), 1), best)
        is_ended = torch.cat((is_ended, done & first), 1).gather(1, best)

        # The others continue.
        running_scores, going = (top + done * OUT).topk(beams)
        running, running_from = _pick(texts, going), _pick(texts_from, going)

        never = config.early_stopping == "never" and config.length_penalty > 0
        length = (limit if never else run.length) - prompt
        bound = running_scores[:, :1] / length**config.length_penalty
        worst = torch.where(is_ended, ended_scores.min(1, keepdim=True)[0], OUT)
        can_improve = can_improve & (bound > worst).any(1, keepdim=True)
        is_full = config.early_stopping is True and bool(is_ended.all())
        if is_full or not bool(can_improve.any()) or bool(done.all()):
            break
        if run.reader.cache is not None:
            run.reader.cache.reorder_cache(running_from[:, :, run.length - prompt - 1].reshape(-1))

    chosen = config.num_return_sequences
    sequences, scores, came_from = (t[:, :chosen].flatten(0, 1) for t in (ended, ended_scores, ended_from))
    longest = int((came_from >= 0).sum(-1).max())  # trim columns that no text reaches
    return sequences[:, : prompt + longest], {"sequences_scores": scores, "beam_indices": came_from[:, :longest]}


def _pick(beams: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Select, from each prompt's beams (B, n, ...), those at `index` (B, m)."""
    return beams.take_along_dim(index.view(*index.shape, *[1] * (beams.dim() - 2)), dim=1)
