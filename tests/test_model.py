"""model.py: Phi and its cache, the whole model, loading. The official numbers: test_golden.py."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from bridge import ProjectorConfig, QFormerConfig
from data import END_OF_TEXT, IGNORE, IMAGE_TOKEN_ID
from generate import generate_ids
from lora import LoRAConfig
from model import (
    KVCache,
    ModelConfig,
    Phi,
    PhiConfig,
    RMSNorm,
    TinyGPTV,
    apply_rotary,
    half_dtype,
    is_trainable,
    rotary_cos_sin,
)
from official.checkpoints import save_checkpoint
from train import set_trainable
from vision import VisionConfig

CONFIG = PhiConfig(
    vocab_size=23, hidden_size=24, num_layers=2, num_heads=3, intermediate_size=32,
    max_position_embeddings=32, partial_rotary_factor=0.5,
)  # fmt: skip
PADDING = pytest.mark.parametrize("padding", [[0, 0], [3, 1]], ids=["no padding", "left padding"])


def randomized(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.fixture
def phi():
    return randomized(Phi(CONFIG))


def prompts(padding):
    """Embeddings (2, 7, hidden_size), attention mask and positions of two left-padded prompts."""
    torch.manual_seed(1)
    mask = (torch.arange(7) >= torch.tensor(padding)[:, None]).long()
    return torch.randn(2, 7, CONFIG.hidden_size), mask, positions_of(mask)


def positions_of(mask):
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


# ---- parts ----
def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(position_of_q, position_of_k):
        turned = [apply_rotary(x, rotary_cos_sin(torch.tensor([[p]]), 4, 10000.0))
                  for x, p in ((q, position_of_q), (k, position_of_k))]  # fmt: skip
        return (turned[0] * turned[1]).sum()

    assert_close(score(5, 3), score(25, 23))
    assert (score(5, 3) - score(5, 4)).abs() > 1e-3


def test_rotary_turns_its_share_of_the_channels():
    x = torch.randn(1, 2, 3, 8)
    turned = apply_rotary(x, rotary_cos_sin(torch.arange(3)[None], 4, 10000.0))
    assert_close(turned[:, :, 0], x[:, :, 0])  # position 0 turns by no angle
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.isclose(turned[:, :, 1:, :4], x[:, :, 1:, :4]).any()
    assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_rms_norm():
    x, norm = torch.randn(2, 8), RMSNorm(8, eps=0.1)
    nn.init.normal_(norm.weight)
    assert_close(norm(x), x / (x.pow(2).mean(dim=-1, keepdim=True) + 0.1).sqrt() * norm.weight)


# ---- Phi ----
def test_norms_have_the_official_eps(phi):
    """Too small a difference to be seen in the golden vectors' outputs."""
    assert {norm.eps for norm in phi.modules() if isinstance(norm, nn.LayerNorm)} == {1e-5}
    assert {norm.eps for norm in phi.modules() if isinstance(norm, RMSNorm)} == {1e-6}


@torch.no_grad()
def test_no_token_sees_a_later_one(phi):
    x, _, _ = prompts([0, 0])
    changed = x.clone()
    changed[:, 4] = torch.randn(CONFIG.hidden_size)
    before, after = phi(x), phi(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.isclose(before[:, 4:], after[:, 4:]).all(dim=-1).any()


@torch.no_grad()
def test_left_padding_changes_nothing(phi):
    x, mask, positions = prompts([3, 1])
    hidden = phi(x, mask, positions)
    assert torch.isfinite(hidden).all()
    for row, padding in enumerate([3, 1]):
        alone = phi(x[row : row + 1, padding:])
        assert_close(hidden[row, padding:], alone[0])


@PADDING
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(phi, padding):
    """At every step the scores are those of all tokens at once, and so is the greedy choice."""
    x, mask, _ = prompts(padding)
    phi, x = phi.double(), x.double()  # fp32 alone rounds by up to 1e-6
    for ids, scores in generate_ids(phi, x, mask, max_new_tokens=8):
        full = phi.lm_head(phi(x, mask, positions_of(mask)))[:, -1]
        assert_close(scores, full, rtol=0, atol=1e-6, check_dtype=False)
        assert ids.tolist() == full.argmax(dim=-1).tolist()
        x = torch.cat([x, phi.embed_tokens(ids)[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)


@PADDING
@torch.no_grad()
def test_attention_maps_do_not_change_the_result(phi, padding):
    x, mask, positions = prompts(padding)
    maps: list[torch.Tensor] = []
    assert_close(phi(x, mask, positions, maps=maps), phi(x, mask, positions))
    assert [tuple(m.shape) for m in maps] == [(2, CONFIG.num_heads, 7, 7)] * CONFIG.num_layers
    for attention_map in maps:
        assert_close(attention_map.sum(dim=-1), torch.ones(2, CONFIG.num_heads, 7))
        assert (attention_map.triu(diagonal=1) == 0).all()


def test_too_many_positions_are_refused(phi):
    with pytest.raises(ValueError, match="33 positions; this model has 32"):
        phi(torch.zeros(1, 33, CONFIG.hidden_size))


@pytest.mark.parametrize("new", [1, 2])
def test_a_full_cache_takes_no_more(phi, new):
    """torch would write a single token to nowhere without a word."""
    cache = KVCache(CONFIG, 1, 4)
    phi(torch.randn(1, 4, CONFIG.hidden_size), cache=cache)
    with pytest.raises(ValueError, match=f"the cache has room for 4 tokens, not for {4 + new}"):
        phi(torch.randn(1, new, CONFIG.hidden_size), cache=cache)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_with_a_number_is_of_its_kind(device):
    assert half_dtype(f"{device}:0") == half_dtype(device)


def test_loss_is_the_cross_entropy_of_the_next_token(phi):
    x, mask, _ = prompts([0, 0])
    labels = torch.tensor([[IGNORE, IGNORE, 3, IGNORE, 5, 6, IGNORE], [IGNORE] * 6 + [7]])
    log_probabilities = F.log_softmax(phi.lm_head(phi(x, mask)), dim=-1)
    at = [(0, 1, 3), (0, 3, 5), (0, 4, 6), (1, 5, 7)]  # row, the place before the label, label
    expected = -torch.stack([log_probabilities[place] for place in at]).mean()
    assert_close(phi.loss(x, mask, labels), expected)


@torch.no_grad()
def test_pictures_fill_their_places_in_order(phi):
    ids = torch.tensor([[1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 2], [IMAGE_TOKEN_ID] * 2 + [3, 4]])
    pictures = torch.randn(2, 2, CONFIG.hidden_size)
    embeds = phi.embed(ids, pictures)
    assert torch.equal(embeds[0, 1:3], pictures[0]) and torch.equal(embeds[1, :2], pictures[1])
    assert torch.equal(embeds[0, 0], phi.embed_tokens.weight[1])


@pytest.mark.parametrize("pictures", [None, torch.zeros(1, 2, 24), torch.zeros(3, 2, 24)])
def test_pictures_must_fill_their_places_exactly(phi, pictures):
    ids = torch.tensor([[1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID]])
    filled = 0 if pictures is None else 2 * len(pictures)
    with pytest.raises(ValueError, match=f"4 image places, the pictures fill {filled}"):
        phi.embed(ids, pictures)


def test_official_numbers_of_parameters():
    """The counts that the official code gives at its real size."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("full", stage=2))

    def count(part):
        return sum(p.numel() for n, p in model.named_parameters() if re.search(part, n))

    counts = {
        "visual_encoder": 985_894_528, "ln_vision": 2_816, "qformer.(layers|norm)": 105_137_664,
        "query_tokens": 24_576, "projector.fc1": 3_149_824, "projector.fc2": 10_488_320,
        "phi.(?!.*lora)": 2_779_776_000, "lora": 31_457_280, "phi.*layernorm.weight": 171_520,
        "": 3_915_931_008,
    }  # fmt: skip
    assert {part: count(part) for part in counts} == counts
    trained = {n: p.numel() for n, p in model.named_parameters() if is_trainable(n)}
    assert (len(trained), sum(trained.values())) == (261, 45_266_944)
    in_stage_1 = [number for name, number in trained.items() if "lora" not in name]
    assert (len(in_stage_1), sum(in_stage_1)) == (133, 13_809_664)


# ---- saving and loading ----
def full_config(stage):
    return ModelConfig(
        VisionConfig(28, 14, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8),
        QFormerConfig(2, 8, 2, 2, intermediate_size=8, vision_hidden_size=8),
        ProjectorConfig(8, 10, CONFIG.hidden_size), replace(CONFIG, vocab_size=260),
        LoRAConfig(r=2, alpha=4) if stage >= 2 else None, stage,
    )  # fmt: skip


def write_tokenizer(folder):
    """The smallest there is: 256 bytes and no merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(b) for b in visible] + [chr(256 + n) for n in range(256 - len(visible))]
    vocab = {token: i for i, token in enumerate([*alphabet, END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")


def write_backbones(model, folder):
    """What a weights directory holds before any stage."""
    state = {n: t for n, t in model.state_dict().items() if ".lora_" not in n}
    for file, prefix in (("vision", "visual_encoder."), ("qformer", "qformer."), ("phi", "phi.")):
        part = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        save_file(part, folder / f"{file}.safetensors")
    write_tokenizer(folder)
    model.backbones = folder


@pytest.fixture
def weights(tmp_path):
    """A weights directory with backbones and stage2, and the model that was saved there."""
    model = randomized(TinyGPTV(full_config(stage=2)))
    write_backbones(model, tmp_path)
    set_trainable(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)  # training has moved it
    save_checkpoint(model, tmp_path / "stage2")
    return tmp_path, model


def test_loading_gives_back_what_was_saved(weights):
    folder, saved = weights
    for path, stage in ((folder, 2), (folder, None), (folder / "stage2", None)):
        model = TinyGPTV.from_pretrained(path, stage)
        assert model.config == saved.config and model.stage == 2 and not model.training
        assert list(model.state_dict()) == list(saved.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved.state_dict()[name]), name


def test_only_trainable_tensors_are_saved(weights):
    folder, saved = weights
    trainable = {name for name, p in saved.named_parameters() if p.requires_grad}
    assert set(load_file(folder / "stage2" / "model.safetensors")) == trainable
    assert sorted(p.name for p in (folder / "stage2").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("file, change, reasons", [
    ("vision.safetensors", lambda t: t.pop("blocks.0.attn.q_bias"),
     ["missing", "visual_encoder.blocks.0.attn.q_bias"]),
    ("stage2/model.safetensors", lambda t: t.pop("phi.layers.1.self_attn.qkv.lora_A.weight"),
     ["missing", "phi.layers.1.self_attn.qkv.lora_A.weight"]),
    ("stage2/model.safetensors", lambda t: t.pop("phi.layers.0.post_layernorm.weight"),
     ["stage2", "missing", "phi.layers.0.post_layernorm.weight"]),  # phi.safetensors has one
    ("phi.safetensors", lambda t: t.update({"extra.weight": torch.zeros(1)}),
     ["phi.safetensors", "unexpected", "phi.extra.weight"]),
    ("qformer.safetensors", lambda t: t.update({"query_tokens": torch.zeros(1, 3, 8)}),
     ["qformer.safetensors", "qformer.query_tokens", "(1, 3, 8)", "(1, 2, 8)"]),
    ("phi.safetensors", lambda t: t["lm_head.bias"].fill_(float("nan")),
     ["phi.safetensors", "phi.lm_head.bias", "NaN"]),
    ("stage2/model.safetensors", lambda t: t["projector.fc1.bias"].fill_(float("inf")),
     ["model.safetensors", "projector.fc1.bias", "infinity"]),
])  # fmt: skip
def test_damaged_weights_are_refused(weights, file, change, reasons):
    path = weights[0] / file
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        TinyGPTV.from_pretrained(weights[0], 2)
    assert all(reason in str(error.value) for reason in reasons), error.value


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_files_are_refused(weights, length):
    path = weights[0] / "phi.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"phi.safetensors \([\d,]+ bytes\) is not a"):
        TinyGPTV.from_pretrained(weights[0], 2)


@pytest.mark.parametrize("file", ["vision.safetensors", "stage2/config.json"])
def test_missing_files_are_named(weights, file):
    (weights[0] / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} is missing"):
        TinyGPTV.from_pretrained(weights[0], 2)


@pytest.mark.parametrize("folder, stage, reason", [
    ("nowhere", None, "no weights directory .*nowhere"),
    (".", 3, "no stage 3 in it; stages found: 2"),
])  # fmt: skip
def test_missing_directories_are_named(weights, folder, stage, reason):
    with pytest.raises(FileNotFoundError, match=reason):
        TinyGPTV.from_pretrained(weights[0] / folder, stage)


def test_checkpoint_of_another_stage_is_named(weights):
    with pytest.raises(ValueError, match="stage2 holds stage 2, not 3"):
        TinyGPTV.from_pretrained(weights[0] / "stage2", 3)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"vision": {"image_size": 3}}'])
def test_damaged_config_is_named(weights, text):
    (weights[0] / "stage2" / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json does not describe a model"):
        TinyGPTV.from_pretrained(weights[0], 2)
