"""`llama verify` passes a correct backend and fails a wrong one."""

import subprocess
import sys

import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_chat_model, write_folder

from llama import ops
from llama.checkpoints import open_checkpoint
from llama.verify import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    params = {name: array / 8 if array.ndim == 2 else array for name, array in random_params().items()}
    return write_folder(tmp_path_factory.mktemp("verify") / "model", params)


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "llama", "verify", *arguments], capture_output=True, text=True)


def test_a_right_backend_passes_in_every_dtype(folder):
    for dtype in ("auto", "float16", "bfloat16"):
        report = verify(open_checkpoint(folder), dtype=dtype)
        assert report.passed
        assert report.relative.shape == (2, FIELDS["num_hidden_layers"] + 2)
        assert (report.largest[:, 1:] > 0).all()  # two different computations were compared


def test_the_command_shows_every_layer_and_exits_0(folder):
    done = run(str(folder))
    assert done.returncode == 0, done.stderr
    for name in ("embedding", "layer 0", "norm", "logits"):
        assert f"\n{name} " in done.stdout
    assert "next token, prompt at once: 72 of 72 agree\n" in done.stdout
    assert "next token, token by token: 72 of 72 agree\n" in done.stdout
    assert done.stdout.endswith("within the budget of 0.0001, relative, for float32\n")


def test_a_wrong_layer_is_found_where_it_is(folder, monkeypatch):
    right, calls = ops.rms_norm, []

    def wrong(*args):
        calls.append(0)
        return right(*args) * (1.01 if len(calls) % 5 == 3 else 1)  # of five calls, the second layer's first

    monkeypatch.setattr(ops, "rms_norm", wrong)
    report = verify(open_checkpoint(folder), prompts=("one",))
    assert not report.passed
    assert report.relative[0, :2].max() < 1e-5  # the inputs of the two layers
    assert report.relative[0, 2] > 1e-4
    assert "BEYOND the budget" in list(report.lines())[-1]


def test_a_wrong_step_is_found_though_the_prompt_is_right(folder, monkeypatch):
    right = ops.attention

    def wrong(q, *rest):
        return right(q, *rest) * (1.001 if q.shape[2] == 1 else 1)

    monkeypatch.setattr(ops, "attention", wrong)
    report = verify(open_checkpoint(folder))
    assert report.relative[0].max() < 1e-5
    assert report.relative[1].max() > 1e-4
    assert not report.passed


def test_a_token_that_differs_by_more_than_rounding_fails(folder, monkeypatch):
    report = verify(open_checkpoint(folder))
    report.agree[1] -= 1
    assert not report.passed
    report.near_ties[1] += 1
    assert report.passed
    assert "71 of 72 agree, 1 nearly tie" in "\n".join(report.lines())


def test_nan_does_not_pass(folder, monkeypatch):
    monkeypatch.setattr(ops, "swiglu", lambda gate, *_: gate * torch.nan)
    assert not verify(open_checkpoint(folder)).passed


def test_texts_are_the_users_own(tmp_path):
    model = write_chat_model(tmp_path / "talker.gguf")
    done = run(str(model), "--prompt", "Hello", "--prompt", "Hi")
    assert done.returncode == 0, done.stderr
    assert ": 7 of 7 agree" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{talker}", "--prompt", ""], "a prompt is empty"),
    ],
)
def test_wrong_input_gets_a_sentence(tmp_path, arguments, message):
    talker = write_chat_model(tmp_path / "talker.gguf")
    done = run(*(argument.replace("{talker}", str(talker)) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_angles_that_follow_the_length_are_read_at_once(tmp_path):
    fields = FIELDS | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}
    folder = write_folder(tmp_path / "model", random_params(fields), fields)
    assert verify(open_checkpoint(folder)).passed
