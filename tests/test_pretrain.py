"""The targets of pre-training: what is asked of queries and tokens must be true of the scene."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import IGNORE, Tokenizer, parse_boxes
from miniature import pretrain_language as language
from miniature import pretrain_projection as projection
from miniature import pretrain_vision as vision
from miniature import pretrain, steps, world
from model import PHI_PRESETS, Phi

WEIGHTS = Path(__file__).resolve().parent.parent / "miniature" / "weights"
SCENE = world.sample_scene(52, "train")  # two small red triangles, solid and outlined


def referred(text):
    """[(token, objects)] of the tokens that mean some, objects as "1100"."""
    tokenizer = Tokenizer(WEIGHTS)
    texts = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)]
    rows = language.referred_objects(texts, SCENE).tolist()
    assert len(rows) == len(texts)
    return [(token.strip(), "".join(map(str, row))) for token, row in zip(texts, rows)
            if row[0] != IGNORE]  # fmt: skip


def test_tokens_mean_the_objects_that_fit_what_was_said_so_far():
    assert world.inventory(SCENE)[:6] == ["small", "red", "solid", "triangle", "1", "36"]
    assert referred("the small solid triangle, or red outlined object?") == [
        ("small", "1100"), ("solid", "1000"), ("triangle", "1000"),
        ("red", "1100"), ("outlined", "0100"), ("object", "0100"),
    ]  # fmt: skip
    assert referred("is the triangle small or large?") == [
        ("triangle", "1100"), ("small", "1100"), ("large", "0000"),
    ]  # fmt: skip
    assert referred("how many triangles, how many objects: 2") == [
        ("triangles", "1100"), ("objects", "1100"),
    ]  # fmt: skip
    assert referred("red {<1><36><24><59>}<delim>{<43><36>") == [
        ("red", "1100"), ("1", "1000"), ("36", "1000"), ("24", "1000"), ("59", "1000"),
        ("43", "0100"), ("36", "0000"),
    ]  # fmt: skip


def test_an_answer_is_about_the_box_of_its_question():
    text = "[INST] what is in {<1><36><24><59>} ? [/INST] a small red solid triangle###"
    assert referred(text)[4:] == [(word, "1000") for word in ("small", "red", "solid", "triangle")]
    text = "[INST] it [/INST] a red {<1><36><24><59>} and a small###[INST] it [/INST] a red"
    assert [row for row in referred(text) if row[0] in ("red", "small")] == [
        ("red", "1100"), ("small", "1100"), ("red", "1100"),
    ]  # fmt: skip


def test_boxes_may_be_off_by_a_little():
    for moved in ("2><34", "0><38"):
        assert referred(f"{{<{moved}>")[-1][1] == "1000"
    assert referred("{<1><33>")[-1][1] == "0000"
    rng, seen = random.Random(0), set()
    for _ in range(200):
        text = language.blurred_box("what is {<1><36><99><50>}?", rng, roughly=2)
        boxes, malformed = parse_boxes(text)
        assert malformed == 0 and text.startswith("what is {<")
        seen.update(enumerate(boxes[0]))
    assert {n for place, n in seen if place == 1} == {34, 35, 36, 37, 38}
    assert {n for place, n in seen if place in (0, 2)} == {0, 1, 2, 3, 97, 98, 99}


def test_looks_are_attributes_and_place():
    rows = language.looks(SCENE)
    attributes = [value for values in world.ATTRIBUTES.values() for value in values]
    for row, obj in zip(rows, SCENE.objects):
        has = {name for name, bit in zip(attributes, row.tolist()) if bit}
        assert has == {obj.size, obj.color, obj.fill, obj.shape}
        passed = row[len(attributes) :].view(2, 8).sum(-1).tolist()
        assert passed == [int(9 * at) for at in obj.center]
    assert rows[2:].sum() == 0


def test_a_phrase_is_compared_with_the_phrase_before_it():
    tokenizer = Tokenizer(WEIGHTS)
    text = "is the solid triangle left of the red outlined triangle? left### the solid object"
    texts = [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)]
    rows = language.compared(texts, language.referred_objects(texts, SCENE)).tolist()
    known = [(text.strip(), *row) for text, row in zip(texts, rows) if row[0] != IGNORE]
    assert known == [  # "red" may be both
        ("outlined", 1, 0), ("triangle", 1, 0), ("?", 1, 0), ("left", 1, 0),
        ("solid", 0, 1), ("object", 0, 1),
    ]  # fmt: skip


def test_pairs_are_what_two_objects_share_and_how_they_lie():
    solid, outlined = SCENE.objects
    table = language.pairs(SCENE)
    assert table[0, 1].tolist() == [1, 1, 0, 1, 0, float(solid.center[1] > outlined.center[1])]
    assert table[1, 0, 4:].tolist() == [1, float(solid.center[1] < outlined.center[1])]
    assert table[2:].sum() == table[:, 2:].sum() == 0


def test_a_row_of_text_holds_the_scene_and_its_loss_reaches_every_part():
    tokenizer, rng = Tokenizer(WEIGHTS), random.Random(1)
    turns = language.scene_turns(SCENE, rng, ["vqa", "refer", language.ANY_ORDER])
    assert turns[0][0].count("<ImageHere>") == 1 and "<Img>" not in turns[1][0] + turns[2][0]
    row = language.language_row(SCENE, turns, 4, tokenizer)
    said = [tokenizer.decode([i]).strip() for i in row["words"].tolist()]
    assert said == world.inventory(SCENE) and (row["input_ids"] < 0).sum() == len(said)
    learned = language.learn_all_text(row)["labels"]
    assert torch.equal(learned == IGNORE, row["input_ids"] < 0)

    phi, scaffold = Phi(PHI_PRESETS["mini"]), language.Scaffold(PHI_PRESETS["mini"].hidden_size)
    phi.init_weights()
    batch = language.language_batch([row, row], tokenizer)
    total = sum(language.language_loss(phi, scaffold, batch, noise=0.2).values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None and p.grad.any() for p in scaffold.parameters())
    assert all(p.grad is not None for p in phi.parameters())


def sure(indices, num_words=len(vision.WORDS)):
    """Logits that leave no doubt."""
    return 50.0 * torch.nn.functional.one_hot(indices, num_words)


def queries_say(words):
    """Heads and queries such that query k says words[k] and its object's attributes."""
    known = words.view(4, 8)[:, :4].repeat_interleave(8, dim=0)  # (32, 4)
    queries = torch.cat([sure(words), sure(known).flatten(1)], dim=1)[None]  # (1, 32, 5 * words)
    heads = vision.VisionHeads(8, queries.shape[-1])
    eye = torch.eye(queries.shape[-1])
    for head, rows in ((heads.query_words, eye[: len(vision.WORDS)]),
                       (heads.query_attributes, eye[len(vision.WORDS) :])):  # fmt: skip
        head.weight.data, head.bias.data = rows, torch.zeros(len(rows))
    return heads, queries


def test_queries_may_order_objects_one_above_the_other_as_they_like():
    left, right = SCENE.objects
    x1, y1, x2, y2 = left.box
    above = replace(right, box=(x1 + 0.01, y1, x2 + 0.01, y2))
    for other, free in ((right, False), (above, True)):
        words = world.inventory(replace(SCENE, objects=(left, other)))
        true = torch.tensor([vision.WORDS.index(word) for word in words])
        swapped = true.view(4, 8)[[1, 0, 2, 3]].flatten()
        for said, fits in ((true, True), (swapped, free)):
            loss, ordered = vision.query_loss(*queries_say(said), true[None])
            assert (loss < 0.01) == fits
            assert torch.equal(ordered[0], said if fits else true)


def test_whitening_gives_all_directions_the_same_strength():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator) * torch.tensor([30.0, 10, 5, 3, 2, 1])[:, None]
    x = torch.randn(5000, 6, generator=generator) @ mixing + 7
    weight, bias = projection.whitening(x)
    white = x @ weight.T + bias
    torch.testing.assert_close(white.mean(0), torch.zeros(6), rtol=0, atol=1e-2)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), rtol=0, atol=0.1)
    weight, bias = projection.whitening(x * 1e-3)  # all of it noise
    assert (x * 1e-3 @ weight.T + bias).std() < 0.5


def test_a_torn_save_leaves_the_weights_before_it(tmp_path, monkeypatch):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    path = tmp_path / "vision.safetensors"
    steps.save_half(torch.nn.Linear(2, 1), path)
    assert load_file(path)["weight"].dtype == torch.float16
    written = path.read_bytes()
    monkeypatch.setattr(steps, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        steps.save_half(torch.nn.Linear(2, 1), path)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


def test_two_do_not_make_the_same_part(tmp_path, monkeypatch, refusal):
    """Another part beside it, they do."""
    made = []
    monkeypatch.setattr(pretrain, "__file__", str(tmp_path / "pretrain.py"))
    for name in ("vision", "language"):
        monkeypatch.setitem(pretrain.PARTS, name, lambda out, name=name: made.append(name))
    code = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX);" \
           "print('locked', flush=True); sys.stdin.read()"  # fmt: skip
    (tmp_path / "weights").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path / "weights" / "vision.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        assert "vision.lock: another process" in refusal(pretrain.main, "part=vision")
        assert pretrain.main(["part=language"]) == 0 and made == ["language"]
        other.communicate()
    assert pretrain.main(["part=vision"]) == 0 and made == ["language", "vision"]
    assert not list(tmp_path.glob("weights/*.lock"))
