"""Fixtures of the whole suite."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def ground_one_thread():
    """Small tensors gain nothing from threads, and on a shared machine lose several times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
