"""Sampling, stopping, the decoding loop, boxes and the command line of generate.py. Its --attn is
in test_attention.py, its --chat in test_chat.py.

What the official code generates is compared in test_golden.py.
"""

import io
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

import generate as cli
from bridge import ProjectorConfig, QFormerConfig
from data import EXAMPLES, Tokenizer, inference_prompt, parse_boxes
from experiments.pictures import draw_boxes, labelled_boxes
from generate import Answer, Sampling, StreamDecoder, answer, encode_images, generate
from generate import generate_ids, prepare
from model import ModelConfig, PhiConfig, TinyGPTV
from vision import VisionConfig

ROOT = Path(__file__).parents[1]
VOCAB, POSITIONS = 51200, 80
INF = float("inf")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "tests" / "golden" / "tokenizer_files")


@pytest.fixture
def model(tokenizer):
    """Random weights, large enough for answers that differ from prompt to prompt."""
    torch.manual_seed(5)
    config = ModelConfig(
        vision=VisionConfig(28, 14, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8),
        qformer=QFormerConfig(4, 8, 1, 2, intermediate_size=8, vision_hidden_size=8),
        projector=ProjectorConfig(8, 8, 12),
        phi=PhiConfig(VOCAB, 12, 2, 2, intermediate_size=24, max_position_embeddings=POSITIONS),
        lora=None, stage=4,
    )  # fmt: skip
    model = TinyGPTV(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def image():
    image = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(image).ellipse((50, 50, 150, 150), "red")
    return image


PROMPTS = [inference_prompt("vqa", text, 4) for text in ("what is it?", "a", "is there a star?")]


def prepared(model, images, prompts, official=False):
    """`prepare` for prompts about one picture each."""
    return prepare(model, encode_images(model, images), [1] * len(images), prompts, official)


# ---- sampling ----
def plain_top_p(scores, p):
    """By the definition: take the most probable, then the next, until they add up to p."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    total = sum(math.exp(s) for s in scores)
    kept, reached = set(), 0.0
    while reached < p and len(kept) < len(scores):
        kept.add(order[len(kept)])
        reached = sum(math.exp(scores[i]) for i in kept) / total
    return [s if i in kept else -INF for i, s in enumerate(scores)]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_its_plain_definition(p):
    scores = torch.randn(8, 30, generator=torch.Generator().manual_seed(1)) * 2
    expected = torch.tensor([plain_top_p(row, p) for row in scores.tolist()])
    torch.testing.assert_close(cli.keep_top_p(scores, p), expected)


@pytest.mark.parametrize("k", [1, 2, 29, 30, 10**9])
def test_top_k_is_its_plain_definition(k):
    scores = torch.randn(8, 30, generator=torch.Generator().manual_seed(2))
    for row, kept in zip(scores.tolist(), cli.keep_top_k(scores, k).tolist()):
        best = sorted(row)[-k:]
        assert kept == [s if s in best else -INF for s in row]


def test_repetition_penalty_is_its_plain_definition():
    scores = torch.tensor([[2.0, -2.0, 3.0, -3.0], [1.0, 0.0, -1.0, 5.0]])
    history = torch.tensor([[0, 1, 1], [3, 3, 2]])
    expected = torch.tensor([[1.0, -4.0, 3.0, -3.0], [1.0, 0.0, -2.0, 2.5]])
    torch.testing.assert_close(cli.penalize_repetition(scores, history, 2.0), expected)
    nothing = history[:, :0]
    torch.testing.assert_close(cli.penalize_repetition(scores, nothing, 2.0), scores)


@pytest.mark.parametrize("seed", range(5))
def test_processed_scores_are_their_plain_definition(seed):
    """All four settings at once, at random, token by token."""
    rng = torch.Generator().manual_seed(seed)
    temperature, top_k, top_p, penalty = (torch.rand(4, generator=rng) + 0.1).tolist()
    sampling = Sampling(2 * temperature, 1 + int(20 * top_k), min(1, top_p), 2 * penalty)
    scores = torch.randn(4, 30, generator=rng) * 2
    history = torch.randint(30, (4, 6), generator=rng)
    got = cli.process_scores(scores, history, sampling)
    for row, said, processed in zip(scores.tolist(), history.tolist(), got):
        for i in set(said):
            factor = sampling.repetition_penalty
            row[i] = row[i] / factor if row[i] > 0 else row[i] * factor
        row = [score / sampling.temperature for score in row]
        least = sorted(row)[-sampling.top_k]
        row = plain_top_p([score if score >= least else -INF for score in row], sampling.top_p)
        torch.testing.assert_close(processed, torch.tensor(row))


def test_without_a_penalty_nothing_is_looked_up(monkeypatch):
    """The vocabulary is large, and most answers have no penalty."""
    monkeypatch.setattr(cli, "penalize_repetition", lambda *_: pytest.fail("it was"))
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(cli.process_scores(scores, torch.tensor([[1], [2]]), Sampling()), scores)


def test_temperature_is_its_plain_definition():
    """It takes the probabilities to the power 1 / temperature; at 0 nothing is changed."""
    scores = torch.randn(3, 9, generator=torch.Generator().manual_seed(4))
    nothing = torch.empty(3, 0, dtype=torch.long)
    for temperature in (0.3, 1.0, 2.5):
        got = cli.process_scores(scores, nothing, Sampling(temperature)).softmax(dim=-1)
        expected = scores.softmax(dim=-1) ** (1 / temperature)
        torch.testing.assert_close(got, expected / expected.sum(dim=-1, keepdim=True))
    assert torch.equal(cli.process_scores(scores, nothing, Sampling(0.0, 2, 0.1)), scores)


def test_all_of_it_in_order():
    """Penalty, then temperature, then top-k, then top-p of what is left."""
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    sampling = Sampling(temperature=2.0, top_k=2, top_p=0.6, repetition_penalty=4.0)
    got = cli.process_scores(scores, torch.tensor([[0]]), sampling)
    # 4 3 2 1 -> 1 3 2 1 -> .5 1.5 1 .5, the best two are left with .62 and .38 (of all: .43, .26)
    torch.testing.assert_close(got, torch.tensor([[-INF, 1.5, -INF, -INF]]))


@pytest.mark.parametrize("field, values", {
    "temperature": (-1, 0.001, 1e9, math.nan, INF), "top_k": (-1,), "seed": (-1, 2**63),
    "top_p": (0, -0.1, 1.1, math.nan), "repetition_penalty": (0, -1, INF, math.nan),
}.items())  # fmt: skip
def test_ranges(field, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{field} must be .* not {value}"):
            Sampling(**{field: value})


@pytest.mark.parametrize("extreme", [
    Sampling(0.01, 1, 1e-9, 100.0), Sampling(100.0, 10**9, 1.0, 0.01), Sampling(0.01, 0, 1.0, 0.01),
])  # fmt: skip
def test_extremes_still_leave_a_token(model, image, extreme):
    embeds, mask = prepared(model, [image], PROMPTS[:1])
    for ids, scores in generate_ids(model.phi, embeds, mask, 5, extreme, len(model.tokenizer)):
        assert torch.isfinite(scores).any() and torch.isfinite(scores[0, ids])


def test_draws_repeat_with_the_seed_and_follow_the_probabilities(model, image):
    with torch.no_grad():
        model.phi.lm_head.weight.zero_()
        model.phi.lm_head.bias.fill_(-100)
        model.phi.lm_head.bias[:2] = torch.tensor([math.log(0.8), math.log(0.2)])
    embeds, mask = prepared(model, [image], PROMPTS[:1])
    embeds, mask = embeds.expand(100, -1, -1), mask.expand(100, -1)

    def draw(seed):
        return next(generate_ids(model.phi, embeds, mask, 1, Sampling(1.0, seed=seed)))[0]

    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))
    assert abs(draw(3).float().mean() - 0.2) < 0.1  # of 100 draws: 2.5 standard deviations


# ---- text, and the end of an answer ----
def test_streaming_equals_decoding_and_holds_half_characters_back(tokenizer):
    for text in ("a red star###", "  two\n spaces", "日本語 한국 🙂\u200d\u0301\xa0", "ß é"):
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(pieces) + stream.flush() == text and "\ufffd" not in "".join(pieces)
    stream = StreamDecoder(tokenizer)
    assert stream.push(tokenizer.encode("한")[0]) == "" and stream.flush() == "\ufffd"


def listen(tokenizer, ids, stop="###"):
    row = Answer(tokenizer, stop)
    pieces = [row.push(token_id) for token_id in ids]
    return pieces, row


@pytest.mark.parametrize("spelling", [["###"], ["#", "#", "#"], ["##", "#"], ["#", "##"],
                                      [" ###"], ["####"], ["#", "##", "# more"]])  # fmt: skip
def test_every_spelling_of_the_stop_text_ends(tokenizer, spelling):
    ids = tokenizer.encode("a red star")
    for text in [*spelling, " and on", "###"]:
        ids += tokenizer.encode(text)
    pieces, row = listen(tokenizer, ids)
    assert row.finished and "".join(pieces) == "a red star"
    assert row.push(ids[0]) == "" == row.close()


def test_what_only_begins_like_the_stop_text_is_an_answer(tokenizer):
    ids = tokenizer.encode(" a #") + tokenizer.encode("b ##") + tokenizer.encode("  c #")
    pieces, row = listen(tokenizer, ids)
    assert not row.finished and "".join(pieces) == "a #b ##  c"
    assert row.close() == " #" and row.finished


def test_newline_ends_a_caption(tokenizer):
    pieces, row = listen(tokenizer, tokenizer.encode("two stars\nthree"), stop="\n")
    assert row.finished and "".join(pieces) == "two stars"


def test_only_an_answer_without_an_end_is_cut(tokenizer):
    ids = tokenizer.encode("two stars")
    for last in ([], tokenizer.encode("###"), tokenizer.encode("#")):
        row = Answer(tokenizer, "###", stop_id=tokenizer.encode("#")[0])
        for token_id in ids + last:
            row.push(token_id)
        row.close()
        assert row.shown == "two stars" and row.finished and row.cut == (last == [])


def test_a_character_of_several_tokens_comes_in_one_piece(tokenizer):
    ids = tokenizer.encode("a 東京 🙂")
    pieces, row = listen(tokenizer, ids)
    assert len(ids) > 6 and "".join(pieces) == "a 東京 🙂"
    half, row = listen(tokenizer, ids[:-2])
    assert "".join(half) == "a 東" and row.close() == "\ufffd"


# ---- the loop ----
def test_cache_equals_the_whole_sequence_at_every_step(model, image):
    embeds, mask = prepared(model, [image], PROMPTS[:1])
    for ids, scores in generate_ids(model.phi, embeds, mask, 8):
        with torch.inference_mode():
            whole = model.phi.lm_head(model.phi(embeds)[:, -1])
            embeds = torch.cat([embeds, model.phi.embed_tokens(ids)[:, None]], dim=1)
        torch.testing.assert_close(scores, whole, rtol=0, atol=1e-4)


def test_padding_on_the_left_changes_nothing(model, image):
    other = Image.new("RGB", (50, 50), "blue")
    batch = prepared(model, [image, other, image], PROMPTS)
    assert batch[1][1, 0] == 0  # the shortest prompt is padded
    together = list(generate_ids(model.phi, *batch, 10))
    for row, (prompt, picture) in enumerate(zip(PROMPTS, (image, other, image))):
        alone = generate_ids(model.phi, *prepared(model, [picture], [prompt]), 10)
        for (ids, scores), (id_alone, scores_alone) in zip(together, alone, strict=True):
            assert ids[row] == id_alone[0]
            torch.testing.assert_close(scores[row], scores_alone[0], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*answers cut")
def test_a_picture_is_looked_at_once(model, image, monkeypatch):
    """For several questions in a batch, and for a further question later on."""
    looked_at, original = [], model.encode_images
    monkeypatch.setattr(model, "encode_images",
                        lambda pixels, *maps: looked_at.append(len(pixels)) or original(pixels))
    other = image.transpose(Image.Transpose.ROTATE_90)
    images = [image, other, image]
    embeds = encode_images(model, images)
    assert looked_at == [2] and torch.equal(embeds[0], embeds[2])
    together = answer(model, images, PROMPTS, max_new_tokens=5)
    assert together == answer(model, embeds, PROMPTS, max_new_tokens=5)
    assert "".join(generate(model, embeds[:1], PROMPTS[0], max_new_tokens=5)) == together[0]
    assert looked_at == [2, 2]


def test_rows_end_one_by_one(model, image, monkeypatch):
    """With a stop text that the answers reach after different numbers of tokens, or never."""
    images = [image] * 3
    with pytest.warns(UserWarning, match="3 of 3 answers cut after 12 tokens"):
        uncut = answer(model, images, PROMPTS, max_new_tokens=12)
    word = uncut[0].split()[2]
    monkeypatch.setitem(cli.STAGES, 4, cli.STAGES[4]._replace(end_sym=word))
    cut = answer(model, images, PROMPTS, max_new_tokens=12)
    assert cut == [text.split(word)[0].strip() for text in uncut] and cut[0] != uncut[0]
    for prompt, text in zip(PROMPTS, cut):
        pieces = list(generate(model, [image], prompt, max_new_tokens=12))
        assert "".join(pieces) == text and all(pieces)


def test_ids_without_text_are_never_drawn(model, image):
    with torch.no_grad():
        model.phi.lm_head.bias[len(model.tokenizer) :] = 1e4
    with pytest.warns(UserWarning, match="1 of 1 answers cut after 6 tokens, because of max_new"):
        assert "".join(generate(model, [image], PROMPTS[0], Sampling(1.0), max_new_tokens=6))


def test_prompt_and_answer_share_the_positions(model, image):
    used = prepared(model, [image], PROMPTS[:1])[0].shape[1]
    steps = POSITIONS - used + 1  # the last token is read, but never fed
    with pytest.warns(UserWarning, match=f"after {steps} tokens, because of the model's 80"):
        answer(model, [image], PROMPTS[:1], max_new_tokens=1000)
    long = inference_prompt("detection", "a " * 100, 4)
    with pytest.raises(ValueError, match="takes 1[0-9][0-9] positions; this model has 80"):
        answer(model, [image], [long])


def test_pictures_and_places_must_agree(model, image):
    with pytest.raises(ValueError, match="1 <ImageHere> in the prompt, 2 images"):
        list(generate(model, [image, image], PROMPTS[0]))
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, not -1"):
        list(generate(model, [image], PROMPTS[0], max_new_tokens=-1))


def test_a_prompt_for_every_picture(model, image):
    with pytest.raises(ValueError, match="2 prompts about 1 images; each needs one"):
        answer(model, [image], PROMPTS[:2])


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_scores_that_are_not_finite_are_told(model, image, number):
    """fp16 has infinity for what is too large; of the last product nothing makes NaN of it."""
    with torch.no_grad():
        model.phi.lm_head.bias[7] = float(number)
    with pytest.raises(ValueError, match="scores are not finite: .* or its weights damaged"):
        answer(model, [image], PROMPTS[:1])


def test_official_has_no_bos_and_ends_at_one_id(model, image):
    with_bos, _ = prepared(model, [image], PROMPTS[:1])
    without, _ = prepared(model, [image], PROMPTS[:1], official=True)
    torch.testing.assert_close(with_bos[:, 1:], without)
    with torch.no_grad():
        model.phi.lm_head.weight.zero_()
        model.phi.lm_head.bias[model.tokenizer.encode("###")[0]] = 1e3
        model.phi.lm_head.bias[model.tokenizer.bos_token_id] = 2e3
    # BOS, which is no text, would come first; the penalty makes it second to "###".
    sampling = Sampling(repetition_penalty=4.0)
    with pytest.warns(UserWarning, match="cut after 1 tokens"):
        said = answer(model, [image], PROMPTS[:1], sampling, max_new_tokens=1, official=True)
    assert said == ["###"]
    model.phi.lm_head.bias.data[model.tokenizer.encode("#")[0]] = 3e3
    assert answer(model, [image], PROMPTS[:1], official=True) == [""]


# ---- boxes ----
def test_boxes_are_labelled_with_the_phrase_before_them():
    text = "<p>a star</p> {<1><2><3><4>}<delim>{<5><6><7><8>} and <p>the moon</p> {<9><9><20><20>}"
    boxes, ignored = labelled_boxes(text, "asked")
    assert [label for _, label in boxes] == ["a star", "a star", "the moon"] and ignored == 0
    boxes, ignored = labelled_boxes("{<10><20><30><40>} {<1><2><3>} {<10><20", "asked")
    assert boxes == [((10, 20, 30, 40), "asked")] and ignored == 2


def test_boxes_are_drawn_on_a_copy():
    image = Image.new("RGB", (200, 100), "white")
    drawn = draw_boxes(image, [((10, 20, 50, 60), "東 é"), ((70, 70, 100, 100), "x")])
    assert image.getcolors() == [(20000, (255, 255, 255))] and drawn.size == image.size
    for x, y in ((20, 40), (60, 20), (100, 40), (60, 60), (140, 95), (199, 99)):
        assert drawn.getpixel((x, y)) != (255, 255, 255), (x, y)
    assert drawn.getpixel((105, 65)) == (255, 255, 255)
    draw_boxes(Image.new("RGB", (1, 1)), [((0, 0, 100, 100), "long" * 99)])


# ---- command line ----
def run(capsys, *argv):
    """Exit code, stdout and the lines of stderr."""
    code = cli.main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


@pytest.fixture
def picture(image, tmp_path):
    image.save(tmp_path / "x.png")
    return tmp_path / "x.png"


@pytest.fixture
def says(model, monkeypatch):
    """Makes the command line use `model`, and its answer what the test says."""
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: model)

    def set_answer(*pieces):
        asked = []

        def start_answers(model, images, num_images, prompts, *_):
            asked.append(prompts[0])
            rows = [Answer(model.tokenizer, "###") for _ in prompts]

            def stream():
                for n, piece in enumerate(pieces, 1):
                    for row in rows:
                        row.shown, row.finished = row.shown + piece, n == len(pieces)
                    yield [piece] * len(prompts)

            return rows, stream()

        monkeypatch.setattr(cli, "start_answers", start_answers)
        return asked

    return set_answer


@pytest.mark.parametrize("arguments, message", [
    ("", "required: --img"),
    ("--img no.png", "cannot read the image no.png: No such file"),
    ("--img {picture} --tempratur 1", "unknown argument --tempratur; did you mean --temperature"),
    ("--img {picture} --topk=3", "unknown argument --topk=3; did you mean --top-k"),
    ("--img {picture} b.png", "cannot read the image b.png: No such file"),
    ("--img {picture} --attn {folder}/out.xyz", "--attn .*no picture format has this ending"),
    ("--img {picture} --attn-queries", "--attn-queries needs --attn FILE"),
    ("--img {picture} --chat --ask why", "--chat takes no --ask"),
    ("--img {picture} --chat --draw {folder}/out.png", "--chat takes no --draw"),
    ("--img {picture} {picture} --chat", "--chat is about one picture"),
    ("--img {picture} --task vpa", "invalid choice: 'vpa'"),
    ("--img {picture} --task refer", "--task refer needs --ask with a phrase"),
    ("--img {picture} --ask=", "--task vqa needs --ask with a question"),
    ("--img {picture} --task caption --ask why", "task caption takes no text"),
    ("--img {picture} --task identify --ask {{<1><2>}}", "needs one box like .*, not '{<1><2>}'"),
    ("--img {picture} --ask <ImageHere>", "cannot be part of a text"),
    ("--img {picture} --task detail --ask why", "task detail takes no text"),
    ("--img {picture} --temperature -1", "temperature must be 0, which is greedy, or from 0.01"),
    ("--img {picture} --temperature hot", "--temperature: invalid float value: 'hot'"),
    ("--img {picture} --top-p 0", "top_p must be above 0 and at most 1, not 0.0"),
    ("--img {picture} --max-new-tokens 0", "--max-new-tokens 0: say 1 or more"),
    ("--img {picture} --stage 7", "--stage: invalid choice: 7"),
    ("--img {picture} --draw {folder}/no/out.png", "there is no folder .*/no"),
    ("--img {picture} --draw {folder}/out.xyz", "no picture format has this ending"),
    ("--img {picture} --draw {folder}", "no picture format has this ending"),
    ("--img {picture} --draw {picture}", "--draw .* would replace a picture that is asked about"),
    ("--img a.png --draw b.png --attn ./b.png", "--draw and --attn would both write b.png"),
    ("--img a.png b-1.png --attn b.png", "--attn b.png would replace a picture that is asked"),
    ("--img {picture} --device tpu", "--device: invalid choice: 'tpu'"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, model, monkeypatch, picture, arguments, message):
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: model)
    arguments = arguments.format(picture=picture, folder=picture.parent).split()
    code, out, err = run(capsys, *arguments)
    assert (code, out, len(err)) == (2, "", 1)
    assert pytest.raises(ValueError, match="^error: .*" + message).matches(ValueError(err[0]))


@pytest.mark.parametrize("arguments", [
    ("--max-new-tokens", "0"), ("--task", "caption", "--ask", "why"),
    ("--task", "identify", "--ask", "{<1><2>}"), ("--stage", "1", "--ask", "why"),
    ("--ask", "is it <ImageHere>?"),
])  # fmt: skip
def test_mistakes_are_told_before_weights_load(capsys, picture, arguments):
    nowhere = "--weights", "/nowhere"
    assert "/nowhere" not in run(capsys, "--img", picture, *nowhere, *arguments)[2][0]
    assert "/nowhere" in run(capsys, "--img", picture, *nowhere)[2][0]


def test_a_long_question_is_told_once(capsys, says, picture):
    says("yes###")
    _, _, err = run(capsys, "--img", picture, "--ask", "is it red " * 20)
    assert err == ["note: only the first 50 words of what was asked count, as in training"]


def test_ctrl_c_is_no_error(capsys, picture, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", interrupted)
    assert run(capsys, "--img", picture)[0] == 130


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_no_cuda(capsys, picture):
    code, _, (line,) = run(capsys, "--img", picture, "--device", "cuda")
    assert code == 2
    assert line == "error: --device cuda: torch sees no GPU here; leave it out to use the CPU"


def test_no_weights(capsys, picture, tmp_path):
    code, _, err = run(capsys, "--img", picture, "--weights", tmp_path / "none")
    assert code == 2 and err == [f"error: no weights directory {tmp_path / 'none'}"]


def test_a_mistake_as_the_shell_sees_it():
    call = [sys.executable, str(ROOT / "generate.py"), "--img", "no.png", "--max-tokens", "3"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_tasks_and_wording(capsys, says, picture):
    asked = says("a ", "star")
    assert run(capsys, "--img", picture) == (0, "a star\n", [])
    assert run(capsys, "--img", picture, "--ask", "What COLOR is it?") == (0, "a star\n", [])
    run(capsys, "--img", picture, "--task", "refer", "--ask", "The Star.")
    run(capsys, "--img", picture, "--task", "detail")
    long = "is it " * 30 + "?"
    assert "first 50 words" in run(capsys, "--img", picture, "--ask", long)[2][0]
    assert asked[:4] == [
        inference_prompt("caption", "", 4), inference_prompt("vqa", "what color is it?", 4),
        inference_prompt("refer", "the star", 4), inference_prompt("detail", "", 4),
    ]  # fmt: skip


def test_only_the_answer_goes_to_stdout(capsys, model, monkeypatch, picture):
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: model)
    code, out, err = run(capsys, "--img", picture, "--max-new-tokens", "5")
    assert code == 0 and out.strip()
    assert err == ["note: 1 of 1 answers cut after 5 tokens, because of max_new_tokens"]
    long = ["--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--repetition-penalty", "1.1"]
    first = run(capsys, "--img", picture, *long, "--seed", "1")
    assert first == run(capsys, "--img", picture, *long, "--seed", "1")
    assert first != run(capsys, "--img", picture, *long, "--seed", "2")


def test_a_note_comes_after_the_line_of_its_answer(model, monkeypatch, picture):
    """As a terminal shows them, which is both stdout and stderr."""
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: model)
    assert cli.main(["--img", str(picture), "--max-new-tokens", "3"]) == 0
    said, note = terminal.getvalue().splitlines()
    assert said and note == "note: 1 of 1 answers cut after 3 tokens, because of max_new_tokens"


def test_every_task_about_a_picture_can_be_asked():
    assert {*cli.ASK_FOR} == {task for task, fields in EXAMPLES.items() if "image" in fields}
    for task, needed in cli.ASK_FOR.items():
        assert (needed is None) == ("caption" in EXAMPLES[task])


def test_draw(capsys, says, picture, tmp_path):
    out = tmp_path / "out.png"
    draw = ["--img", picture, "--draw", out, "--task"]
    white = Image.open(picture)

    says("{<50><50>", "<90><90>} {<1>}")
    code, text, err = run(capsys, *draw, "refer", "--ask", "it")
    assert (code, text) == (0, "{<50><50><90><90>} {<1>}\n")
    assert err == ["note: 1 malformed boxes in the answer are not drawn"]
    assert Image.open(out).getpixel((150, 180)) != white.getpixel((150, 180)) == (255, 255, 255)

    says("a star")
    run(capsys, *draw, "identify", "--ask", "{<60><10><90><40>}")
    assert Image.open(out).getpixel((270, 20)) != white.getpixel((270, 20)) == (255, 255, 255)

    code, _, (line,) = run(capsys, *draw, "grounding")
    assert code == 0
    assert line == f"note: the answer has no box to draw; {out} is the picture as it was"
    assert Image.open(out).tobytes() == white.tobytes()


def test_several_pictures(capsys, says, picture, tmp_path, monkeypatch):
    """A line and a drawing for each, in their order."""
    monkeypatch.setattr(cli, "BATCH_SIZE", 2)
    says("{<50><50>", "<90><90>}\n two  lines")
    other = tmp_path / "y.jpg"
    Image.new("RGB", (40, 80)).save(other)
    out = tmp_path / "out.png"
    task = ["--task", "refer", "--ask", "it", "--draw", out]
    code, text, err = run(capsys, "--img", picture, other, picture, *task)
    assert (code, text, err) == (0, "{<50><50><90><90>} two lines\n" * 3, [])
    sizes = [Image.open(tmp_path / f"out-{n}.png").size for n in (1, 2, 3)]
    assert sizes == [(300, 200), (40, 80), (300, 200)] and not out.exists()


def test_json(capsys, says, picture):
    said = "<p>a \"star\"</p> {<50><50><91><90>}<delim>{<0><0><100><100>} {<1>}"
    says(said)
    code, line, err = run(capsys, "--img", picture, "--task", "grounding", "--json")
    assert (code, err, line.count("\n")) == (0, [], 1)
    assert json.loads(line) == {
        "image": str(picture), "task": "grounding", "ask": "", "answer": said,
        "boxes": [{"phrase": 'a "star"', "box": [150, 100, 273, 180]},
                  {"phrase": 'a "star"', "box": [0, 0, 300, 200]}],
        "ignored_boxes": 1, "cut": False,
    }  # fmt: skip
    says("a star")
    asked = ["--task", "identify", "--ask", "{<60><10><90><40>}", "--json"]
    _, line, _ = run(capsys, "--img", picture, *asked)
    assert json.loads(line)["boxes"] == [{"phrase": "a star", "box": [180, 20, 270, 80]}]


def test_json_tells_what_was_cut(capsys, model, monkeypatch, picture):
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: model)
    for limit in (1, 1000):  # more than there are positions for
        _, lines, _ = run(capsys, "--img", picture, "--json", "--max-new-tokens", limit)
        assert json.loads(lines)["cut"] is True
    with torch.no_grad():
        model.phi.lm_head.bias[model.tokenizer.encode("###")[0]] = 1e4
    code, lines, err = run(capsys, "--img", picture, picture, "--json")
    assert (code, err) == (0, [])
    assert [json.loads(line)["cut"] for line in lines.splitlines()] == [False] * 2


# ---- the shipped miniature ----
@pytest.fixture(scope="module")
def circle(tmp_path_factory):
    """A picture as anyone can draw it: a large red circle, at 20 to 60 of 100, on white."""
    path = tmp_path_factory.mktemp("drawn") / "circle.png"
    image = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 180, 180), (220, 20, 30))
    image.save(path)
    return path


def test_shipped_describes_pictures(capsys, circle):
    for path in [circle, *(ROOT / "assets").glob("*.png")]:
        code, out, err = run(capsys, "--img", path)
        assert code == 0 and err == [] and len(out.split()) > 2 and out.count("\n") == 1, out


def test_shipped_answers(capsys, circle):
    code, out, err = run(capsys, "--img", circle, "--ask", "What color is the circle?")
    assert (code, out, err) == (0, "red\n", [])
    code, out, _ = run(capsys, "--img", circle, "--task", "identify", "--ask", "{<20><20><60><60>}")
    assert code == 0 and "circle" in out


def test_shipped_points(capsys, circle, tmp_path):
    draw = tmp_path / "out.png"
    arguments = ["--task", "refer", "--ask", "the red circle", "--draw", draw]
    code, out, err = run(capsys, "--img", circle, *arguments)
    assert code == 0 and err == []
    ((x1, y1, x2, y2),), ignored = parse_boxes(out)
    overlap = max(0, min(x2, 60) - max(x1, 20)) * max(0, min(y2, 60) - max(y1, 20))
    assert ignored == 0 and overlap / ((x2 - x1) * (y2 - y1) + 1600 - overlap) > 0.5
    assert Image.open(draw).tobytes() != Image.open(circle).tobytes()


def test_shipped_many_pictures(capsys, circle, monkeypatch):
    """More than one batch of them: each gets the answer that it gets alone."""
    monkeypatch.setattr(cli, "BATCH_SIZE", 2)
    paths = [circle, ROOT / "assets" / "two.png", ROOT / "assets" / "shapes.png"]
    alone = [run(capsys, "--img", path, "--task", "grounding")[1] for path in paths]
    assert len(set(alone)) == 3
    _, lines, err = run(capsys, "--img", *paths, "--task", "grounding")
    assert (lines, err) == ("".join(alone), [])
    _, lines, _ = run(capsys, "--img", *paths, "--task", "grounding", "--json")
    found = [json.loads(line) for line in lines.splitlines()]
    assert [one["image"] for one in found] == [str(path) for path in paths]
    assert [one["answer"] + "\n" for one in found] == alone
    assert [len(one["boxes"]) for one in found] == [1, 2, 3]


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_shipped_stages(capsys, circle, stage):
    code, out, err = run(capsys, "--img", circle, "--stage", stage)
    assert code == 0 and err == [] and "circle" in out


def test_backbones_alone_are_asked_as_stage_1_is(circle):
    model = TinyGPTV.from_pretrained(ROOT / "miniature/weights", stage=0)
    with pytest.warns(UserWarning, match="answers cut after 3 tokens"):
        said = generate(model, [Image.open(circle)], inference_prompt("caption", "", 0),
                        max_new_tokens=3)  # fmt: skip
        assert "".join(said)


def test_shipped_batch_equals_one_by_one(circle):
    model = TinyGPTV.from_pretrained(ROOT / "miniature" / "weights")
    image = Image.open(circle)
    prompts = [inference_prompt(*asked, model.stage) for asked in (
        ("caption", ""), ("vqa", "how many objects are there?"), ("detection", "circle"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no answer is cut
        batch = answer(model, [image] * 3, prompts)
    assert batch == ["".join(generate(model, [image], prompt)) for prompt in prompts]
