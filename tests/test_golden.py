"""Our numbers against the official implementation's, part by part and for every training stage.

A golden vector is `NAME.safetensors` (weights `w/`, inputs `in/`, expected outputs `out/`) with
`NAME.json` (sizes, texts, settings, tolerance). Everything that differs from one directory to the
next is read from those files: `--golden DIR` runs the same tests on other sizes and seeds. The last
test makes sure that nothing in the directory was left unused.

Two differences are not errors. Our rows are padded at their end only, the official ones also between
prompts and answers, so rows are compared where the attention mask is 1. And where the design parts
with an official habit (a hidden BOS, prompts without BOS), the test asks for the official habit.
"""

import hashlib
import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import data
import train
from bridge import Projector, ProjectorConfig, QFormer, QFormerConfig
from generate import Sampling, generate_ids
from lora import LoRAConfig, add_lora, merge_lora
from model import ModelConfig, Phi, PhiConfig, TinyGPTV
from official.weights import from_official, phi_from_official, to_official
from vision import EvaViT, VisionConfig, interpolate_pos_embed

# ---- golden vectors ----

CASES: dict[str, "Case"] = {}
LEFT_OUT = r".*(beam\d|minlen\d).*"  # beam search and a minimum length are not part of this project


class Case:
    """One fixture: `meta` from its JSON, tensors by name. It remembers what was looked at."""

    def __init__(self, folder, name):
        self.meta = json.loads((folder / f"{name}.json").read_text("utf-8"))
        path = folder / f"{name}.safetensors"
        self.tensors = load_file(path) if path.exists() else {}
        self.used = set()

    def __getitem__(self, key):
        self.used.add(key)
        return self.tensors[key]

    def below(self, prefix):
        """Tensors whose name begins with `prefix`, without it."""
        return {n.removeprefix(prefix): self[n] for n in self.tensors if n.startswith(prefix)}

    def check(self, actual, key, where=None):
        """`actual` equals out/`key` within the tolerance; with `where`, only at those places."""
        expected = self["out/" + key] if where is None else self["out/" + key][where]
        close(actual.reshape(expected.shape), expected, self.meta["tolerance"], key)

    def check_all(self, actual, prefix, tolerance="tolerance"):
        """`actual`, by official names, holds every tensor below `prefix`."""
        expected = self.below(prefix)
        assert expected, f"nothing below {prefix}"
        for name in expected:
            close(actual[name], expected[name], self.meta[tolerance], name)


def close(actual, expected, atol, name):
    assert_close(actual, expected, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}")


@pytest.fixture
def case(golden):
    """Gives the Case of a name; each file is read once."""

    def load(name):
        if name not in CASES:
            CASES[name] = Case(golden, name)
        return CASES[name]

    return load


@pytest.fixture(scope="module")
def tokenizer(golden):
    return data.Tokenizer(golden / "tokenizer_files")


def vision_config(config, image_size):
    return VisionConfig(
        image_size, config["patch_size"], config["embed_dim"], config["depth"],
        config["num_heads"], int(config["embed_dim"] * config["mlp_ratio"]), config["norm_eps"],
    )  # fmt: skip


def qformer_config(config):
    return QFormerConfig(
        config["num_query"], config["hidden_size"], config["num_hidden_layers"],
        config["num_attention_heads"], config["intermediate_size"], config["encoder_width"],
        config["cross_attention_freq"], config["layer_norm_eps"],
    )  # fmt: skip


def phi_config(config, extra_norms=True):
    config = {"layer_norm_eps": 1e-5, "rms_eps": 1e-6, "rope_theta": 10000.0} | config
    return PhiConfig(
        config["vocab_size"], config["hidden_size"], config["num_hidden_layers"],
        config["num_attention_heads"], config["intermediate_size"],
        config["max_position_embeddings"], config["partial_rotary_factor"], config["rope_theta"],
        config["layer_norm_eps"], config["rms_eps"], qk_norm=extra_norms, attn_norm=extra_norms,
    )  # fmt: skip


def loaded(module, state):
    module.load_state_dict(state)
    return module.eval()


def recorded(modules):
    """A list to which every call of one of `modules` appends its output."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


def padded(rows, fill, width):
    """1-dimensional rows as (len(rows), width)."""
    return torch.stack([F.pad(row, (0, width - len(row)), value=fill) for row in rows])


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


# ---- Phi ----


def only_phi(phi, lora=None):
    return ModelConfig(None, None, None, phi, lora, stage=0)


def official_names(tensors, config):
    """Tensors of Phi by their official names, which begin with "base_model." if there is LoRA."""
    official = to_official({f"phi.{name}": t for name, t in tensors.items()}, config)
    return {name.removeprefix("llama_model."): t for name, t in official.items()}


def grads_of(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def phi_of(case):
    config = phi_config(case.meta["config"])
    return loaded(Phi(config), phi_from_official(case.below("w/"), config.num_heads))


def logits_of(phi, input_ids):
    return phi.lm_head(phi(phi.embed_tokens(input_ids)))


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


def official_greedy(phi, embeds, mask, steps, bos, eos, penalty):
    """What the official `generate` returns: ids (B, 1 + steps) that begin with a bos that the
    model never reads but the penalty counts, and that go on with eos once a row is over; scores
    (steps, B, vocab_size); and which of the steps were before the end of the row, (steps, B)."""
    history = torch.full((len(embeds), 1), bos)
    sampling = Sampling(repetition_penalty=penalty)
    ids, scores = zip(*generate_ids(phi, embeds, mask, steps, sampling, history=history))
    ids = torch.stack(ids)
    ends = (ids == eos).long()
    running = ends.cumsum(0) - ends == 0
    return torch.cat([history, ids.where(running, eos).T], dim=1), torch.stack(scores), running


@torch.no_grad()
def test_phi_greedy_generation(case):
    """Left-padded prompts through the KV cache, with and without repetition penalty."""
    golden = case("phi")
    config = golden.meta["config"]
    phi = phi_of(golden)
    for name, words in golden.meta["generation"].items():
        if re.fullmatch(LEFT_OUT, name):
            continue
        expected = golden[f"out/d_{name}_ids"]
        penalty = float(number_after("repetition_penalty", words, 1.0))
        bos = int(number_after("bos_token_id", words, config["bos_token_id"]))
        ids, scores, running = official_greedy(
            phi, golden["in/d_inputs_embeds"], golden["in/d_attention_mask"],
            expected.shape[1] - 1, bos, config["eos_token_id"], penalty,
        )  # fmt: skip
        assert ids.tolist() == expected.tolist(), name
        if f"out/d_{name}_scores" in golden.tensors:
            golden.check(scores[running], f"d_{name}_scores", where=running)


def number_after(word, text, default=None):
    match = re.search(rf"{word} (-?[\d.]+\d|\d)", text)
    return match[1] if match else default


@pytest.mark.parametrize("layout", ["ms", "fused", "split"])
@torch.no_grad()
def test_phi_2_file_layouts(case, layout):
    golden = case("phi_layouts")
    config = phi_config(golden.meta["config"], extra_norms=False)
    weights = phi_from_official(golden.below(f"w_{layout}/"), config.num_heads)
    golden.check(logits_of(loaded(Phi(config), weights), golden["in/input_ids"]), f"logits_{layout}")


@torch.no_grad()
def test_phi_2_with_untrained_norms(case):
    """Phi-2's file has no weights for TinyGPT-V's norms: weights start at one, biases at zero."""
    golden = case("phi_layouts")
    config = phi_config(golden.meta["config"])
    phi = Phi(config).eval()
    weights = phi_from_official(golden.below("w_fused/"), config.num_heads)
    missing = phi.load_state_dict(weights, strict=False).missing_keys
    names = official_names(dict.fromkeys(missing), only_phi(config))
    assert set(names) == set(golden.meta["missing_in_root"])
    golden.check(logits_of(phi, golden["in/input_ids"]), "logits_root_extra_norms_at_init")


# ---- LoRA ----


def lora_phi(case):
    meta = case.meta["config"]
    config = only_phi(phi_config(meta), LoRAConfig(meta["lora_r"], meta["lora_alpha"]))
    phi = Phi(config.phi)
    add_lora(phi, config.lora)
    state, _ = from_official(case.below("w/"), config)
    return loaded(phi, {name.removeprefix("phi."): t for name, t in state.items()}), config


@torch.no_grad()
def test_lora_logits_and_merge(case):
    golden = case("lora")
    phi, config = lora_phi(golden)
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
    phi, config = lora_phi(golden)
    loss = phi.loss(golden["in/inputs_embeds"], golden["in/attention_mask"], golden["in/labels"])
    golden.check(loss, "loss")
    loss.backward()
    golden.check_all(
        official_names(grads_of(phi), config), "out/grad/llama_model.", "tolerance_grad"
    )


def test_lora_names(case):
    golden = case("lora")
    phi, config = lora_phi(golden)
    plain, plain_config = Phi(config.phi), only_phi(config.phi)
    assert trainable(nn.ModuleDict({"phi": phi}), config) == set(golden.meta["trainable_lora"])
    assert trainable(nn.ModuleDict({"phi": plain}), plain_config) == set(
        golden.meta["trainable_no_lora"]
    )
    names = {f"llama_model.{name}" for name in official_names(plain.state_dict(), plain_config)}
    assert names == set(golden.meta["state_dict_names_no_lora"])


def trainable(model, config):
    """Official names of what training changes in `model`."""
    train.set_trainable(model)
    return set(to_official({n: p for n, p in model.named_parameters() if p.requires_grad}, config))


# ---- the whole model: names ----


def full_config(case, stage, lora=True):
    meta = case("full_weights").meta["config"]
    projector = ProjectorConfig(
        meta["qformer"]["hidden_size"], meta["proj_mid"], meta["phi"]["hidden_size"]
    )
    return ModelConfig(
        vision_config(meta["vit"], meta["vit"]["img_size_stage123"]),
        qformer_config(meta["qformer"]), projector, phi_config(meta["phi"]),
        LoRAConfig(meta["lora"]["r"], meta["lora"]["alpha"]) if lora else None, stage,
    )  # fmt: skip


def full_weights(case, lora=True):
    weights = case("full_weights").below("w/")
    if lora:
        return weights
    plain = {n.replace("base_model.model.", ""): t for n, t in weights.items() if "lora_" not in n}
    assert len(plain) < len(weights)
    return plain


def full_model(case, stage, lora=True):
    config = full_config(case, stage, lora)
    state, _ = from_official(full_weights(case, lora), config)
    return loaded(TinyGPTV(config), state)


@pytest.mark.parametrize("lora", [False, True])
def test_official_names_there_and_back(case, lora):
    """Every tensor of the official model has its place here, and comes back bit for bit."""
    config, official = full_config(case, 1, lora), full_weights(case, lora)
    ours, ignored = from_official(official, config)
    model = TinyGPTV(config)
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert set(ignored) == {n for n in official if n.endswith("position_ids")}
    back = to_official(ours, config)
    assert set(back) == set(official) - set(ignored)
    assert all(torch.equal(back[name], official[name]) for name in back)


@pytest.mark.parametrize("old, new", [
    ("", "module."),  # DistributedDataParallel
    ("lora_A.", "lora_A.default."),  # newer versions of PEFT
    ("base_model.model.", ""),  # a stage-1 file read in stage 2
])  # fmt: skip
def test_other_official_names(case, old, new):
    config, official = full_config(case, 1), full_weights(case)
    renamed = {name.replace(old, new, 1): t for name, t in official.items()}
    assert set(renamed) != set(official)
    ours, expected = from_official(renamed, config)[0], from_official(official, config)[0]
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("name", ["llama_proj3.weight", "Qformer.bert.pooler.dense.weight"])
def test_unknown_official_names_are_refused(case, name):
    with pytest.raises(ValueError, match=name):
        from_official({name: torch.zeros(1)}, full_config(case, 1))
    with pytest.raises(ValueError, match=name):
        phi_from_official({name: torch.zeros(1)}, num_heads=1)


@torch.no_grad()
def test_stage_4_positions(case):
    positions = case("full_weights").below("w_stage4/visual_encoder.")["pos_embed"]
    grid = math.isqrt(positions.shape[1] - 1)
    ours = interpolate_pos_embed(full_model(case, 1).visual_encoder.pos_embed, grid)
    close(ours, positions, case("eva_vit_interp").meta["tolerance"], "pos_embed")


# ---- the whole model: training batches ----

STAGE_CASES = [
    "full_stage1", "full_stage2", "full_stage3", "full_stage4",
    "full_stage4_conv", "full_stage4_text", "full_stage4_multi",
]  # fmt: skip


def turns_of(meta):
    """Prompt and answer of every turn of every sample, worded as the official code does."""
    samples, template = meta["samples"], meta["prompt_template"]
    if "conv_q" in samples:
        conversations = zip(samples["conv_q"], samples["conv_a"], samples["connect_sym"])
        return [
            [(template.format(q), a) for q, a in zip(questions.split(sym), answers.split(sym))]
            for questions, answers, sym in conversations
        ]
    answers = samples["answer"]
    prompts = [meta.get("chosen_prompt", data.IMAGE_PLACEHOLDER)] * len(answers)
    if "instruction_input" in samples:
        template = template if meta["chat_template"] else "{}"
        prompts = [template.format(text) for text in samples["instruction_input"]]
    return [[turn] for turn in zip(prompts, answers)]


def rows_of(case, golden, tokenizer, max_txt_len=None):
    num_queries = case("full_weights").meta["config"]["qformer"]["num_query"]
    return [
        data.encode_sample(
            turns, tokenizer, turns[0][0].count(data.IMAGE_PLACEHOLDER), num_queries,
            max_txt_len or golden.meta["max_txt_len"], golden.meta["end_sym"], mask_later_bos=True,
        )
        for turns in turns_of(golden.meta)
    ]  # fmt: skip


def pixels_of(golden):
    """in/image without the pictures that a sample has too few prompts for; None without any."""
    if "in/image" not in golden.tensors:
        return None
    images, lengths = golden["in/image"], golden.meta["samples"].get("length")
    return torch.cat([row[:n] for row, n in zip(images, lengths)]) if lengths else images


def batch_of(case, golden, tokenizer):
    batch = data.collate(rows_of(case, golden, tokenizer), tokenizer.pad_token_id)
    batch = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    pixels = pixels_of(golden)
    return batch if pixels is None else batch | {"pixel_values": pixels}


def widened(tensor, like, fill):
    return F.pad(tensor, (0, like.shape[1] - tensor.shape[1]), value=fill)


@pytest.mark.parametrize("name", STAGE_CASES)
def test_batch(case, tokenizer, name):
    """Token ids, attention mask and labels of the official batch."""
    golden = case(name)
    for text in golden.meta["tokens"]:
        assert tokenizer.encode(text["text"]) == text["ids"]
    batch = batch_of(case, golden, tokenizer)
    for key, ours, fill in (("out/attention_mask", "attention_mask", 0),
                            ("out/targets", "labels", data.IGNORE)):  # fmt: skip
        expected = golden[key]
        assert torch.equal(widened(batch[ours], expected, fill), expected)
    answers = golden["out/part_targets"]
    assert torch.equal(batch["labels"][batch["labels"] != data.IGNORE],
                       answers[answers != data.IGNORE])  # fmt: skip


@pytest.mark.parametrize("name", STAGE_CASES)
@torch.no_grad()
def test_forward(case, tokenizer, name):
    """From pictures and ids to embeddings, hidden states, logits and loss."""
    golden = case(name)
    model = full_model(case, golden.meta["stage"], golden.meta["lora"])
    batch = batch_of(case, golden, tokenizer)
    image_embeds = None
    if "pixel_values" in batch:
        every_image = golden["in/image"].flatten(0, -4)
        golden.check(model.encode_images(every_image), "img_embeds")
        image_embeds = model.encode_images(batch["pixel_values"])
    embeds = model.embed(batch["input_ids"], image_embeds)
    hidden = model.phi(embeds, batch["attention_mask"])
    logits = model.phi.lm_head(hidden)

    ours, theirs = batch["attention_mask"].bool(), golden["out/attention_mask"].bool()
    golden.check(embeds[ours], "inputs_embeds", where=theirs)
    golden.check(hidden[ours], "final_hidden", where=theirs)
    golden.check(logits[..., :48][ours], "logits_first48", where=theirs)
    at_argmax = logits[ours].gather(1, golden["out/logits_argmax"][theirs][:, None])[:, 0]
    assert (at_argmax >= logits[ours].amax(dim=1) - golden.meta["tolerance"]).all()
    golden.check(model(**batch), "loss")

    for row in range(len(embeds)):  # [BOS][prompt][answer]
        parts = [golden[f"out/{p}_embeds"][row][golden[f"out/{p}_atts"][row].bool()]
                 for p in ("cond", "regress")]  # fmt: skip
        close(embeds[row][ours[row]][1:], torch.cat(parts), golden.meta["tolerance"], "parts")


@pytest.mark.parametrize("name", STAGE_CASES)
def test_gradients(case, tokenizer, name):
    golden = case(name)
    model = full_model(case, golden.meta["stage"], golden.meta["lora"])
    assert trainable(model, model.config) == set(golden.meta["trainable"])
    model(**batch_of(case, golden, tokenizer)).backward()
    grads = to_official(grads_of(model), model.config)
    assert set(grads) == set(golden.below("out/grad/")) == set(golden.meta["trainable"])
    golden.check_all(grads, "out/grad/", "tolerance_grad")
