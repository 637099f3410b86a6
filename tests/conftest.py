import os
import signal
import sys

GPU = "--gpu" in sys.argv  # run kernels on the GPU; otherwise in Triton's interpreter, selected before any import
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # with matrices this small, threads only add contention
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle reads local files only
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit an ignored SIGINT

from pathlib import Path  # noqa: E402

import jaxtyping  # noqa: E402

# Enforce the shapes in the reference's annotations on every call in every test. `Config` is excluded: it validates
# itself, and its own errors are tested.
modules = {path.stem for path in (Path(__file__).parent.parent / "reference").glob("*.py")} - {"__init__", "config"}
jaxtyping.install_import_hook(
    [f"llama.reference.{name}" for name in modules],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",  # accept an int where a float is annotated
)

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # it warns about every generated configuration


FIRST = ("test_static", "test_packaging")  # the slowest files: parallel runs start with them


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="run the kernels natively, on the GPU of this machine")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in FIRST)
    for item in items:
        if "needs_gpu" in item.keywords and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: pytest --gpu"))


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, downloaded once."""
    from llama.checkpoints import fetch

    return fetch("smollm2")
