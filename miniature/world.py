"""The miniature's world: pictures such as anyone draws in a paint program, and texts about them.

    sample_scene(seed, split) -> Scene        what is in the picture, as attributes and boxes
    render(scene, image_size) -> PIL.Image    the picture
    sample_record(scene, rng, task, size)     one training or test record about it

A scene holds one to four flat objects on a light ground. Everything follows from the seed.
"""

import math
import random
import zlib
from itertools import combinations, permutations, product

import numpy as np

from miniature.draw import Scene, SceneObject, placed_outline, render  # noqa: F401 (for users)

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
SIZES = ("small", "large")
FILLS = ("solid", "outlined")
ATTRIBUTES = {"size": SIZES, "color": COLORS, "fill": FILLS, "shape": SHAPES}  # as phrases go

# One pair a shape and one a color: no train, val or test scene (nor its texts) contains one.
HELD_OUT = frozenset({
    ("circle", "purple"), ("square", "pink"), ("triangle", "orange"), ("star", "green"),
    ("heart", "black"), ("cross", "yellow"), ("diamond", "blue"), ("moon", "red"),
})
SPLITS = {"train": range(0, 90), "val": range(90, 95), "test": range(95, 100),
          "held": range(0, 100)}  # of the signature's hash modulo 100

TASKS = ("caption", "detail", "vqa", "refer", "identify", "detection", "grounding")
VQA_KINDS = ("color", "shape", "size", "fill", "count", "exists", "where", "compare")
# The attributes that a question of existence names, the usual pair twice as often.
ASKED_TOGETHER = (("shape",), ("color",), ("color", "shape"), ("color", "shape"),
                  ("size", "shape"), ("size", "color"), ("fill", "shape"))
MAX_OBJECTS = 4
ZONES = (("top left", "top", "top right"), ("left", "center", "right"),
         ("bottom left", "bottom", "bottom right"))
NUMBERS = ("zero", "one", "two", "three", "four")

# A color is any mixture of its anchors: what drawing programs and CSS call by that name.
ANCHORS = {
    "red": ((255, 0, 0), (200, 20, 30), (230, 40, 40)),
    "orange": ((255, 165, 0), (255, 120, 0), (245, 140, 30)),
    "yellow": ((255, 255, 0), (250, 205, 20), (255, 230, 60)),
    "green": ((0, 128, 0), (40, 190, 60), (0, 255, 0)),
    "blue": ((0, 0, 255), (30, 110, 230), (20, 30, 160)),
    "purple": ((128, 0, 128), (150, 60, 220), (100, 20, 150)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 140, 190)),
    "black": ((0, 0, 0), (45, 45, 45), (20, 20, 20)),
}
EXTENTS = {"small": (0.17, 0.24), "large": (0.32, 0.42)}  # longer side before the rotation
LINE_WIDTHS = (0.015, 0.055)  # of outlines, as a fraction of the image side
# The widest line, as a fraction of the extent, that still leaves a visible hole in the shape.
WIDEST_LINE = {"circle": 0.17, "square": 0.17, "triangle": 0.12, "star": 0.075, "heart": 0.14,
               "cross": 0.09, "diamond": 0.12, "moon": 0.085}
MARGIN, GAP = 0.015, 0.02  # to the picture's border, between two boxes
CONTRAST = 70  # least distance in rgb between an object and the ground


def signature(scene: Scene) -> tuple:
    """What makes a scene the same composition as another: attributes and zones, unordered."""
    return tuple(sorted((o.shape, o.color, o.size, o.fill, *zone_cell(o)) for o in scene.objects))


def split_number(scene: Scene) -> int:
    """0..99, a stable hash of the signature; SPLITS says which numbers are whose."""
    return zlib.crc32(repr(signature(scene)).encode()) % 100


def zone_cell(obj: SceneObject) -> tuple[int, int]:
    """Row and column (0..2) of the object's centre in a 3x3 grid."""
    return min(2, int(3 * obj.center[1])), min(2, int(3 * obj.center[0]))


def sample_scene(seed: int, split: str, max_objects: int = MAX_OBJECTS) -> Scene:
    """The scene number `seed` of a split ("train", "val", "test" or "held").

    The number of objects is uniform over 1..max_objects. A composition (see signature) belongs
    to one split only. Every held scene has an object of a HELD_OUT pair, no other scene has.
    Raises ValueError for an unknown split or a max_objects outside 1..4.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 1 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects is {max_objects}: it must be 1 to {MAX_OBJECTS}")
    rng = random.Random(f"{split} {seed}")
    count = rng.randint(1, max_objects)
    while True:
        objects = _sample_objects(rng, count, held=split == "held")
        if objects:
            scene = _sample_picture(rng, objects)
            if split_number(scene) in SPLITS[split]:
                return scene


def _sample_objects(rng: random.Random, count: int, held: bool) -> list[SceneObject] | None:
    """Objects that differ and do not overlap, left to right; None where one finds no place."""
    objects: list[SceneObject] = []
    for _ in range(count):
        obj = _place(rng, _sample_attributes(rng, objects, held and not objects), objects)
        if obj is None:
            return None
        objects.append(obj)
    return sorted(objects, key=lambda o: o.center[0])


def _sample_attributes(rng: random.Random, earlier: list[SceneObject], held: bool) -> dict:
    """Attributes unlike those of every earlier object, but often sharing color or shape."""
    while True:
        drawn = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
        if earlier and rng.random() < 0.5:
            other = rng.choice(earlier)
            for name in rng.choice([("shape",), ("color",), ("shape", "color")]):
                drawn[name] = getattr(other, name)
        if held:
            drawn["shape"], drawn["color"] = rng.choice(sorted(HELD_OUT))
        elif (drawn["shape"], drawn["color"]) in HELD_OUT:
            continue
        if not any(matches(o, drawn) for o in earlier):
            return drawn


def _place(rng: random.Random, attributes: dict, earlier: list[SceneObject]) -> SceneObject | None:
    """Give the object its look and a free place."""
    shape = attributes["shape"]
    extent, variant = rng.uniform(*EXTENTS[attributes["size"]]), rng.random()
    angle = rng.uniform(-12, 12) + (180 if shape == "moon" and rng.random() < 0.5 else 0)
    width, height = np.ptp(placed_outline(shape, variant, extent, angle), axis=0).tolist()
    for _ in range(30):
        x1, y1 = (rng.uniform(MARGIN, 1 - MARGIN - side) for side in (width, height))
        box = (x1, y1, x1 + width, y1 + height)
        if not any(_touch(box, o.box) for o in earlier):
            break
    else:
        return None
    line_width = 0.0
    if attributes["fill"] == "outlined":
        widest = min(LINE_WIDTHS[1], WIDEST_LINE[shape] * extent)
        line_width = rng.uniform(min(LINE_WIDTHS[0], 0.8 * widest), widest)
    weights = [rng.random() ** 3 for _ in ANCHORS[attributes["color"]]]
    rgb = tuple(min(255, max(0, round(rng.uniform(-6, 6) + sum(
        w * c for w, c in zip(weights, channel)) / sum(weights))))
        for channel in zip(*ANCHORS[attributes["color"]]))
    return SceneObject(**attributes, box=box, center=(x1 + width / 2, y1 + height / 2),
                       extent=extent, angle=angle, variant=variant, rgb=rgb, line_width=line_width)


def _touch(a: tuple, b: tuple) -> bool:
    return all(a[k] < b[k + 2] + GAP and b[k] < a[k + 2] + GAP for k in (0, 1))


def _sample_picture(rng: random.Random, objects: list[SceneObject]) -> Scene:
    """Choose how the picture is drawn; no object may drown in the ground."""
    ground = _sample_ground(rng)
    while any(math.dist(o.rgb, color) < CONTRAST for o in objects for color in ground):
        ground = _sample_ground(rng)
    return Scene(
        objects=tuple(objects), ground=ground, ground_angle=rng.uniform(0, 360),
        grain=rng.uniform(2, 10) if rng.random() < 0.2 else 0.0,
        noise=rng.uniform(1, 8) if rng.random() < 0.3 else 0.0,
        blur=rng.uniform(0.001, 0.007) if rng.random() < 0.3 else 0.0,
        contrast=rng.uniform(0.82, 1.0) if rng.random() < 0.3 else 1.0,
        jpeg_quality=rng.randint(40, 95) if rng.random() < 0.5 else 0,
        seed=rng.getrandbits(32))


def _sample_ground(rng: random.Random) -> tuple:
    """Two ends of the gradient, mostly equal: white, a light grey, a pastel, or two pastels."""
    kind = rng.random()
    if kind < 0.4:
        return (255, 255, 255), (255, 255, 255)
    if kind < 0.55:
        grey = (rng.randint(210, 253),) * 3
        return grey, grey
    one, other = (tuple(rng.randint(195, 255) for _ in "rgb") for _ in range(2))
    return (one, one) if kind < 0.75 else (one, other)


def matches(obj: SceneObject, description: dict[str, str]) -> bool:
    """Whether the object has every attribute of the description."""
    return all(getattr(obj, name) == value for name, value in description.items())


def _count(scene: Scene, description: dict[str, str]) -> int:
    return sum(matches(o, description) for o in scene.objects)


def describe(obj: SceneObject, names: tuple[str, ...] = tuple(ATTRIBUTES)) -> dict[str, str]:
    """The object's attributes of the given names."""
    return {name: getattr(obj, name) for name in names}


def noun(description: dict[str, str], plural: bool = False) -> str:
    """ "large red solid circle", "red objects": attributes in their fixed order."""
    words = [description[name] for name in ("size", "color", "fill") if name in description]
    last = description.get("shape", "object")
    if plural:
        last += "es" if last == "cross" else "s"
    return " ".join(words + [last])


def a_noun(description: dict[str, str]) -> str:
    """The noun phrase with "a" or "an"."""
    phrase = noun(description)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def unique_phrase(scene: Scene, obj: SceneObject, rng: random.Random,
                  without: str = "") -> str | None:
    """ "the red star": words that fit this object only, mostly as few as possible.

    without names an attribute that may not be used; None where the others do not suffice.
    """
    usable = [name for name in ATTRIBUTES if name != without]
    found = [[], [], [], []]  # descriptions that denote obj alone, by their length less 1
    for length in range(1, len(usable) + 1):
        for names in combinations(usable, length):
            description = describe(obj, names)
            if _count(scene, description) == 1:
                found[length - 1].append(description)
    found = [group for group in found if group]
    if not found:
        return None
    group = found[0] if rng.random() < 0.75 else rng.choice(found)
    return "the " + noun(rng.choice(group))


def inventory(scene: Scene) -> list[str]:
    """The scene as 32 words: 4 slots of size, color, fill, shape, x1, y1, x2, y2.

    Objects go left to right, box sides are hundredths "0".."99", an empty slot is 8 x "none".
    """
    words = []
    for obj in scene.objects:
        words += [obj.size, obj.color, obj.fill, obj.shape, *map(str, _hundredths(obj.box))]
    return words + ["none"] * (8 * MAX_OBJECTS - len(words))


def _hundredths(box: tuple[float, float, float, float]) -> list[int]:
    return [min(99, int(100 * side)) for side in box]


def _pixels(obj: SceneObject, image_size: int) -> list[float]:
    return [round(side * image_size, 3) for side in obj.box]


def _listed(phrases: list[str]) -> str:
    return " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])


def caption_record(scene: Scene) -> dict:
    """A short caption, objects left to right."""
    return {"task": "caption", "caption": _listed([a_noun(describe(o)) for o in scene.objects])}


def detail_record(scene: Scene) -> dict:
    """A description in sentences, with the objects' places."""
    count = len(scene.objects)
    text = [f"The picture shows {NUMBERS[count]} object{'s' * (count > 1)}."]
    for obj in scene.objects:
        row, column = zone_cell(obj)
        place = "in the" if row == column == 1 else "on the" if row == 1 else "at the"
        text.append(f"A {noun(describe(obj))} is {place} {ZONES[row][column]}.")
    return {"task": "detail", "caption": " ".join(text)}


def grounding_record(scene: Scene) -> dict:
    """The caption with each phrase's box in hundredths."""
    phrases = ["<p>{}</p> {{<{}><{}><{}><{}>}}".format(a_noun(describe(o)), *_hundredths(o.box))
               for o in scene.objects]
    return {"task": "grounding", "caption": _listed(phrases)}


def refer_record(scene: Scene, rng: random.Random, image_size: int) -> dict:
    """A phrase that fits one object, and its box in pixels."""
    obj = rng.choice(scene.objects)
    return {"task": "refer", "phrase": unique_phrase(scene, obj, rng),
            "boxes": [_pixels(obj, image_size)]}


def identify_record(scene: Scene, rng: random.Random, image_size: int) -> dict:
    """A box in pixels, and the full phrase for what is in it."""
    obj = rng.choice(scene.objects)
    return {"task": "identify", "phrase": a_noun(describe(obj)),
            "boxes": [_pixels(obj, image_size)]}


def detection_record(scene: Scene, rng: random.Random, image_size: int) -> dict:
    """A plural phrase, and the boxes (one to three, left to right) of all that it fits."""
    groups = _by_count(scene)
    description = rng.choice(groups[rng.choice([n for n in groups if 1 <= n <= 3])])
    return {"task": "detection", "phrase": noun(description, plural=True),
            "boxes": [_pixels(o, image_size) for o in scene.objects if matches(o, description)]}


def _allowed(scene: Scene, description: dict[str, str]) -> bool:
    """Held-out pairs are named in held scenes only: else "no" could be learned about them."""
    pair = description.get("shape"), description.get("color")
    return pair not in HELD_OUT or any((o.shape, o.color) in HELD_OUT for o in scene.objects)


def _seen(scene: Scene, names: tuple[str, ...]) -> list[dict[str, str]]:
    """Every combination of the values that these attributes have in the scene."""
    values = [sorted({getattr(o, name) for o in scene.objects}) for name in names]
    found = [dict(zip(names, combination)) for combination in product(*values)]
    return [description for description in found if _allowed(scene, description)]


def _by_count(scene: Scene) -> dict[int, list[dict[str, str]]]:
    """Descriptions of at most two attributes seen in the scene, by how many objects they fit."""
    groups: dict[int, list[dict[str, str]]] = {}
    for names in [names for length in range(3) for names in combinations(ATTRIBUTES, length)]:
        for description in _seen(scene, names):
            groups.setdefault(_count(scene, description), []).append(description)
    return groups


def _absent(scene: Scene, rng: random.Random, names: tuple[str, ...]) -> dict[str, str]:
    """A description that fits nothing; often each of its words fits something, but not together."""
    near = [description for description in _seen(scene, names) if not _count(scene, description)]
    if near and rng.random() < 0.6:
        return rng.choice(near)
    while True:
        description = {name: rng.choice(ATTRIBUTES[name]) for name in names}
        if _allowed(scene, description) and not _count(scene, description):
            return description


def vqa_record(scene: Scene, rng: random.Random, kind: str) -> dict | None:
    """A question of one of VQA_KINDS with its short answer; None where it can't be asked."""
    if kind in ATTRIBUTES:
        pair = _ask_attribute(scene, rng, kind)
    elif kind == "count":
        pair = _ask_count(scene, rng)
    elif kind == "exists":
        pair = _ask_exists(scene, rng)
    elif kind == "where":
        pair = _ask_where(scene, rng) if rng.random() < 0.5 else _ask_side(scene, rng)
    elif kind == "compare":
        pair = _ask_larger(scene, rng) if rng.random() < 0.3 else _ask_same(scene, rng)
    else:
        raise ValueError(f"unknown kind of question {kind!r}: use one of {', '.join(VQA_KINDS)}")
    return pair and {"task": "vqa", "question": pair[0], "answers": [pair[1]], "kind": kind}


def _ask_attribute(scene: Scene, rng: random.Random, name: str) -> tuple[str, str] | None:
    obj = rng.choice(scene.objects)
    phrase = unique_phrase(scene, obj, rng, without=name)
    if phrase is None:
        return None
    if name in ("color", "shape"):
        return f"what {name} is {phrase}?", getattr(obj, name)
    return f"is {phrase} {' or '.join(ATTRIBUTES[name])}?", getattr(obj, name)


def _ask_count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    groups = _by_count(scene)
    groups[0] = [_absent(scene, rng, rng.choice(ASKED_TOGETHER))]
    counts = sorted(groups)
    count = rng.choices(counts, [0.5 + 0.4 * count for count in counts])[0]
    return f"how many {noun(rng.choice(groups[count]), plural=True)} are there?", str(count)


def _ask_exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    names = rng.choice(ASKED_TOGETHER)
    if rng.random() < 0.5:
        return f"is there {a_noun(_absent(scene, rng, names))}?", "no"
    return f"is there {a_noun(describe(rng.choice(scene.objects), names))}?", "yes"


def _ask_where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    obj = rng.choice(scene.objects)
    if any(abs(at - border) < 0.04 for at in obj.center for border in (1 / 3, 2 / 3)):
        return None  # too close to a border to call
    row, column = zone_cell(obj)
    return f"where is {unique_phrase(scene, obj, rng)}?", ZONES[row][column]


def _pick_pair(scene: Scene, rng: random.Random, pairs: list[tuple],
               without: str = "") -> tuple[tuple, list[str]] | None:
    """One of the pairs, with a unique phrase for each object; None where that fails."""
    if not pairs:
        return None
    pair = rng.choice(pairs)
    phrases = [unique_phrase(scene, obj, rng, without) for obj in pair]
    return None if None in phrases else (pair, phrases)


def _ask_side(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    axis, ask, words = rng.choice([(0, "left or right of", ("left", "right")),
                                   (1, "above or below", ("above", "below"))])
    pairs = [(a, b) for a, b in permutations(scene.objects, 2)
             if abs(a.center[axis] - b.center[axis]) >= 0.1]
    asked = _pick_pair(scene, rng, pairs)
    if asked is None:
        return None
    (a, b), phrases = asked
    return f"is {phrases[0]} {ask} {phrases[1]}?", words[a.center[axis] > b.center[axis]]


def _ask_same(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    # Not every scene has both kinds of pair: these chances make yes as frequent as no.
    name, chance = rng.choice((("color", 0.54), ("size", 0.42)))
    want = rng.random() < chance
    pairs = [(a, b) for a, b in permutations(scene.objects, 2)
             if (getattr(a, name) == getattr(b, name)) == want]
    asked = _pick_pair(scene, rng, pairs, without=name)
    if asked is None:
        return None
    _, phrases = asked
    return f"is the {name} of {phrases[0]} and {phrases[1]} the same?", "yes" if want else "no"


def _ask_larger(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    pairs = [pair for pair in permutations(scene.objects, 2) if pair[0].size != pair[1].size]
    asked = _pick_pair(scene, rng, pairs, without="size")
    if asked is None:
        return None
    (first, _), phrases = asked
    answer = phrases[0 if first.size == "large" else 1]
    return f"which is larger, {phrases[0]} or {phrases[1]}?", answer


def sample_record(scene: Scene, rng: random.Random, task: str, image_size: int) -> dict:
    """One record of one of TASKS, boxes in pixels of an image_size picture.

    A vqa record is of a random kind that can be asked here. The key "image" is the caller's.
    """
    if task == "vqa":
        while True:
            record = vqa_record(scene, rng, rng.choice(VQA_KINDS))
            if record:
                return record
    described = {"caption": caption_record, "detail": detail_record, "grounding": grounding_record}
    boxed = {"refer": refer_record, "identify": identify_record, "detection": detection_record}
    if task in described:
        return described[task](scene)
    if task in boxed:
        return boxed[task](scene, rng, image_size)
    raise ValueError(f"unknown task {task!r}: use one of {', '.join(TASKS)}")


def records(scene: Scene, rng: random.Random, image_size: int, image: str = "") -> list[dict]:
    """One record of every task, and of vqa every kind that the scene allows."""
    made = [sample_record(scene, rng, task, image_size) for task in TASKS if task != "vqa"]
    made += [vqa_record(scene, rng, kind) for kind in VQA_KINDS]
    return [{"image": image, **record} if image else record for record in made if record]
