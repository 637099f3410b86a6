import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices: threads only get in each other's way
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # the oracle reads local files only

import jaxtyping

# Shapes in the reference's annotations are executed: every call in every test checks them.
jaxtyping.install_import_hook(
    "llama.reference", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"  # an int is a float
)

import pytest
import torch
import transformers
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("default")
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()  # it remarks on every drawn configuration


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, fetched once."""
    from llama.checkpoints import fetch

    return fetch("smollm2")
