"""The world as training data: scenes drawn and put into words on the fly, one row a position."""

import random

from torch.utils.data import Dataset

from data import RowSettings, encode_record, plain_turns
from miniature import world

# How often each kind of record is drawn, as the official mixtures say it of their datasets.
RATIOS = {
    1: {"caption": 1},
    2: {"caption": 1},
    3: {"detail": 1},
    4: {"chat": 50, "vqa": 4, "refer": 6, "identify": 4, "detection": 8, "grounding": 16,
        "caption": 12},
}  # fmt: skip
# What the turns of a conversation are about, and how often. The official mixture has conversations
# of many tasks, too; here they are most of it, because to encode a picture costs more than a
# further question about it.
TURNS = {"vqa": 5, "compare": 4, "identify": 4, "refer": 3, "count": 2, "where": 1}
NUM_TURNS = 6
FIRST_SEED = 2 * 10**8  # far from the scenes of pre-training
SEEDS_PER_TASK = 10**7


class WorldDataset(Dataset):
    """Rows of one task. The scene depends on (stage, task, position) alone, its wording on the
    seed, too."""

    def __init__(self, task: str, settings: RowSettings, seed: int):
        self.task, self.settings, self.seed = task, settings, seed
        number = 10 * settings.stage + (*world.TASKS, "chat").index(task)
        self.first = FIRST_SEED + number * SEEDS_PER_TASK

    def __getitem__(self, position: int) -> dict:
        scene = world.sample_scene(self.first + position, "train")
        rng = random.Random(f"{self.seed} {self.task} {self.settings.stage} {position}")
        size = self.settings.image_size
        record = record_about(scene, rng, self.task, size)
        return encode_record(record, world.render(scene, size), rng, self.settings)


def record_about(scene: world.Scene, rng: random.Random, task: str, size: int) -> dict:
    """A record of a task of RATIOS about a scene."""
    if task == "chat":
        return conversation(scene, rng, size)
    return world.sample_record(scene, rng, task, size)


def conversation(scene: world.Scene, rng: random.Random, size: int) -> dict:
    """A record of NUM_TURNS questions about one scene, each with the tag of its task."""
    turns = []
    for task in rng.choices(list(TURNS), list(TURNS.values()), k=NUM_TURNS):
        if task in world.VQA_KINDS:  # not every kind can be asked of every scene
            record = world.vqa_record(scene, rng, task)
        else:
            record = world.sample_record(scene, rng, task, size)
        record = record or world.sample_record(scene, rng, "vqa", size)
        turns += map(list, plain_turns(record, 4, rng, (size, size)))
    return {"task": "chat", "turns": turns}


def world_mixture(settings: RowSettings, seed: int) -> tuple[list[WorldDataset], list[float]]:
    """The datasets of a stage and the ratios in which a step draws one of them."""
    ratios = RATIOS[settings.stage]
    return [WorldDataset(task, settings, seed) for task in ratios], list(ratios.values())
