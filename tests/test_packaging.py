"""What pip users get: a wheel built from the sdist that runs the reference when installed alone, without torch."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from checkpoint_files import random_params, write_folder

ROOT = Path(__file__).parent.parent

PROBE = """
import importlib.util, sys
import numpy as np
from llama import LlamaTokenizerFast, reference
params, config = reference.load(sys.argv[1])
ids = reference.generate(params, config, np.array([[1, 2, 3]]), 5)
assert ids.shape == (1, 8), ids.shape
assert importlib.util.find_spec("torch") is None, "torch came along"
import llama
print(llama.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the wheel and the sdist, built from a copy because building leaves files behind."""
    out, copy = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("copy") / "llama"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_one_package_whole(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"llama"}
    expected = {"llama/py.typed", "llama/checkpoints/gguf.py"}
    expected |= {f"llama/reference/{path.name}" for path in (ROOT / "reference").glob("*.py")}
    for folder in ("kernels", "benchmarks"):
        expected |= {f"llama/{folder}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert expected <= set(names)
    assert not any(name.startswith("llama/benchmarks/results") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_can_build_again(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "llama/reference/model.py", "llama/py.typed"} <= names


def test_installed_alone_it_runs_the_reference(built, tmp_path):
    model = write_folder(tmp_path / "model", random_params())
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", next(built.glob("*.whl"))]
    done = subprocess.run(install, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    (tmp_path / "empty").mkdir()
    done = subprocess.run([python, "-c", PROBE, model], cwd=tmp_path / "empty", capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "venv")
    helped = subprocess.run([tmp_path / "venv" / "bin" / "llama", "--help"], capture_output=True, text=True, env=env)
    assert helped.returncode == 0
