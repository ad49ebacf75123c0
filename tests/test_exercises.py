"""Answers to the README's exercises, each with the check that it asks for. The code above the check
is all that has to change; in the files it would replace what its first line names."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import data
import lora
from bridge import QFORMER_PRESETS, QFormerConfig
from data import RowSettings, Tokenizer, collate, encode_record, inference_prompt
from miniature import world
from model import TinyGPTV
from train import enter_stage, set_trainable
from vision import VISION_PRESETS, EvaViT

WEIGHTS = "miniature/weights"


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Four pictures of the world with their captions, as stage 1 learns from them."""
    tokenizer, rows = Tokenizer(WEIGHTS), []
    settings = RowSettings(1, tokenizer, 112, 32)
    for seed in range(4):
        scene = world.sample_scene(seed, "train")
        record, image = world.caption_record(scene), world.render(scene, 112)
        rows.append(encode_record(record, image, random.Random(0), settings))
    names = ("input_ids", "labels", "attention_mask", "pixel_values")
    collated = collate(rows, tokenizer.pad_token_id)
    return {name: collated[name] for name in names}


def test_lora_on_the_mlp(monkeypatch, batch):
    """Exercise 1: a detour around fc1 and fc2 of every Phi block."""
    monkeypatch.setattr(lora, "TARGETS", ("qkv", "dense", "fc1", "fc2"))  # lora.TARGETS

    model = TinyGPTV.from_pretrained(WEIGHTS, 1)
    before = model(**batch).item()
    enter_stage(model, 2, "mini")
    set_trainable(model.eval())
    assert model(**batch).item() == pytest.approx(before, abs=1e-6)  # B is zero
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == 156_928 + 6 * 2 * 8 * (192 + 768)


class PooledBridge(nn.Module):
    """bridge.QFormer: 32 means of neighbouring patches instead of 32 queries."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.num_queries = config.num_queries
        self.linear = nn.Linear(config.vision_hidden_size, config.hidden_size)

    def forward(self, image_features: Tensor) -> Tensor:
        patches = image_features[:, 1:].mT  # (B, vision_hidden_size, N)
        return self.linear(F.adaptive_avg_pool1d(patches, self.num_queries).mT)


def test_a_linear_layer_as_bridge(batch):
    """Exercise 2: what comes out fits, and it learns."""
    torch.manual_seed(0)
    model = TinyGPTV.from_pretrained(WEIGHTS, 1)
    set_trainable(model)
    bridge = PooledBridge(QFORMER_PRESETS["mini"])
    images = model.visual_encoder(batch["pixel_values"]).detach()
    assert bridge(images).shape == model.qformer(images).shape == (4, 32, 192)
    optimizer = torch.optim.AdamW([*bridge.parameters(), *model.projector.parameters()], lr=1e-3)
    losses = []
    for _ in range(8):
        image_embeds = model.projector(bridge(images))
        inputs_embeds = model.phi.embed(batch["input_ids"], image_embeds)
        loss = model.phi.loss(inputs_embeds, batch["attention_mask"], batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_new_task(monkeypatch):
    """Exercise 3: [title], a task without a question."""
    monkeypatch.setitem(data.POOLS, "title", ("name this image",))
    monkeypatch.setitem(data.EXAMPLES, "title", {"image": "a.jpg", "caption": "A Dog at Rest"})

    prompt = "[INST] <Img><ImageHere></Img> [title] name this image  [/INST]"
    assert inference_prompt("title", "", stage=4) == prompt
    record, image = {"task": "title", "caption": "Three Shapes"}, Image.new("RGB", (64, 64))
    settings = RowSettings(4, Tokenizer(WEIGHTS), 224, 32)
    row = encode_record(record, image, random.Random(0), settings)
    answer = row["input_ids"][row["labels"] >= 0]
    assert Tokenizer(WEIGHTS).decode(answer.tolist()) == "Three Shapes###"


def test_clip_in_the_place_of_eva():
    """Exercise 4: another eye of the same size."""
    vision = replace(VISION_PRESETS["mini"], clip=True)  # vision.VISION_PRESETS

    pixel_values = torch.randn(1, 3, 112, 112)
    clip, eva = EvaViT(vision), EvaViT(VISION_PRESETS["mini"])
    assert clip(pixel_values).shape == eva(pixel_values).shape
    new = clip.state_dict().keys() ^ eva.state_dict().keys()
    assert {name.split(".")[-1] for name in new} == {"k_bias", "bias", "weight"}
    assert new - {"patch_embed.proj.bias", "ln_pre.weight", "ln_pre.bias"} == {
        f"blocks.{n}.attn.k_bias" for n in range(5)
    }
