"""The names of the official weight files, to ours and back; test_golden.py tests the numbers."""

import functools

import pytest
import torch

import train
from experiments.run_log import summary
from golden_case import Case, full_config, full_weights
from model import ModelConfig, TinyGPTV
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


@pytest.mark.parametrize("stage, total, trainable", [
    (1, 3_884_473_728, "13,809,664 in 133 tensors"),
    (2, 3_915_931_008, "45,266,944 in 261 tensors"),
    (3, 3_915_931_008, "45,266,944 in 261 tensors"),
    (4, 3_915_931_008, "45,266,944 in 261 tensors"),
])  # fmt: skip
def test_training_begins_with_the_official_numbers_of_parameters(stage, total, trainable):
    """The official model of stage 4 has 1,081,344 more, because it keeps the positions of the
    larger picture, which are computed here from those of the smaller one."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("full", stage))
    train.set_trainable(model)
    qformer, projector = 2_816 + 105_137_664 + 24_576, 3_149_824 + 10_488_320
    phi = 2_779_776_000 + (31_457_280 if stage > 1 else 0)  # with the new norms, and LoRA
    assert total == 985_894_528 + qformer + projector + phi
    assert summary(model, 5, [3], "bf16") == (
        f"visual_encoder 985,894,528 + qformer {qformer:,} + projector {projector:,} + phi {phi:,} "
        f"= {total:,} parameters, of which {trainable} learn; 5 steps of 3 samples "
        f"at {448 if stage == 4 else 224} pixels, products in bf16"
    )
