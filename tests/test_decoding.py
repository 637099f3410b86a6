"""Decoding in steps of a fixed shape equals the plain loop, and a step can be recorded.

CUDA graphs need a GPU. A tape stands in for one: it records a step's operations with the tensors that they read and
wrote, rejects whatever would synchronise with the device, and replays them in the same memory. Like a graph's, a replay
runs none of the step's Python. `pytest --gpu tests/test_decoding.py` tests real graphs.
"""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import both_models
from strategies import SEEDS, configs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama import DynamicCache, LlamaForCausalLM, StaticCache, decoding, ops
from llama.generation.stopping import StoppingCriteria

DEVICE = "cuda" if GPU else "cpu"
VOCAB = 50
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "multinomial")


def model(seed: int = 0, **fields) -> LlamaForCausalLM:
    fields = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
              "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8} | fields  # fmt: skip
    return both_models(fields, seed)[0].to(DEVICE)


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def left_padding(ids: torch.Tensor, *lengths: int) -> torch.Tensor:
    """Return a mask with `lengths[b]` tokens of left padding in row b."""
    return (torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]).long().to(DEVICE)


def written(made, ids, how, seed=0, **options):
    torch.manual_seed(seed)
    return made.generate(ids, decoding=how, **({"do_sample": False, "pad_token_id": 0} | options))


def same(made, ids, **options):
    plain, ours = (written(made, ids, how, **options) for how in ("plain", "static"))
    assert torch.equal(plain, ours)
    return plain


class Tape(TorchDispatchMode):
    """Record the operations run within it; `replay` runs them again in the same memory."""

    def __init__(self):
        super().__init__()
        self.notes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not op._schema.name.split("::")[1].startswith(SYNCS), f"{op} waits for the device"
        out = op(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        assert len({x.device for x in (*given, *tensors_in(out)) if x.dim()}) <= 1, f"{op} goes to another device"
        memory = {x.untyped_storage().data_ptr() for x in given}
        new = [x.untyped_storage().data_ptr() not in memory for x in tensors_in(out)]
        self.notes.append((op, args, kwargs or {}, out, new))
        return out

    def replay(self):
        for op, args, kwargs, out, new in self.notes:
            if op._schema.is_mutable or any(new):
                again = op(*args, **kwargs)
                for there, here, is_new in zip(tensors_in(out), tensors_in(again), new, strict=True):
                    if is_new:
                        there.copy_(here)


def tensors_in(out) -> list[torch.Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]


def taped(once, device):
    """Replacement for `decoding.recorded`."""
    once()
    with Tape() as tape:
        once()
    return tape.replay


def run_of(made, ids, how="graph", **options):
    """Prepare a run for `decoding.write`, with "graph" even on a CPU."""
    run = made._prepare(ids, None, None, None, None, None, None, {"do_sample": False, "pad_token_id": 0} | options)
    assert decoding.refusal(run) is None
    run.decoding = how
    return run


@torch.no_grad()
def recorded_text(made, ids, seed=0, **options):
    torch.manual_seed(seed)
    run = run_of(made, ids, **options)
    for _ in decoding.write(run, watched=False):
        pass
    return run.text


@pytest.fixture
def tape(monkeypatch):
    monkeypatch.setattr(decoding, "recorded", taped)


@pytest.fixture
def little_room(monkeypatch):
    """Allocate little, so that the interpreter reads little and a text can fill it."""
    monkeypatch.setattr(decoding, "ROOM", 16)


plain_configs = configs(kinds=["default", "linear", "yarn", "llama3"])


@given(plain_configs, SEEDS, st.integers(1, 8), st.integers(1, 9), st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_greedy_tokens_are_the_plain_loops(fields, seed, B, T, new, data):
    """GQA, biases, tied weights, padding, ends at any step, host checks at any interval; in float64, where the order of
    summation does not change the tokens."""
    made = both_models(fields | {"hidden_act": "silu"}, seed)[0].to(DEVICE).double()
    vocab = fields["vocab_size"]
    ids = torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    mask = left_padding(ids, *data.draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B)))
    options = {"attention_mask": mask, "max_new_tokens": new}
    plain = written(made, ids, "plain", **options)
    ends = data.draw(st.lists(st.sampled_from(plain[:, T:].flatten().tolist()), max_size=3))  # tokens that do occur
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "STEPS", data.draw(st.sampled_from([1, 3, 16])))
        same(made, ids, eos_token_id=ends or None, **options)


def test_256_steps_in_float32():
    made, ids = model(), tokens(3, 7)
    assert same(made, ids, max_new_tokens=256).shape == (3, 263)
    assert same(made, ids[:1], max_new_tokens=256).shape == (1, 263)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"typical_p": 0.6},
     {"epsilon_cutoff": 0.05}, {"top_k": 9, "top_p": 0.8, "temperature": 1.4, "renormalize_logits": True}],
    ids=str,
)  # fmt: skip
def test_the_same_seed_draws_the_same_tokens(options):
    ids = tokens(3, 5)
    text = same(model(), ids, max_new_tokens=30, do_sample=True, **options)
    assert not torch.equal(text, written(model(), ids, "plain", max_new_tokens=30))


@pytest.mark.parametrize("looks", [1, 16])
def test_several_texts_of_one_prompt_end_where_they_end(looks, monkeypatch):
    monkeypatch.setattr(decoding, "STEPS", looks)
    text = same(model(), tokens(1, 4), num_return_sequences=6, do_sample=True, max_new_tokens=60,
                eos_token_id=[*range(30, 40)])  # fmt: skip
    assert text.shape[1] < 64


def test_embeddings_and_positions_come_as_in_the_plain_loop():
    made, ids = model(), tokens(2, 6)
    embeds = made.get_input_embeddings()(ids).detach()
    same(made, None, inputs_embeds=embeds, max_new_tokens=9)
    same(made, ids, position_ids=torch.tensor([[0, 1, 5, 6, 7, 20], [3, 4, 5, 6, 7, 8]], device=DEVICE),
         max_new_tokens=9)  # fmt: skip


@pytest.mark.parametrize("kind", [DynamicCache, lambda: StaticCache(model().config, 40)], ids=["dynamic", "static"])
def test_the_callers_cache_holds_what_the_plain_loop_would_leave_in_it(kind):
    made, ids, caches = model(), tokens(2, 6), []
    for how in ("plain", "static"):
        cache = kind()
        text = written(made, ids, how, past_key_values=cache, max_new_tokens=20, eos_token_id=9)
        again = written(made, torch.cat([text, ids], 1), how, past_key_values=cache, max_new_tokens=5)
        caches.append((again, cache))
    assert torch.equal(caches[0][0], caches[1][0])
    assert len(caches[0][1]) == len(caches[1][1]) == 2
    for theirs, ours in zip(caches[0][1], caches[1][1], strict=True):
        torch.testing.assert_close(ours, theirs)
    out = written(made, ids, "static", return_dict_in_generate=True, max_new_tokens=5)
    assert out.past_key_values.get_seq_length() == 10


def test_nothing_of_an_earlier_text_is_left():
    """The decoder that both texts use keeps neither padding nor NaN."""
    made, ids = model(), tokens(2, 9)
    same(made, ids, attention_mask=left_padding(ids, 8, 5), max_new_tokens=30)
    for keys, values in zip(*decoding._decoders[made].state[-2:], strict=True):
        keys.fill_(torch.nan), values.fill_(torch.nan)
    same(made, ids, max_new_tokens=9)


def test_streams_get_each_token_as_it_comes():
    made, ids, seen = model(), tokens(1, 5), []
    text = written(made, ids, "plain", max_new_tokens=12)[0, 5:].tolist()
    steps = made.steps(ids, max_new_tokens=12, do_sample=False, decoding="static")
    assert [int(token) for token in steps] == text
    streamer = SimpleNamespace(put=lambda tokens: seen.append(tokens.flatten().tolist()), end=lambda: None)
    written(made, ids, "static", max_new_tokens=12, streamer=streamer)
    assert seen[1:] == [[token] for token in text]


def test_texts_that_are_written_by_turns_keep_apart():
    made = model()
    texts = [tokens(2, 5, seed) for seed in (0, 1)]
    expected = [same(made, ids, max_new_tokens=8)[:, 5:] for ids in texts]  # leaves a decoder to be shared
    writers = [made.steps(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, decoding="static") for ids in texts]
    got = [torch.stack(steps, 1) for steps in zip(*(zip(*writers, strict=True)), strict=True)]
    assert all(map(torch.equal, got, expected))


def test_a_decoder_is_kept_and_goes_with_the_weights_and_the_model(tape):
    made, ids = model(), tokens(2, 5)

    def kept():
        return decoding._decoders[made]

    first = recorded_text(made, ids, max_new_tokens=5)
    decoder = kept()
    addresses = [x.data_ptr() for x in tensors_in(decoder.state)]
    longer = recorded_text(made, ids, max_new_tokens=50)
    assert kept() is decoder
    assert len(decoder.replays) == 1
    assert torch.equal(longer, written(made, ids, "plain", max_new_tokens=50))
    made.load_state_dict(model(seed=1).state_dict())  # in place
    other = recorded_text(made, ids, max_new_tokens=50)
    assert kept() is decoder
    assert [x.data_ptr() for x in tensors_in(decoder.state)] == addresses
    assert torch.equal(other, written(made, ids, "plain", max_new_tokens=50))
    assert not torch.equal(other[:, :10], first)
    made.to(torch.float64)  # into new memory
    assert torch.equal(recorded_text(made, ids, max_new_tokens=9), written(made, ids, "plain", max_new_tokens=9))
    assert kept() is not decoder
    recorded_text(made, ids, max_new_tokens=300)  # more than was allocated
    assert kept().state.text.shape[1] == 512
    decoding.release(made)
    assert made not in decoding._decoders
    recorded_text(made, ids, max_new_tokens=5)
    gone = weakref.ref(kept())
    del made, decoder
    gc.collect()
    assert gone() is None


def test_one_decoder_is_kept_and_a_text_gets_the_room_that_it_would_get_alone():
    """The allocated length determines how attention is split, and so the last bits."""
    made = model()
    first = weakref.ref(lent(made, rows=2, new=300))
    assert first().state.text.shape == (2, 512)
    for rows, new in ((2, 5), (1, 5), (2, 300)):
        assert lent(made, rows, new).state.text.shape == (rows, 512 if new == 300 else 256)
        gc.collect()
        assert first() is None


def lent(made, rows, new):
    written(made, tokens(rows, 5), "static", max_new_tokens=new)
    return decoding._decoders[made]


@pytest.mark.parametrize(
    ("options", "seen"),
    [({}, False), ({"return_dict_in_generate": True}, True), ({"past_key_values": DynamicCache()}, True)],
    ids=["nobody's", "returned", "the caller's"],
)
@torch.no_grad()
def test_a_cache_that_nobody_will_see_goes_when_the_steps_begin(options, seen, monkeypatch):
    made, ids, calls = model(), tokens(2, 5), []
    give_back = decoding.Decoder.give_back
    monkeypatch.setattr(decoding.Decoder, "give_back", lambda *args: (calls.append(1), give_back(*args)))
    kwargs = {"do_sample": False, "max_new_tokens": 9} | options
    run = made._prepare(ids, None, None, None, None, None, None, kwargs | {"decoding": "static"})
    held = weakref.ref(run.reader.cache)
    steps = decoding.write(run)
    next(steps), next(steps)
    gc.collect()
    assert (held() is not None) == seen
    assert len(list(steps)) == 7
    assert len(calls) == seen
    assert not seen or held().get_seq_length() == 13


def test_a_decoder_made_in_inference_mode_serves_outside_of_it():
    made, ids = model(), tokens(2, 5)
    with torch.inference_mode():
        inside = written(made, ids, "static", max_new_tokens=5)
    assert torch.equal(inside, same(made, ids, max_new_tokens=5))


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED = {
    "num_beams=1": {"num_beams": 2},
    "leave out assistant_model and prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "leave use_cache on": {"use_cache": False},
    "request no scores": {"output_scores": True, "return_dict_in_generate": True},
    "use no stopping criteria but end tokens and the length": {"stopping_criteria": [Never()]},
    "use no logits processors but": {"repetition_penalty": 1.2},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_python_has_to_see_is_refused_or_left_to_the_plain_loop(words):
    made, ids = model(), tokens(1, 5)
    with pytest.raises(ValueError, match=f'decoding="static" does not support this: .*{words}.*decoding="plain"'):
        written(made, ids, "static", max_new_tokens=4, **REFUSED[words])
    plain, auto = (written(made, ids, how, max_new_tokens=4, **REFUSED[words]) for how in ("plain", "auto"))
    assert torch.equal(*(out if isinstance(out, torch.Tensor) else out.sequences for out in (plain, auto)))


class Adapter(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def watch(made):
    made.model.layers[1].mlp.down_proj.register_forward_hook(lambda module, args, out: out * 2)


def adapt(made):
    made.model.layers[0].self_attn.q_proj.__class__ = Adapter


class Packed(torch.Tensor):
    """A tensor subclass, like those of quantised and sharded weights, which define their own products."""


def pack(made):
    made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().as_subclass(Packed))


@pytest.mark.parametrize(
    "change",
    [watch, adapt, pack, lambda made: made.train(), lambda made: made.lm_head.half(),
     lambda made: made.model.layers[0].self_attn.prune_heads({1})],
    ids=["hook", "adapter", "weight's class", "training", "two dtypes", "pruned"],
)  # fmt: skip
def test_a_model_that_is_more_than_its_weights_is_refused(change):
    made = model()
    assert decoding.plan(made) is not None
    change(made)
    assert decoding.plan(made) is None


def test_frequencies_that_follow_the_length_and_other_activations_are_refused():
    assert decoding.plan(model(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})) is None
    assert decoding.plan(model(hidden_act="gelu")) is None


def test_wrong_words_and_a_missing_gpu_are_named(monkeypatch):
    made, ids = model(), tokens(1, 5)
    with pytest.raises(ValueError, match="decoding must be one of plain, auto, static, graph, got 'fast'"):
        written(made, ids, "fast")
    if not GPU:
        with pytest.raises(ValueError, match='decoding="graph" needs a GPU; decoding="static" runs'):
            written(made, ids, "graph")
        monkeypatch.setattr(decoding, "write", None)
        written(made, ids, "auto")  # the plain loop


@pytest.mark.parametrize(("options", "taken"), [({}, True), ({"repetition_penalty": 1.2}, False)])
def test_auto_takes_on_a_gpu_what_fits(options, taken):
    run = model()._prepare(tokens(1, 5), None, None, None, None, None, None, {"decoding": "auto"} | options)
    run.ids = SimpleNamespace(device=torch.device("cuda"))
    assert decoding.takes(run) == taken
    assert not decoding.takes(run, drafts=True)


def test_autocast_is_refused():
    made, ids = model(), tokens(1, 5)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match="turn off autocast"):
        written(made, ids, "static")


# What a recording demands


@given(plain_configs, SEEDS, st.integers(1, 4), st.booleans(), st.data())
@settings(max_examples=15)
def test_a_recorded_step_serves_every_text(fields, seed, B, draws, data):
    """One recording serves two prompts that differ in length, padding and end token, without running Python."""
    made = both_models(fields | {"hidden_act": "silu"}, seed)[0].to(DEVICE).double()
    how = {"do_sample": True, "top_k": 4, "top_p": 0.9} if draws else {}
    padded = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "recorded", taped)
        for T in (3, 7):
            ids = torch.randint(0, fields["vocab_size"], (B, T)).to(DEVICE)
            mask = left_padding(ids, *data.draw(st.lists(st.integers(0, T - 1), min_size=B, max_size=B)))
            padded.add(not mask.all())
            end = data.draw(st.integers(0, fields["vocab_size"] - 1))
            options = {"attention_mask": mask, "eos_token_id": end, "max_new_tokens": 20} | how
            plain = written(made, ids, "plain", seed, **options)
            if draws:  # recording itself draws samples: only what follows it is the same
                recorded_text(made, ids, seed, **options)
            assert torch.equal(recorded_text(made, ids, seed, **options), plain)
        assert len(decoding._decoders[made].replays) == len(padded)


@pytest.mark.usefixtures("little_room", "tape")
def test_padding_has_a_recording_of_its_own_and_texts_without_it_no_mask():
    made, ids = model(num_hidden_layers=1), tokens(2, 6)
    for lengths in ((0, 0), (0, 4), (0, 0), (3, 1)):
        options = {"attention_mask": left_padding(ids, *lengths), "max_new_tokens": 8}
        plain = written(made, ids, "plain", **options)
        with mock.patch.object(ops, "decode_attention", wraps=ops.decode_attention) as attend:
            assert torch.equal(written(made, ids, "static", **options), plain)
        assert {call.args[4] is None for call in attend.call_args_list} == {not any(lengths)}
        assert torch.equal(recorded_text(made, ids, **options), plain)
    assert len(decoding._decoders[made].replays) == 2


@pytest.mark.usefixtures("little_room", "tape")
def test_each_way_of_sampling_is_recorded_by_itself_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(decoding, "GRAPHS", 2)
    made, ids = model(), tokens(2, 5)
    ways = [{}, {"do_sample": True, "top_k": 3}, {"do_sample": True, "top_k": 9}]
    for count, way in ((1, {}), *zip((1, 2, 2, 2), (*ways, {}), strict=True)):
        options = {"max_new_tokens": 12} | way  # fills the allocated length
        recorded_text(made, ids, **options)
        assert torch.equal(recorded_text(made, ids, **options), written(made, ids, "plain", **options))
        assert len(decoding._decoders[made].replays) == count


def decoder_of(made, B=2, device=None):
    now = decoding.plan(made)
    return now, decoding.Decoder(now, B, 32, 1)


def chooser(made, **options):
    return decoding.Chooser(run_of(made, tokens(2, 3), "static", **options))


SAMPLERS = {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9,
            "epsilon_cutoff": 1e-4, "remove_invalid_values": True, "renormalize_logits": True}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("B", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, SAMPLERS], ids=["greedy", "all samplers"])
def test_a_step_knows_shapes_and_nothing_else(options, B, backend):
    """On PyTorch's meta device, which has shapes but no data: nothing is read back, nothing comes from the CPU."""
    made = model()
    choose = chooser(made, **options)
    made.set_backend(backend)
    now, decoder = decoder_of(made.to("meta"), B)
    with Tape() as tape:
        decoder.replay(now, choose, record=False)()
    made_here = {x.device.type for _, _, _, out, _ in tape.notes for x in tensors_in(out)}
    assert made_here == {"meta"}
    assert any("llama_triton" in str(op) for op, *_ in tape.notes) == (backend == "triton")


def test_no_layer_copies_what_all_layers_share():
    copies = []
    for layers in (1, 4):
        made = model(num_hidden_layers=layers)
        made.set_backend("triton")
        now, decoder = decoder_of(made.to("meta"), B=3)
        with Tape() as tape:
            decoder.replay(now, lambda logits: logits.argmax(-1), record=False)()
        copies.append(sum(op._schema.name == "aten::clone" for op, *_ in tape.notes))
    assert copies[0] == copies[1]


def test_the_state_stays_where_it_is():
    now, decoder = decoder_of(model())
    addresses = [x.data_ptr() for x in tensors_in(decoder.state)]
    once = decoder.replay(now, chooser(model()), record=False)
    assert once() is once() is None
    assert [x.data_ptr() for x in tensors_in(decoder.state)] == addresses
    assert int(decoder.state.place) == 2


def test_a_step_that_waits_for_the_device_is_found_out():
    made = model()
    now, decoder = decoder_of(made)
    for choose in (
        lambda logits: torch.tensor([int(logits[0].argmax())] * 2),
        lambda logits: logits.softmax(-1).multinomial(1)[:, 0],
        lambda logits: (logits == logits.amax(-1, keepdim=True)).nonzero()[:2, 1],
    ):
        with pytest.raises(AssertionError, match="waits for the device"), Tape():
            decoding.step(now, decoder.state, choose)
    now, decoder = decoder_of(made.to("meta"))
    with pytest.raises(AssertionError, match="goes to another device"), Tape():
        decoding.step(now, decoder.state, lambda logits: torch.zeros(2, dtype=torch.long).to("meta"))


def test_a_step_that_decides_in_python_is_found_out(tape, monkeypatch):
    made, ids, calls = model(), tokens(2, 5), []

    def fickle(self, logits):
        calls.append(1)
        return logits.argmax(-1) if len(calls) < 6 else logits.argmin(-1)

    monkeypatch.setattr(decoding.Chooser, "__call__", fickle)
    stepped = written(made, ids, "static", max_new_tokens=20)
    calls.clear()
    assert not torch.equal(recorded_text(made, ids, max_new_tokens=20), stepped)


def test_a_recording_is_made_outside_of_inference_mode_and_leaves_other_threads_be(monkeypatch):
    """With a stub of CUDA."""
    modes, asked = [], []
    stub = contextlib.nullcontext
    stream = SimpleNamespace(wait_stream=lambda other: None)
    graph = lambda graph, **options: (asked.append(options), modes.append(modes_now()), stub())[-1]  # noqa: E731
    fakes = {"device": stub, "Stream": lambda: stream, "current_stream": lambda: stream, "stream": stub,
             "CUDAGraph": lambda: SimpleNamespace(replay="replay"), "graph": graph}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.random, "fork_rng", stub)
    with torch.inference_mode():
        assert decoding.recorded(lambda: modes.append(modes_now()), torch.device("cuda", 0)) == "replay"
    assert modes == [(False, False)] * 5
    assert asked == [{"capture_error_mode": "thread_local"}]


def modes_now():
    return torch.is_inference_mode_enabled(), torch.is_grad_enabled()


# On the kernels


@pytest.mark.usefixtures("little_room")
def test_products_with_a_weight_of_another_class_are_left_to_it():
    x, weight = torch.ones(1, 1, 8, device=DEVICE), torch.ones(3, 8, device=DEVICE)
    with torch.no_grad(), Tape() as tape:
        ops.gemv(x, [weight], [None], "triton"), ops.gemv_swiglu(x, weight, None, weight, None, "triton")
        assert {op.namespace for op, *_ in tape.notes} >= {"llama_triton"}
        tape.notes.clear()
        packed = weight.as_subclass(Packed)
        ops.gemv(x, [weight, packed], [None] * 2, "triton")
    assert not any(op.namespace == "llama_triton" for op, *_ in tape.notes)


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize(
    ("B", "products"), [(1, {"gemv", "gemv_swiglu"}), (3, {"gemv", "gemv_swiglu"}), (5, {"swiglu"})]
)
def test_on_the_kernels_it_writes_the_same(B, products):
    made, ids = model(num_hidden_layers=1), tokens(B, 6)
    options = {"attention_mask": left_padding(ids, *range(B)), "max_new_tokens": 4}
    plain = written(made, ids, "plain", **options)
    made.set_backend("triton")
    assert torch.equal(written(made, ids, "static", **options), plain)
    (now, decoder), choose = decoder_of(made, B), chooser(made)
    with Tape() as tape:
        decoding.step(now, decoder.state, choose)
    names = [op._schema.name.partition("::")[2] for op, *_ in tape.notes if op.namespace == "llama_triton"]
    assert set(names) == {"rms_norm", "apply_rope_to_cache", "decode_attention", "add_rms_norm"} | products
    assert names.count("rms_norm") == 1


@pytest.mark.usefixtures("little_room", "tape")
def test_the_kernels_can_be_recorded_and_biases_go_with_pytorchs_products():
    made, ids = model(attention_bias=True, num_hidden_layers=1), tokens(2, 6)
    plain = written(made, ids, "plain", max_new_tokens=4)
    made.set_backend("triton")
    assert torch.equal(recorded_text(made, ids, max_new_tokens=4), plain)


# On a GPU


@pytest.mark.needs_gpu
@pytest.mark.parametrize("B", [1, 4, 8])
def test_a_graph_writes_what_the_plain_loop_writes(B):
    made = model(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    ids = tokens(B, 20)
    for options in ({}, {"attention_mask": left_padding(ids, *range(B)), "eos_token_id": 9}):
        plain, graph = (written(made, ids, how, max_new_tokens=256, **options) for how in ("plain", "graph"))
        assert torch.equal(plain, graph)
    assert len(decoding._decoders[made].replays) == (1 if B == 1 else 2)  # left_padding(ids, 0) pads nothing


@pytest.mark.needs_gpu
def test_replays_wait_for_nothing():
    made = model()
    now, decoder = decoder_of(made)
    replay = decoder.replay(now, chooser(made, **SAMPLERS), record=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs_gpu
def test_a_graph_draws_from_the_distribution_of_the_plain_loop():
    """The counts of the second token in 4096 texts match the plain loop's within five standard deviations."""
    made, ids = model(), tokens(1, 6)
    counts = []
    for how in ("plain", "graph"):
        text = written(made, ids, how, do_sample=True, top_k=5, num_return_sequences=4096, max_new_tokens=2)
        counts.append(torch.bincount(text[:, -1], minlength=VOCAB).double())
    assert ((counts[0] - counts[1]).abs() <= 5 * (counts[0] + counts[1]).sqrt() + 5).all()
    again = [written(made, ids, "graph", do_sample=True, max_new_tokens=30) for _ in range(2)]
    assert torch.equal(*again)  # the seed determines the text


@pytest.mark.needs_gpu
def test_in_bfloat16_a_graph_is_the_same_step():
    made, ids = model().bfloat16(), tokens(2, 6)
    assert torch.equal(*(written(made, ids, how, max_new_tokens=50) for how in ("static", "graph")))
