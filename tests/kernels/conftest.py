"""Where the kernels run: by Triton's interpreter on the CPU, and on a GPU where there is one."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(
    scope="module", params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("triton", reason="no Triton on this machine")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton interprets all or nothing, and here it compiles for the GPU")
    return request.param


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """What `torch.empty` gives is full of NaN, so that a result nobody wrote, or a part nobody wrote, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which is when torch fills it
    assert torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
