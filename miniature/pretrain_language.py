"""Pre-training of the miniature's Phi, on text alone: see pretrain.py.

Where the picture's 32 vectors will stand, Phi reads the 32 words of the scene written out
(world.inventory). TinyGPT-V's norms are in place from the first step: put into a finished language
model they would take away what it can do, and the few steps of a small stage 1 can't repair that.
"""

import itertools
import json
import math
import random
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from data import (
    IGNORE,
    STAGES,
    Tokenizer,
    collate,
    encode_sample,
    make_sample,
    plain_turns,
    user_turn,
)
from miniature import world
from miniature.steps import adamw, optimizer_step, save_half, warmup_cosine
from model import PHI_PRESETS, Phi

# A task of pre-training alone: the grounded description with its objects in random order. Read from
# left to right, a scene can be told by place; in any order, every word and number after the first
# has to be looked up at the right object, which is the step that all questions need and that is
# hardly ever learned from their short answers.
ANY_ORDER = "[grounding] in any order"
# How often a turn is of each task, at first and later.
FIRST_TASKS = {ANY_ORDER: 8, "refer": 2}
LATER_TASKS = {
    ANY_ORDER: 3, "vqa": 6, "compare": 4, "where": 2, "count": 2, "exists": 2, "refer": 2,
    "identify": 4, "detection": 3, "grounding": 1, "caption": 1,
}  # fmt: skip
PROBED = ("caption", "refer", "identify", "detection", "grounding")
SLOT_NAMES = (*world.ATTRIBUTES, "x1", "y1", "x2", "y2")
NAMED = {value: (name, value) for name, values in world.ATTRIBUTES.items() for value in values}
NAMED |= {world.noun({"shape": shape}, plural=True): ("shape", shape) for shape in world.SHAPES}
NAMED |= {"object": ("", ""), "objects": ("", "")}
LOOKS = sum(map(len, world.ATTRIBUTES.values())) + 2 * 8  # how many things `looks` tells
PAIRS = len(world.ATTRIBUTES) + 2  # and `pairs`
ROUGHLY = 2  # hundredths of the picture
# Of each cycle the steps, the highest learning rate, and the noise on the scene's words. As much
# noise as in the second from the beginning, and to copy numbers is learned late.
CYCLES = ((7000, 1.5e-3, 0.2), (3000, 8e-4, 0.3))
ROW_TOKENS = 210  # rows of similar length waste little on padding


def record_of(scene: world.Scene, rng: random.Random, task: str) -> dict | None:
    """A record of a task or of a kind of question; None where that can't be asked."""
    if task in world.VQA_KINDS:
        return world.vqa_record(scene, rng, task)
    return world.sample_record(scene, rng, task, 100)


def scene_turns(
    scene: world.Scene, rng: random.Random, tasks: list[str], roughly: int = 0
) -> list[tuple[str, str]]:
    """A conversation of stage 4 about one scene, one turn a task; boxes that are asked about are
    off by up to `roughly`."""
    turns = []
    for task in tasks:
        if task == ANY_ORDER:
            objects = tuple(rng.sample(scene.objects, len(scene.objects)))
            answer = world.grounding_record(replace(scene, objects=objects))["caption"]
            question = ANY_ORDER
        else:
            record = record_of(scene, rng, task) or record_of(scene, rng, "vqa")
            [(question, answer)] = plain_turns(record, 4, rng, (100, 100))
            if task == "identify":
                question = blurred_box(question, rng, roughly)
        turns.append((user_turn(question, 4, image=True, first=not turns), answer))
    return turns


def blurred_box(text: str, rng: random.Random, roughly: int) -> str:
    """Moves each side of the boxes in a text by up to so many hundredths: a picture's vectors will
    tell where its objects are only roughly, so a box has to be found among those that are near."""

    def moved(number: re.Match) -> str:
        return f"<{min(99, max(0, int(number[1]) + rng.randint(-roughly, roughly)))}>"

    return re.sub(r"<(\d+)>", moved, text)


def language_row(scene: world.Scene, turns: list, stage: int, tokenizer: Tokenizer) -> dict:
    """A row as the stages have it, and the ids of the 32 words that stand for its picture."""
    words = world.inventory(scene)
    ids = [tokenizer.encode(word if word.isdigit() else " " + word) for word in words]
    if any(len(word_ids) != 1 for word_ids in ids):
        raise ValueError("a word of the inventory is not one token; run part=tokenizer again")
    row = encode_sample(turns, tokenizer, 1, len(words), 10**6, STAGES[stage].end_sym)
    texts = ["" if i < 0 else tokenizer.token_bytes(i).decode() for i in row["input_ids"].tolist()]
    referred = referred_objects(texts, scene)
    return row | {
        "words": torch.tensor(ids).flatten(), "referred": referred,
        "compared": compared(texts, referred), "looks": looks(scene), "pairs": pairs(scene),
    }  # fmt: skip


def learn_all_text(row: dict) -> dict:
    """The row with labels on questions too: a language model is pre-trained on everything, and
    here it pays. To guess how "the red ..." goes on, one has to find the red object: the same
    search that every answer needs, and without it it is hardly ever learned."""
    return row | {"labels": row["input_ids"].masked_fill(row["input_ids"] < 0, IGNORE)}


def referred_objects(texts: list[str], scene: world.Scene) -> Tensor:
    """(T, 4): for each token of a phrase or a box, 1 for the objects (from left to right) that it
    may mean by what it has said so far, 0 for the others; IGNORE at all other tokens. In an answer
    to a question about a box, phrases mean what is in the box: else Phi would learn to forget it
    with "small", if something else is small as well.

    In a scene with a red moon, a red star and a blue star: "the" IGNORE, "red" 1 1 0 0, "star" (the
    red one) 0 1 0 0, "is" IGNORE.
    """
    words = world.inventory(scene)
    slots = [dict(zip(SLOT_NAMES, words[start : start + 8])) for start in range(0, 32, 8)]
    rows, said, ended = [], {}, False  # said: what the phrase or box says of its object
    anything = [1] * len(slots)
    boxed = asked = anything  # the objects of the turn's last box; those that the answer is about
    for before, text in zip(["", *texts], texts):
        word = text.strip()
        if word in NAMED and ended or before.endswith("{<"):
            said, ended = {}, False
        if word in NAMED:
            name, value = NAMED[word]
            said[name], ended = value, name in ("shape", "")
        elif word.isdigit() and before.endswith("<"):
            said[SLOT_NAMES[4 + len(said)]] = word
        else:
            if text != "><":
                said, ended = {}, False
            if "#" in text:
                boxed = asked = anything
            elif "[/" in text:
                asked = boxed
            rows.append([IGNORE] * len(slots))
            continue
        named = {name: value for name, value in said.items() if name}
        fitting = [int(slot["size"] != "none" and all(map(fits, named.values(),
                                                          map(slot.get, named))))
                   for slot in slots]  # fmt: skip
        if word.isdigit():
            boxed = fitting if any(fitting) else anything
        else:
            fitting = [a & b for a, b in zip(fitting, asked)]
        rows.append(fitting)
    return torch.tensor(rows)


def fits(said: str, true: str) -> bool:
    """Whether a word is right, or a number nearly."""
    if said.isdigit():
        return abs(int(said) - int(true)) <= ROUGHLY
    return said == true


def compared(texts: list[str], referred: Tensor) -> Tensor:
    """(T, 2): which object is meant, and which one the phrase before meant: for each token of a
    phrase that can mean but one object by now, and for the tokens after it up to the next phrase
    or box or the end of the turn. IGNORE at all others, and where either is not one object.

    In "is the red star like the moon?", star being object 1 and moon object 0: from "moon" on
    (0, 1), at all tokens before it IGNORE.
    """
    rows, now, last = [], IGNORE, IGNORE
    in_phrase = ended = follows = False
    for text, objects in zip(texts, referred.tolist()):
        was_in_phrase, in_phrase = in_phrase, objects[0] != IGNORE and text.strip() in NAMED
        if in_phrase:
            if ended or not was_in_phrase:
                last = now
            ended, follows = NAMED[text.strip()][0] in ("shape", ""), True
            now = objects.index(1) if sum(objects) == 1 else IGNORE
        elif objects[0] != IGNORE or "#" in text:
            follows = False
        rows.append([now, last] if follows and IGNORE not in (now, last) else [IGNORE, IGNORE])
    return torch.tensor(rows)


def looks(scene: world.Scene) -> Tensor:
    """(4, LOOKS) of 0 and 1: of each object, which attributes it has, and which of the eight lines
    that cut the picture into ninths its centre has passed, from left to right and downwards."""
    rows = torch.zeros(world.MAX_OBJECTS, LOOKS)
    for row, obj in zip(rows, scene.objects):
        has = [getattr(obj, name) == value
               for name, values in world.ATTRIBUTES.items() for value in values]  # fmt: skip
        passed = [at > line / 9 for at in obj.center for line in range(1, 9)]
        row[:] = torch.tensor(has + passed)
    return rows


def pairs(scene: world.Scene) -> Tensor:
    """(4, 4, PAIRS) of 0 and 1: of object a and object b, which attributes they share, whether a
    is further right, and whether it is further down."""
    table = torch.zeros(world.MAX_OBJECTS, world.MAX_OBJECTS, PAIRS)
    for (i, a), (j, b) in itertools.product(enumerate(scene.objects), repeat=2):
        shared = [getattr(a, name) == getattr(b, name) for name in world.ATTRIBUTES]
        beyond = [at > other for at, other in zip(a.center, b.center)]
        table[i, j] = torch.tensor(shared + beyond)
    return table


def language_batch(rows: list[dict], tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Rows of `language_row` as a batch: that of `data.collate`, and words (B, 32), looks (B, 4,
    LOOKS), pairs (B, 4, 4, PAIRS), referred (B, T, 4) and compared (B, T, 2)."""
    batch = collate(rows, tokenizer.pad_token_id)
    for key in ("words", "looks", "pairs"):
        batch[key] = torch.stack([row[key] for row in rows])
    for key in ("referred", "compared"):
        batch[key] = pad_sequence([row[key] for row in rows], True, IGNORE)
    return batch


class LanguageScenes(IterableDataset):
    """Batches of scenes written out, with what stages 1, 3 and 4 will say of them, without end,
    for one worker.

    The first `first` batches have FIRST_TASKS only, and up to batch `easy` there are at most two
    objects and exact boxes: to tell two apart is learned before four, to copy before to compare.
    """

    def __init__(self, tokenizer: Tokenizer, batch_size: int, first: int, easy: int):
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.first, self.easy = first, easy

    def __iter__(self):
        for number in itertools.count():
            start = 10**8 + number * self.batch_size
            rows = [self.row(seed, number) for seed in range(start, start + self.batch_size)]
            yield language_batch(rows, self.tokenizer)

    def row(self, seed: int, number: int) -> dict:
        """What is said of scene `seed` in batch `number`, labels on all of its text; turns that
        would take it past ROW_TOKENS are left out."""
        most = 2 if number < self.easy else world.MAX_OBJECTS
        scene, rng = world.sample_scene(seed, "train", most), random.Random(seed)
        weights = FIRST_TASKS if number < self.first else LATER_TASKS
        stage = 4 if number < self.first else rng.choices((1, 3, 4), (1, 1, 10))[0]
        if stage == 4:
            tasks = rng.choices(list(weights), list(weights.values()), k=8)
            turns = scene_turns(scene, rng, tasks, 0 if number < self.easy else ROUGHLY)
        else:
            record = world.caption_record(scene) if stage == 1 else world.detail_record(scene)
            turns = make_sample(record, stage, rng, (100, 100))
        row = language_row(scene, turns, stage, self.tokenizer)
        while len(row["input_ids"]) > ROW_TOKENS and len(turns) > 1:
            turns.pop()
            row = language_row(scene, turns, stage, self.tokenizer)
        return learn_all_text(row)


class Scaffold(nn.Module):
    """What only pre-training needs beside Phi, and is thrown away: a mark for each of the 32
    places, and four linear heads, which ask what a token means: which objects may it be? if it can
    be but one, how does that look? how did the object of the phrase before look? what do those two
    have in common?"""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.places = nn.Embedding(32, hidden_size)
        self.object_head = nn.Linear(hidden_size, world.MAX_OBJECTS)
        self.look_head = nn.Linear(hidden_size, LOOKS)
        self.before_head = nn.Linear(hidden_size, LOOKS)
        self.pair_head = nn.Linear(hidden_size, PAIRS)
        nn.init.normal_(self.places.weight, std=0.3)


def scene_embeds(
    phi: Phi, scaffold: Scaffold, batch: dict[str, Tensor], noise: float = 0.0
) -> Tensor:
    """Embedded rows, with the scene's words where the picture's vectors will be.

    Each word carries a mark of its place, as each query has a voice of its own, and the four
    attributes of its object more quietly, as the queries do (pretrain_vision.query_loss). noise:
    standard deviation of what is added, for a picture's vectors will never be as clean as words.
    """
    words = phi.embed_tokens(batch["words"])  # (B, 32, hidden_size)
    slots = words.unflatten(1, (world.MAX_OBJECTS, -1))  # (B, 4, 8, hidden_size)
    known = slots[:, :, : len(world.ATTRIBUTES)].sum(2, keepdim=True)
    words = (slots + 0.5 * known).flatten(1, 2) + scaffold.places.weight
    return phi.embed(batch["input_ids"], words + noise * torch.randn_like(words))


def language_loss(
    phi: Phi, scaffold: Scaffold, batch: dict[str, Tensor], noise: float
) -> dict[str, Tensor]:
    """Losses of the text, and of what Scaffold's heads read between the layers. noise: as in
    `scene_embeds`.

    Answers alone teach to look an object up by its attributes so slowly that it was not learned
    in an hour, and to compare two objects not at all. The heads ask for the steps on the way, each
    so early that later layers can use it: the object and how it looks after layer 3 of six, the one
    before and what both share after 4, and after 5 the latter wherever it may be asked for.
    """
    hidden: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda *call: hidden.append(call[-1]))
             for layer in phi.layers[2:5]]  # fmt: skip
    inputs_embeds = scene_embeds(phi, scaffold, batch, noise)
    text_loss = phi.loss(inputs_embeds, batch["attention_mask"], batch["labels"])
    for hook in hooks:
        hook.remove()
    loss_of = F.binary_cross_entropy_with_logits

    is_named = batch["referred"][..., 0] != IGNORE  # tokens of phrases and boxes, (B, T)
    rows, places = is_named.nonzero(as_tuple=True)
    referred = batch["referred"][rows, places].float()  # (n, 4)
    object_loss = loss_of(scaffold.object_head(hidden[0][rows, places].float()), referred)

    one = referred.sum(-1) == 1
    rows, places, meant = rows[one], places[one], referred[one].argmax(-1)
    said = scaffold.look_head(hidden[0][rows, places].float())
    look_loss = loss_of(said, batch["looks"][rows, meant])

    is_pair = batch["compared"][..., 0] != IGNORE
    rows, places = (is_pair & is_named).nonzero(as_tuple=True)
    meant, before = batch["compared"][rows, places].unbind(-1)
    said = scaffold.before_head(hidden[1][rows, places].float())
    before_loss = loss_of(said, batch["looks"][rows, before])
    said = scaffold.pair_head(hidden[1][rows, places].float())
    pair_loss = loss_of(said, batch["pairs"][rows, meant, before])

    rows, places = (is_pair & ~is_named).nonzero(as_tuple=True)
    meant, before = batch["compared"][rows, places].unbind(-1)
    said = scaffold.pair_head(hidden[2][rows, places].float())
    echo_loss = loss_of(said, batch["pairs"][rows, meant, before])
    return {"text": text_loss, "objects": object_loss, "looks": look_loss,
            "before": before_loss, "pairs": pair_loss, "echoes": echo_loss}  # fmt: skip


@torch.no_grad()
def language_probe(
    phi: Phi, scaffold: Scaffold, tokenizer: Tokenizer, split: str, num_scenes: int = 160
) -> dict:
    """Share of unseen questions answered exactly, by task, and for refer by number of objects.
    (All tokens right given the right ones before: the same as a right greedy answer.)"""
    right: dict[str, list[float]] = {}
    for task in (*PROBED, *world.VQA_KINDS):
        rows, names = [], []
        for seed in range(10**9, 10**9 + num_scenes):
            scene, rng = world.sample_scene(seed, split), random.Random(seed)
            record = record_of(scene, rng, task)
            if record is not None:
                turns = make_sample(record, 4, rng, (100, 100))
                rows.append(language_row(scene, turns, 4, tokenizer))
                names.append(f"{task}{len(scene.objects)}" if task == "refer" else task)
        batch = language_batch(rows, tokenizer)
        hidden = phi(scene_embeds(phi, scaffold, batch), batch["attention_mask"])
        labels = batch["labels"][:, 1:]
        wrong = (phi.lm_head(hidden[:, :-1]).argmax(-1) != labels) & (labels != IGNORE)
        for name, is_right in zip(names, (~wrong.any(-1)).tolist()):
            right.setdefault(name, []).append(is_right)
    return {name: round(sum(found) / len(found), 3) for name, found in sorted(right.items())}


def near_numbers(hidden_size: int) -> Tensor:
    """(100, hidden_size) of about unit size: embeddings of 0 to 99. One half is waves that
    neighbours share, so that what is learned of 37 holds for 38; the other is each number's own."""
    frequencies = math.pi * 2 ** torch.linspace(-1, 4, hidden_size // 2)
    angles = torch.arange(100)[:, None] / 100 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1) + 0.7 * torch.randn(100, hidden_size)


def new_phi(tokenizer: Tokenizer) -> Phi:
    """Phi with random weights.

    What is more than `init_weights` balances TinyGPT-V's norms: RMSNorm makes attention's output
    as large as its weight says, however small the embeddings are that it is added to, and with q
    and k normalised no score could exceed the root of head_dim.
    """
    phi = Phi(PHI_PRESETS["mini"])
    phi.init_weights()
    for block in phi.layers:
        nn.init.constant_(block.post_layernorm.weight, 0.3)
        nn.init.constant_(block.self_attn.q_layernorm.weight, 2.0)
        nn.init.constant_(block.self_attn.k_layernorm.weight, 2.0)
        for linear in (block.self_attn.dense, block.mlp.fc2):
            linear.weight.data /= math.sqrt(2 * len(phi.layers))
    nn.init.normal_(phi.embed_tokens.weight, std=0.5)
    numbers = [tokenizer.encode(str(number))[0] for number in range(100)]
    phi.embed_tokens.weight.data[numbers] = 0.5 * near_numbers(phi.config.hidden_size)
    phi.lm_head.weight.data = phi.embed_tokens.weight.data * 0.15  # what is read can be said
    return phi


def pretrain_language(
    out: Path, cycles: Sequence[tuple[int, float, float]] = CYCLES, batch_size: int = 8
) -> None:
    """Phi from scratch on text alone; writes phi.safetensors."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(out)
    phi, scaffold = new_phi(tokenizer), Scaffold(PHI_PRESETS["mini"].hidden_size)
    optimizer = adamw([phi, scaffold])
    scenes = LanguageScenes(tokenizer, batch_size, first=500, easy=1500)
    loader = iter(DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=8))
    began = time.time()
    schedule = [(warmup_cosine(step, steps, peak_lr), noise) for steps, peak_lr, noise in cycles
                for step in range(steps)]  # fmt: skip
    bar = tqdm(schedule, desc="language")
    for step, (lr, noise) in enumerate(bar):
        batch = next(loader)
        with torch.autocast("cpu", torch.bfloat16):
            losses = language_loss(phi, scaffold, batch, noise)
        text_loss, *head_losses = losses.values()
        total = text_loss + 2 * sum(head_losses)
        optimizer_step(optimizer, total, lr)
        losses = {name: round(loss.item(), 3) for name, loss in losses.items()}
        bar.set_postfix(losses, refresh=False)
        if (step + 1) % 500 == 0 or step + 1 == len(schedule):
            save_half(phi, out / "phi.safetensors")
            minutes = round((time.time() - began) / 60, 1)
            probe = language_probe(phi, scaffold, tokenizer, "val")
            bar.write(json.dumps({"step": step + 1, "minutes": minutes, **losses, **probe}))
