"""bridge.py: attention, Q-Former, projector. The official numbers are in test_golden.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from bridge import (
    PROJECTOR_PRESETS,
    QFORMER_PRESETS,
    Projector,
    ProjectorConfig,
    QFormer,
    QFormerConfig,
    naive_attention,
)

CONFIG = QFormerConfig(
    num_queries=5, hidden_size=16, num_layers=5, num_heads=4, intermediate_size=24,
    vision_hidden_size=12,
)  # fmt: skip


@pytest.fixture
def qformer():
    torch.manual_seed(0)
    qformer = QFormer(CONFIG)
    for parameter in qformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return qformer.eval()


@pytest.mark.parametrize("masked", [False, True])
def test_naive_attention_equals_the_fused_call(masked):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask = torch.ones(3, 6, dtype=torch.bool).tril(diagonal=3) if masked else None
    y, attention_map = naive_attention(q, k, v, mask)
    assert_close(y, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert_close(attention_map.sum(dim=-1), torch.ones(2, 4, 3))
    if masked:
        assert (attention_map[..., ~mask] == 0).all()


def test_every_second_layer_sees_the_picture(qformer):
    sees = [layer.cross_attn is not None for layer in qformer.layers]
    assert sees == [True, False, True, False, True]


@torch.no_grad()
def test_attention_maps_do_not_change_the_result(qformer):
    maps: list[torch.Tensor] = []
    picture = torch.randn(2, 9, 12)
    assert_close(qformer(picture, maps), qformer(picture))
    assert [tuple(m.shape) for m in maps] == [(2, 4, 5, 9)] * 3  # layers 0, 2 and 4
    for attention_map in maps:
        assert_close(attention_map.sum(dim=-1), torch.ones(2, 4, 5))


@torch.no_grad()
def test_the_picture_is_a_set_of_vectors(qformer):
    """Where a vector stands does not matter: what it knows of its place came with it."""
    picture = torch.randn(1, 9, 12)
    assert_close(qformer(picture), qformer(picture[:, torch.randperm(9)]))


@torch.no_grad()
def test_projector_has_nothing_between_its_layers():
    projector = Projector(ProjectorConfig(in_features=6, mid_features=8, out_features=4))
    x, y, zero = torch.randn(3, 6), torch.randn(3, 6), torch.zeros(3, 6)
    assert_close(projector(x + y), projector(x) + projector(y) - projector(zero))


def test_norms_have_the_official_eps(qformer):
    """Too small a difference to be seen in the golden vectors' outputs."""
    assert qformer.ln_vision.eps == 1e-5
    of_bert = [qformer.norm, *(norm for norm in qformer.layers.modules() if is_norm(norm))]
    assert {norm.eps for norm in of_bert} == {1e-12}


def is_norm(module):
    return isinstance(module, nn.LayerNorm)


def test_official_size():
    with torch.device("meta"):
        qformer = QFormer(QFORMER_PRESETS["full"])
        projector = Projector(PROJECTOR_PRESETS["full"])
    size = {name: p.numel() for name, p in qformer.named_parameters()}
    assert size.pop("query_tokens") == 24_576
    assert size.pop("ln_vision.weight") + size.pop("ln_vision.bias") == 2_816
    assert sum(size.values()) == 105_137_664
    assert [sum(p.numel() for p in layer.parameters()) for layer in projector.children()] == [
        3_149_824, 10_488_320,
    ]  # fmt: skip
