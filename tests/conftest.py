"""Settings for all tests: CPU, offline, no window."""
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state, whichever tests ran before it."
    if "torch" in sys.modules: sys.modules["torch"].manual_seed(0)
