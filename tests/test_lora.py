"""lora.py: the detour, where it is put, and how it is folded away."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lora import LORA_PRESETS, LoRAConfig, LoRALinear, add_lora, merge_lora
from model import PHI_PRESETS, Phi, PhiConfig

CONFIG = LoRAConfig(r=3, alpha=12, dropout=0.5)


def small_phi():
    torch.manual_seed(0)
    phi = Phi(PhiConfig(vocab_size=11, hidden_size=16, num_layers=2, num_heads=2,
                        intermediate_size=24))  # fmt: skip
    return phi.eval()


def fill(phi):
    """Gives B, which begins at zero, something to say."""
    for module in phi.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B.weight)


def test_the_detour():
    layer = LoRALinear(nn.Linear(4, 5), CONFIG).eval()
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(2, 4)
    plain = x @ layer.weight.T + layer.bias
    assert_close(layer(x), plain + 12 / 3 * x @ layer.lora_A.weight.T @ layer.lora_B.weight.T)


def test_dropout_is_on_the_detour_only():
    torch.manual_seed(0)
    layer, x = LoRALinear(nn.Linear(4, 5), CONFIG).train(), torch.randn(2, 4)
    assert torch.equal(layer(x), layer(x))  # B is zero, and so the dropped detour
    nn.init.normal_(layer.lora_B.weight)
    assert not torch.equal(layer(x), layer(x))


@torch.no_grad()
def test_adding_changes_no_output_at_first():
    phi, x = small_phi(), torch.randn(1, 5, 16)
    before = phi(x)
    add_lora(phi, CONFIG)
    assert torch.equal(phi.eval()(x), before)
    fill(phi)
    assert not torch.allclose(phi(x), before)


@torch.no_grad()
def test_merged_equals_the_detour():
    phi, x = small_phi(), torch.randn(1, 5, 16)
    names = list(phi.state_dict())
    add_lora(phi, CONFIG)
    fill(phi)
    with_detour = phi.eval()(x)
    merge_lora(phi)
    assert_close(phi(x), with_detour)
    assert type(phi.layers[0].self_attn.qkv) is nn.Linear
    assert list(phi.state_dict()) == names


def test_only_qkv_and_dense_have_it():
    phi = small_phi()
    before = dict(phi.named_parameters())
    add_lora(phi, CONFIG)
    found = {name for name, module in phi.named_modules() if isinstance(module, LoRALinear)}
    assert found == {f"layers.{n}.self_attn.{name}" for n in (0, 1) for name in ("qkv", "dense")}
    after = dict(phi.named_parameters())
    assert all(after[name] is before[name] for name in before)  # the same weights, not copies


@pytest.mark.parametrize("preset", ["mini", "full"])
def test_number_of_parameters(preset):
    config, lora = PHI_PRESETS[preset], LORA_PRESETS[preset]
    with torch.device("meta"):
        phi = Phi(config)
        add_lora(phi, lora)
    size = sum(p.numel() for name, p in phi.named_parameters() if ".lora_" in name)
    wide = config.hidden_size
    assert size == config.num_layers * lora.r * ((wide + 3 * wide) + (wide + wide))
    if preset == "full":
        assert size == 31_457_280
