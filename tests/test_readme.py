"""README.md keeps its word: files, commands and numbers are there and are these."""

import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from experiments import benchmarks, readme
from experiments.command_line import key_values
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^python (\S+\.py)(.*)$", TEXT, re.MULTILINE)
IN_SENTENCES = re.findall(r"`python (\S+\.py)([^`]*)`", TEXT)


def between(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", TEXT, re.DOTALL)[1]


def test_files_that_the_readme_names_exist():
    named = re.findall(r"`([\w/]+(?:\.py|\.txt|/))`", TEXT)
    named += re.findall(r"\]\((assets/\S+)\)", TEXT)
    runs = [name for name in named if not (ROOT / name).exists()]
    assert len(named) > 10 and runs == []
    assert all((ROOT / script).exists() for script, _ in COMMANDS)


def test_tables_are_what_the_results_say():
    assert between("stages") == readme.stage_table() + "\n\n" + readme.score_table()
    assert between("size") == readme.size_table()
    assert between("speed") == readme.speed_table() + "\n\n" + readme.memory_table()
    assert between("attention") == readme.attention_table()
    assert between("agreement") == readme.agreement()
    assert between("training") == readme.training_table()
    assert between("efficiency") == readme.efficiency_table()
    assert between("ablation") == readme.ablation_section()
    assert between("shapes") == readme.shape_table()


@pytest.mark.parametrize("script, arguments", COMMANDS + IN_SENTENCES)
def test_options_in_commands_exist(script: str, arguments: str):
    source = (ROOT / script).read_text("utf-8")
    given = arguments.split("#")[0].split()
    if pairs := [argument for argument in given if "=" in argument]:
        module = import_module(script.removesuffix(".py").replace("/", "."))
        config = getattr(module, "Config", TrainConfig)
        assert key_values(pairs, benchmarks.Config if "bench=gqa" in pairs else config)
    for option in (argument for argument in given if argument.startswith("--")):
        name = option.removeprefix("--")  # generate.py adds some by a table of names
        assert f'"{option}"' in source or f'"{name}":' in source


def test_line_counts_are_right():
    lines = len((ROOT / "vision.py").read_text("utf-8").splitlines())
    assert TEXT == readme.with_line_counts(TEXT) and f"| `vision.py` | {lines} |" in TEXT


def test_code_that_the_readme_names_exists():
    for module, name in re.findall(r"`(vision|bridge|lora|quantize|model|data|generate|train)"
                                   r"\.((?!py|safetensors)[\w.]+)`", TEXT):  # fmt: skip
        assert attrgetter(name)(import_module(module)), name


def test_the_first_command_describes_the_picture():
    assert between("describe") == readme.described()


@pytest.mark.parametrize("arguments", [a for script, a in COMMANDS if script == "generate.py"])
def test_generate_commands_run(arguments: str, tmp_path: Path):
    if "--weights" in arguments:
        pytest.skip("asks weights that the reader trains or downloads")
    typed = "what color is the star?\n"  # read by --chat alone
    command = f"{sys.executable} {ROOT / 'generate.py'} {arguments}"
    command = command.replace("assets/", f"{ROOT}/assets/")
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                          input=typed)  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert ("out.png" in arguments) == (tmp_path / "out.png").exists()


def test_python_in_the_readme_runs(monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec("\n".join(blocks), {})
    assert len(blocks) == 2 and capsys.readouterr().out == "red\nred\n"
