"""Shared by all tests: the modules of the repository's root, and where the golden vectors lie."""

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS.parent))


def pytest_addoption(parser):
    parser.addoption(
        "--golden", type=Path, default=TESTS / "golden", metavar="DIR",
        help="directory with golden vectors for test_golden.py (default: tests/golden)",
    )  # fmt: skip


@pytest.fixture(scope="session")
def golden(pytestconfig):
    return pytestconfig.getoption("golden")


@pytest.fixture(scope="session")
def miniature():
    """The shipped miniature. Its weights are nobody's to change."""
    from model import TinyGPTV

    return TinyGPTV.from_pretrained(TESTS.parent / "miniature" / "weights")
