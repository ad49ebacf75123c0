"""Asking the model: a picture and a prompt go in, text comes out, piece by piece.

    python generate.py --img x.jpg
    python generate.py --img x.jpg --ask "what color is the star?"
    python generate.py --img x.jpg --task refer --ask "the red star" --draw out.png
    python generate.py --img x.jpg --attn out.png
    python generate.py --img x.jpg --chat

Read it from the leaves to the root:

    Sampling       from scores to the next token
    Answer         from tokens to text, and where it ends
    generate_ids   the loop: the whole prompt at once, then one token at a time
    generate       one prompt, as a stream; `answer` is its twin for a batch; both lead through
                   start_answers and stream_answers to the loop
    main           the command line

Boxes and attention are drawn by experiments/pictures.py, a chat is held by experiments/chat.py.
"""

import argparse
import codecs
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import STAGES, Tokenizer, check_request, encode_prompt, inference_prompt
from data import left_pad_collate, load_image, preprocess
from experiments.command_line import Parser, check_device, exit_code
from experiments.pictures import answer_attention, boxes_of, check_picture_name
from experiments.pictures import draw_answer, draw_attention
from model import DTYPES, KVCache, Phi, TinyGPTV, autocast


# ---- sampling ----
@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are greedy: always the most probable one.

    Raises ValueError for a value out of its range; within the ranges at least one token is always
    left.
    """

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        ranges = {  # what makes sense and what scores in fp32 survive
            "temperature": (self.temperature == 0 or 0.01 <= self.temperature <= 100,
                            "0, which is greedy, or from 0.01 to 100"),
            "top_k": (self.top_k >= 0, "1 or more, or 0 to keep all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        }  # fmt: skip
        for name, (fits, allowed) in ranges.items():
            if not fits:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)}")


def penalize_repetition(scores: Tensor, history: Tensor, penalty: float) -> Tensor:
    """Makes the ids of `history` (B, n) less probable in scores (B, V), once for all times that
    they occur: positive scores are divided (CTRL, arXiv 1909.05858), others multiplied."""
    said = torch.zeros_like(scores, dtype=torch.bool).scatter(1, history, True)  # (B, V)
    return torch.where(said, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def keep_top_k(scores: Tensor, k: int) -> Tensor:
    """Keeps the k highest scores of each row of (B, V), and whatever equals the k-th."""
    lowest = scores.topk(min(k, scores.shape[-1])).values[:, -1:]  # (B, 1)
    return scores.masked_fill(scores < lowest, float("-inf"))


def keep_top_p(scores: Tensor, p: float) -> Tensor:
    """Keeps the fewest most probable ids of each row of (B, V), whose probabilities add up to at
    least p."""
    ordered, ids = scores.sort(descending=True, stable=True)
    reached = ordered.softmax(dim=-1).cumsum(dim=-1) >= p
    ordered[:, 1:] = ordered[:, 1:].masked_fill(reached[:, :-1], float("-inf"))
    return torch.empty_like(scores).scatter(1, ids, ordered)


def process_scores(scores: Tensor, history: Tensor, sampling: Sampling) -> Tensor:
    """What sampling makes of the model's scores (B, V), whose softmax the next ids are drawn from.

    They are divided by the temperature: below 1 the probable ids become more probable still, above
    1 all become more alike.
    """
    if sampling.repetition_penalty != 1:
        scores = penalize_repetition(scores, history, sampling.repetition_penalty)
    if sampling.temperature > 0:
        scores = scores / sampling.temperature
        if sampling.top_k > 0:
            scores = keep_top_k(scores, sampling.top_k)
        if sampling.top_p < 1:
            scores = keep_top_p(scores, sampling.top_p)
    return scores


# ---- text, and the end of an answer ----
class StreamDecoder:
    """Text of ids that come one by one, held back until its UTF-8 characters are complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that one more token completes; the end token has none."""
        is_end = token_id == self.tokenizer.eos_token_id
        return "" if is_end else self.utf8.decode(self.tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left at the end: "" or U+FFFD for an unfinished character."""
        return self.utf8.decode(b"", final=True)


class Answer:
    """The text of one answer as its tokens come, stripped, and cut where `stop` begins.

    The end is looked for in the text, because several spellings in tokens give the same "###".
    What may yet turn out to be its beginning is held back. stop_id: an id that ends it as well.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str, stop_id: int = -1):
        self.decoder = StreamDecoder(tokenizer)
        self.stop, self.stop_id = stop, stop_id
        self.received = self.shown = ""
        self.finished = self.cut = False

    def push(self, token_id: int) -> str:
        """The text that one more token makes certain, often none."""
        if self.finished or token_id == self.stop_id:
            return self.close(cut=False)
        self.received += self.decoder.push(token_id)
        if self.stop and self.stop in self.received:
            self.finished, self.received = True, self.received.split(self.stop)[0]
            return self._show("")
        beginnings = (self.stop[:n] for n in range(len(self.stop) - 1, 0, -1))
        return self._show(next(filter(self.received.endswith, beginnings), ""))

    def close(self, cut: bool = True) -> str:
        """What was held back, when no more tokens come. cut: the model had not ended it."""
        if not self.finished:
            self.finished, self.cut = True, cut
            self.received += self.decoder.flush()
        return self._show("")

    def _show(self, held: str) -> str:
        text = self.received.removesuffix(held).strip()
        piece = text[len(self.shown) :]
        self.shown = text
        return piece


# ---- the loop ----
@torch.inference_mode()
def generate_ids(
    phi: Phi, inputs_embeds: Tensor, attention_mask: Tensor, max_new_tokens: int,
    sampling: Sampling = Sampling(), num_ids: int | None = None, history: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields, step by step, the next id of every row (B,) and the scores (B, vocab_size) it was
    taken from, after all that `sampling` does to them.

    inputs_embeds (B, T, hidden_size), attention_mask (B, T): the prompts, padded on the left.
    num_ids: ids from there on are never drawn, for they have no text. history (B, n): ids that
    count as said already. The first step computes the whole prompt, each later one a token. Ends
    after max_new_tokens, or when the positions are used up; whoever reads the ids may stop earlier.
    Rows do not influence each other. Raises ValueError for max_new_tokens below 1, for a prompt
    that the positions do not hold, and for scores that are not finite.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {max_new_tokens}")
    B, T, _ = inputs_embeds.shape
    device = inputs_embeds.device
    # The last token is never fed. A prompt that does not fit is left for Phi to refuse.
    steps = max(1, min(max_new_tokens, phi.config.max_position_embeddings - T + 1))
    weight = phi.lm_head.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    cache = KVCache(phi.config, B, T + steps - 1, device, dtype)
    generator = torch.Generator(device).manual_seed(sampling.seed)
    ids = attention_mask.new_empty(B, 0) if history is None else history
    position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # padding takes no positions
    is_padded = not attention_mask.all()
    for _ in range(steps):
        with autocast(weight):
            mask = attention_mask if is_padded else None
            hidden = phi(inputs_embeds, mask, position_ids, cache)
            scores = phi.lm_head(hidden[:, -1]).float()  # (B, vocab_size)
        if not scores.isfinite().all():
            raise ValueError("the model's scores are not finite: its products are too large for "
                             "fp16 (use bf16 or fp32), or its weights damaged")  # fmt: skip
        scores[:, num_ids or scores.shape[1] :] = float("-inf")
        scores = process_scores(scores, ids, sampling)
        if sampling.temperature == 0:
            next_ids = scores.argmax(dim=-1)
        else:
            next_ids = scores.softmax(dim=-1).multinomial(1, generator=generator)[:, 0]
        yield next_ids, scores
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
        inputs_embeds = phi.embed(next_ids[:, None])  # (B, 1, hidden_size)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(B, 1)], dim=1)
        position_ids = attention_mask.sum(dim=1, keepdim=True) - 1  # (B, 1)


@torch.inference_mode()
def encode_images(
    model: TinyGPTV, images: Sequence[Image.Image], maps: list[Tensor] | None = None
) -> Tensor | None:
    """What Phi gets to see of the pictures: (num_images, num_queries, hidden_size). One that is
    there several times is looked at once. maps: as in `QFormer`."""
    if not images:
        return None
    distinct = {id(image): image for image in images}
    squares = [preprocess(image, model.image_size) for image in distinct.values()]
    pixel_values = torch.stack(squares).to(model.phi.lm_head.weight.device)
    image_embeds = model.encode_images(pixel_values, maps)
    places = list(distinct)
    return image_embeds[[places.index(id(image)) for image in images]]


@torch.inference_mode()
def prepare(
    model: TinyGPTV, image_embeds: Tensor | None, num_images: Sequence[int],
    prompts: Sequence[str], official: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """inputs_embeds (B, T, hidden_size) and attention_mask (B, T) of prompts, padded on the left.

    image_embeds: all their pictures, encoded; num_images: how many are whose, as many as each has
    <ImageHere>. Each prompt begins with BOS, as in training, but not if `official`: the official
    demo and benchmarks leave it out. Raises ValueError unless every prompt has its pictures.
    """
    tokenizer, num_queries = model.tokenizer, model.config.qformer.num_queries
    bos = [] if official else [tokenizer.bos_token_id]
    rows = [bos + encode_prompt(prompt, tokenizer, num_queries, count)
            for prompt, count in zip(prompts, num_images, strict=True)]  # fmt: skip
    batch = left_pad_collate(rows, tokenizer.pad_token_id)
    device = model.phi.lm_head.weight.device
    inputs_embeds = model.phi.embed(batch["input_ids"].to(device), image_embeds)
    return inputs_embeds, batch["attention_mask"].to(device)


def stream_answers(
    model: TinyGPTV, batch: tuple[Tensor, Tensor], answers: Sequence[Answer], max_new_tokens: int,
    sampling: Sampling = Sampling(), history: Tensor | None = None,
) -> Iterator[list[str]]:  # fmt: skip
    """Generates for a batch of `prepare` until every answer is finished; yields, token by token,
    what is new in each. Those that can't be finished are closed as cut; a warning follows their
    last pieces. Raises what `generate_ids` does."""
    num_ids = len(model.tokenizer)
    stream = generate_ids(model.phi, *batch, max_new_tokens, sampling, num_ids, history)
    for steps, (ids, _) in enumerate(stream, 1):
        yield [one.push(token_id) for one, token_id in zip(answers, ids.tolist())]
        if all(one.finished for one in answers):
            return
    cut = sum(not one.finished for one in answers)
    positions = model.phi.config.max_position_embeddings
    limit = "max_new_tokens" if steps == max_new_tokens else f"the model's {positions} positions"
    yield [one.close() for one in answers]
    warnings.warn(f"{cut} of {len(answers)} answers cut after {steps} tokens, because of {limit}")


def start_answers(
    model: TinyGPTV, images: Sequence[Image.Image] | Tensor, num_images: Sequence[int],
    prompts: Sequence[str], sampling: Sampling, max_new_tokens: int, official: bool = False,
) -> tuple[list[Answer], Iterator[list[str]]]:  # fmt: skip
    """The answers to prompts, empty as yet, and the stream that fills them: `generate` tells of
    the arguments, and `prepare` of num_images and of what it raises."""
    tokenizer = model.tokenizer
    image_embeds = images if isinstance(images, Tensor) else encode_images(model, images)
    batch = prepare(model, image_embeds, num_images, prompts, official)
    stop, stop_id = STAGES[max(1, model.stage)].end_sym, -1  # before stage 1: as after it
    if official:  # the benchmarks pass over "###" and end at "#": id 2, of another vocabulary
        stop, stop_id = "", tokenizer.encode("#")[0]
    # They penalise a BOS that was never fed as if it had been said.
    history = batch[1].new_full((len(prompts), int(official)), tokenizer.bos_token_id)
    answers = [Answer(tokenizer, stop, stop_id) for _ in prompts]
    return answers, stream_answers(model, batch, answers, max_new_tokens, sampling, history)


def generate(
    model: TinyGPTV, images: Sequence[Image.Image] | Tensor, prompt: str,
    sampling: Sampling = Sampling(), max_new_tokens: int = 120, official: bool = False,
) -> Iterator[str]:  # fmt: skip
    """Yields the answer to one prompt in pieces of text, as soon as they are certain.

    images: pictures, or what `encode_images` has made of them: a further question about the same
    picture need not look at it again. prompt: with template and one <ImageHere> for each of them
    (`data.inference_prompt`).
    official: prompt without BOS and stop as the official benchmarks do. Raises ValueError when
    prompt and pictures do not fit together or exceed the model's positions.
    """
    _, stream = start_answers(
        model, images, [len(images)], [prompt], sampling, max_new_tokens, official
    )
    for (piece,) in stream:
        if piece:
            yield piece


def answer(
    model: TinyGPTV, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str],
    sampling: Sampling = Sampling(), max_new_tokens: int = 120, official: bool = False,
) -> list[str]:  # fmt: skip
    """The answers to a batch of prompts about one picture each; `generate` in all else. Raises
    ValueError unless there are as many pictures as prompts, and where that does."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts about {len(images)} images; each needs one")
    answers, stream = start_answers(
        model, images, [1] * len(images), prompts, sampling, max_new_tokens, official
    )
    for _ in stream:
        pass  # the answers remember what they were told
    return [one.shown for one in answers]


# ---- command line ----
ASK_FOR = {  # task: what --ask has to be
    "caption": None, "detail": None, "grounding": None, "vqa": "a question", "refer": "a phrase",
    "identify": "a box like {<10><20><50><60>}, in hundredths of the picture",
    "detection": "a phrase",
}  # fmt: skip
BATCH_SIZE = 8  # of many pictures, this many are asked about at once


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises ValueError for what is no option, and names the nearest one."""
    parser = Parser(description="Ask TinyGPT-V about a picture.", allow_abbrev=False)
    add = parser.add_argument
    add("--img", type=Path, required=True, nargs="+", metavar="FILE", help="a picture, or several")
    add("--ask", metavar="TEXT", help="; ".join(f"{t}: {a}" for t, a in ASK_FOR.items() if a))
    add("--task", choices=ASK_FOR, help="vqa if something is asked, else caption")
    add("--draw", type=Path, metavar="FILE", help="write the picture with the boxes on it")
    add("--attn", type=Path, metavar="FILE", help="write where each word of the answer looks")
    add("--attn-queries", action="store_true", help="... and not each word, but each query")
    add("--json", action="store_true", help="a line of JSON for each picture")
    add("--chat", action="store_true", help="ask on standard input, again and again")
    weights = Path(__file__).parent / "miniature" / "weights"
    add("--weights", type=Path, default=weights, metavar="DIR", help="the miniature by default")
    add("--stage", type=int, choices=STAGES, help="of training; the last by default")
    add("--device", choices=("cpu", "cuda", "mps"), default="cpu")
    add("--dtype", choices=DTYPES, help="fp32 by default; for official weights bf16 or fp16")
    add("--int8", action="store_true", help="quantize while loading; once and for all: quantize.py")
    add("--temperature", type=float, default=0.0, help="0, the default: top-k and top-p are idle")
    add("--top-k", type=int, default=0, help="0, the default, keeps all tokens")
    numbers = {"top-p": 1.0, "repetition-penalty": 1.0, "max-new-tokens": 120, "seed": 0}
    for name, default in numbers.items():
        add("--" + name, type=type(default), default=default, help=f"{default} by default")
    return parser.parse(argv)


def request_of(task: str | None, ask: str | None) -> tuple[str, str]:
    """--task and --ask with what is left out: a task, and "" if nothing is asked. Raises ValueError
    where the task needs something."""
    task = task or ("caption" if ask is None else "vqa")
    if ASK_FOR[task] and not (ask or "").strip():
        raise ValueError(f"--task {task} needs --ask with {ASK_FOR[task]}")
    return task, ask or ""


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, or files that can't be written."""
    check_device(arguments.device, "--device ")
    if arguments.device == "cpu" and arguments.dtype == "fp16":
        raise ValueError("--dtype fp16: a CPU multiplies fp16 very slowly; use bf16 or fp32")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {arguments.max_new_tokens}: say 1 or more")
    asked_about, total = {path.resolve() for path in arguments.img}, len(arguments.img)
    for option in ("draw", "attn"):
        if path := getattr(arguments, option):
            check_picture_name(f"--{option} {path}", path)
            if any(numbered(path, n, total).resolve() in asked_about for n in range(total)):
                raise ValueError(f"--{option} {path} would replace a picture that is asked about")
    if arguments.draw and arguments.attn and arguments.draw.resolve() == arguments.attn.resolve():
        raise ValueError(f"--draw and --attn would both write {arguments.draw}")
    if arguments.attn_queries and not arguments.attn:
        raise ValueError("--attn-queries needs --attn FILE")
    if arguments.chat:
        if len(arguments.img) > 1:
            raise ValueError("--chat is about one picture; /image FILE goes on to another")
        for option in ("ask", "task", "draw", "attn", "json"):
            if getattr(arguments, option):
                raise ValueError(f"--chat takes no --{option}")


def numbered(path: Path, n: int, total: int) -> Path:
    """x.png for a single picture; of several, x-1.png for the first, and so on."""
    return path if total == 1 else path.with_stem(f"{path.stem}-{n + 1}")


def as_json(path: Path, size: tuple[int, int], task: str, asked: str, answer: Answer) -> str:
    """A line for scripts, boxes in pixels of the upright picture of size (width, height)."""
    boxes, ignored = boxes_of(task, asked, answer.shown)
    in_pixels = [{"phrase": phrase, "box": [round(v * s / 100) for v, s in zip(box, size * 2)]}
                 for box, phrase in boxes]  # fmt: skip
    return json.dumps({
        "image": str(path), "task": task, "ask": asked, "answer": answer.shown,
        "boxes": in_pixels, "ignored_boxes": ignored, "cut": answer.cut,
    })  # fmt: skip


def ask_about(
    model: TinyGPTV, arguments: argparse.Namespace, first: int, prompt: str, sampling: Sampling
) -> None:
    """Asks about at most BATCH_SIZE pictures, from number `first` on, and shows the answers. That
    about a single picture is printed as it comes."""
    total = len(arguments.img)
    images = [load_image(path) for path in arguments.img[first : first + BATCH_SIZE]]
    num_images, prompts = [1] * len(images), [prompt] * len(images)
    maps: list[Tensor] = []
    image_embeds = encode_images(model, images, maps if arguments.attn else None)
    answers, stream = start_answers(
        model, image_embeds, num_images, prompts, sampling, arguments.max_new_tokens
    )
    for pieces in stream:
        if total == 1 and not arguments.json:
            print(pieces[0], end="\n" * answers[0].finished, flush=True)
    for n, (image, one) in enumerate(zip(images, answers)):
        show(arguments, first + n, image, one)
        if arguments.attn:
            out, embeds = numbered(arguments.attn, first + n, total), image_embeds[n : n + 1]
            words, attention = answer_attention(model, embeds, prompt, one.shown)
            draw_attention(image, out, words, attention, maps[-1][n], arguments.attn_queries)


def show(arguments: argparse.Namespace, number: int, image: Image.Image, answer: Answer) -> None:
    """Prints an answer, unless that was done as it came, and draws its boxes. number: of the
    picture, from 0."""
    task, asked, total = arguments.task, arguments.ask, len(arguments.img)
    if arguments.json:
        print(as_json(arguments.img[number], image.size, task, asked, answer), flush=True)
    elif total > 1:
        print(" ".join(answer.shown.split()), flush=True)
    if arguments.draw:
        draw_answer(image, numbered(arguments.draw, number, total), task, asked, answer.shown)


def run(arguments: argparse.Namespace) -> None:
    """Carries out the command line. All that can be checked is checked before the weights load."""
    check_options(arguments)
    arguments.task, arguments.ask = request_of(arguments.task, arguments.ask)
    check_request(arguments.task, arguments.ask, arguments.stage or 4)
    sampling = Sampling(
        arguments.temperature, arguments.top_k, arguments.top_p,
        arguments.repetition_penalty, arguments.seed,
    )  # fmt: skip
    for path in arguments.img:
        load_image(path)  # again when its turn comes: all of many pictures are too many to keep
    dtype = arguments.dtype and DTYPES[arguments.dtype]
    model = TinyGPTV.from_pretrained(
        arguments.weights, arguments.stage, arguments.device, dtype, arguments.int8
    )
    if model.load_report:
        print(model.load_report, file=sys.stderr)
    if arguments.chat:
        from experiments.chat import chat  # it is built on this file

        return chat(model, load_image(arguments.img[0]), sampling, arguments.max_new_tokens)
    prompt = inference_prompt(arguments.task, arguments.ask, model.stage)
    for first in range(0, len(arguments.img), BATCH_SIZE):
        ask_about(model, arguments, first, prompt, sampling)


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 2 after one line on stderr that says what was wrong, or 130 after Ctrl-C."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
        return exit_code(
            lambda: run(parse_arguments(argv)),
            "use --dtype bf16 or --int8, or --device cpu if it was the GPU's",
        )


if __name__ == "__main__":
    sys.exit(main())
