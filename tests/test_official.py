"""The names of the official weight files, to ours and back; test_golden.py tests the numbers."""

import functools

import pytest
import torch

from golden_case import Case, full_config, full_weights
from model import TinyGPTV
from official.weights import by_blocks, by_heads, from_official, phi_from_official, to_official


@pytest.fixture(scope="module")
def case(golden):
    return functools.cache(lambda name: Case(golden, name))


@pytest.mark.parametrize("lora", [False, True])
def test_official_names_there_and_back(case, lora):
    """Every tensor of the official model has its place here, and comes back bit for bit."""
    config, official = full_config(case, 1, lora), full_weights(case, lora)
    ours, ignored = from_official(official, config)
    model = TinyGPTV(config)
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert set(ignored) == {name for name in official if name.endswith("position_ids")}
    back = to_official(ours, config)
    assert set(back) == set(official) - set(ignored)
    assert all(torch.equal(back[name], official[name]) for name in back)


@pytest.mark.parametrize("old, new", [
    ("", "module."),  # DistributedDataParallel
    ("lora_A.", "lora_A.default."),  # newer versions of PEFT
    ("base_model.model.", ""),  # a stage-1 file, read in stage 2
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


def test_rows_by_head_and_by_blocks():
    """Two heads of one row each: q0 k0 v0 q1 k1 v1 <-> q0 q1 k0 k1 v0 v1."""
    by_head, blocks = torch.tensor([0, 10, 20, 1, 11, 21]), torch.tensor([0, 1, 10, 11, 20, 21])
    assert by_blocks(by_head, num_heads=2).tolist() == blocks.tolist()
    assert by_heads(blocks, num_heads=2).tolist() == by_head.tolist()


def test_the_rows_of_the_vit_stay(case):
    """Unlike Phi's, the q, k and v of the ViT are stored in blocks."""
    name, rows = "visual_encoder.blocks.0.attn.qkv.weight", torch.arange(24)
    ours, _ = from_official({name: rows}, full_config(case, 1))
    assert ours[name].tolist() == rows.tolist()


def test_a_split_projection_without_its_siblings_is_named():
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="k_proj.weight is not"):
        phi_from_official(tensors, num_heads=2)
