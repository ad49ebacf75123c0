"""experiments/ablation.py: each variant is the model it says, learned from scenes encoded once."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import collate, encode_record
from experiments import ablation, ablation_report
from experiments.ablation import FrozenNorm, Variant, freeze_norms, text_embeds
from experiments.encoded_scenes import (
    FIRST_SCENE,
    PoolDataset,
    encode_scenes,
    fingerprint,
    on_queries,
)
from miniature import stream, world
from model import Phi, TinyGPTV
from train import enter_stage, new_optimizer, set_trainable, to_device, train_step

WEIGHTS = ablation.Config.weights
VARIANTS = {name: variant for study in ablation.STUDIES.values() for name, variant in study.items()}


@pytest.fixture(scope="module")
def backbones() -> TinyGPTV:
    torch.manual_seed(0)
    return TinyGPTV.from_pretrained(WEIGHTS, 0)


@pytest.fixture(autouse=True)
def few_texts(monkeypatch):
    monkeypatch.setattr(ablation, "NUM_TEXTS", 6)


@pytest.fixture(scope="module")
def pool(backbones) -> dict:
    return encode_scenes(backbones, scenes=6, batch_size=4)


@pytest.fixture
def model(backbones) -> TinyGPTV:
    return copy.deepcopy(backbones)


def entered(model: TinyGPTV, stage: int, variant: Variant) -> TinyGPTV:
    """The model as run_stage makes it ready for a stage, and all before it."""
    torch.manual_seed(1)
    for number in range(1, stage + 1):
        enter_stage(model, number, "mini")
        variant.edit(model)
    set_trainable(model)
    return model.train()


def rows_of(model: TinyGPTV, task: str, stage: int, vectors: torch.Tensor) -> PoolDataset:
    num_queries = model.config.qformer.num_queries
    encoding = (model.tokenizer, model.image_size, num_queries)
    return PoolDataset(task, stage, *encoding, 0, vectors)


def pixel_row(model: TinyGPTV, task: str, stage: int, position: int, scenes: int) -> dict:
    """Row `position` of a PoolDataset as it would be with its picture."""
    rng = random.Random(f"0 {task} {stage} {position}")
    scene, size = world.sample_scene(FIRST_SCENE + rng.randrange(scenes), "train"), model.image_size
    if task == "chat":
        record = stream.conversation(scene, rng, size)
    else:
        record = world.sample_record(scene, rng, task, size)
    image = world.render(scene, size)
    return encode_record(record, image, rng, stage, model.tokenizer, size, 32)


def one_step(model: TinyGPTV, rows: list[dict]) -> tuple[float, float]:
    batch = to_device(collate(rows, model.tokenizer.pad_token_id), "cpu")
    return train_step(model, new_optimizer(model), ablation.NO_SCALING, [batch], lr=1e-3)


@pytest.mark.parametrize("stage, task", [(1, "caption"), (4, "chat"), (4, "refer")])
def test_a_step_on_the_pool_is_train_pys_step_on_the_pictures(stage, task, model, pool):
    model = entered(model, stage, Variant())
    twin = copy.deepcopy(model)
    rows = rows_of(model, task, stage, pool[f"queries {model.image_size}"])
    torch.manual_seed(2)
    by_pixels = one_step(model, [pixel_row(model, task, stage, n, 6) for n in range(3)])
    torch.manual_seed(2)
    with on_queries(twin):
        by_queries = one_step(twin, [rows[n] for n in range(3)])
    assert by_queries == pytest.approx(by_pixels, rel=1e-4)
    for (name, one), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(one, other, rtol=0, atol=2e-5), name


def test_the_full_variant_is_the_plain_model(model, pool):
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    for stage in (1, 2, 3, 4):
        enter_stage(plain, stage, "mini")
    full = entered(model, 4, VARIANTS["full"])
    assert type(full.phi.layers[0].post_layernorm) is type(plain.phi.layers[0].post_layernorm)
    state = full.state_dict()
    assert all(value.equal(state[name]) for name, value in plain.state_dict().items())
    [embeds, *_] = text_embeds(plain)
    with torch.no_grad():
        assert full.eval().phi(embeds).equal(plain.eval().phi(embeds))


def test_without_lora_all_else_is_the_same(model):
    full = entered(copy.deepcopy(model), 2, VARIANTS["full"])
    model = entered(model, 4, VARIANTS["no LoRA"])
    learns = {name for name, p in full.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in learns if ".lora_" not in name
    }
    weights = full.state_dict()
    assert all(value.equal(weights[name]) for name, value in model.state_dict().items())


FROZEN = {"no input LayerNorm": ("input_layernorm",), "no RMSNorm": ("post_layernorm",),
          "no QK-norm": ("q_layernorm", "k_layernorm")}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_norm_begins_near_the_function_and_forgets_sizes(name, model):
    """Less than a nat from its predictions, and linear: any size of x gives that size of y."""
    plain = copy.deepcopy(model).phi
    phi = entered(model, 1, VARIANTS[name]).eval().phi
    frozen = [m for n, m in phi.named_modules() if n.endswith(FROZEN[name])]
    assert len(frozen) == 6 * len(FROZEN[name])
    assert all(isinstance(module, FrozenNorm) for module in frozen)
    with torch.no_grad():
        nats = [F.kl_div(log_probs(phi, text), log_probs(plain, text), reduction="batchmean",
                         log_target=True).item() for text in text_embeds(model)]  # fmt: skip
    assert 0 < sum(nats) / len(nats) < 1
    x = torch.randn(1, 6, 5, 32) if "QK" in name else torch.randn(1, 5, 192)
    zero, one, two = (frozen[0](k * x) for k in (0, 1, 2))
    assert torch.allclose(two - one, one - zero, atol=1e-4) and not torch.allclose(two, one)


def log_probs(phi: Phi, inputs_embeds: torch.Tensor) -> torch.Tensor:
    return phi.lm_head(phi(inputs_embeds))[0].log_softmax(-1)  # (T, vocab_size)


def test_frozen_norms_keep_what_learns(model):
    full = entered(copy.deepcopy(model), 4, Variant())
    learns = {name for name, p in full.named_parameters() if p.requires_grad}
    for name in FROZEN:
        edited = entered(copy.deepcopy(model), 4, VARIANTS[name])
        assert {n for n, p in edited.named_parameters() if p.requires_grad} == learns


@pytest.mark.parametrize("name, shape", [("input_layernorm", (1, 7, 192)),
                                         ("k_layernorm", (1, 6, 7, 32))])  # fmt: skip
def test_constants_are_means_over_the_tokens(name, shape, model):
    """A token of just that mean and size comes out as the norm itself has it; so in each head."""
    block = model.phi.layers[0]
    parent = block if name in block._modules else block.self_attn
    norm = getattr(parent, name)
    freeze_norms(model, (name,))
    frozen = getattr(parent, name)
    assert frozen.mean.numel() == frozen.scale.numel() == (6 if len(shape) == 4 else 1)
    x = torch.randn(shape)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True)
    assert torch.allclose(frozen(x / frozen.scale + frozen.mean), norm(x), atol=1e-3)


def test_one_linear_map_begins_as_the_two(model):
    queries = torch.randn(2, 32, 192)
    before = model.projector(queries)
    ablation.one_linear_map(model)
    assert torch.allclose(model.projector(queries), before, atol=1e-4)
    assert len(list(model.projector.parameters())) == 2


@pytest.mark.parametrize("name, seen", [
    ("without right and bottom", 24), ("MLP", 32), ("pooled patches", 32),
])  # fmt: skip
def test_other_bridges_learn_and_answer(name, seen, model, pool):
    """From the pool what pixels would give, through the parts that evaluation uses."""
    variant = VARIANTS[name]
    model = entered(model, 4, variant)
    vectors = pool[f"{variant.view} {model.image_size}"]
    row = rows_of(model, "vqa", 4, vectors)[0]
    assert (row["input_ids"] < 0).sum() == seen and len(row["pixel_values"][0]) == 32
    scene = world.sample_scene(FIRST_SCENE, "train")
    pixels = ablation.evaluate.encode_images(model, [world.render(scene, model.image_size)])
    with on_queries(model):
        encoded = model.encode_images(vectors[:1])
    assert encoded.shape == (1, seen, 192) and torch.allclose(encoded, pixels, atol=1e-2)
    assert all(p.requires_grad for p in model.projector.parameters())


def test_kept_queries_are_the_first_of_each_object():
    queries = torch.arange(32.0)[None, :, None]
    kept = ablation.EachObjects(2)(queries)
    assert kept.flatten().tolist() == [0, 1, 8, 9, 16, 17, 24, 25]


def test_resolution_and_mixture(model):
    model = entered(model, 4, VARIANTS["not doubled"])
    assert model.image_size == 112
    assert VARIANTS["single questions"].ratios["chat"] == 0 < stream.RATIOS[4]["chat"]


def test_fp16_loses_what_is_too_small_or_too_large(model, pool):
    """As it is, next to nothing; with weights 10,000 times as large no batch is left. Of a
    gradient a million times as small most is gone."""
    model = entered(model, 1, Variant())
    rows = rows_of(model, "caption", 1, pool["queries 112"])
    batch = to_device(collate([rows[n] for n in range(2)], model.tokenizer.pad_token_id), "cpu")
    as_it_is = ablation.in_fp16(model, [batch])
    assert as_it_is["fp16_bad"] == 0 and as_it_is["fp16_lost"] < 0.01
    assert 1 < as_it_is["largest_activation"] < 1000
    large = copy.deepcopy(model)
    large.phi.layers[3].mlp.fc1.weight.data *= 1e4
    overflown = ablation.in_fp16(large, [batch])
    assert overflown["fp16_bad"] == 1 and overflown["fp16_lost"] is None
    scores = copy.deepcopy(model)  # which the norm of q and k keeps small
    scores.phi.layers[3].self_attn.k_layernorm.weight.data *= 1e4
    assert ablation.in_fp16(scores, [batch])["fp16_bad"] == 1
    model.phi.final_layernorm.weight.data *= 1e-6
    assert ablation.in_fp16(model, [batch])["fp16_lost"] > 0.5


def test_a_run_is_written_once(model, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(ablation.STUDIES, "norms", {"no RMSNorm": VARIANTS["no RMSNorm"]})
    monkeypatch.setattr(ablation, "FP16_BATCHES", 1)
    arguments = ["seeds=1", "steps=2,1,1,1", "batch_size=2", "n=2", "scenes=4", f"pool={tmp_path}"]
    assert ablation.main(arguments) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    [path] = tmp_path.glob("results/norms/*.json")
    result = json.loads(path.read_text())
    assert path.name == "no-rmsnorm-0.json" and set(result["stages"]) == {"1", "2", "3", "4"}
    assert result["stages"]["1"]["loss"] > 1 and result["stages"]["1"]["bad_steps"] == 0
    assert told["no RMSNorm"]["loss"] == round(result["stages"]["4"]["loss"], 4)
    written = path.stat().st_mtime_ns
    assert ablation.main(arguments) == 0 and path.stat().st_mtime_ns == written
    assert ablation.main([*arguments, "n=3"]) == 2
    assert "was made with n=2" in capsys.readouterr().err


@pytest.mark.parametrize("argument, said", [
    ("study=norm", "choose from norms, queries"), ("steps=1,2,3", "say four numbers"),
    ("steps=1,2,3,x", "say four numbers"), ("seeds=0", "1 or more"), ("seed=1", "did you mean"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(argument, said, capsys):
    assert ablation.main([argument]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


# ---- the report ----


def fake_result(folder: Path, study: str, name: str, seed: int, loss: float | None) -> None:
    """A run's file as ablation.py writes it, with losses 4, 3, 2 times `loss` before the last."""
    about = {"grad_norm_median": 0.5, "grad_norm_max": 1.5 + seed, "bad_steps": 0,
             "fp16_bad": 0.25, "fp16_lost": loss and 0.001, "largest_activation": 30.0}  # fmt: skip
    stages = {str(5 - times): {"loss": loss and times * loss} | about for times in (4, 3, 2, 1)}
    scores = {key: 0.1 * seed + 0.5 for key in ("caption_f1", "refer_iou50", "identify",
                                                "detection_f1", "grounding_f1")}  # fmt: skip
    weights = fingerprint(ablation.Config.weights, ablation.BACKBONES)
    result = {"variant": name, "weights": weights, "stages": stages,
              "vqa": {"color": 1.0, "mean": 0.9}} | scores  # fmt: skip
    path = folder / study / f"{name}-{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))


def test_the_report_has_mean_and_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_report, "RESULTS", tmp_path)
    assert ablation_report.ablation_section() == "Not run yet with the shipped weights."
    ablation_report.draw_ablation(tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    for seed in (0, 1):
        fake_result(tmp_path, "norms", "full", seed, 0.2 + 0.1 * seed)
        fake_result(tmp_path, "norms", "no QK-norm", seed, None if seed else 0.5)
    fake_result(tmp_path, "projection", "MLP", 0, 0.3)
    cells = {}
    for line in ablation_report.ablation_section().splitlines():
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        cells[name] = values
    assert cells["full"][:5] == ["1.000 ± 0.283", "0.750 ± 0.212", "0.500 ± 0.141",
                                 "0.250 ± 0.071", "2.620, 2.343, 1.125, 1.330"]  # fmt: skip
    assert cells["full"][5:] == ["0.50, 2.5", "0.10%", "25%", "30"]
    assert cells["no QK-norm"][:5] == ["not finite"] * 4 + ["vanish"]
    assert cells["no QK-norm"][6] == "0.10%"  # of the run that has it
    assert cells["full (2)"] == ["0.550 ± 0.071", "0.900 ± 0.000"] + ["0.550 ± 0.071"] * 4
    assert cells["MLP (1)"][:2] == ["0.500", "0.900"] and "no LoRA" not in cells


def test_the_picture_has_a_dot_for_each_run(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation_report, "RESULTS", tmp_path)
    fake_result(tmp_path, "norms", "full", 0, 0.25)
    ablation_report.draw_ablation(tmp_path / "a.png")
    fake_result(tmp_path, "norms", "no LoRA", 0, 0.2)
    ablation_report.draw_ablation(tmp_path / "b.png")
    red = list(bytes.fromhex(ablation_report.VARIANT_COLORS[1][1:]))
    legend, both = (
        (np.asarray(Image.open(tmp_path / f"{name}.png")) == red).all(-1).sum() for name in "ab"
    )
    assert 0 < legend < both / 5  # ten dots more
