"""The paper's benchmarks: their files, prompts, rules and scores, and runs that were cut."""

import json
import pickle
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw

from data import load_image, preprocess
from experiments import benchmarks, evaluate
from experiments.bench_scores import normalized, score_box, score_choice, score_label
from experiments.bench_scores import score_okvqa, score_vizwiz, score_yes_no, vqa_accuracy
from experiments.benchmarks import BENCHES, Config
from generate import answer
from model import TinyGPTV

HUMAN = "###Human: <Img><ImageHere></Img> "
SHORT = "[vqa] Based on the image, respond to this question with a short answer: "


# ---- the files ----
def draw(path, color="red", ellipse=True, box=(40, 50, 140, 150)):
    image = Image.new("RGB", (200, 200), "white")
    pen = ImageDraw.Draw(image)
    (pen.ellipse if ellipse else pen.rectangle)(box, fill=color)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write(path, content, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(text, "utf-8-sig" if lines else "utf-8")


def references(folder, name, sets):
    """instances.json and refs.p, with a red circle of two sentences and a blue square of one, by
    turns; sets: the split of each."""
    boxes = [[40, 50, 100, 100], [80, 60, 70, 70]]
    write(folder / "instances.json", {
        "annotations": [{"id": 70 + n, "bbox": box} for n, box in enumerate(boxes)],
        "images": [{"id": 5 + n, "width": 200, "height": 200} for n in range(2)],
    })  # fmt: skip
    sentences = [["the red circle", "the circle"], ["the blue square"]]
    things = [
        {"image_id": 5 + n % 2, "ann_id": 70 + n % 2, "split": split,
         "sentences": [{"sent": sent, "raw": "?"} for sent in sentences[n % 2]]}
        for n, split in enumerate(sets)
    ]  # fmt: skip
    (folder / name).write_bytes(pickle.dumps(things))


@pytest.fixture
def data(tmp_path):
    """A folder with all benches in their official layouts, two pictures in each: a red circle and
    a blue square."""
    root, square = tmp_path / "data", ("blue", False, (80, 60, 150, 130))
    draw(root / "gqa/gqa_images/n1.jpg")
    draw(root / "gqa/gqa_images/2.jpg", *square)
    write(root / "gqa/testdev_balanced_questions.json", [
        {"image": "n1.jpg", "question": "What color is the Circle?", "answer": "red"},
        {"image": "2.jpg", "question": "What color is the square?", "answer": "blue"},
        {"image": "n1.jpg", "question": "What shape is it?", "answer": "circle"},
    ])  # fmt: skip
    draw(root / "coco/train2017/000000000005.jpg")
    draw(root / "coco/val2017/000000000012.jpg", *square)
    write(root / "vsr/test.jsonl", [
        {"image": "000000000012.jpg", "caption": "The square is blue.", "label": 1},
        {"image": "000000000005.jpg", "caption": "The square is blue.", "label": 0},
    ], lines=True)  # fmt: skip
    write(root / "okvqa/okvqa_test_split.json", [
        {"image_id": 12, "question": "What color is it?", "question_id": 125},
        {"image_id": 5, "question": "What color is it?", "question_id": 55},
    ])  # fmt: skip
    write(root / "okvqa/mscoco_val2014_annotations_clean.json", {"annotations": [
        {"question_id": 55, "answers": [{"answer": "red", "answer_id": n} for n in range(10)]},
        {"question_id": 125, "answers": [{"answer": "the blue"}] * 5 + [{"answer": "navy"}] * 5},
    ]})  # fmt: skip
    draw(root / "iconvqa/iconvqa_images/33/image.png")
    draw(root / "iconvqa/iconvqa_images/9/image.png", *square)
    choices = ["green", "Red", "blue"]
    write(root / "iconvqa/choose_text_val.json", [
        {"image_id": "33", "question": "What color is it?", "choices": choices, "answer": 1},
        {"image_id": 9, "question": "What color is it?", "choices": choices, "answer": 2},
    ])  # fmt: skip
    draw(root / "vizwiz/vizwiz_images/VizWiz_val_0.jpg")
    write(root / "vizwiz/val.json", [
        {"image": "VizWiz_val_0.jpg", "question": "What is this?",
         "answers": [{"answer": "circle"}] * 6 + [{"answer": "unanswerable"}] * 4},
        {"image": "VizWiz_val_0.jpg", "question": "Who's this?", "answers": [{"answer": "no"}]},
    ])  # fmt: skip
    draw(root / "hateful_meme/hm_images/img/01.png")
    write(root / "hateful_meme/dev.jsonl", [
        {"id": 1, "img": "img/01.png", "label": 0, "text": "a {nice} 'one'"},
        {"id": 2, "img": "img/01.png", "label": 1, "text": "Bad one."},
    ], lines=True)  # fmt: skip
    draw(root / "coco/train2014/COCO_train2014_000000000005.jpg")
    draw(root / "coco/train2014/COCO_train2014_000000000006.jpg", *square)
    write(root / "lists/refcoco_val.json", [
        {"img_id": "COCO_train2014_000000000005_0", "sents": "The red circle", "height": 200,
         "width": 200, "bbox": [40, 50, 100, 100]},
        {"img_id": "COCO_train2014_000000000006_13", "sents": "the blue square", "height": 200,
         "width": 200, "bbox": [80, 60, 70, 70]},
    ])  # fmt: skip
    for name in ("dev.jsonl", "test.jsonl", "val.json"):  # of what is no concern of ours
        write(root / "another" / name, [{}], lines=name.endswith("l"))
    references(root / "refcoco", "refs(unc).p", ["testA", "testB"])
    references(root / "refcoco+", "refs(unc).p", ["testA", "val", "train", "testB"])
    references(root / "refcocog", "refs(umd).p", ["test", "val"])
    return root


RED, BLUE = ([40, 50, 100, 100], 200, 200), ([80, 60, 70, 70], 200, 200)
WHERE = "[refer] give me the location of "
EXPECTED = {  # what each reader makes of these files: split, picture, official task text, truth
    "gqa": [
        ("testdev", "gqa/gqa_images/n1.jpg", SHORT + "What color is the Circle?", "red"),
        ("testdev", "gqa/gqa_images/2.jpg", SHORT + "What color is the square?", "blue"),
        ("testdev", "gqa/gqa_images/n1.jpg", SHORT + "What shape is it?", "circle")],
    "vsr": [
        ("test", f"coco/{folder}/0000000000{number}.jpg", "[vqa] Based on the image, is this "
         "statement true or false? The square is blue.", label)
        for folder, number, label in (("val2017", "12", "true"), ("train2017", "05", "false"))],
    "iconqa": [
        ("val", f"iconvqa/iconvqa_images/{number}/image.png", SHORT + "What color is it? ",
         (["green", "Red", "blue"], right)) for number, right in ((33, 1), (9, 2))],
    "vizwiz": [
        ("val", "vizwiz/vizwiz_images/VizWiz_val_0.jpg", f"[vqa] The question is '{question}' "
         "Based on the image, answer the question with a single word or phrase. and reply "
         "'unanswerable' when the provided information is insufficient", truths)
        for question, truths in (("What is this?", ["circle"] * 6 + ["unanswerable"] * 4),
                                 ("Who's this?", ["no"]))],
    "hm": [
        ("dev", "hateful_meme/hm_images/img/01.png", f"This is an image writting '{text}'. Is this "
         "image hateful? Answer yes or no. Answer:", label)
        for text, label in (("a {nice} 'one'", "no"), ("Bad one.", "yes"))],
    "okvqa": [
        ("test", "coco/val2017/000000000012.jpg", SHORT + "What color is it?",
         ["the blue"] * 5 + ["navy"] * 5),
        ("test", "coco/train2017/000000000005.jpg", SHORT + "What color is it?", ["red"] * 10)],
    "refcoco": [
        ("val", "5.jpg", WHERE + "The red circle", RED),
        ("val", "6.jpg", WHERE + "the blue square", BLUE),
        ("testA", "5.jpg", WHERE + "the red circle", RED),
        ("testA", "5.jpg", WHERE + "the circle", RED),
        ("testB", "6.jpg", WHERE + "the blue square", BLUE)],
    "refcoco+": [
        ("val", "6.jpg", WHERE + "the blue square", BLUE),
        ("testA", "5.jpg", WHERE + "the red circle", RED),
        ("testA", "5.jpg", WHERE + "the circle", RED),
        ("testB", "6.jpg", WHERE + "the blue square", BLUE)],
    "refcocog": [
        ("val", "6.jpg", WHERE + "the blue square", BLUE),
        ("test", "5.jpg", WHERE + "the red circle", RED),
        ("test", "5.jpg", WHERE + "the circle", RED)],
}  # fmt: skip


@pytest.mark.parametrize("bench", BENCHES)
def test_items_and_official_prompts(data, bench):
    found = []
    for item in benchmarks.read_items(Config(bench, str(data))):
        space = " " * (bench == "iconqa")
        prompt = benchmarks.prompt_for(BENCHES[bench].wording + space, item.text, official=True)
        assert prompt.startswith(HUMAN) and prompt.endswith("###Assistant: ")
        task_text = prompt.removeprefix(HUMAN).removesuffix("###Assistant: ")
        image = item.image.relative_to(data).as_posix()
        found.append((item.split, image.replace("coco/train2014/COCO_train2014_00000000000", ""),
                      task_text, item.truth))  # fmt: skip
    assert found == EXPECTED[bench]


def test_without_official_texts_are_normalised_as_in_training():
    prompt = benchmarks.prompt_for(BENCHES["gqa"].wording, "Is {It} a Dog (big)?", official=False)
    assert prompt == f"[INST] <Img><ImageHere></Img> {SHORT}is {{it}} a dog big ?  [/INST]"


def test_n_and_split_choose_items(data):
    def found(**chosen):
        items = benchmarks.read_items(Config("refcoco", str(data), **chosen))
        return [item.split for item in items]

    assert found(n=1) == ["val", "testA", "testB"]
    assert found(split="testA") == ["testA", "testA"]


def test_published_layouts_are_found_as_well(data):
    (data / "gqa/gqa_images").rename(data / "gqa/images")
    (data / "vizwiz/vizwiz_images").rename(data / "vizwiz/val")
    (data / "hateful_meme/hm_images/img").rename(data / "hateful_meme/img")
    (data / "iconvqa/iconqa/val").mkdir(parents=True)
    (data / "iconvqa/iconvqa_images").rename(data / "iconvqa/iconqa/val/choose_txt")
    (data / "iconvqa/iconqa/test/choose_txt").mkdir(parents=True)
    for bench in ("gqa", "vizwiz", "hm", "iconqa"):
        assert len(benchmarks.read_items(Config(bench, str(data)))) == len(EXPECTED[bench])
    assert len(benchmarks.read_items(Config("gqa", str(data / "gqa")))) == 3


# ---- the scores: official, strict ----
@pytest.mark.parametrize("said, scores", [
    ("red", (1, 1)), ("Red.", (1, 1)), ("it is red", (1, 0)), ("no###red", (1, 0)),
    ("red###Human: no", (1, 1)), ("reddish", (1, 0)), ("blue", (0, 0)), ("", (0, 0)),
])  # fmt: skip
def test_labels(said, scores):
    assert score_label(said, "red") == scores


def test_a_statement_is_true_or_false_and_not_yes_or_no():
    assert score_label("Yes, this is true.", "true") == (1, 0)
    assert score_label("yes", "true") == score_label("no", "false") == (0, 0)


def test_nothing_is_never_right():
    assert score_label("", "!") == (0, 0)  # of which the normaliser leaves nothing


def test_official_labels_keep_their_case():
    assert score_label("A Pepsi", "Pepsi") == (0, 0) and score_label("pepsi", "Pepsi") == (0, 1)


@pytest.mark.parametrize("said, scores", [
    ("dog", (1, 1)), ("Dog", (1, 1)), ("dog###cat", (1, 1)), ("###Assistant: dog", (1, 0)),
    ("a hot dog", (1, 0)), ("do", (1, 0)), ("", (1, 0)),  # containing, contained, empty
    ("big cat", (2 / 3, 2 / 3)), ("Assistant: dog", (1, 1)), ("cat", (2 / 3, 0)),
    ("bird", (0, 0)), ("bird###dog", (0, 0)), ("pen", (1 / 3, 0)),
])  # fmt: skip
def test_vizwiz(said, scores):
    truths = ["dog", "dog", "Dog", "dog", "big cat", "big cat", "pen_box"]
    assert score_vizwiz(said, truths) == pytest.approx(scores)


def test_vizwiz_knows_no_case_and_counts_an_answer_with_underscores_several_times():
    assert score_vizwiz("pen", ["PEN"] * 3) == (1, 1)
    assert score_vizwiz("pen", ["pen_pens_pencil"]) == (1, 0)


@pytest.mark.parametrize("said, scores", [
    ("yes", (1, 1)), ("Yes.", (1, 1)), ("yes, it is", (1, 0)), ("eyes", (1, 0)),
    ("no or yes", (1, 0)), ("yes###no", (1, 1)), ("no", (0, 0)), ("###yes", (0, 0)), ("", (0, 0)),
])  # fmt: skip
def test_hateful_memes_with_yes(said, scores):
    assert score_yes_no(said, "yes") == scores


@pytest.mark.parametrize("said, scores", [
    ("no", (1, 1)), ("it is not", (1, 0)), ("yes no", (0, 0)), ("maybe", (0, 0)), ("", (0, 0)),
])  # fmt: skip
def test_hateful_memes_with_no(said, scores):
    assert score_yes_no(said, "no") == scores


def test_choices():
    assert score_choice(1, (["a", "b"], 1)) == (1, 1) and score_choice(0, (["a", "b"], 1)) == (0, 0)


@pytest.mark.parametrize("said, scores", [
    ("{<20><25><70><75>}", (1, 1)),  # the box itself
    (" { <20> <25> <70> <75> } ", (1, 1)), ("{<20><25><70><75>}###", (1, 1)),
    ("{<20><25><70><75>}###Human: 3", (0, 1)),  # a fifth number
    ("{<20><25><70><75>} a star", (1, 0)), ("at {<20><25><70><75>}", (0, 0)),
    ("{<20><25><70><75>}{<20><25><70><75>}", (0, 0)), ("{<20><25><70>}", (0, 0)),
    ("{<20><25><70><50>}", (1, 0)),  # IoU exactly 0.5, and with a pixel more 51/101
    ("{<20><25><70><51>}", (1, 1)), ("{<20><25><70><49>}", (0, 0)), ("", (0, 0)),
    ("{<25><20><75><70>}", (1, 1)), ("{<50><25><100><75>}", (0, 0)), ("20,25,70,75", (0, 0)),
    ("{<20><50><70><100>}", (0, 0)),  # half of it
])  # fmt: skip
def test_boxes(said, scores):
    assert score_box(said, RED) == scores


def test_an_overlap_of_exactly_a_half_is_too_little():
    assert score_box("{<0><0><99><49>}", ([0, 0, 99, 99], 100, 100)) == (0, 0)
    assert score_box("{<20><25><70><50>}", ([40, 50, 100, 100], 200, 200))[1] == 0


def test_boxes_are_in_hundredths_of_width_and_height():
    assert score_box("{<10><40><20><80>}", ([40, 40, 40, 40], 400, 100)) == (1, 1)


def test_okvqa():
    truths = ["the dog"] * 3 + ["two cats"] * 2 + ["Dont"]
    dog = (3 * 2 / 3 + 3 * 1) / 6  # left out is one of the three, or one of the others
    cats, not_so = (2 * 1 / 3 + 4 * 2 / 3) / 6, (1 * 0 + 5 * 1 / 3) / 6
    for said, share in (("dog", dog), ("A DOG!", dog), ("2 cats", cats), ("don't", not_so),
                        ("dogs", 0), ("", 0)):  # fmt: skip
        assert vqa_accuracy(said, truths) == pytest.approx(share), said
    assert score_okvqa("Dog###cat", truths) == (pytest.approx(dog), 0)
    assert score_okvqa("The dog.", truths) == (pytest.approx(dog), 1)
    assert score_okvqa("Assistant: dog", truths) == (0, 0)


def test_okvqa_normalises_nothing_where_all_agree():
    assert vqa_accuracy("Red\n", ["red"] * 10) == 1
    assert vqa_accuracy("the red", ["red"] * 10) == 0 == vqa_accuracy("red", ["the red"] * 10)
    assert vqa_accuracy("red", ["the red"] * 9 + ["blue"]) == 1


@pytest.mark.parametrize("text, expected", [
    ("A man, the dog and an owl", "man dog and owl"), ("None of Ten", "0 of 10"),
    ("wont couldntve couldn'tve", "won't couldntve couldn't've"), ("yall'd've", "y'all'd've"),
    ("somebody'd somethingd oclock", "somebodyd something'd o'clock"),
    ("ice-cream", "ice cream"), ("ice -cream-cone", "ice creamcone"), ("a/b c-d- ", "b cd"),
    ("1,000 ice-creams", "1000 icecreams"), ("3.5 p.m.", "3.5 pm"), (".5", ".5"),
    ("." * 40, "." * 8),  # 32 of them go
])  # fmt: skip
def test_the_normaliser_of_vqa(text, expected):
    assert normalized(text) == expected


# ---- the model ----
@pytest.fixture(scope="module")
def model():
    return TinyGPTV.from_pretrained(benchmarks.WEIGHTS)


def items_of(data, bench):
    return benchmarks.read_items(Config(bench, str(data)))


def test_official_decoding(model, data):
    """20 tokens, no BOS, and no end at "###"."""
    items = items_of(data, "gqa")
    said = benchmarks.generated(model, items, BENCHES["gqa"].wording, official=True)
    prompts = [f"{HUMAN}{text}###Assistant: " for _, _, text, _ in EXPECTED["gqa"]]
    images = [load_image(item.image) for item in items]
    with pytest.warns(UserWarning, match="cut after 20 tokens"):
        told = answer(model, images, prompts, max_new_tokens=20, official=True)
    assert said == [text.split("[/INST]")[-1].strip() for text in told]
    assert all("###" in text for text in said)


def test_what_the_official_code_strips_from_answers(monkeypatch):
    told = ["<s> yes </s> no", "[INST] a [/INST] b [/INST] red ", "plain"]
    monkeypatch.setattr(benchmarks, "answer", lambda *_, **__: told)
    assert benchmarks.generated(None, [], "{}", True) == ["yes", "red", "plain"]


@pytest.mark.parametrize("official, prompt, end", [
    (True, f"{HUMAN}{SHORT}What color is it? ###Assistant: ", "\n"),
    (False, f"[INST] <Img><ImageHere></Img> {SHORT}what color is it?  [/INST]", "###"),
])  # fmt: skip
def test_the_choice_with_the_lowest_loss_is_chosen(
    model, data, monkeypatch, official, prompt, end
):
    encode, losses, told = model.tokenizer.encode, [], []
    before, after = map(encode, prompt.split("<ImageHere>"))
    items = items_of(data, "iconqa")
    for item in items:
        pixels = preprocess(load_image(item.image), model.image_size)[None]
        for choice in item.truth[0] if official else ["green", "red", "blue"]:
            said = encode(choice + end)
            ids = [model.tokenizer.bos_token_id, *before, *[-1] * 32, *after, *said]
            labels = [-100] * (len(ids) - len(said)) + said
            mask = torch.ones(1, len(ids), dtype=torch.long)
            with torch.no_grad():
                loss = model(torch.tensor([ids]), torch.tensor([labels]), mask, pixels)
            losses.append(loss.item())
    choice_loss = benchmarks.choice_loss
    monkeypatch.setattr(
        benchmarks, "choice_loss", lambda *given: told.append(choice_loss(*given)) or told[-1]
    )
    chosen = benchmarks.chosen(model, items, BENCHES["iconqa"].wording, official)
    assert told == pytest.approx(losses, rel=1e-4) and len(set(losses)) == 6
    assert chosen == [three.index(min(three)) for three in (losses[:3], losses[3:])]


def test_official_choices_are_split_at_underscores(monkeypatch, data):
    [item, _] = items_of(data, "iconqa")
    item = item._replace(truth=(["a_b", "C"], 1))
    monkeypatch.setattr(benchmarks, "encode_images", lambda *_: [None])
    monkeypatch.setattr(benchmarks, "choice_loss", lambda *given: -ord(given[3][0]))
    assert benchmarks.chosen(None, [item], "{}", official=True) == [1]  # of a, b and C
    assert benchmarks.chosen(None, [item], "{}", official=False) == [1]  # of a_b and c


# ---- runs ----
@pytest.fixture
def run(model, data, monkeypatch, tmp_path, capsys):
    """Runs the command line; returns the exit code, stdout's lines and stderr."""
    monkeypatch.setattr(benchmarks.TinyGPTV, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results")

    def run(*arguments):
        code = evaluate.main([*arguments, f"data={data}"])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_from_end_to_end(run, bench, tmp_path, data):
    """The shipped miniature knows these wordings, but not those of VSR, VizWiz and memes."""
    code, out, _ = run(f"bench={bench}", "batch_size=2")
    result = json.loads(out[-1])
    kept = tmp_path / "results" / f"{bench}.json"
    assert code == 0 and json.loads(kept.read_text("utf-8")) == result
    assert (result["bench"], result["official"]) == (bench, False)
    splits = [item[0] for item in EXPECTED[bench]]
    assert {name: scores["n"] for name, scores in result["scores"].items()} == Counter(splits)
    if bench not in ("vsr", "vizwiz", "hm"):
        rows = [[scores["official"], scores["strict"]] for scores in result["scores"].values()]
        # of OKVQA, one truth has an article that only the official rule passes over
        expected = [1.0, 0.5] if bench == "okvqa" else [1.0, 1.0]
        assert rows == [expected] * len(rows)
    head, *lines = kept.with_suffix(".jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["item"] for line in lines] == list(range(len(EXPECTED[bench])))
    assert str(data) not in head + lines[0]


def test_official_decoding_from_end_to_end(run, tmp_path):
    result = json.loads(run("bench=gqa", "official=1", "n=2")[1][-1])
    assert result["official"] is True and result["scores"]["testdev"]["n"] == 2
    kept, answers = sorted((tmp_path / "results").iterdir())
    assert (kept.name, answers.name) == ("gqa_official_n-2.json", "gqa_official_n-2.jsonl")
    assert all("###" in line for line in answers.read_text("utf-8").splitlines()[1:])


def test_scores_are_means_of_items(run, monkeypatch):
    said = iter([["no red", "blue"], ["Yes"]])  # two batches
    gqa = BENCHES["gqa"]._replace(say=lambda *_: next(said))
    monkeypatch.setitem(BENCHES, "gqa", gqa)
    scores = json.loads(run("bench=gqa", "batch_size=2")[1][-1])["scores"]["testdev"]
    assert scores == {"n": 3, "official": 0.6667, "strict": 0.3333}


@pytest.fixture
def asked(monkeypatch):
    """What is asked; the model is replaced by one that says it backwards."""
    texts = []

    def say(model, items, wording, official):
        texts.extend(item.text for item in items)
        return [item.text[::-1] for item in items]

    monkeypatch.setitem(BENCHES, "gqa", BENCHES["gqa"]._replace(say=say))
    return texts


def test_the_file_of_answers_tells_what_was_asked(run, asked, tmp_path):
    path = tmp_path / "answers.jsonl"
    run("bench=gqa", f"out={path}", "n=1")
    head, line = map(json.loads, path.read_text("utf-8").splitlines())
    text = "What color is the Circle?"
    assert line == {"item": 0, "image": "gqa_images/n1.jpg", "text": text, "answer": text[::-1]}
    assert head.items() >= {"bench": "gqa", "split": "", "official": False, "n": 1}.items()


def test_a_run_that_was_cut_goes_on_where_it_stopped(run, asked, tmp_path):
    path = tmp_path / "answers.jsonl"
    command = ("bench=gqa", "batch_size=1", f"out={path}")
    result, whole = run(*command)[1][-1], path.read_bytes()
    texts = asked[:]
    assert len(texts) == 3
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for size in (0, 9, ends[0], ends[1], ends[1] + 5, ends[2], len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        asked.clear()
        assert run(*command)[1][-1] == result and path.read_bytes() == whole
        assert asked == texts[max(0, sum(end <= size for end in ends) - 1) :]


def test_answers_are_in_the_file_before_the_next_are_asked_for(run, asked, monkeypatch, tmp_path):
    path, say, lines = tmp_path / "answers.jsonl", BENCHES["gqa"].say, []

    def looks(*arguments):
        lines.append(path.read_bytes().count(b"\n"))
        return say(*arguments)

    monkeypatch.setitem(BENCHES, "gqa", BENCHES["gqa"]._replace(say=looks))
    run("bench=gqa", "batch_size=2", f"out={path}")
    assert lines == [1, 3]


@pytest.mark.parametrize(
    "change", ["official=1", "n=2", "split=testdev", "model", "truth", "picture"]
)
def test_answers_of_another_run_are_refused(run, asked, change, tmp_path, data, model):
    path = tmp_path / "answers.jsonl"
    run("bench=gqa", "n=1", f"out={path}")
    before = path.read_bytes()
    if change == "model":
        weight = model.phi.layers[0].input_layernorm.weight
        with torch.no_grad():
            weight[0] += 1
    words = {"truth": ('"red"', '"crimson"'), "picture": ('"n1.jpg"', '"2.jpg"')}
    if change in words:
        file = data / "gqa/testdev_balanced_questions.json"
        file.write_text(file.read_text().replace(*words[change]))
    code, _, err = run("bench=gqa", "n=1", f"out={path}", *[change] * ("=" in change))
    if change == "model":
        with torch.no_grad():
            weight[0] -= 1
    assert code == 2 and "not of this run" in err and path.read_bytes() == before


@pytest.mark.parametrize("content", [b"my notes", b"my notes\nof today\n"])
def test_a_file_of_something_else_is_left_alone(run, asked, content, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    code, _, err = run("bench=gqa", f"out={path}")
    assert code == 2 and "not of this run" in err and path.read_bytes() == content


def test_a_damaged_file_of_answers_is_refused(run, asked, tmp_path):
    path = tmp_path / "answers.jsonl"
    run("bench=gqa", f"out={path}")
    head, *lines = path.read_bytes().splitlines(keepends=True)
    for damaged in ([b"{\n", *lines[1:]], [lines[0], *lines], lines[1:]):
        path.write_bytes(head + b"".join(damaged))
        code, _, err = run("bench=gqa", f"out={path}")
        assert code == 2 and "is damaged" in err and err.count("\n") == 1


# ---- mistakes ----
def test_missing_pictures_are_named_before_anything_is_asked(run, data):
    entries = [{"image": f"{n}.jpg", "question": "?", "answer": "a"} for n in range(7)]
    write(data / "gqa/testdev_balanced_questions.json", entries)  # of which 2.jpg is there
    code, out, err = run("bench=gqa")
    assert code == 2 and not out and err.count("\n") == 1
    assert "6 pictures are missing; the first: " in err and "4.jpg" in err and "5.jpg" in err
    assert "6.jpg" not in err and "2.jpg" not in err


@pytest.mark.parametrize("name", ["../../../x.png", "../../../data-2/x.png"])
def test_pictures_elsewhere_are_refused(run, data, name):
    """Also where they exist: what a data file says must not choose among all of a disk."""
    write(data / "gqa/testdev_balanced_questions.json",
          [{"image": name, "question": "?", "answer": "a"}])  # fmt: skip
    draw(data / "gqa/gqa_images" / name)
    code, out, err = run("bench=gqa")
    assert code == 2 and not out and "x.png is not under" in err


def test_pictures_may_be_links_to_another_disk(data, tmp_path):
    (data / "gqa/gqa_images").rename(tmp_path / "disk")
    (data / "gqa/gqa_images").symlink_to(tmp_path / "disk")
    assert len(items_of(data, "gqa")) == 3


def test_a_picture_that_cannot_be_read_is_an_error(run, data):
    (data / "gqa/gqa_images/2.jpg").write_bytes(b"no picture")
    code, _, err = run("bench=gqa", "batch_size=1")
    assert code == 2 and "2.jpg" in err


@pytest.mark.parametrize("bench, file, content", [
    ("gqa", "gqa/testdev_balanced_questions.json", [{"image": "2.jpg", "question": "a"}]),
    ("gqa", "gqa/testdev_balanced_questions.json",
     [{"image": "2.jpg", "question": "a", "answer": None}]),
    ("gqa", "gqa/testdev_balanced_questions.json",
     [{"image": "2.jpg", "question": None, "answer": "a"}]),
    ("iconqa", "iconvqa/choose_text_val.json",
     [{"image_id": 9, "question": "?", "choices": ["a", "b"], "answer": 2}]),
    ("okvqa", "okvqa/mscoco_val2014_annotations_clean.json", {"annotations": []}),
    ("okvqa", "okvqa/mscoco_val2014_annotations_clean.json",
     {"annotations": [{"question_id": n, "answers": []} for n in (55, 125)]}),
])  # fmt: skip
def test_files_unlike_the_official_ones_are_told(run, data, bench, file, content):
    write(data / file, content)
    code, _, err = run(f"bench={bench}")
    assert code == 2 and f"{bench}: the files are not like the official ones" in err


def test_bad_lines_and_empty_files_are_told(run, data):
    path = data / "hateful_meme/dev.jsonl"
    path.write_text(path.read_text("utf-8") + "\n{cut", "utf-8")
    assert "line 3: not JSON" in run("bench=hm")[2]
    path.write_text("")
    assert "dev of hm has no items" in run("bench=hm")[2]
    references(data / "refcocog", "refs(umd).p", ["val"])  # and none of the split "test"
    assert "test of refcocog has no items" in run("bench=refcocog")[2]


@pytest.mark.parametrize("arguments, complaint", [
    (["bench=gqa", "split=val"], "gqa has testdev"),
    (["bench=refcocog", "split=testA"], "refcocog has val, test"),
    (["bench=gqa", "data="], "needs data=DIR"), (["bench=gqa", "n=-1"], "n is 0"),
    (["bench=gqa", "batch_size=0"], "batch_size 1 or more"), (["bench=gqa", "seed=1"], "no such"),
    (["bench=gqa", "official=2"], "1 or 0"), (["bench=gqa", "device=cuda"], "no GPU"),
    (["bench=gqa", "device=gpu"], "device=gpu: torch can't compute"),
    (["bench=gpa"], "jsonl, gqa, vsr, iconqa"), (["bench=gqa"], "is not in somewhere"),
])  # fmt: skip
def test_mistakes_end_in_one_line(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = evaluate.main(["data=somewhere", *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and complaint in err


def test_only_stage_4_is_asked(run, model, monkeypatch):
    monkeypatch.setattr(model.config, "stage", 3)
    code, _, err = run("bench=gqa")
    assert code == 2 and "stage 3" in err
