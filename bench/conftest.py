"""Benchmarks run one at a time: a second process on the same GPU would be in every figure."""

from collections.abc import Callable

import pytest
from _machine import describe_machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also every shape of the recorded sweep, not the table alone")


def pytest_configure(config: pytest.Config) -> None:
    # In tests a warning is an error; here it may be the compiler's, about what it is compared with.
    config.addinivalue_line("filterwarnings", "default")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
        config.option.tx = []
        config.option.dist = "no"


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Prints a line past pytest's capture, as soon as it is known; first of a file, what machine this is."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def write(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(line, flush=True)

    write(f"\n{describe_machine()}")
    return write
