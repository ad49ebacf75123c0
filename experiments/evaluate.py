"""Asks the model about pictures whose truth is known, and counts what it gets right.

    python experiments/evaluate.py bench=world n=500 seed=1        scenes that no training has seen
    python experiments/evaluate.py bench=world split=held          ... with pairs never seen
    python experiments/evaluate.py bench=world blind=1             ... with the pictures hidden
    python experiments/evaluate.py bench=jsonl data=mine.jsonl     any record file

Read it from the leaves to the root:

    objects, only_boxes, num_matched    what an answer says, read strictly
    score                               one answer against its record: hits and chances
    world_pictures, file_pictures       pictures with their records
    encode, ask                         each picture is encoded once for all its questions
    evaluate                            hits / chances of every metric
    main                                the command line; its last line is JSON, kept in results/

Prompts are worded as generate.py words them, answers are greedy. Stages 1 to 3 know one request,
to describe: they are scored on that alone, and their other metrics are null.
"""

import difflib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import groupby, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import STAGES, caption_text, encode_prompt, format_box, inference_prompt
from data import left_pad_collate, load_image, parse_boxes, preprocess, read_records
from generate import Answer, BoxLabel, generate_ids, labelled_boxes
from miniature import world
from model import TinyGPTV

RESULTS = ROOT / "experiments" / "results"
FIRST_SCENE, SCENES_PER_SEED = 2 * 10**9, 10**6  # no training's scenes have such numbers
WORLD_SIZE = 224  # all stages get the same picture, resized to what they take
# The tasks, and how many tokens an answer may have.
TASKS = {"caption": 160, "vqa": 48, "refer": 48, "identify": 48, "detection": 160, "grounding": 160}


@dataclass
class Config:
    bench: str = ""  # world or jsonl
    n: int = 500  # world: number of scenes
    seed: int = 1  # world: which scenes
    split: str = "test"  # world: or held, where shape-color pairs are new
    data: str = ""  # jsonl: the record file
    blind: int = 0  # 1: uniform grey in place of every picture
    weights: str = str(ROOT / "miniature" / "weights")
    stage: int = 0  # 0 is the last one there
    batch_size: int = 64


ONLY_FOR = {"world": ("n", "seed", "split"), "jsonl": ("data",)}

# ---- what an answer says ----
PHRASE = " ".join(f"({'|'.join(words)})" for words in world.ATTRIBUTES.values())
ZONE = "|".join(zone for row in world.ZONES for zone in row)
OBJECT = re.compile(rf"an? (?P<phrase>{PHRASE})( is (in|on|at) the ({ZONE}))?")
OPENING = re.compile(r"the picture shows \w+ objects?")
Box = tuple[float, float, float, float]


def objects(description: str) -> tuple[Counter[str], Counter[str]]:
    """The objects of a caption, or of a description in sentences, each as "large red solid
    circle"; and what is said in any other words, which is wrong where the world is meant."""
    named: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for part in re.split(r"\.(?:\s+|$)|,? and |, ", " ".join(description.lower().split())):
        if match := OBJECT.fullmatch(part):
            named[match["phrase"]] += 1
        elif part and not OPENING.fullmatch(part):
            other[part] += 1
    return named, other


def only_boxes(answer: str) -> list[Box]:
    """The boxes of an answer that is made of boxes and <delim> alone; else none."""
    boxes, malformed = parse_boxes(answer)
    rest = re.sub(r"\{[^{}]*\}|<delim>", "", answer).strip()
    return [] if malformed or rest else boxes


def iou(a: Box, b: Box) -> float:
    """What two boxes (x1, y1, x2, y2) have in common, over what they cover together."""
    width, height = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height) if width * height else 0.0


def num_matched(said: list[BoxLabel], true: list[BoxLabel]) -> int:
    """How many boxes find a partner with the same label and IoU >= 0.5, the best pairs first."""
    pairs = [(iou(a, b), i, j) for i, (a, label) in enumerate(said)
             for j, (b, other) in enumerate(true) if label == other]  # fmt: skip
    used: tuple[set[int], set[int]] = set(), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap >= 0.5 and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
    return len(used[0])


# ---- one answer against its record ----
Counts = dict[str, tuple[int, int]]  # metric: hits, chances


def score(record: dict, answer: str, size: tuple[int, int]) -> Counts:
    """Hits and chances of one answer. size: (width, height) of the picture.

    Of an F1, these are twice the matches, and all that was said plus all that is true.
    """
    task = record["task"]
    if task == "caption":
        return score_caption(record["caption"], answer)
    if task == "vqa":
        right = caption_text(answer) in map(caption_text, record["answers"])
        return {f"vqa {record.get('kind', 'other')}": (int(right), 1)}
    if task == "identify":
        return {task: (int(caption_text(answer) == caption_text(record["phrase"])), 1)}
    if task == "grounding":
        true, _ = labelled_boxes(record["caption"], "")
        said, malformed = labelled_boxes(answer, "")
        boxless = max(0, answer.count("<p>") - len(said) - malformed)  # phrases
        wrong = malformed + boxless
    else:
        percent = [100 / side for side in size * 2]
        true = [(tuple(v * p for v, p in zip(box, percent)), "") for box in record["boxes"]]
        boxes, wrong = (only_boxes(answer), 0) if task == "refer" else parse_boxes(answer)
        said = [(box, "") for box in boxes]
    matched = num_matched(said, true)
    if task == "refer":
        return {"refer_iou50": (int(matched == len(said) == len(true)), 1)}
    return {f"{task}_f1": (2 * matched, len(said) + wrong + len(true))}


def score_caption(caption: str, answer: str) -> Counts:
    """By objects, where the true caption is in the world's words; else by exact wording."""
    (said, other), (true, foreign) = objects(answer), objects(caption)
    if foreign or not true:
        return {"caption_exact": (int(caption_text(answer) == caption_text(caption)), 1)}
    chances = said.total() + other.total() + true.total()
    exact = said == true and not other
    return {"caption_f1": (2 * (said & true).total(), chances), "caption_exact": (int(exact), 1)}


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
    if task in ("vqa", "refer"):
        text = caption_text(record["question" if task == "vqa" else "phrase"])
    else:
        text = {"identify": "".join(boxes), "detection": record.get("phrase")}.get(task, "")
    return inference_prompt(task, text, stage)


# ---- questions and answers ----
def groups_of(size: int, items: Iterable) -> Iterator[list]:
    """The items in lists of `size`; the last one may be shorter."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])


@torch.inference_mode()
def encode(model: TinyGPTV, images: list[Image.Image], batch_size: int) -> Tensor:
    """What Phi gets to see of the pictures: (num_images, num_queries, hidden_size)."""
    pixels = (preprocess(image, model.image_size) for image in images)
    return torch.cat([model.encode_images(torch.stack(p)) for p in groups_of(batch_size, pixels)])


@torch.inference_mode()
def ask(
    model: TinyGPTV, image_embeds: Tensor, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy answers to prompts about one picture each, and whether each was cut: generate.answer
    for pictures that are encoded already. image_embeds (num_prompts, num_queries, hidden_size)."""
    tokenizer, num_queries = model.tokenizer, image_embeds.shape[1]
    rows = [[tokenizer.bos_token_id] + encode_prompt(prompt, tokenizer, num_queries, 1)
            for prompt in prompts]  # fmt: skip
    batch = left_pad_collate(rows, tokenizer.pad_token_id)
    inputs_embeds = model.embed(batch["input_ids"], image_embeds)  # (num_prompts, T, hidden_size)
    mask, num_ids = batch["attention_mask"], len(tokenizer)
    answers = [Answer(tokenizer, STAGES[model.stage].end_sym) for _ in prompts]
    for ids, _ in generate_ids(model.phi, inputs_embeds, mask, max_new_tokens, num_ids=num_ids):
        for answer, token_id in zip(answers, ids.tolist()):
            answer.push(token_id)
        if all(answer.finished for answer in answers):
            break
    # `close` shows what was held back, in case it was the beginning of the end symbol.
    return [(answer.shown + answer.close(), cut)
            for answer, cut in [(a, not a.finished) for a in answers]]  # fmt: skip


def score_pictures(model: TinyGPTV, pictures: list[Picture], config: Config) -> Iterator[Counts]:
    """Scores all answers about some pictures. Questions alike share a batch, which ends early."""
    images = [image for image, _ in pictures]
    if config.blind:
        images = [Image.new("RGB", image.size, (128, 128, 128)) for image in images]
    image_embeds = encode(model, images, config.batch_size)
    questions = [(record["task"], prompt_for(record, images[place].size, model.stage), place, record)
                 for place, (_, records) in enumerate(pictures)
                 for record in records if can_ask(record, model.stage)]  # fmt: skip
    questions.sort(key=lambda question: (question[0], len(question[1])))
    for task, alike in groupby(questions, key=lambda question: question[0]):
        for batch in groups_of(config.batch_size, alike):
            _, prompts, places, records = zip(*batch)
            answers = ask(model, image_embeds[list(places)], prompts, TASKS[task])
            for record, place, (answer, cut) in zip(records, places, answers):
                yield score(record, answer, images[place].size) | {f"cut {task}": (int(cut), 1)}


# ---- all of them ----
def evaluate(config: Config) -> dict:
    """What `main` prints. Raises ValueError or OSError for what the user can have got wrong."""
    began = time.time()
    records = read_records(config.data) if config.bench == "jsonl" else []
    model = TinyGPTV.from_pretrained(config.weights, config.stage or None)
    if config.stage not in (0, model.stage):
        raise ValueError(f"{config.weights} holds stage {model.stage}, not {config.stage}")
    about: dict = {"bench": config.bench, "stage": model.stage, "blind": config.blind}
    if config.bench == "world":
        about |= {"split": config.split, "n": config.n, "seed": config.seed}
        pictures = world_pictures(config.n, config.seed, config.split)
    else:
        asked = [record for record in records if can_ask(record, model.stage)]
        if not asked:
            raise ValueError(f"{config.data}: stage {model.stage} is not scored on such records")
        left_out = Counter(r["task"] for r in records if not can_ask(r, model.stage))
        about |= {"data": Path(config.data).name, "n": len({r["image"] for r in asked}),
                  "not_asked": dict(left_out)}  # fmt: skip
        pictures = file_pictures(asked)
    totals: Counts = {}
    bar = tqdm(total=about["n"], desc="pictures")
    for group in groups_of(4 * config.batch_size, pictures):
        for counts in score_pictures(model, group, config):
            for name, (hits, chances) in counts.items():
                earlier = totals.get(name, (0, 0))
                totals[name] = earlier[0] + hits, earlier[1] + chances
        bar.update(len(group))
    return about | metrics(totals) | {"seconds": round(time.time() - began)}


def metrics(totals: Counts) -> dict:
    """Hits / chances by metric, null where nothing was asked."""
    share = {name: round(hits / chances, 4) for name, (hits, chances) in totals.items()}
    kinds = dict.fromkeys([*world.VQA_KINDS, *(n[4:] for n in share if n.startswith("vqa "))])
    vqa = {kind: share.get(f"vqa {kind}") for kind in kinds}
    known = [value for value in vqa.values() if value is not None]
    vqa["mean"] = round(sum(known) / len(known), 4) if known else None
    names = ("caption_f1", "caption_exact", "refer_iou50", "identify", "detection_f1",
             "grounding_f1")  # fmt: skip
    cut = {name[4:]: counts for name, counts in totals.items() if name.startswith("cut ")}
    return {name: share.get(name) for name in names} | {
        "vqa": vqa,
        "questions": {task: chances for task, (_, chances) in cut.items()},
        "answers_cut": sum(hits for hits, _ in cut.values()),
    }


# ---- the command line ----
def parse_arguments(arguments: list[str]) -> Config:
    """key=value pairs. Raises ValueError for what no field takes, or not in this bench."""
    types = {field.name: field.type for field in fields(Config)}
    given: dict = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in types or not equals:
            near = difflib.get_close_matches(key.lstrip("-"), types, 1, 0.0)[0]
            raise ValueError(f"{argument}: no such option; did you mean {near}=...?")
        try:
            given[key] = types[key](value)
        except ValueError:
            raise ValueError(f"{argument}: {value!r} is not of type {types[key].__name__}") from None
    config = Config(**given)
    if config.bench not in ONLY_FOR:
        raise ValueError(f"bench={config.bench}: choose from {', '.join(ONLY_FOR)}")
    for bench, keys in ONLY_FOR.items():
        for key in given.keys() & set(keys):
            if bench != config.bench:
                raise ValueError(f"{key}=...: only bench={bench} takes it")
    if config.bench == "jsonl" and not config.data:
        raise ValueError("bench=jsonl needs data=FILE, a record file")
    if config.split not in world.SPLITS:
        raise ValueError(f"split={config.split}: choose from {', '.join(world.SPLITS)}")
    for key, least, most in (("n", 1, SCENES_PER_SEED), ("seed", 0, 10**6), ("blind", 0, 1),
                             ("stage", 0, 4), ("batch_size", 1, 10**6)):  # fmt: skip
        if not least <= getattr(config, key) <= most:
            raise ValueError(f"{key}={getattr(config, key)}: it must be {least} to {most}")
    return config
