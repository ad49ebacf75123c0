"""Pictures, tokenizer, records and rows of data.py; the official numbers are in test_golden.py."""

import json
import pickle
import random
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import data
from damaged import BAD_PICTURES, bad_picture

TOKENIZER_FILES = Path(__file__).parent / "golden" / "tokenizer_files"
RED = (255, 0, 0)


@pytest.fixture(scope="module")
def phi():
    return data.Tokenizer(TOKENIZER_FILES)


@pytest.fixture
def small(tmp_path):
    """A folder with a vocabulary of 256 bytes, three merges and its own added tokens."""
    write_tokenizer(tmp_path, ["a b", "ab c", "Ġ ab"])
    return tmp_path


def write_tokenizer(folder, merges):
    alphabet = sorted({c for token in json.loads((TOKENIZER_FILES / "vocab.json").read_text())
                       for c in token if len(token) == 1})
    tokens = alphabet + [merge.replace(" ", "") for merge in merges]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {data.END_OF_TEXT: 300, "   ": 301, "  ": 302}
    (folder / "added_tokens.json").write_text(json.dumps(added))


# ---- pictures ----
def test_preprocess_is_clip_normalisation():
    pixels = data.preprocess(Image.new("RGB", (30, 50), (255, 0, 128)), 28)
    assert pixels.shape == (3, 28, 28) and pixels.dtype == torch.float32
    for channel, value in enumerate((1.0, 0.0, 128 / 255)):
        expected = (value - data.CLIP_MEAN[channel]) / data.CLIP_STD[channel]
        assert torch.allclose(pixels[channel], torch.tensor(expected))


@pytest.mark.parametrize("mode, color, seen", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)),  # wholly transparent: its red must not show
    ("RGBA", (255, 0, 0, 255), RED),
    ("LA", (0, 0), (255, 255, 255)),
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("I;16", 65535 // 2, (127, 127, 127)),
])
def test_modes_become_rgb_on_white(tmp_path, mode, color, seen):
    Image.new(mode, (5, 4), color).save(tmp_path / "a.png")
    image = data.load_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (5, 4) and image.getpixel((2, 2)) == seen


@pytest.mark.parametrize("size", [(1, 1), (1, 20000)])
def test_extreme_sizes(tmp_path, size):
    Image.new("CMYK", size).save(tmp_path / "a.jpg")
    image = data.load_image(tmp_path / "a.jpg")
    assert image.size == size and data.preprocess(image, 28).shape == (3, 28, 28)


def test_transparent_palette_and_first_frame(tmp_path):
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert data.load_image(tmp_path / "p.png").getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert data.load_image(tmp_path / "a.gif").getpixel((0, 0)) == RED


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert data.load_image(tmp_path / "a.jpg").size == (10, 20)


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_unreadable_images_name_the_file(tmp_path, kind):
    """Once, and say what is wrong."""
    path = bad_picture(tmp_path, kind)
    with pytest.raises(ValueError, match=f"cannot read the image {path}: ") as error:
        data.load_image(path)
    told = str(error.value)
    assert "\n" not in told and told.count(path.name) == 1
    unknown = "it is no picture in a format that is read here (JPEG, PNG, WEBP,"
    assert (unknown in told) == (kind in ("empty", "text"))


def test_a_lack_of_memory_is_not_the_pictures_fault(tmp_path, monkeypatch):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", mock.Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        data.load_image(tmp_path / "a.png")


# ---- tokenizer ----
def random_text(rng):
    wide = "éß日本語한국🙂\u200d\u0301\xa0"
    pools = ["abc XYZ 019", "  \t\n", ".,!?'\"<>{}[]#|", "'s 't 're", wide]
    return "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(60)))


def test_round_trip(phi):
    rng = random.Random(0)
    for text in (random_text(rng) for _ in range(20_000)):
        ids = phi.encode(text)
        assert phi.decode(ids) == text and all(0 <= i < len(phi) for i in ids)


def test_merges_as_merges_txt_says(phi):
    """A naive BPE over merges.txt, on words of letters."""
    lines = (TOKENIZER_FILES / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    order = {tuple(line.split(" ")): n for n, line in enumerate(lines)}
    vocab = json.loads((TOKENIZER_FILES / "vocab.json").read_text("utf-8"))
    for word in "photosynthesis unbelievable tokenisation zzxqj bicycle heart outlined".split():
        parts = list(word)
        while pairs := [p for p in zip(parts, parts[1:]) if p in order]:
            best = min(pairs, key=order.get)
            n = list(zip(parts, parts[1:])).index(best)
            parts[n:n + 2] = ["".join(best)]
        assert phi.encode(word) == [vocab[part] for part in parts]


def test_whitespace_runs_are_taken_longest_first(phi):
    assert phi.encode("a  [/INST]") == [64, 50286, 13412, 38604, 60]
    assert phi.encode(" " * 33) == [50257, 50286]
    assert phi.encode("\t" * 10) == [50287, 197]


def test_typed_special_token_is_plain_text(phi):
    ids = phi.encode("a<|endoftext|>b")
    assert phi.eos_token_id not in ids and phi.decode(ids) == "a<|endoftext|>b"
    assert phi.encode("<|endoftext|>", allow_special=True) == [phi.eos_token_id] == [50256]
    assert phi.decode([64, 50256]) == "a" and phi.decode([50256], False) == data.END_OF_TEXT


def test_ids_without_text_are_refused(phi):
    for bad in (50295, 51199, data.IMAGE_TOKEN_ID):
        with pytest.raises(ValueError, match=f"{bad} has no text"):
            phi.decode([64, bad])


def test_nothing_is_hard_wired_to_phi(small):
    tokenizer = data.Tokenizer(small)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 300
    assert len(tokenizer) == 303
    ids = tokenizer.encode("abc abx   é<|endoftext|>")
    assert ids[0] == 257 and ids[1] == 258 and 301 in ids and 300 not in ids
    assert tokenizer.decode(ids) == "abc abx   é<|endoftext|>"
    assert pickle.loads(pickle.dumps(tokenizer)).encode("abc ab") == tokenizer.encode("abc ab")


def test_inconsistent_tokenizer_files_are_refused(small):
    (small / "merges.txt").write_text("ab c\na b\nĠ ab\n")
    with pytest.raises(ValueError, match="order"):
        data.Tokenizer(small)
    (small / "merges.txt").write_text("a b\nab c\n")
    with pytest.raises(ValueError, match="Ġab"):
        data.Tokenizer(small)
    (small / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer files"):
        data.Tokenizer(small)
    (small / "merges.txt").unlink()
    with pytest.raises(ValueError, match=str(small)):
        data.Tokenizer(small)


# ---- texts and boxes ----
def test_caption_text():
    assert data.caption_text('  A (red)  "Car", it\'s here!\n') == "a red car , it's here"
    assert data.caption_text("w " * 80) == " ".join(["w"] * 50)


def test_boxes_to_text_and_back():
    text = data.format_box((29, 10.9, 50, 100), 100, 100)
    assert text == "{<29><10><50><100>}" and data.parse_boxes(text) == ([(29, 10, 50, 100)], 0)
    assert data.format_box((0, 0, 640.5, 480), 640, 480) == "{<0><0><100><100>}"
    with pytest.raises(ValueError, match="640x480"):
        data.format_box((0, 0, 700, 480), 640, 480)


@pytest.mark.parametrize("text, boxes, ignored", [
    ("no box", [], 0),
    ("{<50><60><10><20>}", [(10, 20, 50, 60)], 0),  # reversed
    ("{<1><2><3><400>}", [(1, 2, 3, 100)], 0),
    ("{<1><2><3>}", [], 1),
    ("{<1><2><3><4>", [], 1),
    ("{{<1><2><3><4>}}", [(1, 2, 3, 4)], 1),
    ("{<300><300><400><400>}", [], 1),
    ("{<1><2><3><4>}<delim>{<5><6><7><8>} {a}", [(1, 2, 3, 4), (5, 6, 7, 8)], 1),
    ("{<" + "9" * 5000 + "><1><1><1>}", [], 1),
])
def test_boxes_in_answers(text, boxes, ignored):
    assert data.parse_boxes(text) == (boxes, ignored)


# ---- prompts and samples ----
IMG = "<Img><ImageHere></Img> "
BOX = {"phrase": "The Dog.", "boxes": [[10, 20, 50, 60]]}


def sample(record, stage, size=(100, 100)):
    return data.make_sample(record, stage, random.Random(0), size)


@pytest.mark.parametrize("record, start, answer", [
    ({"task": "caption", "caption": "A Dog!"}, "[caption] ", "a dog"),
    ({"task": "detail", "caption": "A Dog!"}, "", "A Dog!"),
    ({"task": "vqa", "question": "What?!", "answers": ["Red."]}, "[vqa] ", "red"),
    ({"task": "refer", **BOX}, "[refer] ", "{<10><20><50><60>}"),
    ({"task": "identify", **BOX}, "[identify] ", "the dog"),
    ({"task": "detection", **BOX}, "[detection] The Dog. ", "<p>The Dog.</p> {<10><20><50><60>}"),
    ({"task": "grounding", "caption": "<p>A</p> {<1><2><3><4>}."}, "[grounding] ",
     "<p>A</p> {<1><2><3><4>}."),
    ({"task": "instruct", "prompt": "Say: Hi.", "answer": "Hi!"}, "Say: Hi. ", "Hi!"),
])
def test_stage_4_samples(record, start, answer):
    [(prompt, target)] = sample(record, 4)
    assert prompt.startswith("[INST] " + IMG + start) and prompt.endswith("  [/INST]")
    assert target == answer


def test_templates_of_the_other_stages():
    record = {"task": "caption", "caption": "A Dog!"}
    assert sample(record, 1) == sample(record, 2) == [("<ImageHere>", "a dog")]
    [(prompt, answer)] = sample(record, 3)
    assert answer == "A Dog!" and prompt.count(IMG) == 1 and "  " not in prompt
    assert prompt.startswith("###Human: ") and prompt.endswith(" ###Assistant: ")
    with pytest.raises(ValueError, match="stage 1 trains on captions"):
        sample({"task": "vqa", "question": "q", "answers": ["a"]}, 1)


def test_text_only_and_chat():
    record = {"task": "instruct", "prompt": "Name a color.", "answer": "Red."}
    assert sample(record, 4, None) == [("[INST] Name a color. [/INST]", "Red.")]
    record = {"task": "chat", "turns": [["What?", "A dog."], ["Red?", "No."]]}
    assert sample(record, 4) == [
        ("[INST] " + IMG + "What?  [/INST]", "A dog."), ("[INST] Red?  [/INST]", "No.")
    ]


def test_several_boxes_and_weighted_answers():
    record = {"task": "detection", "phrase": "dogs", "boxes": [[0, 0, 50, 50], [10, 10, 20, 20]]}
    assert sample(record, 4)[0][1] == "<p>dogs</p> {<0><0><50><50>}<delim>{<10><10><20><20>}"
    record = {"task": "vqa", "question": "q", "answers": ["yes"] * 9 + ["no"]}
    rng = random.Random(0)
    answers = [data.make_sample(record, 4, rng, (9, 9))[0][1] for _ in range(1000)]
    assert 850 < answers.count("yes") < 950


def test_inference_prompts_are_worded_as_in_training():
    assert data.inference_prompt("vqa", "what?", 4) == f"[INST] {IMG}[vqa] what?  [/INST]"
    assert data.inference_prompt("refer", "The DOG.", 4).endswith("location of the dog  [/INST]")
    assert data.inference_prompt("caption", "", 1) == "<ImageHere>"
    official = data.inference_prompt("refer", "the dog", 4, official=True)
    assert official == f"###Human: {IMG}[refer] give me the location of the dog###Assistant: "
    for task in ("caption", "detail", "grounding"):
        wordings = [data.instruction(task, rng=random.Random(n)) for n in range(200)]
        assert data.instruction(task) in wordings and len(set(wordings)) == len(data.POOLS[task])


@pytest.mark.parametrize("task, text, stage, reason", [
    ("vqa", "is <ImageHere> red?", 4, "<ImageHere>"),
    ("vqa", " ", 4, "needs a text"),
    ("vqa", "...", 4, "needs a text with words in it, not '...'"),
    ("caption", "hello", 4, "takes no text"),
    ("capton", "", 4, "caption"),
    ("identify", "here", 4, "one box"),
    ("vqa", "what?", 2, "stage 3 or 4"),
])
def test_inference_prompt_refuses(task, text, stage, reason):
    with pytest.raises(ValueError, match=reason):
        data.inference_prompt(task, text, stage)


# ---- records ----
def write_records(folder, lines, newline="\n", start=""):
    Image.new("RGB", (100, 80), RED).save(folder / "a.png")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path = folder / "data.jsonl"
    path.write_bytes((start + newline.join(texts) + newline).encode())
    return path


def caption(**changes):
    return {"image": "a.png", "task": "caption", "caption": "a dog"} | changes


def test_records_with_bom_and_crlf(tmp_path):
    lines = [caption(caption="a dog\u2028é"), "", caption()]
    records = data.read_records(write_records(tmp_path, lines, "\r\n", "\ufeff"))
    assert len(records) == 2 and records[0]["caption"] == "a dog\u2028é"
    assert records[0]["image"] == str(tmp_path / "a.png")


@pytest.mark.parametrize("line, reason", [
    ("{bad", "not JSON"),
    ("[1]", "task"),
    (caption(task="capton"), "capton"),
    (caption(caption=""), '"caption"'),
    (caption(caption="..."), '"caption"'),  # nothing is left of it in training
    (caption(caption=3), '"caption"'),
    (caption(caption="x <ImageHere>"), '"caption"'),
    (caption(image="b.png"), "b.png"),
    (caption(image="../a.png"), "../a.png"),
    (caption(image="/etc/passwd"), "/etc/passwd"),
    (caption(image=None), '"image"'),
    ({"task": "vqa", "question": "q", "answers": ["a"]}, '"image"'),
    (caption(task="vqa", question="q", answers="red"), '"answers"'),
    (caption(task="vqa", question="q", answers=["red", ""]), '"answers"'),
    (caption(task="refer", phrase="it"), '"boxes"'),
    (caption(task="refer", phrase="it", boxes=[[1, 2, 3]]), '"boxes"'),
    (caption(task="refer", phrase="it", boxes=[[1, 2, 3, "4"]]), '"boxes"'),
    (caption(task="refer", phrase="it", boxes=[[5, 2, 3, 4]]), "reversed"),
    (caption(task="refer", phrase="it", boxes=[[-5, 2, 3, 4]]), "off the image"),
    (caption(task="refer", phrase="it", boxes=[[float("nan"), 2, 3, 4]]), "box"),
    ({"task": "chat", "turns": [["q"]]}, '"turns"'),
    ({"task": "chat", "turns": []}, '"turns"'),
    ({"task": "instruct", "prompt": "q", "answer": " "}, '"answer"'),
])
def test_bad_records_name_the_line(tmp_path, line, reason):
    path = write_records(tmp_path, [caption(), line])
    with pytest.raises(ValueError, match="line 2") as error:
        data.read_records(path)
    assert reason in str(error.value) and str(path) in str(error.value)


def test_whole_file_is_checked_and_five_lines_are_shown(tmp_path):
    path = write_records(tmp_path, [caption()] + [caption(caption="")] * 7)
    with pytest.raises(ValueError, match="7 bad lines") as error:
        data.read_records(path)
    assert "line 6" in str(error.value) and "line 7" not in str(error.value)
    path.write_text("")
    with pytest.raises(ValueError, match="no records"):
        data.read_records(path)


def test_records_are_read_when_asked_for(tmp_path):
    lines = [caption(caption=f"number {n} \u00e9") for n in range(9)]
    lines[3:3] = ["", "  "]
    path = write_records(tmp_path, lines, "\r\n", "\ufeff")
    records = data.read_records(path)
    captions = [record["caption"] for record in records]
    assert captions == [f"number {n} \u00e9" for n in range(9)] and len(records) == 9
    assert records[-2] == pickle.loads(pickle.dumps(records))[7] == list(records)[7]
    with pytest.raises(IndexError):
        records[9]
    path.write_text("changed\n" * 50)  # in the middle of a run
    with pytest.raises(ValueError, match="data.jsonl: not JSON"):
        records[0]


def test_a_picture_is_looked_for_once(tmp_path, monkeypatch):
    path, looked_for = write_records(tmp_path, [caption()] * 50), []
    isfile = data.os.path.isfile
    monkeypatch.setattr(data.os.path, "isfile", lambda p: looked_for.append(p) or isfile(p))
    assert len(data.read_records(path)) == 50 and len(looked_for) == 1
    path.write_text("\n".join(json.dumps(caption(image="b.png")) for _ in range(3)))
    with pytest.raises(ValueError, match="3 bad lines"):
        data.read_records(path)


def write_pictures(folder, *names):
    (folder / "below").mkdir()
    for name in names:
        if name.endswith(".txt"):
            (folder / name).write_bytes(f"\ufeffWhat {name} says.\r\n".encode())
        else:
            Image.new("RGB", (4, 4)).save(folder / name)


def test_a_folder_of_pictures_and_texts(tmp_path):
    names = ["a.jpg", "a.txt", "b.v2.PNG", "b.v2.txt", "below/a.jpg", "below/a.txt", "b.v2.gif"]
    write_pictures(tmp_path, *names)
    (tmp_path / "Thumbs.db").touch()
    records = data.read_folder(str(tmp_path))
    said = {record["image"]: record["caption"] for record in records}
    assert said == {str(tmp_path / image): f"What {text} says." for image, text in (
        ("a.jpg", "a.txt"), ("below/a.jpg", "below/a.txt"), ("b.v2.PNG", "b.v2.txt"),
        ("b.v2.gif", "b.v2.txt"))}  # fmt: skip
    assert {record["task"] for record in records} == {"caption"}
    assert sample(records[0], 1)[0][1].startswith("what ")


@pytest.mark.parametrize("names, reasons", [
    (["a.jpg", "a.txt", "b.jpg"], ["1 bad", "b.jpg has no .txt"]),
    (["a.jpg", "a.txt", "b.txt"], ["1 bad", "b.txt has no picture"]),
    (["a.jpg", "below/a.txt"], ["2 bad", "below/a.txt has no picture", "a.jpg has no .txt"]),
    ([f"{n}.txt" for n in range(7)], ["7 bad", "4.txt has"]),
    ([], ["no pictures"]),
])
def test_halves_of_pairs_are_named(tmp_path, names, reasons):
    write_pictures(tmp_path, *names)
    with pytest.raises(ValueError) as error:
        data.read_folder(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert all(reason in str(error.value) for reason in reasons) and "5.txt" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b" \n", b"...", b"\xff\xfe"])
def test_texts_of_no_use_are_named(tmp_path, text):
    write_pictures(tmp_path, "a.jpg", "a.txt")
    (tmp_path / "a.txt").write_bytes(text)
    with pytest.raises(ValueError, match="1 bad .*a.txt"):
        data.read_folder(tmp_path)


# ---- rows and batches ----
def encode(phi, turns, num_images=1, max_txt_len=32, **options):
    return data.encode_sample(turns, phi, num_images, 4, max_txt_len, "###", **options)


def test_only_the_answer_has_labels(phi):
    row = encode(phi, [("[INST] <Img><ImageHere></Img> what?  [/INST]", "red")])
    answer = phi.encode("red###")
    ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
    assert ids[0] == phi.bos_token_id and ids.count(data.IMAGE_TOKEN_ID) == 4
    assert ids[-len(answer):] == labels[-len(answer):] == answer
    assert set(labels[:-len(answer)]) == {data.IGNORE} and len(ids) == len(labels)
    assert row["attention_mask"].tolist() == [1] * len(ids) and row["truncated"] == 0
    start = phi.encode("[INST] <Img>")  # the texts round a picture are tokenised one by one
    assert ids[1:1 + len(start)] == start and ids[1 + len(start)] == data.IMAGE_TOKEN_ID


def test_truncation_is_counted(phi):
    full = encode(phi, [("<ImageHere>", "one two three four five")], max_txt_len=6)
    cut = encode(phi, [("<ImageHere>", "one two three four five six")], max_txt_len=6)
    assert full["truncated"] == 0 and cut["truncated"] == 1  # the sixth is the end symbol
    assert (cut["labels"] != data.IGNORE).sum() == 6
    assert data.collate([full, cut, cut], phi.pad_token_id)["truncated"] == 2


def test_later_turns(phi):
    turns = [("<ImageHere> one", "two"), ("three", "four")]
    row = encode(phi, turns)
    asked = [phi.bos_token_id] + phi.encode("three")
    expected = phi.encode("two###") + [data.IGNORE] * len(asked) + phi.encode("four###")
    assert row["labels"][-len(expected):].tolist() == expected
    assert (row["input_ids"] == phi.bos_token_id).sum() == 2 and row["attention_mask"].min() == 1
    masked = encode(phi, turns, mask_later_bos=True)
    hidden = (masked["attention_mask"] == 0).nonzero().flatten().tolist()
    assert hidden == [(row["input_ids"] == phi.bos_token_id).nonzero()[-1].item()]


def test_user_text_never_becomes_a_special_token(phi):
    row = encode(phi, [("<ImageHere>a<|endoftext|>", "b"), ("<ImageHere>", "<|endoftext|>")])
    assert (row["input_ids"] == data.IMAGE_TOKEN_ID).sum() == 4
    assert (row["input_ids"] == phi.eos_token_id).sum() == 2  # the BOS of two turns


def test_counts_in_messages(phi):
    with pytest.raises(ValueError, match="2 <ImageHere> in the prompt, 1 images"):
        encode(phi, [("<ImageHere><ImageHere>", "a")])
    with pytest.raises(ValueError, match="tokens, pictures included, but 20 fit"):
        encode(phi, [("<ImageHere>" + "word " * 50, "a")], max_length=20)


def test_collate_pads_right_and_keeps_pictures_in_order(phi):
    rows = [encode(phi, [("<ImageHere>", "a")]), encode(phi, [("no picture", "b")], 0),
            encode(phi, [("<ImageHere> long prompt", "c")])]
    rows[0]["pixel_values"] = torch.zeros(1, 3, 2, 2)
    rows[2]["pixel_values"] = torch.ones(1, 3, 2, 2)
    batch = data.collate(rows, phi.pad_token_id)
    assert batch["pixel_values"].flatten(1).sum(1).tolist() == [0, 12]
    for n, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][n, :length].equal(row["input_ids"])
        assert batch["attention_mask"][n].sum() == length
        assert (batch["input_ids"][n, length:] == phi.pad_token_id).all()
        assert (batch["labels"][n, length:] == data.IGNORE).all()
    assert "pixel_values" not in data.collate([rows[1]], phi.pad_token_id)


def test_left_padding():
    batch = data.left_pad_collate([[1, 2, 3], [4]], 9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [9, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


# ---- streams ----
def dataset(folder, phi, lines, **options):
    records = data.read_records(write_records(folder, lines))
    return data.RecordDataset(records, data.RowSettings(4, phi, 28, 4), **options)


def test_positions_fix_the_rows_and_every_epoch_has_all_records(tmp_path, phi):
    lines = [caption(caption=f"number {n}") for n in range(7)]
    rows, again = dataset(tmp_path, phi, lines), dataset(tmp_path, phi, lines)
    orders = []
    for epoch in range(2):
        labels = [rows[epoch * 7 + n]["labels"] for n in range(7)]
        orders.append([phi.decode(row[row != data.IGNORE].tolist()) for row in labels])
    assert sorted(orders[0]) == sorted(orders[1]) == [f"number {n}###" for n in range(7)]
    assert orders[0] != orders[1]
    for position in (13, 0, 5):
        assert again[position]["input_ids"].equal(rows[position]["input_ids"])
    assert rows[0]["pixel_values"].shape == (1, 3, 28, 28)
    other = dataset(tmp_path, phi, lines, seed=1)
    assert any(not other[n]["input_ids"].equal(rows[n]["input_ids"]) for n in range(7))


def test_unusable_records_are_replaced_and_counted(tmp_path, phi):
    far = caption(task="refer", phrase="far", boxes=[[0, 0, 500, 500]])
    rows = dataset(tmp_path, phi, [caption(), caption(image="a.png"), far])
    bad_picture(tmp_path, "cut").replace(tmp_path / "broken.png")
    rows.records = list(rows.records)
    rows.records[1]["image"] = str(tmp_path / "broken.png")
    batch = data.collate([rows[n] for n in range(3)], phi.pad_token_id)
    assert len(batch["input_ids"]) == 3 and len(batch["skipped"]) >= 2
    assert any("broken.png" in reason for reason in batch["skipped"])
    assert any("100x80" in reason for reason in batch["skipped"])
    rows = dataset(tmp_path, phi, [far])
    with pytest.raises(ValueError, match="cannot be used"):
        rows[0]


def test_records_that_the_model_has_no_positions_for_are_passed_over(tmp_path, phi):
    lines = [{"task": "instruct", "prompt": f"say{' so' * n}", "answer": "x"} for n in (1, 99)]
    records = data.read_records(write_records(tmp_path, lines))
    rows = data.RecordDataset(records, data.RowSettings(4, phi, 28, 4, max_length=50))
    batch = data.collate([rows[n] for n in range(4)], phi.pad_token_id)
    assert batch["input_ids"].shape[1] < 50 and len(batch["skipped"]) >= 2
    assert all(reason.endswith("pictures included, but 50 fit") for reason in batch["skipped"])
