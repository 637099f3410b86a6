"""The command line as users see it: in a pipe, on a terminal, with wrong input."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from checkpoint_files import FIELDS, random_params, write_chat_model, write_folder

LLAMA = [sys.executable, "-m", "llama"]


def llama(*arguments, **options):
    return subprocess.run([*LLAMA, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("talker") / "talker.gguf")


class Terminal:
    """A program running on its own pseudo-terminal."""

    def __init__(self, *command):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(command[0], command)
        self.seen = ""

    def until(self, pattern, seconds=60, again=""):
        """Read until `pattern` matches and return the output up to its end; type `again` while there is no output."""
        deadline = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.seen!r}"
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            else:
                self.type(again)
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def ends(self):
        try:
            while os.read(self.fd, 65536):
                pass
        except OSError:
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_generate_answers_and_ends_with_its_speed():
    done = llama("generate", "What is the capital of France?")
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tokens/s; prompt of 37 tokens in [\d.]+ s\]\n", done.stderr)


def test_a_prompt_may_come_from_standard_input_and_go_on_as_it_is():
    piped = llama("generate", "--raw", "--max-new-tokens", 5, "-", input="Once upon a time")
    given = llama("generate", "--raw", "--max-new-tokens", 5, "Once upon a time")
    assert piped.stdout == given.stdout
    assert piped.stderr.startswith("[5 tokens, ")
    assert piped.stderr.endswith("; cut at --max-new-tokens]\n")
    asked = llama("generate", "--max-new-tokens", 5, "Once upon a time")
    assert asked.stdout != given.stdout


def test_a_system_message_stands_before_the_prompt(talker):
    plain, told = (
        llama("generate", "-m", talker, "--max-new-tokens", 1, *more, "Hi") for more in ([], ["--system", "Be"])
    )
    tokens = [int(re.search(r"prompt of (\d+) tokens", done.stderr).group(1)) for done in (plain, told)]
    assert tokens[1] - tokens[0] == len("system: Be") + 1  # and the token <|user|>


def test_seeds_repeat_what_was_drawn(talker):
    def draw(seed):
        options = ["--temperature", 1.5, "--top-k", 50, "--max-new-tokens", 20, "--seed", seed]
        return llama("generate", "-m", talker, *options, "Hi").stdout

    assert draw(1) == draw(1) != draw(2)


def test_python_m_llama_and_the_entry_point_are_one():
    entry = subprocess.run([os.path.join(os.path.dirname(sys.executable), "llama"), "--help"], capture_output=True)
    assert entry.stdout.decode() == llama("--help").stdout
    for command in ("fetch", "generate", "chat"):
        assert command in llama("--help").stdout
        assert llama(command, "--help").returncode == 0


def test_chat_keeps_the_conversation_and_leaves_quietly():
    done = llama("chat", input="Remember this number: 7421.\n\nWhich number did I name?\n/exit\nnever read\n")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "7421" in done.stdout.splitlines()[-1]
    done = llama("chat", "--max-new-tokens", 4, input="Hello")  # end of file
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_control_c_stops_the_answer_and_not_the_program(talker):
    terminal = Terminal(*LLAMA, "chat", "-m", str(talker), "--max-new-tokens", "90000")
    terminal.until("> ")
    terminal.type("hello\n")
    terminal.until("hello\r\n.{50}")  # in the middle of an answer that would take minutes
    terminal.type("\x03")
    terminal.until(r" \.\.\.\r\n.*> ")
    terminal.type("\x03")  # at the prompt it only says how to leave
    # A signal between the prompt and the read is only handled at the next key press, so press again.
    terminal.until("/exit or Ctrl-D leaves.*> ", again="\x03")
    terminal.type("again\n")
    terminal.until("again\r\n.{50}")
    terminal.type("\x03")
    terminal.until(r" \.\.\.\r\n.*> ")
    terminal.type("/exit\n")
    assert terminal.ends() == 0


@pytest.mark.parametrize(
    "arguments", [["generate", "-m", "{talker}", "Hi"], ["verify", "{talker}"], ["chat", "-m", "{talker}"]]
)
def test_control_c_ends_a_command_in_a_sentence(talker, arguments):
    stopped = (
        "import llama.checkpoints as c; c.open_checkpoint = stop; import llama.session as s; s.open_checkpoint = stop"
    )
    run = f"def stop(where): raise KeyboardInterrupt\n{stopped}\nfrom llama.cli import main; main()"
    command = [sys.executable, "-c", run, *(argument.format(talker=talker) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nllama: interrupted\n")


def test_bars_show_on_a_terminal_and_not_in_a_pipe(talker, tmp_path):
    terminal = Terminal(*LLAMA, "generate", "-m", str(talker), "--max-new-tokens", "3", "Hi")
    assert "loading" in terminal.until(r"\d+ tokens, .*\]")
    assert terminal.ends() == 0
    assert "loading" not in llama("generate", "-m", talker, "--max-new-tokens", 3, "Hi").stderr


@pytest.fixture
def without_tokenizer(tmp_path):
    return write_folder(tmp_path / "model", random_params())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "-m", "nowhere", "Hi"], 1, "llama: nowhere does not exist; give a folder"),
        (["generate", "-m", "{model}", "Hi"], 1, "tokenizer.json does not exist"),
        (["generate", "-m", "{model}/config.json", "Hi"], 1, "config.json is part of a model; give its folder"),
        (["generate", "--backend", "abacus", "Hi"], 2, "'abacus' is not one of"),
        (["generate"], 2, "Missing argument 'PROMPT'"),
        (["generate", "--raw", ""], 1, "the prompt is empty"),
        (["generate", " "], 1, "the prompt is empty"),
        (["generate", "--raw", "--system", "Be brief.", "Hi"], 2, "--system needs the chat template"),
        (["generate", "--top-p", "0.5", "Hi"], 2, "--top-p needs --temperature above 0"),
        (["generate", "--top-k", "5", "Hi"], 2, "--top-k needs --temperature above 0"),
        (["generate", "--min-p", "0.1", "Hi"], 2, "--min-p needs --temperature above 0"),
        (["generate", "--temperature", "-1", "Hi"], 1, "llama: temperature must be"),
        (["generate", "--temperature", "1e-37", "Hi"], 1, "llama: temperature must be 0 (greedy) or from 1e-6 to 1e6"),
        (["generate", "--temperature", "1", "--seed", "9" * 23, "Hi"], 1, "llama: seed must be None or an integer"),
        (["generate", "--max-new-tokens", "0", "Hi"], 2, "--max-new-tokens"),
        (["generate", "--raw", "a " * 9000], 1, "more than the 8192 this model was made for"),
        (["info", "smolm2"], 1, "llama: smolm2 does not exist; did you mean smollm2?"),
        (["info", "https://hub.co/org/name"], 1, "llama: https://hub.co/org/name is a URL; give org/name"),
        (["info", "~nobody-of-that-name/model"], 1, "llama: ~nobody-of-that-name/model begins with a home folder"),
        (["fetch", "gpt5"], 1, "llama: gpt5 does not exist; give a folder"),
        (["fetch", "org/gpt5"], 1, "llama: org/gpt5 is not a local path, nor is all of it in the cache"),
        (["sing"], 2, "No such command 'sing'"),
    ],
)
def test_wrong_input_gets_a_sentence(without_tokenizer, arguments, code, message):
    done = llama(*(argument.replace("{model}", str(without_tokenizer)) for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_pytorch_says_of_a_full_gpu_becomes_a_sentence(talker):
    full = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to.\\nSee the documents\\nat length')"
    run = f"import llama.session as s\ndef stop(where): {full}\ns.open_checkpoint = stop\n"
    run += "from llama.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", run, "generate", "Hi"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "llama: CUDA out of memory. Tried to.\n")


def test_text_that_is_not_unicode_gets_a_sentence(talker):
    given = subprocess.run([*LLAMA, "generate", "-m", str(talker), b"\xff\xfe"], capture_output=True)
    piped = subprocess.run([*LLAMA, "generate", "-m", str(talker), "-"], input=b"hi\xff", capture_output=True)
    for done in (given, piped):
        assert done.returncode == 1
        assert re.search(rb"not valid Unicode|can't decode byte 0xff", done.stderr)
        assert b"Traceback" not in done.stderr


def test_closed_streams_are_no_trouble(talker):
    short = f"{sys.executable} -m llama generate -m {talker} --max-new-tokens 2"
    for command in (f"{short} hi >&-", f"{short} hi 2>&-", f"{sys.executable} -m llama chat -m {talker} <&-"):
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (done.returncode, "Traceback" in done.stderr) == (0, False), command
    done = subprocess.run(f"{short} - <&-", shell=True, capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"llama: the prompt is empty; give at least one word\n")


def test_a_conversation_goes_on_after_a_line_that_is_too_long(talker):
    long = "a" * 100_001
    done = llama("chat", "-m", talker, "--max-new-tokens", 3, input=f"{long}\nhello\n")
    assert done.returncode == 1  # because one line was not answered
    assert re.fullmatch(r"llama: the text has \d+ tokens, more than the 100000 this model was made for\n", done.stderr)
    assert done.stdout.strip()


def test_a_model_without_a_chat_template_cannot_chat(tmp_path, smollm2):
    folder = write_folder(
        tmp_path / "model", random_params(FIELDS | {"vocab_size": 49152}), FIELDS | {"vocab_size": 49152}
    )
    (folder / "tokenizer.json").write_bytes((smollm2 / "tokenizer.json").read_bytes())
    done = llama("chat", "-m", folder, input="hi\n")
    assert done.returncode == 2
    assert "has no chat template; use llama generate" in done.stderr
    assert llama("generate", "-m", folder, "--max-new-tokens", 3, "hi").returncode == 0
    done = llama("generate", "-m", folder, "--system", "Be brief.", "hi")
    assert done.returncode == 2
    assert "--system needs a chat template, and this model has none" in done.stderr
