"""What test_golden.py needs to read golden vectors and to build our modules from them.

A golden vector is `NAME.safetensors` (weights `w/`, inputs `in/`, expected outputs `out/`) with
`NAME.json` (sizes, texts, settings, tolerance). All that differs from one directory to the next is
read from those files.
"""

import json
import re

import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import data
import train
from bridge import ProjectorConfig, QFormerConfig
from generate import Sampling, generate_ids
from lora import LoRAConfig, add_lora
from model import ModelConfig, Phi, PhiConfig, TinyGPTV
from official.weights import from_official, phi_from_official, to_official
from vision import VisionConfig


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
        close(actual[None] if actual.ndim == 0 else actual, expected, self.meta["tolerance"], key)

    def check_all(self, actual, prefix, tolerance="tolerance"):
        """`actual`, by official names, holds every tensor below `prefix`."""
        expected = self.below(prefix)
        assert expected, f"nothing below {prefix}"
        for name in expected:
            close(actual[name], expected[name], self.meta[tolerance], name)


def close(actual, expected, atol, name):
    assert_close(actual, expected, rtol=0, atol=atol, msg=lambda message: f"{name}: {message}")


CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def official_decode(tokenizer, ids, skip_special=True):
    """Text as the official (slow Hugging Face) tokenizer prints it: a space round every added
    token, and none before punctuation."""
    parts = [[]]
    for i in ids:
        if i in tokenizer._added.values():
            parts += [[i], []]
        elif i != tokenizer.eos_token_id or not skip_special:
            parts[-1].append(i)
    text = " ".join(tokenizer.decode(part, skip_special=False) for part in parts if part)
    for spaced in CLEAN_UP:
        text = text.replace(spaced, spaced.strip())
    return text


def number_after(word, text, default=None):
    """The number in "repetition_penalty 1.2", as text."""
    match = re.search(rf"{word} (\d[\d.]*\d|\d)", text)
    return match[1] if match else default


# ---- modules of the size that a sidecar describes ----
def loaded(module, state):
    module.load_state_dict(state)
    return module.eval()


def recorded(modules):
    """A list to which every call of one of `modules` appends its output."""
    outputs = []
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    return outputs


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


# ---- Phi alone ----
def only_phi(phi, lora=None):
    return ModelConfig(None, None, None, phi, lora, stage=0)


def phi_of(golden):
    config = phi_config(golden.meta["config"])
    return loaded(Phi(config), phi_from_official(golden.below("w/"), config.num_heads)[0])


def lora_phi_of(golden):
    """Phi with LoRA, and its configuration."""
    meta = golden.meta["config"]
    config = only_phi(phi_config(meta), LoRAConfig(meta["lora_r"], meta["lora_alpha"]))
    phi = Phi(config.phi)
    add_lora(phi, config.lora)
    state, _ = from_official(golden.below("w/"), config)
    return loaded(phi, {name.removeprefix("phi."): t for name, t in state.items()}), config


def logits_of(phi, input_ids):
    return phi.lm_head(phi(phi.embed_tokens(input_ids)))


def official_names(tensors, config):
    """Tensors of Phi by their official names, which begin with "base_model." if there is LoRA."""
    official = to_official({f"phi.{name}": t for name, t in tensors.items()}, config)
    return {name.removeprefix("llama_model."): t for name, t in official.items()}


def grads_of(module):
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


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


# ---- the whole model ----
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
    return {n.replace("base_model.model.", ""): t for n, t in weights.items() if "lora_" not in n}


def full_model(case, stage, lora=True):
    config = full_config(case, stage, lora)
    return loaded(TinyGPTV(config), from_official(full_weights(case, lora), config)[0])


def trainable(model, config):
    """Official names of what training changes in `model`."""
    train.set_trainable(model)
    return set(to_official({n: p for n, p in model.named_parameters() if p.requires_grad}, config))


def schedule_of(config, warmup_lr):
    return train.Schedule(
        1, config["max_epoch"], config["iters_per_epoch"], 1, config["warmup_steps"],
        config[warmup_lr], config["init_lr"], config["min_lr"],
    )  # fmt: skip


# ---- batches ----
def turns_of(meta):
    """Prompt and answer of every turn of every sample, worded as the official code does."""
    samples, template = meta["samples"], meta["prompt_template"]
    if "conv_q" in samples:
        conversations = []
        for row in zip(samples["conv_q"], samples["conv_a"], samples["connect_sym"], strict=True):
            questions, answers, sym = row
            turns = zip(questions.split(sym), answers.split(sym), strict=True)
            conversations.append([(template.format(q), a) for q, a in turns])
        return conversations
    answers = samples["answer"]
    prompts = [meta.get("chosen_prompt", data.IMAGE_PLACEHOLDER)] * len(answers)
    if "instruction_input" in samples:
        template = template if meta["chat_template"] else "{}"
        prompts = [template.format(text) for text in samples["instruction_input"]]
    return [[turn] for turn in zip(prompts, answers, strict=True)]


def rows_of(case, golden, tokenizer, max_txt_len=None):
    num_queries = case("full_weights").meta["config"]["qformer"]["num_query"]
    return [
        data.encode_sample(
            turns, tokenizer, turns[0][0].count(data.IMAGE_PLACEHOLDER), num_queries,
            max_txt_len or golden.meta["max_txt_len"], golden.meta["end_sym"], mask_later_bos=True,
        )
        for turns in turns_of(golden.meta)
    ]  # fmt: skip


def batch_of(case, golden, tokenizer):
    """What the model takes. Of the pictures in/image, `length` of each sample are in its prompt."""
    batch = data.collate(rows_of(case, golden, tokenizer), tokenizer.pad_token_id)
    batch = {key: batch[key] for key in ("input_ids", "labels", "attention_mask")}
    if "in/image" in golden.tensors:
        images, lengths = golden["in/image"], golden.meta["samples"].get("length")
        used = torch.cat([row[:n] for row, n in zip(images, lengths)]) if lengths else images
        batch["pixel_values"] = used
    return batch


def prompt_embeds(model, prompts, image_embeds, tokenizer):
    """Left-padded embeddings and mask of prompts, without BOS as officially."""
    ids = [
        data.encode_prompt(
            prompt, tokenizer, model.config.qformer.num_queries,
            num_images=prompt.count(data.IMAGE_PLACEHOLDER),
        )
        for prompt in prompts
    ]  # fmt: skip
    batch = data.left_pad_collate(ids, tokenizer.pad_token_id)
    return model.phi.embed(batch["input_ids"], image_embeds), batch["attention_mask"]
