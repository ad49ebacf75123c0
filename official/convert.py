"""Makes a record file of an official dataset: python official/convert.py gqa --src DIR

DIR holds the official files under their own names, no more than two folders deep, so that it can
hold all datasets:

    DIR/gqa/train_balanced_questions.json, DIR/gqa/images/1.jpg, ...  pictures beside annotations
    DIR/coco/train2014/COCO_train2014_000000000009.jpg, ...           shared by many datasets

The records go to DIR/NAME.jsonl, where training looks for them (train.py data=DIR). Another --out
must be in a folder above the pictures, too, because records name their pictures from there.

Each record gives in training the sample that the official reader makes of the same entry; entries
that it does not use, or that nobody could use, are left out and counted. Two things differ. Where
an object has several referring expressions, the official reader draws one each time; here each is
a record, so that such an object comes more often. And where an edge of a box lies exactly on a
hundredth, the official reader now and then says one less, by rounding.
"""

import functools
import io
import json
import os
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import caption_text, format_box, validate_record
from experiments.command_line import Parser, exit_code
from official.checkpoints import replace_file

COCO = ("train2014", "coco/images")  # the folder of COCO's pictures, in two published layouts
MAX_REGION = 16384  # pixels; the official reader takes smaller regions only, as OFA does
CHUNK, LONGEST = 1 << 20, 1 << 26  # characters: read at a time, and of the longest entry
SEPARATORS = re.compile(r"[\s,]*")
Found = dict | str  # a record whose picture is a Path, or why there is none
NO_PICTURE, OTHER_SPLIT = "without their picture", "of another split"


# ---- official files ----
def find(src: Path, *names: str) -> Path:
    """The first of these files or folders that is in `src` or up to two folders below it."""
    for name in names:
        for above in ("", "*/", "*/*/"):
            if paths := sorted(src.glob(above + name)):
                return paths[0]
    raise ValueError(f"{' or '.join(names)} is not in {src}, nor up to two folders below it")


def read_json(path: Path) -> dict:
    """The content of a JSON file. Raises ValueError, naming it, for anything else."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_list(path: Path) -> Iterator[dict]:
    """The entries of a JSON list one by one: together some would need gigabytes."""
    decode = json.JSONDecoder().raw_decode
    with open(path, encoding="utf-8-sig") as file:
        text = file.read(CHUNK).lstrip()
        if not text.startswith("["):
            raise ValueError(f"{path} is not a list of entries, as the official file is")
        at, block = 1, text
        while True:
            at = SEPARATORS.match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                entry, at = decode(text, at)
            except RecursionError as error:
                raise ValueError(f"{path} is not like the official file ({error})") from None
            except ValueError:  # it may go on in the next block
                if not block or len(text) > LONGEST:
                    raise ValueError(f"{path} is cut off or damaged") from None
                block = file.read(CHUNK)
                text, at = text[at:] + block, 0
            else:
                yield entry


class PlainUnpickler(pickle._Unpickler):
    """Lists, dicts, texts and numbers only; any name in a pickle could start a program.

    Of the two in the library the one in Python: that in C takes as much memory as the file says.
    """

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: None}  # which does so, too

    def find_class(self, module: str, name: str) -> None:
        """Raises UnpicklingError for any name."""
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no list of texts needs")


def read_references(path: Path) -> list[dict]:
    """The objects of RefCOCO, each with its sentences."""
    content = path.read_bytes()
    try:
        return PlainUnpickler(io.BytesIO(content), encoding="utf-8").load()
    except Exception as error:  # a damaged pickle raises what it likes
        raise ValueError(f"{path} is not a pickle of references: {error}") from error


# ---- records ----
def vqa(image: Path, question: str, answers: list[str]) -> Found:
    """Repeated answers are weights; those of which the normaliser leaves nothing drop out."""
    answers = [answer for answer in answers if caption_text(answer)]
    return {"image": image, "task": "vqa", "question": question, "answers": answers}


def instruct(image: Path, prompt: str, answer: str) -> Found:
    """The one task that takes prompt and answer as they are; a tag is part of the prompt."""
    return {"image": image, "task": "instruct", "prompt": prompt, "answer": answer}


def boxed(task: str, image: Path, phrase: str, box: tuple[float, float, float, float]) -> Found:
    """A record of refer or identify. box: left, top, width and height in pixels."""
    x, y, width, height = box
    size = image_size(image)
    if size is None:
        return NO_PICTURE
    try:
        format_box((x, y, x + width, y + height), *size)
    except ValueError:
        return "with a box outside their picture"
    x1, y1, x2, y2 = max(0, x), max(0, y), x + width, y + height
    if x1 >= x2 or y1 >= y2:
        return "with an empty box"
    return {"image": image, "task": task, "phrase": phrase, "boxes": [[x1, y1, x2, y2]]}


@functools.cache
def image_size(path: Path) -> tuple[int, int] | None:
    """(width, height); None if it is no picture."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # Pillow raises OSError, SyntaxError, struct.error, ...
        return None


# ---- the datasets, in the order of official/mixture.json ----
def descriptions(src: Path) -> Iterator[Found]:
    """MiniGPT-4's long descriptions, of stage 3."""
    path = find(src, "filter_cap.json")
    for entry in read_json(path)["annotations"]:
        image = path.parent / "image" / f"{entry['image_id']}.jpg"
        yield {"image": image, "task": "detail", "caption": entry["caption"]}


def dialogues(src: Path, file: str) -> Iterator[tuple[Path, list[str]]]:
    """Picture and turns of a file in LLaVA's format. The first turn says where the picture is."""
    coco = find(src, *COCO)
    for entry in read_list(find(src, file)):
        turns = [turn["value"] for turn in entry["conversations"]]
        turns[0] = turns[0].replace("<image>", "").replace("\n", "").strip()
        yield coco / f"COCO_train2014_{entry['id']}.jpg", turns


def conversations(src: Path, file: str) -> Iterator[Found]:
    """Conversations of several turns."""
    for image, turns in dialogues(src, file):
        turns = [list(turn) for turn in zip(turns[::2], turns[1::2])]
        yield {"image": image, "task": "chat", "turns": turns}


def first_turns(src: Path, file: str) -> Iterator[Found]:
    """The first question of each conversation, and its answer."""
    for image, turns in dialogues(src, file):
        yield instruct(image, caption_text(turns[0]), turns[1])


def unnatural_instructions(src: Path) -> Iterator[Found]:
    """Instructions without pictures."""
    for entry in read_list(find(src, "filtered_unnatural_instruction.json")):
        first = entry["instances"][0]
        prompt = f"{first['instruction_with_input']} {first['constraints'] or ''}"
        answer = caption_text(first["output"])
        yield {"task": "instruct", "prompt": caption_text(prompt), "answer": answer}


def visual_genome(src: Path) -> Iterator[Found]:
    """Regions of Visual Genome as phrases to find, but for those that are too large."""
    path = find(src, "region_descriptions.json")
    urls = {image["image_id"]: image["url"] for image in read_list(find(src, "image_data.json"))}
    for entry in read_list(path):
        image = path.parent.joinpath(*urls[entry["id"]].split("/")[-2:])
        for region in entry["regions"]:
            box = tuple(region[key] for key in ("x", "y", "width", "height"))
            if region["width"] * region["height"] < MAX_REGION:
                yield boxed("refer", image, region["phrase"], box)
            else:
                yield f"of {MAX_REGION} or more pixels"


def flickr(src: Path, file: str) -> Iterator[Found]:
    """Grounded captions, captions with their phrases, or phrases with their boxes: the boxes are
    part of the text."""
    path = find(src, file)
    for entry in read_list(path):
        image = path.parent / "images" / f"{entry['image_id']}.jpg"
        if "grounded_caption" in entry:
            yield {"image": image, "task": "grounding", "caption": entry["grounded_caption"]}
        elif "caption" in entry:
            yield instruct(image, f"[detection] {entry['caption']}", entry["output"])
        else:
            phrase = entry["phrase"]
            yield instruct(image, f"[detection] {phrase}", f"<p>{phrase}</p> {entry['bbox']}")


def coco_captions(src: Path) -> Iterator[Found]:
    """Captions of COCO's train2014, of which Karpathy's split keeps a part."""
    coco = find(src, *COCO)
    for entry in read_list(find(src, "coco_karpathy_train.json")):
        if "train" in entry["image"]:
            image = coco / os.path.basename(entry["image"])
            yield {"image": image, "task": "caption", "caption": entry["caption"]}
        else:
            yield OTHER_SPLIT


def textcaps(src: Path) -> Iterator[Found]:
    """Captions that read the text in a picture."""
    path = find(src, "TextCaps_0.1_train.json")
    for entry in read_json(path)["data"]:
        image = path.parent / "train_images" / f"{entry['image_id']}.jpg"
        yield {"image": image, "task": "caption", "caption": entry["caption_str"]}


def referring(src: Path, folder: str, split_by: str, task: str) -> Iterator[Found]:
    """Phrases of RefCOCO, RefCOCO+ or RefCOCOg with their boxes: to refer, or to identify."""
    coco = find(src, *COCO)
    path = find(src, f"{folder}/instances.json")
    boxes = {thing["id"]: thing["bbox"] for thing in read_json(path)["annotations"]}
    for thing in read_references(path.parent / f"refs({split_by}).p"):
        image = coco / f"COCO_train2014_{thing['image_id']:012}.jpg"
        for sentence in thing["sentences"]:
            if thing["split"] == "train":
                yield boxed(task, image, sentence["raw"], boxes[thing["ann_id"]])
            else:
                yield OTHER_SPLIT


def coco_questions(src: Path, answers: str, *files: str) -> Iterator[Found]:
    """Questions about COCO's pictures; `answers` is what their answers are called."""
    coco = find(src, *COCO)
    for path in [find(src, file) for file in files]:
        for entry in read_list(path):
            image = coco / os.path.basename(entry["image"])
            yield vqa(image, entry["question"], entry[answers])


def gqa(src: Path) -> Iterator[Found]:
    """Questions of GQA, each with one answer."""
    path = find(src, "train_balanced_questions.json")
    for entry in read_list(path):
        yield vqa(path.parent / "images" / entry["image"], entry["question"], [entry["answer"]])


def book_covers(src: Path) -> Iterator[Found]:
    """Questions of OCR-VQA about the covers of books."""
    path = find(src, "ocrvqa/dataset.json", "dataset.json")
    for key, book in read_json(path).items():
        image = path.parent / "images" / (key + os.path.splitext(book["imageURL"])[1])
        for question, answer in zip(book["questions"], book["answers"]):
            yield vqa(image, question, [answer]) if book["split"] == 1 else OTHER_SPLIT


DATASETS = {  # who reads it, and what of it; laion and cc_sbu are shards, which stream.py reads
    "cc_sbu_align": (descriptions,),
    "multitask_conversation": (conversations, "multitask_conversation.json"),
    "llava_conversation": (conversations, "conversation_58k.json"),
    "unnatural_instruction": (unnatural_instructions,),
    "refvg": (visual_genome,),
    "llava_detail": (first_turns, "detail_23k.json"),
    "llava_reason": (first_turns, "complex_reasoning_77k.json"),
    "flickr_grounded_caption": (flickr, "groundedcaption.json"),
    "flickr_CaptionToPhrase": (flickr, "captiontobbox.json"),
    "flickr_ObjectToPhrase": (flickr, "phrasetobbox.json"),
    "coco_caption": (coco_captions,),
    "textcaps_caption": (textcaps,),
    "refcoco": (referring, "refcoco", "unc", "refer"),
    "refcocop": (referring, "refcoco+", "unc", "refer"),
    "refcocog": (referring, "refcocog", "umd", "refer"),
    "invrefcoco": (referring, "refcoco", "unc", "identify"),
    "invrefcocop": (referring, "refcoco+", "unc", "identify"),
    "invrefcocog": (referring, "refcocog", "umd", "identify"),
    "coco_vqa": (coco_questions, "answer", "vqa_train.json", "vqa_val.json"),
    "ok_vqa": (coco_questions, "answer", "okvqa_train.json"),
    "aok_vqa": (coco_questions, "direct_answers", "aokvqa_v1p0_train.json"),
    "gqa": (gqa,),
    "ocrvqa": (book_covers,),
}


# ---- the record file ----
@functools.cache
def relative(picture: Path, folder: Path) -> str | None:
    """The name of a picture from a folder above it; None if there is no such file."""
    name = os.path.relpath(picture, folder)
    if name.startswith(".."):
        raise ValueError(f"{picture} is not below {folder}: say --out FILE with a file in a "
                         f"folder above the pictures, because records name them from there")
    return Path(name).as_posix() if picture.is_file() else None


def finished(found: Found, folder: Path) -> Found:
    """The record as it is written into `folder`, or why it is left out."""
    if isinstance(found, str):
        return found
    if "image" in found:
        found["image"] = relative(found["image"], folder)
        if found["image"] is None:
            return NO_PICTURE
    try:
        validate_record(found, "")
    except ValueError:
        return "without a usable text"
    return found


def convert(name: str, src: Path, out: Path) -> str:
    """Writes the records of a dataset to `out`; tells how many, and how many are left out why."""
    read, *arguments = DATASETS[name]
    written, left_out = 0, Counter()
    try:
        with replace_file(out) as part, open(part, "w", encoding="utf-8") as file:
            for found in tqdm(read(src, *arguments), desc=name, unit=" entries"):
                record = finished(found, out.parent)
                if isinstance(record, str):
                    left_out[record] += 1
                else:
                    print(json.dumps(record), file=file)
                    written += 1
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            report = f"{name}: {written} records" + (f"; left out: {reasons}" if reasons else "")
            if not written:
                raise ValueError(report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, UnicodeError) as error:
        told = f"{name}: the files are not like the official ones ({error!r:.200})"
        raise ValueError(told) from error
    return report


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    parser = Parser(description="Make a record file of an official dataset.", allow_abbrev=False)
    parser.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("--src", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/NAME.jsonl")

    def work() -> None:
        given = parser.parse(arguments)
        out = given.out or given.src / f"{given.name}.jsonl"
        print(convert(given.name, given.src, out), file=sys.stderr)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
