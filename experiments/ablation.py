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
without them. The miniature's Phi grew up with them, and breaks without. Therefore a norm becomes a
constant: the mean over the tokens of 40 texts of what it subtracts and of what it multiplies with,
one number a layer, for q and k one a head. Its trainable weight stays, and only what makes a norm
is gone: that it answers to each token's own size. Even so Phi is damaged, and the stages have to
mend that, too: `untrained` is the loss of the finished, shipped model with the same edit, and tells
how much. Without LoRA, all else is trained as with it.

How to read it. Only the full model's learning rates were tuned. The stages are shorter than the
shipped ones and learn from a pool of scenes that are encoded once, so that "full" is not the
shipped model. Seeds change the projection, LoRA, the order of scenes and their wording, in the same
way for all variants: their differences are to be compared seed by seed. Six layers may be too few
to overflow as 32 do; what fp16 does to a step (fp16.py) is looked at before and after each stage.
"""

import json
import math
import multiprocessing
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import make_sample
from experiments import evaluate
from experiments.command_line import exit_code, key_values, other_weights, unusual
from experiments.encoded_scenes import (
    Pool,
    PoolDataset,
    fingerprint,
    on_queries,
    open_pool,
    pooled_patches,
)
from experiments.fp16 import finite, in_fp16
from experiments.scores import metrics
from lora import merge_lora
from miniature import world
from miniature.pretrain_language import language_row
from miniature.pretrain_projection import whitening
from miniature.stream import RATIOS, conversation
from model import DTYPES, RMSNorm, TinyGPTV, autocast
from official.checkpoints import replace_file
from train import (
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
    settings_of,
    to_device,
    train_step,
)

RESULTS = ROOT / "experiments" / "results" / "ablation"
BACKBONES = [f"{part}.safetensors" for part in ("vision", "qformer", "projection", "phi")]
FIRST_TEXT, NUM_TEXTS = 8 * 10**8, 40
LAST_STEPS = 50  # a stage's final loss is the mean of so many
FP16_BATCHES, FP16_ROWS = 2, 8  # before and after each stage: a CPU multiplies fp16 slowly
UNTRAINED_ROWS = 64
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


@dataclass
class Config:
    """Which runs, and how long each is."""

    study: str = "norms"
    seeds: int = 3  # runs of each variant
    steps: str = "300,100,100,300"  # of stages 1 to 4
    batch_size: int = 0  # default: each stage's own
    n: int = 200  # test scenes
    scenes: int = 6000  # of training, encoded once at each resolution
    pool: str = ""  # the folder where they are kept; default: the system's temporary one
    workers: int = 1  # runs side by side, if several each on one thread
    weights: str = str(ROOT / "miniature" / "weights")


# ---- variants ----
@dataclass(frozen=True)
class Variant:
    """What is different in a model, and in what it learns from. The default is the full model."""

    edit: Callable[[TinyGPTV], None] = lambda model: None  # applied once
    since: int = 1  # the stage that begins with it
    ratios: dict[str, int] = field(default_factory=lambda: RATIOS[4])  # of stage 4
    view: str = "queries"  # what of the pool it learns from; or "patches"


class ConstantNorm(nn.Module):
    """A norm whose mean and scale are constants: y = (x - mean) * scale * weight + bias, where the
    weight learns as before."""

    def __init__(self, norm: nn.Module, mean: Tensor, scale: Tensor):
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., T, C) -> the same shape."""
        y = (x.float() - self.mean) * self.scale * self.weight
        return y if self.bias is None else y + self.bias


def statistics_of(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm subtracts from each token of x (..., T, C) and multiplies it with: (2, ..., T).
    RMSNorm subtracts nothing."""
    x = x.float()
    mean = torch.zeros_like(x[..., 0]) if isinstance(norm, RMSNorm) else x.mean(-1)
    return torch.stack([mean, ((x - mean[..., None]).square().mean(-1) + norm.eps).rsqrt()])


@torch.no_grad()
def make_constant(model: TinyGPTV, names: tuple[str, ...]) -> None:
    """Replaces the norms of these names in all of Phi's layers by constants."""
    found = [(parent, name) for parent in model.phi.modules() for name in names
             if hasattr(parent, name)]  # fmt: skip
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
        setattr(parent, name, ConstantNorm(norm, *constants))


def text_embeds(model: TinyGPTV) -> list[Tensor]:
    """Texts, (1, T, hidden_size): conversations about scenes, which are written out in 32 words
    where their picture would be, nearly as Phi was pre-trained on them (pretrain_language.py)."""
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
        """(B, 32, C) -> (B, 4, 8, C) -> (B, 4 * kept, C)."""
        return queries.unflatten(1, (-1, 8))[:, :, : self.kept].flatten(1, 2)


def keep_queries(model: TinyGPTV, kept: int) -> None:
    """4 * kept of the 32 queries, those first that Phi can do least without."""
    model.config.qformer = replace(model.config.qformer, num_queries=4 * kept)
    model.projector = nn.Sequential(EachObjects(kept), model.projector)


def one_linear_map(model: TinyGPTV) -> None:
    """Both projections multiplied out: the same function, with a single matrix to learn."""
    first, second = model.projector.fc1, model.projector.fc2
    model.projector = nn.Linear(first.in_features, second.out_features)
    model.projector.weight.data = second.weight.data @ first.weight.data
    model.projector.bias.data = second(first.bias).data


def mlp_projection(model: TinyGPTV) -> None:
    """A GELU between both projections, as in LLaVA-1.5."""
    first, second = model.projector.children()
    model.projector = nn.Sequential(first, nn.GELU(), second)


def look_at_patches(model: TinyGPTV) -> None:
    """32 means of patches, which were never taught to be words, in the place of the Q-Former."""
    model.qformer.forward = pooled_patches


def keep_resolution(model: TinyGPTV) -> None:
    """Stage 4 doubles what the configuration says."""
    size = model.config.vision.image_size // 2
    model.config.vision = replace(model.config.vision, image_size=size)


STUDIES = {
    "norms": {
        "full": Variant(),
        "no LoRA": Variant(lambda model: merge_lora(model.phi), since=2),
        "no input LayerNorm": Variant(partial(make_constant, names=("input_layernorm",))),
        "no RMSNorm": Variant(partial(make_constant, names=("post_layernorm",))),
        "no QK-norm": Variant(partial(make_constant, names=("q_layernorm", "k_layernorm"))),
    },
    # Of each object's eight queries the last two were taught its right and bottom edge, the two
    # before them left and top; the others may know of them, too.
    "queries": {"24 queries": Variant(partial(keep_queries, kept=6)),
                "16 queries": Variant(partial(keep_queries, kept=4))},
    "projection": {"one linear map": Variant(one_linear_map), "MLP": Variant(mlp_projection)},
    "bridge": {"pooled patches": Variant(look_at_patches, view="patches")},
    "resolution": {"not doubled": Variant(keep_resolution, since=4)},
    "mixture": {"single questions": Variant(ratios=RATIOS[4] | {"chat": 0})},
}  # fmt: skip


# ---- one run ----
def new_model(config: Config, variant: Variant, seed: int, pool: Pool) -> TinyGPTV:
    """The backbones with a new projection, in the precision that train.py would choose."""
    torch.manual_seed(seed)
    dtype = DTYPES[fastest_precision("cpu")]
    model = TinyGPTV.from_pretrained(config.weights, 0, "cpu", dtype)
    if variant.view == "patches":  # what pretrain_projection.py does for queries
        first = model.projector.fc1
        seen = [vectors for name, vectors in pool.items() if name.startswith("patches")]
        weight, bias = whitening(torch.cat(seen).flatten(0, 1))
        turned = torch.randn(first.weight.shape) / len(weight) ** 0.5
        first.weight.data, first.bias.data = turned @ weight, turned @ bias
    return model


def stage_batch(model: TinyGPTV, datasets: MixtureDataset, keys: list) -> dict:
    """Rows of these keys as one batch."""
    rows = [datasets[key] for key in keys]
    [batch] = micro_batches(rows, 0, model.tokenizer.pad_token_id)
    return to_device(batch, "cpu")


def pool_mixture(
    model: TinyGPTV, ratios: dict[str, int], view: str, seed: int, pool: Pool
) -> MixtureDataset:
    """The datasets that the model's stage draws from, in the order of `ratios`."""
    settings = settings_of(model)
    vectors = pool[f"{view} {model.image_size}"]
    return MixtureDataset([PoolDataset(task, settings, seed, vectors) for task in ratios])


def run_stage(
    model: TinyGPTV, stage: int, steps: int, variant: Variant, seed: int, config: Config, pool: Pool
) -> dict:
    """One stage as train.py has it, but for the pool in the place of new pictures; what came of
    it."""
    began = time.time()
    torch.manual_seed(seed + stage)  # of LoRA's beginnings
    enter_stage(model, stage, "mini")
    if stage == variant.since:
        variant.edit(model)
    set_trainable(model)
    model.train()
    schedule = schedule_of(TrainConfig(stage=stage, steps=steps, batch_size=config.batch_size))
    ratios = variant.ratios if stage == 4 else RATIOS[stage]
    datasets = pool_mixture(model, ratios, variant.view, seed, pool)
    keys = mixture_batches([*ratios.values()], [schedule.batch_size] * len(ratios), seed)
    probes = [stage_batch(model, datasets, next(keys)[:FP16_ROWS]) for _ in range(FP16_BATCHES)]
    optimizer, done, fp16 = new_optimizer(model), [], [in_fp16(model, probes)]
    with on_queries(model):
        for step in range(steps):
            torch.manual_seed(seed * 10**6 + step)  # of this step's dropout
            batch = stage_batch(model, datasets, next(keys))
            lr = learning_rate(schedule, 0, step)
            done.append(train_step(model, optimizer, NO_SCALING, [batch], lr))
    norms = [norm for loss, norm in done if math.isfinite(loss) and math.isfinite(norm)]
    return {
        "loss": finite(statistics.fmean(loss for loss, _ in done[-LAST_STEPS:])),
        "grad_norm_median": statistics.median(norms) if norms else None,
        "grad_norm_max": max(norms, default=None),
        "bad_steps": len(done) - len(norms),
        "fp16": [*fp16, in_fp16(model, probes)],  # before and after
        "seconds": time.time() - began,
    }


@torch.no_grad()
def untrained_loss(variant: Variant, config: Config, pool: Pool) -> float | None:
    """The loss of the finished, shipped model with the variant's edit, about scenes of the pool:
    what the edit alone does, before anything learns to live with it."""
    if variant.view != "queries":
        return None
    dtype = DTYPES[fastest_precision("cpu")]
    model = TinyGPTV.from_pretrained(config.weights, 4, "cpu", dtype)
    variant.edit(model)
    batch = stage_batch(model, pool_mixture(model, {"chat": 1}, "queries", 0, pool),
                        [(0, position) for position in range(UNTRAINED_ROWS)])  # fmt: skip
    with on_queries(model), autocast(model.phi.embed_tokens.weight):
        return finite(model(**batch).item())


# ---- all runs ----
def world_metrics(model: TinyGPTV, n: int) -> dict:
    """What evaluate.py would say of the model, from pixels on."""
    model.eval()
    settings = evaluate.Config(bench="world", n=n)
    pictures = evaluate.world_pictures(n, settings.seed, "test")
    return metrics(*evaluate.score_all(model, pictures, settings, n))


def result_path(config: Config, name: str, seed: int) -> Path:
    """The file of a run, with every option in its name that is not as usual."""
    parts = [f"{name.lower().replace(' ', '-')}-{seed}",
             *unusual(config, ("steps", "batch_size", "n", "scenes")),
             *other_weights(config.weights, Config.weights)]  # fmt: skip
    return RESULTS / config.study / f"{'_'.join(parts)}.json"


def read_run(path: Path) -> dict:
    """A run's result. Raises ValueError for a file that is damaged."""
    try:
        run = json.loads(path.read_text("utf-8"))
        run["variant"], run["seed"], run["stages"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r:.80}): delete it to run it anew") from error
    return run


def described(config: Config, name: str, seed: int) -> dict:
    """What makes a run this one and no other."""
    return {"study": config.study, "variant": name, "seed": seed, "steps": config.steps,
            "batch_size": config.batch_size, "n": config.n, "scenes": config.scenes,
            "precision": fastest_precision("cpu"),
            "weights": fingerprint(Path(config.weights) / name for name in BACKBONES)}  # fmt: skip


def is_done(config: Config, name: str, seed: int) -> bool:
    """Whether a run's file is there. Raises ValueError if it is of another run."""
    path = result_path(config, name, seed)
    if not path.exists():
        return False
    before, now = read_run(path), described(config, name, seed)
    changed = [f"{key}={before.get(key)}" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{path} was made with {', '.join(changed)}, and all runs of a study have "
                         "to be alike: move its folder away to begin anew")  # fmt: skip
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
    result = described(config, name, seed) | {
        "untrained": untrained_loss(variant, config, pool), "stages": stages,
        **world_metrics(model, config.n),
    }  # fmt: skip
    path = result_path(config, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def run_all(jobs: list[tuple[str, int]], config: Config, pool_path: Path) -> None:
    """The runs, as many side by side as there are workers; the first that fails ends all."""
    do = partial(run, config=config, pool_path=pool_path)
    if config.workers == 1:
        for job in jobs:
            do(job)
        return
    spawn = multiprocessing.get_context("spawn")
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ProcessPoolExecutor(config.workers, spawn, **one_thread) as executor:
        try:
            for future in as_completed([executor.submit(do, job) for job in jobs]):
                future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def summary(config: Config) -> dict:
    """The means over the seeds of some scores of each variant."""
    kept = {}
    for name in STUDIES[config.study]:
        runs = [read_run(result_path(config, name, seed)) for seed in range(config.seeds)]
        kept[name] = {"vqa": round(statistics.mean(run["vqa"]["mean"] for run in runs), 4),
                      "refer": round(statistics.mean(run["refer_iou50"] for run in runs), 4)}
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
    if config.batch_size < 0:
        raise ValueError(f"batch_size={config.batch_size}: it has to be 0 or more")
    return config


def run_study(arguments: list[str]) -> None:
    """Runs what of a study has not been run yet; prints the summary."""
    config = parse_arguments(arguments)
    jobs = [(name, seed) for seed in range(config.seeds) for name in STUDIES[config.study]]
    if left := [job for job in jobs if not is_done(config, *job)]:
        model = new_model(config, Variant(), 0, {})
        run_all(left, config, open_pool(model, config.weights, config.scenes, config.pool))
    print(json.dumps({"study": config.study, "runs": len(jobs)} | summary(config)))


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return exit_code(lambda: run_study(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
