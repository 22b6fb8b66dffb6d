"""Settings for every test: few threads, no network, the same random numbers each time."""

import os

# Before torch and huggingface_hub are imported, which read these once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(min(2, os.cpu_count() or 1))

settings.register_profile("mars", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mars")


@pytest.fixture(autouse=True)
def seed_every_generator() -> None:
    """Start each test from the same state of the global generators, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator of libraries that use the old interface
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
