"""Evaluation: right answers count, nearly right ones do not, and every answer meets its record."""

import json
import random
from collections import Counter

import pytest
import torch
from PIL import Image

from data import END_OF_TEXT, Tokenizer, byte_names, inference_prompt, load_image, make_sample
from data import read_records
from experiments import evaluate
from experiments.scores import iou, metrics, num_matched, objects, only_boxes, score
from generate import answer
from miniature import world
from model import ModelConfig, TinyGPTV

SIZE = (200, 100)  # of the pictures below: a hundredth is 2 pixels wide and 1 high
TWO = "a large red solid circle and a small blue outlined star"


def counts(record: dict, said: str) -> dict:
    return {name: (hits, chances) for name, hits, chances in score(record, said, SIZE)}


@pytest.mark.parametrize("said, matched, chances, exact", [
    (TWO, 4, 4, 1),
    ("a small blue outlined star, a large red solid circle", 4, 4, 1),  # the order is free
    ("A large red solid circle and a small blue outlined star.", 4, 4, 1),
    ("a small red solid circle and a small blue outlined star", 2, 4, 0),  # wrong size
    ("a large red outlined circle and a small blue outlined star", 2, 4, 0),  # wrong fill
    ("a large red solid circle", 2, 3, 0),  # one missing
    (TWO + " and a small blue outlined star", 4, 5, 0),  # one twice
    (TWO + " and a dog", 4, 5, 0),  # more than there is
    (TWO + " on a table", 2, 4, 0),  # extra words spoil their object
    ("a red circle and a blue star", 0, 4, 0),  # too little said
    ("red solid large circle, small blue outlined star", 0, 4, 0),
    ("The picture shows two objects. A large red solid circle is at the top left. "
     "A small blue outlined star is in the center.", 4, 4, 1),
    ("The picture shows two objects. A large red solid circle is at the top left. "
     "A small blue outlined star is in the garden.", 2, 4, 0),
    ("", 0, 2, 0),
])  # fmt: skip
def test_captions_count_objects_with_all_attributes(said, matched, chances, exact):
    record = {"task": "caption", "caption": TWO}
    assert counts(record, said) == {"caption_f1": (matched, chances), "caption_exact": (exact, 1)}


def test_caption_outside_the_world_counts_by_wording():
    record = {"task": "caption", "caption": "A dog on a sofa."}
    assert counts(record, "a dog  on a sofa") == {"caption_exact": (1, 1)}
    assert counts(record, "a dog on the sofa") == {"caption_exact": (0, 1)}


def test_vqa_is_exact_after_normalising_and_goes_by_kind():
    record = {"task": "vqa", "answers": ["top left", "upper left"], "kind": "where"}
    for said, right in (("Top left.", 1), ("upper left", 1), ("left", 0), ("top left corner", 0)):
        assert counts(record, said) == {"vqa where": (right, 1)}
    del record["kind"]
    assert counts(record, "") == {"vqa other": (0, 1)}


@pytest.mark.parametrize("said, right", [
    ("{<10><20><50><60>}", 1), (" { <10> <20> <50> <60> } ", 1),
    ("{<10><20><50><40>}", 1),  # IoU 0.5
    ("{<10><20><50><39>}", 0),  # IoU 0.475
    ("{<24><20><64><60>}", 0),  # shifted: IoU 0.48
    ("{<10><20><50><60>}<delim>{<10><20><50><60>}", 0),  # one too many
    ("the star {<10><20><50><60>}", 0), ("{<10><20><50><60>} {<1>", 0),
    ("<10><20><50><60>", 0), ("{<20><20><100><60>}", 0), ("", 0),
])  # fmt: skip
def test_refer_needs_one_good_box_and_nothing_else(said, right):
    record = {"task": "refer", "phrase": "the star", "boxes": [[20, 20, 100, 60]]}
    assert counts(record, said) == {"refer_iou50": (right, 1)}


def test_identify_needs_the_whole_phrase():
    record = {"task": "identify", "phrase": "a large red solid star", "boxes": [[0, 0, 9, 9]]}
    for said, right in (("a large red solid star", 1), ("a small red solid star", 0),
                        ("a red star", 0), ("a large red solid star and a dog", 0)):  # fmt: skip
        assert counts(record, said) == {"identify": (right, 1)}


@pytest.mark.parametrize("said, matched, chances", [
    ("<p>stars</p> {<10><20><50><60>}<delim>{<60><0><90><30>}", 4, 4),
    ("<p>stars</p> {<60><0><90><30>}<delim>{<10><20><50><60>}", 4, 4),
    ("<p>stars</p> {<10><20><50><60>}", 2, 3),
    ("<p>stars</p> {<10><20><50><60>}<delim>{<11><20><50><60>}", 2, 4),  # one box found twice
    ("<p>stars</p> {<10><20><50><60>}<delim>{<60><0><90>}", 2, 4),  # malformed
    ("<p>stars</p>", 0, 2),
])  # fmt: skip
def test_detection_matches_boxes_one_to_one(said, matched, chances):
    record = {"task": "detection", "boxes": [[20, 20, 100, 60], [120, 0, 180, 30]]}
    assert counts(record, said) == {"detection_f1": (matched, chances)}


@pytest.mark.parametrize("said, matched, chances", [
    ("<p>a star</p> {<10><20><50><60>} and <p>a moon</p> {<60><0><90><30>}", 4, 4),
    ("<p>a moon</p> {<61><0><91><30>}, <p>a star</p> {<10><20><50><60>}", 4, 4),
    ("<p>a moon</p> {<10><20><50><60>} and <p>a star</p> {<60><0><90><30>}", 0, 4),  # swapped
    ("<p>a star</p> {<10><20><50><60>} and <p>a moon</p> {<75><0><99><30>}", 2, 4),
    ("<p>a star</p> {<10><20><50><60>} and <p>a moon</p>", 2, 4),  # no box
    ("<p>a star</p> {<10><20><50><60>} and <p>a moon</p> {<1>", 2, 4),
    ("{<10><20><50><60>}", 0, 3),  # no phrase
])  # fmt: skip
def test_grounding_needs_phrase_and_box(said, matched, chances):
    true = "<p>a star</p> {<10><20><50><60>} and <p>a moon</p> {<60><0><90><30>}"
    record = {"task": "grounding", "caption": true}
    assert counts(record, said) == {"grounding_f1": (matched, chances)}


def test_boxes_by_hand():
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    assert only_boxes("{<1><2><3><4>}<delim>{<5><6><7><8>}") == [(1, 2, 3, 4), (5, 6, 7, 8)]
    near, nearer = ((0, 0, 10, 8), ""), ((0, 0, 10, 10), "")
    assert num_matched([near, nearer], [((0, 0, 10, 10), "")]) == 1
    assert num_matched([near, nearer], [nearer, ((0, 0, 10, 5), "")]) == 2  # 0.625 and 1


@pytest.mark.parametrize("split", ["test", "held"])
def test_right_answers_score_one_in_every_metric(split):
    hits, chances = Counter(), Counter()
    for _, records in evaluate.world_pictures(12, 7, split):
        for record in (r for r in records if r["task"] != "detail"):
            [(_, said)] = make_sample(record, 4, random.Random(0), (224, 224))
            for name, hit, chance in score(record, said, (224, 224)):
                hits[name] += hit
                chances[name] += chance
    result = metrics(hits, chances)
    assert {*result.pop("vqa").values(), *result.values()} == {1.0}


def test_the_words_of_stage_3_score_like_those_of_a_caption():
    for seed in range(20):
        scene = world.sample_scene(seed, "test")
        said, other = objects(world.detail_record(scene)["caption"])
        assert (said, other) == objects(world.caption_record(scene)["caption"]) and not other


def test_scenes_follow_from_seed_and_split():
    def first(*arguments):
        [(image, records)] = evaluate.world_pictures(1, *arguments)
        return image.tobytes(), str(records)

    assert first(1, "test") == first(1, "test")
    assert len({first(1, "test"), first(2, "test"), first(1, "held")}) == 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A miniature that has learned nothing, with bytes as its vocabulary."""
    folder = tmp_path_factory.mktemp("bytes")
    vocab = {name: n for n, name in enumerate(byte_names().values())} | {END_OF_TEXT: 256}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    torch.manual_seed(0)
    model = TinyGPTV(ModelConfig.preset("mini", 4)).eval()
    for parameter in model.phi.parameters():  # so that answers differ from picture to picture
        parameter.data *= 1.5
    model.tokenizer = Tokenizer(folder)
    return model


@pytest.mark.filterwarnings("ignore:1 of 1 answers cut")
def test_pictures_encoded_once_are_answered_as_generate_does(model):
    images = [image for image, _ in evaluate.world_pictures(3, 1, "test")]
    image_embeds = evaluate.encode_images(model, images)
    places = [2, 0, 1, 2]
    prompts = [inference_prompt("vqa", f"what {'color ' * n}is it?", 4) for n in range(4)]
    said = evaluate.ask(model, image_embeds[places], prompts, max_new_tokens=8)
    alone = [answer(model, [images[place]], [prompt], max_new_tokens=8)[0]
             for place, prompt in zip(places, prompts)]  # fmt: skip
    assert said == [(text, True) for text in alone]


def test_each_answer_meets_its_own_record_and_picture(model, monkeypatch):
    """The model is replaced by one that finds the right answer by picture and prompt."""
    pictures = list(evaluate.world_pictures(5, 3, "test"))
    right = {}
    for place, (image, records) in enumerate(pictures):
        for record in (r for r in records if r["task"] != "detail"):
            prompt = evaluate.prompt_for(record, image.size, 4)
            right[place, prompt] = make_sample(record, 4, random.Random(0), image.size)[0][1]

    def encode_images(_, images):
        assert len(images) <= 4
        files = [image.tobytes() for image, _ in pictures]
        return torch.tensor([files.index(image.tobytes()) for image in images])

    def ask(_, image_embeds, prompts, max_new_tokens):
        assert len(prompts) <= 4
        return [(right[key], False) for key in zip(image_embeds.tolist(), prompts)]

    monkeypatch.setattr(evaluate, "encode_images", encode_images)
    monkeypatch.setattr(evaluate, "ask", ask)
    found = list(evaluate.score_pictures(model, pictures, evaluate.Config(batch_size=4)))
    assert all(hits == chances for name, hits, chances in found if not name.startswith("cut"))
    assert sum(name.startswith("cut") for name, _, _ in found) == len(right)


def test_blind_hides_every_picture(model, monkeypatch):
    def encode_images(_, images):
        assert [image.getcolors() for image in images] == [[(224 * 224, (128, 128, 128))]] * 2
        raise ZeroDivisionError  # seen enough

    monkeypatch.setattr(evaluate, "encode_images", encode_images)
    with pytest.raises(ZeroDivisionError):
        pictures = list(evaluate.world_pictures(2, 1, "test"))
        list(evaluate.score_pictures(model, pictures, evaluate.Config(blind=True)))


def test_the_foreign_pictures_have_what_the_readme_says():
    records = read_records(evaluate.ROOT / "experiments" / "foreign" / "records.jsonl")
    assert len({record["image"] for record in records}) == 48
    named, other = Counter(), Counter()
    for record in records:
        assert evaluate.prompt_for(record, load_image(record["image"]).size, 4)
        if record["task"] == "caption":
            said = objects(record["caption"])
            named, other = named + said[0], other + said[1]
    pairs = Counter(tuple(phrase.split()[::-2]) for phrase in named.elements())
    assert not other and named.total() == 120 and not pairs.keys() & world.HELD_OUT


def write_records(folder, records):
    Image.new("RGB", (60, 40), "white").save(folder / "a.png")
    lines = [json.dumps({"image": "a.png", **record}) for record in records]
    (folder / "mine.jsonl").write_text("\n".join(lines), "utf-8")
    return f"data={folder / 'mine.jsonl'}"


@pytest.fixture
def run(model, monkeypatch, tmp_path, capsys):
    """Runs the command line; returns the exit code, stdout's lines and stderr."""
    monkeypatch.setattr(evaluate.TinyGPTV, "from_pretrained", lambda *_: model)
    monkeypatch.setattr(evaluate, "TASKS", dict.fromkeys(evaluate.TASKS, 2))
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results")

    def run(*arguments):
        code = evaluate.main(list(arguments))
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_world_prints_and_keeps_one_json(run, tmp_path):
    code, out, _ = run("bench=world", "n=2", "batch_size=8")
    result = json.loads(out[-1])
    assert code == 0
    assert result.items() >= {"n": 2, "seed": 1, "split": "test", "stage": 4, "blind": 0}.items()
    assert list(result["vqa"]) == [*world.VQA_KINDS, "mean"]
    assert result["questions"].keys() == evaluate.TASKS.keys()
    assert result["answers_cut"] == sum(result["questions"].values())
    kept = tmp_path / "results" / "world_test_stage4_n-2.json"  # not that of 500 scenes
    assert json.loads(kept.read_text("utf-8")) == result
    assert str(tmp_path) not in kept.read_text("utf-8")


def test_stages_that_only_describe_leave_the_rest_null(run, model, monkeypatch):
    for stage in (1, 3):
        monkeypatch.setattr(model.config, "stage", stage)
        result = json.loads(run("bench=world", "n=2", "split=held", "blind=1")[1][-1])
        assert result["caption_f1"] == 0 and result["questions"] == {"caption": 2}
        assert {*result["vqa"].values(), result["refer_iou50"], result["identify"],
                result["detection_f1"], result["grounding_f1"]} == {None}  # fmt: skip


def test_jsonl_scores_what_it_can_and_tells_what_not(run, tmp_path):
    boxes = {"phrase": "the star", "boxes": [[1, 2, 30, 40]]}
    data = write_records(tmp_path, [
        {"task": "vqa", "question": "is it white?", "answers": ["yes"]},
        {"task": "refer", **boxes}, {"task": "refer", **boxes}, {"task": "identify", **boxes},
        {"task": "identify", "phrase": "stars", "boxes": boxes["boxes"] * 2},
        {"task": "caption", "caption": "nothing at all"},
        {"task": "chat", "turns": [["hello?", "hello"]]},
    ])  # fmt: skip
    code, out, _ = run("bench=jsonl", data)
    result = json.loads(out[-1])
    assert code == 0 and result["data"] == "mine.jsonl" and result["n"] == 1
    assert result["questions"] == {"caption": 1, "vqa": 1, "refer": 2, "identify": 1}
    assert result["not_asked"] == {"identify": 1, "chat": 1}
    assert (result["vqa"]["other"], result["vqa"]["mean"], result["caption_exact"]) == (0, 0, 0)
    assert result["caption_f1"] is None and result["detection_f1"] is None


@pytest.mark.parametrize("arguments, complaint", [
    (["bench=world", "sede=2"], "did you mean seed=...?"),
    (["bench=world", "--n", "5"], "did you mean n=...?"),
    (["bench=world", "n=many"], "is not of type int"),
    (["bench=world", "n=0"], "n=0"),
    (["bench=wrld"], "choose from world, jsonl"),
    ([], "choose from world, jsonl"),
    (["bench=world", "split=tset"], "choose from train, val, test, held"),
    (["bench=world", "data=a.jsonl"], "only bench=jsonl takes data="),
    (["bench=jsonl", "data=a.jsonl", "n=5"], "only bench=world takes n="),
    (["bench=jsonl"], "needs data=FILE"),
    (["bench=jsonl", "data=missing.jsonl"], "missing.jsonl"),
    (["bench=world", "stage=5"], "stage 1 to 4"),
    (["bench=world", "device=gpu"], "device=gpu: torch can't compute on that here; say cpu"),
    (["bench=world", "device=meta"], "can't compute on that"),
    (["bench=world", "device=hpu"], "can't compute on that"),
])
def test_mistakes_end_in_one_line(run, arguments, complaint):
    code, out, err = run(*arguments)
    assert code == 2 and not out and err.count("\n") == 1 and complaint in err


def test_the_model_goes_to_the_device(model, run, monkeypatch):
    def from_pretrained(weights, stage, device):
        raise ValueError(f"on {device}")

    monkeypatch.setattr(evaluate, "check_device", lambda device: None)
    monkeypatch.setattr(evaluate.TinyGPTV, "from_pretrained", from_pretrained)
    assert "on cuda:1" in run("bench=world", "device=cuda:1")[2]


def test_records_that_cannot_be_scored_are_told(run, tmp_path):
    data = write_records(tmp_path, [{"task": "chat", "turns": [["hello?", "hello"]]}])
    assert "not scored on such records" in run("bench=jsonl", data)[2]
    boxes = {"task": "refer", "phrase": "the star", "boxes": [[1, 2, 300, 40]]}
    code, _, err = run("bench=jsonl", write_records(tmp_path, [boxes]))
    assert code == 2 and "a.png" in err and "lies outside the picture" in err
