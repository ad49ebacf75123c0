"""The official files, in every form in which they are found, and in every damaged one.

A folder is written here from the golden weights: small numbers, but exactly the official names,
layouts and containers. test_golden.py holds the names and shapes of the official size.
"""

import argparse
import ctypes
import functools
import json
import re
import shutil
import struct
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import quantize
import train
from golden_case import Case, full_config, full_weights, qformer_config
from model import ModelConfig, TinyGPTV, is_trainable
from official import checkpoints, export, load
from official.checkpoints import in_dtype, release, save_checkpoint
from official.export import export_checkpoint
from official.load import Filling, open_official, open_weights
from official.weights import by_blocks, from_official, to_official
from test_fuzz import forget_peak, memory
from vision import VisionConfig

ROOT = Path(__file__).resolve().parent.parent

EVA, QFORMER, PHI, STAGE = (
    "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "phi-2", "TinyGPT-V_for_Stage4.pth",
)  # fmt: skip


@pytest.fixture(scope="module")
def case(golden):
    return functools.cache(lambda name: Case(golden, name))


# ---- writing official files ----
def below(weights, prefix):
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def eva_file(case):
    """All of the ViT, a block too many, and a head."""
    vit = below(full_weights(case), "visual_encoder.")
    last = max(int(found[1]) for n in vit if (found := re.match(r"blocks\.(\d+)", n)))
    extra = {n.replace(f"blocks.{last}.", f"blocks.{last + 1}."): t for n, t in vit.items()}
    return vit | extra | {"norm.weight": torch.ones(3), "head.bias": torch.ones(3)}


def qformer_file(case):
    weights = full_weights(case)
    names = [n for n in weights if re.match("Qformer|query_tokens|ln_vision", n)]
    return {n: weights[n] for n in names} | {"t5_proj.weight": torch.ones(2, 2)}


def phi_file(case, layout):
    """Phi-2 without TinyGPT-V's norms: as the official code reads it ("fused"), as it is today
    ("split"), or as Microsoft released it ("microsoft")."""
    fused = below(full_weights(case, lora=False), "llama_model.")
    fused = {n: t for n, t in fused.items() if not re.search("[qk]_layernorm|post_layernorm", n)}
    if layout == "fused":
        return fused
    num_heads = full_config(case, 1).phi.num_heads
    tensors = {}
    for name, tensor in fused.items():
        if ".query_key_value." not in name:
            tensors[name] = tensor
        elif layout == "microsoft":
            tensors[name] = by_blocks(tensor, num_heads)
        else:
            for x, part in zip("qkv", by_blocks(tensor, num_heads).chunk(3)):
                tensors[name.replace("query_key_value", f"{x}_proj")] = part
    if layout == "split":
        return tensors
    microsoft = (
        ("model.layers.", "transformer.h."), ("self_attn.query_key_value", "mixer.Wqkv"),
        ("self_attn.dense", "mixer.out_proj"), ("input_layernorm", "ln"),
        ("model.embed_tokens", "transformer.embd.wte"), ("lm_head.", "lm_head.linear."),
        ("model.final_layernorm", "lm_head.ln"),
    )  # fmt: skip
    for old, new in microsoft:
        tensors = {n.replace(old, new): t for n, t in tensors.items()}
    return tensors | {"transformer.h.0.mixer.rotary_emb.inv_freq": torch.ones(2)}


def checkpoint_file(case, lora=True):
    """What the stages train, with the buffer that the official checkpoints have as well."""
    weights, config = full_weights(case, lora), full_config(case, 4 if lora else 1, lora)
    ours, _ = from_official(weights, config)
    trained = to_official({n: t for n, t in ours.items() if is_trainable(n)}, config)
    return trained | {"Qformer.bert.embeddings.position_ids": torch.arange(16)[None]}


def runner_file(tensors):
    """The container of the official runner."""
    optimizer = {"state": {0: {"exp_avg": torch.zeros(5), "step": 3}}, "param_groups": []}
    config = {"run": {"task": "image_text_pretrain", "init_lr": 1e-4}}
    return {"model": tensors, "optimizer": optimizer, "config": config, "scaler": None, "epoch": 3}


def save_phi(tensors, folder, container):
    """In one file or two, as safetensors or pickles, with the index that two files have."""
    kind, count = container
    names = sorted(tensors, reverse=True)  # k, q and v of a layer come to lie in two files
    shards = [names[n::count] for n in range(count)]
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    files = {f"{stem}-{n + 1:05}-of-{count:05}.{ending}": shard for n, shard in enumerate(shards)}
    if count == 1:
        files = {f"{stem}.{ending}": names}
    for file, shard in files.items():
        held = {name: tensors[name].contiguous() for name in shard}
        save = save_file if ending == "safetensors" else torch.save
        save(held, folder / file)
    if count > 1:
        weight_map = {name: file for file, shard in files.items() for name in shard}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(case, golden, tmp_path):
    """A folder as official/fetch.py fills it, and one checkpoint."""
    torch.save({n: t.half() for n, t in eva_file(case).items()}, tmp_path / EVA)
    torch.save({"model": qformer_file(case)}, tmp_path / QFORMER)
    shutil.copytree(golden / "tokenizer_files", tmp_path / PHI)
    (tmp_path / PHI / "config.json").write_text(json.dumps({"partial_rotary_factor": 0.5}))
    save_phi(phi_file(case, "split"), tmp_path / PHI, ("safetensors", 2))
    torch.save(runner_file(checkpoint_file(case)), tmp_path / STAGE)
    return tmp_path


def load_official(folder, stage=None, dtype=None, config=None):
    model, tensors = open_official(folder, stage, "cpu", dtype, config=config)
    model.load_state_dict(dict(tensors), assign=True)
    return model.eval()


def load_small(case, folder, stage=None, dtype=torch.float32, lora=True):
    config = full_config(case, stage or 4, lora)
    return load_official(folder, stage, dtype=dtype, config=config)


def expected_state(case, lora=True):
    state, _ = from_official(full_weights(case, lora), full_config(case, 4, lora))
    return {n: t.half().float() if n.startswith("visual") else t for n, t in state.items()}


def begun(state):
    """`state` with the biases of TinyGPT-V's norms as training begins: no file holds them."""
    return {n: torch.zeros_like(t) if re.search(r"[qk]_layernorm\.bias", n) else t
            for n, t in state.items()}  # fmt: skip


def assert_same(state, expected):
    assert set(state) == set(expected)
    different = [name for name in state if not torch.equal(state[name], expected[name])]
    assert not different


# ---- what loads ----
@pytest.mark.parametrize("layout", ["fused", "split", "microsoft"])
@pytest.mark.parametrize("container", [("safetensors", 2), ("safetensors", 1), ("bin", 2),
                                       ("bin", 1)])  # fmt: skip
def test_every_layout_and_container_of_phi_2(case, folder, layout, container):
    for path in (folder / PHI).glob("model*"):
        path.unlink()
    save_phi(phi_file(case, layout), folder / PHI, container)
    assert_same(load_small(case, folder).state_dict(), begun(expected_state(case)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_in_half_precision(case, folder, dtype):
    file = torch.load(folder / STAGE, weights_only=True)
    torch.save({"model": {n: t.to(dtype) for n, t in file["model"].items()}}, folder / STAGE)
    state = load_small(case, folder).state_dict()
    expected = begun(expected_state(case))
    assert_same(state, {n: t.to(dtype).float() if is_trainable(n) else t
                        for n, t in expected.items()})  # fmt: skip


def test_frozen_matrices_alone_become_half_precision(case, folder):
    """What is trained, the norms, and the positions of the ViT stay as exact as they were."""
    state = load_small(case, folder, dtype=torch.bfloat16).state_dict()
    whole = [n for n, t in state.items() if t.dtype == torch.float32]
    assert {n for n in state if is_trainable(n)} <= set(whole)
    assert {n for n in state if "norm" in n} <= set(whole)
    assert {"visual_encoder.pos_embed", "qformer.query_tokens"} <= set(whole)
    halves = {t.dtype for n, t in state.items() if n not in whole}
    assert halves == {torch.bfloat16} and "phi.lm_head.weight" not in whole
    assert "visual_encoder.blocks.0.attn.qkv.weight" not in whole


@pytest.mark.parametrize("old, new", [
    ("llama_model.", "module.llama_model."),  # DistributedDataParallel
    ("lora_A.", "lora_A.default."),  # newer versions of PEFT
])  # fmt: skip
def test_checkpoints_with_other_names(case, folder, old, new):
    tensors = {n.replace(old, new, 1): t for n, t in checkpoint_file(case).items()}
    torch.save({"model": tensors}, folder / STAGE)
    assert_same(load_small(case, folder).state_dict(), begun(expected_state(case)))


def test_stage_1_has_another_prefix_and_no_lora(case, folder):
    torch.save(runner_file(checkpoint_file(case, lora=False)), folder / "TinyGPT-V_for_Stage1.pth")
    model = load_small(case, folder, stage=1, lora=False)
    assert_same(model.state_dict(), begun(expected_state(case, lora=False)))


def manifest_keys(golden):
    """The names in the first release of stage 4."""
    path = golden / "manifests" / "TinyGPT-V_for_Stage4.pth.older_code.json"
    return json.loads(path.read_text())["keys"]


def test_the_first_release_of_stage_4_brings_its_own_qformer(
    case, folder, golden, tmp_path_factory
):  # fmt: skip
    weights, config = full_weights(case), full_config(case, 4)
    own = {n: t + 1 for n, t in weights.items() if re.match("Qformer|query_tokens", n)}
    tensors = checkpoint_file(case) | own
    del tensors["llama_model.base_model.model.model.final_layernorm.weight"]
    torch.save(runner_file(tensors), folder / STAGE)
    expected = expected_state(case) | from_official(own, config)[0]
    assert {n for n in manifest_keys(golden) if "Qformer" not in n and "llama" not in n} == {
        "query_tokens"
    }  # no ln_vision
    model = load_small(case, folder)
    assert_same(model.state_dict(), begun(expected))
    assert "the Q-Former, 2 tensors loaded" in model.load_report  # ln_vision is BLIP-2's
    assert f"{len(own) - 1} ignored (the checkpoint has its own)" in model.load_report

    export_checkpoint(model, model.checkpoint_tensors(), folder / "out.pth")
    exported = torch.load(folder / "out.pth", weights_only=True)["model"]
    assert set(exported) >= set(tensors)
    assert all(torch.equal(exported[n], t) for n, t in tensors.items() if t.is_floating_point())

    run = tmp_path_factory.mktemp("runs") / "stage4"  # the same, saved in our own format
    save_checkpoint(model, run)
    for path, query_tokens in ((folder / STAGE, "query_tokens"),
                               (run / "model.safetensors", "qformer.query_tokens")):  # fmt: skip
        change(path, drop(query_tokens))
    (folder / "out.pth").unlink()
    reason = r"lacks qformer.query_tokens \(officially query_tokens\), though it brings a Q-Former"
    with pytest.raises(ValueError, match=f"Stage4.pth {reason} of its own; fetch it again"):
        load_small(case, folder)
    with pytest.raises(ValueError, match="stage4.*: 1 tensors are missing, first qformer.query_"):
        TinyGPTV.from_pretrained(run)


def test_without_a_checkpoint_the_new_parts_are_as_training_begins(case, folder):
    linear = {n: t for n, t in checkpoint_file(case).items() if n.startswith("llama_proj.")}
    torch.save(runner_file(linear), folder / "prerained_minigpt4_7b.pth")
    model = load_small(case, folder, stage=0, lora=False)
    assert torch.equal(model.projector.fc1.weight, linear["llama_proj.weight"])
    for block in model.phi.layers:
        for norm in (block.self_attn.q_layernorm, block.self_attn.k_layernorm):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
        assert (block.post_layernorm.weight == 1).all()
    assert "nonsense" in model.load_report


def test_the_last_stage_is_the_default(case, folder):
    torch.save(runner_file(checkpoint_file(case)), folder / "TinyGPT-V_for_Stage2.pth")
    assert "Stage4" in load_small(case, folder).load_report
    assert "Stage4" not in load_small(case, folder, stage=2).load_report
    assert "\nstage 4: " in load_small(case, folder).load_report
    with pytest.raises(FileNotFoundError, match="no checkpoint of stage 3; stages found: 2, 4"):
        load_small(case, folder, stage=3)


def test_a_checkpoint_that_does_not_say_its_stage(case, folder):
    """The official runner writes checkpoint_3.pth, perhaps into a folder of the stage's name."""
    (folder / STAGE).rename(folder / "checkpoint_3.pth")
    with pytest.raises(ValueError, match="which stage .*checkpoint_3.pth is of; say it with"):
        load_small(case, folder)
    assert load_small(case, folder, stage=2).stage == 2
    (folder / "XGPTv2_stage3").mkdir()
    (folder / "checkpoint_3.pth").rename(folder / "XGPTv2_stage3" / "checkpoint_3.pth")
    with pytest.raises(FileNotFoundError, match="stages found: 3"):
        load_small(case, folder, stage=2)


def test_linked_folders_are_looked_into(case, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("models") / PHI
    (folder / PHI).rename(elsewhere)
    (folder / PHI).symlink_to(elsewhere)
    assert len(load_small(case, folder).tokenizer) == 50295


def test_clip_instead_of_eva(case, folder):
    """The folder's ViT decides; its Q-Former's file is of BLIP-2's first stage."""
    vit, qformer = case("clip/clip_vit"), case("clip/clip_qformer")
    (folder / EVA).unlink()
    torch.save(vit.below("w/"), folder / "clip_vit_L.pth")
    torch.save({"model": qformer.below("w/")}, folder / QFORMER)
    parts = load.find_parts(folder)
    assert set(parts) == {load.CLIP, load.QFORMER, load.PHI, load.CHECKPOINT}
    config = load.full_config(parts, parts[load.CHECKPOINT][0], 4)
    assert config.vision.clip and config.qformer.vision_hidden_size == 1024

    meta = vit.meta["config"]
    config = full_config(case, 4)
    config.vision = VisionConfig(
        meta["img_size"], meta["patch_size"], meta["width"], meta["layers"], meta["heads"],
        meta["mlp_hidden"], meta["norm_eps"], clip=True,
    )  # fmt: skip
    config.qformer = qformer_config(qformer.meta["config"])
    config.projector.in_features = config.qformer.hidden_size
    trained = {n: t for n, t in checkpoint_file(case).items() if n != "llama_proj.weight"}
    wider = torch.ones(config.projector.mid_features, config.projector.in_features)
    torch.save({"model": trained | {"llama_proj.weight": wider}}, folder / STAGE)
    model = load_official(folder, dtype=torch.float32, config=config)
    features = model.visual_encoder(vit["in/image"])
    assert (features - vit["out/features"]).abs().max() < 1e-4
    queries = model.qformer(qformer["in/image_features"])
    assert (queries - qformer["out/last_hidden_state"]).abs().max() < 1e-4


def test_how_much_rotates_is_what_phi_2_says(case, folder):
    parts = load.find_parts(folder)
    config = load.full_config(parts, parts[load.CHECKPOINT][0], 4)
    assert config.phi.partial_rotary_factor == 0.5 and config.stage == 4
    (folder / PHI / "config.json").unlink()
    assert load.full_config(parts, None, 0).phi.partial_rotary_factor == 0.4


def test_the_report_accounts_for_every_tensor(case, folder):
    model = load_small(case, folder)
    lines = model.load_report.splitlines()
    held = {EVA: eva_file(case), QFORMER: qformer_file(case), STAGE: checkpoint_file(case)}
    for name, tensors in held.items():
        (line,) = [line for line in lines if name in line]
        assert sum(map(int, re.findall(r"(\d+) (?:tensors|ignored)", line))) == len(tensors)
        assert "ignored (" in line
    biases = [n for n in model.state_dict() if re.search(r"[qk]_layernorm\.bias", n)]
    assert f"{sum(p.numel() for p in model.parameters()):,}" in lines[-1]
    assert f"{len(biases)} tensors that no file has" in lines[-1]


# ---- and back ----
@pytest.mark.parametrize("lora", [False, True])
def test_export_gives_back_the_official_checkpoint(case, folder, lora):
    stage = 4 if lora else 1
    original = checkpoint_file(case, lora)
    torch.save(runner_file(original), folder / f"TinyGPT-V_for_Stage{stage}.pth")
    model = load_small(case, folder, stage, lora=lora)
    export_checkpoint(model, model.checkpoint_tensors(), folder / "out.pth")
    exported = torch.load(folder / "out.pth", weights_only=True)["model"]
    buffer = "Qformer.bert.embeddings.position_ids"
    assert torch.equal(exported.pop(buffer), torch.arange(512)[None])
    assert_same(exported, {n: t for n, t in original.items() if n != buffer})


@pytest.mark.parametrize("own_qformer", [False, True])
def test_what_was_trained_on_top_loads_again_and_is_exported(
    case, folder, own_qformer, tmp_path_factory, capsys
):  # fmt: skip
    own = {}
    if own_qformer:
        weights = full_weights(case).items()
        own = {n: t + 1 for n, t in weights if re.match("Qformer|query_tokens", n)}
        change(folder / STAGE, lambda tensors: tensors.update(own))
    model = load_small(case, folder)
    train.set_trainable(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.125
    run = tmp_path_factory.mktemp("runs") / "stage4"
    save_checkpoint(model, run)
    again = TinyGPTV.from_pretrained(run, dtype=torch.float32)
    total = sum(p.numel() for p in model.parameters())
    assert f"\nstage 4: {total:,} parameters, every one accounted for; " in again.load_report
    assert "nonsense" not in again.load_report
    assert_same(again.state_dict(), model.state_dict())
    assert again.carried == model.carried == set(from_official(own, model.config)[0])
    assert EVA in again.load_report and len(again.tokenizer) == 50295

    assert export.main(["--weights", str(run), "--out", str(run / "out.pth")]) == 0
    assert "out.pth: 21 tensors of stage 4" in capsys.readouterr().out or own_qformer
    ours, _ = from_official(torch.load(run / "out.pth", weights_only=True)["model"], model.config)
    assert_same(ours, {n: t for n, t in model.state_dict().items() if n in ours})
    assert set(ours) == {n for n in model.state_dict() if is_trainable(n)} | model.carried
    assert TinyGPTV.from_pretrained(run).stage == 4  # out.pth in it does not make it official


def test_export_says_where_it_can_not_write(tmp_path, capsys):
    out = tmp_path / "missing" / "out.pth"
    assert export.main(["--weights", str(tmp_path), "--out", str(out)]) == 2
    assert "a folder that exists" in capsys.readouterr().err


# ---- what does not load ----
class Malicious:
    def __reduce__(self):
        return print, ("this must not be printed",)


def write_malicious(path):
    torch.save({"model": Malicious()}, path)


def write_objects(path):
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}, path)


def write_safetensors(header, data):
    """A safetensors file by hand: length of the header, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
TWO = ONE | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}
FAR = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}}


@pytest.mark.parametrize("write", [write_malicious, write_objects])
def test_pickles_of_more_than_tensors_are_not_opened(tmp_path, capsys, write):
    write(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth .* holds something else than tensors.*not opened"):
        open_weights(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content, reason", [
    (b"", r"\(0 bytes\) is .*damaged or cut off"),
    (b"<!DOCTYPE html><html>404", r"\(24 bytes\) is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "is a git-lfs pointer"),
    (b"PK\x03\x04 not much of an archive", "is damaged or cut off"),
    (b"\x80\x02 not much of a pickle", "is damaged or cut off"),
    (write_safetensors(ONE, b"1234")[:5], "is damaged or cut off"),  # in the length
    (write_safetensors(ONE, b"1234")[:30], "is damaged or cut off"),  # in the header
    (write_safetensors(ONE, b"12"), "is damaged or cut off"),  # in the data
    (write_safetensors(ONE, b"123456"), "is damaged or cut off"),  # data to spare
    (write_safetensors(b"{not json", b"1234"), "is damaged or cut off"),
    (write_safetensors(TWO, b"123456"), "is damaged or cut off"),  # overlapping
    (write_safetensors(FAR, b"1234"), "is damaged or cut off"),  # far beyond the end
])  # fmt: skip
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_damaged_files_are_named_with_their_size_and_what_to_do(tmp_path, content, reason, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{reason}.*fetch it again") as error:
        open_weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", range(1, 400, 37))
def test_old_pickles_that_were_cut_off(tmp_path, length):
    path = tmp_path / "a.pth"
    torch.save({"llama_proj.bias": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert open_weights(path).part == load.PROJECTION
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"a.pth \({length} bytes\) .* fetch it again"):
        open_weights(path)  # a name that was cut off is a forbidden one


def test_a_checkpoint_that_was_cut_off(folder):
    whole = (folder / STAGE).read_bytes()
    (folder / STAGE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{STAGE} \({len(whole) // 2:,} bytes\) is damaged"):
        open_weights(folder / STAGE)


def test_files_that_are_no_part_of_the_model(tmp_path):
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no part of TinyGPT-V .it begins with conv.weight"):
        open_weights(tmp_path / "a.safetensors")
    for content in ([torch.ones(1)], {0: torch.ones(1)}, {"a": 1}):
        torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="a.pth .* is not a table of tensors"):
            open_weights(tmp_path / "a.pth")


def change(path, edit):
    """Rewrites a file with its tensors edited in place."""
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    tensors = content.get("model", content)
    edit(tensors)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(content, path)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def spoil(name, value):
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


SHARD = "model-00001-of-00002.safetensors"
LORA = "llama_model.base_model.model.model.layers.0.self_attn.query_key_value.lora_B.weight"


@pytest.mark.parametrize("file, edit, reason", [
    (EVA, drop("blocks.0.norm1.weight"),
     r"no file holds visual_encoder.blocks.0.norm1.weight \(officially blocks.0.norm1.weight\), "
     r"shape \(24,\); it belongs in .*eva_vit_g.pth; fetch it again"),
    (QFORMER, drop("query_tokens"),
     r"no file holds qformer.query_tokens \(officially query_tokens\), .* in .*flant5xxl.pth; fe"),
    (f"{PHI}/{SHARD}", drop("model.layers.0.mlp.fc1.weight"),
     r"no file holds phi.layers.0.mlp.fc1.weight \(officially model.layers.0.mlp.fc1.weight\), .*"
     "belongs in .*00001-of-00002.safetensors or .*00002-of-00002.safetensors; fetch it again"),
    (STAGE, drop(LORA),
     rf"Stage4.pth lacks phi.layers.0.self_attn.qkv.lora_B.weight \(officially {LORA}\), which "
     "every stage trains; fetch it again"),
    (STAGE, drop("llama_proj2.bias"), r"lacks projector.fc2.bias \(officially llama_proj2.bias\)"),
    (STAGE, drop("llama_model.base_model.model.model.layers.0.input_layernorm.weight"),
     "Stage4.pth lacks phi.layers.0.input_layernorm.weight"),
    (EVA, put("blocks.0.attn.extra", torch.ones(1)), "g.pth: unexpected tensor .*attn.extra"),
    (QFORMER, put("Qformer.extra", torch.ones(1)), "xxl.pth: Qformer.extra is no tensor of"),
    (STAGE, put("llama_proj3.bias", torch.ones(1)), "Stage4.pth: llama_proj3.bias is no tensor"),
    (EVA, put("blocks.0.norm1.weight", torch.ones(3)),
     r"g.pth: blocks.0.norm1.weight has shape \(3,\), the model needs \(24,\)"),
    (STAGE, put("llama_proj.bias", torch.ones(1, 28)),
     r"Stage4.pth: llama_proj.bias has shape \(1, 28\), the model needs \(28,\)"),
    (STAGE, put(LORA, torch.ones(3, 2)), 
     r"Stage4.pth: .*lora_B.weight has shape \(3, 2\), the model needs \(36, 2\)"),
    (f"{PHI}/{SHARD}", put("model.layers.0.self_attn.v_proj.weight", torch.ones(3, 4)),
     r"safetensors: .*q_proj.weight \(12, 12\), .*v_proj.weight \(3, 4\) should have one shape"),
    (f"{PHI}/model-00002-of-00002.safetensors",
     put("model.layers.0.self_attn.v_proj.bias", torch.ones(3)),
     r"safetensors: .*q_proj.bias \(12,\), .*v_proj.bias \(3,\) should have one shape"),
    (f"{PHI}/{SHARD}", put("model.embed_tokens.weight", torch.ones(3, 4)),
     r"embed_tokens.weight has shape \(3, 4\), the model needs \(\d+, 12\)"),
    (STAGE, put("llama_proj.bias", torch.ones(28, dtype=torch.int8)),
     "Stage4.pth: llama_proj.bias holds torch.int8, not floating-point numbers"),
    (EVA, spoil("pos_embed", float("nan")), "g.pth: pos_embed holds NaN or infinity"),
    (QFORMER, spoil("query_tokens", float("inf")), "xxl.pth: query_tokens holds NaN or inf"),
    (STAGE, spoil("llama_proj.weight", -float("inf")), "Stage4.pth: llama_proj.weight holds NaN"),
    (f"{PHI}/{SHARD}", put("model.layers.0.mlp.extra", torch.ones(1)),
     f"{SHARD}: model.layers.0.mlp.extra is no tensor of Phi-2"),
])  # fmt: skip
def test_tensors_that_are_not_as_they_must_be(case, folder, file, edit, reason):
    change(folder / file, edit)
    with pytest.raises(ValueError, match=reason):
        load_small(case, folder)


@pytest.mark.parametrize("width", [4096, 5120])
def test_the_projection_of_a_larger_minigpt_4_is_refused(width, tmp_path):
    """A model before stage 1 takes that for Vicuna-7B; the one for Vicuna-13B is too wide."""
    path = tmp_path / "prerained_minigpt4.pth"
    tensors = {"llama_proj.weight": torch.ones(width, 768), "llama_proj.bias": torch.ones(width)}
    torch.save(runner_file(tensors), path)
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("full", 0))
    taken = Filling(model, "cpu", copy=False).take([open_weights(path)])
    if width == 4096:
        assert dict(taken)["projector.fc1.weight"].shape == (4096, 768)
        return
    reason = r"weight has shape \(5120, 768\), the model needs \(4096, 768\); fetch it again"
    with pytest.raises(ValueError, match=reason):
        list(taken)


@pytest.mark.parametrize("where, error", [
    ((load, "check_numbers"), torch.OutOfMemoryError("CUDA out of memory. Tried to get 2 GiB")),
    ((torch, "load"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")),
    ((checkpoints, "load_file"), MemoryError()),
])  # fmt: skip
def test_a_lack_of_memory_is_no_damage(case, folder, golden, where, error, monkeypatch, refusal):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(load, "full_config", lambda *_: full_config(case, 4))
    monkeypatch.setattr(*where, fail)
    image = next((golden / "images").glob("*.png"))
    assert "error: out of memory; use --dtype" in refusal(
        generate.main, "--weights", folder, "--img", image
    )


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.ones(3, 2, 2), torch.ones(0, 2)])
def test_rows_by_head_of_any_shape_are_told(case, folder, tensor):
    change(folder / STAGE, put(LORA, tensor))
    shape = re.escape(str(tuple(tensor.shape)))
    with pytest.raises(ValueError, match=rf"has shape {shape}, the model needs \(36, 2\)"):
        load_small(case, folder)


def test_both_parts_of_phi_2_have_to_be_there(case, folder):
    (folder / PHI / SHARD).unlink()
    with pytest.raises(FileNotFoundError, match=f"{SHARD} is missing; fetch it again"):
        load_small(case, folder)
    (folder / PHI / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"is there, but .* is not|no file holds phi"):
        load_small(case, folder)


@pytest.mark.parametrize("file, part", [(EVA, "EVA's ViT"), (QFORMER, "the Q-Former")])
def test_missing_files_are_named(case, folder, file, part):
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no file of {part}; fetch it again"):
        load_small(case, folder)


def test_the_same_tensor_twice_is_not_a_choice(case, folder):
    save_phi(phi_file(case, "split"), folder / PHI, ("bin", 1))
    with pytest.raises(ValueError, match="model.bin both hold .*; move one of them elsewhere"):
        load_small(case, folder)
    (folder / PHI / "pytorch_model.bin").unlink()
    shutil.copy(folder / STAGE, folder / "copy_of_stage4.pth")
    with pytest.raises(ValueError, match="both of stage 4; move one elsewhere"):
        load_small(case, folder)


@pytest.mark.parametrize("layout", ["fused", "microsoft"])
def test_another_layout_of_phi_2_mixed_in_is_refused(case, folder, layout):
    (folder / "phi-2_old").mkdir()
    save_phi(phi_file(case, layout), folder / "phi-2_old", ("bin", 1))
    with pytest.raises(ValueError, match="both hold .*; move one of them elsewhere"):
        load_small(case, folder)


def test_numbers_that_half_precision_can_not_hold(case, folder):
    change(folder / STAGE, spoil("llama_proj.weight", 1e5))
    assert load_small(case, folder, dtype=torch.float16).projector.fc1.weight.max() == 1e5
    change(folder / QFORMER, spoil("Qformer.bert.encoder.layer.0.output_query.dense.weight", 1e5))
    with pytest.raises(ValueError, match="dense.weight holds numbers too large for torch.float16"):
        load_small(case, folder, dtype=torch.float16)


@pytest.mark.parametrize("file, text, reason", [
    ("model.safetensors.index.json", "version https://git-lfs", "is not a JSON table; fetch"),
    ("config.json", "<html>", r"config.json \(6 bytes\) is not a JSON table; fetch it again"),
    ("config.json", '{"partial_rotary_factor": null}', "partial_rotary_factor is None, not above"),
])  # fmt: skip
def test_damaged_json_is_named(folder, file, text, reason):
    (folder / PHI / file).write_text(text)
    with pytest.raises(ValueError, match=reason):
        load_official(folder)


def test_a_tensor_of_many_rows_comes_in_parts(case, folder, monkeypatch):
    """Not where it is copied: who takes it then wants it as a whole."""
    monkeypatch.setattr(load, "ROWS", 10)
    config, parts = full_config(case, 4), {}
    _, whole = open_official(folder, 4, "cpu", torch.float32, config=config)
    _, tensors = open_official(folder, 4, "cpu", torch.float32, copy=False, config=config)
    for name, tensor in tensors:
        parts.setdefault(name, []).append(tensor)
    assert max(len(part) for some in parts.values() for part in some) == 10
    right = list(whole)
    assert len(right) == len(parts) and len(parts["phi.embed_tokens.weight"]) > 1
    for name, tensor in right:
        assert torch.equal(torch.cat(parts[name]), tensor), name


@pytest.mark.parametrize("read", [
    lambda folder: TinyGPTV.from_pretrained(folder, int8=True, pack=False).state_dict(),
    lambda folder: quantized_file(folder),
], ids=["in memory", "to a file"])  # fmt: skip
def test_parts_are_quantized_as_wholes_are(case, folder, monkeypatch, read):
    monkeypatch.setattr(load, "full_config", lambda *_: full_config(case, 4))
    whole = read(folder)
    rows = whole["phi.layers.0.self_attn.qkv.weight"].shape[0]  # LoRA wants it as a whole
    assert whole["phi.embed_tokens.weight"].shape[0] > rows
    monkeypatch.setattr(load, "ROWS", rows)
    found = read(folder)
    assert found.keys() == whole.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())


def quantized_file(folder):
    with tempfile.TemporaryDirectory() as other:
        quantize.quantize_directory(folder, Path(other) / "int8", None)
        return load_file(Path(other) / "int8" / "model.safetensors")


def test_parts_do_not_outlive_their_whole():
    parts, seen = [torch.ones(n, 3) for n in (2, 2, 1, 4)], []

    def one_by_one():
        alive = [weakref.ref(part) for part in parts]
        for name in "aaab":
            seen.append(sum(part() is not None for part in alive))
            yield name, parts.pop(0)

    expected = {name: torch.empty(n, 3, device="meta") for name, n in (("a", 5), ("b", 4))}
    whole = checkpoints.collected(one_by_one(), expected)
    assert {name: tensor.shape for name, tensor in whole.items()} == {"a": (5, 3), "b": (4, 3)}
    assert seen == [4, 4, 4, 2]  # the last part of "a" is still at hand


def test_a_last_part_that_is_not_finite_is_found(case, folder, monkeypatch):
    monkeypatch.setattr(load, "ROWS", 10)
    change(folder / PHI / SHARD, spoil("model.embed_tokens.weight", float("nan")))
    config = full_config(case, 4)
    _, tensors = open_official(folder, 4, "cpu", torch.float32, copy=False, config=config)
    with pytest.raises(ValueError, match="embed_tokens.weight holds NaN or infinity"):
        list(tensors)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_pages_of_a_file_are_given_back(tmp_path):
    def resident_mb():
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    torch.save({"llama_proj.weight": torch.ones(50, 2**18)}, tmp_path / "a.pth")
    file = open_weights(tmp_path / "a.pth")
    before = resident_mb()
    assert file.tensors["llama_proj.weight"].sum() == 50 * 2**18
    read = resident_mb()
    release(file.path)
    assert read > before + 40 and resident_mb() < before + 10
    assert file.tensors["llama_proj.weight"].sum() == 50 * 2**18


# ---- from the command line ----
def test_the_command_line_reports_once_and_answers(case, folder, golden, monkeypatch, capsys):
    config = full_config(case, 4)
    monkeypatch.setattr(load, "full_config", lambda *_: config)
    image = next((golden / "images").glob("*.png"))
    arguments = ["--weights", str(folder), "--img", str(image), "--max-new-tokens", "3"]
    assert generate.main(arguments) == 0
    output = capsys.readouterr()
    assert output.err.count(EVA) == 1 and "every one accounted for" in output.err
    assert EVA not in output.out


def test_the_command_line_says_in_one_line_what_is_wrong(folder, golden, capsys):
    (folder / EVA).write_text("<html>not found</html>")
    image = next((golden / "images").glob("*.png"))
    assert generate.main(["--weights", str(folder), "--img", str(image)]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert "eva_vit_g.pth (22 bytes) is a web page" in output.err


@pytest.mark.parametrize("file, edit, reason", [
    (EVA, drop("blocks.0.norm1.weight"), "no file holds .*blocks.0.norm1.weight.* in {path}; fe"),
    (STAGE, drop(LORA), "{path} lacks .*officially llama_model.*lora_B.weight.*; fetch it again"),
    (STAGE, put("llama_proj3.bias", torch.ones(1)),
     "{path}: llama_proj3.bias is no tensor of TinyGPT-V; fetch it again"),
    (EVA, put("blocks.0.norm1.weight", torch.ones(3)), "{path}: blocks.0.norm1.weight has shape "
     r"\(3,\), the model needs \(24,\); fetch it again"),
    (STAGE, put(LORA, torch.ones(3, 2)), r"{path}: llama_model.*lora_B.weight has shape \(3, 2\), "
     r"the model needs \(36, 2\); fetch it again"),
    (QFORMER, spoil("query_tokens", float("nan")), "{path}: query_tokens holds NaN or inf.*; fe"),
])  # fmt: skip
def test_the_command_line_names_file_and_tensor(
    case, folder, golden, file, edit, reason, monkeypatch, refusal
):  # fmt: skip
    change(folder / file, edit)
    monkeypatch.setattr(load, "full_config", lambda *_: full_config(case, 4))
    image = next((golden / "images").glob("*.png"))
    told = refusal(generate.main, "--weights", folder, "--img", image)
    assert re.match("error: " + reason.replace("{path}", re.escape(str(folder / file))), told)


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_from_pretrained_knows_a_folder_of_official_files(case, folder, ending, monkeypatch):
    config = full_config(case, 4)
    monkeypatch.setattr(load, "full_config", lambda *_: config)
    for file in (EVA, QFORMER, STAGE) if ending == ".safetensors" else ():
        content = torch.load(folder / file)
        tensors = {n: t.contiguous() for n, t in content.get("model", content).items()}
        save_file(tensors, (folder / file).with_suffix(ending))
        (folder / file).unlink()
    model = TinyGPTV.from_pretrained(folder)
    assert model.phi.lm_head.weight.dtype == torch.bfloat16
    assert len(model.tokenizer) == 50295 and isinstance(model.config, ModelConfig)


def test_an_incomplete_folder_is_told_what_to_do(folder):
    for file in (EVA, QFORMER, STAGE):
        (folder / file).unlink()
    advice = f"python official/fetch.py --out {folder}"
    with pytest.raises(FileNotFoundError, match=f"holds no file of EVA's ViT; .*: {advice}"):
        TinyGPTV.from_pretrained(folder)
    shutil.rmtree(folder / PHI)
    with pytest.raises(FileNotFoundError, match=f"stages found: none; get .* with {advice}"):
        TinyGPTV.from_pretrained(folder)


@pytest.mark.skipif(not memory("VmHWM"), reason="memory is read from /proc")
def test_the_state_of_the_optimizer_stays_unread(case, folder):
    """It is two thirds of a real checkpoint; here it is 100 MB, and nearly all of it."""
    content = torch.load(folder / STAGE)
    content["optimizer"] = {"state": {0: {"exp_avg": torch.ones(25, 2**20)}}, "param_groups": []}
    torch.save(content, folder / STAGE)
    del content
    load_small(case, folder)  # imports and the like
    before = memory("VmRSS")
    forget_peak()
    load_small(case, folder)
    assert memory("VmHWM") - before < 50


def test_fp16_becomes_bf16_as_torch_has_it():
    """All numbers of fp16, and more than one part of them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    tensor = every.repeat(5).view(5, -1).T
    found, expected = in_dtype(tensor, torch.bfloat16, copy=False), tensor.to(torch.bfloat16)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) and tensor.numel() > 2**18
    assert in_dtype(expected, torch.bfloat16, copy=False) is expected
    assert in_dtype(expected, torch.bfloat16, copy=True).data_ptr() != expected.data_ptr()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_the_c_library_keeps_freed_memory(monkeypatch):
    """It says 1 to what it takes."""
    mallopt, told = ctypes.CDLL(None).mallopt, []
    spy = argparse.Namespace(mallopt=lambda *told_now: told.append((*told_now, mallopt(*told_now))))
    monkeypatch.setattr(checkpoints.ctypes, "CDLL", lambda _: spy)
    TinyGPTV.from_pretrained(ROOT / "miniature" / "weights")
    assert told == [(-1, 2**26, 1), (-3, 2**25, 1)]
