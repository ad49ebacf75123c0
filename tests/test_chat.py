"""experiments/chat.py: what the model reads of several turns, commands, interruptions, pipes."""

import io
import itertools
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import generate as cli
from data import STAGES, encode_sample, inference_prompt, load_image, make_sample, parse_boxes
from experiments import chat as chat_module
from experiments.chat import Conversation, Turn
from generate import Sampling, generate

ROOT = Path(__file__).parents[1]
SHAPES, TWO = ROOT / "assets" / "shapes.png", ROOT / "assets" / "two.png"
COLOR, SHAPE = "what color is the star?", "what shape is the green object?"


@pytest.fixture
def lengths(monkeypatch):
    """Of all that the model reads, question by question."""
    seen, original = [], chat_module.stream_answers
    monkeypatch.setattr(chat_module, "stream_answers", lambda model, batch, *rest: (
        seen.append(batch[0].shape[1]) or original(model, batch, *rest)))
    return seen


@pytest.fixture
def conversation(miniature):
    return Conversation(miniature, load_image(SHAPES), Sampling(), max_new_tokens=60)


def said(conversation, line):
    pieces = []
    conversation.ask(line, pieces.append)
    return "".join(pieces).removesuffix("\n")


# ---- turns ----
@pytest.mark.parametrize("stage", [3, 4])
def test_the_model_reads_what_it_is_trained_on(conversation, monkeypatch, stage):
    """The row of a training record with the same turns, up to the answer that is to come."""
    monkeypatch.setattr(conversation.model.config, "stage", stage)
    turns = [["What is this?", "A star."], ["Its color?", "red, I think"], ["Sure?", "Yes."]]
    record = {"task": "chat", "turns": turns}
    sample = make_sample(record, stage, random.Random(0), size=(9, 9))
    row = encode_sample(sample, conversation.model.tokenizer, 1, 32, *STAGES[stage][:0:-1])
    trained = row["input_ids"].tolist()
    for question, answer in turns[:2]:
        conversation.turns.append(Turn(question, conversation.prompt(question), answer))
    read = conversation.input_ids(conversation.prompt("Sure?"))
    end = conversation.model.tokenizer.encode("Yes." + STAGES[stage].end_sym)
    assert read + end == trained


def test_a_first_question_is_as_without_a_chat(conversation):
    prompt = inference_prompt("refer", "the red star", 4)
    assert conversation.prompt("[refer] The red star.") == prompt
    alone = "".join(generate(conversation.model, [conversation.image], prompt))
    assert said(conversation, "[refer] The red star.") == alone
    assert parse_boxes(alone)[0] and conversation.turns[0].prompt == prompt


def test_only_the_first_question_follows_the_picture(conversation):
    first, later = conversation.prompt(COLOR), f"[INST] {COLOR}  [/INST]"
    assert first == f"[INST] <Img><ImageHere></Img> {COLOR}  [/INST]"
    said(conversation, COLOR)
    assert conversation.prompt(COLOR) == later
    assert conversation.prompt("[vqa] Is it RED?") == "[INST] [vqa] is it red?  [/INST]"
    assert conversation.prompt("[other] a") == "[INST] [other] a  [/INST]"


def test_history_is_read(conversation):
    """The scores of a later turn depend on what was said before."""
    model, later = conversation.model, []
    for answer in ("red", "blue"):
        conversation.turns = [Turn(COLOR, inference_prompt("chat", COLOR, 4), answer)]
        ids = torch.tensor([conversation.input_ids(conversation.prompt(SHAPE))])
        with torch.inference_mode():
            hidden = model.phi(model.phi.embed(ids, conversation.image_embeds))
        later.append(hidden[0, -1])
    assert (later[0] - later[1]).abs().max() > 0.01


def test_a_picture_is_looked_at_once(miniature, monkeypatch):
    looked, original = [], miniature.encode_images
    monkeypatch.setattr(miniature, "encode_images",
                        lambda *args: looked.append(1) or original(*args))
    conversation = Conversation(miniature, load_image(SHAPES), Sampling(), 60)
    for _ in range(3):
        said(conversation, COLOR)
    assert len(looked) == 1 and len(conversation.turns) == 3


def test_an_answer_comes_in_pieces(conversation):
    pieces = []
    conversation.ask("[caption]", pieces.append)
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) == conversation.turns[0].answer + "\n" == (
        "a large red solid star, a large green solid heart and a small blue outlined circle\n")


# ---- through a pipe ----
@pytest.fixture
def talk(capsys, miniature, monkeypatch):
    """Exit code, stdout and the lines of stderr of a chat in which these lines come in."""
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: miniature)

    def talk_(*lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, lines))))
        code = cli.main(["--img", str(SHAPES), "--chat", *options])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return talk_


def test_only_answers_go_to_stdout(talk):
    assert talk(COLOR, "", SHAPE, "[vqa] How many objects are there?") == (
        0, "red\nheart\n3\n", [])  # fmt: skip
    assert talk(COLOR, "/quit", SHAPE) == (0, "red\n", [])
    assert talk() == (0, "", [])


def test_reset_forgets(talk, lengths):
    code, out, err = talk(COLOR, COLOR, "/reset", COLOR)
    assert (code, out, err) == (0, "red\n" * 3, [])
    assert lengths[0] == lengths[2] < lengths[1]


def test_another_picture(talk, lengths, tmp_path):
    """A missing one is told; the chat, its picture and its history go on."""
    spaced = tmp_path / "a b.png"
    Image.open(TWO).save(spaced)
    missing = tmp_path / "no.png"
    code, out, err = talk(COLOR, "/image " + str(missing), COLOR, f"/image {spaced}", COLOR)
    assert code == 0 and out.startswith("red\nred\n") and lengths[0] == lengths[2] < lengths[1]
    _, out, _ = talk(f"/image {spaced}", "[caption]")
    assert out == "a small orange solid square and a large purple outlined diamond\n"
    assert err == [f"error: cannot read the image {missing}: No such file or directory"]


def test_draw(talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["/draw", "[refer] the red star", "/draw", COLOR, "/draw b.png",
             "[identify] {<11><13><46><46>}", "/draw c.png", "/draw c.xyz"]  # fmt: skip
    code, out, err = talk(*lines)
    assert code == 0 and out.count("\n") == 3
    assert err == [
        "error: /draw: there is no answer yet", "drawn: boxes.png",
        "note: the answer has no box to draw; b.png is the picture as it was", "drawn: b.png",
        "drawn: c.png", "error: /draw c.xyz: no picture format has this ending; use .png or .jpg",
    ]  # fmt: skip
    picture = load_image(SHAPES).tobytes()
    assert load_image("b.png").tobytes() == picture
    assert load_image("boxes.png").tobytes() != picture != load_image("c.png").tobytes()


def test_mistakes_are_told_and_the_chat_goes_on(talk):
    code, out, err = talk("/drew", "[caption] x", "[identify] a star", "<ImageHere>", COLOR)
    assert (code, out) == (0, "\n\n\nred\n")  # a line for each question
    assert err[0] == "error: /drew: no such command; there are" and "/reset" in "".join(err)
    assert err[-3:] == [
        "error: task caption takes no text",
        "error: task identify needs one box like {<10><20><50><60>}, not 'a star'",
        "error: <ImageHere> stands for a picture and cannot be part of a text",
    ]


def test_too_long_a_history_is_told_and_nothing_is_dropped(talk, conversation):
    long = "is it " * 100 + "?"
    for line in (COLOR, long, long):
        said(conversation, line)
    turns = list(conversation.turns)
    refusal = r"with this question, the conversation takes 6\d\d positions and the model has 512"
    with pytest.raises(ValueError, match=refusal):
        said(conversation, long)
    assert conversation.turns == turns and len(turns) == 3
    assert said(conversation, COLOR) and conversation.turns[:3] == turns  # a short one fits
    code, out, err = talk(long, long, long, "/reset", COLOR)
    assert (code, out.count("\n"), out.split()[-1], len(err)) == (0, 4, "red", 1)
    assert err[0].startswith("error: with this") and err[0].endswith("; /reset forgets it")


def test_commands_that_exist_are_told_what_they_lack(talk):
    code, out, err = talk("/image", "/image  ", "/reset now", "/quit now", COLOR)
    assert (code, out) == (0, "red\n")
    assert err == ["error: /image needs the file of a picture, as in /image b.png"] * 2 + [
        "error: /reset takes nothing after it", "error: /quit takes nothing after it"]


def test_bytes_that_are_no_text_do_not_end_the_chat(monkeypatch, capsys, miniature):
    """Of a locale whose decoder is strict."""
    typed = io.BytesIO(b"\xff\n/\xff\n" + COLOR.encode())
    monkeypatch.setattr(cli.TinyGPTV, "from_pretrained", lambda *_: miniature)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed, "utf-8", "strict"))
    assert cli.main(["--img", str(SHAPES), "--chat"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and out.endswith("\nred\n")
    assert err.startswith("error: /\ufffd: no such command")


def test_cut_answers_are_noted(talk):
    code, out, err = talk("[caption]", options=["--max-new-tokens", "3"])
    assert (code, out.count("\n")) == (0, 1)
    assert err == ["note: 1 of 1 answers cut after 3 tokens, because of max_new_tokens"]


def test_a_note_does_not_come_into_the_line_of_its_answer(talk, monkeypatch):
    """As a terminal shows them, which is both stdout and stderr."""
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    talk("[caption]", "[caption]", options=["--max-new-tokens", "3"])
    note = "note: 1 of 1 answers cut after 3 tokens, because of max_new_tokens\n"
    assert terminal.getvalue() == f"a large red\n{note}" * 2


def test_an_empty_answer_is_told(talk, monkeypatch):
    monkeypatch.setitem(chat_module.STAGES, 4, STAGES[4]._replace(end_sym="red"))
    assert talk(COLOR) == (
        0, "\n", ["note: the answer is empty; this question does not count as asked"])


# ---- Ctrl-C ----
def test_ctrl_c_ends_an_answer(talk, monkeypatch):
    """What was said until then counts as said; nothing does if nothing was."""
    original, prompts = chat_module.stream_answers, []
    steps = iter((0, 4, 99))

    def interrupted(model, batch, *rest):
        prompts.append(batch[0].shape[1])
        yield from itertools.islice(original(model, batch, *rest), limit := next(steps))
        if limit < 99:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat_module, "stream_answers", interrupted)
    code, out, err = talk("[caption]", "[caption]", COLOR)
    assert (code, err) == (0, ["note: stopped"] * 2)
    first, second, third = out.splitlines()
    assert first == "" and "a large red solid star".startswith(second) and second
    assert third == "red" and prompts[0] == prompts[1] < prompts[2]


def test_ctrl_c_at_the_prompt_does_not_end_the_chat(talk, monkeypatch):
    typed = iter((KeyboardInterrupt, COLOR, EOFError))

    def typing(prompt):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typing)
    assert talk() == (0, "red\n", ["(/quit or Ctrl-D ends the chat)"])


def test_stages_that_know_no_questions(capsys):
    code = cli.main(["--img", str(SHAPES), "--chat", "--stage", "2"])
    assert code == 2
    assert capsys.readouterr().err == "error: stage 2 only learns to caption; --chat needs 3 or 4\n"


def test_prompt_is_for_terminals(monkeypatch):
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt: prompts.append(prompt) or "/quit")
    for is_terminal in ((True, True), (True, False), (False, True)):
        for name, value in zip(("stdin", "stdout"), is_terminal):
            monkeypatch.setattr(f"sys.{name}", SimpleNamespace(isatty=lambda value=value: value))
        assert list(chat_module.read_lines()) == []
    assert prompts == ["> ", "", ""]


def test_the_miniature_keeps_its_answers_in_a_long_chat(miniature):
    """It was not trained on several turns, and still answers in the fifth as in the first."""
    conversation = Conversation(miniature, load_image(SHAPES), Sampling(), max_new_tokens=60)
    asked = {COLOR: "red", SHAPE: "heart", "is the heart solid or outlined?": "solid",
             "is there a moon?": "no", "how many objects are there?": "3"}  # fmt: skip
    assert {question: said(conversation, question) for question in asked} == asked
