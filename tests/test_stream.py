"""official/stream.py: image-text shards as rows, and the mixture of a folder."""

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
from official import convert, stream

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = json.loads((GOLDEN / "data" / "expected.json").read_text("utf-8"))["datasets"]


@pytest.fixture(scope="module")
def phi():
    return data.Tokenizer(GOLDEN / "tokenizer_files")


@pytest.fixture
def shards(tmp_path, phi):
    """Makes a ShardDataset of shards with so many pairs each, whose captions say shard and pair."""

    def make(*sizes, stage=1, seed=0):
        paths = [write_shard(tmp_path / f"{n}.tar", size) for n, size in enumerate(sizes)]
        return stream.ShardDataset(paths, data.RowSettings(stage, phi, 28, 4), seed)

    stream.read_index.cache_clear()
    return make


def write_shard(path, size):
    name = path.stem
    return write_tar(path, {
        f"{n}.{ending}": content for n in range(size) for ending, content in
        (("jpg", picture(n)), ("json", caption(f"shard {name} pair {n}")), ("txt", b"x"))
    })  # fmt: skip


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def picture(shade, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (shade, shade, shade)).save(file, kind)
    return file.getvalue()


def caption(text):
    return json.dumps({"caption": text}).encode()


def answer(phi, row):
    return phi.decode(row["labels"][row["labels"] != data.IGNORE].tolist())


# ---- shards ----
@pytest.mark.parametrize("name", ["laion", "cc_sbu"])
def test_pairs_are_the_official_ones(name, phi):
    paths = sorted((GOLDEN / "data" / name).glob("*.tar"))
    rows = stream.ShardDataset(paths, data.RowSettings(1, phi, 28, 4))
    seen = {answer(phi, row).rstrip("\n"): row for row in (rows[n] for n in range(24))}
    assert set(seen) == {sample["answer"] for sample in EXPECTED[name]["samples"]}
    for sample in EXPECTED[name]["samples"]:
        means = seen[sample["answer"]]["pixel_values"].mean((0, 2, 3))
        expected = torch.tensor(sample["image"]["mean_per_channel"])
        assert torch.allclose(means, expected, rtol=0, atol=0.002)


def test_positions_fix_the_rows(shards, phi):
    rows = shards(5, 5, 5)
    answers = [answer(phi, rows[n]) for n in range(60)]
    again, other = shards(5, 5, 5), shards(5, 5, 5, seed=1)
    assert [answer(phi, again[n]) for n in (59, 3, 17)] == [answers[n] for n in (59, 3, 17)]
    assert answer(phi, pickle.loads(pickle.dumps(again))[31]) == answers[31]
    assert answers != [answer(phi, other[n]) for n in range(60)]
    assert all(row["pixel_values"].shape == (1, 3, 28, 28) for row in (rows[0], rows[44]))


def test_positions_fix_the_wording(shards):
    prompts = [shards(3, stage=4)[n]["input_ids"] for n in range(9)]
    again = shards(3, stage=4)
    assert all(again[n]["input_ids"].equal(prompts[n]) for n in (8, 4, 0))
    assert len({tuple(ids.tolist()) for ids in prompts}) > 5


def test_a_visit_has_all_pairs_of_a_shard_drawn_anew(shards, phi):
    rows = shards(5, 5, 5)
    answers = [answer(phi, rows[n]).split() for n in range(100)]
    visits = [answers[n : n + 5] for n in range(0, 100, 5)]
    assert all({pair for *_, pair in visit} == set("01234") for visit in visits)
    drawn = [{shard for _, shard, *_ in visit} for visit in visits]
    assert all(len(of_visit) == 1 for of_visit in drawn) and set.union(*drawn) == set("012")
    assert len({tuple(pair for *_, pair in visit) for visit in visits}) > 10  # orders
    assert stream.read_index.cache_info().misses == 3  # for so many rows


def test_picture_and_caption_belong_together(shards, phi):
    rows = shards(200)
    for row in (rows[n] for n in range(0, 200, 20)):
        shade = int(answer(phi, row).split()[-1])  # as make has written them
        expected = data.preprocess(Image.new("RGB", (1, 1), (shade,) * 3), 28)
        assert torch.allclose(row["pixel_values"][0], expected, atol=0.05)


def test_shards_of_different_sizes(shards, phi):
    rows = shards(2, 6)
    assert rows.visit == 6
    answers = [answer(phi, rows[n]).split() for n in range(120)]
    times = Counter((shard, pair) for _, shard, _, pair in answers)  # 6 rows a visit
    visits = times["1", "0"]
    assert 0 < visits < 20 and all(times["1", f"{n}"] == visits for n in range(6))
    assert times["0", "0"] == times["0", "1"] == 3 * (20 - visits)


# A pair has six headers and contents, which begin at these bytes: jpg 0 512, json 1536 2048, txt
# 2560 3072; the next one begins at 3584.
@pytest.mark.parametrize("cut, whole", [
    (0, 0), (100, 0), (512, 0), (1000, 0), (1536, 0), (1800, 0), (2050, 0), (2100, 1), (2560, 1),
    (3584, 1), (3584 + 100, 1), (3584 + 1000, 1), (3584 + 2560, 2), (2 * 3584, 2),
])
def test_a_cut_shard_is_used_up_to_the_cut(shards, phi, cut, whole):
    rows = shards(3, 9)
    cut_shard = rows.shards[0]
    content = cut_shard.read_bytes()
    assert content[3584:3590] == b"1.jpg\0"
    cut_shard.write_bytes(content[:cut])
    stream.read_index.cache_clear()
    batch = data.collate([rows[n] for n in range(200)], phi.pad_token_id)
    seen = {answer(phi, {"labels": labels}) for labels in batch["labels"]}
    assert {text[-2] for text in seen if text.startswith("shard 0")} == set("012"[:whole])
    assert len({text for text in seen if text.startswith("shard 1")}) == 9
    assert f"{cut_shard} is empty, cut off or damaged" in " ".join(batch["skipped"])


def test_a_damaged_header_in_the_middle_is_noticed(shards):
    path = shards(4).shards[0]
    content = bytearray(path.read_bytes())
    content[3584:3612] = b"\xff" * 28
    path.write_bytes(content)
    stream.read_index.cache_clear()
    assert [key for key, _ in stream.read_index(path)] == ["0", ""]


@pytest.mark.parametrize("members, reason", [
    ({"7.json": caption("x")}, "7 has no picture"),
    ({"7.jpg": picture(1)}, "7 has no json"),
    ({"7.jpg": picture(1)[:400], "7.json": caption("x")}, "the picture 7.jpg is damaged"),
    ({"7.jpg": b"<html>", "7.json": caption("x")}, "the picture 7.jpg is damaged"),
    ({"7.jpg": picture(1), "7.json": b"{"}, "no caption in 7.json"),
    ({"7.jpg": picture(1), "7.json": b"{}"}, "no caption in 7.json"),
    ({"7.jpg": picture(1), "7.json": b"[1]"}, "no caption in 7.json"),
    ({"7.jpg": picture(1), "7.json": caption("...")}, '7: "caption" must be'),
    ({"7.jpg": picture(1), "7.json": caption(None)}, '7: "caption" must be'),
])
def test_useless_pairs_are_skipped_and_named(tmp_path, phi, members, reason):
    good = {"8.jpg": picture(1), "8.json": caption("good")}
    path = write_tar(tmp_path / "0.tar", members | good)
    rows = stream.ShardDataset([path], data.RowSettings(1, phi, 28, 4))
    batch = data.collate([rows[n] for n in range(20)], phi.pad_token_id)
    assert {answer(phi, {"labels": labels}) for labels in batch["labels"]} == {"good\n"}
    assert len(batch["skipped"]) >= 10  # in each visit one
    assert all(str(path) in text and reason in text for text in batch["skipped"])


def test_other_pictures_and_folders(tmp_path, phi):
    path = write_tar(tmp_path / "0.tar", {
        "a/1.JPEG": picture(1), "a/1.json": caption("one"),
        "b/1.png": picture(1, "PNG"), "b/1.json": caption("two"),
    })  # fmt: skip
    rows = stream.ShardDataset([path], data.RowSettings(1, phi, 28, 4))
    assert {answer(phi, rows[n]) for n in range(2)} == {"one\n", "two\n"}


def test_a_shard_that_vanished_is_skipped(shards, phi):
    rows = shards(3, 3)
    rows.shards[0].unlink()
    stream.read_index.cache_clear()
    batch = data.collate([rows[n] for n in range(20)], phi.pad_token_id)
    assert len(batch["labels"]) == 20 and "0.tar" in batch["skipped"][0]


def test_shards_without_a_pair(tmp_path, phi):
    paths = [write_tar(tmp_path / "0.tar", {}), tmp_path / "1.tar"]
    paths[1].write_text("<html>")
    rows = stream.ShardDataset(paths, data.RowSettings(1, phi, 28, 4))
    with pytest.raises(ValueError, match="20 records in a row cannot be used; .*[01].tar"):
        rows[0]


# ---- mixtures ----
# Dataset: ratio and batch size of the configuration XGPTv2_stage4.
STAGE_4 = {
    "multitask_conversation": (50, 2), "llava_conversation": (30, 2), "llava_detail": (20, 4),
    "llava_reason": (80, 4), "unnatural_instruction": (10, 2), "refvg": (40, 6),
    "flickr_grounded_caption": (80, 2), "flickr_CaptionToPhrase": (80, 2),
    "flickr_ObjectToPhrase": (80, 2), "coco_caption": (10, 6), "textcaps_caption": (30, 6),
    "refcoco": (25, 6), "refcocop": (25, 6), "refcocog": (25, 6), "invrefcoco": (10, 6),
    "invrefcocop": (10, 6), "invrefcocog": (10, 6), "coco_vqa": (15, 6), "ok_vqa": (8, 6),
    "aok_vqa": (12, 6), "gqa": (50, 6), "ocrvqa": (30, 6),
}  # fmt: skip


def test_the_official_mixture(tmp_path):
    for stage in (1, 2):
        assert stream.read_mixture(tmp_path, stage) == {"laion": (115, 64), "cc_sbu": (14, 64)}
    assert stream.read_mixture(tmp_path, 3) == {"cc_sbu_align": (1, 6)}
    mixture = stream.read_mixture(tmp_path, 4)
    assert mixture == STAGE_4 and sum(ratio for ratio, _ in mixture.values()) == 730
    assert {*mixture, "cc_sbu_align"} == set(convert.DATASETS)


@pytest.fixture
def folder(tmp_path):
    """Two shards of laion's and two record files."""
    shards = tmp_path / "laion" / "laion_dataset"  # as in the published layout
    shards.mkdir(parents=True)
    for n in range(2):
        write_shard(shards / f"{n}.tar", 3)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    for name in ("gqa", "mine"):
        record = {"image": "a.png", "task": "vqa", "question": "what?", "answers": [name]}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
    return tmp_path


def test_missing_datasets_are_all_listed(folder, phi, capsys):
    with pytest.raises(ValueError, match="for cc_sbu; make them .*allow_missing=1.*mixture.json"):
        stream.folder_mixture(folder, data.RowSettings(1, phi, 28, 4), 0)
    with pytest.raises(ValueError) as error:
        stream.folder_mixture(folder, data.RowSettings(4, phi, 28, 4), 0)
    assert all(name in str(error.value) for name in STAGE_4.keys() - {"gqa"})
    assert "gqa," not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cc_sbu_align"):  # nothing would be left
        stream.folder_mixture(folder, data.RowSettings(3, phi, 28, 4), 0, allow_missing=True)
    assert capsys.readouterr().err == ""


def test_missing_datasets_leave_the_mixture_if_they_may(folder, phi, capsys):
    datasets, ratios, sizes = stream.folder_mixture(
        folder, data.RowSettings(1, phi, 28, 4), 7, True
    )
    assert (ratios, sizes) == ([115], [64]) and "NAME/*.tar for cc_sbu; " in capsys.readouterr().err
    assert isinstance(datasets[0], stream.ShardDataset) and datasets[0].seed == 7
    assert answer(phi, datasets[0][4]).startswith("shard ")
    datasets, ratios, sizes = stream.folder_mixture(
        folder, data.RowSettings(4, phi, 28, 4), 7, True
    )
    assert (ratios, sizes) == ([50], [6])
    assert answer(phi, datasets[0][4]) == "gqa###" and datasets[0].seed == 7


def test_a_folder_has_its_own_mixture(folder, phi):
    own = {"4": {"mine": [2, 3], "laion": [0.5, 8]}}
    (folder / "mixture.json").write_text(json.dumps(own))
    datasets, ratios, sizes = stream.folder_mixture(folder, data.RowSettings(4, phi, 28, 4), 0)
    assert (ratios, sizes) == ([2, 0.5], [3, 8])
    assert [type(dataset).__name__ for dataset in datasets] == ["RecordDataset", "ShardDataset"]
    assert answer(phi, datasets[0][0]) == "mine###" and answer(phi, datasets[1][0]).endswith("###")


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"4": {}}', '{"4": {"mine": 1}}', '{"4": {"mine": [1]}}', '{"4": ["mine"]}',
    '{"4": {"mine": ["x", 1]}}', '{"4": {"mine": [0, 6]}}', '{"4": {"mine": [1, 0]}}',
])
def test_bad_mixtures_are_refused(folder, phi, content):
    (folder / "mixture.json").write_text(content)
    with pytest.raises(ValueError, match="mixture.json") as error:
        stream.folder_mixture(folder, data.RowSettings(4, phi, 28, 4), 0)
    assert "\n" not in str(error.value)


def test_which_folders_have_a_mixture(folder, tmp_path):
    assert stream.has_mixture(folder) and stream.has_mixture(str(folder))
    pictures = tmp_path / "pictures"
    (pictures / "deeper" / "still").mkdir(parents=True)
    (pictures / "a.txt").touch()
    assert not stream.has_mixture(pictures) and not stream.has_mixture(folder / "mine.jsonl")
    for name in ("mixture.json", "mine.jsonl", "deeper/0.tar", "deeper/still/0.tar"):
        (pictures / name).touch()
        assert stream.has_mixture(pictures)
        (pictures / name).unlink()
