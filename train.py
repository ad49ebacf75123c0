"""Trains one of TinyGPT-V's four stages (paper, section 3.3) on top of the stage before.

    python train.py stage=1                      the miniature, on its own world
    python train.py stage=4 data=mine.jsonl      your pictures: data.py tells the format
    python train.py stage=2 preset=full weights=DIR data=FILE

Everything after `train.py` is a field of TrainConfig as key=value. What each stage learns:

    1  the two projections and the norms of Phi: pictures become words        captions, no prompt
    2  the same and LoRA                                                      captions, no prompt
    3  the same, on few but detailed descriptions                             one kind of request
    4  the same, at doubled resolution                                        all tasks, with tags

ViT, Q-Former and Phi's own weights stay frozen throughout: 45 million parameters of 3.9 billion
move. Stage 1 begins from the backbones, every other stage from the one before it.
"""

import difflib
import itertools
import json
import math
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import RecordDataset, collate, read_records
from lora import LORA_PRESETS, add_lora
from miniature.stream import world_mixture
from model import TinyGPTV, autocast, half_dtype, is_trainable, save_checkpoint


@dataclass
class TrainConfig:
    stage: int = 0  # 1 to 4
    preset: str = "mini"  # or "full"
    weights: str = "miniature/weights"  # with the backbones and the stage before
    data: str = "world"  # a record file, or "world": the miniature's, made on the fly
    out: str = ""  # default: runs/stage1 ... runs/stage4
    steps: int = 0  # default: the schedule's
    batch_size: int = 0  # default: the schedule's
    device: str = "cpu"
    num_workers: int = 2  # processes that make batches
    seed: int = 42


@dataclass
class Schedule:
    cycles: int  # how often the whole schedule is gone through, each time with a new optimizer
    epochs: int
    steps_per_epoch: int
    batch_size: int
    warmup_steps: int
    warmup_lr: float
    lr: float
    min_lr: float


# The official numbers. Stage 1 is run 17 times (the paper: 17 x 1000 steps). Stage 4 ends at a
# higher rate than it begins with: that is what was published, and what the code does.
SCHEDULES = {
    "full": {
        1: Schedule(17, 1, 5000, 64, 1000, 1e-6, 1e-4, 8e-5),
        2: Schedule(1, 4, 5000, 64, 5000, 1e-6, 1e-4, 8e-5),
        3: Schedule(1, 5, 200, 6, 200, 1e-6, 3e-5, 1e-5),
        4: Schedule(1, 50, 1000, 6, 1000, 1e-6, 1e-5, 8e-5),
    },
    "mini": {
        1: Schedule(1, 1, 300, 32, 50, 1e-5, 2e-3, 1e-4),
        2: Schedule(1, 1, 200, 32, 30, 1e-5, 1e-3, 1e-4),
        3: Schedule(1, 1, 200, 32, 30, 1e-5, 1e-3, 1e-4),
        4: Schedule(1, 1, 700, 16, 50, 1e-5, 2e-3, 5e-5),
    },
}


def learning_rate(schedule: Schedule, epoch: int, step: int) -> float:
    """The official schedule; `step` counts within the epoch.

    Linear warm-up, then a cosine over the whole cycle that does not wait for the warm-up to end,
    so that the rate jumps there. A negative warmup_lr means no ramp.
    """
    done = epoch * schedule.steps_per_epoch + step
    if done < schedule.warmup_steps:
        start = schedule.warmup_lr if schedule.warmup_lr >= 0 else schedule.lr
        ramp = (schedule.lr - start) * step / max(1, schedule.warmup_steps)
        return min(schedule.lr, start + ramp)
    total = schedule.epochs * schedule.steps_per_epoch
    cosine = 0.5 * (1 + math.cos(math.pi * done / total))
    return schedule.min_lr + (schedule.lr - schedule.min_lr) * cosine


# ---- what learns ----


def enter_stage(model: TinyGPTV, stage: int, preset: str) -> None:
    """Gives the model of the stage before what this stage has: LoRA from stage 2 on (the paper's
    stage 1 has none; the official configuration forgot to say so)."""
    model.stage = model.config.stage = stage
    if stage >= 2 and model.config.lora is None:
        model.config.lora = LORA_PRESETS[preset]
        add_lora(model.phi, model.config.lora)


def set_trainable(model: TinyGPTV) -> None:
    """Freezes all but the projections, LoRA and the weights (not the biases) of Phi's norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = is_trainable(name)


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups for AdamW: trainable matrices with weight decay, norms and biases without."""
    groups = [
        {"params": [], "names": [], "weight_decay": weight_decay},
        {"params": [], "names": [], "weight_decay": 0.0},
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = groups[0] if parameter.ndim >= 2 else groups[1]
            group["params"].append(parameter)
            group["names"].append(name)
    return groups


# ---- data ----


class MixtureDataset(Dataset):
    """Several datasets as one; a key is (which dataset, position in it)."""

    def __init__(self, datasets: list[Dataset]):
        self.datasets = datasets

    def __getitem__(self, key: tuple[int, int]) -> dict:
        return self.datasets[key[0]][key[1]]


def mixture_batches(
    ratios: Sequence[float], batch_sizes: Sequence[int], seed: int, start: int = 0,
    rank: int = 0, world_size: int = 1,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Keys of a MixtureDataset, one list a step, from step `start` on, for ever.

    Each step draws one dataset with probability ratio / sum of ratios and takes its next
    batch_size * world_size positions, of which a process gets every world_size-th.
    """
    rng, used = random.Random(seed), [0] * len(ratios)
    for step in itertools.count():
        which = rng.choices(range(len(ratios)), ratios)[0]
        first, used[which] = used[which], used[which] + batch_sizes[which] * world_size
        if step >= start:
            yield [(which, place) for place in range(first + rank, used[which], world_size)]


def batches(config: TrainConfig, schedule: Schedule, model: TinyGPTV) -> Iterator[dict]:
    """Batches for ever, made in worker processes while the model computes."""
    encoding = (config.stage, model.tokenizer, model.image_size, model.config.qformer.num_queries)
    if config.data == "world":
        datasets, ratios = world_mixture(*encoding, seed=config.seed)
    else:
        records = read_records(config.data)
        datasets, ratios = [RecordDataset(records, *encoding, seed=config.seed)], [1.0]
    keys = mixture_batches(ratios, [schedule.batch_size] * len(ratios), config.seed)
    loader = DataLoader(
        MixtureDataset(datasets), batch_sampler=keys, num_workers=config.num_workers,
        collate_fn=partial(collate, pad_id=model.tokenizer.pad_token_id),
    )  # fmt: skip
    return iter(loader)


def to_device(batch: dict, device: str) -> dict:
    """What the model's forward takes of a batch, on its device."""
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    return {name: batch[name].to(device) for name in names if name in batch}


# ---- the loop ----


def train(config: TrainConfig) -> None:
    """One stage from beginning to end; writes config.json, model.safetensors and log.jsonl."""
    torch.manual_seed(config.seed)
    out = Path(config.out or f"runs/stage{config.stage}")
    bf16 = has_bf16(config.device)
    dtype = torch.bfloat16 if bf16 else torch.float32  # of what stays frozen
    model = TinyGPTV.from_pretrained(config.weights, config.stage - 1, config.device, dtype)
    if model.config.int8:
        raise ValueError(f"{config.weights} is quantized; train on what it was made from")
    enter_stage(model, config.stage, config.preset)
    set_trainable(model)
    model.to(config.device).train()  # to the device again: LoRA is new
    schedule = SCHEDULES[config.preset][config.stage]
    schedule.batch_size = config.batch_size or schedule.batch_size
    if config.steps:
        schedule.cycles, schedule.epochs, schedule.steps_per_epoch = 1, 1, config.steps
    if model.load_report:
        print(model.load_report, file=sys.stderr)
    print(summary(model, schedule) + f", products in {'bf16' if bf16 else 'fp32'}")

    log = RunLog(out, model.config.phi.vocab_size)
    stream = batches(config, schedule, model)
    epochs = [(c, e) for c in range(schedule.cycles) for e in range(schedule.epochs)]
    for cycle, epoch in epochs:
        if epoch == 0:
            optimizer = torch.optim.AdamW(optimizer_groups(model, weight_decay=0.05))
        bar = tqdm(range(schedule.steps_per_epoch), desc=f"stage {config.stage} {cycle}.{epoch}")
        for step in bar:
            lr = learning_rate(schedule, epoch, step)
            batch = log.wait_for(stream)
            loss, grad_norm = train_step(model, optimizer, to_device(batch, config.device), lr)
            log.write(bar, batch, loss=loss, lr=lr, grad_norm=grad_norm)
        save_checkpoint(model, out)
    print(log.closing_words())
    print(f"saved {out}/model.safetensors; try: python generate.py --weights {out} --img x.jpg")


def has_bf16(device: str) -> bool:
    """Whether the device multiplies bf16 in hardware, about twice as fast as fp32."""
    if device.startswith("cuda"):
        return half_dtype(device) == torch.bfloat16
    return device == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def train_step(
    model: TinyGPTV, optimizer: torch.optim.Optimizer, batch: dict, lr: float
) -> tuple[float, float]:
    """One step of AdamW; returns the loss before it and the norm of the gradient. Products are in
    the frozen weights' precision; what is trained, its gradients and the norms are fp32."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(model.phi.lm_head.weight):
        loss = model(**batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in trainable if p.grad is not None]  # none where text has no picture
    grad_norm = nn.utils.get_total_norm(grads)
    if not math.isfinite(loss.item()) or not math.isfinite(grad_norm.item()):
        raise ValueError(f"the loss is {loss.item()}, its gradient's norm {grad_norm.item()}")
    optimizer.step()
    return loss.item(), grad_norm.item()


class RunLog:
    """Tells a run's progress: the bar, a line of log.jsonl each step, and a few words."""

    def __init__(self, out: Path, vocab_size: int):
        out.mkdir(parents=True, exist_ok=True)
        self.file = open(out / "log.jsonl", "w", encoding="utf-8")
        self.chance = math.log(vocab_size)
        self.steps = self.truncated = 0
        self.skipped: list[str] = []
        self.began = self.last = time.time()
        self.waited = 0.0

    def wait_for(self, stream: Iterator[dict]) -> dict:
        """The next batch; the time that it keeps the model waiting is counted."""
        began = time.time()
        batch = next(stream)
        self.waited += time.time() - began
        return batch

    def write(self, bar: tqdm, batch: dict, loss: float, lr: float, grad_norm: float) -> None:
        now = time.time()
        seconds, self.last = now - self.last, now
        if self.steps == 0:
            bar.write(
                f"first loss {loss:.3f}; guessing among all tokens would be ln(vocabulary) = "
                f"{self.chance:.3f}"
            )
        self.steps += 1
        self.truncated += batch["truncated"]
        self.skipped += batch["skipped"]
        for reason in batch["skipped"]:
            bar.write(f"skipped: {reason}")
        tokens = int(batch["attention_mask"].sum())
        record = {
            "step": self.steps, "loss": round(loss, 4), "lr": lr, "grad_norm": round(grad_norm, 4),
            "tokens_per_second": round(tokens / seconds), "seconds": round(now - self.began, 1),
            "peak_memory_gb": round(peak_memory_gb(), 3),
        }  # fmt: skip
        print(json.dumps(record), file=self.file, flush=True)
        samples = len(batch["input_ids"]) / seconds
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", samples_per_second=f"{samples:.0f}")

    def closing_words(self) -> str:
        seconds = time.time() - self.began
        waited = f"{self.waited / seconds:.0%} of it waiting for data"
        words = f"{self.steps} steps in {seconds:.0f} s, {waited}"
        if self.truncated:
            words += f"; {self.truncated} answers were cut at the stage's longest length"
        if self.skipped:
            words += f"; {len(self.skipped)} records were skipped"
        return words


def peak_memory_gb() -> float:
    """The most memory held so far: of the GPU if there is one in use, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def summary(model: TinyGPTV, schedule: Schedule) -> str:
    """How many parameters each part has, how many learn, and what lies ahead."""
    counts = {name: sum(p.numel() for p in part.parameters())
              for name, part in model.named_children()}  # fmt: skip
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    steps = schedule.cycles * schedule.epochs * schedule.steps_per_epoch
    return (
        " + ".join(f"{name} {count:,}" for name, count in counts.items())
        + f" = {sum(counts.values()):,} parameters, of which {sum(trainable):,} in "
        f"{len(trainable)} tensors learn; {steps} steps of {schedule.batch_size} samples at "
        f"{model.image_size} pixels"
    )


# ---- the command line ----


def key_values(arguments: list[str], config_class: type) -> dict:
    """key=value pairs as values for the fields of a config, each of its field's type. Raises
    ValueError for what no field takes."""
    types = {field.name: field.type for field in fields(config_class)}
    given = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in types or not equals:
            near = difflib.get_close_matches(key.lstrip("-"), types, 1, 0.0)[0]
            raise ValueError(f"{argument}: no such option; did you mean {near}=...?")
        try:
            given[key] = types[key](value)
        except ValueError:
            kind = types[key].__name__
            raise ValueError(f"{argument}: {value!r} is not of type {kind}") from None
    return given


def parse_arguments(arguments: list[str]) -> TrainConfig:
    """key=value pairs -> TrainConfig. Raises ValueError for what it can't be."""
    config = TrainConfig(**key_values(arguments, TrainConfig))
    if config.stage not in (1, 2, 3, 4):
        raise ValueError(f"stage={config.stage}: say stage=1, 2, 3 or 4")
    if config.preset not in SCHEDULES:
        raise ValueError(f"preset={config.preset}: choose from {', '.join(SCHEDULES)}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch sees no GPU here; leave it out to use the CPU")
    return config


def main(arguments: list[str]) -> int:
    try:
        train(parse_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
