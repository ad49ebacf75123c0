"""A conversation about a picture, on standard input and output: generate.py --chat.

    Conversation    what has been said, as stage 4 is trained to read it
    chat            lines in, answers out

What is typed goes to the model as it is, like the questions of the official conversations; after a
task's tag, as in "[refer] the red star", in that task's words. Only answers go to standard output.
"""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from data import IMAGE_PLACEHOLDER, POOLS, STAGES, encode_prompt, inference_prompt, load_image
from experiments.pictures import check_picture_name, draw_answer
from generate import Answer, Sampling, encode_images, stream_answers
from model import TinyGPTV

COMMANDS = """\
    /image FILE   goes on to another picture, with nothing said yet
    /reset        forgets what was said
    /draw [FILE]  draws the boxes of the last answer on the picture (boxes.png)
    /quit         ends the chat, as Ctrl-D does; Ctrl-C ends an answer"""
MISUSED = {
    "/image": "needs the file of a picture, as in /image b.png",
    "/reset": "takes nothing after it", "/quit": "takes nothing after it",
}  # fmt: skip


# A line without a tag is the task chat: it goes to the model as it is.
TAGGED = re.compile(rf"\[({'|'.join(POOLS)})\]\s*(.*)")


def parse_task(line: str) -> tuple[str, str]:
    """ "[refer] the star" -> refer and "the star"; chat and the line if there is no tag."""
    match = TAGGED.fullmatch(line)
    return (match[1], match[2]) if match else ("chat", line)


class Turn(NamedTuple):
    """A question that was answered."""

    line: str  # as typed
    prompt: str  # what the model reads of it
    answer: str


class Conversation:
    """Several turns about one picture, which is looked at once."""

    def __init__(
        self, model: TinyGPTV, image: Image.Image, sampling: Sampling, max_new_tokens: int
    ):
        """max_new_tokens: of each answer. Raises ValueError for a stage that knows no questions."""
        if model.stage < 3:
            raise ValueError(f"stage {model.stage} only learns to caption; --chat needs 3 or 4")
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.look_at(image)

    def look_at(self, image: Image.Image) -> None:
        """Begins anew with another picture."""
        self.image_embeds = encode_images(self.model, [image])  # (1, num_queries, hidden_size)
        self.image, self.turns = image, []

    def prompt(self, line: str) -> str:
        """A question in its template. Only the first one follows the picture. Raises ValueError
        for one that can't be asked."""
        prompt = inference_prompt(*parse_task(line), self.model.stage)
        return prompt.replace(f"<Img>{IMAGE_PLACEHOLDER}</Img> ", "") if self.turns else prompt

    def input_ids(self, prompt: str) -> list[int]:
        """All that was said, and a new prompt: the row that `data.encode_sample` makes of it for
        training. Each turn begins with BOS, each answer ends with the stage's symbol."""
        tokenizer, num_queries = self.model.tokenizer, self.model.config.qformer.num_queries
        ids: list[int] = []
        for n, asked in enumerate([*(turn.prompt for turn in self.turns), prompt]):
            if n > 0:
                ids += tokenizer.encode(self.turns[n - 1].answer + STAGES[self.model.stage].end_sym)
            ids += [tokenizer.bos_token_id]
            ids += encode_prompt(asked, tokenizer, num_queries, num_images=int(n == 0))
        return ids

    def ask(self, line: str, write: Callable[[str], None]) -> None:
        """Hands the answer to `write`, piece by piece, and a newline at its end; that alone if
        there is no answer. One that is interrupted counts as far as it was said. Raises ValueError
        for a question that can't be asked, or for which there are no positions left."""
        model = self.model
        answer = Answer(model.tokenizer, STAGES[model.stage].end_sym)
        try:
            prompt = self.prompt(line)
            batch = self.embedded(prompt)
            stream = stream_answers(model, batch, [answer], self.max_new_tokens, self.sampling)
            for (piece,) in stream:
                write(piece + "\n" * answer.finished)  # before a warning that it was cut
        finally:
            if not answer.finished:
                write("\n")
            if answer.shown:
                self.turns.append(Turn(line, prompt, answer.shown))
        if not answer.shown:
            warnings.warn("the answer is empty; this question does not count as asked")

    @torch.inference_mode()
    def embedded(self, prompt: str) -> tuple[Tensor, Tensor]:
        """All that was said, and a new prompt, for `stream_answers`: inputs_embeds (1, T,
        hidden_size) and attention_mask (1, T). Raises ValueError if there are fewer positions."""
        ids = torch.tensor([self.input_ids(prompt)], device=self.image_embeds.device)
        positions = self.model.phi.config.max_position_embeddings
        if ids.shape[1] > positions:
            raise ValueError(f"with this question, the conversation takes {ids.shape[1]} positions "
                             f"and the model has {positions}; /reset forgets it")  # fmt: skip
        return self.model.phi.embed(ids, self.image_embeds), torch.ones_like(ids)


# ---- the terminal ----
def read_lines() -> Iterator[str]:
    """What is typed, or comes through a pipe. Ctrl-C at the prompt only begins a new line."""
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("(/quit or Ctrl-D ends the chat)", file=sys.stderr)
            continue
        if line == "/quit":
            return
        if line:
            yield line


def obey(conversation: Conversation, line: str) -> None:
    """A command. Raises ValueError or OSError for what can't be done."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command == "/image" and argument:
        conversation.look_at(load_image(argument))
    elif line == "/reset":
        conversation.turns.clear()
    elif command == "/draw" and conversation.turns:
        path, turn = Path(argument or "boxes.png"), conversation.turns[-1]
        check_picture_name(f"/draw {path}", path)
        draw_answer(conversation.image, path, *parse_task(turn.line), turn.answer)
        print(f"drawn: {path}", file=sys.stderr)
    elif command == "/draw":
        raise ValueError("/draw: there is no answer yet")
    elif command in MISUSED:
        raise ValueError(f"{command} {MISUSED[command]}")
    else:
        raise ValueError(f"{line}: no such command; there are\n{COMMANDS}")


def chat(model: TinyGPTV, image: Image.Image, sampling: Sampling, max_new_tokens: int) -> None:
    """Answers each line of standard input by a line, or does what it says; a mistake is told and
    the chat goes on. Ctrl-C ends an answer only. Raises ValueError for a stage that knows no
    questions."""
    conversation = Conversation(model, image, sampling, max_new_tokens)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text is no reason to end
    if sys.stdin.isatty():
        print(f"Ask about the picture.\n{COMMANDS}", file=sys.stderr)
    for line in read_lines():
        try:
            if line.startswith("/"):
                obey(conversation, line)
            else:
                conversation.ask(line, lambda piece: print(piece, end="", flush=True))
        except KeyboardInterrupt:
            print("note: stopped", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
