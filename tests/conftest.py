"""Shared by every test: one torch thread per worker, so that two workers use two cores and no more."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
