"""One thread per process, no network, and the same random numbers for every test."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which asks when it makes a kernel


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--laws",
        choices=("cover", "all"),
        default="cover",
        help="the cases of the laws: a selection in which every pair of presets, kinds and dtypes occurs, or all",
    )
    parser.addoption("--kills", type=int, default=12, help="how often the runs of test_kills are killed in all")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that none of them is left alone on one core at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.default_generator.manual_seed(0)  # the CPU's alone: for all devices it costs more than many a test
