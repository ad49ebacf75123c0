"""The paper's benchmarks on their official files: python experiments/evaluate.py bench=gqa data=DIR

    bench=gqa|vsr|iconqa|vizwiz|hm|okvqa|refcoco|refcoco+|refcocog   split=val for one split of it
    official=1      prompts and decoding of the official scripts; otherwise the template of training
    n=100           the first so many items of each split
    out=FILE        the answers, one a line; the same command goes on where a run was cut

Read it from the leaves to the root:

    gqa, vsr, ...             official files -> pictures, texts, and what is true
    generated, chosen         what the model says
    BENCHES                   all of this in a table, with the rules of bench_scores.py
    answer_all, run           answers go to a file, scores to a JSON

Source of files, wordings and decoding: eval_vqa.py (of IconQA eval_scripts/eval_vqa.py, as the
other splits the choices wrongly), eval_scripts/eval_ref.py, eval_configs/benchmark_evaluation.yaml
and minigpt4/datasets/datasets/{vqa_datasets,coco_caption}.py of the official TinyGPT-V.
"""

import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import POOLS, STAGES, caption_text, encode_sample, load_image, user_turn
from experiments.bench_scores import Scores, score_box, score_choice, score_label
from experiments.bench_scores import score_okvqa, score_vizwiz, score_yes_no
from experiments.command_line import check_device, key_values, other_weights, unusual
from generate import answer, encode_images
from model import TinyGPTV, autocast
from official.checkpoints import tensors_fingerprint
from official.convert import COCO, find, read_json, read_list, read_references

WEIGHTS = str(Path(__file__).resolve().parent.parent / "miniature" / "weights")
MAX_NEW_TOKENS = 20


@dataclass
class Config:
    """What evaluate.py is told for one of the paper's benchmarks."""

    bench: str = ""
    data: str = ""  # the folder with the official files
    split: str = ""  # of the bench; all that it has by default
    official: bool = False
    n: int = 0  # items of each split; 0 is all
    weights: str = WEIGHTS
    out: str = ""  # the file of answers; by default beside the result
    batch_size: int = 10
    device: str = "cpu"


class Item(NamedTuple):
    """One question about one picture."""

    split: str
    image: Path
    text: str  # the question, statement or phrase, to be put into the bench's wording
    truth: Any  # what the bench's scorer takes

    @property
    def name(self) -> str:
        """Of the picture, with its folder: all of IconQA's are image.png."""
        return "/".join(self.image.parts[-2:])


# ---- official files ----
Entries = Iterator[tuple[Path, str, Any]]  # picture, text, truth


def gqa(data: Path, split: str) -> Entries:
    """testdev_balanced, as the official script prepares it."""
    path = find(data, "testdev_balanced_questions.json")
    images = find(path.parent, "gqa_images", "images")
    for entry in read_list(path):
        yield images / entry["image"], entry["question"], entry["answer"]


def vsr(data: Path, split: str) -> Entries:
    """cambridgeltl/vsr_zeroshot of Hugging Face, and COCO of 2017."""
    folders = find(data, "train2017"), find(data, "val2017")
    for entry in read_lines(find(data, "vsr*/test.jsonl", "test.jsonl")):
        label = "true" if entry["label"] == 1 else "false"
        yield first_with(entry["image"], *folders), entry["caption"], label


def iconqa(data: Path, split: str) -> Entries:
    """The questions whose choices are texts, of the validation set."""
    path = find(data, "choose_text_val.json")
    images = find(path.parent, "iconvqa_images", "val/choose_txt")
    for entry in read_list(path):
        choices, right = [str(choice) for choice in entry["choices"]], entry["answer"]
        choices[right]  # an IndexError, if it is none of them
        yield images / str(entry["image_id"]) / "image.png", entry["question"], (choices, right)


def vizwiz(data: Path, split: str) -> Entries:
    """The validation set, ten answers a question."""
    path = find(data, "vizwiz*/val.json", "val.json")
    images = find(path.parent, "vizwiz_images", "val")
    for entry in read_list(path):
        truths = [given["answer"] for given in entry["answers"]]
        yield images / entry["image"], entry["question"], truths


def hateful_memes(data: Path, split: str) -> Entries:
    """The development set; the text is what the meme says."""
    path = find(data, "hateful_meme*/dev.jsonl", "dev.jsonl")
    images = find(path.parent, "img").parent  # which the names of the pictures begin with
    for entry in read_lines(path):
        yield images / entry["img"], entry["text"], ("no", "yes")[entry["label"]]


def okvqa(data: Path, split: str) -> Entries:
    """The official list of questions, answers of OK-VQA's annotations, COCO's pictures."""
    folders = find(data, "train2017"), find(data, "val2017")
    annotations = read_json(find(data, "mscoco_val2014_annotations_clean.json"))["annotations"]
    truths = {entry["question_id"]: [given["answer"] for given in entry["answers"]]
              for entry in annotations}  # fmt: skip
    for entry in read_list(find(data, "okvqa_test_split.json")):
        image = first_with(f"{entry['image_id']:0>12}.jpg", *folders)
        yield image, entry["question"], truths[entry["question_id"]]


def refcoco(data: Path, split: str, name: str = "refcoco", split_by: str = "unc") -> Entries:
    """The official lists of expressions, or else the published references, one item a sentence.
    Each item counts by itself; the official script takes those of one img_id for one."""
    coco = find(data, *COCO)
    path = find(data, f"{name}_{split}.json", f"{name}/instances.json")
    if path.name != "instances.json":
        for entry in read_list(path):
            truth = entry["bbox"], entry["width"], entry["height"]
            yield coco / f"{entry['img_id'][:27]}.jpg", entry["sents"], truth
        return
    instances = read_json(path)
    boxes = {thing["id"]: thing["bbox"] for thing in instances["annotations"]}
    images = {image["id"]: image for image in instances["images"]}
    for thing in read_references(path.parent / f"refs({split_by}).p"):
        if thing["split"] == split:
            image = images[thing["image_id"]]
            truth = boxes[thing["ann_id"]], image["width"], image["height"]
            for sentence in thing["sentences"]:
                name = f"COCO_train2014_{thing['image_id']:012}.jpg"
                yield coco / name, sentence["sent"], truth


def refcoco_plus(data: Path, split: str) -> Entries:
    """RefCOCO+, expressions without words of place, in the files of RefCOCO."""
    return refcoco(data, split, "refcoco+")


def refcocog(data: Path, split: str) -> Entries:
    """RefCOCOg, longer expressions, with the split of UMD."""
    return refcoco(data, split, "refcocog", "umd")


def read_lines(path: Path) -> Iterator[dict]:
    """The entries of a JSON Lines file."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        yield entry


def first_with(name: str, *folders: Path) -> Path:
    """The picture of that name in the first folder that has it."""
    return next((f / name for f in folders if (f / name).is_file()), folders[0] / name)


def read_items(config: Config) -> list[Item]:
    """Raises ValueError for files unlike the official ones, and for pictures that are missing or
    not under `data`: now, and not after hours of answering."""
    bench, items = BENCHES[config.bench], []
    try:
        for split in [config.split] if config.split else bench.splits:
            entries = islice(bench.read(Path(config.data), split), config.n or None)
            found = [Item(split, *entry) for entry in entries]
            for item in found:
                prompt_for(bench.wording, item.text, config.official)
                bench.score("", item.truth)
            if not found:
                raise ValueError(f"{split} of {config.bench} has no items in {config.data}")
            items += found
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        told = f"{config.bench}: the files are not like the official ones ({error!r:.200})"
        raise ValueError(told) from error
    root = os.path.abspath(config.data)  # not resolved: pictures may be links to another disk
    for item in items:
        if not Path(os.path.abspath(item.image)).is_relative_to(root):
            raise ValueError(f"{config.bench}: the picture {item.image} is not under {config.data}")
    missing = sorted({str(item.image) for item in items if not item.image.is_file()})
    if missing:
        first = ", ".join(missing[:5])
        raise ValueError(f"{len(missing)} pictures are missing; the first: {first}")
    return items


# ---- what the model says ----
def prompt_for(wording: str, text: str, official: bool) -> str:
    """The official benchmarks take texts as they are; in training all had been normalised."""
    words = wording.format(text if official else caption_text(text))
    return user_turn(words, 4, image=True, official=official)


def load_images(items: list[Item]) -> list[Image.Image]:
    """Their pictures, one that several items share loaded once."""
    images = {path: load_image(path) for path in {item.image for item in items}}
    return [images[item.image] for item in items]


def generated(model: TinyGPTV, items: list[Item], wording: str, official: bool) -> list[str]:
    """Greedy answers. Officially nothing but a "#" ends them before 20 tokens, "###" does not."""
    prompts = [prompt_for(wording, item.text, official) for item in items]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* answers cut")
        told = answer(model, load_images(items), prompts, max_new_tokens=MAX_NEW_TOKENS,
                      official=official)  # fmt: skip
    return [text.split("</s>")[0].replace("<s>", "").split("[/INST]")[-1].strip() for text in told]


def chosen(model: TinyGPTV, items: list[Item], wording: str, official: bool) -> list[int]:
    """The number of the choice with the lowest loss a token: official `multi_select`, which differs
    from `generated`: BOS comes first, a space before "###Assistant", and a newline ends the answer.
    The official script joins the choices by "_", so that one with "_" inside becomes two."""
    places = []
    for item, image_embeds in zip(items, encode_images(model, load_images(items))):
        choices, _ = item.truth
        choices = "_".join(choices).split("_") if official else map(caption_text, choices)
        prompt = prompt_for(wording + " " * official, item.text, official)
        losses = [choice_loss(model, image_embeds, prompt, choice, official) for choice in choices]
        places.append(losses.index(min(losses)))
    return places


@torch.inference_mode()
def choice_loss(
    model: TinyGPTV, image_embeds: Tensor, prompt: str, choice: str, official: bool
) -> float:
    """Mean cross entropy of a choice as the answer. image_embeds (num_queries, hidden_size)."""
    end_sym = "\n" if official else STAGES[4].end_sym
    num_queries, max_txt_len = len(image_embeds), STAGES[4].max_txt_len
    row = encode_sample([(prompt, choice)], model.tokenizer, 1, num_queries, max_txt_len, end_sym)
    device = image_embeds.device
    ids, mask, labels = (row[key][None].to(device)
                         for key in ("input_ids", "attention_mask", "labels"))  # fmt: skip
    with autocast(model.phi.lm_head.weight):
        return float(model.phi.loss(model.phi.embed(ids, image_embeds[None]), mask, labels))


# ---- the benches ----
class Bench(NamedTuple):
    """A benchmark: who reads its files, what is asked, who answers, who scores."""

    read: Callable[[Path, str], Entries]
    splits: tuple[str, ...]
    wording: str  # {} is the text
    say: Callable[[TinyGPTV, list[Item], str, bool], list]
    score: Callable[[Any, Any], Scores]


SHORT = "[vqa] " + POOLS["vqa"][1]
TRUE_FALSE = "[vqa] Based on the image, is this statement true or false? {}"
PHRASE = (
    "[vqa] The question is '{}' Based on the image, answer the question with a single word or "
    "phrase. and reply 'unanswerable' when the provided information is insufficient"
)
HATEFUL = "This is an image writting '{}'. Is this image hateful? Answer yes or no. Answer:"
WHERE = "[refer] " + POOLS["refer"][1]
UNC, UMD = ("val", "testA", "testB"), ("val", "test")
BENCHES = {
    "gqa": Bench(gqa, ("testdev",), SHORT, generated, score_label),
    "vsr": Bench(vsr, ("test",), TRUE_FALSE, generated, score_label),
    "iconqa": Bench(iconqa, ("val",), SHORT, chosen, score_choice),
    "vizwiz": Bench(vizwiz, ("val",), PHRASE, generated, score_vizwiz),
    "hm": Bench(hateful_memes, ("dev",), HATEFUL, generated, score_yes_no),
    "okvqa": Bench(okvqa, ("test",), SHORT, generated, score_okvqa),
    "refcoco": Bench(refcoco, UNC, WHERE, generated, score_box),
    "refcoco+": Bench(refcoco_plus, UNC, WHERE, generated, score_box),
    "refcocog": Bench(refcocog, UMD, WHERE, generated, score_box),
}


# ---- the file of answers ----
def answers_so_far(path: Path, settings: dict) -> list:
    """Those in the file; its first line are the settings. A last line that was cut off is removed.
    Raises ValueError, and leaves the file alone, if it has other settings."""
    head = json.dumps(settings).encode()
    *lines, rest = (path.read_bytes() if path.exists() else b"").split(b"\n")
    is_ours = lines[0] == head if lines else head.startswith(rest)
    if not is_ours:
        raise ValueError(f"{path} is not of this run: model, items and settings have to be the "
                         "same to go on. Name another file by out=, or remove it")  # fmt: skip
    try:
        entries = [json.loads(line) for line in lines[1:]]
        if [entry["item"] for entry in entries] != list(range(len(entries))):
            raise ValueError("its items are not in order")  # several have written at a time
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to begin anew") from error
    if rest:
        os.truncate(path, sum(len(line) + 1 for line in lines))
    if not lines:
        path.write_bytes(head + b"\n")
    return [entry["answer"] for entry in entries]


def answer_all(model: TinyGPTV, items: list[Item], path: Path, config: Config) -> list:
    """The answers to all items, in their order; those in the file are not asked for again."""
    bench = BENCHES[config.bench]
    asked = [(item.split, item.name, item.text, item.truth) for item in items]
    settings = {"bench": config.bench, "split": config.split, "official": config.official,
                "n": config.n, "model": tensors_fingerprint(model.parameters()),
                "items": f"{zlib.crc32(repr(asked).encode()):08x}"}  # fmt: skip
    answers = answers_so_far(path, settings)
    bar = tqdm(total=len(items), initial=len(answers), desc=config.bench, unit=" items")
    with open(path, "a", encoding="utf-8") as file, bar:
        for start in range(len(answers), len(items), config.batch_size):
            batch = items[start : start + config.batch_size]
            said = bench.say(model, batch, bench.wording, config.official)
            for number, (item, one) in enumerate(zip(batch, said, strict=True), start):
                line = {"item": number, "image": item.name, "text": item.text, "answer": one}
                print(json.dumps(line), file=file)
            file.flush()
            answers += said
            bar.update(len(batch))
    return answers


# ---- all of it ----
def check(config: Config) -> None:
    """Raises ValueError for an option that the bench lacks, or a value out of range."""
    splits = BENCHES[config.bench].splits
    if config.split not in ("", *splits):
        raise ValueError(f"split={config.split}: {config.bench} has {', '.join(splits)}")
    if not config.data:
        raise ValueError(f"bench={config.bench} needs data=DIR, the folder with its official files")
    if config.n < 0 or config.batch_size < 1:
        raise ValueError("n is 0, for all, or more, and batch_size 1 or more")
    check_device(config.device)


def run(arguments: list[str], folder: Path) -> tuple[str, dict]:
    """The name of the result's file in `folder`, and the result. Raises ValueError or OSError for
    what the user can have got wrong."""
    config = Config(**key_values(arguments, Config))
    check(config)
    items = read_items(config)
    model = TinyGPTV.from_pretrained(config.weights, device=config.device)
    if model.load_report:
        print(model.load_report, file=sys.stderr)
    if model.stage < 4:
        raise ValueError(f"{config.weights}: stage {model.stage} was not taught to answer "
                         "questions; the benchmarks are for stage 4")  # fmt: skip
    parts = [config.bench, config.split, config.official and "official", *unusual(config, ("n",)),
             *other_weights(config.weights, WEIGHTS)]  # fmt: skip
    name = "_".join(filter(None, parts))
    folder.mkdir(exist_ok=True)
    answers = answer_all(model, items, Path(config.out or folder / f"{name}.jsonl"), config)
    result = {"bench": config.bench, "official": config.official, "scores": {}}
    for split in dict.fromkeys(item.split for item in items):
        scores = [BENCHES[config.bench].score(said, item.truth)
                  for said, item in zip(answers, items) if item.split == split]  # fmt: skip
        official, strict = (round(sum(column) / len(scores), 4) for column in zip(*scores))
        result["scores"][split] = {"n": len(scores), "official": official, "strict": strict}
    return f"{name}.json", result
