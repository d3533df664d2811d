"""How much the suites run: `pytest --full` goes through many times the cases of `make test`."""

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, by whichever test that does so first

Budget = Callable[[int, int], int]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="the long suites: 20 000 random cases instead of 500, and so on"
    )


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> Budget:
    """`budget(default, full)`: how many cases to run. While tests are collected, ask
    `metafunc.config.getoption("--full")` in `pytest_generate_tests` instead.
    """
    return lambda default, full: full if request.config.getoption("--full") else default
