"""The official data in training: image-text shards, and the mixture of a folder.

The folder holds, for each dataset of the stage, a file NAME.jsonl (official/convert.py makes it)
or a folder NAME with tar shards in it or below. Names, ratios and batch sizes are in mixture.json:

    {stage: {name: [how often it is drawn, samples a process gets of it in a step], ...}, ...}

The official numbers are in the mixture.json beside this file; those of stage 4 are from the
configuration XGPTv2_stage4, which has COCO's captions and OCR-VQA, too. A mixture.json in the
folder itself goes before it: so you mix data of your own.
"""

import io
import json
import os
import random
import sys
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data import (
    RecordDataset, RowSettings, encode_record, load_image, printable, read_records, usable_row,
    validate_record,
)  # fmt: skip
from official.fetch import is_file_name

OFFICIAL = Path(__file__).with_name("mixture.json")
BLOCK = 512  # a tar file's bytes come in blocks; one of zeros stands at its end
Members = dict[str, tuple[int, int]]  # by their endings: where in the shard, how many bytes


# ---- shards ----
class ShardDataset(Dataset):
    """Rows of image-text shards, for ever: position p is item p % visit of visit p // visit.

    Each visit reads one shard, drawn with replacement as the official code does, in an order of
    its own. Both depend on seed and position alone, so that is all a resumed run needs. A pair
    that cannot be used is replaced by one of the next visit; "skipped" in the row says why.

    Several processes divide the samples among them, not the shards: of n each takes every n-th
    position. They mostly read the same shard at a time, but different pairs of it. That is how n
    processes learn just what one does with a batch n times as large.
    """

    def __init__(self, shards: list[Path], settings: RowSettings, seed: int = 0):
        self.shards, self.settings, self.seed = shards, settings, seed
        # The largest shard is not one that was cut. What others have beyond its number of pairs
        # is left to their next visit; those that have fewer begin again.
        self.visit = len(read_index(max(shards, key=os.path.getsize)))

    def __getitem__(self, position: int) -> dict:
        return usable_row(self._row, range(position, position + 20 * self.visit, self.visit))

    def _row(self, position: int) -> dict:
        visit, place = divmod(position, self.visit)
        draw = np.random.default_rng((self.seed, self.settings.stage, visit))
        shard = self.shards[draw.integers(len(self.shards))]
        try:
            pairs = read_index(shard)
            key, members = pairs[draw.permutation(len(pairs))[place % len(pairs)]]
            record, image = read_pair(shard, key, members)
        except OSError as error:
            raise ValueError(f"cannot read a shard: {error}") from error
        rng = random.Random(f"{self.seed} {position}")
        return encode_record(record, image, rng, self.settings)


@lru_cache(maxsize=4)
def read_index(shard: Path) -> list[tuple[str, Members]]:
    """The keys of a shard in webdataset's layout (KEY.jpg, KEY.json), and where their members are.

    If the shard is empty, cut off or damaged, an item without members stands at the end.
    """
    pairs: dict[str, Members] = {}
    end = 0
    with open(shard, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        try:
            for member in tarfile.open(fileobj=file, mode="r:"):
                if member.offset < end or not 0 <= member.size <= length - member.offset_data:
                    break  # it would lead round in circles, or out of the file
                folder, slash, name = member.name.rpartition("/")
                key, _, ending = name.partition(".")
                end = member.offset_data
                if member.isreg():
                    place = (member.offset_data, member.size)
                    pairs.setdefault(folder + slash + key, {})[ending.lower()] = place
                    end += -(-member.size // BLOCK) * BLOCK
        except Exception:  # a damaged header can make tarfile raise anything,
            pass  # and it does not always say that what came next was no member
        file.seek(end)
        whole = file.read(BLOCK) == bytes(BLOCK)
    return list(pairs.items()) + ([] if pairs and whole else [("", {})])


def read_pair(shard: Path, key: str, members: Members) -> tuple[dict, Image.Image]:
    """A caption's record and its picture. Raises ValueError, beginning with the shard."""
    if not members:
        raise ValueError(f"{shard} is empty, cut off or damaged; what can be read of it is used")
    name = printable(key)
    picture = next((ending for ending in ("jpg", "jpeg", "png") if ending in members), "picture")
    content = {}
    with open(shard, "rb") as file:
        for ending in (picture, "json"):
            if ending not in members:
                raise ValueError(f"{shard}: {name} has no {ending}")
            start, size = members[ending]
            file.seek(start)
            content[ending] = file.read(size)
    try:
        caption = json.loads(content["json"])["caption"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{shard}: there is no caption in {name}.json") from None
    record = {"image": key, "task": "caption", "caption": caption}
    validate_record(record, f"{shard}: {name}")
    try:
        return record, load_image(io.BytesIO(content[picture]))
    except ValueError:  # its message would name no file
        raise ValueError(f"{shard}: the picture {name}.{picture} is damaged") from None


# ---- mixtures ----
def has_mixture(path: str | Path) -> bool:
    """Whether it is a folder with datasets, and not one with somebody's pictures."""
    patterns = ("mixture.json", "*.jsonl", "*/*.tar", "*/*/*.tar")
    return any(next(Path(path).glob(pattern), None) for pattern in patterns)


def read_mixture(folder: Path, stage: int) -> dict[str, tuple[float, int]]:
    """Ratio and batch size of each dataset of a stage, as the folder says, or else officially."""
    path = folder / "mixture.json"
    path = path if path.exists() else OFFICIAL
    try:
        mixture = json.loads(path.read_text("utf-8"))[str(stage)]
        numbers = {name: (float(ratio), int(size)) for name, (ratio, size) in mixture.items()}
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
            ValueError) as error:  # fmt: skip
        like = f'{{"{stage}": {{"mine": [1, 6]}}}}: a ratio and a batch size for mine.jsonl'
        raise ValueError(f"{path} must be like {like} ({error!r:.200})") from error
    if not numbers or not all(0 < x < 1e6 for pair in numbers.values() for x in pair):
        raise ValueError(f"{path}: ratios and batch sizes of stage {stage} must be above 0 and "
                         "below a million")  # fmt: skip
    for name in numbers:
        if not is_file_name(name):
            raise ValueError(f"{path}: {name!r:.80} is no name of a dataset in its folder")
    return numbers


def find_dataset(folder: Path, name: str) -> list[Path]:
    """Its record file or its shards."""
    file = folder / f"{name}.jsonl"
    return [file] if file.exists() else sorted((folder / name).rglob("*.tar"))


def folder_mixture(
    folder: str | Path, settings: RowSettings, seed: int, allow_missing: bool = False
) -> tuple[list[Dataset], list[float], list[int]]:
    """The datasets of a stage in a folder, how often each is drawn, and its batch size.

    Raises ValueError if datasets are missing, unless they are allowed to and not all are.
    """
    folder = Path(folder)
    mixture = read_mixture(folder, settings.stage)
    found = {name: find_dataset(folder, name) for name in mixture}
    present = [name for name in mixture if found[name]]
    if missing := [name for name in mixture if not found[name]]:
        words = f"{folder} has no NAME.jsonl nor NAME/*.tar for {', '.join(missing)}"
        if not (allow_missing and present):
            raise ValueError(
                f"{words}; make them with official/convert.py, go on without them with "
                f"allow_missing=1, or say in {folder / 'mixture.json'} what there is"
            )
        print(f"{words}; stage {settings.stage} goes on without them", file=sys.stderr)
    datasets: list[Dataset] = []
    for name in present:
        if found[name][0].suffix == ".tar":
            datasets.append(ShardDataset(found[name], settings, seed))
        else:
            datasets.append(RecordDataset(read_records(found[name][0]), settings, seed))
    ratios, batch_sizes = zip(*(mixture[name] for name in present))
    return datasets, list(ratios), list(batch_sizes)
