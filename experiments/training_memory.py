"""How much memory a step of train.py takes on a GPU, found out without the GPU and the memory.

    python experiments/memory.py                            all stages, the official size, 4 minutes
    python experiments/memory.py stage=2 checkpointing=1 micro_batch_size=16
    python experiments/memory.py stage=2 measured=1         beside a real step on this GPU

train.py's own step runs on tensors that have a shape but no numbers, while a Meter adds up what is
taken and given back. Read it from the leaves to the root:

    Hollow, Meter              tensors without memory, and what they would take
    like_a_gpu                 three operations that keep other things on a GPU than on a CPU
    rehearse, measured_peak    a model without weights makes one step
    main                       tables for people, JSON for programs in experiments/results/

Rows are equally long, and every token after the picture is taken for a label: the most there can
be. Not counted is what CUDA and its libraries need for themselves, about half a GB, and what lies
unused between the tensors.
"""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import IGNORE, IMAGE_TOKEN_ID
from experiments.command_line import report
from model import DTYPES, ModelConfig, RMSNorm, TinyGPTV, set_dtype
from quantize import quantize_model
from train import (
    SCHEDULES,
    enter_stage,
    new_optimizer,
    recompute_layers,
    set_trainable,
    train_step,
)

RESULT = ROOT / "experiments" / "results" / "training_memory.json"
TOKENS = {1: 80, 2: 80, 3: 220, 4: 512}  # of a long row in each stage, 32 for its picture
# Ways to train, each with what the one before it has, and the GB that they are to fit in: at first
# those of the paper's GPU.
GOALS = {"plain": 24, "checkpointing": 14, "micro-batches": 12, "int8": 8}


@dataclass
class Config:
    """The step that is planned; options as key=value."""

    stage: int = 0  # 1 to 4; default: all of them
    preset: str = "full"  # or "mini"
    batch_size: int = 0  # default: the schedule's
    micro_batch_size: int = 0  # default: all
    tokens: int = 0  # of a row; default: as in TOKENS
    precision: str = "bf16"
    checkpointing: bool = False
    int8: bool = False  # the frozen weights quantized
    measured: bool = False  # make a real step, too, on this machine's GPU


# ---- tensors without memory ----
class Hollow(FakeTensorMode):
    """Tensors that are made here have no memory, but those of whole numbers are real, and so is
    what is computed of such alone: how many tokens are labels decides shapes."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        hollow = any(isinstance(x, FakeTensor) for x in tensors)
        if not hollow and (tensors or kwargs.get("dtype") == torch.long):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the loss or the gradient's norm: any finite number
        if "index" in func.name():
            args = tuple(positions(x) if isinstance(x, list) else x for x in args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def positions(index: list[Tensor | None]) -> list[Tensor | None]:
    """An index with its masks as the positions at which they are true, whose number is known."""
    is_mask = [i is not None and i.dtype == torch.bool for i in index]
    parts = (i.nonzero().unbind(1) if mask else [i] for i, mask in zip(index, is_mask))
    return [i for part in parts for i in part]


class Meter(TorchDispatchMode):
    """Adds up the bytes of all tensors, each storage once, from when it is made to its end.

    now: the bytes, by what the program was doing (its phase) when they were taken; peak: the same
    at the moment of the largest sum.
    """

    def __init__(self):
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.phase = ""
        self.phase_of: dict[int, str] = {}  # by the address of the storage

    def enter(self, phase: str, *_: object) -> None:
        self.phase = phase

    def __torch_dispatch__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.phase_of:
            return
        self.phase_of[storage._cdata] = self.phase
        self.now[self.phase] += storage.nbytes()
        weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()

    def release(self, address: int, nbytes: int) -> None:
        self.now[self.phase_of.pop(address)] -= nbytes

    def move(self, tensor: Tensor, phase: str) -> None:
        """Counts a tensor to another phase than the one in which it was made."""
        storage = tensor.untyped_storage()
        self.now[self.phase_of[storage._cdata]] -= storage.nbytes()
        self.now[phase] += storage.nbytes()
        self.phase_of[storage._cdata] = phase


# ---- one step ----
def like_a_gpu(model: nn.Module) -> None:
    """Lets a model on a CPU keep for its backward pass what it keeps on a GPU. There autocast
    computes LayerNorm in fp32, RMSNorm is one kernel that keeps its input alone, as LayerNorm's
    does, and dropout keeps which numbers it has left, a byte each. Attention with a mask keeps the
    same on both."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        elif isinstance(module, RMSNorm):
            module.forward = partial(one_kernel, module)
        elif isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]


def one_kernel(norm: RMSNorm, x: Tensor) -> Tensor:
    """In the place of RMSNorm's forward: a kernel that keeps as much as a GPU's."""
    return F.layer_norm(x.float(), norm.weight.shape, norm.weight, None, norm.eps)


def shapes_of(config: Config, sizes: ModelConfig) -> TinyGPTV:
    """The model of the stage before (its sizes are given) in this stage, on the meta device; with
    int8 its frozen matrices are quantized."""
    with torch.device("meta"):
        model = TinyGPTV(replace(sizes))  # a copy, which the stage changes
        set_dtype(model, DTYPES[config.precision])
        enter_stage(model, config.stage, config.preset)
    set_trainable(model)
    if config.int8:
        quantize_model(model)
    return model


def blank_model(config: Config, sizes: ModelConfig, device: str) -> TinyGPTV:
    """As train.prepare_model makes it, but all weights are zero."""
    model = shapes_of(config, sizes)
    zeros = {name: torch.zeros(weight.shape, dtype=weight.dtype, device=device)
             for name, weight in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(zeros, assign=True)
    if config.checkpointing:
        recompute_layers(model.phi)
    return model.train()


def used_optimizer(model: TinyGPTV) -> torch.optim.AdamW:
    """AdamW with the moments that its first step makes."""
    optimizer = new_optimizer(model)
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def trained(model: TinyGPTV) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def full_batches(config: Config, model: TinyGPTV, device: str) -> list[dict[str, Tensor]]:
    """The micro-batches of a step. A row is its first token, a picture and nothing but labels."""
    first_label = 1 + model.config.qformer.num_queries
    batches = []
    for done in range(0, config.batch_size, config.micro_batch_size):
        rows = min(config.micro_batch_size, config.batch_size - done)
        input_ids = torch.zeros(rows, config.tokens, dtype=torch.long, device=device)
        labels, attention_mask = input_ids.clone(), input_ids + 1
        input_ids[:, 1:first_label], labels[:, :first_label] = IMAGE_TOKEN_ID, IGNORE
        pixel_values = torch.zeros(rows, 3, model.image_size, model.image_size, device=device)
        batches.append({"input_ids": input_ids, "labels": labels, "pixel_values": pixel_values,
                        "attention_mask": attention_mask})  # fmt: skip
    return batches


def step(model: TinyGPTV, optimizer: torch.optim.Optimizer, batches: list[dict]) -> None:
    """train.py's step, of two micro-batches at most: to the second one the gradients of the first
    are there, and a third would take as much."""
    no_scaling = torch.amp.GradScaler("cpu", enabled=False)
    train_step(model, optimizer, no_scaling, batches[:2], lr=0.0)


def follow(model: TinyGPTV, optimizer: torch.optim.Optimizer, meter: Meter) -> None:
    """Lets the meter know what the step is doing."""
    model.register_forward_pre_hook(partial(meter.enter, "pictures"))
    model.projector.register_forward_pre_hook(partial(meter.enter, "activations"))
    model.phi.final_layernorm.register_forward_hook(partial(meter.enter, "logits"))
    model.register_forward_hook(partial(meter.enter, "backward pass"))
    optimizer.register_step_pre_hook(partial(meter.enter, "optimizer step"))
    for parameter in trained(model):
        meter.move(parameter, "trainable weights")
        parameter.register_post_accumulate_grad_hook(lambda p: meter.move(p.grad, "gradients"))


def rehearse(config: Config, sizes: ModelConfig, on_gpu: bool = True) -> Meter:
    """What is in memory during a step, weights and all."""
    with Hollow(), Meter() as meter:
        meter.enter("frozen weights")
        model = blank_model(config, sizes, "cpu")
        if on_gpu:
            like_a_gpu(model)
        meter.enter("moments")
        optimizer = used_optimizer(model)
        follow(model, optimizer, meter)
        meter.enter("pictures")
        batches = full_batches(config, model, "cpu")
        meter.peak.clear()
        step(model, optimizer, batches)
    return meter


def measured_peak(config: Config, sizes: ModelConfig) -> int:
    """The most bytes that tensors took in a real step on the GPU."""
    model = blank_model(config, sizes, "cuda")
    optimizer, batches = used_optimizer(model), full_batches(config, model, "cuda")
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, batches)
    return torch.cuda.max_memory_allocated()


# ---- the command line ----
def check(config: Config) -> None:
    """Raises ValueError for what a config can't be."""
    if config.stage not in range(5):
        raise ValueError(f"stage={config.stage}: say stage=1, 2, 3 or 4, or nothing to see all")
    for key, values in (("preset", SCHEDULES), ("precision", DTYPES)):
        if getattr(config, key) not in values:
            raise ValueError(f"{key}={getattr(config, key)}: choose from {', '.join(values)}")
    for key in ("batch_size", "micro_batch_size", "tokens"):
        if getattr(config, key) < 0:
            raise ValueError(f"{key}={getattr(config, key)}: say how many")
    for key in ("micro_batch_size", "checkpointing", "int8", "measured"):
        if getattr(config, key) and not config.stage:
            raise ValueError(f"{key}: say for which stage, stage=1, 2, 3 or 4")
    if config.measured and not torch.cuda.is_available():
        raise ValueError("measured=1: torch sees no GPU here; leave it out to have the plan alone")


def settled(config: Config, stage: int) -> tuple[Config, ModelConfig]:
    """The config with all that was left open decided, and the sizes of the model of the stage
    before. Raises ValueError if a row is too short or too long."""
    sizes = ModelConfig.preset(config.preset, stage - 1)
    batch_size = config.batch_size or SCHEDULES[config.preset][stage].batch_size
    tokens = config.tokens or TOKENS[stage]
    least, most = sizes.qformer.num_queries + 2, sizes.phi.max_position_embeddings
    if not least <= tokens <= most:
        raise ValueError(f"tokens={tokens}: with its picture a row has {least} to {most}")
    micro = min(config.micro_batch_size or batch_size, batch_size)
    config = replace(config, stage=stage, batch_size=batch_size, micro_batch_size=micro)
    return replace(config, tokens=tokens), sizes


def plan(config: Config, stage: int) -> dict:
    """What a step takes, by what it is taken for, at the moment at which it is most."""
    config, sizes = settled(config, stage)
    peak = rehearse(config, sizes).peak
    parts = {part: round(count / 1e9, 3) for part, count in peak.items() if count}
    found = asdict(config) | {"parts_gb": parts, "total_gb": round(peak.total() / 1e9, 2)}
    if config.measured:
        found["measured_gb"] = round(measured_peak(config, sizes) / 1e9, 2)
    return found


def plans(config: Config, stage: int) -> list[dict]:
    """The same step in the ways of GOALS."""
    batch_size = settled(config, stage)[0].batch_size
    saving = replace(config, checkpointing=True)
    micro = replace(saving, micro_batch_size=math.ceil(batch_size / 4))
    ways = (config, saving, micro, replace(micro, int8=True))
    return [plan(way, stage) | {"way": name} for name, way in zip(GOALS, ways)]


def table(found: dict) -> str:
    """One step part by part."""
    micro, batch_size = found["micro_batch_size"], found["batch_size"]
    how = [f"stage {found['stage']}: {batch_size} rows of {found['tokens']} tokens"]
    how += [f"{micro} at a time"] * (micro < batch_size) + [found["precision"]]
    how += ["checkpointing"] * found["checkpointing"] + ["int8"] * found["int8"]
    lines = [", ".join(how)] + [f"{gb:8.2f} GB  {part}" for part, gb in found["parts_gb"].items()]
    lines += [f"{found['total_gb']:8.2f} GB  at the peak"]
    if found["measured"]:
        lines += [f"{found['measured_gb']:8.2f} GB  measured"]
    return "\n".join(lines)


def overview(runs: list[dict]) -> str:
    """Totals in GB, a line for each stage, * where they are more than the goal."""
    lines = ["stage  rows  tokens" + "".join(f"{name:>18}" for name in GOALS)]
    for first in range(0, len(runs), len(GOALS)):
        row = runs[first : first + len(GOALS)]
        totals = (f"{run['total_gb']:17.2f}" + " *"[run["total_gb"] > GOALS[run["way"]]]
                  for run in row)  # fmt: skip
        lines.append("{stage:5}{batch_size:6}{tokens:8}".format(**row[0]) + "".join(totals))
    lines.append("goal in GB         " + "".join(f"{goal:17} " for goal in GOALS.values()))
    return "\n".join(lines) + "\n* over the goal; each column has what the one before has, too"


def measure(config: Config) -> dict:
    """The plan of one stage, or of all four in each of the ways of GOALS; shown as a table, too."""
    check(config)
    if config.stage:
        result = plan(config, config.stage)
        print(table(result))
        return result
    runs = [run for stage in TOKENS for run in plans(config, stage)]
    print(overview(runs))
    return {"torch": torch.__version__, "runs": runs}


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return report(arguments, Config, measure, RESULT)
