"""How often the quantized miniature gives the very same answer as the miniature itself.

    python experiments/agreement.py n=1000

Questions of every task and kind about test scenes, greedy decoding, whole answers compared. Any
rounding can turn over a choice between two tokens that are about as probable, so the miniature in
bf16 is compared with itself in fp32, too.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import evaluate
from experiments.command_line import report
from model import TinyGPTV

RESULT = ROOT / "experiments" / "results" / "agreement.json"
QUESTIONS_A_SCENE = 10  # at least


@dataclass
class Config:
    """How many questions, and about which scenes."""

    n: int = 1000  # questions, at least
    seed: int = 2


def compare(config: Config) -> dict:
    """What `main` prints: for each way to round, the share of questions with the same answer."""
    pictures = list(evaluate.world_pictures(config.n // QUESTIONS_A_SCENE, config.seed, "test"))
    weights, settings = evaluate.Config.weights, evaluate.Config()
    models = {
        "fp32": TinyGPTV.from_pretrained(weights),
        "int8": TinyGPTV.from_pretrained(weights, int8=True),
        "bf16": TinyGPTV.from_pretrained(weights, dtype=torch.bfloat16),
    }
    given = {name: list(evaluate.answered(model, pictures, settings))
             for name, model in models.items()}  # fmt: skip
    whole = given.pop("fp32")
    shares = {name: agreement(whole, rows) for name, rows in given.items()}
    return {"questions": len(whole)} | shares


def agreement(whole: list[tuple], rounded: list[tuple]) -> dict:
    """The share of the same answers, of all and by task; rows as `evaluate.answered` has them."""
    asked: Counter[str] = Counter()
    same: Counter[str] = Counter()
    for (record, _, one, _), (_, _, other, _) in zip(whole, rounded, strict=True):
        asked[record["task"]] += 1
        same[record["task"]] += one == other
    return {"same": round(same.total() / asked.total(), 4),
            "by_task": {task: round(same[task] / asked[task], 4) for task in asked}}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return report(arguments, Config, compare, RESULT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
