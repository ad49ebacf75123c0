"""Messages that no other test reaches: one line, exit code 2, and what to do."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import quantize
import train
from data import Tokenizer
from experiments import agreement, evaluate, memory, official_sized, readme, run_log, speed
from experiments.peers import LlamaCpp
from experiments.command_line import report
from miniature import pretrain, pretrain_language, world
from model import ModelConfig, TinyGPTV
from official import convert, export, fetch, load
from official.weights import clip_from_official
from test_fetch import file  # noqa: F401  a server that answers as the path says
from test_load import EVA, QFORMER


@pytest.mark.parametrize("main, arguments, reason", [
    (agreement.main, ["n=many"], "is not of type int"),
    (memory.main, ["weights=a", "int=b"], "did you mean int8=...?"),
    (memory.main, ["weights=a"], "say weights=DIR and int8=DIR"),
    (official_sized.main, ["dtypes=bf16,int4"], "int4 is not in"),
    (official_sized.main, ["floder=a"], "did you mean folder=...?"),
    (speed.main, ["peer=gpt"], "peer=gpt is not known"),
    (run_log.main, [], "name the folders of some runs"),
    (run_log.main, ["/nowhere"], "/nowhere"),
    (pretrain.main, ["part=everything"], "say part=tokenizer, part=vision"),
    (train.main, ["stage=1", "device=cuda"], "torch sees no GPU"),
    (memory.main, ["stage=1", "measured=1"], "torch sees no GPU"),
])  # fmt: skip
def test_wrong_arguments(main, arguments, reason, refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in refusal(main, *arguments)


def test_half_precision_without_hardware(drawing, refusal):
    told = refusal(generate.main, "--img", drawing, "--dtype", "fp16")
    assert "use bf16 or fp32" in told


def test_a_part_of_pre_training_says_what_it_lacks(monkeypatch, refusal, tmp_path):
    def fail(out):
        raise ValueError("there is no vision.safetensors; run part=vision first")

    monkeypatch.setattr(pretrain, "__file__", str(tmp_path / "pretrain.py"))
    monkeypatch.setitem(pretrain.PARTS, "language", fail)
    assert "run part=vision first" in refusal(pretrain.main, "part=language")


def test_words_of_the_inventory_are_single_tokens(small):
    scene = world.sample_scene(1, "train")
    with pytest.raises(ValueError, match="not one token; run part=tokenizer again"):
        pretrain_language.language_row(scene, [], 4, Tokenizer(small))


def test_a_mark_of_the_readme_that_is_gone():
    assert readme.put("<!-- a -->\n1\n<!-- /a -->", "a", "2") == "<!-- a -->\n2\n<!-- /a -->"
    with pytest.raises(ValueError, match="README.md has no <!-- b -->"):
        readme.put("<!-- a -->\n1\n<!-- /a -->", "b", "2")


@pytest.mark.slow
def test_processes_of_an_experiment_that_fail(tmp_path, capfd):
    for main in (memory.main, speed.main):
        assert main(["weights=/nowhere"] + ["int8=/nowhere"] * (main is memory.main)) == 2
        assert capfd.readouterr().err == "error: no weights directory /nowhere\n"
    with pytest.raises(ValueError, match="quantize.py --weights .* failed; it has said why"):
        memory.quantizing(str(tmp_path))
    assert "no checkpoint in it" in capfd.readouterr().err
    with pytest.raises(ValueError, match="did not write 2 tokens: error: .*no stage 4"):
        official_sized.run(tmp_path, 4, "bf16", 2)


def test_llama_cpp_runs_in_a_process_of_its_own_and_its_end_is_told(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text(
        "class Llama:\n"
        "    def __init__(self, path, n_ctx, n_threads, n_threads_batch, verbose): pass\n"
        "    def reset(self): pass\n"
        "    def eval(self, tokens): assert len(tokens) != 13\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    peer = LlamaCpp(tmp_path / "phi2.gguf", 1)
    assert peer.generation(8, 2).keys() == {"prefill", "token"}
    peer.close()
    assert "llama_cpp" not in sys.modules
    peer = LlamaCpp(tmp_path / "phi2.gguf", 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="llama.cpp has failed"):
            peer.generation(13, 1)



def test_sizes_by_a_name_that_is_none():
    with pytest.raises(ValueError, match="preset=huge is not known; choose from full, mini"):
        ModelConfig.preset("huge", 1)
    with pytest.raises(ValueError, match="vision=dino is not known; choose from full, mini, clip"):
        ModelConfig.preset("full", 1, "dino")


def test_a_try_does_not_replace_what_the_readme_shows(tmp_path, capsys):
    @dataclass
    class Config:
        n: int = 100
        folder: str = ""

    path = tmp_path / "heat.json"
    for argument in ("n=100", "folder=/a/b", "n=5"):
        result = {"given": argument}
        assert report([argument], Config, lambda config: result, path, places=("folder",)) == 0
        assert json.loads(capsys.readouterr().out) == result
    assert json.loads(path.read_text()) == {"given": "folder=/a/b"}
    assert json.loads((tmp_path / "heat_n-5.json").read_text()) == {"given": "n=5"}


def test_quantized_weights_are_not_trained_or_exported(small, tmp_path, refusal):
    assert quantize.main(["--weights", str(small), "--out", str(tmp_path / "int8")]) == 0
    told = refusal(train.main, "stage=4", "from_stage=4", f"weights={tmp_path / 'int8'}",
                   f"out={tmp_path / 'run'}")  # fmt: skip
    assert "int8 is quantized; train on what it was made from" in told
    told = refusal(export.main, "--weights", tmp_path / "int8", "--out", tmp_path / "a.pth")
    assert "int8 is quantized; export what it was made from" in told


def test_the_report_of_loading_goes_to_stderr(small, drawing, monkeypatch, tmp_path, capsys):
    model = TinyGPTV.from_pretrained(small)
    model.load_report = "a.pth: 3 tensors loaded"
    monkeypatch.setattr(evaluate.TinyGPTV, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(evaluate, "RESULTS", tmp_path / "results")
    record = {"image": "x.png", "task": "vqa", "question": "what?", "answers": ["it"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert evaluate.main(["bench=jsonl", f"data={tmp_path / 'a.jsonl'}"]) == 0
    (tmp_path / "testdev_balanced_questions.json").write_text(
        json.dumps([{"image": "x.png", "question": "what?", "answer": "it"}])
    )
    (tmp_path / "images").symlink_to(tmp_path)
    assert evaluate.main(["bench=gqa", f"data={tmp_path}"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(model.load_report) == 2 and model.load_report not in captured.out


# ---- official files ----
def test_annotations_that_are_no_json(tmp_path, refusal):
    (tmp_path / "TextCaps_0.1_train.json").write_text("<html>")
    assert convert.main(["textcaps_caption", "--src", str(tmp_path)]) == 2
    with pytest.raises(ValueError, match="TextCaps_0.1_train.json is not JSON"):
        convert.read_json(tmp_path / "TextCaps_0.1_train.json")


def test_two_vits_are_not_a_choice(tmp_path):
    torch.save({"blocks.0.attn.q_bias": torch.ones(1)}, tmp_path / EVA)
    torch.save({"visual.proj": torch.ones(1)}, tmp_path / "clip_vit_L.pth")
    torch.save({"Qformer.cls": torch.ones(1)}, tmp_path / QFORMER)
    with pytest.raises(ValueError, match="eva_vit_g.pth and .*clip_vit_L.pth are two ViTs; move"):
        load.find_parts(tmp_path)


def test_clip_with_a_tensor_too_many_or_too_few():
    tensors = {"class_embedding": torch.ones(4), "positional_embedding": torch.ones(5, 4)}
    with pytest.raises(ValueError, match="extra.weight is no tensor of CLIP's ViT"):
        clip_from_official(tensors | {"extra.weight": torch.ones(1)}, 1)
    with pytest.raises(ValueError, match="class_embedding is missing"):
        clip_from_official({"positional_embedding": torch.ones(5, 4)}, 1)


def test_control_codes_in_names_do_not_reach_the_terminal(tmp_path):
    save_file({"\x1b[2J\n": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.pth").write_bytes(b"\x80\x02c\x1b[2J\nname\n.")
    for name, reason in (("a.safetensors", "no part of TinyGPT-V"), ("a.pth", "could run code")):
        with pytest.raises(ValueError, match=reason) as error:
            load.open_weights(tmp_path / name)
        assert str(error.value).isprintable()


# ---- downloads ----
def test_nobody_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetch, "PAUSE", 0)
    entry = {"path": "a", "url": "http://127.0.0.1:9/a", "bytes": None, "sha256_prefix": None}
    with pytest.raises(OSError, match="no more bytes after 0; run this again to go on"):
        fetch.fetch(entry, tmp_path)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == fetch.TRIES and all("127.0.0.1:9/a: " in line for line in told)


@pytest.mark.parametrize("length", [None, "many"])
def test_a_server_that_does_not_say_how_long(length, tmp_path, file, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        "http.client.HTTPMessage.get",
        lambda self, key, default=None: length if key == "Content-Length" else default,
    )
    with pytest.raises(ValueError, match="does not say how long the file is"):
        fetch.fetch(file("good"), tmp_path)


# ---- our own weights ----
def rewrite(edit):
    """Edits the tensors of a safetensors file in place."""

    def change(path):
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


@pytest.mark.parametrize("file, change, reason", [
    ("phi.safetensors", Path.unlink, "is missing"),
    ("phi.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]),
     "is not a safetensors file, or is damaged or cut off (Error"),
    ("phi.safetensors", lambda path: path.write_text("<html>"), "(6 bytes) is a web page, not"),
    ("phi.safetensors", rewrite(lambda tensors: tensors.pop("lm_head.bias")),
     ": 1 tensors are missing, first phi.lm_head.bias"),
    ("phi.safetensors", rewrite(lambda tensors: tensors.update(a=torch.ones(1))),
     ": unexpected tensor phi.a"),
    ("phi.safetensors", rewrite(lambda tensors: tensors.update({"lm_head.bias": torch.ones(1)})),
     ": phi.lm_head.bias has shape (1,), the model needs (260,)"),
    ("phi.safetensors", rewrite(lambda tensors: tensors["lm_head.bias"].fill_(float("inf"))),
     ": phi.lm_head.bias holds NaN or infinity"),
    ("phi.safetensors", rewrite(lambda t: t.update({"lm_head.bias": t["lm_head.bias"].int()})),
     ": phi.lm_head.bias holds torch.int32, not floating-point numbers"),
    ("stage4/config.json", lambda path: path.write_text("{}"), "does not describe a model"),
])  # fmt: skip
def test_what_is_wrong_with_our_own_files_ends_in_advice(
    file, change, reason, weights, drawing, refusal
):  # fmt: skip
    change(weights / file)
    told = refusal(generate.main, "--weights", weights, "--img", drawing)
    assert told.startswith(f"error: {weights / 'stage4'}")
    assert Path(file).name in told and reason in told
    assert told.endswith("; make it again with train.py or quantize.py, or restore the miniature's "
                         "with git\n")  # fmt: skip


def test_a_stage_that_is_not_there_ends_in_advice(weights, drawing, refusal):
    told = refusal(generate.main, "--weights", weights, "--img", drawing, "--stage", "2")
    assert told.endswith("no stage 2 in it; stages found: 4; choose one of them, or train it\n")


def test_our_own_files_are_never_taken_for_official_ones(weights, drawing, refusal):
    """A folder above a weights directory; backbones apart from every config.json."""
    told = refusal(generate.main, "--weights", weights.parent, "--img", drawing)
    assert "no checkpoint in it; stages found: none; get the official files with" in told
    run = (weights / "stage4").rename(weights.parent / "run")
    config = json.loads((run / "config.json").read_text()) | {"backbones": "../weights"}
    (run / "config.json").write_text(json.dumps(config))
    assert TinyGPTV.from_pretrained(run).stage == 4
