"""What counts as right in the paper's benchmarks. Nothing here knows the model.

Two scores stand side by side: that of the official script, which mostly is content with an answer
that contains the right one, and a strict one, for which the whole answer is right or wrong.

    is_same, share_of_annotators    the strict rule
    score_label, ...                an answer and what is true -> official score, strict score
    vqa_accuracy                    the accuracy of VQA, which OKVQA is scored by

Source of the official rules: eval_vqa.py and eval_scripts/eval_ref.py of TinyGPT-V; of IconQA
eval_scripts/eval_vqa.py, as the other splits the choices wrongly. VQA: vqaEval.py of the VQA
challenge, in the copy that MiniGPT-4 brings.
"""

import re

from data import caption_text
from experiments.scores import iou, only_boxes

Scores = tuple[float, float]


def cut(said: str) -> str:
    """The first turn of what was said."""
    return said.split("###")[0].split("Assistant:")[-1].strip()


def is_same(said: str, true: str) -> bool:
    """The strict rule: the whole answer, but for case and punctuation. Nothing is never right."""
    return caption_text(cut(said)) == caption_text(true) != ""


def share_of_annotators(said: str, truths: list[str]) -> float:
    """The strict rule where several people have answered: three of them are enough."""
    return min(sum(is_same(said, true) for true in truths) / 3, 1)


def score_label(said: str, true: str) -> Scores:
    """GQA, VSR. Officially all 20 tokens are searched, beyond "###", and labels keep their case.
    VSR's "yes" is not "true": eval_scripts/eval_vqa.py, which counts it, is not followed."""
    return float(true in said.lower()), float(is_same(said, true))


def score_choice(said: int, truth: tuple[list[str], int]) -> Scores:
    """IconQA: nothing is worded, and both rules agree."""
    return (float(said == truth[1]),) * 2


def score_vizwiz(said: str, truths: list[str]) -> Scores:
    """Officially three annotators suffice whose answer contains what was said, or is contained in
    it. So nothing said is always right; and an annotator's answer with "_" counts as two."""
    text = cut(said).lower()
    count = sum(true in text or text in true for true in "_".join(truths).lower().split("_"))
    return min(count / 3, 1), share_of_annotators(said, truths)


def score_yes_no(said: str, true: str) -> Scores:
    """Hateful Memes. Officially "yes" anywhere, even in "eyes", goes before "no", even in "not"."""
    text = cut(said).lower()
    heard = next((word for word in ("yes", "no") if word in text), "")
    return float(heard == true), float(is_same(said, true))


def score_okvqa(said: str, truths: list[str]) -> Scores:
    """Officially "Assistant:" is looked for in what has become lower case, and never found."""
    text = said.lower().split("###")[0].strip()
    return vqa_accuracy(text, truths), share_of_annotators(said, truths)


def score_box(said: str, truth: tuple[list[float], int, int]) -> Scores:
    """RefCOCO. Officially the answer begins with a box and has no other number; the pixels on the
    edges of a box count as inside. Strictly it is a box and nothing else. truth: left, top, width
    and height of the box in pixels; width and height of the picture."""
    (x, y, box_width, box_height), width, height = truth
    true = (x, y, x + box_width, y + box_height)
    text, right = said.replace(" ", ""), False
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if re.match(r"\{(<\d{1,3}>){4}\}", text) and len(numbers) == 4:
        box = tuple(n / 100 * side for n, side in zip(numbers, (width, height) * 2))
        right = pixel_iou(box, true) > 0.5
    boxes = only_boxes(cut(said))
    percent = tuple(100 * v / side for v, side in zip(true, (width, height) * 2))
    return float(right), float(len(boxes) == 1 and iou(boxes[0], percent) > 0.5)


def pixel_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Official computeIoU: a box from pixel 3 to pixel 5 is three pixels wide."""
    width, height = (max(0, min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1) for k in (0, 1))
    areas = [(x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height) if width * height else 0.0


# ---- the accuracy of VQA ----
PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
          "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}  # fmt: skip
ARTICLES = ("a", "an", "the")
CONTRACTIONS = {  # misspelled -> spelled: whatever lacks one of its apostrophes
    word[:n] + word[n + 1 :]: word
    for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
        hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
        mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at
        shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
        someone'd someone'd've someone'll someone's something'd something'd've something'll that's
        there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
        we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
        who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
        y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
    for n, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round


def without_punctuation(text: str) -> str:
    """Marks beside a space go, others become a space; all go where a comma parts two digits.

    Of the periods before anything but a digit the first 32 go: the official code passes re.UNICODE,
    which is 32, where re.sub expects how many.
    """
    has_number = re.search(r"\d,\d", text)
    result = text
    for mark in PUNCTUATION:
        goes = has_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if goes else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalized(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes where they belong."""
    words = [DIGITS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, truths: list[str]) -> float:
    """How many of the annotators agree, three or more being all: the mean over every choice of one
    annotator to be left out. Nothing is normalised where all of them say the same."""
    answer, *truths = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *truths))
    if len(set(truths)) > 1:
        answer, *truths = map(normalized, (answer, *truths))
    agree = [truth.lower() == answer.lower() for truth in truths]
    return sum(min(1, (sum(agree) - one) / 3) for one in agree) / len(agree)
