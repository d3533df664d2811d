"""What the suite shares: the threads that play ranks."""

from collections.abc import Iterator

import pytest
import torch
from simulated import Ranks


@pytest.fixture(scope="package")
def ranks() -> Iterator[Ranks]:
    """Threads, reused from case to case. Tensors are small: torch's own threads would only be in their way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Ranks()
    torch.set_num_threads(threads)
