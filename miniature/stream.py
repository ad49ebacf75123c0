"""The world as training data: scenes drawn and put into words on the fly, one row a position."""

import random

from torch.utils.data import Dataset

from data import Tokenizer, encode_record
from miniature import world

# How often each kind of record is drawn, as the official mixtures say it of their datasets.
RATIOS = {
    1: {"caption": 1},
    2: {"caption": 1},
    3: {"detail": 1},
    4: {"vqa": 40, "refer": 15, "identify": 10, "detection": 10, "grounding": 10, "caption": 15},
}
FIRST_SEED = 2 * 10**8  # far from the scenes of pre-training
SEEDS_PER_TASK = 10**7


class WorldDataset(Dataset):
    """Rows of one task. The scene and its wording depend on (stage, task, seed, position) alone."""

    def __init__(
        self, task: str, stage: int, tokenizer: Tokenizer, image_size: int, num_queries: int,
        seed: int,
    ):  # fmt: skip
        self.task, self.stage, self.seed = task, stage, seed
        self.encoding = (stage, tokenizer, image_size, num_queries)
        number = 10 * stage + world.TASKS.index(task)
        self.first = FIRST_SEED + number * SEEDS_PER_TASK

    def __getitem__(self, position: int) -> dict:
        scene = world.sample_scene(self.first + position, "train")
        rng = random.Random(f"{self.seed} {self.task} {self.stage} {position}")
        size = self.encoding[2]
        record = world.sample_record(scene, rng, self.task, size)
        return encode_record(record, world.render(scene, size), rng, *self.encoding)


def world_mixture(
    stage: int, tokenizer: Tokenizer, image_size: int, num_queries: int, seed: int
) -> tuple[list[WorldDataset], list[float]]:
    """The datasets of a stage and the ratios in which a step draws one of them."""
    encoding = (stage, tokenizer, image_size, num_queries)
    datasets = [WorldDataset(task, *encoding, seed) for task in RATIOS[stage]]
    return datasets, list(RATIOS[stage].values())
