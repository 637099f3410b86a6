"""Decoding in steps of fixed shape: each step reads one token per row, chooses the next and stores it.

All state is in buffers at fixed addresses: token, position, cache, text, which rows are unfinished. So steps can run
back to back while the host only checks the buffers now and then, and on a GPU a step can be captured once, as a CUDA
graph, and replayed. Both use the same code: `decoding="static"` runs the step itself, on any device;
`decoding="graph"` replays it.

Experimental: the graph has never run on a GPU. What capture requires of the step (fixed addresses, no device
synchronisation, no decisions in Python) is tested without one.
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

STEPS = 16  # between the host's checks whether all rows are done
ROOM = 256  # capacities are rounded up to a multiple of this many tokens, so that texts of similar length share a cache
GRAPHS = 8  # recordings kept per decoder: one for each way of sampling, with padding or without
# Those that use the scores only; others need the text, or its length, whose changes a recording would not see.
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
    """Everything a step computes with: the weights, not the model, which it does not keep alive."""

    embedding: torch.Tensor
    layers: list[Layer]
    norm: Norm
    head: Linear
    rotary: "modeling.LlamaRotaryEmbedding"
    head_dim: int
    backend: str

    def baked(self) -> list[Any]:
        """What a recording bakes in: the weights' addresses, dtypes and shapes, and the scalars."""
        parts = [part for layer in self.layers for pair in layer for part in pair]
        parts += [self.embedding, *self.norm, *self.head, self.rotary.inv_freq, self.rotary.attention_scaling]
        whole = [(one.data_ptr(), one.dtype, one.shape) if isinstance(one, torch.Tensor) else one for one in parts]
        return [*whole, self.head_dim, self.backend]


def takes(run: "mixin.Run", drafts: bool = False) -> bool:
    """Whether this run is decoded here. "auto" leaves runs that do not fit, or are not on a GPU, to the plain loop.

    Raises:
        ValueError: "static" or "graph" was requested, and the run does not fit.
    """
    if run.decoding == "plain":
        return False
    reason = "leave out assistant_model and prompt_lookup_num_tokens" if drafts else refusal(run)
    on_gpu = run.ids.device.type == "cuda"
    if run.decoding == "auto":
        return on_gpu and reason is None
    if reason is not None:
        raise ValueError(f'decoding="{run.decoding}" does not support this: {reason}, or use decoding="plain"')
    if run.decoding == "graph" and not on_gpu:
        raise ValueError('decoding="graph" needs a GPU; decoding="static" runs the same steps on any device')
    return True


def refusal(run: "mixin.Run") -> str | None:
    """What must change for this run to be decoded in fixed-shape steps, or None if it fits."""
    cache, config = run.reader.cache, run.config
    ends_only = all(type(criterion) is EosTokenCriteria for criterion in run.criteria)
    if config.num_beams > 1:
        return "set num_beams=1"
    if not isinstance(cache, Cache):
        return "leave use_cache on, with one of llama's own caches"
    if run.record:
        return "request no scores, logits, attentions or hidden states"
    if not ends_only or bool(run.criteria) != (run.ends is not None):
        return "use no stopping criteria but end tokens and the length"
    if not all(type(one) in SCORE_PROCESSORS for one in run.processors):
        known = ", ".join(kind.__name__ for kind in SCORE_PROCESSORS)
        return f"use no logits processors but {known}"
    if torch.is_autocast_enabled(run.ids.device.type):
        return "turn off autocast"
    plain = plan(run.model) is not None and not run.reader.prepares
    return None if plain else "use a plain LlamaForCausalLM in eval mode"


def plan(model: Any) -> Plan | None:
    """The weights of a plain model. None if a recording would miss what a module does beyond its class's own forward
    (an adapter, a hook, a quantised linear) or the model otherwise does not fit (tensor subclasses, mixed dtypes)."""
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
    """The buffers that a step reads and writes, for B rows and S tokens; nothing else outlasts the step.

    token: (B,), the next to read. position: (B, 1), its RoPE position. place: (1,), its index in the cache.
    mask: (B, S) bool, False at padding. keys, values: (B, K, S, D) per layer.
    text: (B, S), the token chosen at each index. ends, pad: (n,) and (1,), the end tokens and the padding token.
    writing: (B,) bool, the unfinished rows. steps: (1,), the number of steps in which any row was unfinished.
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

    def caches(weight: torch.Tensor) -> torch.Tensor:  # zeros: PyTorch multiplies masked entries by 0
        shape = (rows, len(weight) // plan.head_dim, room, plan.head_dim)
        return torch.zeros(shape, dtype=weight.dtype, device=device)

    seen = torch.ones(rows, room, dtype=torch.bool, device=device)
    writing = torch.ones(rows, dtype=torch.bool, device=device)
    return State(
        whole(rows), whole(rows, 1), whole(1), seen, whole(rows, room), whole(ends), whole(1), writing, whole(1),
        [caches(layer.k[0]) for layer in plan.layers], [caches(layer.v[0]) for layer in plan.layers],
    )  # fmt: skip


def step(plan: Plan, state: State, choose: Callable[[torch.Tensor], torch.Tensor], padded: bool = True) -> None:
    """Read `state.token` and choose the next, in place in `state`. `choose` maps (B, V) scores to (B,) tokens.

    padded: whether `state.mask` masks anything. If not, attention is faster without it.
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
    """Maps logits (B, V) to tokens (B,) as `Run.choose` does, without torch.multinomial's device synchronisation.

    Sampling is torch.multinomial's: the argmax of p / e, with e exponentially distributed. The e come from PyTorch's
    default generator, B · V per step, including steps after the last row has finished. Without synchronisation NaN
    scores, for which torch.multinomial raises, go unnoticed, and the tokens drawn from them are meaningless.
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
    """A state, and the steps recorded on it. Each model's last one is kept, and lent to one run at a time.

    It does not hold the weights; if they move, a new decoder replaces it.
    """

    def __init__(self, plan: Plan, rows: int, room: int, ends: int) -> None:
        with torch.inference_mode(False):  # inference tensors cannot be written to outside of it
            self.state = new_state(plan, rows, room, ends)
        self.baked = plan.baked()
        self.replays: dict[Any, Callable[[], None]] = {}

    def fits(self, plan: Plan, rows: int, room: int, ends: int) -> bool:
        """Whether a new one would be the same. A larger one would work, but change attention's summation order."""
        state = self.state
        return state.text.shape == (rows, room) and len(state.ends) == ends and self.baked == plan.baked()

    def replay(self, plan: Plan, choose: Chooser, record: bool, padded: bool = True) -> Callable[[], None]:
        """A function that runs a step: a recording, made at the first call for this `choose.key` and `padded`, or the
        step itself. Recording runs steps, so call this before `load`.
        """

        def once() -> None:
            step(plan, self.state, choose, padded)

        if not record:
            return once
        key = (choose.key, padded)
        if key not in self.replays:
            self.state.place.zero_()  # room for the steps that recording runs
            if len(self.replays) == GRAPHS:
                del self.replays[next(iter(self.replays))]
            self.replays[key] = recorded(once, self.state.token.device)
        return self.replays[key]

    def load(self, run: "mixin.Run") -> None:
        """Take over from `run`, which has read its prompt and chosen one token."""
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
        """Append the tokens read in `steps` steps to `cache`, which holds `past` tokens."""
        for index, (keys, values) in enumerate(zip(self.state.keys, self.state.values, strict=True)):
            cache.update(keys[:, :, past : past + steps], values[:, :, past : past + steps], index)


def recorded(once: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`once` as a CUDA graph, after three warm-up runs for what kernels and libraries set up at their first call.

    Not in inference mode, in which the generator's state would become inference tensors that replays outside of it
    cannot advance. Other threads may use the GPU meanwhile.
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
    """The end tokens, or -1, which is no token, if there are none."""
    ends = [criterion.eos_token_id for criterion in run.criteria]
    return torch.cat(ends) if ends else torch.tensor([-1])


_decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()


def release(model: nn.Module) -> None:
    """Free the cache and the recordings kept for `model`; the next run makes new ones."""
    _decoders.pop(model, None)


def write(run: "mixin.Run", watched: bool = True) -> Iterator[torch.Tensor]:
    """As `mixin.write`, for a run that `takes` accepted: yields each step's (B,) tokens.

    The plain loop reads the prompt and chooses the first token. After that the host synchronises every STEPS steps or,
    if `watched`, every step, so that each token is available at once.
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
    decoder = _decoders.pop(run.model, None)  # a concurrent run makes its own
    if decoder is None or not decoder.fits(now, rows, room, ends):
        decoder = None  # freed before the next one needs its memory
        decoder = Decoder(now, rows, room, ends)
    replay = decoder.replay(now, Chooser(run), run.decoding != "static", reader.mask is not None)
    decoder.load(run)
    if not run.cache_is_seen:
        reader.cache = cache = None  # frees its memory
    state, done = decoder.state, 0
    writing = bool(state.writing.any())
    try:
        while writing and run.length < run.limit:
            for _ in range(min(1 if watched else STEPS, run.limit - run.length)):
                replay()
            steps, writing = torch.cat([state.steps, state.writing.any()[None]]).tolist()  # synchronises
            new = state.text[:, past + done : past + steps].clone()
            done = steps
            for tokens in new.unbind(1):
                run.append(tokens)
                yield tokens
    finally:
        if cache is not None:
            decoder.give_back(cache, past, done)
        _decoders[run.model] = decoder
