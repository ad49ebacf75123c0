"""Shared by all tests: the modules of the repository's root, where the golden vectors lie, a small
model, and what a refusal looks like."""

import shutil
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
def small(tmp_path_factory) -> Path:
    """A weights directory whose model loads and answers in milliseconds; to be left as it is."""
    from damaged import write_weights  # not before somebody needs it

    folder = tmp_path_factory.mktemp("small")
    write_weights(folder)
    return folder


@pytest.fixture
def weights(small, tmp_path) -> Path:
    """A copy of it to be damaged."""
    return shutil.copytree(small, tmp_path / "weights")


@pytest.fixture
def drawing(tmp_path) -> Path:
    from damaged import picture

    picture().save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.fixture
def refusal(capsys):
    """Runs a command line that has to refuse what it is given; returns its one line."""

    def run(main, *arguments, code=2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and err.strip().isprintable() and "Traceback" not in err, err
        assert out == ""
        return err

    return run


@pytest.fixture(scope="session")
def miniature():
    """The shipped miniature. Its weights are nobody's to change."""
    from model import TinyGPTV

    return TinyGPTV.from_pretrained(TESTS.parent / "miniature" / "weights")
