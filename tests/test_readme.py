"""README.md and experiments/README.md keep their word: files, options, numbers are as they say."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

from data import EXAMPLES, validate_record
from experiments import benchmarks, readme, training_memory
from experiments.command_line import key_values
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")
COMMANDS = re.findall(r"^python (\S+\.py)(.*)$", TEXT, re.MULTILINE)
IN_SENTENCES = re.findall(r"`python (\S+\.py)([^`]*)`", TEXT)
EXPERIMENTS = (ROOT / "experiments" / "README.md").read_text("utf-8")
ELSEWHERE = {"--help", "--nnodes", "--nproc-per-node", "--rdzv-endpoint",  # argparse's, torchrun's
             "key", "part", "pack"}  # key=value, pretrain.py's, from_pretrained's  # fmt: skip


def in_table(text: str) -> list[tuple[str, str]]:
    """Scripts and arguments; "..." stands for the script of the row above."""
    found, script = [], ""
    for command in re.findall(r"`(python \S+\.py[^`]*|\.\.\. [^`]*)`", text):
        name, _, arguments = command.removeprefix("python ").partition(" ")
        script = script if name == "..." else name
        found.append((script, arguments))
    return found


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def between(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", TEXT, re.DOTALL)[1]


def test_files_that_the_readme_names_exist():
    named = re.findall(r"`([\w/]+(?:\.py|\.txt|/))`", TEXT)
    named += re.findall(r"\]\((assets/\S+)\)", TEXT)
    missing = [name for name in named  # in the table of folders without the folder
               if not (ROOT / name).exists() and not any(ROOT.glob(f"*/{name}"))]  # fmt: skip
    assert len(named) > 10 and missing == []
    assert all((ROOT / script).exists() for script, _ in COMMANDS)


def test_tables_are_what_the_results_say():
    assert between("stages") == readme.stage_table() + "\n\n" + readme.score_table()
    assert between("size") == readme.size_table()
    parts = readme.speed_table(), readme.other_runs(), readme.memory_table()
    assert between("speed") == "\n\n".join(parts)
    assert between("aims") == readme.aims_table()
    assert between("attention") == readme.attention_table()
    assert between("agreement") == readme.agreement()
    assert between("training") == readme.training_table()
    assert between("efficiency") == readme.efficiency_table()
    assert between("weakest") == readme.weakest()
    assert between("ablation") == readme.ablation_section()
    assert between("shapes") == readme.shape_table()


def test_what_the_miniature_does_worst(monkeypatch):
    scores = {"caption_f1": 0.9, "caption_exact": 0.1, "refer_iou50": 0.8, "identify": 0.8,
              "detection_f1": 0.7, "grounding_f1": 0.75, "vqa": {"color": 0.6, "fill": 0.5,
                                                                 "mean": 0.4}}  # fmt: skip
    monkeypatch.setattr(readme, "result", lambda name: scores)
    assert "weakest at `fill` (0.500), of the tasks at `detection` (0.700)" in readme.weakest()


def test_speed_is_told_as_far_as_it_was_measured(monkeypatch):
    speed = readme.result("speed")
    speed |= {"first_token": {"packed": 25.0}, "activation_error": 6e-5}
    speed["variants"] = {"int8": speed["variants"]["int8"] | {"bandwidth": 44.4}}
    monkeypatch.setattr(readme, "result", lambda name: speed)
    assert "0.0060%" in readme.speed_table() and "packed 25.0 s." in readme.speed_table()
    assert "| 44 GB/s |" in readme.speed_table() and "llama" not in readme.speed_table()
    del speed["first_token"]
    assert "first token" not in readme.speed_table()


def test_aims_are_told_as_far_as_they_were_measured(monkeypatch):
    found = {name: readme.result(name) for name in ("speed", "memory", "agreement",
             "official_sized", "world_test_stage4", "world_test_stage4_weights-int8")}  # fmt: skip
    found["speed"]["first_token"] = {"packed": 25.0, "as it lies": 1.0}
    found["speed"]["ratios"]["token, llama.cpp Q8_0"] = 0.62
    found["memory"]["int8"]["peak"] = 4.6
    monkeypatch.setattr(readme, "result", found.get)
    table = readme.aims_table()
    assert "| to the first token, weights packed | ≤ 10.0 s | 25.0 s | missed |" in table
    assert "| to the first token, weights as they lie | ≤ 2.0 s | 1.0 s |  |" in table
    assert "| a token, times as fast as llama.cpp | ≥ 1.00 | 0.62 | missed |" in table
    assert "| memory for an answer about 448 px | ≤ 4.60 GB | 4.60 GB |  |" in table
    del found["speed"]["first_token"]
    found["speed"]["ratios"] = {key: value for key, value in found["speed"]["ratios"].items()
                                if "llama" not in key}  # fmt: skip
    assert "first token" not in readme.aims_table() and "llama" not in readme.aims_table()


def test_the_largest_drop_is_of_all_scores(monkeypatch):
    whole = {"n": 500, "caption_f1": 0.95, "refer_iou50": 0.9, "vqa": {"color": 0.9, "mean": 0.9}}
    int8 = {"n": 400, "caption_f1": 0.945, "refer_iou50": 0.95, "vqa": {"color": 0.8, "mean": 0.88}}
    monkeypatch.setattr(readme, "result", lambda name: int8 if "int8" in name else whole)
    assert readme.largest_drop() == 0.1
    int8["vqa"]["color"] = whole["vqa"]["mean"] = 0.9
    int8["vqa"]["mean"] = 0.9
    assert readme.largest_drop() == 0.005


@pytest.mark.parametrize("script, arguments", COMMANDS + IN_SENTENCES + in_table(EXPERIMENTS))
def test_options_in_commands_exist(script: str, arguments: str):
    source = (ROOT / script).read_text("utf-8")
    given = arguments.split("#")[0].split()
    if pairs := [argument for argument in given if "=" in argument]:
        module = import_module(script.removesuffix(".py").replace("/", "."))
        config = getattr(module, "Config", TrainConfig)
        if "bench=gqa" in pairs:
            config = benchmarks.Config
        elif "memory" in script and "weights=" not in arguments:
            config = training_memory.Config
        assert key_values(pairs, config)
    for option in (argument for argument in given if argument.startswith("--")):
        name = option.removeprefix("--")  # generate.py adds some by a table of names
        assert f'"{option}"' in source or f'"{name}":' in source


def test_options_named_anywhere_exist():
    """What is written as code: key=, and --option."""
    modules = [import_module(f"experiments.{path.stem}") for path in ROOT.glob("experiments/*.py")]
    configs = [TrainConfig, *(module.Config for module in modules if hasattr(module, "Config"))]
    parsers = [*ROOT.glob("*.py"), *ROOT.glob("official/*.py"), ROOT / "tests" / "conftest.py"]
    words = "".join(path.read_text("utf-8") for path in parsers)
    known = {field.name for config in configs for field in fields(config)} | ELSEWHERE
    for text in (TEXT, EXPERIMENTS):
        code = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        code = "\n".join([*code, *re.findall(r"`([^`\n]+)`", without_blocks(text))])
        keys = set(re.findall(r"(?<![\w.-])([a-z]\w*)=", code))
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - ELSEWHERE
        assert len(keys) > 10 and keys <= known, keys - known
        assert all(f'"{option}"' in words or f'"{option[2:]}":' in words for option in options)


def test_records_of_the_example_are_valid():
    block = re.search(r"^```\n(\{.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[1]
    records = [json.loads(line) for line in block.splitlines()]
    for number, record in enumerate(records, 1):
        validate_record(record, f"line {number}")
    assert {record["task"] for record in records} == EXAMPLES.keys()


@pytest.mark.parametrize("text", [TEXT, EXPERIMENTS], ids=["README", "experiments/README"])
def test_code_does_not_break_across_lines(text: str):
    assert [line for line in without_blocks(text).splitlines() if line.count("`") % 2] == []


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
