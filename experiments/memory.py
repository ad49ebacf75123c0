"""How much memory training takes, and an answer about a picture of 448 px, at the official size.

    python experiments/memory.py                            training, all stages
    python experiments/memory.py stage=2 checkpointing=1    ... one stage, part by part
    python experiments/memory.py weights=DIR int8=DIR       an answer

Training is computed, by experiments/training_memory.py; an answer is measured.

weights: the official files, or random ones as experiments/official_sized.py folder=DIR writes them;
int8: what quantize.py has made of them, packed and as it lies. Each is loaded by a process of its
own, which tells what the system counts as its memory (Linux): once loaded, at the end, and the most
that it ever was. The bf16 run comes first and leaves the files in the system's cache, then
quantize.py itself is measured.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import inference_prompt, load_image
from experiments import training_memory
from experiments.command_line import report
from experiments.speed import cpu_name
from generate import generate
from model import TinyGPTV

RESULT = ROOT / "experiments" / "results" / "memory.json"
NEW_TOKENS = 33


@dataclass
class Config:
    """The folders that are compared; options as key=value."""

    weights: str = ""  # of the official files
    int8: str = ""  # what quantize.py has made of them


def status_gb(key: str) -> float:
    """A line of what the system knows about this process, such as VmRSS, in GB."""
    text = Path("/proc/self/status").read_text()
    return round(int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024 / 1e9, 2)


def measure(weights: str, pack: bool) -> dict[str, float]:
    """Memory of this process in GB: at first, with the model, after an answer, at the most."""
    found = {"program": status_gb("VmRSS")}
    model = TinyGPTV.from_pretrained(weights, pack=pack)
    found["loaded"] = status_gb("VmRSS")
    image, prompt = load_image(ROOT / "assets" / "shapes.png"), inference_prompt("caption", "", 4)
    for _ in generate(model, [image], prompt, max_new_tokens=NEW_TOKENS):
        pass
    return found | {"at_the_end": status_gb("VmRSS"), "peak": status_gb("VmHWM")}


def quantizing(weights: str) -> dict[str, float]:
    """Seconds and peak of quantize.py, the files in the system's cache."""
    with tempfile.TemporaryDirectory(prefix="memory_") as folder:
        command = [sys.executable, str(ROOT / "quantize.py"), "--weights", weights, "--out",
                   f"{folder}/int8"]  # fmt: skip
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise ValueError(f"quantize.py --weights {weights} failed; it has said why")
    return {"seconds": round(time.perf_counter() - began, 1),
            "peak": round(usage.ru_maxrss * 1024 / 1e9, 2)}  # fmt: skip


def measured(config: Config) -> dict:
    """What `main` prints, of official weights."""
    if not (config.weights and config.int8):
        raise ValueError("say weights=DIR and int8=DIR, which is what quantize.py has made of it")
    runs = {"bf16": (config.weights, True), "int8": (config.int8, True),
            "int8 as it lies": (config.int8, False)}  # fmt: skip
    result = {"cpu": cpu_name()}
    for name, (weights, pack) in runs.items():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result[name] = pool.apply(measure, [weights, pack])
    return result | {"quantize.py": quantizing(config.weights)}


def main(arguments: list[str]) -> int:
    """Memory of answers if folders are named, else of training. Exit code as in `report`."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not given.get("weights") and given.get("int8", "") in ("", "0", "1"):  # no folder
        return training_memory.main(arguments)
    return report(arguments, Config, measured, RESULT, places=("weights", "int8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
