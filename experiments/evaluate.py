"""Asks the model about pictures whose truth is known, and counts what it gets right.

    python experiments/evaluate.py bench=world n=500 seed=1        scenes that no training has seen
    python experiments/evaluate.py bench=world split=held          ... with pairs never seen
    python experiments/evaluate.py bench=world blind=1             ... with the pictures hidden
    python experiments/evaluate.py bench=jsonl data=mine.jsonl     any record file
    python experiments/evaluate.py bench=gqa data=DIR              the paper's: see benchmarks.py

Read it from the leaves to the root:

    world_pictures, file_pictures    pictures with their records
    ask                              each picture is encoded once for all of its questions
    score_all, evaluate              answers are counted by experiments/scores.py
    main                             its last line is JSON, which is kept in experiments/results/

Prompts are worded as generate.py words them, answers are greedy. Stages 1 to 3 know one request,
to describe: they are scored on that alone, and their other metrics are null.
"""

import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import format_box, inference_prompt, load_image, read_records
from experiments import benchmarks
from experiments.command_line import (
    check_device,
    exit_code,
    key_values,
    other_weights,
    print_and_save,
    unusual,
)
from experiments.scores import Count, metrics, score
from generate import Sampling, encode_images, start_answers
from miniature import world
from model import TinyGPTV

RESULTS = ROOT / "experiments" / "results"
FIRST_SCENE, SCENES_PER_SEED = 2 * 10**9, 10**6  # no training's scenes have such numbers
WORLD_SIZE = 224  # all stages get the same picture, resized to what they take
# The tasks, and how many tokens an answer may have.
TASKS = {"caption": 160, "vqa": 48, "refer": 48, "identify": 48, "detection": 160, "grounding": 160}


@dataclass
class Config:
    """What is asked, of which model."""

    bench: str = ""  # world or jsonl
    n: int = 500  # world: number of scenes
    seed: int = 1  # world: which scenes
    split: str = "test"  # world: or held, where shape-color pairs are new
    data: str = ""  # jsonl: the record file
    blind: bool = False  # uniform grey in place of every picture
    weights: str = str(ROOT / "miniature" / "weights")
    stage: int = 0  # 0 is the last one there
    batch_size: int = 64
    device: str = "cpu"


ONLY_FOR = {"world": ("n", "seed", "split"), "jsonl": ("data",)}


# ---- pictures with their records ----
Picture = tuple[Image.Image, list[dict]]


def world_pictures(n: int, seed: int, split: str) -> Iterator[Picture]:
    """n scenes of a split, each with a record of every task and kind that can be asked of it."""
    for number in range(n):
        scene = world.sample_scene(FIRST_SCENE + seed * SCENES_PER_SEED + number, split)
        rng = random.Random(f"{split} {seed} {number}")
        yield world.render(scene, WORLD_SIZE), world.records(scene, rng, WORLD_SIZE)


def file_pictures(records: list[dict]) -> Iterator[Picture]:
    """The pictures of a record file, each once and with all of its records."""
    by_image: dict[str, list[dict]] = {}
    for record in records:
        by_image.setdefault(record["image"], []).append(record)
    return ((load_image(path), group) for path, group in by_image.items())


def can_ask(record: dict, stage: int) -> bool:
    """Stages 1 to 3 only describe. To identify is to name what is in a single box."""
    known = TASKS if stage == 4 else ("caption",)
    return record["task"] in known and (record["task"] != "identify" or len(record["boxes"]) == 1)


def prompt_for(record: dict, size: tuple[int, int], stage: int) -> str:
    """The finished prompt. Raises ValueError for a box outside the picture of (width, height)."""
    try:
        boxes = [format_box(box, *size) for box in record.get("boxes", ())]
    except ValueError as error:
        raise ValueError(f"{record['image']}: {error}") from error
    task = record["task"]
    field = {"vqa": "question", "refer": "phrase", "detection": "phrase"}.get(task)
    text = "".join(boxes) if task == "identify" else record.get(field)
    return inference_prompt(task, text or "", stage)


# ---- questions and answers ----
def groups_of(size: int, items: Iterable) -> Iterator[list]:
    """The items in lists of `size`; the last one may be shorter."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


@torch.inference_mode()
def ask(
    model: TinyGPTV, image_embeds: Tensor, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy answers to prompts about one encoded picture each, and whether each was cut.
    image_embeds (num_prompts, num_queries, hidden_size)."""
    num_images = [1] * len(prompts)
    answers, stream = start_answers(
        model, image_embeds, num_images, prompts, Sampling(), max_new_tokens
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of cut answers, which are counted
        for _ in stream:
            pass  # the answers remember what they were told
    return [(answer.shown, answer.cut) for answer in answers]


def answered(
    model: TinyGPTV, pictures: list[Picture], config: Config
) -> Iterator[tuple[dict, tuple[int, int], str, bool]]:
    """Asks all about some pictures: record, size of its picture, answer, and whether that was cut.
    Questions alike share a batch, which ends early."""
    images = [image for image, _ in pictures]
    if config.blind:
        images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
    groups = groups_of(config.batch_size, images)
    image_embeds = torch.cat([encode_images(model, group) for group in groups])
    questions = []
    for place, (image, records) in enumerate(pictures):
        for record in (record for record in records if can_ask(record, model.stage)):
            prompt = prompt_for(record, image.size, model.stage)
            questions.append((record["task"], prompt, place, record))
    questions.sort(key=lambda question: (question[0], len(question[1])))
    for task, alike in groupby(questions, key=lambda question: question[0]):
        for batch in groups_of(config.batch_size, alike):
            _, prompts, places, records = zip(*batch)
            answers = ask(model, image_embeds[list(places)], prompts, TASKS[task])
            for record, place, (answer, cut) in zip(records, places, answers):
                yield record, images[place].size, answer, cut


def score_pictures(model: TinyGPTV, pictures: list[Picture], config: Config) -> Iterator[Count]:
    """The counts of all answers about some pictures, and of those that were cut."""
    for record, size, answer, cut in answered(model, pictures, config):
        yield f"cut {record['task']}", int(cut), 1
        yield from score(record, answer, size)


def score_all(
    model: TinyGPTV, pictures: Iterable[Picture], config: Config, total: int
) -> tuple[Counter[str], Counter[str]]:
    """Hits and chances of every count, of `total` pictures."""
    hits: Counter[str] = Counter()
    chances: Counter[str] = Counter()
    with tqdm(total=total, desc="pictures") as bar:
        for group in groups_of(4 * config.batch_size, pictures):
            for name, hit, chance in score_pictures(model, group, config):
                hits[name] += hit
                chances[name] += chance
            bar.update(len(group))
    return hits, chances


# ---- all of them ----
def evaluate(config: Config) -> dict:
    """What `main` prints. Raises ValueError or OSError for what the user can have got wrong."""
    began = time.time()
    records = read_records(config.data) if config.bench == "jsonl" else []
    model = TinyGPTV.from_pretrained(config.weights, config.stage or None, config.device)
    if model.load_report:
        print(model.load_report, file=sys.stderr)
    about: dict = {"bench": config.bench, "stage": model.stage, "blind": int(config.blind)}
    if config.bench == "world":
        about |= {"split": config.split, "n": config.n, "seed": config.seed}
        pictures = world_pictures(config.n, config.seed, config.split)
    else:
        asked = [record for record in records if can_ask(record, model.stage)]
        if not asked:
            raise ValueError(f"{config.data}: stage {model.stage} is not scored on such records")
        left_out = Counter(record["task"] for record in records)
        left_out.subtract(record["task"] for record in asked)
        about |= {"data": Path(config.data).name, "n": len({record["image"] for record in asked}),
                  "not_asked": dict(+left_out)}  # fmt: skip
        pictures = file_pictures(asked)
    hits, chances = score_all(model, pictures, config, about["n"])
    asked_by_task = {task: chances[f"cut {task}"] for task in TASKS if f"cut {task}" in chances}
    return about | metrics(hits, chances) | {
        "questions": asked_by_task,
        "answers_cut": sum(hits[f"cut {task}"] for task in TASKS),
        "seconds": round(time.time() - began),
    }


# ---- the command line ----
def parse_arguments(arguments: list[str]) -> Config:
    """key=value pairs -> Config. Raises ValueError for what no field takes."""
    given = key_values(arguments, Config)
    config = Config(**given)
    check(config, given)
    return config


def check(config: Config, given: dict) -> None:
    """Raises ValueError for a value out of range, or an option that the bench would not use."""
    benches = (*ONLY_FOR, *benchmarks.BENCHES)  # main hands the latter over
    for key, values in (("bench", benches), ("split", tuple(world.SPLITS))):
        if getattr(config, key) not in values:
            raise ValueError(f"{key}={getattr(config, key)}: choose from {', '.join(values)}")
    for key, most in (("n", SCENES_PER_SEED), ("batch_size", 10**6)):
        if not 1 <= getattr(config, key) <= most:
            raise ValueError(f"{key}={getattr(config, key)}: it has to be 1 to {most}")
    if config.seed < 0 or config.stage not in range(5):
        raise ValueError("seed is 0 or more, and stage 1 to 4, or 0 for the last")
    for bench, keys in ONLY_FOR.items():
        if bench != config.bench and given.keys() & set(keys):
            raise ValueError(f"only bench={bench} takes {', '.join(key + '=' for key in keys)}")
    if config.bench == "jsonl" and not config.data:
        raise ValueError("bench=jsonl needs data=FILE, a record file")
    check_device(config.device)


def result_name(config: Config, stage: int) -> str:
    """The name of the file for the result, with all that is not as usual."""
    parts = ["world", config.split]
    if config.bench == "jsonl":
        parts = [Path(config.data).resolve().parent.name, Path(config.data).stem]
    parts += [f"stage{stage}"] + ["blind"] * config.blind + unusual(config, ("n", "seed"))
    parts += other_weights(config.weights, Config.weights)
    return "_".join(parts) + ".json"


def run(arguments: list[str]) -> None:
    """Measures, and keeps the result in a file of its own in experiments/results/."""
    if any(f"bench={name}" in arguments for name in benchmarks.BENCHES):
        name, result = benchmarks.run(arguments, RESULTS)
    else:
        config = parse_arguments(arguments)
        result = evaluate(config)
        name = result_name(config, result["stage"])
    print(f"to be kept in experiments/results/{name}")
    print_and_save(result, RESULTS / name)


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return exit_code(lambda: run(arguments), "say a smaller batch_size")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
