"""Benchmarks run one at a time: a second process on the same GPU would be in every figure."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sweep", action="store_true", help="also every shape of the recorded sweep, not the table alone")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0
        config.option.tx = []
        config.option.dist = "no"
