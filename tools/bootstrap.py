"""Make the environment .venv: the project, its test tools and a PyTorch that fits this machine. Standard library only.

TORCH chooses the build: a torch that is installed already is kept; else `cuda` where an NVIDIA driver is present and
`cpu` elsewhere. TORCH=cpu, TORCH=cuda and TORCH=none say otherwise (the NumPy reference needs none).
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
CUDA_SIZE = "The CUDA build of PyTorch is about 3 GB to download."


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (whatever python3 is runs this)
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12")
    choice = os.environ.get("TORCH", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"TORCH={choice} is unknown; say cpu, cuda, none or auto")

    if not has_pip():
        say(f"Making the environment {VENV}")
        # A torch in the Python that environments are made of can be seen from inside them: no need for another.
        outside = choice == "auto" and has_torch(getattr(sys, "_base_executable", sys.executable))
        shutil.rmtree(VENV, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", *["--system-site-packages"] * outside, VENV])
        if made.returncode or not has_pip():
            sys.exit("python3 could not make an environment; on Debian: apt-get install python3-venv")

    constraints = Path("constraints.txt")
    if choice == "none":
        extras = ""
    elif choice == "auto" and has_torch(PYTHON):
        say("Keeping the PyTorch that is installed")
        lines = constraints.read_text().splitlines()  # its own triton goes with it
        constraints = VENV / "constraints.txt"
        constraints.write_text("\n".join(line for line in lines if not line.startswith(("torch=", "triton="))) + "\n")
        extras = "[torch,dev]"
    else:
        install_torch("cuda" if choice == "cuda" or (choice == "auto" and has_nvidia()) else "cpu")
        extras = "[torch,dev]"
    say("Installing the project" + (" and its tools, transformers and triton among them" if extras else " alone"))
    if not pip("-c", constraints, "-e", f".{extras}"):
        sys.exit("pip could not install the project; what it said stands above")
    (VENV / f".ready-{choice}").touch()


def install_torch(build: str) -> None:
    version = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch="))
    if build == "cpu":
        say("Installing PyTorch, CPU build (about 200 MB)")
        # Of all places that pip is told to look at, only one that offers the CPU build has this version.
        if pip(f"{version}+cpu", "--quiet") or (sys.platform != "linux" and pip(version)):
            return
        say(f"pip finds no CPU build. Trying the one for CUDA, which works here too. {CUDA_SIZE}")
        say("Ctrl-C stops. PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU builds (pytorch.org, Get Started, CPU).")
        say("TORCH=none leaves PyTorch out; the reference does not need it.")
    else:
        say(f"Installing PyTorch, CUDA build. {CUDA_SIZE}")
        say("Ctrl-C stops. TORCH=cpu takes the CPU build (about 200 MB), TORCH=none leaves PyTorch out.")
        if has_torch(PYTHON) and not has_torch(PYTHON, "torch.version.cuda"):
            subprocess.run([PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"])
    if sys.stdin.isatty():
        time.sleep(10)  # time to read that and to stop
    if not pip(version):
        sys.exit("pip could not install PyTorch; what it said stands above")
    if build == "cuda" and not has_torch(PYTHON, "torch.version.cuda"):
        sys.exit("pip took a build without CUDA, which one of its settings names (pip config list); TORCH=cpu keeps it")


def pip(*arguments: object) -> bool:
    command = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", *map(str, arguments)]
    command += ["--quiet"] * (not sys.stdout.isatty())
    return subprocess.run(command).returncode == 0


def has_pip() -> bool:
    return PYTHON.exists() and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0


def has_torch(python: object, and_then: str = "True") -> bool:
    code = f"import torch; raise SystemExit(not ({and_then}))"
    return subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def say(what: str) -> None:
    print(f"==> {what}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from here.")
