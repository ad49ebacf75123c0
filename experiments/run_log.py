"""What a training run tells: what lies ahead, a progress bar, log.jsonl, and loss.png, a picture.

    python experiments/run_log.py runs/stage1 runs/stage2 ...     draws their losses side by side
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.command_line import exit_code
from model import TinyGPTV
from official.checkpoints import lock

MAX_BAD_STEPS = 20  # in a row; fp16's loss scale takes up to 16 to settle
MAX_SKIPPED = 0.01  # of the samples, once there were MIN_SAMPLES
MIN_SAMPLES = 1000


def counts_of(micro: list[dict]) -> list[int]:
    """Of a step's micro-batches: samples, tokens, answers that were cut, records skipped."""
    counts = [[len(b["labels"]), int(b["attention_mask"].sum()), b["truncated"], len(b["skipped"])]
            for b in micro]  # fmt: skip
    return [sum(column) for column in zip(*counts)]


def summary(model: TinyGPTV, steps: int, batch_sizes: list[int], precision: str) -> str:
    """How many parameters each part has, how many learn, and what lies ahead."""
    counts = {name: sum(p.numel() for p in part.parameters())
              for name, part in model.named_children()}  # fmt: skip
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    samples = " or ".join(map(str, sorted(set(batch_sizes))))
    return (
        " + ".join(f"{name} {count:,}" for name, count in counts.items())
        + f" = {sum(counts.values()):,} parameters, of which {sum(trainable):,} in "
        f"{len(trainable)} tensors learn; {steps} steps of {samples} samples "
        f"at {model.image_size} pixels, products in {precision}"
    )


class RunLog:
    """Tells a run's progress and keeps count of what went wrong.

    Holds a lock on log.jsonl for as long as it lives. Raises ValueError if the folder holds a run
    (unless `resume`) or one that is still going on. quiet: a process beside the first, which alone
    writes and prints.
    """

    def __init__(self, out: Path, resume: bool, quiet: bool):
        self.out, self.quiet = out, quiet
        self.samples = self.truncated = self.skipped = self.bad_steps = self.bad_in_a_row = 0
        self.waiting = self.waited = self.seconds_before = 0.0
        self.began = self.last = time.perf_counter()
        self.file = None
        if quiet:
            return
        out.mkdir(parents=True, exist_ok=True)
        self.file = open(out / "log.jsonl", "a+", encoding="utf-8")
        lock(self.file, f"another training is writing to {out}; say out=...")
        if not resume and (self.file.tell() or (out / "model.safetensors").exists()):
            way = "go on with it by resume=1, " * (out / "train_state.pt").exists()
            raise ValueError(
                f"{out} holds a run already: {way}say out=... for another folder, or delete it"
            )

    def tell(self, text: str) -> None:
        if text and not self.quiet:
            tqdm.write(text)

    def begin(self, start: int, steps: int, vocab_size: int) -> tqdm:
        """A bar over the steps from `start` on. What was logged past it, before a run was stopped
        by force, is done again and therefore forgotten."""
        self.began = self.last = time.perf_counter()
        self.chance = math.log(vocab_size)  # the loss of guessing
        if self.file:
            self.forget(start)
        done = {"initial": start, "total": steps}
        return tqdm(range(start, steps), desc=str(self.out), disable=self.quiet, **done)

    def forget(self, start: int) -> None:
        """Cuts the log after step `start`, or before a line that a power failure has torn."""
        end = self.file.seek(0)
        while line := self.file.readline():
            try:
                record = json.loads(line)
                step, seconds = record["step"], record["seconds"]
            except (ValueError, KeyError, TypeError):
                break
            if step > start:
                break
            end, self.seconds_before = self.file.tell(), seconds
        self.file.truncate(end)

    def wait_for(self, stream: Iterator[list[dict]]) -> list[dict]:
        """The next step's batches; the time that they keep the model waiting is counted."""
        began = time.perf_counter()
        batches = next(stream)
        self.waiting = time.perf_counter() - began
        self.waited += self.waiting
        for batch in batches:
            for reason in batch["skipped"]:
                tqdm.write(f"skipped: {reason}", file=sys.stderr)
        return batches

    def write(
        self, bar: tqdm, step: int, loss: float, lr: float, grad_norm: float, counts: list[float]
    ) -> None:
        """Counts a step, writes its line of log.jsonl, and moves the bar. counts: samples, tokens,
        truncated answers and skipped records of the step, over all processes. Raises ValueError
        where going on makes no sense, OSError if the line can't be written."""
        samples, tokens, truncated, skipped = map(int, counts)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        is_bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
        self.count(samples, truncated, skipped, is_bad)
        if step == 1:
            self.tell(f"first loss {loss:.3f}; guessing among all tokens would be ln(vocabulary) = "
                      f"{self.chance:.3f}")  # fmt: skip
        if self.file:
            record = {
                "step": step, "loss": None if is_bad else round(loss, 7), "lr": lr,
                "grad_norm": None if is_bad else round(grad_norm, 4),
                "tokens_per_second": round(tokens / seconds),
                "waiting": round(self.waiting / seconds, 3),  # for data: its share of the step
                "seconds": round(self.seconds_before + now - self.began, 1),
                "peak_memory_gb": round(peak_memory_gb(), 3),
            }  # fmt: skip
            try:
                print(json.dumps(record), file=self.file, flush=True)
            except OSError as error:
                told = f"cannot write {self.out / 'log.jsonl'}: {error.strerror}"
                raise OSError(f"{told}; what was saved before is whole") from None
            speed = f"{samples / seconds:.0f}"
            bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", samples_per_second=speed)
        self.check(step, loss, grad_norm)

    def count(self, samples: int, truncated: int, skipped: int, is_bad: bool) -> None:
        """Adds a step to the totals that `check` and `closing_words` read."""
        self.samples, self.truncated = self.samples + samples, self.truncated + truncated
        self.skipped += skipped
        self.bad_steps += is_bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if is_bad else 0

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raises ValueError after MAX_BAD_STEPS in a row, or if too many records are bad."""
        if self.bad_in_a_row == MAX_BAD_STEPS:
            saved = (self.out / "train_state.pt").exists()
            rest = "holds the last checkpoint" if saved else "has none yet and can be deleted"
            raise ValueError(
                f"step {step}: no finite loss or gradient in {MAX_BAD_STEPS} steps in a row (loss "
                f"{loss}, gradient's norm {grad_norm}); the weights are as before the first of "
                "them. Likely the learning rate is too high, products in fp16 overflow (those in "
                f"bf16 do not) or the weights are damaged. {self.out} {rest}"
            )
        if self.samples >= MIN_SAMPLES and self.skipped > MAX_SKIPPED * self.samples:
            raise ValueError(
                f"{self.skipped} of {self.samples} records could not be used; the reasons are "
                "above. Mend the data; more than 1 % is not an accident"
            )

    def closing_words(self, steps: int) -> str:
        """How long the run took, and all that it cut, skipped or left out."""
        seconds = time.perf_counter() - self.began
        words = f"{steps} steps in {seconds:.0f} s"
        words += f", {self.waited / seconds:.0%} of it waiting for data"
        if self.truncated:
            words += f"; {self.truncated} answers were cut at the stage's longest length"
        if self.skipped:
            words += f"; {self.skipped} records were skipped"
        if self.bad_steps:
            words += f"; {self.bad_steps} steps without finite loss or gradient changed nothing"
        return words


def peak_memory_gb() -> float:
    """The most memory held so far: of the GPU if there is one in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---- the picture ----
WIDTH, HEIGHT, MARGIN = 900, 420, 50
COLORS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf")


def read_losses(folder: Path) -> list[float]:
    """The finite losses of a run's log, smoothed by a running mean of about 20 steps. Raises
    ValueError for another file."""
    losses: list[float] = []
    path = folder / "log.jsonl"
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            loss = json.loads(line)["loss"]
            if loss is not None:
                losses.append(losses[-1] + (loss - losses[-1]) / 20 if losses else float(loss))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: no line of a training's log") from None
    return losses


def draw_losses(folders: Iterable[Path], path: Path) -> None:
    """The losses of some runs, one after the other from left to right, as a PNG. Raises ValueError
    if there is none."""
    runs = {folder.absolute(): read_losses(folder) for folder in folders}
    runs = {folder: losses for folder, losses in runs.items() if losses}
    if not runs:
        raise ValueError(f"no run has a finite loss to draw in {path}")
    names = [folder.name for folder in runs]
    highest = max(map(max, runs.values()))
    steps = sum(map(len, runs.values()))
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN

    def at(step: int, loss: float) -> tuple[float, float]:
        return (MARGIN + (right - MARGIN) * step / steps,
                bottom - (bottom - MARGIN) * loss / highest)  # fmt: skip

    for part in range(5):
        loss = highest * part / 4
        draw.line([at(0, loss), at(steps, loss)], "#dddddd")
        draw.text((MARGIN - 6, at(0, loss)[1]), f"{loss:.2f}", "black", font, anchor="rm")
    first = 0
    for number, (folder, losses) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        name = folder.name if names.count(folder.name) == 1 else "/".join(folder.parts[-2:])
        draw.line([at(first + step, loss) for step, loss in enumerate(losses)], color, 2)
        label = f"{name}: {len(losses)} steps, {losses[-1]:.3f}"
        draw.text((at(first, 0)[0], bottom + 8 + 16 * (number % 2)), label, color, font)
        first += len(losses)
    draw.text((MARGIN, MARGIN / 2), "loss (mean of about 20 steps)", "black", font, anchor="lm")
    image.save(path)


def draw_run(out: Path) -> None:
    """loss.png in the folder of a finished run: its losses and those of the stages beside it. If
    that fails it is said and no more: the run has succeeded."""
    logs = [*sorted(out.parent.glob("stage[1-4]/log.jsonl")), out / "log.jsonl"]
    try:
        draw_losses([log.parent for log in logs], out / "loss.png")
    except (ValueError, OSError) as error:  # another stage's log, perhaps, or a full disk
        print(f"loss.png was not drawn: {error}", file=sys.stderr)


def draw(folders: list[str]) -> None:
    """loss.png in the current folder, of these runs. Raises ValueError if there are none."""
    if not folders:
        raise ValueError("name the folders of some runs")
    draw_losses(map(Path, folders), Path("loss.png"))
    print("saved loss.png")


def main(arguments: list[str]) -> int:
    """Exit code: 0, or 2 after a line on stderr that says what was wrong."""
    return exit_code(lambda: draw(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
