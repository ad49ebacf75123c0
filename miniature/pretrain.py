"""Makes the miniature's backbones: what stands in for the pre-training of EVA, BLIP-2 and Phi-2.

    python miniature/pretrain.py                     all three parts, one after the other
    python miniature/pretrain.py part=vision         one of: tokenizer, vision, language

tokenizer   a byte-level BPE from the world's texts, in GPT-2's two files.
vision      ViT and Q-Former together. Every patch learns to say what it shows and where that lies;
            query k learns to say word k of the scene written out as 32 words (world.inventory).
            The heads that say so are linear, are thrown away afterwards, and so their accuracy is
            that of a linear probe: what they can read, a linear projection can hand on.
language    Phi with TinyGPT-V's norms in place learns the world's texts without pictures: where
            the picture's 32 vectors will stand, it reads the scene's 32 words.

No scene of these runs returns in stages 1 to 4, and none has a held-out pair of shape and color.
"""

import itertools
import json
import math
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bridge import QFORMER_PRESETS, QFormer
from data import (
    IMAGE_PLACEHOLDER,
    IMAGE_TOKEN_ID,
    STAGES,
    Tokenizer,
    collate,
    encode_sample,
    make_sample,
    preprocess,
)
from miniature import world
from model import PHI_PRESETS, ModelConfig, Phi
from vision import VISION_PRESETS, EvaViT

SLOTS, SLOT_WORDS = world.MAX_OBJECTS, 8
NUMBERS = [str(number) for number in range(100)]
WORDS = ["none", *world.SIZES, *world.COLORS, *world.FILLS, *world.SHAPES, *NUMBERS]
COLOR_PLACE = 1  # a slot is size, color, fill, shape, x1, y1, x2, y2
TIE = 3  # hundredths: objects this close from left to right may stand in either order


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(modules: list[nn.Module], weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    parameters = [p for module in modules for p in module.parameters()]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )


def save_half(module: nn.Module, path: Path) -> None:
    """Writes the module in fp16: half the bytes, and no answer changes."""
    save_file({name: tensor.half() for name, tensor in module.state_dict().items()}, path)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
    optimizer.step()


# ------------------------------------------------------------------------------------ tokenizer


# GPT-2's split into words for ASCII text, which is all that the world speaks.
ASCII_WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


def byte_names() -> dict[int, str]:
    """How GPT-2's files write each byte: itself where it can be seen, else a letter from U+0100."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def train_bpe(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909): join the most frequent pair, again and again."""
    names = byte_names()
    spelled = {word: [names[byte] for byte in word.encode()] for word in words}
    merges = []
    for _ in range(num_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(spelled[word], spelled[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            for at in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[at : at + 2]) == best:
                    symbols[at : at + 2] = ["".join(best)]
    return merges


def world_texts(num_scenes: int) -> Iterator[str]:
    """Prompts and answers of all tasks and stages about the first scenes, and their inventories."""
    for seed in range(num_scenes):
        scene, rng = world.sample_scene(seed, "train"), random.Random(seed)
        yield " " + " ".join(word for word in world.inventory(scene) if not word.isdigit())
        for record in world.records(scene, rng, 112, image="x"):
            for stage in (1, 3, 4):
                if stage == 4 or record["task"] in ("caption", "detail"):
                    for prompt, answer in make_sample(record, stage, rng, (112, 112)):
                        yield from (*prompt.split(IMAGE_PLACEHOLDER), answer + STAGES[stage].end_sym)


def pretrain_tokenizer(out: Path) -> None:
    """Writes vocab.json, merges.txt and added_tokens.json, as many tokens as the preset has."""
    words: Counter[str] = Counter()
    for text in world_texts(2000):
        words.update(re.findall(ASCII_WORDS, text.replace("  ", "")))
    words.update({number: 10**6 for number in NUMBERS})  # one token each, even the rare ones
    vocab_size = PHI_PRESETS["mini"].vocab_size
    merges = train_bpe(words, vocab_size - 256 - 2)
    tokens = [*byte_names().values(), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    added = {"<|endoftext|>": len(vocab), "  ": len(vocab) + 1}
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (out / "merges.txt").write_text("\n".join(lines), "utf-8")
    (out / "added_tokens.json").write_text(json.dumps(added), "utf-8")


# ------------------------------------------------------------------------------------ vision


class VisionScenes(IterableDataset):
    """Batches of rendered scenes with their targets, without end. Every third batch has doubled
    resolution, as stage 4 will; it is smaller, for it costs four times as much."""

    def __init__(self, split: str, first_seed: int, batch_size: int, image_size: int):
        self.split, self.first_seed = split, first_seed
        self.batch_size, self.image_size = batch_size, image_size

    def __iter__(self):
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(index, count):
            doubled = number % 3 == 2
            size = self.image_size * (2 if doubled else 1)
            batch_size = self.batch_size // (3 if doubled else 1)
            first = self.first_seed + number * self.batch_size
            yield vision_batch(self.split, range(first, first + batch_size), size)


def vision_batch(split: str, seeds: range, image_size: int) -> dict[str, Tensor]:
    """Pictures and targets of the scenes with these seeds."""
    scenes = [world.sample_scene(seed, split) for seed in seeds]
    pixel_values = torch.stack([preprocess(world.render(s, image_size), image_size) for s in scenes])
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
        words[index].view(SLOTS, SLOT_WORDS)[:, COLOR_PLACE] = -100


def patch_targets(batch: dict[str, Tensor], grid: int) -> tuple[Tensor, Tensor]:
    """For each patch (B, grid*grid) the slot of the object on whose box its centre lies, -1 for
    none, and that object's box (B, grid*grid, 4)."""
    centre = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    x, y = x.reshape(1, -1, 1), y.reshape(1, -1, 1)
    x1, y1, x2, y2 = batch["boxes"][:, None].unbind(-1)  # each (B, 1, slots)
    inside = (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)  # (B, patches, slots)
    slot = torch.where(inside.any(-1), inside.int().argmax(-1), -1)
    box = batch["boxes"].gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, 4))
    return slot, box


class VisionHeads(nn.Module):
    """The linear heads of pre-training: what patches and queries must be able to tell."""

    def __init__(self, vision_size: int, query_size: int):
        super().__init__()
        self.patch_slot = nn.Linear(vision_size, SLOTS + 1)
        self.patch_words = nn.Linear(vision_size, len(WORDS))
        self.patch_box = nn.Linear(vision_size, 4)
        self.query_words = nn.Linear(query_size, len(WORDS))


def patch_loss(heads: VisionHeads, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Every patch tells which object it shows (counted from the left), its four attributes and
    its box, absolute in the picture."""
    patches = features[:, 1:].float()  # without the class token
    slot, box = patch_targets(batch, grid=math.isqrt(patches.shape[1]))
    loss = F.cross_entropy(heads.patch_slot(patches).flatten(0, 1), (slot + 1).flatten())
    shown = slot >= 0
    words = batch["words"].view(-1, SLOTS, SLOT_WORDS)
    rows = torch.arange(len(words))[:, None].expand_as(slot)
    attributes = words[rows[shown], slot[shown], :4]  # (shown patches, 4)
    logits = heads.patch_words(patches[shown])
    for place in range(4):
        loss = loss + F.cross_entropy(logits, attributes[:, place], ignore_index=-100)
    return loss + 2 * F.smooth_l1_loss(heads.patch_box(patches[shown]), box[shown], beta=0.2)


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


def query_loss(heads: VisionHeads, queries: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the 32 words under the best allowed order, and that order's words."""
    logits = heads.query_words(queries.float()).unflatten(1, (SLOTS, SLOT_WORDS))
    slots = words.view(-1, SLOTS, SLOT_WORDS)
    pairs = (len(words), SLOTS, SLOTS, SLOT_WORDS)  # said in slot i, true of object j
    said = logits[:, :, None].expand(*pairs, len(WORDS)).flatten(0, 3)
    true = slots[:, None].expand(pairs).flatten()
    cost = F.cross_entropy(said, true, ignore_index=-100, reduction="none").view(pairs).sum(-1)
    orders, allowed = allowed_orders(words)
    total = cost[:, torch.arange(SLOTS), orders].sum(-1)  # (B, 24)
    best = total.masked_fill(~allowed, float("inf")).min(-1)
    ordered = slots.gather(1, orders[best.indices][..., None].expand(-1, -1, SLOT_WORDS))
    return best.values.mean() / (SLOTS * SLOT_WORDS), ordered.flatten(1)


@torch.no_grad()
def vision_probe(vit: EvaViT, qformer: QFormer, heads: VisionHeads, split: str, size: int) -> dict:
    """Accuracies on unseen scenes: attributes and places (within 3 hundredths) from the patches
    and from the queries, and the share of objects of which all 8 words are right."""
    batch = vision_batch(split, range(10**9, 10**9 + 200), size)
    features = vit(batch["pixel_values"])
    patches = qformer.ln_vision(features)[:, 1:]
    slot, box = patch_targets(batch, grid=math.isqrt(patches.shape[1]))
    shown = slot >= 0
    words = batch["words"].view(-1, SLOTS, SLOT_WORDS)
    rows = torch.arange(len(words))[:, None].expand_as(slot)
    attributes = words[rows[shown], slot[shown], :4]
    logits = heads.patch_words(patches[shown])
    found = {}
    groups = (world.SIZES, world.COLORS, world.FILLS, world.SHAPES)
    for place, name in enumerate(("size", "color", "fill", "shape")):
        ids = torch.tensor([WORDS.index(word) for word in groups[place]])
        said = ids[logits[:, ids].argmax(-1)]
        found[f"patch_{name}"] = (said == attributes[:, place]).float().mean()
    off = (heads.patch_box(patches[shown]) - box[shown]).abs()
    found["patch_box"] = (off.amax(-1) <= 0.03).float().mean()

    queries = qformer(features)
    _, true = query_loss(heads, queries, batch["words"])
    said = heads.query_words(queries).argmax(-1).view(-1, SLOTS, SLOT_WORDS)
    true = true.view(-1, SLOTS, SLOT_WORDS)
    there = true[..., 0] != WORDS.index("none")
    for place, name in enumerate(("size", "color", "fill", "shape")):
        found[f"query_{name}"] = (said == true)[there][:, place].float().mean()
    near = (said - true)[there][:, 4:].abs() <= 3
    found["query_box"] = near.all(-1).float().mean()
    found["object"] = ((said == true)[there][:, :4].all(-1) & near.all(-1)).float().mean()
    found["count"] = ((said[..., 0] != WORDS.index("none")) == there).all(-1).float().mean()
    return {name: round(float(value), 3) for name, value in found.items()}


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


def pretrain_vision(steps: int, batch_size: int, peak_lr: float, out: Path) -> None:
    """ViT and Q-Former from scratch, in one run."""
    torch.manual_seed(0)
    config = VISION_PRESETS["mini"]
    vit, qformer = EvaViT(config), QFormer(QFORMER_PRESETS["mini"])
    vit.init_weights()
    qformer.init_weights()
    grid = config.image_size // config.patch_size
    vit.pos_embed.data = sincos_positions(grid, config.hidden_size)
    heads = VisionHeads(config.hidden_size, qformer.config.hidden_size)
    optimizer = adamw([vit, qformer, heads])
    scenes = VisionScenes("train", 0, batch_size, config.image_size)
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
        optimizer_step(optimizer, dense + 8 * said, learning_rate(step, steps, peak_lr))
        bar.set_postfix(dense=f"{dense:.3f}", queries=f"{said:.3f}", refresh=False)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_half(vit, out / "vision.safetensors")
            save_half(qformer, out / "qformer.safetensors")
            for split, size in (("val", 1), ("val", 2), ("held", 1)):
                probe = vision_probe(vit, qformer, heads, split, config.image_size * size)
                print(json.dumps({"step": step + 1, "minutes": round((time.time() - began) / 60, 1),
                                  "dense": round(float(dense), 3), "queries": round(float(said), 3),
                                  "split": split, "size": config.image_size * size, **probe}),
                      flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------- language

ROW_TOKENS = 220  # rows of similar length waste little on padding
TASK_WEIGHTS = {"vqa": 8, "refer": 4, "identify": 2, "detection": 2, "grounding": 2, "caption": 2}


def scene_text(scene: world.Scene, rng: random.Random, tasks: list[str]) -> list[tuple[str, str]]:
    """A conversation of stage 4 about one scene, one turn a task."""
    turns = []
    for task in tasks:
        record = world.sample_record(scene, rng, task, 100)
        [(prompt, answer)] = make_sample(record, 4, rng, (100, 100))
        seen = f"<Img>{IMAGE_PLACEHOLDER}</Img> "
        turns.append((prompt.replace(seen, "") if turns else prompt, answer))
    return turns


def language_row(scene: world.Scene, turns: list, stage: int, tokenizer: Tokenizer) -> dict:
    """A row as in training, but with the scene's 32 words where the picture will be."""
    words = world.inventory(scene)
    ids = [tokenizer.encode(word if word.isdigit() else " " + word) for word in words]
    if any(len(word_ids) != 1 for word_ids in ids):
        raise ValueError("a word of the inventory is not one token; run part=tokenizer again")
    row = encode_sample(turns, tokenizer, 1, len(words), 10**6, STAGES[stage].end_sym)
    row["input_ids"][row["input_ids"] == IMAGE_TOKEN_ID] = torch.tensor(ids).flatten()
    return row


class LanguageScenes(IterableDataset):
    """Batches of scenes written out, with what stages 1, 3 and 4 will say of them, without end.
    The first batches have at most two objects: telling two apart is learned before four."""

    def __init__(self, tokenizer: Tokenizer, first_seed: int, batch_size: int, easy: int):
        self.tokenizer, self.first_seed = tokenizer, first_seed
        self.batch_size, self.easy = batch_size, easy

    def __iter__(self):
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in itertools.count(index, count):
            first = self.first_seed + number * self.batch_size
            most = 2 if number < self.easy else world.MAX_OBJECTS
            rows = [self.row(seed, most) for seed in range(first, first + self.batch_size)]
            yield collate(rows, self.tokenizer.pad_token_id)

    def row(self, seed: int, most: int) -> dict:
        scene, rng = world.sample_scene(seed, "train", most), random.Random(seed)
        stage = rng.choices((1, 3, 4), (1, 1, 8))[0]
        if stage == 4:
            tasks = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=6)
            turns = scene_text(scene, rng, tasks)
        else:
            record = world.caption_record(scene) if stage == 1 else world.detail_record(scene)
            turns = make_sample(record, stage, rng, (100, 100))
        row = language_row(scene, turns, stage, self.tokenizer)
        while len(row["input_ids"]) > ROW_TOKENS and len(turns) > 1:
            turns.pop()
            row = language_row(scene, turns, stage, self.tokenizer)
        return row


@torch.no_grad()
def language_probe(phi: Phi, tokenizer: Tokenizer, split: str, num_scenes: int = 200) -> dict:
    """Share of unseen questions answered exactly, by task, and for refer by number of objects.
    (All tokens right given the right ones before: the same as a right greedy answer.)"""
    right: dict[str, list[float]] = {}
    for task in (*TASK_WEIGHTS, *world.VQA_KINDS):
        rows, names = [], []
        for seed in range(10**9, 10**9 + num_scenes):
            scene, rng = world.sample_scene(seed, split), random.Random(seed)
            if task in world.VQA_KINDS:
                record = world.vqa_record(scene, rng, task)
            else:
                record = world.sample_record(scene, rng, task, 100)
            if record is not None:
                turns = make_sample(record, 4, rng, (100, 100))
                rows.append(language_row(scene, turns, 4, tokenizer))
                names.append(f"{task}{len(scene.objects)}" if task == "refer" else task)
        batch = collate(rows, tokenizer.pad_token_id)
        hidden = phi(phi.embed_tokens(batch["input_ids"]), batch["attention_mask"])
        labels = batch["labels"][:, 1:]
        wrong = (phi.lm_head(hidden[:, :-1]).argmax(-1) != labels) & (labels != -100)
        for name, is_right in zip(names, (~wrong.any(-1)).tolist()):
            right.setdefault(name, []).append(is_right)
    return {name: round(sum(found) / len(found), 3) for name, found in sorted(right.items())}


def pretrain_language(steps: int, batch_size: int, peak_lr: float, out: Path) -> None:
    """Phi from scratch on text alone."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(out)
    phi = Phi(PHI_PRESETS["mini"])
    phi.init_weights()
    optimizer = adamw([phi])
    scenes = LanguageScenes(tokenizer, 10**8, batch_size, easy=steps // 10)
    loader = iter(DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=8))
    began = time.time()
    bar = tqdm(range(steps), desc="language")
    for step in bar:
        batch = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            inputs_embeds = phi.embed_tokens(batch["input_ids"])
            loss = phi.loss(inputs_embeds, batch["attention_mask"], batch["labels"])
        optimizer_step(optimizer, loss, learning_rate(step, steps, peak_lr))
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_half(phi, out / "phi.safetensors")
            print(json.dumps({"step": step + 1, "minutes": round((time.time() - began) / 60, 1),
                              "loss": round(loss.item(), 4),
                              **language_probe(phi, tokenizer, "val")}), flush=True)  # fmt: skip


def main() -> None:
    out = Path("miniature/weights")
    out.mkdir(parents=True, exist_ok=True)
    config = asdict(ModelConfig.preset("mini", stage=0))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    part = sys.argv[1] if len(sys.argv) > 1 else "part=all"
    if part in ("part=tokenizer", "part=all"):
        pretrain_tokenizer(out)
    if part in ("part=vision", "part=all"):
        pretrain_vision(3600, 64, 1.5e-3, out)
    if part in ("part=language", "part=all"):
        pretrain_language(4600, 16, 1.5e-3, out)


if __name__ == "__main__":
    main()
