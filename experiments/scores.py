"""What an answer says, read strictly, and whether that is right. Nothing here knows the model.

    objects, only_boxes, num_matched    what stands in an answer
    score                               hits and chances of one answer, given its record
    metrics                             hits / chances of all of them
"""

import re
from collections import Counter

from data import caption_text, parse_boxes
from experiments.pictures import labelled_boxes
from miniature import world

PHRASE = " ".join(f"({'|'.join(words)})" for words in world.ATTRIBUTES.values())
ZONE = "|".join(zone for row in world.ZONES for zone in row)
OBJECT = re.compile(rf"an? (?P<phrase>{PHRASE})( is (in|on|at) the ({ZONE}))?")
OPENING = re.compile(r"the picture shows \w+ objects?")

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in hundredths of the picture
Count = tuple[str, int, int]  # metric, hits, chances


# ---- what an answer says ----
def objects(description: str) -> tuple[Counter[str], Counter[str]]:
    """The objects of a caption, or of a description in sentences, each as "large red solid
    circle"; and what is said in other words, which names no object of the world."""
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
    """What two boxes have in common, over what they cover together."""
    width, height = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k])) for k in (0, 1))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height) if width * height else 0.0


def num_matched(said: list[tuple[Box, str]], true: list[tuple[Box, str]]) -> int:
    """How many boxes find a partner with the same label and IoU >= 0.5, the best pairs first."""
    pairs = [(iou(a, b), i, j) for i, (a, label) in enumerate(said)
             for j, (b, other) in enumerate(true) if label == other]  # fmt: skip
    partners: dict[int, int] = {}
    for overlap, i, j in sorted(pairs, reverse=True):
        if overlap >= 0.5 and i not in partners and j not in partners.values():
            partners[i] = j
    return len(partners)


# ---- one answer against its record ----
def score(record: dict, answer: str, size: tuple[int, int]) -> list[Count]:
    """Hits and chances of one answer. size: (width, height) of the picture.

    Of an F1, these are twice the matches, and all that was said plus all that is true.
    """
    task = record["task"]
    if task == "caption":
        return score_caption(record["caption"], answer)
    if task == "vqa":
        right = caption_text(answer) in map(caption_text, record["answers"])
        return [(f"vqa {record.get('kind', 'other')}", int(right), 1)]
    if task == "identify":
        return [(task, int(caption_text(answer) == caption_text(record["phrase"])), 1)]
    if task == "grounding":
        true, _ = labelled_boxes(record["caption"], "")
        said, malformed = labelled_boxes(answer, "")
        wrong = max(malformed, answer.count("<p>") - len(said))  # phrases without a box
    else:
        percent = [100 / side for side in size * 2]
        true = [(tuple(v * p for v, p in zip(box, percent)), "") for box in record["boxes"]]
        boxes, wrong = (only_boxes(answer), 0) if task == "refer" else parse_boxes(answer)
        said = [(box, "") for box in boxes]
    matched = num_matched(said, true)
    if task == "refer":
        return [("refer_iou50", int(matched == len(said) == len(true)), 1)]
    return [(f"{task}_f1", 2 * matched, len(said) + wrong + len(true))]


def score_caption(caption: str, answer: str) -> list[Count]:
    """By objects, where the true caption is in the world's words; else by exact wording alone."""
    (said, other), (true, foreign) = objects(answer), objects(caption)
    if foreign or not true:
        return [("caption_exact", int(caption_text(answer) == caption_text(caption)), 1)]
    chances = said.total() + other.total() + true.total()
    exact = said == true and not other
    return [("caption_f1", 2 * (said & true).total(), chances), ("caption_exact", int(exact), 1)]


# ---- all of them ----
METRICS = ("caption_f1", "caption_exact", "refer_iou50", "identify", "detection_f1", "grounding_f1")


def metrics(hits: Counter[str], chances: Counter[str]) -> dict:
    """Hits / chances of every metric, null where nothing was asked.

    The mean of vqa is that of its kinds, however often each was asked.
    """
    share = {name: round(hits[name] / chances[name], 4) for name in chances}
    kinds = dict.fromkeys([*world.VQA_KINDS, *(n[4:] for n in share if n.startswith("vqa "))])
    vqa = {kind: share.get(f"vqa {kind}") for kind in kinds}
    known = [value for value in vqa.values() if value is not None]
    vqa["mean"] = round(sum(known) / len(known), 4) if known else None
    return {name: share.get(name) for name in METRICS} | {"vqa": vqa}
