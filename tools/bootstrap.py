"""Create the environment .venv: the project, its test tools and a suitable PyTorch. Uses only the standard library.

An installed torch is kept. Otherwise the CUDA build is installed if there is an NVIDIA driver, else the CPU build.
TORCH=cpu, TORCH=cuda and TORCH=none override this (the NumPy reference needs no torch).
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
    if sys.version_info < (3, 11):  # noqa: UP036  (any python3 may run this)
        sys.exit(f"Python 3.11 or newer is required; this is {sys.version.split()[0]}; try make PYTHON=python3.12")
    choice = os.environ.get("TORCH", "auto")
    if choice not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"TORCH={choice} is unknown; choose cpu, cuda, none or auto")

    if not has_pip():
        say(f"Creating the environment {VENV}")
        # Reuse a torch that is installed in the base interpreter.
        outside = choice == "auto" and has_torch(getattr(sys, "_base_executable", sys.executable))
        shutil.rmtree(VENV, ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", *["--system-site-packages"] * outside, VENV])
        if made.returncode or not has_pip():
            sys.exit("python3 could not create an environment; on Debian, run: apt-get install python3-venv")

    constraints = Path("constraints.txt")
    if choice == "none":
        extras = ""
    elif choice == "auto" and has_torch(PYTHON):
        say("Keeping the PyTorch that is installed")
        lines = constraints.read_text().splitlines()  # it brought its own triton
        constraints = VENV / "constraints.txt"
        constraints.write_text("\n".join(line for line in lines if not line.startswith(("torch=", "triton="))) + "\n")
        extras = "[torch,dev]"
    else:
        install_torch("cuda" if choice == "cuda" or (choice == "auto" and has_nvidia()) else "cpu")
        extras = "[torch,dev]"
    say("Installing the project" + (" and its tools, including transformers and triton" if extras else " only"))
    if not pip("-c", constraints, "-e", f".{extras}"):
        sys.exit("pip could not install the project; see its output above")
    (VENV / f".ready-{choice}").touch()


def install_torch(build: str) -> None:
    version = next(line for line in Path("constraints.txt").read_text().splitlines() if line.startswith("torch="))
    if build == "cpu":
        say("Installing PyTorch, CPU build (about 200 MB)")
        # Only an index that offers CPU builds has a version with this suffix.
        if pip(f"{version}+cpu", "--quiet") or (sys.platform != "linux" and pip(version)):
            return
        say(f"pip found no CPU build. Trying the CUDA build, which works here too. {CUDA_SIZE}")
        say("Press Ctrl-C to stop. For the CPU build, set PIP_EXTRA_INDEX_URL to its index (pytorch.org, Get Started).")
        say("TORCH=none skips PyTorch, which the reference does not need.")
    else:
        say(f"Installing PyTorch, CUDA build. {CUDA_SIZE}")
        say("Press Ctrl-C to stop. TORCH=cpu installs the CPU build (about 200 MB), TORCH=none skips PyTorch.")
        if has_torch(PYTHON) and not has_torch(PYTHON, "torch.version.cuda"):
            subprocess.run([PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "torch"])
    if sys.stdin.isatty():
        time.sleep(10)  # time to read this and stop
    if not pip(version):
        sys.exit("pip could not install PyTorch; see its output above")
    if build == "cuda" and not has_torch(PYTHON, "torch.version.cuda"):
        sys.exit("pip installed a build without CUDA, as configured (see: pip config list); TORCH=cpu keeps it")


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
        sys.exit("Stopped; run the same command to continue.")
