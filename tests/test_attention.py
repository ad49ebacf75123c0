"""Attention from words through queries to the picture: its numbers, its place, its pictures."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from torch.testing import assert_close

import generate as cli
from data import IMAGE_TOKEN_ID, Tokenizer, encode_prompt, inference_prompt, load_image
from experiments import attention as measured
from experiments import pictures
from generate import answer, encode_images
from miniature import world

ROOT = Path(__file__).parents[1]
CAPTION = inference_prompt("caption", "", 4)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "tests" / "golden" / "tokenizer_files")


# ---- words and their attention ----
@pytest.mark.parametrize("text", [
    "a large red solid star, and", "  two  spaces\nand a line ", "日本語 한국 é🙂 x", "",
    "<p>a star</p> {<11><46>}<delim>{<1><2>}",
])  # fmt: skip
def test_words_are_whole(tokenizer, text):
    ids = tokenizer.encode(text)
    words = pictures.words_of(ids, tokenizer)
    assert [word for word, _ in words] == text.split()
    for word, tokens in words:
        spelled = b"".join(tokenizer.token_bytes(ids[token]) for token in tokens)
        assert spelled.strip() == word.encode() and tokens == sorted(set(tokens))


def test_attention_is_that_of_the_predicting_tokens(miniature):
    """Against the whole maps, from which the right rows and columns are taken one by one."""
    image = load_image(ROOT / "assets" / "two.png")
    embeds = encode_images(miniature, [image])
    text = "a small orange solid square"
    words, got = pictures.answer_attention(miniature, embeds, CAPTION, text)
    tokenizer, maps = miniature.tokenizer, []
    prompt = [tokenizer.bos_token_id, *encode_prompt(CAPTION, tokenizer, 32, 1)]
    row = prompt + tokenizer.encode(text)
    with torch.no_grad():
        inputs_embeds = miniature.phi.embed(torch.tensor([row]), embeds)
        miniature.phi(inputs_embeds, maps=maps)
    places = [place for place, token in enumerate(row) if token == IMAGE_TOKEN_ID]
    assert got.shape == (6, 6, len(row) - len(prompt), 32) and len(words) == 5
    for layer, whole in enumerate(maps):
        for n, at in enumerate(range(len(prompt), len(row))):
            assert_close(got[layer, :, n], whole[0, :, at - 1, places])
    assert got.sum(dim=-1).max() < 1 + 1e-5


def test_an_answer_that_fills_all_positions_can_be_drawn(miniature):
    embeds = encode_images(miniature, [load_image(ROOT / "assets" / "two.png")])
    positions = miniature.phi.config.max_position_embeddings
    prompt = 1 + len(encode_prompt(CAPTION, miniature.tokenizer, 32, 1))
    text = "{" * (positions - prompt + 1)  # a token each; the last one is never fed
    assert len(miniature.tokenizer.encode(text)) == len(text)
    _, attention = pictures.answer_attention(miniature, embeds, CAPTION, text)
    assert attention.shape[2] == len(text)


def test_heat_is_its_plain_definition():
    torch.manual_seed(0)
    attention, looks = torch.rand(2, 3, 4, 5), torch.rand(5, 2, 2)
    words = [("one", [0]), ("two", [1, 2, 3])]
    heat = pictures.word_heat(pictures.token_weights(attention), words, looks)
    for n, (_, tokens) in enumerate(words):
        expected = torch.zeros(2, 2)
        for layer in attention:
            for head in layer:
                for token in tokens:
                    for query in range(5):
                        weight = head[token, query] ** 2 / (6 * len(tokens))
                        expected += weight * looks[query]
        assert_close(heat[n], expected)


def test_looks_leave_the_class_token_out_and_go_row_by_row():
    attention_map = torch.zeros(2, 3, 10)  # heads, queries, class token and 3 x 3 patches
    attention_map[:, 0, 0] = 1
    attention_map[0, 1, 1 + 5] = attention_map[1, 1, 1 + 6] = 1
    looks = pictures.query_looks(attention_map)
    assert looks.shape == (3, 3, 3) and looks[0].sum() == 0
    assert looks[1].tolist() == [[0, 0, 0], [0, 0, 0.5], [0.5, 0, 0]]


# ---- the place of heat in the picture ----
def test_heat_lies_where_its_patch_is():
    """On pictures of any shape, smoothly: most in the middle of the patch, none further away."""
    for width, height in ((160, 160), (160, 40), (30, 160)):
        heat = torch.zeros(4, 4)
        heat[1, 3] = 0.001  # how strong it is does not matter
        shown = pictures.overlay(Image.new("RGB", (width, height), "white"), heat)
        _, _, blue = shown.split()
        values = torch.tensor(list(blue.tobytes())).view(height, width)
        patch = torch.zeros(height, width, dtype=torch.bool)
        patch[height // 4 : height // 2, width * 3 // 4 :] = True
        around = torch.zeros(height, width, dtype=torch.bool)
        around[height // 8 : height * 5 // 8, width * 5 // 8 :] = True
        assert patch.flatten()[values.argmin()] and values.min() < 30
        assert (values[~around] == 255).all() and values[patch].float().mean() < 140
        assert len(values.unique()) > 15  # no steps
    nothing = pictures.overlay(Image.new("RGB", (9, 9), "white"), torch.zeros(4, 4))
    assert nothing.getcolors() == [(81, (255, 255, 255))]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The same circle in files of several shapes, each with its box in parts of the picture."""
    folder = tmp_path_factory.mktemp("drawn")
    canvas = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(canvas).ellipse((30, 150, 130, 250), (220, 20, 30))
    padded = Image.new("RGB", (420, 300), "white")
    padded.paste(canvas, (120, 0))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    padded.rotate(90, expand=True).save(folder / "turned.jpg", exif=turned, quality=95)
    padded.save(folder / "padded.png")
    canvas.resize((90, 140)).save(folder / "resized.png")
    box = (30 / 300, 150 / 300, 130 / 300, 250 / 300)
    wide = (150 / 420, 150 / 300, 250 / 420, 250 / 300)
    return {"resized.png": box, "padded.png": wide, "turned.jpg": wide}, folder


def test_words_look_at_what_they_name_in_pictures_of_any_shape(miniature, drawn):
    boxes, folder = drawn
    for name, box in boxes.items():
        image, maps = load_image(folder / name), []
        embeds = encode_images(miniature, [image], maps)
        (said,) = answer(miniature, embeds, [CAPTION])
        assert "red solid" in said, name  # a squashed circle may not be called one
        words, attention = pictures.answer_attention(miniature, embeds, CAPTION, said)
        looks = pictures.query_looks(maps[-1][0])
        heats = pictures.word_heat(pictures.token_weights(attention), words, looks)
        for (word, _), heat in zip(words[1:], heats[1:]):
            share, hottest, chance = measured.inside(heat, box).tolist()
            assert share > 3 * chance and hottest > 0.4, (name, word, share)


# ---- the measured share ----
def test_coverage_is_the_part_inside():
    box = (0.3, 0.1, 0.8, 0.55)
    fine = torch.zeros(400, 400)
    fine[40:220, 120:320] = 1
    expected = fine.view(4, 100, 4, 100).mean(dim=(1, 3))
    assert_close(measured.coverage(box, 4), expected)
    assert measured.coverage((0.0, 0.0, 1.0, 1.0), 3).sum() == 9
    heat = torch.zeros(4, 4)
    heat[1, 1], heat[3, 3] = 3, 1
    share, hottest, chance = measured.inside(heat, box).tolist()
    assert (share, hottest) == (pytest.approx(0.6), pytest.approx(0.8))  # 0.8 of patch 1, 1
    assert chance == pytest.approx(0.5 * 0.45)


def test_named_words_are_those_of_objects_that_are_there():
    scene = next(scene for seed in range(99)
                 if len((scene := world.sample_scene(seed, "test")).objects) == 2)  # fmt: skip
    first, second = (world.a_noun(world.describe(obj)) for obj in scene.objects)
    other = "a small red solid circle"
    assert other not in (first, second)
    words = [(word, []) for word in f"{second}, {other} and {first}".split()]
    boxes = [obj.box for obj in scene.objects]
    expected = [(n, boxes[1]) for n in (1, 2, 3, 4)] + [(n, boxes[0]) for n in (12, 13, 14, 15)]
    assert list(measured.named(words, scene)) == expected


def test_words_and_queries_look_at_their_objects():
    """The figures of experiments/attention.py on fewer scenes; chance would be equal shares."""
    result = measured.measure(measured.Config(n=6, seed=4))
    for kind, times in (("caption", 3), ("refer", 3), ("queries", 5)):
        part = result[kind]
        assert part["share"] > times * part["chance"] and part["hottest"] > 0.5, (kind, part)
    assert result["queries"]["looks"] % 8 == 0 and result["caption"]["looks"] % 4 == 0
    assert result["refer"]["looks"] == 6


@pytest.mark.slow
def test_100_scenes_give_what_the_results_say():
    result, kept = measured.measure(measured.Config()), json.loads(measured.RESULT.read_text())
    assert result["n"] == kept["n"] == 100 and result["seed"] == kept["seed"]
    for kind in ("caption", "refer", "queries"):
        assert result[kind]["share"] > 3 * result[kind]["chance"]
        assert result[kind] == pytest.approx(kept[kind], abs=1e-3)
    assert result["share_by_choice"] == pytest.approx(kept["share_by_choice"], abs=1e-3)


# ---- the command line ----
@pytest.fixture
def run(capsys, miniature, monkeypatch):
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: miniature)

    def run_(*argv):
        code = cli.main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run_


def tiles(monkeypatch):
    """What goes into the grids that are drawn from now on."""
    drawn, original = [], pictures.page_of
    monkeypatch.setattr(pictures, "page_of",
                        lambda tiles, title: drawn.append(tiles) or original(tiles, title))
    return drawn


def test_attn(run, monkeypatch, tmp_path):
    """A tile for the picture and one a word, or one a query; the answer is as without."""
    drawn, out = tiles(monkeypatch), tmp_path / "out.png"
    two = ROOT / "assets" / "two.png"
    said = run("--img", two)
    assert run("--img", two, "--attn", out) == said == (0, said[1], [])
    assert [label for _, label, _ in drawn[0]] == ["", *said[1].split()]
    assert drawn[0][0][2] is None and all(0 < share < 1 for *_, share in drawn[0][1:])
    assert out.stat().st_size < 200_000 and Image.open(out).width > 600
    assert run("--img", two, "--attn", out, "--attn-queries") == said
    labels = [re.fullmatch(r"(\d+): (\S+)", label) for _, label, _ in drawn[1]]
    assert [int(label[1]) for label in labels] == list(range(32))
    # query k was made to know word k of "small orange solid square ... large purple ..."
    for query, word in ((1, "orange"), (3, "square"), (9, "purple"), (11, "diamond")):
        assert labels[query][2] == word


def test_attn_of_several_pictures_and_tasks(run, monkeypatch, tmp_path):
    drawn, (two, moon) = tiles(monkeypatch), (ROOT / "assets" / f"{n}.png" for n in ("two", "moon"))
    files = "--attn", tmp_path / "out.jpg", "--draw", tmp_path / "boxes.png"
    code, out, err = run("--img", two, moon, *files, "--task", "grounding", "--json")
    assert (code, err, out.count("\n")) == (0, [], 2)
    written = {"boxes-1.png", "boxes-2.png", "out-1.jpg", "out-2.jpg"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert [label for _, label, _ in drawn[1]][1:6] == "a large yellow solid moon".split()
    run("--img", moon, "--task", "grounding", *files)
    for (tile, *_, share), (alone, *_, share_alone) in zip(drawn[1][1:], drawn[2][1:]):
        assert share == pytest.approx(share_alone, abs=1e-4)
        difference = ImageChops.difference(tile, alone)  # of rounding in a batch
        assert max(high for _, high in difference.getextrema()) < 8


@pytest.mark.parametrize("size", [(400, 1), (1, 400)])
def test_attn_of_a_thread(run, tmp_path, size):
    Image.new("RGB", size, "white").save(tmp_path / "thread.png")
    code, _, err = run("--img", tmp_path / "thread.png", "--attn", tmp_path / "out.png")
    assert (code, err) == (0, []) and (tmp_path / "out.png").exists()


def test_attn_of_an_empty_answer(run, monkeypatch, tmp_path):
    monkeypatch.setitem(cli.STAGES, 4, cli.STAGES[4]._replace(end_sym="a"))
    out = tmp_path / "out.png"
    code, text, err = run("--img", ROOT / "assets" / "two.png", "--attn", out)
    assert (code, text) == (0, "\n")
    assert err == [f"note: the answer is empty; {out} is not written"] and not out.exists()


@pytest.mark.parametrize("size", [(160, 160), (160, 1), (1, 160)])
def test_grid_is_tidy(size):
    """Every tile in its place; bars as long as their share; labels that are too long are cut."""
    colors = [(0, 0, number) for number in range(100, 110)]
    parts = [(Image.new("RGB", size, color), "word" * 50, share)
             for color, share in zip(colors, (None, 0.25, 0.5, *[1.0] * 7))]  # fmt: skip
    page = pictures.page_of(parts, "title")
    counts = {color: number for number, color in page.getcolors(maxcolors=10**6)}
    if min(size) > 2:  # else nothing is seen but the frame
        assert all(counts[color] == (size[0] - 2) * (size[1] - 2) for color in colors)
    assert counts[(193, 18, 31)] == pytest.approx(8 * 83 * 7.75, rel=0.02)
    assert counts[(255, 255, 255)] > 0.3 * page.width * page.height
    right, bottom = page.width - 1, page.height - 1
    assert page.getpixel((right, bottom)) == page.getpixel((right, 0)) == (255, 255, 255)
    few = pictures.page_of(parts[:1], "title" * 30)
    assert few.width > 700  # the title decides
