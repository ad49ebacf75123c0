"""vision.py: patches, positions, attention. The official numbers are in test_golden.py."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bridge import naive_attention
from vision import VISION_PRESETS, Attention, EvaViT, VisionConfig, attend, interpolate_pos_embed

CONFIG = VisionConfig(
    image_size=56, patch_size=14, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24
)
GRID = CONFIG.image_size // CONFIG.patch_size


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = EvaViT(CONFIG)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.3)
    return vit.eval()


@torch.no_grad()
def test_class_token_first_then_patches_row_by_row(vit):
    picture = torch.randn(1, 3, 56, 56)
    changed = picture.clone()
    changed[..., 14:28, 42:56] += 1  # the patch in row 1, column 3
    differs = (vit.embed(picture) != vit.embed(changed)).any(dim=-1)[0]
    assert differs.nonzero().tolist() == [[1 + 1 * GRID + 3]]


def test_number_of_tokens_follows_the_resolution(vit):
    assert vit(torch.zeros(2, 3, 56, 56)).shape == (2, 1 + 16, 16)
    assert vit(torch.zeros(2, 3, 112, 112)).shape == (2, 1 + 64, 16)


@pytest.mark.parametrize("size", [(56, 70), (50, 50)])
def test_wrong_sizes_are_refused(vit, size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}.*multiple of 14"):
        vit(torch.zeros(1, 3, *size))


def test_interpolation_to_the_same_grid_changes_nothing(vit):
    assert torch.equal(interpolate_pos_embed(vit.pos_embed, GRID), vit.pos_embed)


def test_interpolation_keeps_the_class_token_and_a_constant(vit):
    positions = torch.cat([vit.pos_embed[:, :1], torch.full((1, GRID**2, 16), 0.7)], dim=1)
    stretched = interpolate_pos_embed(positions, 2 * GRID)
    assert stretched.shape == (1, 1 + 4 * GRID**2, 16)
    assert torch.equal(stretched[:, 0], positions[:, 0])
    assert_close(stretched[:, 1:], torch.full((1, 4 * GRID**2, 16), 0.7))


@torch.no_grad()
def test_attention_equals_its_naive_twin():
    """q, k and v as three layers, the key's without bias, and no fused call."""
    torch.manual_seed(0)
    attention, x = Attention(CONFIG), torch.randn(2, 5, 16)
    nn.init.normal_(attention.q_bias)
    nn.init.normal_(attention.v_bias)
    of_q, of_k, of_v = attention.qkv.weight.chunk(3)
    q, k, v = (
        y.view(2, 5, CONFIG.num_heads, -1).transpose(1, 2)
        for y in (x @ of_q.T + attention.q_bias, x @ of_k.T, x @ of_v.T + attention.v_bias)
    )
    y, _ = naive_attention(q, k, v)
    assert_close(attention(x), attention.proj(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("heads", [4, 5])
@torch.no_grad()
def test_attention_is_as_exact_as_bf16_can_be(heads, amx, monkeypatch):
    """In bf16 on a CPU, with AMX and by heads; keys with much in common, as EVA's have, would cost
    precision."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 60, 88) for _ in range(3))
    k += 10 * torch.randn(88)
    right = naive_attention(q.double(), k.double(), v.double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v)
    assert found.dtype == torch.bfloat16 and found.shape == right.shape
    assert (found - right).norm() / right.norm() < 0.007
    assert_close(attend(q, k, v).double(), right, atol=1e-4, rtol=1e-4)  # fp32 is left alone
    q, k, v = (x.bfloat16() for x in (q, k, v))
    right = naive_attention(q.double(), k.double(), v.double())[0]
    assert (attend(q, k, v) - right).norm() / right.norm() < 0.007


def test_norms_have_the_official_eps(vit):
    """Too small a difference to be seen in the golden vectors' outputs."""
    assert {norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


def test_official_size():
    with torch.device("meta"):
        vit = EvaViT(VISION_PRESETS["full"])
    assert sum(p.numel() for p in vit.parameters()) == 985_894_528
