"""Trains one of TinyGPT-V's four stages (paper, section 3.3) on top of the stage before.

    python train.py stage=1                      the miniature, on its own world
    python train.py stage=4 data=mine.jsonl      your pictures: data.py tells the format
    python train.py stage=4 from_stage=4 data=mine.jsonl       on top of the finished model
    python train.py stage=2 preset=full weights=DIR data=DIR
    torchrun --nproc-per-node 2 train.py ...     in several processes; one per GPU with device=cuda

Everything after `train.py` is a field of TrainConfig as key=value. What each stage learns:

    1  the two projections and the norms of Phi: pictures become words        captions, no prompt
    2  the same and LoRA                                                      captions, no prompt
    3  the same, on few but detailed descriptions                             one kind of request
    4  the same, at doubled resolution                                        all tasks, with tags

ViT, Q-Former and Phi's matrices stay frozen throughout: of 3.9 billion parameters 14 million learn
in stage 1, and 45 million from stage 2 on. Stage 1 begins from the backbones, every other stage
from the one before it.

A run can be stopped at any moment, by Ctrl-C or by force, and goes on with resume=1 as if nothing
had happened: what a step does depends on the weights, the optimizer and the step's number alone.
"""

import itertools
import math
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from data import IGNORE, RecordDataset, RowSettings, collate, read_folder, read_records
from experiments.command_line import check_device, exit_code, is_out_of_memory, key_values
from experiments.run_log import RunLog, counts_of, draw_run, summary
from experiments.workers import batches_from_workers
from lora import LORA_PRESETS, add_lora
from miniature.stream import world_mixture
from model import DTYPES, PHI_PRESETS, Phi, TinyGPTV, autocast, half_dtype, is_trainable
from official.checkpoints import (
    checkpoint_directory, first_words, is_official, read_config, replace_file, save_checkpoint,
    tensors_fingerprint,
)  # fmt: skip
from official.stream import folder_mixture, has_mixture
from quantize import quantize_model


@dataclass
class TrainConfig:
    """What a run is told on the command line, each field as key=value."""

    stage: int = 0  # 1 to 4
    preset: str = "mini"  # or "full"
    # with the backbones and the stage to begin from
    weights: str = str(Path(__file__).parent / "miniature" / "weights")
    from_stage: int = -1  # default: the one before; the same, to go on with data of your own
    # a record file, several with commas between, a folder, or "world": the miniature's, made on
    # the fly
    data: str = "world"
    allow_missing: bool = False  # go on without the datasets of the mixture that the folder lacks
    out: str = ""  # default: runs/stage1 ... runs/stage4
    resume: bool = False  # go on with the run in `out`
    steps: int = 0  # in one cycle, at most a tenth of them warm-up; default: the schedule's
    batch_size: int = 0  # of each process; default: the schedule's or the mixture's
    micro_batch_size: int = 0  # so many samples at a time; default: all
    # largest norm of the gradient; default: no clipping, as in the official code
    grad_clip: float = 0.0
    precision: str = ""  # of matrix products: bf16, fp16, fp32; default: the fastest of the device
    int8: bool = False  # keep frozen weights in int8: half their memory; products are in bf16
    checkpointing: bool = False  # compute Phi's layers again in the backward pass: less memory
    compile: bool = False  # torch.compile Phi's layers: minutes of preparation, then faster
    save_every: int = 500  # steps
    device: str = "cpu"
    num_workers: int = 2  # processes that make batches
    seed: int = 42


@dataclass
class Schedule:
    """How long a stage is, and how fast it learns when; `learning_rate` reads it."""

    cycles: int  # how often the whole schedule is gone through, each time with a new optimizer
    epochs: int
    steps_per_epoch: int
    batch_size: int
    warmup_steps: int
    warmup_lr: float  # at step 0
    lr: float  # after the warm-up
    min_lr: float  # at the end of a cycle; in the official stage 4 it is the larger of the two

    @property
    def steps(self) -> int:
        return self.cycles * self.epochs * self.steps_per_epoch

    def position(self, step: int) -> tuple[int, int]:
        """The epoch of its cycle that a step lies in, and its number in that epoch."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        return epoch % self.epochs, in_epoch


# The official numbers. Stage 1 is run 17 times (the paper: 17 x 1000 steps). Stage 4 ends at a
# higher rate than it begins with: that is what was published, and what the code does.
SCHEDULES = {  # cycles, epochs, steps_per_epoch, batch_size, warmup_steps, warmup_lr, lr, min_lr
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
        4: Schedule(1, 1, 700, 16, 50, 1e-5, 1.5e-3, 5e-5),
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
    """Makes the model of the stage before one of this stage: with LoRA from stage 2 on, as in the
    paper (the official configuration of stage 1 forgot to leave it out)."""
    model.config.stage = stage
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


def settings_of(model: TinyGPTV) -> RowSettings:
    """What the rows of the model's stage depend on."""
    return RowSettings(
        model.stage, model.tokenizer, model.image_size, model.config.qformer.num_queries,
        model.config.phi.max_position_embeddings,
    )  # fmt: skip


def open_data(config: TrainConfig, batch_size: int, model: TinyGPTV) -> tuple[list, list, list]:
    """The datasets that a stage learns from, how often each is drawn, and its batch size. Several
    record files are drawn in proportion to their numbers of records."""
    settings = settings_of(model)
    if config.data == "world":
        datasets, ratios = world_mixture(settings, config.seed)
    elif has_mixture(config.data):
        datasets, ratios, batch_sizes = folder_mixture(
            config.data, settings, config.seed, config.allow_missing
        )
        return datasets, ratios, [config.batch_size or size for size in batch_sizes]
    else:
        paths = config.data.split(",")
        parts = [read_folder(path) if os.path.isdir(path) else read_records(path) for path in paths]
        datasets = [RecordDataset(records, settings, config.seed) for records in parts]
        ratios = list(map(len, datasets))
    return datasets, ratios, [batch_size] * len(datasets)


def micro_batches(rows: list[dict], size: int, pad_id: int) -> list[dict]:
    """The rows of a step in batches of at most `size`, or in one if it is 0."""
    size = size or len(rows)
    return [collate(rows[n : n + size], pad_id) for n in range(0, len(rows), size)]


def to_device(batch: dict, device: str) -> dict:
    """What the model's forward takes of a batch, on its device."""
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    return {name: batch[name].to(device) for name in names if name in batch}


def num_labels(batch: dict) -> int:
    """How many tokens a batch is judged by; the first of a row has none before it to predict it."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


# ---- several processes ----
def join_processes(device: str) -> tuple[str, int, int]:
    """Joins the processes that torchrun has started, with device=cuda one per GPU. Returns this
    one's device, its rank, and their number; without torchrun the device, 0 and 1. Raises
    ValueError if there are fewer GPUs than processes, if this one's GPU can't be computed on, or if
    the processes do not find each other."""
    if "LOCAL_RANK" not in os.environ:
        return device, 0, 1
    on_gpu = device.startswith("cuda")
    if on_gpu:
        number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= count:
            raise ValueError(f"each process needs a GPU of its own, and torch sees {count}; say "
                             f"torchrun --nproc-per-node {count}")  # fmt: skip
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
        check_device(device)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    except dist.DistError as error:
        raise ValueError(f"the processes do not find each other: {first_words(error)}; give "
                         "torchrun on each machine the same address and a free port") from None
    return device, dist.get_rank(), dist.get_world_size()


def distributed(model: nn.Module) -> DistributedDataParallel:
    """The model, its gradients averaged over all processes. One whose batch has no picture leaves
    the projections unused; find_unused_parameters allows that."""
    return DistributedDataParallel(model, find_unused_parameters=True)


def sum_over_processes(values: list[float], device: str | torch.device) -> list[float]:
    """The sums of each value over all processes."""
    if not dist.is_initialized():
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


# ---- one step ----
def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
    micro: list[dict], lr: float, grad_clip: float = 0.0,
) -> tuple[float, float]:  # fmt: skip
    """One step of AdamW; returns the loss before it and the norm of its gradient. Nothing has
    changed if either is not finite.

    micro: the micro-batches of this process, on its device. Loss and gradient are the mean over
    the labelled tokens of all of them in all processes, however they are divided. Products are in
    the frozen weights' precision; what is trained, its gradients and the norms are fp32.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    device = plain.phi.embed_tokens.weight.device
    counts = [num_labels(batch) for batch in micro]
    [all_labels] = sum_over_processes([sum(counts)], device)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    total = 0.0
    for n, (batch, count) in enumerate(zip(micro, counts), 1):
        # Under DistributedDataParallel gradients are exchanged once, in the last backward pass.
        exchanged = model is plain or n == len(micro)
        with nullcontext() if exchanged else model.no_sync():
            with autocast(plain.phi.embed_tokens.weight):
                loss = model(**batch) * (count / max(1, all_labels))
            scaler.scale(loss * processes).backward()  # DistributedDataParallel takes the mean
        total += loss.item()
    [total] = sum_over_processes([total], device)
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    # the projections have none in a batch of text alone
    grads = [p.grad for p in trained if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if math.isfinite(total) and math.isfinite(norm) and all_labels > 0:
        if grad_clip:
            nn.utils.clip_grads_with_norm_(trained, grad_clip, norm)
        scaler.step(optimizer)
    scaler.update()
    return total if all_labels else math.nan, norm.item()


# ---- a run, and how it goes on ----
# What may differ when a run goes on: where files are (not what is in them), and how a step is
# computed.
MAY_CHANGE = ("weights", "data", "out", "resume", "micro_batch_size", "checkpointing", "compile",
              "save_every", "device", "num_workers")  # fmt: skip
# What train_state.pt holds.
STATE = {"config", "world_size", "step", "model", "frozen", "optimizer", "scaler"}


def fastest_precision(device: str) -> str:
    """bf16 where a CUDA GPU or an x86 CPU (AVX-512) multiplies it in hardware; else fp16 on such a
    GPU and fp32 on a CPU. On Apple's GPUs (mps) fp32."""
    if device.startswith("cuda"):
        return "bf16" if half_dtype(device) == torch.bfloat16 else "fp16"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"


def with_defaults(config: TrainConfig) -> TrainConfig:
    """The config with its defaults filled in. Raises ValueError for int8=1 unless in bf16."""
    if config.int8 and config.precision not in ("", "bf16"):
        raise ValueError(f"int8=1 multiplies in bf16; leave out precision={config.precision}")
    return replace(
        config, out=config.out or f"runs/stage{config.stage}",
        from_stage=config.stage - 1 if config.from_stage < 0 else config.from_stage,
        precision=config.precision or ("bf16" if config.int8 else fastest_precision(config.device)),
    )  # fmt: skip


def schedule_of(config: TrainConfig) -> Schedule:
    """The stage's schedule; with config.steps one cycle of so many, its warm-up the schedule's own
    or a tenth of them, whichever is shorter."""
    schedule = SCHEDULES[config.preset][config.stage]
    schedule = replace(schedule, batch_size=config.batch_size or schedule.batch_size)
    if config.steps:
        warmup_steps = min(schedule.warmup_steps, max(1, config.steps // 10))
        return replace(schedule, cycles=1, epochs=1, steps_per_epoch=config.steps,
                       warmup_steps=warmup_steps)  # fmt: skip
    return schedule


def check_out(config: TrainConfig) -> None:
    """Raises ValueError if config.out lies among the official files that the run begins from."""
    folder = Path(config.weights)
    if not is_official(folder):
        folder = checkpoint_directory(folder, config.from_stage)
        folder /= read_config(folder)[1]  # of the backbones
    if is_official(folder) and Path(config.out).resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"out={config.out} lies among the official files of {folder}, which could "
                         "not be loaded any more with a checkpoint there; say another folder")


def prepare_model(config: TrainConfig, state: dict, device: str) -> TinyGPTV:
    """The model of an earlier stage, made ready for this one. state: of `read_state`, for a run
    that goes on, or {}. Raises ValueError if that is of other weights, or if the weights are of
    another size than the preset's, or quantized."""
    torch.manual_seed(config.seed)  # of parameters that no file has
    dtype = DTYPES[config.precision]
    # before quantization the weights may not fit a small GPU
    place = "cpu" if config.int8 else device
    model = TinyGPTV.from_pretrained(config.weights, config.from_stage, place, dtype)
    if model.config.int8:
        raise ValueError(f"{config.weights} is quantized; train on what it was made from")
    if model.config.phi.num_layers != PHI_PRESETS[config.preset].num_layers:
        raise ValueError(f"the weights in {config.weights} are not of preset={config.preset}")
    enter_stage(model, config.stage, config.preset)
    set_trainable(model)
    if config.int8:
        quantize_model(model)
    if state:
        restore(model, state, config)
    if config.checkpointing:
        recompute_layers(model.phi)
    if config.compile:
        for block in model.phi.layers:
            block.compile()
    return model.to(device).train()  # the dropout of LoRA and Phi is on


def restore(model: TinyGPTV, state: dict, config: TrainConfig) -> None:
    """Gives the model what a run has learned so far. Raises ValueError if that is not exactly what
    learns here, or if it was learned with other frozen weights."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if state["model"].keys() != trainable:
        names = ", ".join(sorted(state["model"].keys() ^ trainable))
        raise ValueError(f"{config.out}/train_state.pt is of another model; not in both: {names}")
    if state["frozen"] != frozen_fingerprint(model):
        raise ValueError(f"the run in {config.out} began with other weights than those in "
                         f"{config.weights}; give it its own to go on")  # fmt: skip
    model.load_state_dict(state["model"], strict=False)


def frozen_fingerprint(model: TinyGPTV) -> str:
    """A hash of the frozen weights: a run goes on only with those it began with."""
    return tensors_fingerprint(p for p in model.parameters() if not p.requires_grad)


def recompute_layers(phi: Phi) -> None:
    """Gradient checkpointing: a layer keeps its input alone and runs again in the backward pass.
    (The official option covers the ViT, which is frozen and keeps nothing anyway.)"""
    for block in phi.layers:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def new_optimizer(model: TinyGPTV) -> torch.optim.AdamW:
    """AdamW with the official weight decay, and with nothing remembered."""
    return torch.optim.AdamW(optimizer_groups(model, weight_decay=0.05))


def new_scaler(config: TrainConfig, device: str) -> torch.amp.GradScaler:
    """For fp16, whose gradients would be lost to zero; for other types it does nothing."""
    return torch.amp.GradScaler(device.split(":")[0], enabled=config.precision == "fp16")


def require_room(config: TrainConfig, model: TinyGPTV) -> None:
    """Raises ValueError unless the disk has room for what save_state writes: the weights that learn
    and the `carried` ones in model.safetensors, and in train_state.pt what learns again with
    AdamW's two moments. Old files stay until the new ones are whole."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    carried = sum(p.nbytes for name, p in model.named_parameters() if name in model.carried)
    needed = 3 * trained + carried if config.resume else 7 * trained + 2 * carried
    free = shutil.disk_usage(config.out).free
    if free < needed:
        raise ValueError(f"{config.out}: saving takes {needed / 1e6:.0f} MB, {free / 1e6:.0f} are "
                         "free; make room, or say out=... for another disk")  # fmt: skip


def save_state(
    config: TrainConfig, world_size: int, step: int, model: TinyGPTV,
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
) -> None:  # fmt: skip
    """Writes model.safetensors, for use, and train_state.pt, from which the run goes on. The second
    has the weights, too: were they in the first alone, a crash between the two writes would leave
    files of different steps. The order of samples and dropout follow from the step's number."""
    save_checkpoint(model, Path(config.out))
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    state = {
        "config": asdict(config), "world_size": world_size, "step": step, "model": trained,
        "frozen": frozen_fingerprint(model), "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }  # fmt: skip
    with replace_file(Path(config.out) / "train_state.pt") as path:
        torch.save(state, path)


def read_state(config: TrainConfig, world_size: int) -> dict:
    """What save_state wrote. Raises ValueError if it is of another run, or if there is none."""
    path = Path(config.out) / "train_state.pt"
    if not path.exists():
        raise ValueError(f"there is no {path}: {config.out} holds no run that could go on")
    now = asdict(config) | {"torchrun's processes": world_size}
    try:
        # Mapped, the old file would keep its room on the disk even after a newer one replaced it.
        state = torch.load(path, "cpu", weights_only=True, mmap=False)
        if missing := STATE - state.keys():
            raise ValueError(f"it has no {missing.pop()}")
        before = state["config"] | {"torchrun's processes": state["world_size"]}
        before = asdict(TrainConfig()) | before  # an older version may have had fewer options
    except Exception as error:  # damaged bytes can make a parser raise anything
        if is_out_of_memory(error):
            raise
        reason = first_words(error)
        told = f"{path} is damaged ({reason}); delete {config.out} and start again"
        raise ValueError(told) from None
    changed = [f"{key}={int(before[key]) if isinstance(before[key], bool) else before[key]}"
               for key in now if key not in MAY_CHANGE and before[key] != now[key]]  # fmt: skip
    if changed:
        raise ValueError(f"the run in {config.out} has {', '.join(changed)}; say the same to go on")
    return state


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted in a list, so that a step is not torn in two; the second one
    ends the process at once."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(config: TrainConfig) -> None:
    """Deletes train_state.pt, draws the losses, and says how to use the model."""
    (Path(config.out) / "train_state.pt").unlink()
    draw_run(Path(config.out).absolute())
    print(f"saved {config.out}/model.safetensors; try: python generate.py --weights {config.out} "
          "--img x.jpg")  # fmt: skip


def train(config: TrainConfig) -> int:
    """One stage from beginning to end, or on from where it was stopped (config.resume). Writes
    config.json, model.safetensors, log.jsonl and loss.png into config.out, and train_state.pt
    until it is done. Returns 0, or 128 + the number of the signal that stopped it."""
    config = with_defaults(config)
    check_out(config)
    device, rank, world_size = join_processes(config.device)
    log = RunLog(Path(config.out), config.resume, quiet=rank > 0)
    state = read_state(config, world_size) if config.resume else {}
    start, schedule = state.get("step", 0), schedule_of(config)
    model = prepare_model(config, state, device)
    if rank == 0:
        require_room(config, model)
    runner = distributed(model) if world_size > 1 else model
    datasets, ratios, batch_sizes = open_data(config, schedule.batch_size, model)
    keys = mixture_batches(ratios, batch_sizes, config.seed, start, rank, world_size)
    collate_step = partial(
        micro_batches, size=config.micro_batch_size, pad_id=model.tokenizer.pad_token_id
    )
    stream = batches_from_workers(MixtureDataset(datasets), keys, collate_step, config.num_workers)
    optimizer, scaler = new_optimizer(model), new_scaler(config, device)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        state.clear()  # it was copied, or is the optimizer's now
    log.tell(model.load_report)
    batch_sizes = [size * world_size for size in batch_sizes]
    log.tell(summary(model, schedule.steps, batch_sizes, config.precision))
    bar = log.begin(start, schedule.steps, model.config.phi.vocab_size)
    with noted_signals() as signals:
        for step in bar:
            epoch, in_epoch = schedule.position(step)
            if epoch == in_epoch == 0:  # every cycle begins with new ones
                optimizer, scaler = new_optimizer(model), new_scaler(config, device)
            torch.manual_seed(config.seed + step * world_size + rank)  # of this step's dropout
            micro = log.wait_for(stream)
            lr = learning_rate(schedule, epoch, in_epoch)
            on_device = [to_device(batch, device) for batch in micro]
            loss, norm = train_step(runner, optimizer, scaler, on_device, lr, config.grad_clip)
            *counts, stopped = sum_over_processes([*counts_of(micro), len(signals)], device)
            log.write(bar, step + 1, loss, lr, norm, counts)
            is_due = stopped or (step + 1) % config.save_every == 0 or step + 1 == schedule.steps
            if is_due and rank == 0:
                save_state(config, world_size, step + 1, model, optimizer, scaler)
            if stopped:
                log.tell(f"stopped after step {step + 1}; add resume=1 to go on")
                return 128 + (signals[0] if signals else signal.SIGTERM)
    log.tell(log.closing_words(schedule.steps - start))
    if rank == 0:
        finish(config)
    return 0


# ---- the command line ----
def parse_arguments(arguments: list[str]) -> TrainConfig:
    """key=value pairs -> TrainConfig. Raises ValueError for values that make no run."""
    given = key_values(arguments, TrainConfig)
    config = TrainConfig(**given)
    if config.stage not in (1, 2, 3, 4):
        raise ValueError(f"stage={config.stage}: say stage=1, 2, 3 or 4")
    if not -1 <= config.from_stage <= config.stage:
        raise ValueError(f"from_stage={config.from_stage}: stage {config.stage} can't follow it")
    if config.preset not in SCHEDULES:
        raise ValueError(f"preset={config.preset}: choose from {', '.join(SCHEDULES)}")
    if config.preset == "full" and "data" not in given:
        raise ValueError("preset=full learns from data=DIR, or data=world if drawings will do")
    if config.precision not in ("", *DTYPES):
        raise ValueError(f"precision={config.precision}: choose from {', '.join(DTYPES)}")
    if config.save_every < 1:
        raise ValueError(f"save_every={config.save_every}: say after how many steps to save")
    for key in ("steps", "batch_size", "micro_batch_size", "grad_clip", "num_workers", "seed"):
        if not 0 <= getattr(config, key) < 2**63:
            raise ValueError(f"{key}={getattr(config, key)}: it has to be 0 or more, below 2^63")
    on_gpu = config.device.startswith("cuda") and torch.cuda.is_available()
    # A check opens a context on the GPU: of several processes each checks its own, on joining.
    if not (on_gpu and "LOCAL_RANK" in os.environ):
        check_device(config.device)
    return config


def main(arguments: list[str]) -> int:
    """Exit code: 0; 2 after a line on stderr that says what was wrong; 128 + the number of the
    signal that stopped it, 130 for Ctrl-C."""
    advice = "checkpointing=1, micro_batch_size=1, a smaller batch_size or int8=1 need less"
    try:
        return exit_code(lambda: train(parse_arguments(arguments)), advice)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
