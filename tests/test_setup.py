"""The Makefile and the set-up script, tested without installing anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose environment is ready and whose `llama` prints its arguments, one per line."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "llama"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('\\n'.join(sys.argv[1:]))\n")
    program.chmod(0o755)
    for stamp in ("auto", "none"):
        (tmp_path / ".venv" / f".ready-{stamp}").touch()
    return tmp_path


def make(checkout, *arguments, **variables):
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=checkout, env=kept | variables, capture_output=True, text=True)


PROMPTS = [
    "quotes \"and\" 'such' `x`",
    "$HOME $(id) $$ $5 ${x",
    "$(shell touch made)",
    "; touch made #",
    "--help",
    "ünï 🦙",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_arrives_as_typed(checkout, prompt):
    expected = f"generate\n--backend\nauto\n--\n{prompt}\n"
    assert make(checkout, "run", f"PROMPT={prompt}").stdout == expected
    assert make(checkout, "run", PROMPT=prompt).stdout == expected
    assert make(checkout, "run", f"BACKEND={prompt}").stdout.splitlines()[2] == prompt
    assert not (checkout / "made").exists()


def test_without_a_prompt_it_asks_for_a_capital(checkout):
    assert make(checkout, "run", "BACKEND=reference").stdout.splitlines() == [
        "generate", "--backend", "reference", "--", "What is the capital of France?",
    ]  # fmt: skip


def test_wrong_set_up_gets_a_sentence(checkout):
    for arguments, message in (
        (["run", "TORCH=rocm"], "TORCH=rocm is unknown; choose cpu, cuda, none or auto"),
        (["run", "TORCH=cpu", "PYTHON=python9"], "python9 was not found; choose another with make PYTHON=..."),
        (["test", "TORCH=none"], "TORCH=none omits the test tools"),
    ):
        done = make(checkout, *arguments)
        assert done.returncode == 2
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
