"""Scenes that are looked at once: what the frozen half of the model makes of them, kept.

ViT and Q-Former do not learn in any stage, so of the same picture they always make the same 32
vectors, and making them is most of a step. Here a pool of scenes is encoded once, and all stages
of all runs learn from it: a step then costs what Phi costs.

    encode_scenes, open_pool    the pool, as a file in a temporary folder
    PoolDataset                 rows as miniature/stream.py has them, with vectors for pixels
    on_queries                  a model that takes them
"""

import hashlib
import math
import random
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data import RowSettings, encode_text, preprocess
from miniature import draw, world
from miniature.stream import record_about
from model import TinyGPTV, autocast
from official.checkpoints import replace_file

FIRST_SCENE = 7 * 10**8  # of training, far from the stages' own
PATCH_GRID = (4, 8)  # as many as there are queries
Pool = dict[str, Tensor]  # "queries 112", "patches 224": (scenes, 32, features)


def pooled_patches(features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
    """The ViT's patches (B, 1 + side * side, C), averaged in a grid of 4 x 8: (B, 32, C). What a
    bridge would have to work with if there were no Q-Former, whose place this function takes."""
    side = math.isqrt(features.shape[1] - 1)
    picture = features[:, 1:].float().transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(picture, PATCH_GRID).flatten(2).transpose(1, 2)


@torch.no_grad()
def encode_scenes(model: TinyGPTV, scenes: int, batch_size: int = 40) -> Pool:
    """Queries and pooled patches of so many scenes at both resolutions, as they come, in fp32."""
    small = model.config.vision.image_size
    seen: dict[str, list[Tensor]] = {}
    for size in (small, 2 * small):
        for first in tqdm(range(0, scenes, batch_size), desc=f"scenes at {size} pixels"):
            numbers = range(FIRST_SCENE + first, FIRST_SCENE + min(scenes, first + batch_size))
            drawn = [world.render(world.sample_scene(n, "train"), size) for n in numbers]
            pixel_values = torch.stack([preprocess(image, size) for image in drawn])
            with autocast(model.phi.embed_tokens.weight):
                features = model.visual_encoder(pixel_values)
                views = {"queries": model.qformer(features), "patches": pooled_patches(features)}
            for view, vectors in views.items():
                seen.setdefault(f"{view} {size}", []).append(vectors.float())
    return {name: torch.cat(parts) for name, parts in seen.items()}


def fingerprint(files: Iterable[Path]) -> str:
    """A short hash of what is in some files: results and pools tell whose they are."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def open_pool(model: TinyGPTV, weights: str, scenes: int, folder: str) -> Path:
    """The file of the pool, made if it is not there yet, by one process at a time. folder: "" for
    the system's temporary one."""
    drawn_by = [Path(module.__file__) for module in (world, draw)]
    seen_by = [Path(weights) / f"{name}.safetensors" for name in ("vision", "qformer")]
    name = f"scenes-{scenes}-{fingerprint(drawn_by + seen_by)}.pt"
    path = Path(folder or tempfile.gettempdir()) / name
    if not path.exists():
        pool = encode_scenes(model, scenes)
        with replace_file(path) as temporary:
            torch.save(pool, temporary)
    return path


class PoolDataset(Dataset):
    """Rows of one task as WorldDataset's, about scenes of the pool; the scene and its wording
    depend on (seed, task, stage, position) alone. vectors (scenes, 32, features) stand in the
    place of pixel_values."""

    def __init__(self, task: str, settings: RowSettings, seed: int, vectors: Tensor):
        self.task, self.settings, self.seed, self.vectors = task, settings, seed, vectors

    def __getitem__(self, position: int) -> dict:
        size = self.settings.image_size
        rng = random.Random(f"{self.seed} {self.task} {self.settings.stage} {position}")
        number = rng.randrange(len(self.vectors))
        scene = world.sample_scene(FIRST_SCENE + number, "train")
        record = record_about(scene, rng, self.task, size)
        row = encode_text(record, (size, size), rng, self.settings)
        return row | {"pixel_values": self.vectors[number][None]}


@contextmanager
def on_queries(model: TinyGPTV) -> Iterator[None]:
    """Within, the model takes what the Q-Former has made of pictures, and not their pixels."""
    model.encode_images = lambda queries: model.projector(queries)
    try:
        yield
    finally:
        del model.encode_images
