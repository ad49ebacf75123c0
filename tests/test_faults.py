"""Nothing that a user does breaks it: every known fault, and the tests that meet it.

A fault is input that real people have, or a failure of the machine. What is required each time: one
line that names the file or key and says what to do, exit code 2, no traceback, and nothing is lost
that was saved. COVERED says which tests show that. Here are those that the tests of the single
modules lack: real files given to the real command lines. Files made to do harm: test_security.py;
files damaged at random: test_fuzz.py; many in a row: test_endurance.py.
"""

import ast
import json
import multiprocessing
import os
import re
import shutil
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import generate
import quantize
import train
from damaged import BAD_PICTURES, bad_picture, write_png_that_says, write_weights
from experiments import evaluate
from model import Attention, RMSNorm, TinyGPTV, causal_mask, rotary_cos_sin
from official import convert, export, load, stream
from official.checkpoints import replace_file, save_checkpoint
from test_load import TWO, write_safetensors
from test_model import CONFIG

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "miniature" / "weights"

COVERED = """
1 a pickle as .pth that runs code
    test_load.py::test_pickles_of_more_than_tensors_are_not_opened
    test_convert.py::test_a_pickle_cannot_run_anything
    test_security.py::test_no_file_runs_code
2 a checkpoint with other objects
    test_load.py::test_pickles_of_more_than_tensors_are_not_opened
    test_run.py::test_a_run_goes_on_to_the_same_bit
    test_faults.py::test_what_is_saved_are_tensors_and_plain_values
3 a .pth cut off or empty
    test_load.py::test_damaged_files_are_named_with_their_size_and_what_to_do
    test_load.py::test_old_pickles_that_were_cut_off
    test_load.py::test_a_checkpoint_that_was_cut_off
    test_faults.py::test_damaged_weights_from_the_command_lines
4 damaged safetensors
    test_load.py::test_damaged_files_are_named_with_their_size_and_what_to_do
    test_model.py::test_truncated_files_are_refused
    test_faults.py::test_damaged_weights_from_the_command_lines
5 a web page or git-lfs pointer
    test_fetch.py::test_what_is_not_the_file_gets_no_name
    test_load.py::test_the_command_line_says_in_one_line_what_is_wrong
    test_faults.py::test_damaged_weights_from_the_command_lines
6 a flipped bit
    test_fetch.py::test_a_bit_that_flipped_later_is_found_by_the_hash
7 a tensor missing or left over
    test_load.py::test_tensors_that_are_not_as_they_must_be
    test_load.py::test_the_report_accounts_for_every_tensor
    test_model.py::test_damaged_weights_are_refused
8 another shape
    test_load.py::test_tensors_that_are_not_as_they_must_be
    test_model.py::test_damaged_weights_are_refused
9 other layouts and prefixes
    test_load.py::test_every_layout_and_container_of_phi_2
    test_load.py::test_checkpoints_with_other_names
    test_load.py::test_stage_1_has_another_prefix_and_no_lora
    test_load.py::test_another_layout_of_phi_2_mixed_in_is_refused
    test_golden.py::test_phi_2_file_layouts
    test_golden.py::test_clip_vit_in_both_layouts
10 NaN or infinity in weights
    test_load.py::test_tensors_that_are_not_as_they_must_be
    test_load.py::test_numbers_that_half_precision_can_not_hold
    test_model.py::test_damaged_weights_are_refused
11 a JPEG cut off
    test_data.py::test_unreadable_images_name_the_file
    test_run.py::test_bad_pictures_are_counted_and_too_many_end_the_run
    test_faults.py::test_bad_pictures_from_the_command_lines
12 a JPEG damaged in the middle
    test_faults.py::test_a_jpeg_damaged_in_the_middle_decodes
13 a decompression bomb
    test_data.py::test_unreadable_images_name_the_file
    test_faults.py::test_pixels_are_counted_before_they_are_decoded
14 no file, an empty one, text, a folder
    test_data.py::test_unreadable_images_name_the_file
    test_faults.py::test_bad_pictures_from_the_command_lines
15 modes, sizes, frames
    test_data.py::test_modes_become_rgb_on_white
    test_data.py::test_extreme_sizes
    test_data.py::test_transparent_palette_and_first_frame
16 EXIF rotation
    test_data.py::test_exif_rotation_is_applied
17 no label in a batch
    test_run.py::test_nothing_to_learn_from_changes_nothing
18 a row that may look at nothing
    test_model.py::test_left_padding_changes_nothing
    test_model.py::test_cached_decoding_equals_the_full_forward
    test_generate.py::test_padding_on_the_left_changes_nothing
19 sampling out of range
    test_generate.py::test_ranges
    test_generate.py::test_extremes_still_leave_a_token
    test_generate.py::test_mistakes_are_one_line
20 overflow in fp16
    test_faults.py::test_norms_keep_fp16_from_overflowing
    test_faults.py::test_products_in_fp16_on_a_cpu_bring_a_warning
    test_train.py::test_a_short_run_from_the_shipped_backbones
21 a loss or gradient that is no number
    test_run.py::test_a_step_without_finite_loss_changes_nothing
    test_run.py::test_it_stops_when_nothing_is_finite_any_more
22 killed while it saves, a full disk
    test_run.py::test_a_full_disk_takes_nothing_that_was_saved
    test_run.py::test_a_run_survives_being_killed
    test_quantize.py::test_what_was_begun_is_taken_away_after_an_error
    test_faults.py::test_killed_in_the_middle_of_a_save
23 resume
    test_run.py::test_a_run_goes_on_to_the_same_bit
    test_run.py::test_the_states_of_optimizer_and_scaler_go_on_too
    test_run.py::test_a_run_goes_on_with_its_own_frozen_weights
    test_run.py::test_a_run_is_not_mixed_with_another
24 answers of different lengths
    test_run.py::test_micro_batches_have_the_gradient_of_the_whole_batch
    test_run.py::test_two_processes_learn_what_one_learns
25 a row of zeros in int8
    test_quantize.py::test_rows_of_nothing_and_of_almost_nothing
26 views in a checkpoint
    test_faults.py::test_views_and_shared_memory_are_saved_as_wholes
27 ids without text, half characters
    test_generate.py::test_ids_without_text_are_never_drawn
    test_generate.py::test_streaming_equals_decoding_and_holds_half_characters_back
    test_data.py::test_ids_without_text_are_refused
28 prompts: length, pictures, special tokens
    test_generate.py::test_pictures_and_places_must_agree
    test_generate.py::test_prompt_and_answer_share_the_positions
    test_generate.py::test_mistakes_are_one_line
    test_data.py::test_counts_in_messages
    test_data.py::test_user_text_never_becomes_a_special_token
    test_faults.py::test_a_prompt_of_any_kind
29 malformed boxes
    test_data.py::test_boxes_in_answers
    test_generate.py::test_draw
    test_generate.py::test_boxes_are_labelled_with_the_phrase_before_them
30 memory, options, devices, folders
    test_generate.py::test_no_cuda
    test_generate.py::test_no_weights
    test_generate.py::test_mistakes_are_one_line
    test_train.py::test_wrong_arguments_are_one_line
    test_evaluate.py::test_mistakes_end_in_one_line
    test_run.py::test_a_run_is_not_mixed_with_another
    test_faults.py::test_out_of_memory_comes_with_advice
    test_faults.py::test_folders_that_nobody_can_write_to
31 record files
    test_data.py::test_bad_records_name_the_line
    test_data.py::test_records_with_bom_and_crlf
    test_data.py::test_whole_file_is_checked_and_five_lines_are_shown
    test_faults.py::test_bad_records_from_the_command_lines
32 Ctrl-C
    test_run.py::test_a_run_goes_on_to_the_same_bit
    test_run.py::test_the_second_interrupt_is_not_waited_for
    test_faults.py::test_ctrl_c_before_the_first_step
33 shards
    test_stream.py::test_a_cut_shard_is_used_up_to_the_cut
    test_stream.py::test_useless_pairs_are_skipped_and_named
    test_stream.py::test_a_shard_that_vanished_is_skipped
"""


def test_every_fault_has_tests():
    assert re.findall(r"^\d+(?=.*\n    test_)", COVERED, re.M) == [str(n) for n in range(1, 34)]
    named = set(re.findall(r"^    (\S+)$", COVERED, re.M))
    for file in {name.split("::")[0] for name in named}:
        tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
        there = {f"{file}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert {name for name in named if name.startswith(file)} <= there


# ---- weights (3, 4, 5) ----
@pytest.mark.parametrize("content, reason", [
    (b"", "is not a safetensors file"),
    (b"<!DOCTYPE html><p>404", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a git-lfs pointer"),
    (write_safetensors(TWO, b"123456"), "is not a safetensors file"),
    (write_safetensors({"\x1b[2J": TWO["b"]}, b"1234"), "is not a safetensors file"),
    (write_safetensors({"a\n\x1b[2J": TWO["a"]}, b"1234"), "unexpected tensor a\ufffd\ufffd[2J"),
    (write_safetensors({"a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}, b"123"),
     "is not a safetensors file"),
])  # fmt: skip
def test_damaged_weights_from_the_command_lines(content, reason, weights, drawing, refusal):
    path, tmp_path = weights / "stage4" / "model.safetensors", weights.parent
    path.write_bytes(content)
    records = tmp_path / "a.jsonl"
    records.write_text('{"image": "x.png", "task": "caption", "caption": "a dog"}')
    for call in (
        (generate.main, "--weights", weights, "--img", drawing),
        (quantize.main, "--weights", weights, "--out", tmp_path / "int8"),
        (export.main, "--weights", weights, "--out", tmp_path / "out.pth"),
        (evaluate.main, "bench=jsonl", f"data={records}", f"weights={weights}"),
        (train.main, "stage=4", "from_stage=4", f"weights={weights}", f"out={tmp_path / 'run'}"),
    ):  # fmt: skip
        told = refusal(*call)
        size = "" if reason.startswith("unexpected") else f" ({len(content)} bytes)"
        assert str(path) + size in told and reason in told
    assert not list(tmp_path.glob("int8/*")) and not (tmp_path / "out.pth").exists()


def test_a_model_with_a_tokenizer_of_another_is_refused(weights, drawing, refusal):
    """Its larger ids would be looked up beyond the end of the embeddings."""
    for path in (SHIPPED / name for name in ("vocab.json", "merges.txt", "added_tokens.json")):
        shutil.copy(path, weights)
    told = refusal(generate.main, "--weights", weights, "--img", drawing)
    assert str(weights) in told and "do not belong together" in told


@pytest.mark.parametrize("key, value", [
    ("vision.num_heads", 3), ("vision.num_layers", 10**9), ("vision.num_layers", "1"),
    ("vision.image_size", 29), ("qformer.cross_attention_freq", 0), ("phi.num_heads", 5),
    ("phi.partial_rotary_factor", 1.5), ("phi.partial_rotary_factor", 0.4),
    ("phi.rope_theta", float("nan")), ("phi.hidden_size", -24), ("phi.qk_norm", 1),
    ("phi.resid_dropout", None), ("lora.alpha", 1.5), ("lora.dropout", 2), ("stage", 5),
    ("int8", "no"), ("backbones", 3),
])  # fmt: skip
def test_a_configuration_that_no_model_can_have_names_the_key(weights, key, value):
    path = weights / "stage4" / "config.json"
    values = json.loads(path.read_text())
    *part, name = key.split(".")
    (values[part[0]] if part else values)[name] = value
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="config.json does not describe a model: .*") as error:
        TinyGPTV.from_pretrained(weights)
    assert name in str(error.value) or name == "backbones" or "channels" in str(error.value)


def test_deeply_nested_json_is_refused(weights, tmp_path):
    """Python's limit of recursion is no ValueError."""
    nested = '{"a": ' + "[" * 100_000
    (weights / "stage4" / "config.json").write_text(nested)
    with pytest.raises(ValueError, match="config.json"):
        TinyGPTV.from_pretrained(weights)
    for name in ("vocab.json", "added_tokens.json"):
        write_weights(tmp_path)
        (tmp_path / name).write_text(nested)
        with pytest.raises(ValueError, match="cannot read the tokenizer files"):
            data.Tokenizer(tmp_path)
    for name, read in (("data.jsonl", data.read_records), ("a.json", convert.read_json),
                       ("a.json", lambda path: list(convert.read_list(path))),
                       ("config.json", load.read_json),
                       ("mixture.json", lambda path: stream.read_mixture(path.parent, 4))):
        (tmp_path / name).write_text("[" + nested)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize("file, change, reason", [
    ("vocab.json", {"!": 1}, "two tokens have the same id"),
    ("vocab.json", {"!": "1"}, "the id of '!' is '1'"),
    ("vocab.json", {"!": -1}, "the id of '!' is -1"),
    ("vocab.json", {"!": 10**30}, "the id of '!' is 1000"),
    ("added_tokens.json", {"": 300}, "the id of '' is 300"),
    ("added_tokens.json", {"  ": None}, "the id of '  ' is None"),
])  # fmt: skip
def test_tokens_need_ids_of_their_own(weights, file, change, reason):
    path = weights / file
    values = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps(values | change), "utf-8")
    with pytest.raises(ValueError, match=reason) as error:
        data.Tokenizer(weights)
    assert str(weights) in str(error.value)


def test_merges_of_characters_that_are_no_bytes_are_refused(weights):
    vocab = json.loads((weights / "vocab.json").read_text("utf-8"))
    (weights / "vocab.json").write_text(json.dumps(vocab | {"日本": 257}), "utf-8")
    (weights / "merges.txt").write_text("日 本\n", "utf-8")
    with pytest.raises(ValueError, match="do not belong together .*日本"):
        data.Tokenizer(weights)


# ---- what is saved (2, 22, 26, 30) ----
def test_what_is_saved_are_tensors_and_plain_values(small, tmp_path):
    """The state of training: test_run.py reads it with weights_only=True."""
    model = TinyGPTV.from_pretrained(small)
    export.export_checkpoint(model, model.checkpoint_tensors(), tmp_path / "a.pth")
    assert set(torch.load(tmp_path / "a.pth", weights_only=True)) == {"model"}
    save_checkpoint(model, tmp_path / "b")
    assert load_file(tmp_path / "b" / "model.safetensors")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["stage"] == 4


def test_views_and_shared_memory_are_saved_as_wholes(small, tmp_path):
    model = TinyGPTV.from_pretrained(small)
    weight = model.projector.fc1.weight
    weight.data = weight.data.T.contiguous().T  # lies in memory column by column
    assert not weight.is_contiguous()
    first, second = (layer.input_layernorm.weight for layer in model.phi.layers[:2])
    second.data = first.data
    save_checkpoint(model, tmp_path / "a")
    export.export_checkpoint(model, model.checkpoint_tensors(), tmp_path / "a.pth")
    again = TinyGPTV.from_pretrained(tmp_path / "a")
    assert torch.equal(again.projector.fc1.weight, weight)
    assert torch.equal(again.phi.layers[1].input_layernorm.weight, first)


def killed_while_saving(path: Path) -> None:
    with replace_file(path) as part:
        part.write_bytes(b"half of the new one")
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_in_the_middle_of_a_save(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")
    process = multiprocessing.get_context("fork").Process(target=killed_while_saving, args=[path])
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and path.read_bytes() == b"the old one"
    with replace_file(path) as part:  # what was left behind is in nobody's way
        part.write_bytes(b"the new one")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_folders_that_nobody_can_write_to(small, tmp_path, refusal):
    """A folder inside a file: even the superuser, who may write anywhere, can't make it."""
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "run"
    assert str(out) in refusal(train.main, "stage=1", f"out={out}")
    assert str(out) in refusal(quantize.main, "--weights", small, "--out", out)
    assert str(out) in refusal(export.main, "--weights", small, "--out", out / "a.pth")
    assert str(out) in refusal(convert.main, "gqa", "--src", tmp_path, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


# ---- pictures (11 to 14) ----
@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_from_the_command_lines(kind, small, tmp_path, refusal, capsys):
    path = bad_picture(tmp_path, kind)
    told = refusal(generate.main, "--weights", small, "--img", path)
    assert f"cannot read the image {path}: " in told
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"image": path.name, "task": "caption", "caption": "a dog"})
    )
    assert evaluate.main(["bench=jsonl", f"data={tmp_path / 'a.jsonl'}", f"weights={small}"]) == 2
    *_, told = capsys.readouterr().err.splitlines()  # a progress bar may stand before it
    named = tmp_path / "a.jsonl" if kind in ("missing", "folder") else path  # those are records
    assert told.startswith("error: ") and str(named) in told and path.name in told


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    """Below Pillow's own limit, which is 178 million, and above. Nothing is allocated for them."""
    path = tmp_path / "a.png"
    monkeypatch.setattr(data, "_to_rgb", lambda image: pytest.fail("decoded"))
    for size in ((12_000, 10_000), (70_000, 1), (20_000, 20_000)):
        write_png_that_says(path, *size)
        with pytest.raises(ValueError, match="a.png: it has too many pixels; at most 100,000,000 "
                                             "are read, and 65,535 a side: make it smaller$"):
            data.load_image(path)


def test_a_jpeg_damaged_in_the_middle_decodes(tmp_path):
    """Nobody can tell: load_image says so."""
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    whole, content = data.load_image(path), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert data.load_image(path).tobytes() != whole.tobytes()
    assert "goes unnoticed" in data.load_image.__doc__


# ---- numbers (20) ----
@pytest.mark.parametrize("qk_norm", [True, False])
def test_norms_keep_fp16_from_overflowing(qk_norm):
    """The norm on q and k is there for that: without it the same attention fails."""
    x = torch.full((1, 4, 24), 300.0, dtype=torch.float16)  # whose square fp16 does not hold
    assert torch.allclose(RMSNorm(24, 1e-6)(x), torch.ones(1, 4, 24))
    attention = Attention(replace(CONFIG, qk_norm=qk_norm), 0)
    torch.nn.init.normal_(attention.qkv.weight, generator=torch.Generator().manual_seed(0))
    mask = causal_mask(None, 4, 4, x.device)
    cos_sin = rotary_cos_sin(torch.arange(4)[None], 4, 10000.0)
    maps = []
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        attention(x, cos_sin, mask, maps=maps)
    assert maps[0].isfinite().all() == qk_norm


def test_products_in_fp16_on_a_cpu_bring_a_warning(small):
    """The command line refuses them. The fp16 embeddings of int8 are looked up, not multiplied."""
    with pytest.warns(UserWarning, match="a CPU multiplies fp16 very slowly; use bf16 or fp32"):
        TinyGPTV.from_pretrained(small, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, int8 in ((None, False), (torch.bfloat16, False), (None, True)):
            TinyGPTV.from_pretrained(small, dtype=dtype, int8=int8)


# ---- prompts (28) ----
def test_a_prompt_of_any_kind(small, drawing, refusal, capsys):
    ask = ["--weights", small, "--img", drawing, "--max-new-tokens", "2", "--task", "detection"]
    told = refusal(generate.main, *ask, "--ask", "a" * 500)
    assert "positions; this model has 256" in told
    assert "<ImageHere>" in refusal(generate.main, *ask, "--ask", "x <ImageHere> y")
    for text in ("<|endoftext|>###[/INST] {}{0}%s \\ '\"", "\udcff\x00\x1b 🙂", "{<1><2><3><4>}"):
        assert generate.main([*map(str, ask), "--ask", text]) == 0
        assert "cut after 2 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("character", ["a", " ", "\n", "!", "\u3000", "\u0301", "🙂"])
def test_a_very_long_word_is_no_standstill(character):
    """Some tokenizers take time that grows with the square of a run, or give up."""
    tokenizer = data.Tokenizer(SHIPPED)
    assert tokenizer.decode(tokenizer.encode(character * 100_000)) == character * 100_000


# ---- records (31) ----
@pytest.mark.parametrize("line, reason", [
    ('{"image": "../x.png", "task": "caption", "caption": "a"}', "'../x.png' is not in the folder"),
    ('{"image": "a\\n\\u001b[2J.png", "task": "caption", "caption": "a"}', r"'a\n\x1b[2J.png'"),
    ('{"task": "\\u001b[2J"}', r'"task" must be one of'),
    ('{"task": "refer", "image": "x.png", "phrase": "a", "boxes": [[1, 2, 3, 1%s]]}' % ("0" * 400),
     '"boxes" must be like'),
    ("{", "not JSON"),
])  # fmt: skip
def test_bad_records_from_the_command_lines(line, reason, small, drawing, refusal, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image": "x.png", "task": "caption", "caption": "a dog"}\r\n' + line)
    out = tmp_path / "run"
    told = refusal(train.main, "stage=4", f"data={path}", "num_workers=0", f"out={out}")
    assert f"{path} has 1 bad lines: line 2: " in told and reason in told and len(told) < 500
    told = refusal(evaluate.main, "bench=jsonl", f"data={path}", f"weights={small}")
    assert "line 2" in told and reason in told


def test_a_file_without_lines_is_not_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(b"\xff" * 50_000)
    with pytest.raises(ValueError, match="a.jsonl has 50 bad lines: line 1: not JSON") as error:
        data.read_records(tmp_path / "a.jsonl")
    assert len(str(error.value)) < 1000


# ---- memory, Ctrl-C (30, 32) ----
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
])  # fmt: skip
def test_out_of_memory_comes_with_advice(drawing, monkeypatch, refusal, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(TinyGPTV, "from_pretrained", fail)
    told = refusal(generate.main, "--img", drawing)
    assert told == ("error: out of memory; use --dtype bf16 or --int8, "
                    "or --device cpu if it was the GPU's\n")  # fmt: skip
    told = refusal(train.main, "stage=1", f"out={tmp_path / 'run'}")
    assert "checkpointing=1" in told and "micro_batch_size=1" in told


def test_ctrl_c_before_the_first_step(monkeypatch, refusal, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare_model", interrupted)
    told = refusal(train.main, "stage=1", f"out={tmp_path / 'run'}", code=130)
    assert told == "stopped\n"
