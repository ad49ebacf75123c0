"""The miniature's world: splits, boxes and records, checked against the scene by brute force."""

import random
import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from data import caption_text, parse_boxes, validate_record
from miniature import stream
from miniature.world import (ATTRIBUTES, COLORS, FILLS, HELD_OUT, SHAPES, SIZES, TASKS,
                             VQA_KINDS, ZONES, inventory, noun, records, render, sample_record,
                             sample_scene, signature, vqa_record)

SCENES = {split: [sample_scene(seed, split) for seed in range(n)]
          for split, n in (("train", 400), ("val", 60), ("test", 60), ("held", 100))}
EVERY = [scene for scenes in SCENES.values() for scene in scenes]
SINGULAR = {"crosses": "cross", "objects": "object",
            **{shape + "s": shape for shape in SHAPES if shape != "cross"}}


def held_pairs(scene) -> set:
    return {(o.shape, o.color) for o in scene.objects} & HELD_OUT


def fitting(scene, phrase: str) -> list:
    """The objects that a noun phrase denotes, read word by word."""
    words = re.sub(r"^(the|an|a) ", "", phrase).split()
    wanted = {SINGULAR.get(word, word) for word in words} - {"object"}
    assert wanted <= {*SHAPES, *COLORS, *SIZES, *FILLS}, phrase
    return [o for o in scene.objects if wanted <= {o.size, o.color, o.fill, o.shape}]


def test_no_composition_is_in_two_splits():
    seen = {split: {signature(scene) for scene in scenes} for split, scenes in SCENES.items()}
    for one, other in product(SCENES, SCENES):
        assert one == other or not seen[one] & seen[other]


def test_all_small_compositions_are_split():
    """With one object there are few compositions: each split gets some, none gets another's."""
    seen = {split: {signature(sample_scene(seed, split, max_objects=1)) for seed in range(n)}
            for split, n in (("train", 2000), ("val", 150), ("test", 150))}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"]
    assert len(seen["test"]) > 50


def test_held_out_pairs_are_in_held_scenes_only():
    assert len(HELD_OUT) == len({s for s, _ in HELD_OUT}) == len({c for _, c in HELD_OUT}) == 8
    for split, scenes in SCENES.items():
        assert all(bool(held_pairs(scene)) == (split == "held") for scene in scenes)


def test_texts_outside_held_scenes_never_name_a_held_out_pair():
    named = re.compile("|".join(rf"{c} (solid |outlined )?{s}" for s, c in HELD_OUT))
    rng = random.Random(0)
    for scene in SCENES["train"]:
        for record in records(scene, rng, 112):
            assert not named.search(str(record)), record


def test_scenes_are_deterministic_varied_and_well_formed():
    assert sample_scene(7, "train") == sample_scene(7, "train") != sample_scene(8, "train")
    counts = np.bincount([len(s.objects) for s in SCENES["train"]], minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 70  # 100 each are expected
    for scene in EVERY:
        objects = scene.objects
        assert len({(o.size, o.color, o.fill, o.shape) for o in objects}) == len(objects)
        assert [o.center[0] for o in objects] == sorted(o.center[0] for o in objects)
        for obj in objects:
            x1, y1, x2, y2 = obj.box
            assert 0 < x1 < x2 < 1 and 0 < y1 < y2 < 1
            assert bool(obj.line_width) == (obj.fill == "outlined")
            for other in objects:
                apart = max(x1 - other.box[2], other.box[0] - x2, y1 - other.box[3],
                            other.box[1] - y2)
                assert other is obj or apart >= 0.02 - 1e-9


def test_a_seed_means_the_same_scene_and_words_on_every_machine():
    """Written down here: whoever changes them changes what all results are about."""
    scene = sample_scene(52, "train")
    assert inventory(scene)[:16] == ("small red solid triangle 1 36 24 59 "
                                     "small red outlined triangle 43 23 60 39").split()
    assert (scene.objects[0].rgb, scene.seed) == ((227, 15, 12), 3386836879)
    record = vqa_record(scene, random.Random(0), "compare")
    assert record["question"] == ("is the size of the outlined object and the red solid object "
                                  "the same?")
    assert record["answers"] == ["yes"]


def test_unknown_split_task_or_kind_is_refused():
    scene, rng = SCENES["train"][0], random.Random(0)
    with pytest.raises(ValueError, match="train, val, test, held"):
        sample_scene(0, "training")
    with pytest.raises(ValueError, match="1 to 4"):
        sample_scene(0, "train", max_objects=5)
    with pytest.raises(ValueError, match="'ocr'"):
        sample_record(scene, rng, "ocr", 112)
    with pytest.raises(ValueError, match="'smell'"):
        vqa_record(scene, rng, "smell")


def test_boxes_are_tight_around_the_pixels():
    size, seen = 224, set()
    for scene in SCENES["train"][:150]:
        for obj in scene.objects:
            alone = replace(scene, objects=(replace(obj, rgb=(0, 0, 0)),), grain=0, noise=0, blur=0,
                            contrast=1.0, jpeg_quality=0, ground=((255,) * 3, (255,) * 3))
            inked = np.asarray(render(alone, size))[..., 0] < 250  # (S, S)
            rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
            drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert np.abs(drawn - size * np.array(obj.box)).max() < 1.5, obj
            seen.add((obj.shape, obj.fill))
    assert len(seen) == len(SHAPES) * len(FILLS)


@pytest.mark.parametrize("size", [112, 224])
def test_outlines_keep_their_hole(size):
    """The middle of an outlined object is ground, of a solid one its color."""
    for scene in SCENES["train"][:100]:
        plain = replace(scene, ground=((255,) * 3, (255,) * 3), grain=0, noise=0, blur=0,
                        contrast=1.0, jpeg_quality=0)
        pixels = np.asarray(render(plain, size)).astype(int)
        for obj in scene.objects:
            if obj.shape == "moon":
                continue  # the middle of a moon's box is no part of it
            x, y = (int(size * at) for at in obj.center)
            wanted = (255, 255, 255) if obj.fill == "outlined" else obj.rgb
            assert np.abs(pixels[y, x] - wanted).max() < 40, obj


def test_rendering_is_deterministic_rgb_and_shows_every_object():
    for scene in SCENES["test"]:
        picture = render(scene, 112)
        assert picture.mode == "RGB" and picture.size == (112, 112)
        assert picture.tobytes() == render(scene, 112).tobytes()
        pixels = np.asarray(picture, np.float32)
        for obj in scene.objects:
            x1, y1, x2, y2 = (round(112 * side) for side in obj.box)
            inside = pixels[y1:y2, x1:x2].reshape(-1, 3)
            away = np.linalg.norm(inside - np.median(pixels[::4, ::4].reshape(-1, 3), 0), axis=1)
            assert away.max() > 40, obj


def test_inventory_is_32_words_left_to_right():
    for scene in EVERY:
        words = inventory(scene)
        assert len(words) == 32
        for slot, obj in enumerate(scene.objects):
            size, color, fill, shape, *box = words[8 * slot:8 * slot + 8]
            assert (size, color, fill, shape) == (obj.size, obj.color, obj.fill, obj.shape)
            assert [int(side) for side in box] == [int(100 * side) for side in obj.box]
        assert set(words[8 * len(scene.objects):]) <= {"none"}
    assert len(SIZES) * len(COLORS) * len(FILLS) * len(SHAPES) == 256
    assert noun({"shape": "cross", "color": "red"}, plural=True) == "red crosses"


def test_descriptions_name_every_object_in_order():
    pattern = rf"an? (?:{'|'.join(SIZES)}) \w+ \w+ \w+"
    for scene in EVERY:
        full = [f"a {o.size} {o.color} {o.fill} {o.shape}" for o in scene.objects]
        made = {r["task"]: r for r in records(scene, random.Random(0), 224) if r["task"] != "vqa"}
        assert set(made) == set(TASKS) - {"vqa"}
        assert re.findall(pattern, made["caption"]["caption"]) == full
        assert re.findall(pattern, made["detail"]["caption"].lower()) == full
        for obj, sentence in zip(scene.objects, made["detail"]["caption"].split(".")[1:]):
            row, column = int(3 * obj.center[1]), int(3 * obj.center[0])
            assert sentence.endswith("the " + ZONES[row][column])
        grounded = re.findall(r"<p>([^<]+)</p> \{<(\d+)><(\d+)><(\d+)><(\d+)>\}",
                              made["grounding"]["caption"])
        assert [phrase for phrase, *_ in grounded] == full
        for obj, (_, *box) in zip(scene.objects, grounded):
            assert [int(side) for side in box] == [int(100 * side) for side in obj.box]


@pytest.mark.parametrize("size", [112, 224])
def test_boxes_of_records_belong_to_what_the_phrase_denotes(size):
    rng = random.Random(1)
    for scene in EVERY:
        for task in ("refer", "identify", "detection"):
            record = sample_record(scene, rng, task, size)
            objects = fitting(scene, record["phrase"])
            assert 1 <= len(objects) <= (3 if task == "detection" else 1), record
            boxes = [size * np.array(o.box) for o in objects]
            assert np.allclose(record["boxes"], boxes, atol=0.01)


def expected_answer(scene, question: str) -> str:
    """The answer to a question, worked out from its words alone."""
    q = question.rstrip("?")
    if found := re.match(r"what (color|shape) is (.+)", q):
        return getattr(*fitting(scene, found[2]), found[1])
    if found := re.match(r"is (.+) (small or large|solid or outlined)", q):
        return getattr(*fitting(scene, found[1]), "size" if "small" in found[2] else "fill")
    if found := re.match(r"how many (.+) are there", q):
        return str(len(fitting(scene, found[1])))
    if found := re.match(r"is there (.+)", q):
        return "yes" if fitting(scene, found[1]) else "no"
    if found := re.match(r"where is (.+)", q):
        (obj,) = fitting(scene, found[1])
        return ZONES[int(3 * obj.center[1])][int(3 * obj.center[0])]
    if found := re.match(r"is (.+) (left or right of|above or below) (.+)", q):
        (a,), (b,) = fitting(scene, found[1]), fitting(scene, found[3])
        if "left" in found[2]:
            return "left" if a.center[0] < b.center[0] else "right"
        return "above" if a.center[1] < b.center[1] else "below"
    if found := re.match(r"is the (color|size) of (.+) and (.+) the same", q):
        (a,), (b,) = fitting(scene, found[2]), fitting(scene, found[3])
        return "yes" if getattr(a, found[1]) == getattr(b, found[1]) else "no"
    found = re.match(r"which is larger, (.+) or (.+)", q)
    (a,), (b,) = fitting(scene, found[1]), fitting(scene, found[2])
    assert a.size != b.size
    return found[1] if a.extent > b.extent else found[2]


def test_every_answer_is_right_and_no_question_gives_it_away():
    rng = random.Random(2)
    for scene in EVERY:
        for kind in VQA_KINDS:
            for record in filter(None, (vqa_record(scene, rng, kind) for _ in range(4))):
                assert set(record) == {"task", "question", "answers", "kind"}
                (answer,) = record["answers"]
                assert answer == expected_answer(scene, record["question"]), record
                if kind in ATTRIBUTES:
                    subject = record["question"].split(" is ")[-1] if kind in ("color", "shape") \
                        else record["question"].split(" or ")[0].rsplit(" ", 1)[0]
                    assert answer not in subject.split(), record


def only_attributes(text: str) -> str:
    """What a question tells of the object that it asks for."""
    named = {value for values in ATTRIBUTES.values() for value in values}
    return " ".join(word for word in re.findall(r"\w+", text) if word in named)


def test_conversations_are_tagged_questions_with_right_answers():
    asked = set()
    for seed, scene in enumerate(SCENES["train"][:150]):
        record = stream.conversation(scene, random.Random(seed), 112)
        validate_record(record, "here")
        assert len(record["turns"]) == stream.NUM_TURNS
        for question, answer in record["turns"]:
            tag, question = re.fullmatch(r"\[(\w+)\] (.+)", question).groups()
            asked.add(tag)
            if tag == "vqa":
                question = question.split("short answer: ")[-1]
                assert answer == caption_text(expected_answer(scene, question))
                continue
            with_box, phrase = (question, answer) if tag == "identify" else (answer, question)
            ([box], _), (obj,) = parse_boxes(with_box), fitting(scene, only_attributes(phrase))
            assert np.allclose(box, 100 * np.array(obj.box), atol=1.01)
    assert asked == {"vqa", "identify", "refer"}
    repeated = [stream.conversation(SCENES["train"][0], random.Random(7), 112) for _ in range(2)]
    assert repeated[0] == repeated[1]


def test_answers_are_balanced():
    """Whoever does not look at the picture must not do well."""
    rng, answers = random.Random(3), {}
    for scene in SCENES["train"] * 2:
        for kind in VQA_KINDS:
            record = vqa_record(scene, rng, kind)
            if record and "larger" not in record["question"]:
                form = "same" if kind == "compare" else kind
                answers.setdefault(form, []).append(record["answers"][0])
    for form, limit in (("exists", 0.56), ("same", 0.6), ("size", 0.62), ("fill", 0.58),
                        ("count", 0.45), ("color", 0.2), ("shape", 0.2), ("where", 0.3)):
        most = max(answers[form].count(answer) for answer in set(answers[form]))
        assert most / len(answers[form]) < limit, form
    assert set(answers["count"]) == set("01234")


def test_records_carry_the_image_they_are_given():
    made = records(SCENES["train"][0], random.Random(0), 112, image="a.jpg")
    assert all(record["image"] == "a.jpg" for record in made)
    assert "image" not in records(SCENES["train"][0], random.Random(0), 112)[0]
