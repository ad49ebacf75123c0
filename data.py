"""From files to batches: pictures, text, prompts, records, rows.

A training example goes through this file from top to bottom. `load_image` and `preprocess` make
a (3, S, S) tensor of a picture; `Tokenizer` makes ids of text; a *record* (one line of a JSON
Lines file) becomes question and answer in the words and template of its training stage;
`encode_sample` lays them out as one row

    [BOS][prompt, each picture as num_queries times IMAGE_TOKEN_ID][answer + end symbol]

where only the answer has labels; `collate` pads rows to a batch; `RecordDataset` gives rows for as
long as training asks, and train.py mixes several. Nothing here knows the model.
"""

import json
import os.path
import random
import re
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tiktoken
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

IMAGE_TOKEN_ID = -1  # in input_ids: the place of one projected query
IMAGE_PLACEHOLDER = "<ImageHere>"  # in prompts: the place of one picture
IGNORE = -100  # in labels: no target


def printable(text: object) -> str:
    """The text on one line, its control codes replaced: what a damaged or hostile file says may go
    to a terminal."""
    return "".join(char if char.isprintable() else "\ufffd" for char in str(text))


# ---- pictures ----
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Of what Pillow reads, the formats of pictures; EPS is a program, and Pillow would run it.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS, MAX_SIDE = 100_000_000, 65_535
UNREADABLE = {  # what errors of Pillow mean
    UnidentifiedImageError:
        f"it is no picture in a format that is read here ({', '.join(PICTURE_FORMATS)})",
    Image.DecompressionBombError:
        f"it has too many pixels; at most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} a side: make "
        "it smaller",
}  # fmt: skip
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_image(path: str | Path | BinaryIO) -> Image.Image:
    """Read a picture as it is meant to be seen: upright, on white, RGB, the first frame.

    (The official code ignores EXIF rotation and transparency.) ValueError gives path and reason.
    A JPEG that is corrupted in mid-stream decodes without complaint and goes unnoticed.
    """
    try:
        with warnings.catch_warnings():  # of metadata, or of fewer pixels than the limit here
            warnings.simplefilter("ignore")
            with Image.open(path, formats=PICTURE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
                    raise Image.DecompressionBombError  # as Pillow, which allows more, does
                return _to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:  # no fault of the picture's
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        reason = UNREADABLE.get(type(error)) or getattr(error, "strerror", None) or error
        raise ValueError(printable(f"cannot read the image {path}: {reason}")) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit gray, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


def preprocess(image: Image.Image, image_size: int) -> torch.Tensor:
    """(3, image_size, image_size) float32: bicubic resize to a square, then CLIP mean and std.

    The aspect ratio is not kept and nothing is augmented (official blip2_image_train and _eval).
    """
    # Pillow 13 chooses which way to resize first; the official results are of width, then height.
    for size in ((image_size, image.height), (image_size, image_size)):
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)  # (S, S, 3)
    return ((pixels - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)


# ---- text ----
END_OF_TEXT = "<|endoftext|>"
# GPT-2's: what a text is cut into before its bytes are merged.
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """GPT-2's byte-level BPE with Phi-2's added runs of spaces and tabs.

    Reads vocab.json, merges.txt and, if there is one, added_tokens.json of a folder. Added tokens
    are split off first, longest first; tiktoken merges the bytes of the rest. They are not
    registered with tiktoken, which may prefer the shorter of two runs.
    """

    def __init__(self, directory: str | Path):
        folder = Path(directory)
        names = ("vocab.json", "merges.txt", "added_tokens.json")
        self.files = [folder / name for name in names if (folder / name).exists()]
        try:
            vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
            merges = (folder / "merges.txt").read_text("utf-8").splitlines()
            added = folder / "added_tokens.json"
            self._added = json.loads(added.read_text("utf-8")) if added.exists() else {}
            self.eos_token_id = _checked_ids(vocab | self._added)[END_OF_TEXT]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"cannot read the tokenizer files of {folder}: {error}") from error
        self.bos_token_id = self.pad_token_id = self.eos_token_id
        ranks = _byte_ranks(vocab, merges, folder)
        self._bpe = tiktoken.Encoding("", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        self._special = {END_OF_TEXT: self.eos_token_id} | self._added
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: token.encode() for token, i in self._special.items()}
        self._length = max(self._bytes) + 1
        runs = sorted(self._added.keys() - {END_OF_TEXT}, key=len, reverse=True)
        self._runs = "|".join(map(re.escape, runs)) or "(?!)"  # which matches nothing

    def __len__(self) -> int:
        """Number of ids with text; an embedding may have more rows, which must not be drawn."""
        return self._length

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. A typed "<|endoftext|>" is plain text unless `allow_special`."""
        runs = f"({self._runs}|{re.escape(END_OF_TEXT)})" if allow_special else f"({self._runs})"
        ids: list[int] = []
        for n, piece in enumerate(re.split(runs, text)):  # the odd ones are the runs
            ids += [self._special[piece]] if n % 2 else self._bpe.encode_ordinary(piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one id stands for. Raises ValueError for an id without text."""
        if token_id not in self._bytes:
            raise ValueError(f"token id {token_id} has no text; the vocabulary has {len(self)} ids")
        return self._bytes[token_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; incomplete UTF-8 becomes U+FFFD."""
        kept = [i for i in ids if i != self.eos_token_id or not skip_special]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")


def _checked_ids(ids: dict[str, int]) -> dict[str, int]:
    """The same table of tokens. Raises ValueError unless each has text and an id of its own."""
    for token, i in ids.items():
        if token == "" or type(i) is not int or not 0 <= i < 2**20:
            raise ValueError(f"the id of {token!r:.40} is {i!r:.40}, not a number from 0 up")
    if len(set(ids.values())) < len(ids):
        raise ValueError("two tokens have the same id")
    return ids


def byte_names() -> dict[int, str]:
    """How GPT-2's files write each byte: itself where it can be seen, else a letter from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def _byte_ranks(vocab: dict, merges: list[str], folder: Path) -> dict[bytes, int]:
    """tiktoken's table, from a token's bytes to its id. tiktoken merges in the order of ids, GPT-2
    in that of merges.txt: raises ValueError where they differ."""
    alphabet = {name: byte for byte, name in byte_names().items()}
    made = [m.replace(" ", "") for m in merges if m and not m.startswith("#version")]
    differing = {*alphabet, *made} ^ (set(vocab) - {END_OF_TEXT})
    differing |= {token for token in made if not set(token) <= alphabet.keys()}
    ids = [vocab.get(token, -1) for token in made]
    if differing or ids != sorted(ids):
        shown = str(sorted(differing)[:3] or "the order")[:200]
        raise ValueError(
            f"{folder}: vocab.json and merges.txt do not belong together (expected: the 256 bytes "
            f"and the merges in their order; differing: {shown})"
        )
    return {bytes(alphabet[c] for c in t): i for t, i in vocab.items() if t != END_OF_TEXT}


def caption_text(text: str) -> str:
    """Official blip_caption normaliser: lower case, less punctuation, at most 50 words."""
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:50])


def format_box(box: Sequence[float], width: int, height: int) -> str:
    """Pixels (x1, y1, x2, y2) as "{<x1><y1><x2><y2>}" in hundredths of the picture, truncated.
    Raises ValueError for a box more than a hundredth outside."""
    percent = [100 * v / size for v, size in zip(box, (width, height) * 2)]
    if min(percent) < -1 or max(percent) > 101:  # less is rounding by the annotators
        raise ValueError(f"box {list(box)} lies outside the picture of {width}x{height} pixels")
    return "{" + "".join(f"<{min(100, max(0, int(v)))}>" for v in percent) + "}"


def parse_boxes(text: str) -> tuple[list[tuple[int, int, int, int]], int]:
    """Boxes in an answer, ordered and clamped to 0..100, and how many were ignored: those that
    are malformed, unclosed or wholly outside the picture."""
    boxes = []
    for numbers in re.findall(r"\{" + r"\s*<(-?\d{1,9})>\s*" * 4 + r"\}", text):
        (left, right), (top, bottom) = (sorted(map(int, numbers[k::2])) for k in (0, 1))
        if left <= 100 and top <= 100 and right >= 0 and bottom >= 0:
            boxes.append(tuple(min(100, max(0, v)) for v in (left, top, right, bottom)))
    return boxes, text.count("{") - len(boxes)


# ---- prompts ----
class Stage(NamedTuple):
    """What stands around the turns of a stage, and how long answers may be."""

    template: str
    end_sym: str
    max_txt_len: int  # tokens of the answer with its end symbol, and of all later turns


STAGES = {
    1: Stage("{}", "\n", 32),
    2: Stage("{}", "\n", 32),
    3: Stage("###Human: {} ###Assistant: ", "###", 160),
    4: Stage("[INST] {} [/INST]", "###", 1024),
}
OFFICIAL_EVAL_TEMPLATE = "###Human: {}###Assistant: "  # of the official demo and benchmarks
POOLS = {  # the official wordings; "detail" is MiniGPT-4's prompts/alignment.txt
    "detail": (
        "Describe this image in detail.", "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
        "Could you describe the contents of this image for me?"),
    "caption": (
        "Briefly describe this image.", "Provide a concise depiction of this image.",
        "Present a short description of this image.", "Summarize this image in a few words.",
        "A short image caption:", "A short image description:", "A photo of ",
        "An image that shows ", "Write a short description for the image. ",
        "Write a description for the photo.",
        "Provide a description of what is presented in the photo.",
        "Briefly describe the content of the image.",
        "Can you briefly explain what you see in the image?",
        "Could you use a few words to describe what you perceive in the photo?",
        "Please provide a short depiction of the picture.",
        "Using language, provide a short account of the image.",
        "Use a few words to illustrate what is happening in the picture."),
    "grounding": (
        "please describe this image in details", "describe this image as detailed as possible",
        "summarize this image in details",
        "give a thorough description of what you see in this image"),
    "vqa": ("{}", "Based on the image, respond to this question with a short answer: {}"),
    "refer": (
        "{}", "give me the location of {}", "where is {} ?",
        "from this image, tell me the location of {}", "the location of {} is",
        "could you tell me the location for {} ?", "where can I locate the {} ?"),
    "identify": (
        "{}", "what object is in this location {}",
        "identify the object present at this location {}", "what is it in {}",
        "describe this object in {}", "this {} is", "the object in {} is"),
    "detection": ("{}",), "instruct": ("{}",), "chat": ("{}",),
}  # fmt: skip


def instruction(task: str, text: str = "", rng: random.Random | None = None) -> str:
    """`text` in the words of its task and with its tag; without rng always in the same words."""
    fixed = 1 if task in ("refer", "identify") else 0  # 0 would be the bare phrase
    words = (rng.choice(POOLS[task]) if rng else POOLS[task][fixed]).format(text)
    return words if task in ("detail", "instruct", "chat") else f"[{task}] {words}"


def user_turn(
    text: str, stage: int, image: bool, first: bool = True, official: bool = False
) -> str:
    """A turn of the user in its stage's template; the first one follows the picture, if any.

    Stages 1 and 2 know only the bare picture. A stage 4 turn about a picture ends with a space in
    the official data, so that two stand before [/INST].
    """
    if stage <= 2:
        return IMAGE_PLACEHOLDER
    text = f"<Img>{IMAGE_PLACEHOLDER}</Img> {text}" if image and first else text
    if official:
        return OFFICIAL_EVAL_TEMPLATE.format(text)
    return STAGES[stage].template.format(text + " " if image and stage == 4 else text)


def check_request(task: str, text: str, stage: int, official: bool = False) -> None:
    """Raises ValueError for a task or text that `inference_prompt` has no prompt for."""
    if task not in POOLS:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(POOLS)}")
    textless = "caption" in EXAMPLES[task]  # what such a record needs is an answer alone
    is_normalized = task in ("vqa", "refer") and not official
    if bool((caption_text(text) if is_normalized else text).strip()) == textless:
        told = "takes no text" if textless else f"needs a text with words in it, not {text!r}"
        raise ValueError(f"task {task} {told}")
    if IMAGE_PLACEHOLDER in text:
        raise ValueError(f"{IMAGE_PLACEHOLDER} stands for a picture and cannot be part of a text")
    if stage <= 2 and task not in ("caption", "detail"):
        raise ValueError(f"stage {stage} only learns to caption; task {task} needs stage 3 or 4")
    if task == "identify" and len(parse_boxes(text)[0]) != 1:
        raise ValueError(f"task identify needs one box like {{<10><20><50><60>}}, not {text!r}")


def inference_prompt(task: str, text: str, stage: int, official: bool = False) -> str:
    """The prompt for one picture, worded as in training.

    text: the question, phrase, prompt or box ("{<x1><y1><x2><y2>}"); "" for caption, detail and
    grounding. official: use the template of the official demo and benchmarks, and `text` as it is.
    Raises what `check_request` does, and warns where only a part of a text counts.
    """
    check_request(task, text, stage, official)
    if stage == 3 and task == "caption":
        task = "detail"  # stage 3 knows no other request for a description
    if task in ("vqa", "refer") and not official:
        if len(text.split()) > 50:
            warnings.warn("only the first 50 words of what was asked count, as in training")
        text = caption_text(text)
    return user_turn(instruction(task, text), stage, image=True, official=official)


# ---- records ----
BOX_RECORD = {"image": "a.jpg", "phrase": "the dog", "boxes": [[100, 200, 500, 600]]}
EXAMPLES = {  # of the fields that each task needs; chat and instruct may have an image, too
    "caption": {"image": "a.jpg", "caption": "a dog on a sofa"},
    "detail": {"image": "a.jpg", "caption": "A dog lies on a red sofa. It sleeps."},
    "grounding": {"image": "a.jpg", "caption": "<p>A dog</p> {<10><20><50><60>} sleeps."},
    "vqa": {"image": "a.jpg", "question": "what is this?", "answers": ["dog"]},
    "refer": BOX_RECORD, "identify": BOX_RECORD, "detection": BOX_RECORD,
    "chat": {"turns": [["What is this?", "A dog."]]},
    "instruct": {"prompt": "Name a color.", "answer": "Red."},
}
Turns = list[tuple[str, str]]  # prompt and answer of each turn; pictures are in the first prompt


def validate_record(record: dict, where: str) -> None:
    """Raises ValueError, beginning with `where`, unless the record has all that its task needs."""
    task = record.get("task") if isinstance(record, dict) else None
    if task not in EXAMPLES:
        raise ValueError(f'{where}: "task" must be one of {", ".join(EXAMPLES)}, not {task!r:.80}')
    normalize = str.strip if task in ("chat", "instruct") else caption_text
    needed = EXAMPLES[task] | ({"image": "a.jpg"} if "image" in record else {})
    for key, example in needed.items():
        if not _is_like(value := record.get(key), example, normalize):
            raise ValueError(f'{where}: "{key}" must be like {json.dumps(example)}, with nothing '
                             f"empty, not {value!r:.80}")  # fmt: skip
    for x1, y1, x2, y2 in record["boxes"] if "boxes" in needed else ():
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise ValueError(f"{where}: box {[x1, y1, x2, y2]} is reversed, empty or off the image")


def _is_like(value: object, example: object, normalize: Callable[[str], str]) -> bool:
    """Whether the value is built like the example, and no text in it is empty once normalized as
    its task does it."""
    if isinstance(example, str):
        return isinstance(value, str) and normalize(value) != "" and IMAGE_PLACEHOLDER not in value
    if isinstance(example, list):  # an example with one item stands for any number of them
        fits = isinstance(value, list) and len(value) > 0 and len(example) in (1, len(value))
        return fits and all(_is_like(item, example[0], normalize) for item in value)
    return type(value) in (int, float) and abs(value) < 1e9


LONGEST_LINE = 2**24  # bytes; a file without line breaks must not be read as one line


class RecordFile(Sequence):
    """Records of a JSON Lines file, each read when it is asked for: some files have millions."""

    def __init__(self, path: Path, starts: Sequence[int]):
        self.path, self.starts = path, starts  # where in the file each record begins

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, n: int) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.starts[n])  # checked again: the file may have changed since
            line = file.readline(LONGEST_LINE)
        return _read_record(line, str(self.path), self.path.parent, set())


def read_records(path: str | Path) -> RecordFile:
    """Records of a JSON Lines file, their image paths joined to its folder.

    The whole file is checked first: ValueError names up to five bad lines. A picture must exist
    and lie in the folder of the file or below it.
    """
    starts, start, bad, reasons, pictures = array("q"), 0, 0, [], set()
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            try:
                if line.strip():
                    _read_record(line, f"line {number}", Path(path).parent, pictures)
                    starts.append(start)
            except ValueError as error:
                bad += 1
                reasons += [str(error)] * (bad <= 5)
            start += len(line)
    if bad or not starts:
        told = "; ".join(reasons) or "there are no records in it"
        raise ValueError(f"{path} has {bad} bad lines: {told}")
    return RecordFile(Path(path), starts)


def _read_record(line: bytes, where: str, folder: Path, pictures: set[str]) -> dict:
    """pictures: those that were looked for and found, to which the record's is added."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # a BOM may stand before the first
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON in UTF-8 ({error})") from error
    validate_record(record, where)
    if "image" in record:
        name, record["image"] = record["image"], str(folder / record["image"])
        outside = os.path.isabs(name) or os.path.normpath(name).startswith("..")
        if name not in pictures and (outside or not os.path.isfile(record["image"])):
            raise ValueError(
                f"{where}: the image {name!r:.200} is not in the folder of the file or below"
            )
        pictures.add(name)
    return record


def read_folder(path: str | Path) -> list[dict]:
    """Caption records of the pictures in a folder or below it: a.txt tells what is in a.jpg.

    ValueError names up to five pictures and texts that lack the other, or have nothing to say.
    """
    files = sorted(file for file in Path(path).rglob("*") if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
    alone = texts.keys() - {picture.with_suffix("") for picture in pictures}
    records, errors = [], [f"{texts[stem]} has no picture beside it" for stem in sorted(alone)]
    for picture in pictures:
        text = texts.get(picture.with_suffix(""))
        if text is None:
            errors.append(f"{picture} has no .txt beside it")
            continue
        try:
            caption = text.read_text("utf-8-sig").strip()
            records.append({"image": str(picture), "task": "caption", "caption": caption})
            validate_record(records[-1], "its record")
        except ValueError as error:
            errors.append(f"{text}: {error}")
    if errors or not records:
        reasons = "; ".join(errors[:5]) or "there are no pictures in it"
        raise ValueError(f"{path} has {len(errors)} bad pictures or texts: {reasons}")
    return records


def make_sample(
    record: dict, stage: int, rng: random.Random, size: tuple[int, int] | None = None
) -> Turns:
    """Prompts and answers of a record in its stage. size: (width, height) of its picture, if any.

    As in the official data, `caption_text` is applied to all captions of stages 1 and 2, and to
    those of task caption in stage 4; in stages 3 and 4 to vqa and to the phrases of refer and
    identify. All else stays as it is. Raises ValueError for a task that the stage does not have,
    and for a box outside the picture.
    """
    task, image = record["task"], size is not None
    if stage <= 2 and task not in ("caption", "detail"):
        raise ValueError(f"stage {stage} trains on captions; task {task} needs stage 3 or 4")
    if stage <= 2:
        return [(user_turn("", stage, image), caption_text(record["caption"]))]
    turns = plain_turns(record, stage, rng, size)
    return [(user_turn(q, stage, image, n == 0), a) for n, (q, a) in enumerate(turns)]


def plain_turns(
    record: dict, stage: int, rng: random.Random, size: tuple[int, int] | None = None
) -> Turns:
    """Questions and answers of `make_sample`, tagged, but not yet in the stage's template. Raises
    ValueError for a box outside the picture."""
    task = record["task"]
    if task == "chat":
        return [(instruction(task, question), answer) for question, answer in record["turns"]]
    if task == "instruct":
        return [(instruction(task, record["prompt"]), record["answer"])]
    if task == "vqa":
        answer = caption_text(rng.choice(record["answers"]))
        return [(instruction(task, caption_text(record["question"]), rng), answer)]
    if task in ("refer", "identify", "detection"):
        boxes, phrase = [format_box(box, *size) for box in record["boxes"]], record["phrase"]
        return [_box_question(task, phrase, "<delim>".join(boxes), rng)]
    if task == "caption" and stage == 4:
        return [(instruction(task, rng=rng), caption_text(record["caption"]))]
    # stage 3 knows one kind of description only
    asked = instruction("detail" if task == "caption" else task, rng=rng)
    return [(asked, record["caption"])]


def _box_question(task: str, phrase: str, boxes: str, rng: random.Random) -> tuple[str, str]:
    if task == "detection":
        return instruction(task, phrase), f"<p>{phrase}</p> {boxes}"
    if task == "identify":
        return instruction(task, boxes, rng), caption_text(phrase)
    return instruction(task, caption_text(phrase), rng), boxes


# ---- rows and batches ----
def encode_prompt(
    prompt: str, tokenizer: Tokenizer, num_queries: int, num_images: int
) -> list[int]:
    """Ids of a prompt, without BOS. The texts between its pictures are tokenised one by one. Raises
    ValueError unless there are as many <ImageHere> as images."""
    texts = prompt.split(IMAGE_PLACEHOLDER)
    if len(texts) - 1 != num_images:
        raise ValueError(f"{len(texts) - 1} {IMAGE_PLACEHOLDER} in the prompt, {num_images} images")
    ids = tokenizer.encode(texts[0])
    for text in texts[1:]:
        ids += [IMAGE_TOKEN_ID] * num_queries + tokenizer.encode(text)
    return ids


def encode_sample(
    turns: Turns, tokenizer: Tokenizer, num_images: int, num_queries: int, max_txt_len: int,
    end_sym: str, max_length: int = 2048, mask_later_bos: bool = False,
) -> dict:  # fmt: skip
    """One row: input_ids, labels, attention_mask, each (T,) int64, and truncated, 0 or 1.

    All after the first prompt is cut at max_txt_len tokens, end symbol included (official code).
    mask_later_bos: hide the BOS of later turns, which the official code takes for padding.
    Raises ValueError past max_length tokens.
    """
    bos = tokenizer.bos_token_id
    prompt = [bos] + encode_prompt(turns[0][0], tokenizer, num_queries, num_images)
    ids, labels = [], []
    for n, (question, answer) in enumerate(turns):
        asked = [bos] + tokenizer.encode(question) if n > 0 else []
        answered = tokenizer.encode(answer + end_sym)
        ids += asked + answered
        labels += [IGNORE] * len(asked) + answered
    truncated = int(len(ids) > max_txt_len)
    ids = prompt + ids[:max_txt_len]
    labels = [IGNORE] * len(prompt) + labels[:max_txt_len]
    if len(ids) > max_length:
        raise ValueError(f"{len(ids)} tokens, pictures included, but {max_length} fit")
    mask = [int(n == 0 or i != bos or not mask_later_bos) for n, i in enumerate(ids)]
    row = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {key: torch.tensor(value) for key, value in row.items()} | {"truncated": truncated}


class RowSettings(NamedTuple):
    """What the rows of a run depend on beside their records."""

    stage: int
    tokenizer: Tokenizer
    image_size: int
    num_queries: int
    max_length: int = 2048  # of a row, in tokens: the language model has no more positions


def encode_text(
    record: dict, size: tuple[int, int] | None, rng: random.Random, settings: RowSettings
) -> dict:
    """`encode_sample` of a record. size: (width, height) of its picture, if any. Raises what that
    and `make_sample` do."""
    stage = STAGES[settings.stage]
    return encode_sample(
        make_sample(record, settings.stage, rng, size), settings.tokenizer, int(size is not None),
        settings.num_queries, stage.max_txt_len, stage.end_sym, settings.max_length,
    )  # fmt: skip


def encode_record(
    record: dict, image: Image.Image | None, rng: random.Random, settings: RowSettings
) -> dict:
    """`encode_text` of a record, and raises what that does; with pixel_values (1, 3, S, S) if it
    has a picture."""
    row = encode_text(record, image and image.size, rng, settings)
    if image is not None:
        row["pixel_values"] = preprocess(image, settings.image_size)[None]
    return row


def collate(rows: list[dict], pad_id: int) -> dict:
    """Rows as a batch, padded on the right to the longest (B, T), and pixel_values (number of
    pictures, 3, S, S) in their order, if any. truncated: the number of answers that were cut.
    skipped: why records were passed over, one text for each.
    """
    batch: dict = {}
    for key, fill in (("input_ids", pad_id), ("labels", IGNORE), ("attention_mask", 0)):
        batch[key] = pad_sequence([row[key] for row in rows], True, fill)  # (B, T)
    if pixels := [row["pixel_values"] for row in rows if "pixel_values" in row]:
        batch["pixel_values"] = torch.cat(pixels)
    batch["truncated"] = sum(row["truncated"] for row in rows)
    batch["skipped"] = [reason for row in rows for reason in row.get("skipped", [])]
    return batch


def left_pad_collate(prompts: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (B, T) of prompts, padded on the left for generation."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0, "left")
    return {"input_ids": pad_sequence(ids, True, pad_id, "left"), "attention_mask": mask}


# ---- streams ----
class RecordDataset(Dataset):
    """Rows of records, for ever: position p is place p % n of epoch p // n.

    Order and wording depend on seed and position alone, so that is all a resumed run needs. A
    record that cannot be used is replaced by the next; "skipped" in the row says why.
    """

    def __init__(self, records: Sequence[dict], settings: RowSettings, seed: int = 0):
        self.records, self.settings, self.seed = records, settings, seed
        self._epoch, self._order = -1, np.empty(0)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, position: int) -> dict:
        return usable_row(self._row, range(position, position + 20))

    def _row(self, position: int) -> dict:
        epoch, place = divmod(position, len(self.records))
        if epoch != self._epoch:
            self._epoch = epoch
            draw = np.random.default_rng((self.seed, self.settings.stage, epoch))
            self._order = draw.permutation(len(self))
        record = self.records[self._order[place]]
        image = load_image(record["image"]) if "image" in record else None
        rng = random.Random(f"{self.seed} {position}")
        return encode_record(record, image, rng, self.settings)


def usable_row(row_of: Callable[[int], dict], positions: Sequence[int]) -> dict:
    """The row of the first position that has one; its "skipped" says why those before have not:
    what ValueError row_of raised. Raises it, too, if none has one."""
    skipped: list[str] = []
    for position in positions:
        try:
            return row_of(position) | {"skipped": skipped}
        except ValueError as error:
            skipped.append(str(error))
    raise ValueError(f"{len(skipped)} records in a row cannot be used; the first: {skipped[0]}")
