"""official/convert.py on files in the official formats, against what the official readers made."""

import itertools
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

import data
from official import convert

GOLDEN = Path(__file__).parent / "golden" / "data"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text("utf-8"))["datasets"]
COCO = "coco/train2014/COCO_train2014_0000000000{:02}.jpg"
FLICKR = ["flickr/images/111.jpg", "flickr/images/222.jpg"]
PICTURES = {  # of the records, in their order
    "cc_sbu_align": ["cc_sbu_align/image/0.jpg", "cc_sbu_align/image/17.jpg"],
    "multitask_conversation": [COCO.format(9), COCO.format(30)],
    "llava_conversation": [COCO.format(9), COCO.format(25)],
    "unnatural_instruction": [None, None],
    "refvg": ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg"],
    "llava_detail": [COCO.format(9), COCO.format(30)],
    "llava_reason": [COCO.format(25), COCO.format(30)],
    "flickr_grounded_caption": FLICKR,
    "flickr_CaptionToPhrase": FLICKR,
    "flickr_ObjectToPhrase": FLICKR,
    "coco_caption": [COCO.format(9), COCO.format(25)],
    "textcaps_caption": ["textcaps/train_images/aa11.jpg", "textcaps/train_images/bb22.jpg"],
    "coco_vqa": [COCO.format(9), COCO.format(25)],
    "ok_vqa": [COCO.format(30), COCO.format(9)],
    "aok_vqa": [COCO.format(9), COCO.format(25)],
    "gqa": ["gqa/images/1.jpg", "gqa/images/2.jpg"],
    "ocrvqa": ["ocrvqa/images/B001.jpg"] * 2,
} | {f"{inv}refcoco{kind}": [COCO.format(9)] * 2 + [COCO.format(30)]
     for inv in ("", "inv") for kind in ("", "p", "g")}  # fmt: skip


@pytest.fixture
def src(tmp_path):
    return shutil.copytree(GOLDEN, tmp_path / "src")


def converted(name, src, left_out=""):
    """The records of a dataset, after a look at what was told about it."""
    report = convert.convert(name, src, src / f"{name}.jsonl")
    records = data.read_records(src / f"{name}.jsonl")
    expected = f"{name}: {len(records)} records" + (left_out and f"; left out: {left_out}")
    assert report == expected
    return records


def edit(path, change):
    """Writes a JSON file anew, after `change` of what is in it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def possible(record, stage):
    """All samples that can become of a record; 300 draws leave none of a few dozen out."""
    size = data.load_image(record["image"]).size if "image" in record else None
    return [data.make_sample(record, stage, random.Random(n), size) for n in range(300)]


def official_turns(sample, template):
    """Prompts and answers of an official sample, as the model's code puts them together."""
    if "conv_q" in sample:
        pairs = zip(sample["conv_q"].split("!@#"), sample["conv_a"].split("!@#"), strict=True)
    else:
        pairs = [(sample["instruction_input"], sample["answer"])]
    return [(template.format(question), answer) for question, answer in pairs]


def test_every_dataset_is_there():
    assert {*convert.DATASETS, "laion", "cc_sbu"} == set(EXPECTED)


LEFT_OUT = {"refvg": "1 of 16384 or more pixels", "coco_vqa": "1 without their picture",
            "coco_caption": "1 of another split", "ocrvqa": "1 of another split"}  # fmt: skip
LEFT_OUT |= {name: "1 of another split" for name in PICTURES if "refcoco" in name}


@pytest.mark.parametrize("name", convert.DATASETS)
def test_samples_are_the_official_ones(src, name):
    records = converted(name, src, LEFT_OUT.get(name, ""))
    images = [str(src / picture) if picture else None for picture in PICTURES[name]]
    assert [record.get("image") for record in records] == images
    stage = 3 if name == "cc_sbu_align" else 4
    # an official entry of RefCOCO has several sentences about one box, each here a record
    entries = [list(same) for _, same in itertools.groupby(
        enumerate(records), lambda item: item[1].get("boxes") or item[0])]  # fmt: skip
    assert len(entries) == EXPECTED[name]["len"]
    for entry, sample in zip(entries, EXPECTED[name]["samples"]):
        samples = [turns for _, record in entry for turns in possible(record, stage)]
        if stage == 3:
            assert {turns[0][1] for turns in samples} == {sample["answer"]}
        else:
            assert official_turns(sample, data.STAGES[stage].template) in samples


def test_repeated_answers_stay_weights_and_empty_ones_go(src):
    edit(src / "coco/vqa_val.json", lambda items: items[0]["answer"].append("."))
    first, second = converted("coco_vqa", src, LEFT_OUT["coco_vqa"])
    assert first["answers"].count("red") == 8 and len(first["answers"]) == 10
    assert second["answers"] == ["2", "two", "2"]
    assert converted("aok_vqa", src)[0]["answers"] == ["food", "lunch", "food"]


def test_first_turns_are_on_one_line(src):
    def change(items):
        items[0]["conversations"][0]["value"] = "<image>\nWhat is \nTHIS?\n"

    edit(src / "llava/conversation_58k.json", change)
    assert converted("llava_conversation", src)[0]["turns"][0][0] == "What is THIS?"
    edit(src / "llava/detail_23k.json", change)
    assert converted("llava_detail", src)[0]["prompt"] == "what is this?"


def test_only_a_question_with_an_answer_is_a_turn(src):
    edit(src / "llava/conversation_58k.json", lambda items: items[0]["conversations"].pop())
    assert [len(record["turns"]) for record in converted("llava_conversation", src)] == [2, 1]


# ---- what is left out ----
def edit_region(src, **changes):
    path = src / "vg/region_descriptions.json"
    edit(path, lambda images: images[1]["regions"][0].update(changes))


def test_regions_from_16384_pixels_on_are_left_out(src):
    edit_region(src, x=0, y=0, width=127, height=129)
    assert len(converted("refvg", src, "1 of 16384 or more pixels")) == 2
    edit_region(src, width=128, height=128)
    assert len(converted("refvg", src, "2 of 16384 or more pixels")) == 1


@pytest.mark.parametrize("change, reason", [
    ({"x": 150}, "with a box outside their picture"),
    ({"x": -20}, "with a box outside their picture"),
    ({"width": 0}, "with an empty box"),
    ({"x": -1, "width": 1}, "with an empty box"),
    ({"phrase": "..."}, "without a usable text"),
    ({"phrase": None}, "without a usable text"),
    ({"phrase": "<ImageHere>"}, "without a usable text"),
])
def test_useless_regions(src, change, reason):
    edit_region(src, **change)
    assert len(converted("refvg", src, f"1 of 16384 or more pixels, 1 {reason}")) == 1


def test_boxes_a_little_outside_are_cut_as_officially(src):
    edit_region(src, x=-1, y=-1, width=202, height=20)
    _, record = converted("refvg", src, "1 of 16384 or more pixels")
    assert possible(record, 4)[0][0][1] == "{<0><0><100><11>}"  # int() of -0.5 and of 100.5


@pytest.mark.parametrize("name, picture, left_out", [
    ("gqa", "gqa/images/1.jpg", "1 without their picture"),
    ("llava_reason", COCO.format(25), "1 without their picture"),
    ("refvg", "vg/VG_100K/1.jpg", "1 without their picture, 1 of 16384 or more pixels"),
])
def test_missing_pictures(src, name, picture, left_out):
    (src / picture).unlink()
    assert len(converted(name, src, left_out)) == 1


def test_a_damaged_picture_has_no_size(src):
    (src / "vg/VG_100K_2/2.jpg").write_bytes(b"<html>")
    left_out = "1 of 16384 or more pixels, 1 without their picture"
    assert len(converted("refvg", src, left_out)) == 1


def test_texts_that_the_normaliser_empties(src):
    path = src / "textcaps/TextCaps_0.1_train.json"
    edit(path, lambda content: content["data"][0].update(caption_str="!"))
    assert len(converted("textcaps_caption", src, "1 without a usable text")) == 1
    path = src / "unnatural/filtered_unnatural_instruction.json"
    edit(path, lambda items: items[0]["instances"][0].update(output="#"))
    assert len(converted("unnatural_instruction", src, "1 without a usable text")) == 1


# ---- files ----
def test_lists_are_read_piece_by_piece(tmp_path, monkeypatch):
    entries = [{"a": "[{,\u00e9" * n, "b": [n, {}]} for n in range(20)]
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(entries, ensure_ascii=False).encode())
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(convert, "CHUNK", chunk)
        assert list(convert.read_list(path)) == entries
    path.write_text(" [ ] ")
    assert list(convert.read_list(path)) == []


def test_a_damaged_list_is_not_read_to_its_end(tmp_path, monkeypatch):
    """Nor, which is how one can see it, is an entry that is longer than any."""
    path = tmp_path / "list.json"
    path.write_text(json.dumps(["x" * 1000]))
    monkeypatch.setattr(convert, "CHUNK", 10)
    assert list(convert.read_list(path)) == ["x" * 1000]
    monkeypatch.setattr(convert, "LONGEST", 100)
    with pytest.raises(ValueError, match="list.json is cut off or damaged"):
        list(convert.read_list(path))


GOOD = '{"image": "1.jpg", "question": "q", "answer": "a"}'


@pytest.mark.parametrize("content, reason", [
    (f'[{GOOD}, {{"a"', "cut off or damaged"),
    (f"[{GOOD}, {GOOD}", "cut off or damaged"),
    (f"[{GOOD}, nonsense, {GOOD}]", "cut off or damaged"),
    ('{"a": {"image": "1.jpg"}}', "not a list"),
    ("", "not a list"),
    ("[]", "gqa: 0 records"),
    ('[{"img": "1.jpg"}]', "KeyError('image')"),
    ("[1]", "TypeError"),
    (b'[{"image": "\xff"}]', "UnicodeDecodeError"),
])
def test_other_files_are_refused_in_one_line(src, content, reason, capsys):
    path = src / "gqa/train_balanced_questions.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (src / "gqa.jsonl").write_text("from before")
    assert convert.main(["gqa", "--src", str(src)]) == 2
    told = capsys.readouterr().err.split("error: ")[-1]
    assert reason in told and told.count("\n") == 1
    assert (src / "gqa.jsonl").read_text() == "from before"
    assert not list(src.glob("*.part"))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_anything(src, tmp_path, capsys):
    payload = pickle.dumps([Payload(tmp_path / "ran")])
    pickle.loads(payload)
    (tmp_path / "ran").rmdir()  # so the payload does work
    path = src / "refcoco_evaluations/refcoco/refs(unc).p"
    for content in (payload, payload[:20], b"", b"\x80\x02}."):
        path.write_bytes(content)
        assert convert.main(["refcoco", "--src", str(src)]) == 2
        assert capsys.readouterr().err.count("error: ") == 1
    assert not (tmp_path / "ran").exists()


def test_names_that_a_pickle_asks_for_are_told(src, tmp_path):
    path = src / "refcoco_evaluations/refcoco/refs(unc).p"
    path.write_bytes(pickle.dumps([Payload(tmp_path / "ran")]))
    with pytest.raises(ValueError, match=r"refs\(unc\).p is not .*mkdir"):
        convert.read_references(path)


def test_python_2_pickles(tmp_path):
    """The published files are from Python 2, whose texts are bytes."""
    path = tmp_path / "refs.p"
    path.write_bytes(b"(lp0\n(dp1\nS'raw'\np2\nS'caf\\xc3\\xa9'\np3\nsa.")
    assert convert.read_references(path) == [{"raw": "caf\u00e9"}]


# ---- where things are ----
def test_other_layouts(src):
    (src / "coco" / "train2014").rename(src / "coco" / "images")
    first = converted("llava_detail", src)[0]
    assert first["image"] == str(src / "coco/images/COCO_train2014_000000000009.jpg")
    assert len(converted("gqa", src / "gqa")) == 2
    (src / "deep" / "deeper").mkdir(parents=True)
    (src / "gqa").rename(src / "deep" / "deeper" / "gqa")
    with pytest.raises(ValueError, match="train_balanced_questions.json is not in .*src"):
        converted("gqa", src)


def test_the_command_line(src, capsys, monkeypatch):
    assert convert.main(["refcocog", "--src", str(src)]) == 0
    told = capsys.readouterr()
    words = "refcocog: 3 records; left out: 1 of another split\n"
    assert told.out == "" and told.err.endswith(words)
    monkeypatch.chdir(src)
    assert convert.main(["gqa", "--src", "gqa", "--out", "mine.jsonl"]) == 0
    record = {"image": "gqa/images/1.jpg", "task": "vqa"}
    record |= {"question": "Is the sky Dark?", "answers": ["Yes"]}
    assert json.loads((src / "mine.jsonl").read_text().split("\n")[0]) == record
    assert convert.main(["ok_vqa", "--src", "gqa"]) == 2
    assert "train2014 or coco/images is not in gqa" in capsys.readouterr().err
    assert convert.main(["laion", "--src", str(src)]) == 2
    assert "error: argument NAME: invalid choice: 'laion'" in capsys.readouterr().err


def test_records_are_written_above_their_pictures(src, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "gqa.jsonl"
    assert convert.main(["gqa", "--src", str(src), "--out", str(out)]) == 2
    assert "say --out" in capsys.readouterr().err and not list(out.parent.iterdir())
    assert convert.main(["gqa", "--src", str(src), "--out", str(tmp_path / "gqa.jsonl")]) == 0
    assert len(data.read_records(tmp_path / "gqa.jsonl")) == 2


def test_an_entry_cannot_name_a_picture_outside(src, tmp_path, capsys):
    shutil.copy(src / "gqa/images/1.jpg", tmp_path / "secret.jpg")
    edit(src / "gqa/train_balanced_questions.json",
         lambda items: items[0].update(image="../../../secret.jpg"))  # fmt: skip
    assert convert.main(["gqa", "--src", str(src)]) == 2
    assert "secret.jpg" in capsys.readouterr().err
