"""experiments/ablation.py: each variant is the model it says, learned from scenes encoded once."""

import copy
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import RowSettings, collate, encode_record
from experiments import ablation, ablation_report
from experiments.ablation import ConstantNorm, Variant, make_constant, text_embeds
from experiments.encoded_scenes import FIRST_SCENE, PoolDataset, encode_scenes, on_queries
from experiments.fp16 import in_fp16, passes
from miniature import stream, world
from model import TinyGPTV
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
        if number == variant.since:
            variant.edit(model)
    set_trainable(model)
    return model.train()


def rows_of(model: TinyGPTV, task: str, stage: int, vectors: torch.Tensor) -> PoolDataset:
    num_queries = model.config.qformer.num_queries
    settings = RowSettings(stage, model.tokenizer, model.image_size, num_queries)
    return PoolDataset(task, settings, 0, vectors)


def pixel_row(model: TinyGPTV, task: str, stage: int, position: int, scenes: int) -> dict:
    """Row `position` of a PoolDataset as it would be with its picture."""
    rng = random.Random(f"0 {task} {stage} {position}")
    scene, size = world.sample_scene(FIRST_SCENE + rng.randrange(scenes), "train"), model.image_size
    record = stream.record_about(scene, rng, task, size)
    image = world.render(scene, size)
    return encode_record(record, image, rng, RowSettings(stage, model.tokenizer, size, 32))


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


NORMS = {"no input LayerNorm": ("input_layernorm",), "no RMSNorm": ("post_layernorm",),
          "no QK-norm": ("q_layernorm", "k_layernorm")}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_constant_norm_forgets_sizes(name, model):
    """It is linear: any size of x gives that size of y. All six layers have it, in every stage."""
    phi = entered(model, 4, VARIANTS[name]).phi
    constant = [m for n, m in phi.named_modules() if n.endswith(NORMS[name])]
    assert len(constant) == 6 * len(NORMS[name])
    assert all(isinstance(module, ConstantNorm) for module in constant)
    x = torch.randn(1, 6, 5, 32) if "QK" in name else torch.randn(1, 5, 192)
    zero, one, two = (constant[0](k * x) for k in (0, 1, 2))
    assert torch.allclose(two - one, one - zero, atol=1e-4) and not torch.allclose(two, one)


def test_what_an_edit_costs_before_any_training(pool, monkeypatch):
    monkeypatch.setattr(ablation, "UNTRAINED_ROWS", 8)
    config = ablation.Config(scenes=6)
    names = ("full", "no LoRA", "no RMSNorm", "one linear map", "16 queries")
    full, no_lora, no_norm, one_map, few = (
        ablation.untrained_loss(VARIANTS[name], config, pool) for name in names
    )
    assert full < no_norm < few and full < 0.6
    assert no_lora == pytest.approx(full, abs=0.02)  # merged, which is the same function
    assert one_map == pytest.approx(full, abs=0.02)
    assert ablation.untrained_loss(VARIANTS["pooled patches"], config, pool) is None


def test_constant_norms_keep_what_learns(model):
    full = entered(copy.deepcopy(model), 4, Variant())
    learns = {name for name, p in full.named_parameters() if p.requires_grad}
    for name in NORMS:
        edited = entered(copy.deepcopy(model), 4, VARIANTS[name])
        assert {n for n, p in edited.named_parameters() if p.requires_grad} == learns


@pytest.mark.parametrize("name, shape", [("input_layernorm", (1, 7, 192)),
                                         ("k_layernorm", (1, 6, 7, 32))])  # fmt: skip
def test_constants_are_means_over_the_tokens(name, shape, model):
    """A token of just that mean and size comes out as the norm itself has it; so in each head."""
    block = model.phi.layers[0]
    parent = block if name in block._modules else block.self_attn
    norm = getattr(parent, name)
    make_constant(model, (name,))
    constant = getattr(parent, name)
    assert constant.mean.numel() == constant.scale.numel() == (6 if len(shape) == 4 else 1)
    x = torch.randn(shape)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, unbiased=False, keepdim=True)
    assert torch.allclose(constant(x / constant.scale + constant.mean), norm(x), atol=1e-3)


def test_one_linear_map_begins_as_the_two(model):
    queries = torch.randn(2, 32, 192)
    before = model.projector(queries)
    ablation.one_linear_map(model)
    assert torch.allclose(model.projector(queries), before, atol=1e-4)
    assert len(list(model.projector.parameters())) == 2


@pytest.mark.parametrize("name, seen", [
    ("24 queries", 24), ("MLP", 32), ("pooled patches", 32),
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
    gradient a million times as small most is gone, but not with a loss scale."""
    model = entered(model, 2, Variant())
    rows = rows_of(model, "caption", 1, pool["queries 112"])
    batch = to_device(collate([rows[n] for n in range(2)], model.tokenizer.pad_token_id), "cpu")
    as_it_is = in_fp16(model, [batch])
    assert as_it_is["not_finite"] == 0 and as_it_is["lost"] < 0.01
    assert 1 < as_it_is["activation"] < 1000 and 1 < as_it_is["score"] < 1000
    large = copy.deepcopy(model)
    large.phi.layers[3].mlp.fc1.weight.data *= 1e4
    overflown = in_fp16(large, [batch])
    assert overflown["not_finite"] == 1 and overflown["lost"] is None
    scores = copy.deepcopy(model)  # which the norm of q and k keeps small
    scores.phi.layers[3].self_attn.k_layernorm.weight.data *= 1e4
    too_large = in_fp16(scores, [batch])
    assert too_large["not_finite"] == 1 and too_large["score"] > 65504
    broken = copy.deepcopy(model)
    broken.phi.layers[3].mlp.fc1.weight.data[0] = float("nan")
    assert in_fp16(broken, [batch])["activation"] is None
    model.phi.final_layernorm.weight.data *= 1e-6
    small = in_fp16(model, [batch])
    assert small["lost"] > 0.5 and small["lost_scaled"] < small["lost"] / 2


def test_the_gradient_that_fp16_is_judged_by_is_that_of_all_variants(model, pool):
    """LoRA is not among it, and a loss scale is divided out again."""
    model = entered(model, 2, Variant())
    rows = rows_of(model, "caption", 1, pool["queries 112"])
    batch = to_device(collate([rows[0]], model.tokenizer.pad_token_id), "cpu")
    plain, scaled = passes(model, batch, torch.float32), passes(model, batch, torch.float32, 8.0)
    shared = [p.numel() for n, p in model.named_parameters()
              if p.requires_grad and ".lora_" not in n]  # fmt: skip
    assert plain.gradient.numel() == sum(shared)
    assert torch.allclose(plain.gradient, scaled.gradient, rtol=1e-4, atol=1e-7)
    assert plain.loss == scaled.loss


def test_a_run_is_written_once(model, pool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(ablation.STUDIES, "norms", {"no RMSNorm": VARIANTS["no RMSNorm"]})
    monkeypatch.setattr(ablation, "FP16_BATCHES", 1)
    monkeypatch.setattr(ablation, "UNTRAINED_ROWS", 4)
    arguments = ["seeds=1", "steps=2,1,1,1", "batch_size=2", "n=2", "scenes=4", f"pool={tmp_path}"]
    assert ablation.main(arguments) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    [path] = tmp_path.glob("results/norms/*.json")
    result = json.loads(path.read_text())
    assert path.name == "no-rmsnorm-0_steps-2,1,1,1_batch_size-2_n-2_scenes-4.json"
    assert set(result["stages"]) == {"1", "2", "3", "4"}
    assert result["stages"]["1"]["loss"] > 1 and result["stages"]["1"]["bad_steps"] == 0
    assert told["no RMSNorm"]["vqa"] == round(result["vqa"]["mean"], 4)
    assert result["untrained"] > 0 and len(result["stages"]["4"]["fp16"]) == 2
    written = path.stat().st_mtime_ns
    assert ablation.main(arguments) == 0 and path.stat().st_mtime_ns == written
    path.write_text(json.dumps(result | {"weights": "others"}))
    assert ablation.main(arguments) == 2
    assert "was made with weights=others" in capsys.readouterr().err


def test_a_try_has_a_file_of_its_own():
    usual, tried = ablation.Config(workers=2, pool="/tmp"), ablation.Config(n=5, weights="/w/mine")
    assert ablation.result_path(usual, "no RMSNorm", 1).name == "no-rmsnorm-1.json"
    assert ablation.result_path(tried, "full", 1).name == "full-1_n-5_weights-mine.json"


def test_an_edit_comes_once_with_its_stage(pool, tmp_path, monkeypatch):
    """And once more to the finished model, to see what it does untrained."""
    edited = []
    variant = Variant(lambda model: edited.append(model.stage), since=3)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(ablation.STUDIES, "norms", {"seen": variant})
    monkeypatch.setattr(ablation, "FP16_BATCHES", 1)
    monkeypatch.setattr(ablation, "UNTRAINED_ROWS", 2)
    arguments = ["seeds=1", "steps=1,1,1,1", "batch_size=1", "n=1", "scenes=4", f"pool={tmp_path}"]
    assert ablation.main(arguments) == 0 and edited == [3, 4]


@pytest.mark.parametrize("argument, said", [
    ("study=norm", "choose from norms, queries"), ("steps=1,2,3", "say four numbers"),
    ("steps=1,2,3,x", "say four numbers"), ("seeds=0", "1 or more"),
    ("batch_size=-1", "0 or more"), ("seed=1", "did you mean"),
])  # fmt: skip
def test_wrong_arguments_are_one_line(argument, said, capsys):
    assert ablation.main([argument]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


# ---- the report ----
def fake_result(
    folder: Path, study: str, name: str, seed: int, loss: float | None, **changed
) -> None:
    """A run's file as ablation.py writes it, with losses 4, 3, 2 times `loss` before the last."""
    fp16 = {"not_finite": 0.25, "lost": loss and 0.001, "lost_scaled": 0.0, "activation": 30.0,
            "score": None if loss is None else 1234.0}  # fmt: skip
    about = {"grad_norm_median": loss and 0.5, "grad_norm_max": loss and 2.0 + seed,
             "bad_steps": 1, "fp16": [fp16, fp16 | {"not_finite": 0.0}]}  # fmt: skip
    stages = {str(5 - times): {"loss": loss and times * loss} | about for times in (4, 3, 2, 1)}
    scores = {key: 0.1 * seed + (0.5 if name == "full" else 0.25) for key in (
        "caption_f1", "refer_iou50", "identify", "detection_f1", "grounding_f1")}  # fmt: skip
    described = ablation.described(ablation.Config(study=study), name, seed)
    result = described | {"untrained": 0.2, "stages": stages} | scores | {"vqa": {"mean": 0.9}}
    path = folder / study / f"{name}-{seed}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result | changed))


@pytest.fixture
def two_variants(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(ablation_report, "RESULTS", tmp_path)
    few = {name: VARIANTS[name] for name in ("full", "no QK-norm")}
    studies = {"norms": few, "projection": {"MLP": VARIANTS["MLP"]}}
    for study, variants in studies.items():
        monkeypatch.setitem(ablation_report.STUDIES, study, variants)
    return tmp_path


def rows_of_tables() -> dict[str, list[str]]:
    """By the first cell of a row and its length."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in ablation_report.ablation_section().splitlines()]  # fmt: skip
    return {f"{row[0]} {len(row)}": row[1:] for row in rows}


def test_the_report_has_mean_and_spread(two_variants):
    assert ablation_report.ablation_section() == "Not run yet with the shipped weights."
    ablation_report.draw_ablation(two_variants / "none.png")
    assert not (two_variants / "none.png").exists()
    for seed in (0, 1):
        fake_result(two_variants, "norms", "full", seed, 0.2 + 0.1 * seed)
        fake_result(two_variants, "norms", "no QK-norm", seed, None if seed else 0.5)
    fake_result(two_variants, "projection", "MLP", 1, 0.3)
    fake_result(two_variants, "projection", "MLP", 2, 0.3)  # a seed that full has not
    rows = rows_of_tables()
    losses = rows["full 10"]
    assert losses[:5] == ["0.200", "1.000 ± 0.283", "0.750 ± 0.212", "0.500 ± 0.141",
                          "0.250 ± 0.071"]  # fmt: skip
    assert losses[5:] == ["2.620, 2.343, 1.125, 1.330", "0.50, 0.50, 0.50, 0.50", "3", "8"]
    assert rows["no QK-norm 10"][1:6] == ["not finite"] * 4 + ["vanish"]
    assert rows["no QK-norm 10"][6:8] == [", ".join(["not finite"] * 4), "not finite"]
    assert rows["fp16 11"][0] == "batches not finite (of 8 a run), before"
    assert rows["full 11"] == ["25%", "0.10%", "0.00%", "30", "1,234",
                               "0%", "0.10%", "0.00%", "30", "1,234"]  # fmt: skip
    assert rows["no QK-norm 11"][1] == "0.10%"  # of the run that has it
    assert rows["no QK-norm 11"][4] == "inf"
    assert rows["full (2) 7"] == ["0.550 ± 0.071", "0.900 ± 0.000"] + ["0.550 ± 0.071"] * 4
    without = "0.300 ± 0.071 (-0.250 ± 0.000)"  # seed by seed
    assert rows["no QK-norm (2) 7"][0] == without
    assert rows["MLP (2) 7"][:2] == ["0.400 ± 0.071 (-0.250)", "0.900 ± 0.000 (+0.000)"]


def test_a_damaged_result_is_named(two_variants, capsys, monkeypatch):
    monkeypatch.setattr(ablation, "RESULTS", two_variants)
    path = ablation.result_path(ablation.Config(), "full", 0)
    path.parent.mkdir()
    for content in ('{"variant": "full", "se', "[1]", "{}"):
        path.write_text(content)
        assert ablation.main([]) == 2
        assert f"{path} is damaged" in capsys.readouterr().err
        with pytest.raises(ValueError, match="full-0.json is damaged"):
            ablation_report.ablation_section()


@pytest.mark.parametrize("changed", [{"steps": "9,9,9,9"}, {"n": 3}, {"weights": "0"},
                                     {"variant": "no MLP"}])  # fmt: skip
def test_runs_of_another_kind_are_left_out(changed, two_variants):
    fake_result(two_variants, "norms", "full", 0, 0.2)
    fake_result(two_variants, "norms", "no QK-norm", 0, 0.2, **changed)
    assert ablation_report.read_runs("norms") == {}  # half a study is none
    fake_result(two_variants, "norms", "no QK-norm", 0, 0.2, precision="another")
    assert ablation_report.read_runs("norms").keys() == {"full", "no QK-norm"}


def test_the_picture_has_a_dot_for_each_run(two_variants):
    red = list(bytes.fromhex(ablation_report.VARIANT_COLORS[1][1:]))
    colored = []
    for seeds in (1, 2):
        fake_result(two_variants, "norms", "full", seeds - 1, 0.25)
        fake_result(two_variants, "norms", "no QK-norm", seeds - 1, 0.1 * seeds)
        ablation_report.draw_ablation(two_variants / "a.png")
        picture = np.asarray(Image.open(two_variants / "a.png"))
        colored.append((picture == red).all(-1).sum())
    assert colored[0] > 300 and colored[1] > 1.6 * colored[0]  # dots of 40 pixels
