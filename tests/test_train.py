"""train.py: the schedule's shape, what is frozen in each stage, and the command line."""

import itertools
import json
import math
import random

import pytest
import torch
from PIL import Image

import train
from data import STAGES, Tokenizer, collate, encode_sample
from experiments.run_log import summary
from model import ModelConfig, TinyGPTV
from train import SCHEDULES, Schedule, enter_stage, learning_rate, optimizer_groups, set_trainable

TRAINABLE = {
    "projector.fc1.weight", "projector.fc1.bias", "projector.fc2.weight", "projector.fc2.bias",
    "phi.final_layernorm.weight",
}  # fmt: skip
TRAINABLE_IN_LAYER = {
    "input_layernorm.weight", "post_layernorm.weight",
    "self_attn.q_layernorm.weight", "self_attn.k_layernorm.weight",
}  # fmt: skip
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)
LORA_IN_LAYER = {
    "self_attn.qkv.lora_A.weight", "self_attn.qkv.lora_B.weight",
    "self_attn.dense.lora_A.weight", "self_attn.dense.lora_B.weight",
}  # fmt: skip


def model_of_stage(stage: int) -> TinyGPTV:
    """The miniature with random weights, as train.py has it in a stage."""
    torch.manual_seed(0)
    model = TinyGPTV(ModelConfig.preset("mini", stage=0))
    for part in (model.visual_encoder, model.qformer, model.phi):
        part.init_weights()
    for earlier in range(1, stage + 1):
        enter_stage(model, earlier, "mini")
    set_trainable(model)
    return model.train()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("miniature/weights")


def batch_of(tokenizer: Tokenizer, stage: int) -> dict:
    """Two pictures of noise with their captions, as the stage puts them."""
    turns = [("<ImageHere>", "a red star"), ("<ImageHere>", "a small blue circle")]
    rows = [
        encode_sample([turn], tokenizer, 1, 32, 32, STAGES[stage].end_sym)
        | {"pixel_values": torch.randn(1, 3, 112, 112)}
        for turn in turns
    ]
    batch = collate(rows, tokenizer.pad_token_id)
    return train.to_device(batch, "cpu")


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_trainable_names_are_the_papers(stage: int):
    model = model_of_stage(stage)
    in_layer = TRAINABLE_IN_LAYER | (LORA_IN_LAYER if stage >= 2 else set())
    layers = range(model.config.phi.num_layers)
    expected = TRAINABLE | {f"phi.layers.{n}.{name}" for n in layers for name in in_layer}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected


@pytest.mark.parametrize("stage", [1, 4])
def test_a_step_moves_what_learns_and_nothing_else(stage: int, tokenizer: Tokenizer):
    model = model_of_stage(stage)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(optimizer_groups(model, weight_decay=0.05))
    for _ in range(2):  # LoRA's A has no gradient while B is zero
        train.train_step(model, optimizer, NO_SCALING, [batch_of(tokenizer, stage)], lr=1e-2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_weight_decay_only_for_matrices():
    decayed, others = optimizer_groups(model_of_stage(2), weight_decay=0.05)
    assert decayed["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert "projector.fc1.bias" in others["names"]
    assert "phi.layers.0.self_attn.q_layernorm.weight" in others["names"]


def test_learning_rate_of_the_published_stages():
    stage1, stage4 = SCHEDULES["full"][1], SCHEDULES["full"][4]
    assert learning_rate(stage1, 0, 0) == 1e-6
    assert learning_rate(stage1, 0, 999) == pytest.approx(9.9901e-5)
    assert learning_rate(stage1, 0, 1000) < 9.9e-5  # the cosine did not wait for the warm-up
    assert learning_rate(stage4, 49, 999) == pytest.approx(8e-5, rel=1e-3)  # it rises


def test_negative_warmup_rate_means_no_ramp():
    schedule = Schedule(1, 1, 100, 1, 10, -1, 1e-3, 1e-4)
    assert [learning_rate(schedule, 0, step) for step in (0, 5, 9)] == [1e-3] * 3


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("stge=1", "did you mean stage"),
        ("--stage=1", "did you mean stage"),
        ("stage=one", "not of type int"),
        ("stage=7", "stage=1, 2, 3 or 4"),
        ("from_stage=2", "stage 1 can't follow it"),
        ("from_stage=-2", "stage 1 can't follow it"),
        ("preset=tiny", "choose from full, mini"),
        ("preset=full", "preset=full learns from data=DIR"),
        ("precision=int4", "choose from fp32, bf16, fp16"),
        ("resume=maybe", "not 1 or 0"),
        ("save_every=0", "after how many steps"),
    ],
)
def test_wrong_arguments_are_one_line(argument: str, said: str, capsys: pytest.CaptureFixture):
    assert train.main(["stage=1", argument]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_weights_of_another_size_than_the_preset_are_refused(tmp_path, capsys):
    arguments = ["stage=1", "preset=full", "data=world", f"out={tmp_path}"]
    assert train.main(arguments) == 2
    assert "miniature/weights are not of preset=full" in capsys.readouterr().err


def test_a_short_run_is_warmed_up_in_a_tenth_of_it():
    for steps, warmup_steps in ((20, 2), (5, 1), (400, 40), (10**6, 50)):
        config = train.TrainConfig(stage=1, preset="mini", steps=steps)
        assert train.schedule_of(config).warmup_steps == warmup_steps
        assert train.schedule_of(config).steps == steps


def test_the_summary_tells_the_batch_sizes_of_a_mixture(miniature):
    assert "; 7 steps of 2 or 6 samples at" in summary(miniature, 7, [6, 2, 6], "bf16")


def test_missing_weights_and_data_are_one_line(tmp_path, capsys: pytest.CaptureFixture):
    assert train.main(["stage=1", f"weights={tmp_path / 'none'}", f"out={tmp_path}"]) == 2
    assert train.main(["stage=1", "data=none.jsonl", f"out={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "none" in lines[0] and "none.jsonl" in lines[1] and len(lines) == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_short_run_from_the_shipped_backbones(precision, tmp_path, capsys):
    arguments = ["stage=1", "steps=2", "batch_size=4", "num_workers=0", f"out={tmp_path / 'run'}"]
    assert train.main([*arguments, f"precision={precision}"]) == 0
    tmp_path /= "run"
    told = capsys.readouterr().out
    assert "ln(vocabulary)" in told and f"products in {precision}" in told
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_second", "waiting", "seconds",
            "peak_memory_gb"}  # fmt: skip
    assert all(set(line) == keys and math.isfinite(line["loss"]) for line in lines)
    assert TinyGPTV.from_pretrained(tmp_path).stage == 1


def test_training_on_records_of_ones_own(tmp_path, capsys: pytest.CaptureFixture):
    random.seed(0)
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    record = {"image": "a.png", "task": "caption", "caption": "a large red star"}
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join([json.dumps(record)] * 8))
    arguments = ["stage=1", "steps=2", "batch_size=4", "num_workers=0", f"data={data}"]
    assert train.main([*arguments, f"out={tmp_path / 'out'}"]) == 0


@pytest.mark.parametrize("kind, option, samples", [
    ("a mixture", "seed=1", 3), ("a mixture", "batch_size=1", 1), ("pictures", "batch_size=2", 2)
])  # fmt: skip
def test_training_on_a_folder(kind, option, samples, tmp_path, capsys: pytest.CaptureFixture):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    if kind == "a mixture":
        record = {"image": "a.png", "task": "caption", "caption": "a large red star"}
        (tmp_path / "mine.jsonl").write_text(json.dumps(record))
        (tmp_path / "mixture.json").write_text('{"1": {"mine": [1, 3]}}')
    else:
        (tmp_path / "a.txt").write_text("a large red star")
    arguments = ["stage=1", "steps=1", "num_workers=0", option, f"data={tmp_path}"]
    assert train.main([*arguments, f"out={tmp_path / 'out'}"]) == 0
    assert f"; 1 steps of {samples} samples at" in capsys.readouterr().out


def test_several_record_files_are_drawn_by_their_numbers_of_records(miniature, tmp_path, capsys):
    for name, count in (("a", 3), ("b", 1)):
        record = {"task": "instruct", "prompt": "Name a color.", "answer": name}
        (tmp_path / f"{name}.jsonl").write_text(count * f"{json.dumps(record)}\n")
    both = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    datasets, ratios, sizes = train.open_data(train.TrainConfig(stage=4, data=both), 2, miniature)
    assert [rows.records[0]["answer"] for rows in datasets] == ["a", "b"]
    assert ratios == [3, 1] and sizes == [2, 2]
    assert train.main(["stage=4", f"data={both},none.jsonl", f"out={tmp_path / 'out'}"]) == 2
    assert "No such file or directory: 'none.jsonl'" in capsys.readouterr().err


def test_rows_fit_the_model():
    """Each stage's rows have its resolution, and no more tokens than Phi has positions."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("mini", stage=4))
    model.tokenizer = None
    datasets, _, _ = train.open_data(train.TrainConfig(stage=4), 4, model)
    for rows in datasets:
        assert rows.settings.max_length == model.config.phi.max_position_embeddings == 512
        assert rows.settings.image_size == 224 and rows.settings.num_queries == 32


def test_mixture_takes_every_position_once_in_the_ratio_of_the_datasets():
    def steps(count, **options):
        return list(itertools.islice(train.mixture_batches([3, 1], [4, 2], 0, **options), count))

    batches = steps(2000)
    drawn = [batch[0][0] for batch in batches]
    assert 1400 < drawn.count(0) < 1600
    for which, size in ((0, 4), (1, 2)):
        places = [place for batch in batches for key, place in batch if key == which]
        assert places == list(range(size * drawn.count(which)))
    assert steps(500, start=1500) == batches[1500:]  # what a resumed run asks for
    both = zip(steps(50, world_size=2), steps(50, rank=1, world_size=2))
    assert all(a[0][0] == b[0][0] and not set(a) & set(b) for a, b in both)
    mixed = train.MixtureDataset(["abc", "de"])
    assert [mixed[key] for key in ((0, 2), (1, 0))] == ["c", "d"]
