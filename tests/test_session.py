"""Sessions: a prefix shared with the previous text is not read again, and only a true prefix is reused."""

import json

import pytest
from checkpoint_files import FIELDS, random_params, write_chat_model, write_folder

from llama.checkpoints import open_checkpoint
from llama.reference import Sampler
from llama.session import BACKENDS, ReferenceEngine, Session, TorchEngine, engine

ONE, TWO = list(range(40, 60)), [*range(40, 50), *range(90, 100)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("session") / "talker.gguf")


@pytest.fixture(params=["reference", "torch"])
def open_session(request):
    """A function that opens a session, for each backend."""
    return lambda model, **sampling: Session(str(model), request.param, 6, Sampler(**sampling))


def test_what_two_texts_share_is_read_once(model, open_session):
    session = open_session(model)
    first = "".join(session.answer(ONE))
    assert session.tokens_read == 20
    assert "".join(session.answer(ONE)) == first  # all cached: only its last token is read
    assert session.tokens_read == 1
    other = "".join(session.answer(TWO))
    assert session.tokens_read == 10
    assert other == "".join(open_session(model).answer(TWO))
    longer = [*session.ids, 7, 8]
    again = "".join(session.answer(longer))
    assert session.tokens_read == 3  # the last generated token, which was never read, and two new ones
    assert again == "".join(open_session(model).answer(longer))


def test_an_answer_that_is_stopped_leaves_a_conversation_to_go_on_with(model, open_session):
    session = open_session(model)
    answer = session.answer(ONE)
    next(answer)
    answer.close()
    assert "".join(session.answer(TWO)) == "".join(open_session(model).answer(TWO))


def test_the_sampler_is_used_and_reported_on(model, open_session):
    greedy, drawn = open_session(model), open_session(model, temperature=2.0, seed=1)
    assert "".join(greedy.answer(ONE)) != "".join(drawn.answer(ONE))
    assert drawn.tokens_written == 6
    assert drawn.report().startswith("[6 tokens, ")
    assert drawn.report().endswith("; cut at --max-new-tokens]")


def folder_model(tmp_path, smollm2, generation_config=None, **fields):
    fields = FIELDS | {"vocab_size": 49152} | fields
    folder = write_folder(tmp_path / "model", random_params(fields), fields)
    (folder / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder


def test_generation_config_says_where_to_end(tmp_path, smollm2, open_session):
    folder = folder_model(tmp_path, smollm2, {"eos_token_id": [3, 4]}, eos_token_id=5)
    assert open_checkpoint(folder).generation_config == {"eos_token_id": [3, 4]}
    assert open_session(folder).eos_token_id == [3, 4]
    (folder / "generation_config.json").unlink()
    session = open_session(folder)
    assert session.eos_token_id == 5
    "".join(session.answer(ONE))
    session.eos_token_id = session.ids[len(ONE)]  # the first generated token
    "".join(session.answer(ONE))
    assert session.tokens_written == 1
    assert "cut" not in session.report()


def test_a_text_may_fill_the_context_and_not_more(tmp_path, smollm2, open_session):
    session = open_session(folder_model(tmp_path, smollm2))
    "".join(session.answer([1] * 30))
    assert session.tokens_written == 3  # the last one is never read, so it may lie beyond the 32
    assert session.report().endswith("; cut at the end of the model's context]")
    with pytest.raises(ValueError, match="33 tokens, more than the 32 this model was made for"):
        next(session.answer([1] * 33))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(session.answer([]))


def test_a_tokenizer_of_another_model_is_named(tmp_path, smollm2, open_session):
    session = open_session(folder_model(tmp_path, smollm2, vocab_size=12))
    with pytest.raises(ValueError, match="the tokenizer gives 99, but the model only knows ids below 12"):
        next(session.answer([1, 99]))


def test_scaled_angles_reach_beyond_the_context(tmp_path, smollm2, open_session):
    scaling = {"type": "linear", "factor": 8.0}
    session = open_session(folder_model(tmp_path, smollm2, rope_scaling=scaling))
    "".join(session.answer([1] * 40))
    assert session.tokens_written == 6


def test_angles_that_follow_the_length_are_made_anew_for_every_text(tmp_path, smollm2, open_session):
    folder = folder_model(tmp_path, smollm2, rope_scaling={"type": "dynamic", "factor": 2.0})
    session = open_session(folder)
    "".join(session.answer(ONE))
    longer = ONE * 3  # past the 32 positions the model was trained for
    assert "".join(session.answer(longer)) == "".join(open_session(folder).answer(longer))
    assert session.tokens_read == len(longer)


def test_auto_is_torch_where_it_is_installed(model, monkeypatch):
    checkpoint = open_checkpoint(model)
    assert type(engine(checkpoint, "auto", Sampler())) is TorchEngine
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(engine(checkpoint, "auto", Sampler())) is ReferenceEngine
    with pytest.raises(ValueError, match=r"needs PyTorch: pip install .*, or --backend reference"):
        engine(checkpoint, "torch", Sampler())
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, reference, got 'abacus'"):
        engine(checkpoint, "abacus", Sampler())


def test_backends_say_the_same(model):
    texts = ["".join(Session(str(model), backend, 20, Sampler()).answer(ONE)) for backend in BACKENDS]
    assert len(set(texts)) == 1


def test_a_pass_that_is_stopped_between_two_layers_is_read_again(model):
    def session():
        return Session(str(model), "torch", 6, Sampler())

    stopped, whole = session(), session()
    "".join(stopped.answer(ONE))
    for layers in (1, 0):  # with a filled cache, then with an empty one
        engine = stopped.engine
        hook = engine.model.model.layers[layers].register_forward_pre_hook(lambda *_: 1 / 0)
        if not layers:
            engine.crop(0)
        with pytest.raises(ZeroDivisionError):
            "".join(stopped.answer(TWO))
        hook.remove()
        assert "".join(stopped.answer(TWO)) == "".join(whole.answer(TWO))
