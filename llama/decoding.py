"""A step of decoding of one fixed shape: one token per row, read, turned into the next one, and written down.

What a step needs lies in buffers that stay where they are: token, place, cache, text, who is still writing. So steps
can follow each other without the host, which looks at the buffers now and then; and on a GPU a step can be recorded
once, as a CUDA graph, and replayed. The step itself is written once. `decoding="static"` runs it as it is, on any
device; `decoding="graph"` replays it.

Experimental: the graph has never run on a GPU. What a recording demands of the step (the same addresses, no waiting for
the device, nothing decided in Python) is tested without one.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from . import modeling, ops
from .cache import Cache
from .generation import mixin, processors
from .generation.stopping import EosTokenCriteria

STEPS = 16  # between two looks of the host at whether all rows are done
ROOM = 256  # caches are made for a multiple of so many tokens, so that texts of like lengths share one
GRAPHS = 8  # a decoder keeps so many recordings: one for each way of sampling, with padding or without
# What looks at the scores alone; the others want the text, or its length, which a recording would not see change.
SCORE_PROCESSORS = (
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.TypicalLogitsWarper,
    processors.EpsilonLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
)

Linear = tuple[torch.Tensor, torch.Tensor | None]  # a weight and a bias


Norm = tuple[torch.Tensor, float]  # a gain and its ε


class Layer(NamedTuple):
    """A layer's weights."""

    attention_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp_norm: Norm
    gate: Linear
    up: Linear
    down: Linear


class Plan(NamedTuple):
    """All that a step computes with. It holds tensors and not the model, which may go, and the plan with it."""

    embedding: torch.Tensor
    layers: list[Layer]
    norm: Norm
    head: Linear
    rotary: "modeling.LlamaRotaryEmbedding"
    head_dim: int
    backend: str

    def baked(self) -> list[Any]:
        """What a recording has taken from the plan for good: where the weights lie, and the numbers."""
        parts = [part for layer in self.layers for pair in layer for part in pair]
        parts += [self.embedding, *self.norm, *self.head, self.rotary.inv_freq, self.rotary.attention_scaling]
        whole = [(one.data_ptr(), one.dtype, one.shape) if isinstance(one, torch.Tensor) else one for one in parts]
        return [*whole, self.head_dim, self.backend]


def takes(run: "mixin.Run", drafts: bool = False) -> bool:
    """Whether this run is decoded here. "auto" leaves to the plain loop what does not fit, and whatever has no GPU.

    Raises:
        ValueError: "static" or "graph" was asked for, and something about the run does not fit.
    """
    if run.decoding == "plain":
        return False
    reason = "leave out the drafting" if drafts else refusal(run)
    on_gpu = run.ids.device.type == "cuda"
    if run.decoding == "auto":
        return on_gpu and reason is None
    if reason is not None:
        raise ValueError(f'decoding="{run.decoding}" cannot take this: {reason}, or use decoding="plain"')
    if run.decoding == "graph" and not on_gpu:
        raise ValueError('decoding="graph" needs a GPU; decoding="static" runs the same steps on any device')
    return True


def refusal(run: "mixin.Run") -> str | None:
    """What would have to change for this run to be decoded in fixed steps; None: nothing."""
    cache, config = run.reader.cache, run.config
    ends_only = all(type(criterion) is EosTokenCriteria for criterion in run.criteria)
    if config.num_beams > 1:
        return "set num_beams=1"
    if not isinstance(cache, Cache):
        return "leave use_cache on, with a cache of llama's own"
    if run.record:
        return "ask for no scores, logits, attentions or hidden states"
    if not ends_only or bool(run.criteria) != (run.ends is not None):
        return "let end tokens and the length alone stop it"
    if not all(type(one) in SCORE_PROCESSORS for one in run.processors):
        known = ", ".join(kind.__name__ for kind in SCORE_PROCESSORS)
        return f"use no logits processors but {known}"
    if torch.is_autocast_enabled(run.ids.device.type):
        return "leave autocast"
    plain = plan(run.model) is not None and not run.reader.prepares
    return None if plain else "see that the model is a plain LlamaForCausalLM in eval mode"


def plan(model: Any) -> Plan | None:
    """The weights of a plain model. None where a module does anything beyond its class's own forward (an adapter, a
    hook, a quantised linear), for a recording would leave that out; or a weight is more than its numbers."""
    body: Any = getattr(model, "model", None)
    if type(model) is not modeling.LlamaForCausalLM or type(body) is not modeling.LlamaModel or model.training:
        return None
    if body.rotary_emb.config.angles_follow_length:
        return None
    if not all(ops.runs_bare(part) and type(part) in PLAIN for part in model.modules()):
        return None
    blocks: Any = body.layers
    if not all(block.self_attn.groups_are_even for block in blocks):
        return None
    weights = list(model.parameters())
    if not ops.are_plain(weights) or len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return None
    layers = [
        Layer(
            attention_norm=_norm(block.input_layernorm),
            q=_linear(block.self_attn.q_proj),
            k=_linear(block.self_attn.k_proj),
            v=_linear(block.self_attn.v_proj),
            o=_linear(block.self_attn.o_proj),
            mlp_norm=_norm(block.post_attention_layernorm),
            gate=_linear(block.mlp.gate_proj),
            up=_linear(block.mlp.up_proj),
            down=_linear(block.mlp.down_proj),
        )
        for block in blocks
    ]
    return Plan(
        body.embed_tokens.weight.detach(), layers, _norm(body.norm), _linear(model.lm_head), body.rotary_emb,
        model.config.head_dim, body.backend,
    )  # fmt: skip


PLAIN = (
    modeling.LlamaForCausalLM, modeling.LlamaModel, modeling.LlamaDecoderLayer, modeling.LlamaAttention,
    modeling.LlamaMLP, modeling.LlamaRMSNorm, modeling.LlamaRotaryEmbedding,
    nn.Embedding, nn.ModuleList, nn.Linear, nn.SiLU,
)  # fmt: skip


def _norm(module: "modeling.LlamaRMSNorm") -> Norm:
    return module.weight.detach(), module.variance_epsilon


def _linear(module: nn.Linear) -> Linear:
    return module.weight.detach(), None if module.bias is None else module.bias.detach()


class State(NamedTuple):
    """What a step reads and writes, for B rows and a room of S tokens. It makes nothing else that outlasts it.

    token: (B,), to be read. position: (B, 1), the angle it is turned by. place: (1,), where in the cache it goes.
    mask: (B, S) bool, False where there is padding. keys, values: of each layer (B, K, S, D).
    text: (B, S), the token that was chosen at each place. ends, pad: (n,) and (1,).
    writing: (B,) bool, whose end has not come. steps: (1,), those that somebody was still writing in.
    """

    token: torch.Tensor
    position: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor
    text: torch.Tensor
    ends: torch.Tensor
    pad: torch.Tensor
    writing: torch.Tensor
    steps: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def new_state(plan: Plan, rows: int, room: int, ends: int) -> State:
    device = plan.embedding.device

    def whole(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def caches(weight: torch.Tensor) -> torch.Tensor:  # zeros: PyTorch multiplies what it does not look at by 0
        shape = (rows, len(weight) // plan.head_dim, room, plan.head_dim)
        return torch.zeros(shape, dtype=weight.dtype, device=device)

    seen = torch.ones(rows, room, dtype=torch.bool, device=device)
    writing = torch.ones(rows, dtype=torch.bool, device=device)
    return State(
        whole(rows), whole(rows, 1), whole(1), seen, whole(rows, room), whole(ends), whole(1), writing, whole(1),
        [caches(layer.k[0]) for layer in plan.layers], [caches(layer.v[0]) for layer in plan.layers],
    )  # fmt: skip


def step(plan: Plan, state: State, choose: Callable[[torch.Tensor], torch.Tensor], padded: bool = True) -> None:
    """Read `state.token` and choose the next, (B, V) scores to (B,) by `choose`: all in place, in `state`.

    padded: whether `state.mask` hides anything. Where it does not, attention is quicker without it.
    """
    B, backend = len(state.token), plan.backend
    x = F.embedding(state.token[:, None], plan.embedding)
    cos, sin = plan.rotary(x, state.position)
    place, lengths = state.place.expand(B)[:, None], (state.place + 1).expand(B).contiguous()
    mask = state.mask if padded else None
    normed, residual = ops.rms_norm(x, *plan.layers[0].attention_norm, backend), x
    norms = [*(layer.attention_norm for layer in plan.layers[1:]), plan.norm]  # each layer ends with the next one's
    for layer, norm, keys, values in zip(plan.layers, norms, state.keys, state.values, strict=True):
        q, k, v = (
            projected.view(B, 1, -1, plan.head_dim).transpose(1, 2)
            for projected in _products(normed, (layer.q, layer.k, layer.v), backend)
        )
        q = ops.apply_rope_to_cache(q, k, v, cos, sin, keys, values, place, backend)
        out = ops.decode_attention(q, keys, values, lengths, mask, backend).transpose(1, 2).reshape(B, 1, -1)
        (out,) = _products(out, (layer.o,), backend)
        normed, residual = ops.add_rms_norm(out, residual, *layer.mlp_norm, backend)
        hidden = ops.gemv_swiglu(normed, *layer.gate, *layer.up, backend)
        (out,) = _products(hidden, (layer.down,), backend)
        normed, residual = ops.add_rms_norm(out, residual, *norm, backend)
    (logits,) = _products(normed, (plan.head,), backend)
    chosen = torch.where(state.writing, choose(logits[:, 0].float()), state.pad)
    state.text.index_copy_(1, state.place, chosen[:, None])
    state.steps.add_(state.writing.any())
    state.writing.logical_and_((chosen[:, None] != state.ends).all(1))
    state.token.copy_(chosen)
    state.position.add_(1)
    state.place.add_(1)


def _products(x: torch.Tensor, linears: tuple[Linear, ...], backend: str) -> list[torch.Tensor]:
    return ops.gemv(x, [weight for weight, _ in linears], [bias for _, bias in linears], backend)


class Chooser:
    """From logits (B, V) to tokens (B,), as `Run.choose` does, but never waiting for the device as torch.multinomial.

    A draw is the same one: the largest of p / e, the e exponentially distributed. They come from PyTorch's default
    generator, B · V of them a step, also in steps that come after the last end. And as nobody waits, nobody is told of
    scores that are no numbers (NaN), of which torch.multinomial would raise: what is drawn then means nothing.
    """

    def __init__(self, run: "mixin.Run") -> None:
        self.processors, self.draws = run.processors, run.config.do_sample
        self.key = (self.draws, *((type(one), *vars(one).items()) for one in self.processors))

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        scores = self.processors(logits.new_empty(len(logits), 0), logits) if self.processors else logits
        if not self.draws:
            return scores.argmax(-1)
        odds = F.softmax(scores, dim=-1)
        return (odds / torch.empty_like(odds).exponential_()).argmax(-1)


class Decoder:
    """A state, and the steps recorded on it. A model's last one is kept, and lent to one run at a time.

    It does not hold the weights: they may move, and the recordings are then made anew.
    """

    def __init__(self, plan: Plan, rows: int, room: int, ends: int) -> None:
        with torch.inference_mode(False):  # what is made in inference mode cannot be written outside of it
            self.state = new_state(plan, rows, room, ends)
        self.baked = plan.baked()
        self.replays: dict[Any, Callable[[], None]] = {}

    def fits(self, plan: Plan, rows: int, room: int, ends: int) -> bool:
        """Whether a new one would be the same. More room would do, but attention sums by it, and rounds otherwise."""
        state = self.state
        return state.text.shape == (rows, room) and len(state.ends) == ends and self.baked == plan.baked()

    def replay(self, plan: Plan, choose: Chooser, record: bool, padded: bool = True) -> Callable[[], None]:
        """What makes a step: a recording, made at the first call for this way of choosing, with padding or without; or
        the step itself.

        Recording runs steps, so it comes before `load`.
        """

        def once() -> None:
            step(plan, self.state, choose, padded)

        if not record:
            return once
        key = (choose.key, padded)
        if key not in self.replays:
            self.state.place.zero_()  # so that there is room for what recording runs
            if len(self.replays) == GRAPHS:
                del self.replays[next(iter(self.replays))]
            self.replays[key] = recorded(once, self.state.token.device)
        return self.replays[key]

    def load(self, run: "mixin.Run") -> None:
        """Take over where `run`, which has read its prompt and chosen one token, stands."""
        reader, state = run.reader, self.state
        cache, past = reader.cache, reader.length
        assert isinstance(cache, Cache)
        state.token.copy_(run.ids[:, run.length - 1])
        if reader.positions is None:
            state.position.fill_(past)
        else:
            state.position.copy_(reader.positions[:, past - 1 : past] + 1)
        state.place.fill_(past)
        state.mask.fill_(True)
        if reader.mask is not None:
            state.mask[:, :past] = reader.mask[:, :past] != 0
        state.pad.fill_(run.pad)
        state.ends.copy_(_ends(run))
        state.writing.copy_((state.token[:, None] != state.ends).all(1))
        state.steps.zero_()
        for keys, values, held in zip(state.keys, state.values, cache, strict=True):
            for buffer, old in zip((keys, values), held, strict=True):
                buffer.zero_()
                buffer[:, :, :past] = old

    def give_back(self, cache: Cache, past: int, steps: int) -> None:
        """Append to `cache`, of `past` tokens, those that `steps` steps have read."""
        for index, (keys, values) in enumerate(zip(self.state.keys, self.state.values, strict=True)):
            cache.update(keys[:, :, past : past + steps], values[:, :, past : past + steps], index)


def recorded(once: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`once` as a CUDA graph. It runs three times before, for what kernels and libraries set up at their first call.

    In inference mode the generator's own tensors would be made such that no replay outside of it could advance them.
    Other threads may go on meanwhile, whatever they ask of the GPU.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng([device]), torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            once()
    return graph.replay


def _ends(run: "mixin.Run") -> torch.Tensor:
    """The end tokens; -1, which is no token, for none."""
    ends = [criterion.eos_token_id for criterion in run.criteria]
    return torch.cat(ends) if ends else torch.tensor([-1])


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def release(model: nn.Module) -> None:
    """Give up the cache and the recordings that are kept for `model`; the next run makes new ones."""
    _decoders.pop(model, None)


def write(run: "mixin.Run", watched: bool = True) -> Iterator[torch.Tensor]:
    """As `mixin.write`, for a run that `takes` has taken: yields each step's (B,) tokens.

    The prompt is read, and the first token chosen, by the plain loop. After that the host waits once in STEPS steps; or
    once a step where somebody watches, and wants each token as soon as it is there.
    """
    yield next(mixin.write(run))
    if run.length == run.limit:
        return
    reader, rows = run.reader, len(run.ids)
    cache, past = reader.cache, reader.length
    assert isinstance(cache, Cache)
    now, ends = plan(run.model), len(_ends(run))
    assert now is not None
    room = -(-(past + run.limit - run.length) // ROOM) * ROOM
    decoder = _decoders.pop(run.model, None)  # whoever comes meanwhile makes one of their own
    if decoder is None or not decoder.fits(now, rows, room, ends):
        decoder = None  # gone before the next one needs its memory
        decoder = Decoder(now, rows, room, ends)
    replay = decoder.replay(now, Chooser(run), run.decoding != "static", reader.mask is not None)
    decoder.load(run)
    if not run.cache_is_seen:
        reader.cache = cache = None  # its memory is free from here on
    state, done = decoder.state, 0
    writing = bool(state.writing.any())
    try:
        while writing and run.length < run.limit:
            for _ in range(min(1 if watched else STEPS, run.limit - run.length)):
                replay()
            steps, writing = torch.cat([state.steps, state.writing.any()[None]]).tolist()  # waits for the device
            new = state.text[:, past + done : past + steps].clone()
            done = steps
            for tokens in new.unbind(1):
                run.append(tokens)
                yield tokens
    finally:
        if cache is not None:
            decoder.give_back(cache, past, done)
        _decoders[run.model] = decoder
