"""experiments/memory.py: what is planned for a training step is what a step takes."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import train
from experiments import memory, training_memory
from experiments.training_memory import (
    GOALS,
    Config,
    blank_model,
    full_batches,
    rehearse,
    settled,
    shapes_of,
    step,
    trained,
    used_optimizer,
)
from model import ModelConfig, TinyGPTV


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Kernels of a CPU take a little memory for each of its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mini(stage: int, **options) -> tuple[Config, ModelConfig]:
    return settled(Config(**{"preset": "mini", "batch_size": 4, "tokens": 100} | options), stage)


def few_layers(stage: int, **options) -> tuple[Config, ModelConfig]:
    """The official widths."""
    config, sizes = settled(Config(batch_size=2, tokens=200, **options), stage)
    sizes.vision, sizes.phi = replace(sizes.vision, num_layers=1), replace(sizes.phi, num_layers=2)
    return config, sizes


def real_step(config: Config, model: TinyGPTV) -> tuple[int, int]:
    """Bytes that are there before a real step on the CPU, and the most that the step adds, as the
    allocator tells them to torch's profiler."""
    optimizer, batches = used_optimizer(model), full_batches(config, model, "cpu")
    moments = [value for state in optimizer.state.values() for value in state.values()]
    there = [*model.parameters(), *moments, *(t for batch in batches for t in batch.values())]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, optimizer, batches)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return sum(tensor.nbytes for tensor in there), most


WAYS = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "micro-batches": {"checkpointing": True, "micro_batch_size": 1},
    "int8": {"checkpointing": True, "micro_batch_size": 1, "int8": True},
    "fp32": {"precision": "fp32"},
    # several, beside which the matrix that kernels of some CPUs (AMX) repack is small
    "pictures are the most": {"checkpointing": True, "tokens": 60, "batch_size": 10},
}


@pytest.mark.parametrize("way", [
    way if way in ("plain", "int8") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS
])  # fmt: skip
def test_the_plan_is_what_a_real_step_takes(way: str, one_thread: None):
    config, sizes = mini(4, **WAYS[way])
    options = {name: getattr(config, name) for name in ("precision", "checkpointing", "int8")}
    train_config = train.with_defaults(train.TrainConfig(stage=4, **options))
    model = train.prepare_model(train_config, {}, "cpu")
    before, added = real_step(config, model)
    plan = rehearse(config, sizes, on_gpu=False).peak.total()
    # A CPU makes an fp32 copy of a bf16 product before it scales it; a GPU, and the plan, do not.
    assert plan - before == pytest.approx(added, rel=0.08 if config.int8 else 0.025)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"int8": True}], ids=str)
def test_the_plan_is_what_a_real_step_takes_at_the_official_widths(
    options: dict, one_thread: None
):
    config, sizes = few_layers(4, micro_batch_size=1, **options)
    before, added = real_step(config, blank_model(config, sizes, "cpu"))
    plan = rehearse(config, sizes, on_gpu=False).peak.total()
    assert plan - before == pytest.approx(added, rel=0.01)


def test_weights_gradients_and_moments_are_counted_once():
    config, sizes = mini(2, checkpointing=True, micro_batch_size=1)
    shapes = shapes_of(config, sizes)
    learn = sum(p.numel() for p in trained(shapes))
    peak = rehearse(config, sizes).peak
    assert peak["frozen weights"] == sum(p.nbytes for p in shapes.parameters()) - 4 * learn
    assert peak["trainable weights"] == peak["gradients"] == 4 * learn
    assert peak["moments"] == 8 * learn + 4 * len(trained(shapes))  # and the number of its steps


def test_batches_are_what_the_stage_takes():
    config, sizes = mini(4, micro_batch_size=3)
    batches = full_batches(config, shapes_of(config, sizes), "cpu")
    assert [train.num_labels(batch) for batch in batches] == [3 * (100 - 33), 100 - 33]
    pictures = [batch["pixel_values"].shape for batch in batches]
    assert pictures == [(3, 3, 224, 224), (1, 3, 224, 224)]
    assert all(batch["attention_mask"].all() for batch in batches)


def test_only_labels_have_logits():
    """At the peak, where the loss is computed, each has its logit in bf16 and in fp32, and the
    logarithm of its probability in fp32."""
    config, sizes = mini(2)
    labels = 4 * (100 - 33)  # what follows a row's first token and its picture
    peak = rehearse(config, sizes).peak
    assert peak["logits"] == pytest.approx(labels * sizes.phi.vocab_size * (2 + 4 + 4), 0.01)


def test_what_a_layer_keeps_on_a_gpu_is_what_its_equations_need():
    """Bytes for each token of one more layer of Phi with LoRA at the official size: 113.7 kB."""
    width, heads, rank = 2560, 32, 64
    config, sizes = few_layers(2)
    expected = {
        "x, for the LayerNorm, in fp32": 4 * width,
        "h for LoRA's A, what dropout left of it, and A h": 2 * width + width + 2 * rank,
        "q, k and v, of which v is used as it is": 2 * 3 * width,
        "q and k in fp32, for their norms": 4 * 2 * width,
        "q and k, turned": 2 * 2 * width,
        "the mask, as numbers to add to scores": 2 * config.tokens,
        "attention, and the sum of each row of its softmax": 2 * width + 4 * heads,
        "attention for LoRA's A, what dropout left of it, and A y": 2 * width + width + 2 * rank,
        "attention's output in fp32, for the RMSNorm": 4 * width,
        "fc1's output, for GELU": 2 * 4 * width,
        "what dropout left of both outputs": 2 * width,
        "mean and deviation for the four norms": 4 * 2 * (1 + heads + heads + 1),
    }
    fewer = rehearse(config, sizes).peak["activations"]
    sizes.phi.num_layers += 1
    more = rehearse(config, sizes).peak["activations"]
    lora_in_bf16 = 2 * rank * (width + 3 * width + width + width)
    tokens = config.batch_size * config.tokens
    assert (more - fewer - lora_in_bf16) / tokens == sum(expected.values())


def run(arguments: list[str], tmp_path, monkeypatch, capsys) -> tuple[dict, str]:
    """What memory.py keeps, which is its last line, too, and what it says before."""
    monkeypatch.setattr(training_memory, "RESULT", tmp_path / "training.json")
    assert memory.main(arguments) == 0
    *said, last = capsys.readouterr().out.splitlines()
    [path] = tmp_path.iterdir()
    assert json.loads(path.read_text("utf-8")) == json.loads(last)
    return json.loads(last), "\n".join(said)


def test_one_stage_part_by_part(tmp_path, monkeypatch, capsys):
    arguments = ["stage=1", "preset=mini", "batch_size=64", "checkpointing=1"]
    found, said = run(arguments, tmp_path, monkeypatch, capsys)
    assert sum(found["parts_gb"].values()) == pytest.approx(found["total_gb"], abs=0.01)
    assert said.startswith("stage 1: 64 rows of 80 tokens, bf16, checkpointing\n")
    assert "GB  activations" in said and said.endswith(f"{found['total_gb']:.2f} GB  at the peak")


def test_a_measured_step_stands_beside_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(training_memory, "measured_peak", lambda config, sizes: 2_345_678_901)
    arguments = ["stage=1", "preset=mini", "batch_size=2", "measured=1"]
    found, said = run(arguments, tmp_path, monkeypatch, capsys)
    assert found["measured_gb"] == 2.35 and said.endswith("    2.35 GB  measured")


def test_all_stages_beside_the_goals(tmp_path, monkeypatch, capsys):
    taken = {(6, False): 24.1, (2, False): 12.0, (2, True): 8.64}  # GB, by micro-batch and int8
    monkeypatch.setattr(training_memory, "rehearse", lambda config, sizes: SimpleNamespace(
        peak=Counter(all=int(taken[config.micro_batch_size, config.int8] * 1e9))))  # fmt: skip
    found, said = run(["batch_size=6"], tmp_path, monkeypatch, capsys)
    assert [run["way"] for run in found["runs"]] == 4 * list(GOALS)
    assert [run["micro_batch_size"] for run in found["runs"]] == 4 * [6, 6, 2, 2]
    assert [run["checkpointing"] for run in found["runs"]] == 4 * [False, True, True, True]
    assert [run["int8"] for run in found["runs"]] == 4 * [False, False, False, True]
    rows = [line.split() for line in said.splitlines()]
    assert rows[4] == ["4", "6", "512", "24.10*", "24.10*", "12.00", "8.64*"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stage=5"], "stage=1, 2, 3 or 4"),
        (["stage=1", "preset=tiny"], "choose from full, mini"),
        (["stage=1", "precision=int4"], "choose from fp32, bf16, fp16"),
        (["stage=1", "tokens=33"], "34 to 2048"),
        (["stage=1", "batch_size=-1"], "say how many"),
        (["checkpointing=1"], "for which stage"),
        (["int8=1"], "for which stage"),
        (["stgae=1"], "did you mean stage"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, capsys):
    assert memory.main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


@pytest.mark.gpu
def test_the_plan_is_what_a_gpu_takes():
    config, sizes = few_layers(4, checkpointing=True)
    total = rehearse(config, sizes).peak.total()
    assert training_memory.measured_peak(config, sizes) == pytest.approx(total, rel=0.1)
