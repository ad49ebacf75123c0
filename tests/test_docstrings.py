"""Every public function and class says what it does."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = (".", "experiments", "miniature", "official")
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")]


@pytest.mark.parametrize("file", FILES, ids=str)
def test_public_names_have_docstrings(file: Path):
    """Those of the module; a method may be plain from its name and class."""
    module = ast.parse((ROOT / file).read_text("utf-8"))
    defined = [node for node in module.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    public = [node for node in defined if not node.name.startswith("_")]
    assert ast.get_docstring(module)
    assert [node.name for node in public if not ast.get_docstring(node)] == []
