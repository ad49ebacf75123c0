"""Pre-training of the miniature's ViT and Q-Former, in one run: see pretrain.py.

Every patch learns to say what it shows and where that lies: the object's place in the row from
left to right, and its eight words. Query k learns to say word k of the scene written out as 32
words (world.inventory): that is BLIP-2's captioning, with a caption of fixed form. The heads are
linear and are thrown away afterwards; so their accuracy is that of a linear probe, and what they
can read, a linear projection can hand on to a language model.
"""

import itertools
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from bridge import QFORMER_PRESETS, QFormer
from data import IGNORE, preprocess
from miniature import world
from miniature.steps import adamw, optimizer_step, save_half, warmup_cosine
from vision import VISION_PRESETS, EvaViT

SLOTS, SLOT_WORDS = world.MAX_OBJECTS, 8  # a slot is size, color, fill, shape, x1, y1, x2, y2
ATTRIBUTES = tuple(world.ATTRIBUTES)
NUMBERS = [str(number) for number in range(100)]
WORDS = ["none", *world.SIZES, *world.COLORS, *world.FILLS, *world.SHAPES, *NUMBERS]
COLOR_PLACE = ATTRIBUTES.index("color")
TIE = 3  # hundredths that count as the same place


class VisionScenes(IterableDataset):
    """Batches of rendered scenes with their targets, without end, for one worker. Every third
    batch has doubled resolution, as stage 4 will; it is smaller, for it costs four times as much.
    """

    def __init__(self, batch_size: int, image_size: int):
        self.batch_size, self.image_size = batch_size, image_size

    def __iter__(self):
        for number in itertools.count():
            doubled = number % 3 == 2
            size = self.image_size * (2 if doubled else 1)
            batch_size = self.batch_size // (3 if doubled else 1)
            first = number * self.batch_size
            yield vision_batch("train", range(first, first + batch_size), size)


def vision_batch(split: str, seeds: range, image_size: int) -> dict[str, Tensor]:
    """Pictures and targets of the scenes with these seeds."""
    scenes = [world.sample_scene(seed, split) for seed in seeds]
    pictures = [world.render(scene, image_size) for scene in scenes]
    pixel_values = torch.stack([preprocess(picture, image_size) for picture in pictures])
    words = torch.tensor([[WORDS.index(word) for word in world.inventory(s)] for s in scenes])
    boxes = torch.zeros(len(scenes), SLOTS, 4)
    for row, scene in zip(boxes, scenes):
        for slot, obj in zip(row, scene.objects):
            slot[:] = torch.tensor(obj.box)
    return {"pixel_values": pixel_values, "words": words, "boxes": boxes}


def hide_colors(batch: dict[str, Tensor], generator: torch.Generator) -> None:
    """In half of the pictures shuffles the color channels or makes them grey, and takes the color
    words out of the targets: shape must be seen whatever the color, or a star would be unknown in
    a color that stars never had."""
    pixel_values, words = batch["pixel_values"], batch["words"]
    for index in range(len(pixel_values) // 2):
        order = torch.randperm(3, generator=generator)
        if index % 4 == 0:
            pixel_values[index] = pixel_values[index].mean(0, keepdim=True)
        else:
            pixel_values[index] = pixel_values[index][order]
        words[index].view(SLOTS, SLOT_WORDS)[:, COLOR_PLACE] = IGNORE


def patch_targets(batch: dict[str, Tensor], grid: int) -> Tensor:
    """For each patch (B, grid*grid) the slot of the object on whose box its centre lies, -1 for
    none."""
    centre = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
    x1, y1, x2, y2 = batch["boxes"][:, None].unbind(-1)  # each (B, 1, slots)
    inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)  # (B, patches, slots)
    return torch.where(inside.any(-1), inside.int().argmax(-1), -1)


class VisionHeads(nn.Module):
    """The linear heads of pre-training: what patches and queries must be able to tell."""

    def __init__(self, vision_size: int, query_size: int):
        super().__init__()
        self.patch_slot = nn.Linear(vision_size, SLOTS + 1)
        self.patch_words = nn.Linear(vision_size, SLOT_WORDS * len(WORDS))
        self.query_words = nn.Linear(query_size, len(WORDS))
        self.query_attributes = nn.Linear(query_size, len(ATTRIBUTES) * len(WORDS))


def said_by_patches(
    heads: VisionHeads, features: Tensor, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the slots that the patches tell; then, for the patches that show an object, logits
    (n, 8, words) and truth (n, 8) of that object's words."""
    patches = features[:, 1:].float()  # without the class token
    slot = patch_targets(batch, grid=math.isqrt(patches.shape[1]))
    loss = F.cross_entropy(heads.patch_slot(patches).flatten(0, 1), (slot + 1).flatten())
    shown = slot >= 0
    image = torch.arange(len(slot))[:, None].expand_as(slot)
    words = batch["words"].view(-1, SLOTS, SLOT_WORDS)[image[shown], slot[shown]]  # (n, 8)
    logits = heads.patch_words(patches[shown]).unflatten(-1, (SLOT_WORDS, -1))
    return loss, logits, words


def patch_loss(heads: VisionHeads, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Every patch tells which object it shows, counted from the left, and its eight words."""
    loss, logits, words = said_by_patches(heads, features, batch)
    said = F.cross_entropy(logits.flatten(0, 1), words.flatten(), ignore_index=IGNORE)
    return loss + SLOT_WORDS * said


def allowed_orders(words: Tensor) -> tuple[Tensor, Tensor]:
    """All orders of four objects (24, 4), and which (B, 24) keep them from left to right but for
    ties: two objects, one above the other, have no first, and either order is a right answer."""
    orders = torch.tensor(list(itertools.permutations(range(SLOTS))))
    slots = words.view(-1, SLOTS, SLOT_WORDS)
    first_number = WORDS.index("0")
    middle = (slots[..., 4] + slots[..., 6] - 2 * first_number).float() / 2  # (B, 4)
    middle = middle.masked_fill(slots[..., 0] == WORDS.index("none"), 1000.0)
    placed = middle[:, orders]  # (B, 24, 4)
    highest_before = placed.cummax(-1).values
    return orders, (highest_before - placed <= TIE).all(-1)


def pair_costs(logits: Tensor, words: Tensor) -> Tensor:
    """Cross entropy (B, 4, 4) of what is said in slot i (B, 4, n, words) if object j (B, 4, n)
    stands there, summed over the n words."""
    batch_size, _, num_words, _ = logits.shape
    pairs = (batch_size, SLOTS, SLOTS, num_words)
    said = logits[:, :, None].expand(*pairs, len(WORDS)).flatten(0, 3)
    true = words[:, None].expand(pairs).flatten()
    return F.cross_entropy(said, true, ignore_index=IGNORE, reduction="none").view(pairs).sum(-1)


def query_loss(heads: VisionHeads, queries: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of what the queries say under the best allowed order, and the words in that order.

    Query k says word k, and also the four attributes of the object that word k belongs to: so a
    vector that holds a number can be found by what it is the number of.
    """
    queries, slots = queries.float(), words.view(-1, SLOTS, SLOT_WORDS)
    own = heads.query_words(queries).unflatten(1, (SLOTS, SLOT_WORDS))  # (B, 4, 8, words)
    attributes = heads.query_attributes(queries).view(len(words), SLOTS, -1, len(WORDS))
    known = slots[..., : len(ATTRIBUTES)].repeat(1, 1, SLOT_WORDS)  # (B, 4, 32)
    cost = pair_costs(own, slots) + pair_costs(attributes, known) / SLOT_WORDS
    orders, allowed = allowed_orders(words)
    total = cost[:, torch.arange(SLOTS), orders].sum(-1)  # (B, 24)
    best = total.masked_fill(~allowed, float("inf")).min(-1)
    ordered = slots.gather(1, orders[best.indices][..., None].expand(-1, -1, SLOT_WORDS))
    return best.values.mean() / (SLOTS * SLOT_WORDS), ordered.flatten(1)


def word_accuracies(said: Tensor, true: Tensor, by: str) -> dict[str, Tensor]:
    """Shares of right attributes, and of boxes within 3 hundredths on every side; (n, 8) each."""
    found = {f"{by}_{name}": said[:, k] == true[:, k] for k, name in enumerate(ATTRIBUTES)}
    near = ((said - true)[:, 4:].abs() <= TIE).all(-1)
    right = (said == true)[:, :4].all(-1) & near
    return found | {f"{by}_box": near, f"{by}_all": right}


@torch.no_grad()
def vision_probe(vit: EvaViT, qformer: QFormer, heads: VisionHeads, split: str, size: int) -> dict:
    """What the patches and what the queries know of 200 unseen scenes, and the share of scenes
    whose number of objects is right."""
    batch = vision_batch(split, range(10**9, 10**9 + 200), size)
    features = vit(batch["pixel_values"])
    _, logits, words = said_by_patches(heads, qformer.ln_vision(features), batch)
    found = word_accuracies(logits.argmax(-1), words, by="patch")

    queries = qformer(features)
    _, true = query_loss(heads, queries, batch["words"])
    said = heads.query_words(queries).argmax(-1).view(-1, SLOTS, SLOT_WORDS)
    true = true.view(-1, SLOTS, SLOT_WORDS)
    none = WORDS.index("none")
    there = true[..., 0] != none
    found |= word_accuracies(said[there], true[there], by="query")
    attributes = heads.query_attributes(queries).view(*there.shape, SLOT_WORDS, -1, len(WORDS))
    known = (attributes.argmax(-1) == true[:, :, None, : len(ATTRIBUTES)]).all(-1)  # (B, 4, 8)
    found["query_known"] = known[there]
    found["count"] = ((said[..., 0] != none) == there).all(-1)
    return {name: round(right.float().mean().item(), 3) for name, right in found.items()}


def sincos_positions(grid: int, hidden_size: int) -> Tensor:
    """(1, 1 + grid*grid, hidden_size): sines and cosines of x and of y, and zeros for the class
    token. Learned positions that begin like this keep place readable, and can be interpolated."""
    frequencies = torch.pi * 2 ** torch.linspace(-1, 3, hidden_size // 4)
    angles = (torch.arange(grid) + 0.5)[:, None] / grid * frequencies  # (grid, hidden_size / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, hidden_size / 2)
    y = waves[:, None].expand(grid, grid, -1)
    x = waves[None, :].expand(grid, grid, -1)
    positions = torch.cat([x, y], dim=-1).flatten(0, 1)  # (grid*grid, hidden_size)
    return F.pad(positions, (0, 0, 1, 0))[None]


def pretrain_vision(
    out: Path, steps: int = 4800, batch_size: int = 64, peak_lr: float = 1.5e-3
) -> None:
    """ViT and Q-Former from scratch, in one run; writes vision and qformer.safetensors."""
    torch.manual_seed(0)
    config = VISION_PRESETS["mini"]
    vit, qformer = EvaViT(config), QFormer(QFORMER_PRESETS["mini"])
    vit.init_weights()
    qformer.init_weights()
    grid = config.image_size // config.patch_size
    vit.pos_embed.data = sincos_positions(grid, config.hidden_size)
    heads = VisionHeads(config.hidden_size, qformer.config.hidden_size)
    optimizer = adamw([vit, qformer, heads])
    scenes = VisionScenes(batch_size, config.image_size)
    loader = iter(DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=8))
    generator = torch.Generator().manual_seed(1)
    began = time.time()
    bar = tqdm(range(steps), desc="vision")
    for step in bar:
        batch = next(loader)
        hide_colors(batch, generator)
        # For heads this small, plain products are 1.6 times faster on a CPU than the fused call.
        said = torch.zeros(())
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            features = vit(batch["pixel_values"])
            if step >= steps // 4:  # the queries begin when there is something to see
                queries = qformer(features)
                said, _ = query_loss(heads, queries, batch["words"])
        dense = patch_loss(heads, qformer.ln_vision(features), batch)
        optimizer_step(optimizer, dense + 8 * said, warmup_cosine(step, steps, peak_lr))
        bar.set_postfix(dense=f"{dense.item():.3f}", queries=f"{said.item():.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_half(vit, out / "vision.safetensors")
            save_half(qformer, out / "qformer.safetensors")
            for split, size in (("val", 1), ("val", 2), ("held", 1)):
                probe = vision_probe(vit, qformer, heads, split, size * config.image_size)
                report = {
                    "step": step + 1, "minutes": round((time.time() - began) / 60, 1),
                    "dense": round(dense.item(), 3), "queries": round(said.item(), 3),
                    "split": split, "image_size": size * config.image_size, **probe,
                }  # fmt: skip
                bar.write(json.dumps(report))
