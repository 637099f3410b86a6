"""The README keeps its word."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, ["The capital of France is Paris"]),
        (1, ["system\n", "Où est la gare? 🚉"]),
        (2, ["LlamaForCausalLM, backend='auto'", "LlamaRMSNorm", "61  rms_norm", "30  swiglu"]),
        (3, ["[' Paris'", "The capital of France is Paris"]),
    ],
)
def test_its_code_runs(tmp_path, place, words):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[place]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(words[0])
    assert all(word in done.stdout for word in words), done.stdout
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_its_commands_exist():
    for command in re.findall(r"^    llama (\w+)", README, re.MULTILINE):
        assert subprocess.run([sys.executable, "-m", "llama", command, "--help"], capture_output=True).returncode == 0
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE)) <= set(targets)


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_figures_are_those_of_the_committed_run():
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["rows"]
    best = {row["what"]: row["best"] for row in rows if row.get("threads") == 1}
    for label, what, digits in (("decode, tokens/s", "decode", 1), ("prefill of 512 tokens, s", "prefill 512", 2)):
        ours, theirs = (f"{best[what][name]:.{digits}f}" for name in ("reference", "transformers"))
        assert f"| {label} | {ours} | {theirs} |" in README


def test_the_models_figures_are_those_of_the_committed_run():
    rows = json.loads((ROOT / "benchmarks/results/model.json").read_text())["rows"]
    rows = [row for row in rows if row.get("dtype", "float32") == "float32" and row.get("threads", 1) == 1]
    found = {row["what"]: row for row in rows}
    for label, what, digits in (
        ("decode, tokens/s", "decode", 1),
        ("prefill of 512 tokens, s", "prefill 512", 2),
        ("loading, s", "load", 3),
        ("peak memory, MB", "peak memory", 0),
    ):
        ours, theirs = (f"{found[what]['best'][name]:.{digits}f}" for name in ("llama", "transformers"))
        assert f"| {label} | {ours} | {theirs} |" in README
    ours, theirs = (f"{found['decode']['of_floor'][name]:.2f}" for name in ("llama", "transformers"))
    assert f"Decode reaches {ours} of what the memory allows, transformers {theirs}." in README
