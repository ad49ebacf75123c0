"""What each of TinyGPT-V's parts is good for: the same four stages without it (paper, table 4).

    python experiments/ablation.py                    without LoRA, or one of the norms
    python experiments/ablation.py study=queries      without some of them; or projection, bridge,
                                                      resolution, mixture
    python experiments/ablation.py seeds=1 steps=30,10,10,30 n=20       a try

Every variant goes through stages 1 to 4 from the same backbones, with the same budget and several
seeds; then it is asked about test scenes. A run is one file in experiments/results/ablation/, and
what is there is not run again. Another study is another entry of STUDIES, to be compared with the
full model of the first.

How a norm is taken out. The paper puts its norms into a finished Phi-2 and reports what happens
without them. The miniature's Phi grew up with them, so to leave one out would break it before the
first step, and the breakage would be all that one sees. Therefore a norm is replaced by a constant:
the mean over the tokens of 40 texts of what it subtracts and of what it multiplies with, one number
a layer, for q and k one a head. Its trainable weight stays. So the variant begins near the original
function, within a nat of its predictions, with the same things to learn, and only what makes a norm
is gone: that it answers to each token's own size. Without LoRA, all else is trained as with it.

fp16. The paper's failures are of fp16, so after each stage some of its batches go through the model
once in fp32 and once in fp16 (weights, products, activations and their gradients; norms and what is
trained in fp32, as in the official code), without a loss scale: how many batches give a loss or
gradient that is not finite, and which share of the gradient's elements is lost to zero.
"""

import copy
import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bridge import naive_attention
from data import make_sample
from experiments import evaluate
from experiments.command_line import key_values
from experiments.encoded_scenes import (
    Pool,
    PoolDataset,
    fingerprint,
    on_queries,
    open_pool,
    pooled_patches,
)
from experiments.scores import metrics
from lora import merge_lora
from miniature import world
from miniature.pretrain_language import language_row
from miniature.pretrain_projection import whitening
from miniature.stream import RATIOS, conversation
from model import RMSNorm, TinyGPTV, autocast, set_dtype
from official.checkpoints import replace_file
from train import (
    PRECISIONS,
    MixtureDataset,
    TrainConfig,
    enter_stage,
    fastest_precision,
    learning_rate,
    micro_batches,
    mixture_batches,
    new_optimizer,
    schedule_of,
    set_trainable,
    to_device,
    train_step,
)

RESULTS = ROOT / "experiments" / "results" / "ablation"
BACKBONES = ("vision", "qformer", "projection", "phi")
FIRST_TEXT, NUM_TEXTS = 8 * 10**8, 40
LAST_STEPS = 50  # a stage's final loss is the mean of so many
FP16_BATCHES, FP16_ROWS = 4, 8  # a stage, a batch: a CPU multiplies fp16 slowly
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


@dataclass
class Config:
    study: str = "norms"
    seeds: int = 3  # runs of each variant
    steps: str = "300,100,100,300"  # of stages 1 to 4
    batch_size: int = 0  # default: each stage's own
    n: int = 200  # test scenes
    scenes: int = 6000  # of training, encoded once at each resolution
    pool: str = ""  # the folder where they are kept; default: the system's temporary one
    workers: int = 1  # runs side by side, each on one thread
    weights: str = str(ROOT / "miniature" / "weights")


# ---- variants ----
@dataclass(frozen=True)
class Variant:
    """edit: applied whenever a stage has been entered; may find its work done already."""

    edit: Callable[[TinyGPTV], None] = lambda model: None
    ratios: dict[str, int] = field(default_factory=lambda: RATIOS[4])  # of stage 4
    view: str = "queries"  # what of the pool it learns from; or "patches"


class FrozenNorm(nn.Module):
    """A norm whose mean and scale are constants: y = (x - mean) * scale * weight + bias."""

    def __init__(self, norm: nn.Module, mean: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.float() - self.mean) * self.scale * self.weight
        return y if self.bias is None else y + self.bias


def statistics_of(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm subtracts from each token of x (..., T, C) and multiplies it with: (2, ..., T).
    RMSNorm subtracts nothing."""
    x = x.float()
    mean = torch.zeros_like(x[..., 0]) if isinstance(norm, RMSNorm) else x.mean(-1)
    return torch.stack([mean, ((x - mean[..., None]).square().mean(-1) + norm.eps).rsqrt()])


@torch.no_grad()
def freeze_norms(model: TinyGPTV, names: tuple[str, ...]) -> None:
    """Replaces the norms of these names in all of Phi's layers by constants."""
    found = [(parent, name) for parent in model.phi.modules() for name in names
             if isinstance(getattr(parent, name, None), (nn.LayerNorm, RMSNorm))]  # fmt: skip
    if not found:
        return
    seen: dict[nn.Module, list[Tensor]] = defaultdict(list)
    hooks = [getattr(parent, name).register_forward_pre_hook(
        lambda norm, inputs: seen[norm].append(statistics_of(norm, inputs[0]))
    ) for parent, name in found]  # fmt: skip
    with autocast(model.phi.embed_tokens.weight):
        for inputs_embeds in text_embeds(model):
            model.phi(inputs_embeds)
    for hook in hooks:
        hook.remove()
    for parent, name in found:
        norm = getattr(parent, name)
        # (2, 1, T) or (2, 1, heads, T) of all texts -> (2, 1, 1, 1) or (2, 1, heads, 1, 1)
        constants = torch.cat(seen[norm], -1).mean(-1)[..., None, None]
        setattr(parent, name, FrozenNorm(norm, *constants))


def text_embeds(model: TinyGPTV) -> list[Tensor]:
    """Texts as Phi was pre-trained on, (1, T, hidden_size): conversations about scenes, which are
    written out in 32 words where their picture would be."""
    phi, texts = model.phi, []
    for number in range(FIRST_TEXT, FIRST_TEXT + NUM_TEXTS):
        scene, rng = world.sample_scene(number, "train"), random.Random(number)
        turns = make_sample(conversation(scene, rng, 100), 4, rng, (100, 100))
        row = language_row(scene, turns, 4, model.tokenizer)
        texts.append(phi.embed(row["input_ids"][None], phi.embed_tokens(row["words"])[None]))
    return texts


class EachObjects(nn.Module):
    """The first `kept` of the eight queries that tell of each object: the look, then the box."""

    def __init__(self, kept: int):
        super().__init__()
        self.kept = kept

    def forward(self, queries: Tensor) -> Tensor:
        # (B, 32, C) -> (B, 4, 8, C) -> (B, 4 * kept, C)
        return queries.unflatten(1, (-1, 8))[:, :, : self.kept].flatten(1, 2)


def keep_queries(model: TinyGPTV, kept: int) -> None:
    if not isinstance(model.projector, nn.Sequential):
        model.config.qformer = replace(model.config.qformer, num_queries=4 * kept)
        model.projector = nn.Sequential(EachObjects(kept), model.projector)


def one_linear_map(model: TinyGPTV) -> None:
    """Both projections multiplied out: the same function, with a single matrix to learn."""
    if isinstance(model.projector, nn.Linear):
        return
    first, second = model.projector.fc1, model.projector.fc2
    model.projector = nn.Linear(first.in_features, second.out_features)
    model.projector.weight.data = second.weight.data @ first.weight.data
    model.projector.bias.data = second(first.bias).data


def mlp_projection(model: TinyGPTV) -> None:
    """A GELU between both projections, as in LLaVA-1.5."""
    if not isinstance(model.projector, nn.Sequential):
        first, second = model.projector.children()
        model.projector = nn.Sequential(first, nn.GELU(), second)


def look_at_patches(model: TinyGPTV) -> None:
    model.qformer.forward = pooled_patches


def keep_resolution(model: TinyGPTV) -> None:
    """Stage 4 doubles what the configuration says."""
    if model.stage == 4:
        model.config.vision = replace(
            model.config.vision, image_size=model.visual_encoder.config.image_size // 2
        )


STUDIES = {
    "norms": {
        "full": Variant(),
        "no LoRA": Variant(lambda model: merge_lora(model.phi)),
        "no input LayerNorm": Variant(partial(freeze_norms, names=("input_layernorm",))),
        "no RMSNorm": Variant(partial(freeze_norms, names=("post_layernorm",))),
        "no QK-norm": Variant(partial(freeze_norms, names=("q_layernorm", "k_layernorm"))),
    },
    "queries": {"without right and bottom": Variant(partial(keep_queries, kept=6)),
                "without boxes": Variant(partial(keep_queries, kept=4))},
    "projection": {"one linear map": Variant(one_linear_map), "MLP": Variant(mlp_projection)},
    "bridge": {"pooled patches": Variant(look_at_patches, view="patches")},
    "resolution": {"not doubled": Variant(keep_resolution)},
    "mixture": {"single questions": Variant(ratios=RATIOS[4] | {"chat": 0})},
}  # fmt: skip


# ---- one run ----
def new_model(config: Config, variant: Variant, seed: int, pool: Pool) -> TinyGPTV:
    """The backbones with a new projection, in the precision that train.py would choose."""
    torch.manual_seed(seed)
    dtype = PRECISIONS[fastest_precision("cpu")]
    model = TinyGPTV.from_pretrained(config.weights, 0, "cpu", dtype)
    if variant.view == "patches":  # what pretrain_projection.py does for queries
        first = model.projector.fc1
        weight, bias = whitening(pool[f"patches {model.image_size}"].flatten(0, 1))
        turned = torch.randn(first.weight.shape) / len(weight) ** 0.5
        first.weight.data, first.bias.data = turned @ weight, turned @ bias
    return model


def stage_batch(model: TinyGPTV, datasets: MixtureDataset, keys: list) -> dict:
    """Rows of these keys as one batch."""
    rows = [datasets[key] for key in keys]
    [batch] = micro_batches(rows, 0, model.tokenizer.pad_token_id)
    return to_device(batch, "cpu")


def run_stage(
    model: TinyGPTV, stage: int, steps: int, variant: Variant, seed: int, config: Config, pool: Pool
) -> dict:
    """One stage as train.py has it, but for the pool in the place of new pictures; what came of
    it."""
    began = time.time()
    torch.manual_seed(seed + stage)  # of LoRA's beginnings
    enter_stage(model, stage, "mini")
    variant.edit(model)
    set_trainable(model)
    model.train()
    schedule = schedule_of(TrainConfig(stage=stage, steps=steps, batch_size=config.batch_size))
    ratios = variant.ratios if stage == 4 else RATIOS[stage]
    encoding = (stage, model.tokenizer, model.image_size, model.config.qformer.num_queries)
    vectors = pool[f"{variant.view} {model.image_size}"]
    datasets = MixtureDataset([PoolDataset(task, *encoding, seed, vectors) for task in ratios])
    keys = mixture_batches([*ratios.values()], [schedule.batch_size] * len(ratios), seed)
    optimizer, done = new_optimizer(model), []
    with on_queries(model):
        for step in range(steps):
            torch.manual_seed(seed + step)  # of this step's dropout
            batch = stage_batch(model, datasets, next(keys))
            lr = learning_rate(schedule, 0, step)
            done.append(train_step(model, optimizer, NO_SCALING, [batch], lr))
    finite = [(loss, norm) for loss, norm in done if math.isfinite(loss) and math.isfinite(norm)]
    norms = [norm for _, norm in finite]
    about = {
        "loss": mean_or_none([loss for loss, _ in done[-LAST_STEPS:]]),
        "grad_norm_median": statistics.median(norms) if norms else None,
        "grad_norm_max": max(norms, default=None),
        "bad_steps": len(done) - len(finite),
        "seconds": time.time() - began,
    }
    later = [next(keys)[:FP16_ROWS] for _ in range(FP16_BATCHES)]
    batches = [stage_batch(model, datasets, few) for few in later]
    return about | in_fp16(model, batches)


def mean_or_none(values: list[float]) -> float | None:
    """JSON has no NaN."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


# ---- fp16 ----
def gradient(model: TinyGPTV, batch: dict, dtype: torch.dtype) -> tuple[float, Tensor, float]:
    """Loss and gradient of a copy of the model with its frozen weights in dtype, all in one row,
    and the largest number that one of Phi's linear maps gave."""
    twin = copy.deepcopy(model).eval()
    set_dtype(twin, dtype)
    for block in twin.phi.layers:  # scores in dtype, as the official code has them
        block.self_attn.attend = lambda q, k, v, mask, maps: naive_attention(q, k, v, mask)[0]
    largest = torch.zeros(())

    def note(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        largest.copy_(torch.maximum(largest, output.detach().abs().max().float()))

    for module in twin.phi.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(note)
    with on_queries(twin):
        with autocast(twin.phi.embed_tokens.weight):
            loss = twin(**batch)
        loss.backward()
    grads = [p.grad.flatten() for p in twin.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads), largest.item()


def in_fp16(model: TinyGPTV, batches: list[dict]) -> dict:
    """The share of batches that are not finite in fp16 without a loss scale; in the others, that of
    the gradient's elements that are zero there and not in fp32; the largest activation, in fp32."""
    bad, lost, elements, largest = 0, 0, 0, 0.0
    for batch in batches:
        _, true, most = gradient(model, batch, torch.float32)
        loss, half, _ = gradient(model, batch, torch.float16)
        largest = max(largest, most)
        if math.isfinite(loss) and half.isfinite().all():
            lost += int(((half == 0) & (true != 0)).sum())
            elements += int((true != 0).sum())
        else:
            bad += 1
    return {"fp16_bad": bad / len(batches), "fp16_lost": lost / elements if elements else None,
            "largest_activation": largest}  # fmt: skip


# ---- all runs ----
def world_metrics(model: TinyGPTV, n: int) -> dict:
    """What evaluate.py would say of the model, from pixels on."""
    model.eval()
    settings = evaluate.Config(bench="world", n=n)
    pictures = evaluate.world_pictures(n, settings.seed, "test")
    return metrics(*evaluate.score_all(model, pictures, settings, n))


def result_path(config: Config, name: str, seed: int) -> Path:
    return RESULTS / config.study / f"{name.lower().replace(' ', '-')}-{seed}.json"


def described(config: Config, name: str, seed: int) -> dict:
    """What makes a run this one and no other."""
    return {"study": config.study, "variant": name, "seed": seed, "steps": config.steps,
            "batch_size": config.batch_size, "n": config.n, "scenes": config.scenes,
            "precision": fastest_precision("cpu"),
            "weights": fingerprint(config.weights, BACKBONES)}  # fmt: skip


def is_done(config: Config, name: str, seed: int) -> bool:
    """Whether a run's file is there. Raises ValueError if it is of another run."""
    path = result_path(config, name, seed)
    if not path.exists():
        return False
    before, now = json.loads(path.read_text("utf-8")), described(config, name, seed)
    changed = [f"{key}={before.get(key)}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{path} was made with {', '.join(changed)}: delete it and those beside "
                         "it, or say the same")  # fmt: skip
    return True


def run(job: tuple[str, int], config: Config, pool_path: Path) -> None:
    """One variant with one seed through all stages; writes its file."""
    name, seed = job
    variant = STUDIES[config.study][name]
    pool = torch.load(pool_path, weights_only=True, mmap=True)
    model = new_model(config, variant, seed, pool)
    stages = {}
    for stage, steps in enumerate(map(int, config.steps.split(",")), 1):
        stages[stage] = run_stage(model, stage, steps, variant, seed, config, pool)
        print(f"{name}, seed {seed}, stage {stage}: loss {stages[stage]['loss']}", flush=True)
    result = described(config, name, seed) | {"stages": stages, **world_metrics(model, config.n)}
    path = result_path(config, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def run_all(config: Config) -> dict:
    """All runs of a study that are not there yet; the losses and some metrics of all."""
    jobs = [(name, seed) for seed in range(config.seeds) for name in STUDIES[config.study]]
    left = [job for job in jobs if not is_done(config, *job)]
    if left:
        model = new_model(config, Variant(), 0, {})
        pool_path = open_pool(model, config.weights, config.scenes, config.pool)
        do = partial(run, config=config, pool_path=pool_path)
        if config.workers == 1:
            list(map(do, left))
        else:
            spawn = multiprocessing.get_context("spawn")
            one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
            with ProcessPoolExecutor(config.workers, spawn, **one_thread) as executor:
                list(executor.map(do, left))
    return {"study": config.study, "runs": len(jobs)} | summary(config)


def summary(config: Config) -> dict:
    """The mean over the seeds of each variant's last loss and some metrics."""
    kept = {}
    for name in STUDIES[config.study]:
        runs = [json.loads(result_path(config, name, seed).read_text("utf-8"))
                for seed in range(config.seeds)]  # fmt: skip
        values = {"loss": [run["stages"]["4"]["loss"] for run in runs],
                  "vqa": [run["vqa"]["mean"] for run in runs],
                  "refer": [run["refer_iou50"] for run in runs]}  # fmt: skip
        kept[name] = {key: None if None in many else round(statistics.mean(many), 4)
                      for key, many in values.items()}  # fmt: skip
    return kept


# ---- the command line ----
def parse_arguments(arguments: list[str]) -> Config:
    """key=value pairs -> Config. Raises ValueError for what it can't be."""
    config = Config(**key_values(arguments, Config))
    if config.study not in STUDIES:
        raise ValueError(f"study={config.study}: choose from {', '.join(STUDIES)}")
    steps = config.steps.split(",")
    if len(steps) != 4 or not all(part.isdecimal() and int(part) for part in steps):
        raise ValueError(f"steps={config.steps}: say four numbers, as in {Config.steps}")
    for key in ("seeds", "n", "scenes", "workers"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key}={getattr(config, key)}: it has to be 1 or more")
    return config


def main(arguments: list[str]) -> int:
    try:
        result = run_all(parse_arguments(arguments))
    except (ValueError, OSError) as error:
        print(f"ablation.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
