"""Do words look at what they name? Attention of the miniature against the boxes of its scenes.

    python experiments/attention.py n=100

A caption's words for an object ("large red solid star") and the box that answers "where is the red
star" have their heat, as generate.py --attn draws it. So have the queries, of which pre-training
made 8i to 8i + 7 tell of object i from the left. Which part of the heat lies in the object's box?
By chance it is the box's part of the picture.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import inference_prompt
from experiments.evaluate import FIRST_SCENE, SCENES_PER_SEED, WORLD_SIZE, groups_of
from experiments.pictures import Word, answer_attention, query_looks, token_weights, word_heat
from experiments.command_line import report
from experiments.scores import OBJECT
from generate import answer, encode_images
from miniature import world
from miniature.draw import Scene
from model import TinyGPTV

RESULT = ROOT / "experiments" / "results" / "attention.json"
SLOT = 8  # queries an object: size, color, fill, shape, and the four sides of its box


@dataclass
class Config:
    """How many scenes, and which."""

    n: int = 100  # test scenes
    seed: int = 3  # which ones


Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in parts of the picture
Look = tuple[str, Tensor, Box]  # whose it is, heat (grid, grid), the box that it should be in


# ---- one look ----
def coverage(box: Box, grid: int) -> Tensor:
    """(grid, grid), the part of every patch that lies inside the box."""
    edges = torch.arange(grid + 1) / grid
    x, y = ((edges[1:].clamp(max=box[k + 2]) - edges[:-1].clamp(min=box[k])).clamp(min=0) * grid
            for k in (0, 1))  # fmt: skip
    return y[:, None] * x[None, :]


def inside(heat: Tensor, box: Box) -> Tensor:
    """The part inside the box (3,) of the heat, of the hottest patch, and of the picture."""
    covered = coverage(box, len(heat))
    share = (heat * covered).sum() / heat.sum()
    return torch.stack([share, covered.flatten()[heat.argmax()], covered.mean()])


# ---- the looks of scenes ----
def named(words: list[Word], scene: Scene) -> Iterator[tuple[int, Box]]:
    """The places of a caption's words that name an object of the scene, each with its box.
    Articles do not name it."""
    boxes = {world.noun(world.describe(obj)): obj.box for obj in scene.objects}
    for start in range(len(words)):
        match = OBJECT.fullmatch(" ".join(word for word, _ in words[start : start + 5]).strip(","))
        if match and match["phrase"] in boxes:
            yield from ((place, boxes[match["phrase"]]) for place in range(start + 1, start + 5))


def word_looks(
    kind: str, words: list[Word], attention: Tensor, looks: Tensor,
    targets: Iterable[tuple[int, Box]],
) -> Iterator[Look]:  # fmt: skip
    """The looks of some words, as they are drawn and by other choices of Phi's layers. attention:
    of `answer_attention`; looks (num_queries, grid, grid); targets: places and boxes."""
    if not words:  # an empty answer
        return
    by_layer = attention.mean(dim=1)  # (num_layers, num_tokens, num_queries)
    choices = {"as drawn": token_weights(attention), "plain mean": by_layer.mean(dim=0)}
    choices |= {f"layer {layer}": weights for layer, weights in enumerate(by_layer)}
    heats = {choice: word_heat(weights, words, looks) for choice, weights in choices.items()}
    for place, box in targets:
        yield from ((f"{kind} {choice}", heat[place], box) for choice, heat in heats.items())


def scene_looks(model: TinyGPTV, scenes: list[Scene]) -> Iterator[Look]:
    """All that is measured of some scenes: the words of a caption, of one object's box, queries."""
    rng, maps = random.Random(0), []
    embeds = encode_images(model, [world.render(scene, WORLD_SIZE) for scene in scenes], maps)
    objects = [rng.choice(scene.objects) for scene in scenes]
    phrases = [world.unique_phrase(scene, obj, rng) for scene, obj in zip(scenes, objects)]
    describe = inference_prompt("caption", "", model.stage)
    refer = [inference_prompt("refer", phrase, model.stage) for phrase in phrases]
    captions, boxes = answer(model, embeds, [describe] * len(scenes)), answer(model, embeds, refer)
    for n, scene in enumerate(scenes):
        for layer, attention_map in enumerate(maps):  # of those that look at the picture
            looks = query_looks(attention_map[n])  # the last layer's stays
            for number, obj in enumerate(scene.objects):
                for k, look in enumerate(looks[SLOT * number : SLOT * (number + 1)]):
                    yield f"queries layer {layer}, {k} of {SLOT}", look, obj.box
        words, attention = answer_attention(model, embeds[n : n + 1], describe, captions[n])
        yield from word_looks("caption", words, attention, looks, named(words, scene))
        words, attention = answer_attention(model, embeds[n : n + 1], refer[n], boxes[n])
        targets = [(place, objects[n].box) for place in range(len(words))]
        yield from word_looks("refer", words, attention, looks, targets)


# ---- all of them ----
def summary(parts: dict[str, list[Tensor]], beginning: str) -> dict:
    """Means of `inside` over all looks whose name begins like this."""
    rows = [row for name, some in parts.items() if name.startswith(beginning) for row in some]
    share, hottest, chance = (round(mean, 3) for mean in torch.stack(rows).mean(dim=0).tolist())
    return {"looks": len(rows), "share": share, "hottest": hottest, "chance": chance}


def measure(config: Config) -> dict:
    """What `main` prints."""
    model = TinyGPTV.from_pretrained(ROOT / "miniature" / "weights")
    first = FIRST_SCENE + config.seed * SCENES_PER_SEED
    parts: dict[str, list[Tensor]] = {}
    for numbers in groups_of(20, range(first, first + config.n)):
        scenes = [world.sample_scene(number, "test") for number in numbers]
        for name, heat, box in scene_looks(model, scenes):
            parts.setdefault(name, []).append(inside(heat, box))
    *_, last = (name for name in parts if name.startswith("queries"))
    kinds = {"caption": "caption as drawn", "refer": "refer as drawn",
             "queries": last.split(",")[0] + ","}  # fmt: skip
    return {
        "n": config.n, "seed": config.seed,
        **{kind: summary(parts, beginning) for kind, beginning in kinds.items()},
        "share_by_choice": {name: summary(parts, name)["share"] for name in parts},
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return report(arguments, Config, measure, RESULT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
