"""How much the suites run: `pytest --full` goes through many times the cases of `make test`."""

import os
import signal
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


def pytest_configure() -> None:
    """Commands that tests interrupt inherit this: a shell that starts the tests behind itself lets them ignore it.

    Beside another process of tests, torch's own threads would only be in the way.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: two processes, for most tests use one processor each; one where they would share a GPU."""
    return 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
