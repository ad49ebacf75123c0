"""Our numbers against the official implementation's, part by part and for every training stage.

The expected values were recorded by running the official code (golden/README.md). `--golden DIR`
runs the same tests on another directory of the same format: sizes, texts, settings and tolerances
all come from the files. The last test makes sure that nothing in the directory was left unused.

Two differences are not errors. Our rows are padded at their end only, the official ones also
between prompt and answer, so rows are compared where the attention mask is 1. And where the design
parts with an official habit (a hidden BOS, prompts without BOS), the test asks for that habit.
"""

import hashlib
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import train
from bridge import QFormer
from golden_case import (
    Case, batch_of, close, full_model, grads_of, loaded, logits_of, lora_phi_of, number_after,
    official_decode, official_greedy, official_names, only_phi, phi_config, phi_of, prompt_embeds,
    qformer_config, recorded, rows_of, schedule_of, trainable, turns_of, vision_config,
)  # fmt: skip
from lora import LORA_PRESETS, merge_lora
from model import ModelConfig, Phi, TinyGPTV, is_trainable
from official.weights import (
    clip_from_official, eva_from_official, from_official, phi_from_official, to_official,
)  # fmt: skip
from vision import EvaViT, VisionConfig, interpolate_pos_embed

LEFT_OUT = r".*(beam\d|minlen\d).*"  # beam search and a minimum length are not part of this project
CASES: dict[str, Case] = {}  # all that the tests have read


@pytest.fixture
def case(golden):
    """Gives the Case of a name; each file is read once."""

    def read(name):
        if name not in CASES:
            CASES[name] = Case(golden, name)
        return CASES[name]

    return read


@pytest.fixture(scope="module")
def tokenizer(golden):
    return data.Tokenizer(golden / "tokenizer_files")


# ---- ViT and Q-Former ----
@torch.no_grad()
def test_eva_vit(case):
    golden = case("eva_vit")
    config = golden.meta["config"]
    vit = loaded(EvaViT(vision_config(config, config["img_size"])), golden.below("w/"))
    blocks = recorded(vit.blocks)
    golden.check(vit.embed(golden["in/image"]), "embeddings")
    golden.check(vit(golden["in/image"]), "features")
    for index, hidden in enumerate(blocks):
        golden.check(hidden, f"block{index}")


@torch.no_grad()
def test_eva_vit_at_other_resolutions(case):
    """The raw file has a block, a norm and a head too many, and positions of another grid."""
    golden = case("eva_vit_interp")
    config, weights = golden.meta["config"], golden.below("w/")
    vit = EvaViT(vision_config(config, config["grid_checkpoint"] * config["patch_size"]))
    assert set(weights) - set(vit.state_dict()) == set(golden.meta["ignored_keys"])
    loaded(vit, {name: t for name, t in weights.items() if name in vit.state_dict()})
    for grid in config["targets"]:
        golden.check(interpolate_pos_embed(vit.pos_embed, int(grid)), f"pos_embed_{grid}")
        golden.check(vit(golden[f"in/image_{grid}"]), f"features_{grid}")


@torch.no_grad()
def test_qformer(case):
    golden = case("qformer")
    weights, ignored = from_official(golden.below("w/"), only_phi(None))
    assert set(ignored) == set(golden.meta["ignored_keys"])
    qformer = QFormer(qformer_config(golden.meta["config"]))
    loaded(qformer, {name.removeprefix("qformer."): t for name, t in weights.items()})
    features = golden["in/image_features"]
    layers = recorded([qformer.norm, *qformer.layers])
    golden.check(qformer.ln_vision(features), "ln_vision")
    golden.check(qformer(features), "last_hidden_state")
    for index, hidden in enumerate(layers):
        golden.check(hidden.expand(len(features), -1, -1), f"hidden{index}")


def clip_of(golden, num_layers, image_size):
    """CLIP's ViT from a fixture's file, which has more in it than is used."""
    config = golden.meta["config"]
    vit = EvaViT(VisionConfig(
        image_size, config["patch_size"], config["width"], num_layers, config["heads"],
        config["mlp_hidden"], config["norm_eps"], clip=True,
    ))  # fmt: skip
    state, ignored = clip_from_official(golden.below("w/"), num_layers)
    assert set(ignored) == set(golden.meta["ignored_keys"])
    return loaded(vit, state)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip/clip_vit", "clip/clip_vit_hf"])
def test_clip_vit_in_both_layouts(case, name):
    golden, config = case(name), case(name).meta["config"]
    vit = clip_of(golden, config["layers"], config["img_size"])
    blocks = recorded([vit.ln_pre, *vit.blocks])
    golden.check(vit(golden["in/image"]), "features")
    for index, hidden in enumerate(blocks):
        if name.endswith("_hf"):
            golden.check(hidden, f"hidden{index}")
        else:
            golden.check(hidden, f"block{index - 1}" if index else "ln_pre")
    if name.endswith("_hf"):  # the block that is not used, and the norm after it: counter-examples
        unlike = golden["out/last_hidden_state"] - blocks[-1]
        assert unlike.abs().max() > 0.1 and len(golden["out/pooler_output"]) == len(unlike)
        golden["out/hidden" + str(config["hf_num_hidden_layers"])]
    else:
        golden.check(vit.embed(golden["in/image"]), "embeddings")


@torch.no_grad()
def test_clip_vit_at_other_resolutions(case):
    golden = case("clip/clip_vit_interp")
    config = golden.meta["config"]
    vit = clip_of(golden, config["layers"], config["grid_checkpoint"] * config["patch_size"])
    for grid in config["targets"]:
        golden.check(interpolate_pos_embed(vit.pos_embed, int(grid), True)[0], f"pos_embed_{grid}")
        golden.check(vit(golden[f"in/image_{grid}"]), f"features_{grid}")


@torch.no_grad()
def test_qformer_behind_clip(case):
    """A file of BLIP-2's first stage, with all that reads and writes text in it."""
    golden = case("clip/clip_qformer")
    config = golden.meta["config"]
    weights, ignored = from_official(golden.below("w/"), only_phi(None))
    assert set(ignored) == set(golden.meta["ignored_keys"])
    qformer = QFormer(qformer_config(config))
    loaded(qformer, {name.removeprefix("qformer."): t for name, t in weights.items()})
    features = golden["in/image_features"]
    close(features, case("clip/clip_vit")["out/features"], 1e-6, "the features of clip_vit")
    layers = recorded([qformer.norm, *qformer.layers])
    golden.check(qformer.ln_vision(features), "ln_vision")
    golden.check(qformer.ln_vision(golden["in/small"]), "ln_vision_small")
    golden.check(qformer(features), "last_hidden_state")
    for index, hidden in enumerate(layers):
        golden.check(hidden.expand(len(features), -1, -1), f"hidden{index}")


# ---- Phi ----
@torch.no_grad()
def test_phi_hidden_states_and_logits(case):
    golden = case("phi")
    phi = phi_of(golden)
    layers = recorded([phi.embed_tokens, *phi.layers])
    golden.check(logits_of(phi, golden["in/a_input_ids"]), "a_logits")
    layers[-1] = phi.final_layernorm(layers[-1])  # the official list ends with the normed state
    for index, hidden in enumerate(layers):
        golden.check(hidden, f"a_hidden{index}")


def test_phi_padding_loss_and_gradients(case):
    golden = case("phi")
    phi = phi_of(golden)
    embeds = golden["in/b_inputs_embeds"].clone().requires_grad_()
    mask, ids = golden["in/b_attention_mask"], golden["in/a_input_ids"]
    valid = mask.bool()
    golden.check(phi.lm_head(phi(embeds, mask))[valid], "b_logits", where=valid)

    of_embeds = phi.loss(embeds, mask, golden["in/c_labels"])
    of_ids = phi.loss(phi.embed_tokens(ids), torch.ones_like(ids), golden["in/e_labels"])
    golden.check(of_embeds, "c_loss")
    golden.check(of_ids, "e_loss_ids")
    (of_embeds + of_ids).backward()
    grads = official_names(grads_of(phi), only_phi(phi.config))
    golden.check_all(grads, "out/e_grad/", "tolerance_grad")
    golden.check_all({"": embeds.grad}, "out/e_grad_inputs_embeds", "tolerance_grad")


@torch.no_grad()
def test_phi_greedy_generation(case):
    """Left-padded prompts through the KV cache, with and without repetition penalty."""
    golden = case("phi")
    config, phi = golden.meta["config"], phi_of(golden)
    for name, words in golden.meta["generation"].items():
        if re.fullmatch(LEFT_OUT, name):
            continue
        expected = golden[f"out/d_{name}_ids"]
        ids, scores, running = official_greedy(
            phi, golden["in/d_inputs_embeds"], golden["in/d_attention_mask"],
            steps=expected.shape[1] - 1, eos=config["eos_token_id"],
            bos=int(number_after("bos_token_id", words, config["bos_token_id"])),
            penalty=float(number_after("repetition_penalty", words, 1.0)),
        )  # fmt: skip
        assert ids.tolist() == expected.tolist(), name
        if f"out/d_{name}_scores" in golden.tensors:
            golden.check(scores[running], f"d_{name}_scores", where=running)


@pytest.mark.parametrize("layout", ["ms", "fused", "split"])
@torch.no_grad()
def test_phi_2_file_layouts(case, layout):
    golden = case("phi_layouts")
    config = phi_config(golden.meta["config"], extra_norms=False)
    weights, _ = phi_from_official(golden.below(f"w_{layout}/"), config.num_heads)
    phi = loaded(Phi(config), weights)
    golden.check(logits_of(phi, golden["in/input_ids"]), f"logits_{layout}")


@torch.no_grad()
def test_phi_2_with_untrained_norms(case):
    """Phi-2's file has no weights for TinyGPT-V's norms: weights start at one, biases at zero."""
    golden = case("phi_layouts")
    phi = Phi(phi_config(golden.meta["config"])).eval()
    weights, _ = phi_from_official(golden.below("w_fused/"), phi.config.num_heads)
    missing = phi.load_state_dict(weights, strict=False).missing_keys
    names = official_names(dict.fromkeys(missing), only_phi(phi.config))
    assert set(names) == set(golden.meta["missing_in_root"])
    golden.check(logits_of(phi, golden["in/input_ids"]), "logits_root_extra_norms_at_init")


# ---- LoRA ----
@torch.no_grad()
def test_lora_logits_and_merge(case):
    golden = case("lora")
    phi, config = lora_phi_of(golden)
    mask = golden["in/attention_mask"]
    valid = mask.bool()
    golden.check(logits_of(phi, golden["in/input_ids"]), "logits")
    with_mask = phi.lm_head(phi(golden["in/inputs_embeds"], mask))
    golden.check(with_mask[valid], "logits_embeds", where=valid)
    merge_lora(phi)
    golden.check(logits_of(phi, golden["in/input_ids"]), "logits_merged")
    golden.check_all(official_names(phi.state_dict(), only_phi(config.phi)), "merged/")


def test_lora_gradients(case):
    golden = case("lora")
    phi, config = lora_phi_of(golden)
    loss = phi.loss(golden["in/inputs_embeds"], golden["in/attention_mask"], golden["in/labels"])
    golden.check(loss, "loss")
    loss.backward()
    grads = official_names(grads_of(phi), config)
    golden.check_all(grads, "out/grad/llama_model.", "tolerance_grad")


def test_lora_names(case):
    golden = case("lora")
    phi, config = lora_phi_of(golden)
    plain, plain_config = Phi(config.phi), only_phi(config.phi)
    with_lora = trainable(nn.ModuleDict({"phi": phi}), config)
    without = trainable(nn.ModuleDict({"phi": plain}), plain_config)
    assert with_lora == set(golden.meta["trainable_lora"])
    assert without == set(golden.meta["trainable_no_lora"])
    names = {f"llama_model.{name}" for name in official_names(plain.state_dict(), plain_config)}
    assert names == set(golden.meta["state_dict_names_no_lora"])


@torch.no_grad()
def test_stage_4_positions(case):
    positions = case("full_weights").below("w_stage4/visual_encoder.")["pos_embed"]
    grid = math.isqrt(positions.shape[1] - 1)
    ours = interpolate_pos_embed(full_model(case, 1).visual_encoder.pos_embed, grid)
    close(ours, positions, case("eva_vit_interp").meta["tolerance"], "pos_embed")


# ---- the whole model: training batches ----
every_stage = pytest.mark.parametrize("name", [
    "full_stage1", "full_stage2", "full_stage3", "full_stage4",
    "full_stage4_conv", "full_stage4_text", "full_stage4_multi",
])  # fmt: skip


def widened(tensor, like, fill):
    return F.pad(tensor, (0, like.shape[1] - tensor.shape[1]), value=fill)


@every_stage
def test_batch(case, tokenizer, name):
    """Token ids, attention mask and labels."""
    golden = case(name)
    for text in golden.meta["tokens"]:
        assert tokenizer.encode(text["text"]) == text["ids"]
    batch = batch_of(case, golden, tokenizer)
    mask, targets, answers = (golden[f"out/{key}"] for key in
                              ("attention_mask", "targets", "part_targets"))  # fmt: skip
    assert torch.equal(widened(batch["attention_mask"], mask, 0), mask)
    assert torch.equal(widened(batch["labels"], targets, data.IGNORE), targets)
    labels = batch["labels"]
    assert torch.equal(labels[labels != data.IGNORE], answers[answers != data.IGNORE])


@every_stage
@torch.no_grad()
def test_forward(case, tokenizer, name):
    """From pictures and ids to embeddings, hidden states, logits and loss."""
    golden = case(name)
    model = full_model(case, golden.meta["stage"], golden.meta["lora"])
    batch = batch_of(case, golden, tokenizer)
    image_embeds = None
    if "pixel_values" in batch:
        golden.check(model.encode_images(golden["in/image"].flatten(0, -4)), "img_embeds")
        image_embeds = model.encode_images(batch["pixel_values"])
    embeds = model.phi.embed(batch["input_ids"], image_embeds)
    hidden = model.phi(embeds, batch["attention_mask"])
    ours, theirs = batch["attention_mask"].bool(), golden["out/attention_mask"].bool()
    logits = model.phi.lm_head(hidden[ours])
    golden.check(embeds[ours], "inputs_embeds", where=theirs)
    golden.check(hidden[ours], "final_hidden", where=theirs)
    golden.check(logits[:, :48], "logits_first48", where=theirs)
    golden.check(model(**batch), "loss")

    at_argmax = logits.gather(1, golden["out/logits_argmax"][theirs][:, None])[:, 0]
    assert (at_argmax >= logits.amax(dim=1) - golden.meta["tolerance"]).all()
    for row in range(len(embeds)):  # [BOS][prompt][answer]
        parts = [golden[f"out/{part}_embeds"][row][golden[f"out/{part}_atts"][row].bool()]
                 for part in ("cond", "regress")]  # fmt: skip
        close(embeds[row][ours[row]][1:], torch.cat(parts), golden.meta["tolerance"], "parts")


@every_stage
def test_gradients(case, tokenizer, name):
    golden = case(name)
    model = full_model(case, golden.meta["stage"], golden.meta["lora"])
    assert trainable(model, model.config) == set(golden.meta["trainable"])
    model(**batch_of(case, golden, tokenizer)).backward()
    grads = to_official(grads_of(model), model.config)
    assert set(grads) == set(golden.below("out/grad/"))  # without a picture none for projections
    golden.check_all(grads, "out/grad/", "tolerance_grad")


def test_stage_3_prompts(case):
    """One prompt for the whole batch, of the lines in the file that have a place for a picture."""
    meta = case("full_stage3").meta
    lines = [line for line in meta["prompt_file_lines"] if data.IMAGE_PLACEHOLDER in line]
    prompts = [meta["model_cfg"]["prompt_template"].format(line) for line in lines]
    assert prompts == meta["prompt_list"]
    assert random.Random(meta["random_seed"]).choice(prompts) == meta["chosen_prompt"]


def test_conversation_rows(case, tokenizer):
    """All after the first prompt: whole, and cut at a number of tokens."""
    golden = case("full_stage4_conv")
    turns = turns_of(golden.meta)
    assert [[q for q, _ in row] for row in turns] == golden.meta["conv_q_formatted"]
    assert [[a for _, a in row] for row in turns] == golden.meta["conv_a_split"]
    starts = golden["out/cond_atts"].sum(dim=1) + 1
    found = [re.fullmatch(r"out/(trunc(\d+)_)?regress_ids", name) for name in golden.tensors]
    for cut in filter(None, found):
        prefix, max_txt_len = cut[1] or "", cut[2] and int(cut[2])
        rows = rows_of(case, golden, tokenizer, max_txt_len)
        rows = [{key: row[key][start:] for key in ("input_ids", "attention_mask", "labels")}
                | {"truncated": row["truncated"]} for row, start in zip(rows, starts)]  # fmt: skip
        batch = data.collate(rows, tokenizer.pad_token_id)
        targets = f"{prefix}targets" if prefix else "conv_targets"
        assert torch.equal(batch["input_ids"], golden[f"out/{prefix}regress_ids"])
        assert torch.equal(batch["attention_mask"], golden[f"out/{prefix}regress_attn"])
        assert torch.equal(batch["labels"], golden[f"out/{targets}"])


@torch.no_grad()
def test_cropped_prompts(case, tokenizer):
    """The official code cuts the end of a long prompt (here too many positions are an error)."""
    golden = case("full_stage4")
    model = full_model(case, golden.meta["stage"])
    batch = batch_of(case, golden, tokenizer)
    embeds = model.phi.embed(batch["input_ids"], model.encode_images(batch["pixel_values"]))
    for name in re.findall(r"out/(crop\d+)_cond_atts", " ".join(golden.tensors)):
        valid = golden[f"out/{name}_cond_atts"].bool()
        cropped = embeds[:, 1 : 1 + valid.shape[1]]  # without BOS
        golden.check(cropped[valid], f"{name}_cond_embeds", where=valid)


# ---- the whole model: answers ----
@torch.no_grad()
def test_generate(case, tokenizer):
    golden, eos = case("full_generate"), case("full_weights").meta["config"]["phi"]["eos_token_id"]
    meta, model = golden.meta, full_model(case, stage=4)
    for text, segments in zip(meta["texts"], meta["text_tokens"], strict=True):
        assert [tokenizer.encode(part) for part in text.split(data.IMAGE_PLACEHOLDER)] == segments
    image_embeds = model.encode_images(golden["in/image"])
    embeds, mask = prompt_embeds(model, meta["texts"], image_embeds, tokenizer)
    assert torch.equal(mask, golden["out/attention_mask"])
    golden.check(embeds[mask.bool()], "inputs_embeds", where=mask.bool())

    penalties = re.findall(r"(rep\d+) = repetition_penalty ([\d.]+\d)", meta["description"])
    for name, penalty in [("", meta["kwargs"]["repetition_penalty"]), *penalties]:
        expected = golden[f"out/{name}_ids" if name else "out/ids"]
        ids, _, _ = official_greedy(
            model.phi, embeds, mask, steps=expected.shape[1] - 1, eos=eos,
            bos=meta["kwargs"]["bos_token_id"], penalty=float(penalty),
        )  # fmt: skip
        assert ids.tolist() == expected.tolist()
        answers = [official_decode(tokenizer, row.tolist()).strip() for row in ids]
        assert answers == meta[f"answers_{name}" if name else "answers"]


@pytest.mark.parametrize("name", ["full_chat_v0", "full_chat_v2"])
@torch.no_grad()
def test_chat(case, tokenizer, name):
    """The official demo: a picture, a question, a second one; greedy instead of sampled."""
    golden = case(name)
    meta, model = golden.meta, full_model(case, stage=4)
    image = Image.fromarray(golden["in/image_uint8"].numpy())
    image_embeds = model.encode_images(data.preprocess(image, meta["image_size"])[None])
    golden.check(image_embeds, "img_emb")
    (user, assistant), sep = meta["roles"], meta["sep"]
    text, picture = meta["system"], f"<Img>{data.IMAGE_PLACEHOLDER}</Img> "
    for number, turn in enumerate(meta["turns"]):
        text += f"{sep}{user}{picture}{turn['question']}{sep}{assistant}"
        assert text == turn["prompt"]
        embeds, mask = prompt_embeds(model, [text], image_embeds, tokenizer)
        assert embeds.shape[1] == turn["n_embeds"]
        golden.check(embeds, f"turn{number}_inputs_embeds")
        expected, kwargs = golden[f"out/turn{number}_ids"], turn["kwargs"]
        ids, _, _ = official_greedy(
            model.phi, embeds, mask, steps=expected.shape[1] - 1, eos=kwargs["eos_token_id"],
            bos=kwargs["bos_token_id"], penalty=kwargs["repetition_penalty"],
        )  # fmt: skip
        assert ids.tolist() == expected.tolist() == [turn["ids"]]
        assert official_decode(tokenizer, turn["ids"]) == turn["decoded"]
        assert turn["decoded"].split(sep)[0].strip() == turn["answer"]
        text, picture = text + turn["answer"], ""


# ---- training ----
def test_learning_rate(case):
    meta = case("lr_schedule").meta
    for name, stage in meta["schedules"].items():
        schedule = schedule_of(stage["config"], "warmup_lr")
        for epoch, step, expected in stage["rows"]:
            lr = train.learning_rate(schedule, epoch, step)
            assert lr == pytest.approx(expected, rel=meta["tolerance_rel"]), (name, epoch, step)


def test_optimizer_groups(case):
    for name, expected in case("optimizer_groups").meta["groups"].items():
        model = full_model(case, stage=int(name[5]), lora=name.endswith("_lora"))
        train.set_trainable(model)
        parameters = dict(model.named_parameters())
        groups = train.optimizer_groups(model, max(group["weight_decay"] for group in expected))
        for ours, theirs in zip(groups, expected, strict=True):
            names = to_official({name: parameters[name] for name in ours["names"]}, model.config)
            assert set(names) == set(theirs["params"])
            assert ours["weight_decay"] == theirs["weight_decay"]


NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)


def test_training_steps(case, tokenizer):
    """Learning rate and loss of every step, and the parameters after some of them."""
    golden, batch = case("full_train"), batch_of(case, case("full_stage2"), tokenizer)
    meta, model = golden.meta, full_model(case, stage=2)
    train.set_trainable(model)
    groups = train.optimizer_groups(model, meta["weight_decay"])
    optimizer = torch.optim.AdamW(groups, betas=meta["betas"])
    schedule = schedule_of(meta["schedule"], "warmup_start_lr")
    for number, step in enumerate(meta["log"], start=1):
        lr = train.learning_rate(schedule, step["epoch"], step["step"])
        assert lr == pytest.approx(step["lr"], rel=case("lr_schedule").meta["tolerance_rel"])
        loss, _ = train.train_step(model, optimizer, NO_SCALING, [batch], lr)
        assert loss == pytest.approx(step["loss"], abs=meta["tolerance"])
        if any(name.startswith(f"out/after{number}/") for name in golden.tensors):
            state = to_official(dict(model.named_parameters()), model.config)
            golden.check_all(state, f"out/after{number}/")


def shapes(state):
    return {name: list(tensor.shape) for name, tensor in state.items()}


@torch.no_grad()
def test_official_checkpoint(case, golden):
    """The official runner's file after those steps: it holds what we train, by names we know."""
    meta, log = case("full_stage2_checkpoint").meta, case("full_train").meta["log"]
    file = torch.load(golden / "full_stage2_checkpoint.pth", weights_only=True)
    assert list(file) == meta["top_level"]
    assert shapes(file["model"]) == {name: shape for name, (shape, _) in meta["model"].items()}
    model = full_model(case, stage=2)
    train.set_trainable(model)
    state, ignored = from_official(file["model"], model.config)
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(ignored) == set(file["model"]) - set(to_official(state, model.config))
    case("full_train").check_all(file["model"], f"out/after{len(log)}/")
    groups = zip(train.optimizer_groups(model, 0.05), meta["optimizer_param_groups"], strict=True)
    assert all(len(ours["params"]) == len(theirs["params"]) for ours, theirs in groups)


# ---- pictures and text ----
def test_image_preprocessing(case, golden):
    """As officially: EXIF orientation and transparency are ignored (data.load_image heeds them)."""
    images = case("image_preprocess")
    of_jpeg = float(re.search(r"([\d.]+) after normalis", images.meta["tolerance_jpeg"])[1])
    for name, expected in images.meta["files"].items():
        image = Image.open(golden / "images" / name).convert("RGB")
        decoded_alike = sha256(image) == expected["rgb_sha256"]  # libjpeg builds differ a little
        assert decoded_alike or name.endswith(".jpg"), name
        atol = images.meta["tolerance"] if decoded_alike else of_jpeg
        for size, values in expected["sizes"].items():
            pixels = data.preprocess(image, int(size))
            y, x = torch.tensor(values["points_yx"]).T
            close(pixels[:, y, x].T, torch.tensor(values["values_rgb"]), atol, name)
            close(pixels.mean((1, 2)), torch.tensor(values["mean"]), atol, name)
            close(pixels.std((1, 2)), torch.tensor(values["std"]), atol, name)
            if decoded_alike:
                assert sha256(undone(pixels, images.meta)) == values["resized_uint8_sha256"], name
            if f"out/{name}/{size}" in images.tensors:
                close(pixels, images[f"out/{name}/{size}"], atol, name)


def undone(pixels, meta):
    """The resized picture, (S, S, 3) uint8, from before the normalisation."""
    mean, std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
    return ((pixels.permute(1, 2, 0) * std + mean) * 255).round().to(torch.uint8)


def sha256(image):
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()


def test_text_processor(case):
    meta = case("text_processor").meta
    for text, expected in meta["pairs"]:
        assert data.caption_text(text) == expected
    custom = meta["custom_max_words"]  # the official class has settings that nobody changes
    for text, expected in custom["pairs"]:
        words = data.caption_text(text).split(" ")[: custom["max_words"]]
        assert custom["prompt"] + " ".join(words) == expected


def test_tokenizer(case, tokenizer):
    meta = case("tokenizer").meta
    assert len(tokenizer) == meta["total"]
    for text in meta["strings"]:
        assert tokenizer.encode(text["text"], allow_special=True) == text["ids"]
        decoded = tokenizer.decode(text["ids"], skip_special=False)
        assert (decoded == text["text"]) == text["raw_roundtrip"]
    for text in meta["strings"] + meta["random_decodes"]:
        ids = text["ids"]
        assert tokenizer.decode(ids, skip_special=False) == text["decode_raw"]
        assert official_decode(tokenizer, ids, skip_special=False) == text["decode_default"]
        assert official_decode(tokenizer, ids) == text["decode_skip_special"]


def test_tokenizer_files(case, tokenizer):
    """The two files that Tokenizer does not read agree with the two that it does."""
    vocab, added, config, special = (
        case(f"tokenizer_files/{name}").meta for name in
        ("vocab", "added_tokens", "tokenizer_config", "special_tokens_map")
    )  # fmt: skip
    meta = case("tokenizer").meta
    assert len(vocab) == meta["vocab_size"]
    for token_id, token in config["added_tokens_decoder"].items():
        assert (vocab | added)[token["content"]] == int(token_id)
        assert tokenizer.token_bytes(int(token_id)) == token["content"].encode()
    ids = {*meta["special"].values(), *(vocab[token] for token in special.values())}
    assert ids == {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


# ---- the real files: names and shapes ----
def manifest(case, name):
    """The tensors of a real file, on the meta device, and all else that is said of it."""
    meta = case(f"manifests/{name}" if "/" not in name else name).meta
    keys = manifest(case, meta["keys_same_as"].removesuffix(".json"))[1]["keys"] \
        if "keys_same_as" in meta else meta["keys"]
    tensors = {n: torch.empty(shape, device="meta") for n, (shape, _) in keys.items()}
    assert len(tensors) == meta["n_tensors"]
    return tensors, meta | {"keys": keys}


def full_size(stage, lora, vision=""):
    config = ModelConfig.preset("full", stage, vision)
    config.lora = LORA_PRESETS["full"] if lora else None
    with torch.device("meta"):
        return TinyGPTV(config)


def shapes_below(module, prefix=""):
    return {n: t.shape for n, t in module.state_dict().items() if n.startswith(prefix)}


@pytest.fixture(autouse=True)
def manifests_are_there(request, golden):
    if "real" in request.node.name and not (golden / "manifests").exists():
        pytest.skip("this directory has no manifests of the real files")


def test_real_eva_vit(case):
    model = full_size(1, lora=False)
    tensors, meta = manifest(case, "eva_vit_g.pth")
    state, ignored = eva_from_official(tensors, model.config.vision.num_layers)
    assert shapes(state) == shapes(model.visual_encoder.state_dict())
    assert sorted(ignored) == sorted(meta["unused_keys"])
    used, meta = manifest(case, "visual_encoder_loaded_39_blocks")
    assert shapes(state) == shapes(used)
    assert sum(p.numel() for p in model.visual_encoder.parameters()) == meta["total_elements"]


def test_real_qformers(case):
    for name, vision, used in (("blip2_pretrained_flant5xxl.pth", "", "used_by_tinygptv"),
                               ("clip/manifests/blip2_pretrained_vitL.pth", "clip", "used_keys"),
                               ("clip/manifests/blip2_pretrained_flant5xl_vitL.pth", "clip",
                                "used_keys")):  # fmt: skip
        model = full_size(1, False, vision)
        tensors, meta = manifest(case, name)
        state, ignored = from_official(tensors, model.config)
        assert {n: t.shape for n, t in state.items()} == shapes_below(model, "qformer.")
        assert set(ignored) == set(tensors) - set(meta[used])


@pytest.mark.parametrize("name", ["clip_vit_L.pth", "clip_vit_L_loaded_fp16",
                                  "hf_clip-vit-large-patch14.vision"])  # fmt: skip
def test_real_clip_vits(case, name):
    model = full_size(1, False, "clip")
    tensors, meta = manifest(case, f"clip/manifests/{name}")
    extra = meta.get("optional_extra_keys", {})
    tensors |= {n: torch.empty(0, device="meta") for n in extra if "*" not in n}
    state, ignored = clip_from_official(tensors, model.config.vision.num_layers)
    assert shapes(state) == shapes(model.visual_encoder.state_dict())
    counts = case("clip/manifests/summary").meta["image_path"]
    counted = [sum(p.numel() for p in part.parameters())
               for part in (model.visual_encoder, model.qformer)]  # fmt: skip
    assert [*counted, sum(counted)] == list(counts.values())


@pytest.mark.parametrize("name", ["phi2_microsoft", "phi2_split_qkv", "phi2_fused_qkv",
                                  "phi2_tinygptv"])  # fmt: skip
def test_real_phi_2(case, name):
    phi = full_size(1, lora=False).phi
    tensors, meta = manifest(case, name)
    state, ignored = phi_from_official(tensors, phi.config.num_heads)
    new = {n for n in shapes(phi.state_dict()) if re.search("[qk]_layernorm|post_layernorm", n)}
    brought = set(new) if meta.get("keys_not_in_phi2") else set()
    assert {n: list(t.shape) for n, t in phi.state_dict().items() if n not in new - brought} \
        == shapes(state) and not ignored  # fmt: skip
    assert len(new) == len(case("manifests/phi2_tinygptv").meta["keys_not_in_phi2"])
    real = case("manifests/summary").meta["real_config"]
    assert {name: getattr(phi.config, name.replace("_hidden_l", "_l").replace("_attention_h", "_h"))
            for name in real} == real  # fmt: skip


@pytest.mark.parametrize("name, lora", [
    ("TinyGPT-V_for_Stage1.pth.no_lora", False), ("TinyGPT-V_for_Stage1.pth.lora64", True),
    ("TinyGPT-V_for_Stage2.pth", True), ("TinyGPT-V_for_Stage3.pth", True),
    ("TinyGPT-V_for_Stage4.pth", True), ("TinyGPT-V_for_Stage4.pth.older_code", True),
])  # fmt: skip
def test_real_checkpoints(case, name, lora):
    """They hold exactly what training changes here, and the counts of parameters are right."""
    stage = int(name.split("Stage")[1][0])
    model = full_size(stage, lora)
    tensors, meta = manifest(case, name)
    state, ignored = from_official(tensors, model.config)
    own_qformer = {n for n in state if n.startswith("qformer.")}
    trained = {n for n in model.state_dict() if is_trainable(n)}
    lacking = {"phi.final_layernorm.weight"} if own_qformer else set()
    assert set(state) - own_qformer == trained - lacking
    assert all(state[n].shape == t.shape for n, t in model.state_dict().items() if n in state)
    assert list(ignored) == ["Qformer.bert.embeddings.position_ids"]
    assert sum(t.numel() for t in state.values()) == meta["trainable_parameters"]
    exported = to_official({n: t for n, t in state.items() if n in trained}, model.config)
    listed = case("manifests/trainable_real").meta["lora_r64" if lora else "no_lora"]
    assert lacking or shapes(exported) == listed
    if "total_parameters" in meta:  # the official model stores stage 4's positions as stretched
        stretched = (2 * 16) ** 2 - 16**2 if stage == 4 else 0
        total = sum(p.numel() for p in model.parameters())
        assert total + stretched * model.config.vision.hidden_size == meta["total_parameters"]
        summary = case("manifests/summary").meta["stages"][f"stage{stage}"]
        assert not lora or summary["total"] == meta["total_parameters"]


# ---- nothing forgotten ----
def test_nothing_in_the_directory_is_left_unused(golden, request):
    """Comes last. Every file, and every tensor but weights, was looked at by a test above."""
    running = {item.name.split("[")[0] for item in request.session.items}
    if not {name for name in globals() if name.startswith("test_")} <= running:
        pytest.skip("says something only when all golden tests are running")
    elsewhere = ("data",)  # fixtures of another part of the project
    files = [path.relative_to(golden).with_suffix("") for path in golden.rglob("*.*")
             if path.suffix in (".json", ".safetensors", ".pth")]  # fmt: skip
    unused = {str(file) for file in files if not {*file.parts} & {*elsewhere}} - set(CASES)
    for name, case in CASES.items():
        unused |= {f"{name}: {key}" for key in case.tensors if key not in case.used
                   and not re.fullmatch(LEFT_OUT, key)}  # fmt: skip
    assert not unused
