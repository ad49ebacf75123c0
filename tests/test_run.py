"""Runs of train.py as a lab has them: in parts, stopped, continued, shared, gone wrong."""

import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Container, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

import train
from data import Tokenizer, collate, encode_sample
from experiments import run_log
from model import TinyGPTV
from train import new_optimizer, prepare_model, with_defaults, train_step

ROOT = Path(__file__).parent.parent
NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)
SHORT = ["stage=2", "weights=miniature/weights", "batch_size=2", "num_workers=0", "seed=7"]


def run(out: Path, *arguments: str) -> int:
    return train.main([*SHORT, f"out={out}", *arguments])


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in bf16 that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(out, "steps=6") == 0
    return out


@pytest.fixture
def model() -> TinyGPTV:
    """The shipped stage 2 in fp32, ready to learn, without dropout."""
    config = with_defaults(train.TrainConfig(stage=3, precision="fp32"))
    return prepare_model(config, {}, "cpu").eval()


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Five rows with a picture, with answers of one to nine words."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(ROOT / "miniature/weights")
    answers = ["red", "a star", "one large red solid star", "two", "a small blue circle and a star"]
    return [
        encode_sample([("<ImageHere>", answer)], tokenizer, 1, 32, 32, "\n")
        | {"pixel_values": torch.randn(1, 3, 112, 112)}
        for answer in answers
    ]


def loss_and_gradients(
    model: TinyGPTV, micro: list[dict]
) -> tuple[float, dict[str, torch.Tensor]]:
    micro = [train.to_device(batch, "cpu") for batch in micro]
    loss, _ = train_step(model, new_optimizer(model), NO_SCALING, micro, lr=0.0)
    return loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: TinyGPTV, micro: list[dict]) -> dict[str, torch.Tensor]:
    return loss_and_gradients(model, micro)[1]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_have_the_gradient_of_the_whole_batch(model, rows, size):
    """However many tokens each of them has: a mean of means would not do. Its loss, too."""
    whole_loss, expected = loss_and_gradients(model, train.micro_batches(rows, 0, 0))
    loss, found = loss_and_gradients(model, train.micro_batches(rows, size, 0))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, grad in found.items():  # as nearly as fp32 can tell
        assert (grad - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_checkpointing_changes_no_gradient(rows):
    config = with_defaults(train.TrainConfig(stage=3, precision="fp32"))
    plain = gradients(prepare_model(config, {}, "cpu"), [collate(rows, 0)])  # with dropout
    config.checkpointing = True
    torch.manual_seed(config.seed)
    again = gradients(prepare_model(config, {}, "cpu"), [collate(rows, 0)])
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.slow
def test_a_compiled_step_is_nearly_the_same(whole: Path, tmp_path: Path):
    assert run(tmp_path / "run", "steps=1", "compile=1") == 0
    assert losses(tmp_path / "run") == [pytest.approx(losses(whole)[0], rel=1e-3)]


def test_frozen_weights_in_int8_leave_nearly_the_same_gradient(rows):
    micro, found = [collate(rows, 0)], {}
    for int8 in (False, True):
        config = with_defaults(train.TrainConfig(stage=3, precision="bf16", int8=int8))
        model = prepare_model(config, {}, "cpu").eval()
        found[int8] = torch.cat([g.flatten() for g in gradients(model, micro).values()])
        dtypes = {p.dtype for name, p in model.phi.layers.named_parameters() if "int8" in name}
        assert dtypes == ({torch.int8, torch.float32, torch.bfloat16} if int8 else set())
    assert (found[False] - found[True]).norm() < 0.1 * found[False].norm()


def test_int8_is_for_bf16(tmp_path: Path, capsys):
    assert run(tmp_path / "run", "steps=1", "int8=1", "precision=fp32") == 2
    assert "leave out precision=fp32" in capsys.readouterr().err
    assert run(tmp_path / "run", "steps=2", "int8=1") == 0
    assert TinyGPTV.from_pretrained(tmp_path / "run").stage == 2


def test_clipping_shortens_the_gradient(model, rows):
    optimizer, batch = new_optimizer(model), train.to_device(collate(rows, 0), "cpu")
    _, norm = train_step(model, optimizer, NO_SCALING, [batch], lr=0.0, grad_clip=0.01)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert norm > 0.02 and torch.nn.utils.get_total_norm(grads).item() == pytest.approx(0.01, 1e-3)


def test_nothing_to_learn_from_changes_nothing(model, rows):
    batch = train.to_device(collate(rows, 0), "cpu")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss, _ = train_step(model, new_optimizer(model), NO_SCALING, [batch], lr=0.1)
    assert loss != loss and all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_steps_without_any_label_are_counted(tmp_path: Path, monkeypatch, capsys):
    to_device, batches = train.to_device, []

    def without_labels(batch: dict, device: str) -> dict:
        batches.append(to_device(batch, device))
        if len(batches) in (2, 3):
            batches[-1]["labels"].fill_(-100)
        return batches[-1]

    monkeypatch.setattr(train, "to_device", without_labels)
    assert run(tmp_path / "run", "steps=4") == 0
    told = capsys.readouterr().out
    assert "2 steps without finite loss or gradient changed nothing" in told
    assert [loss is None for loss in losses(tmp_path / "run")] == [False, True, True, False]


def test_a_run_goes_on_to_the_same_bit(whole: Path, tmp_path: Path, monkeypatch):
    """Ctrl-C in step 4, whose end is waited for; then the other two, with batches from workers."""
    steps = []

    def stopped_in_step_4(*arguments):
        steps.append(len(steps) + 1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", stopped_in_step_4)
    assert run(tmp_path / "run", "steps=6") == 130
    state = torch.load(tmp_path / "run/train_state.pt", weights_only=True)
    assert state["step"] == 4 and len(losses(tmp_path / "run")) == 4
    assert run(tmp_path / "run", "steps=6", "resume=1", "num_workers=2") == 0
    assert weights(tmp_path / "run") == weights(whole)
    assert losses(tmp_path / "run") == losses(whole) and len(steps) == 6
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json", "model.safetensors", "log.jsonl", "loss.png"
    }  # fmt: skip


def test_the_states_of_optimizer_and_scaler_go_on_too(tmp_path: Path, monkeypatch):
    """In fp16, whose scaler counts its steps."""
    monkeypatch.setattr(train, "finish", lambda config: None)  # which drops the state
    assert run(tmp_path / "whole", "steps=4", "precision=fp16") == 0
    monkeypatch.setattr(train.RunLog, "check", fail_at_step(3))
    assert run(tmp_path / "run", "steps=4", "precision=fp16", "save_every=2") == 2
    monkeypatch.undo()
    monkeypatch.setattr(train, "finish", lambda config: None)
    assert run(tmp_path / "run", "steps=4", "precision=fp16", "resume=1") == 0
    whole, parts = (torch.load(tmp_path / name / "train_state.pt", weights_only=True)
                    for name in ("whole", "run"))  # fmt: skip
    assert whole["scaler"] == parts["scaler"] and whole["scaler"]["_growth_tracker"] == 4
    a, b = whole["optimizer"]["state"], parts["optimizer"]["state"]
    assert a.keys() == b.keys() and len(a) > 50
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")  # step 3 is there once
    for number in a:
        assert all(torch.equal(a[number][key], b[number][key]) for key in a[number])


def test_every_cycle_begins_with_a_new_optimizer(tmp_path: Path, monkeypatch):
    schedule = train.Schedule(2, 1, 3, 2, 0, 1e-5, 1e-3, 1e-4)
    monkeypatch.setitem(train.SCHEDULES["mini"], 2, schedule)
    monkeypatch.setattr(train, "finish", lambda config: None)
    assert run(tmp_path / "run") == 0
    state = torch.load(tmp_path / "run/train_state.pt", weights_only=True)
    assert state["step"] == 6
    assert {moments["step"].item() for moments in state["optimizer"]["state"].values()} == {3}


def test_the_second_interrupt_is_not_waited_for():
    before = signal.getsignal(signal.SIGINT)
    with train.noted_signals() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before


def fail_at_step(last: int):
    def check(log, step: int, loss: float, grad_norm: float) -> None:
        if step == last:
            raise OSError("the power failed")

    return check


def test_a_run_is_not_mixed_with_another(whole: Path, tmp_path: Path, monkeypatch, capsys):
    assert run(whole, "steps=6") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(tmp_path / "none", "steps=6", "resume=1") == 2
    assert "no run that could go on" in capsys.readouterr().err
    assert run(tmp_path / "run", "steps=4", "save_every=2") == 0
    with open(tmp_path / "run/train_state.pt", "wb") as file:
        config = vars(with_defaults(train.TrainConfig(stage=1, int8=True)))
        torch.save(dict.fromkeys(train.STATE) | {"config": config, "world_size": 2}, file)
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    told = capsys.readouterr().err
    assert "stage=1" in told and "processes=2" in told and "seed=42" in told and "int8=1," in told
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=MemoryError))
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    assert "damaged" not in capsys.readouterr().err
    monkeypatch.undo()
    torch.save(dict.fromkeys(train.STATE - {"frozen"}), tmp_path / "run/train_state.pt")
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    assert "train_state.pt is damaged (it has no frozen)" in capsys.readouterr().err
    (tmp_path / "run/train_state.pt").write_bytes(b"PK\x03\x04")
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    assert "train_state.pt is damaged" in capsys.readouterr().err


def test_a_run_that_could_go_on_is_not_lost(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "train_state.pt").touch()
    with pytest.raises(ValueError, match="already: go on with it by resume=1, say out=... for"):
        run_log.RunLog(tmp_path, resume=False, quiet=False)


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, capsys):
    """The lock is another process's: this one could take its own twice."""
    hold = ("import fcntl, sys, time; file = open(sys.argv[1], 'a'); "
            "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)")
    arguments = [sys.executable, "-c", hold, str(tmp_path / "log.jsonl")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert run(tmp_path, "steps=6") == 2
        holder.kill()
    assert "another training is writing" in capsys.readouterr().err


@pytest.mark.parametrize("start, last", [(2, ""), (5, '{"step": 4, "lo'), (5, "{}\n")])
def test_a_log_is_kept_up_to_the_last_save(tmp_path: Path, start: int, last: str):
    """Whole lines of steps that will not be done again; at once, not with the next step's line."""
    lines = [json.dumps({"step": step, "seconds": 10.0 * step}) + "\n" for step in (1, 2, 3)]
    (tmp_path / "log.jsonl").write_text("".join([*lines, last]))
    log = run_log.RunLog(tmp_path, resume=True, quiet=False)
    log.begin(start, 6, 832).close()
    kept = lines[:start]
    assert (tmp_path / "log.jsonl").read_text() == "".join(kept)
    assert log.seconds_before == 10.0 * len(kept)


def test_each_line_tells_the_share_of_waiting_for_data(tmp_path: Path, monkeypatch):
    """Of its step, by a clock of whole seconds: waited for, of how many."""
    now = 0
    monkeypatch.setattr(run_log, "time", SimpleNamespace(perf_counter=lambda: now))
    log = run_log.RunLog(tmp_path, resume=False, quiet=False)
    bar = log.begin(0, 2, 832)

    def stream() -> Iterator[list[dict]]:
        nonlocal now
        for seconds in (3, 0):
            now += seconds
            yield []

    batches = stream()
    for step in (1, 2):
        log.wait_for(batches)
        now += 1  # the step itself
        log.write(bar, step, 2.0, 1e-3, 1.0, [2, 60, 0, 0])
    bar.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["waiting"] for line in lines] == [0.75, 0.0]
    assert "2 steps in 5 s, 60% of it waiting for data" in log.closing_words(2)


def test_a_full_disk_names_the_log(tmp_path: Path):
    log = run_log.RunLog(tmp_path, resume=False, quiet=False)
    with log.begin(0, 1, 832) as bar:
        log.file = open("/dev/full", "w")
        with pytest.raises(OSError, match="cannot write .*log.jsonl: No space left on device; "):
            log.write(bar, 1, 2.0, 1e-3, 1.0, [2, 60, 0, 0])
    with pytest.raises(OSError):  # it tries again
        log.file.close()


def test_a_disk_without_room_for_a_save_is_noticed_at_once(tmp_path: Path, monkeypatch, capsys):
    """In a new run for all that is saved and a second state; in one that goes on for the latter."""
    trained = sum(p.nbytes for p in prepare_model(
        with_defaults(train.TrainConfig(stage=2)), {}, "cpu").parameters() if p.requires_grad)
    free = 7 * trained - 1
    monkeypatch.setattr(train.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    assert run(tmp_path / "run", "steps=1") == 2
    assert f"run: saving takes {7 * trained / 1e6:.0f} MB, " in capsys.readouterr().err
    assert losses(tmp_path / "run") == []
    config = train.TrainConfig(out=str(tmp_path), resume=True)
    model = torch.nn.Linear(10, 10)  # 440 bytes, three times of which are needed
    for carried, needed in ((set(), 1320), ({"weight"}, 1720)):
        model.carried, free = carried, needed
        train.require_room(config, model)
        free = needed - 1
        with pytest.raises(ValueError, match="saving takes 0 MB, 0 are free; make room"):
            train.require_room(config, model)


def test_nothing_is_written_among_the_official_files(tmp_path: Path, monkeypatch, capsys):
    """With a checkpoint among them they could not be loaded any more."""
    weights = shutil.copytree(ROOT / "miniature" / "weights", tmp_path / "weights")
    monkeypatch.setattr(train, "is_official", lambda folder: folder.samefile(weights))
    for given in (weights, weights / "stage1"):  # the files themselves, and what stands on them
        options = [*SHORT, "steps=1", f"weights={given}"]
        assert train.main([*options, f"out={weights}/mine/run"]) == 2
        assert "which could not be loaded any more with a checkpoint" in capsys.readouterr().err
        assert not (weights / "mine").exists()
        assert train.main([*options, f"out={tmp_path}/{given.name}2"]) == 0


def test_what_another_model_has_learned_is_refused(model):
    learned = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    del learned["projector.fc2.weight"]
    with pytest.raises(ValueError, match="of another model; not in both: projector.fc2.weight$"):
        prepare_model(with_defaults(train.TrainConfig(stage=3)), {"model": learned}, "cpu")


@pytest.mark.parametrize("precision, int8", [("bf16", False), ("bf16", True), ("fp32", False)])
def test_a_run_goes_on_with_its_own_frozen_weights(precision: str, int8: bool):
    config = with_defaults(train.TrainConfig(stage=3, precision=precision, int8=int8))
    model = prepare_model(config, {}, "cpu")
    learned = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    state = {"model": learned, "frozen": train.frozen_fingerprint(model)}
    prepare_model(config, state, "cpu")
    with torch.no_grad():
        learned["projector.fc2.weight"] += 1
    assert train.frozen_fingerprint(model) == state["frozen"]  # what learns does not count
    with torch.no_grad():
        model.phi.layers[-1].mlp.fc2.bias[0] += 1
    with pytest.raises(ValueError, match="began with other weights than those in .*miniature"):
        prepare_model(config, state | {"frozen": train.frozen_fingerprint(model)}, "cpu")


def test_a_full_disk_takes_nothing_that_was_saved(tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(train.RunLog, "check", fail_at_step(3))
    assert run(out, "steps=6", "save_every=2") == 2
    monkeypatch.undo()
    before = (out / "train_state.pt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        assert run(out, "steps=6", "save_every=2", "resume=1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert "cannot write" in capsys.readouterr().err
    assert (out / "train_state.pt").read_bytes() == before and not list(out.glob("*.tmp"))


def test_a_finished_stage_goes_on_with_other_data(tmp_path: Path):
    """Two steps, so few that nothing is far from the shipped stage 4; stage 3 would be."""
    foreign = "data=experiments/foreign/records.jsonl"
    assert run(tmp_path / "run", "steps=2", "stage=4", "from_stage=4", foreign) == 0
    shipped = dict(TinyGPTV.from_pretrained(ROOT / "miniature/weights", 4).named_parameters())
    for name, parameter in TinyGPTV.from_pretrained(tmp_path / "run").named_parameters():
        torch.testing.assert_close(parameter, shipped[name], rtol=0, atol=1e-3)


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, finite as it is."""
    loss.register_hook(lambda grad: grad * math.inf)
    return loss


BAD = {
    "a loss that is no number": lambda loss: loss * math.nan,
    "an infinite loss with a finite gradient": lambda loss: loss + math.inf,
    "an infinite gradient of a finite loss": infinite_gradient,
}


def spoil(monkeypatch: pytest.MonkeyPatch, kind: str, steps: Container[int]) -> None:
    """Has some steps of a run, counted from 1, compute what is not finite."""

    def prepared(*arguments) -> TinyGPTV:
        model, calls = prepare_model(*arguments), []
        plain = model.forward

        def forward(**batch) -> torch.Tensor:
            calls.append(1)
            return BAD[kind](plain(**batch)) if len(calls) in steps else plain(**batch)

        model.forward = forward
        return model

    monkeypatch.setattr(train, "prepare_model", prepared)


@pytest.mark.parametrize("kind", BAD)
def test_a_step_without_finite_loss_changes_nothing(kind, tmp_path: Path, monkeypatch, capsys):
    has_changed = []

    def observed_step(model: TinyGPTV, *arguments) -> tuple[float, float]:
        before = model.projector.fc2.weight.clone()
        found = train_step(model, *arguments)
        has_changed.append(not torch.equal(model.projector.fc2.weight, before))
        return found

    spoil(monkeypatch, kind, {2, 3, 5})
    monkeypatch.setattr(train, "train_step", observed_step)
    monkeypatch.setattr(run_log, "MAX_BAD_STEPS", 3)  # in a row, which these are not
    assert run(tmp_path / "run", "steps=6") == 0
    assert "3 steps without finite loss" in capsys.readouterr().out
    is_bad = [loss is None for loss in losses(tmp_path / "run")]
    assert is_bad == [not changed for changed in has_changed]
    assert is_bad == [False, True, True, False, True, False]
    assert TinyGPTV.from_pretrained(tmp_path / "run").stage == 2  # all finite


@pytest.mark.parametrize("kind, save_every, rest", [
    ("a loss that is no number", 1, "holds the last checkpoint"),
    ("an infinite loss with a finite gradient", 500, "has none yet and can be deleted"),
    ("an infinite gradient of a finite loss", 1, "holds the last checkpoint"),
])  # fmt: skip
def test_it_stops_when_nothing_is_finite_any_more(
    kind, save_every, rest, tmp_path: Path, monkeypatch, capsys
):
    spoil(monkeypatch, kind, range(3, 100))
    monkeypatch.setattr(run_log, "MAX_BAD_STEPS", 3)
    assert run(tmp_path / "run", "steps=9", f"save_every={save_every}") == 2
    told = capsys.readouterr().err
    assert "step 5: no finite loss" in told and f"{tmp_path / 'run'} {rest}" in told
    assert "Likely the learning rate is too high, products in fp16 overflow" in told
    if save_every == 1:
        assert TinyGPTV.from_pretrained(tmp_path / "run").stage == 2


def test_bad_pictures_are_counted_and_too_many_end_the_run(tmp_path: Path, monkeypatch, capsys):
    random.seed(0)
    for number in range(10):
        Image.new("RGB", (40, 30), "white").save(tmp_path / f"{number}.png")
    lines = [{"image": f"{n}.png", "task": "caption", "caption": "a red star"} for n in range(10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    mine = f"data={tmp_path / 'mine.jsonl'}"
    assert run(tmp_path / "run", "steps=5", mine) == 0
    assert "1 records were skipped" in capsys.readouterr().out
    monkeypatch.setattr(run_log, "MIN_SAMPLES", 10)
    assert run(tmp_path / "other", "steps=9", mine) == 2
    told = capsys.readouterr().err
    assert "3.png" in told and "1 of 10 records could not be used" in told


def command(out: Path, *arguments: str) -> list[str]:
    return ["train.py", *SHORT, f"out={out}", *arguments]


def wait_for_lines(process: subprocess.Popen, out: Path, count: int) -> None:
    """Until the log of a run that goes on has so many lines."""
    log = out / "log.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= count):
        assert process.poll() is None
        time.sleep(0.02)


def saved_step(out: Path) -> int:
    """The step that a run would go on from, 0 if it would begin anew."""
    path = out / "train_state.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


FOUR_STEPS = """import sys
from dataclasses import replace
sys.path.insert(0, "")
import train
train.SCHEDULES["mini"][1] = replace(train.SCHEDULES["mini"][1], steps_per_epoch=4)
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_processes_learn_what_one_learns(tmp_path: Path):
    """The same samples, divided among two, in fp32 and in stage 1, which has no dropout; in the
    first steps of its warm-up, for later ones make rounding errors larger."""
    script = tmp_path / "four_steps.py"
    script.write_text(FOUR_STEPS)
    options = [*SHORT, "stage=1", "precision=fp32"]
    one = [sys.executable, script, *options, f"out={tmp_path / 'one'}", "batch_size=4"]
    two = [*LAUNCH, script, *options, f"out={tmp_path / 'two'}"]
    for arguments in (one, two):
        subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-6)
    a, b = (dict(TinyGPTV.from_pretrained(tmp_path / name).named_parameters())
            for name in ("one", "two"))  # fmt: skip
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-6, msg=name)


def learn_half(rank: int, folder: str, rows: list[dict]) -> None:
    """One of two processes, which has every other row, each as a micro-batch."""
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    torch.set_num_threads(1)
    config = with_defaults(train.TrainConfig(stage=3, precision="fp32"))
    model = prepare_model(config, {}, "cpu").eval()
    micro = [train.to_device(batch, "cpu") for batch in train.micro_batches(rows[rank::2], 1, 0)]
    optimizer = new_optimizer(model)
    train_step(train.distributed(model), optimizer, NO_SCALING, micro, lr=0.0)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save(grads, Path(folder) / f"{rank}.pt")


@pytest.mark.slow
def test_processes_share_what_only_one_has_pictures_for(model, rows, tmp_path: Path):
    """Rows 0, 2 and 4 are the first process's, and the last of them, too, is text alone."""
    text = encode_sample([("say", "two red stars")], model.tokenizer, 0, 32, 32, "###")
    rows = [rows[0], text, rows[2], text, text]
    expected = gradients(model, train.micro_batches(rows, 1, 0))
    torch.multiprocessing.spawn(learn_half, (str(tmp_path), rows), nprocs=2)
    for rank in (0, 1):
        for name, grad in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_two_processes_go_on_to_the_same_bit(tmp_path: Path):
    """With dropout, which every process draws for itself."""
    def start(name: str, *options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*LAUNCH, *command(tmp_path / name, "steps=20", *options)], cwd=ROOT, env=ENVIRONMENT
        )

    assert start("whole").wait(300) == 0
    run = start("run")
    wait_for_lines(run, tmp_path / "run", 3)
    run.terminate()
    assert run.wait(60) != 0 and (tmp_path / "run/train_state.pt").exists()
    assert start("run", "resume=1").wait(300) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_survives_being_killed(tmp_path: Path):
    """Twenty times, at random moments: no step that was saved is lost, and the weights are those of
    an undisturbed run with as many threads: how sums are rounded depends on their number."""
    steps, out, rng, best = "steps=300", tmp_path / "run", random.Random(0), 0
    whole = [sys.executable, *command(tmp_path / "whole", steps)]
    subprocess.run(whole, cwd=ROOT, env=ENVIRONMENT, check=True)

    def start() -> subprocess.Popen:
        if best == 0:  # what it has begun is of no use
            shutil.rmtree(out, ignore_errors=True)
        arguments = command(out, steps, "save_every=1", f"resume={int(best > 0)}")
        return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT)

    for _ in range(20):
        process = start()
        wait_for_lines(process, out, best + rng.randrange(8))
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert saved_step(out) >= best
        best = saved_step(out)
    assert best > 20 and start().wait() == 0
    assert weights(out) == weights(tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole")


def test_an_error_in_a_worker_is_one_line(tmp_path: Path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("the picture a.jpg is gone")

    monkeypatch.setattr(train.MixtureDataset, "__getitem__", broken)
    assert run(tmp_path / "run", "steps=1", "num_workers=1") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the picture a.jpg is gone"


def test_a_worker_that_dies_is_one_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(train.MixtureDataset, "__getitem__", lambda *_: os._exit(1))
    assert run(tmp_path / "run", "steps=1", "num_workers=1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: a process that makes batches has died, perhaps for lack")


def torchrun_says(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    for name, value in ({"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0} | values).items():
        monkeypatch.setenv(name, str(value))


def test_what_is_no_device_is_told_to_each_process(tmp_path, monkeypatch, capsys):
    torchrun_says(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run(tmp_path / "run", "steps=1", "device=gpu") == 2
    assert "device=gpu: torch can't compute on that here" in capsys.readouterr().err


def test_more_processes_than_gpus_are_one_line(monkeypatch):
    torchrun_says(monkeypatch, LOCAL_RANK=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="torch sees 2; say torchrun --nproc-per-node 2"):
        train.join_processes("cuda")


def test_processes_that_do_not_find_each_other_are_one_line(tmp_path, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        torchrun_says(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert run(tmp_path / "run", "steps=1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: the processes do not find each other: ") and "free port" in told


def test_a_run_is_drawn_after_the_stages_beside_it(tmp_path: Path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_log, "draw_losses", lambda folders, path: drawn.append(
        [folder.name for folder in folders]))  # fmt: skip
    for name in ("stage2", "stage1", "mine", "stage1_again"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").touch()
    run_log.draw_run(tmp_path / "mine")
    run_log.draw_run(tmp_path / "stage1_again")
    assert drawn == [["stage1", "stage2", "mine"], ["stage1", "stage2", "stage1_again"]]


def test_runs_in_folders_of_one_name_are_all_drawn(tmp_path: Path, monkeypatch):
    folders = [tmp_path / name for name in ("a/stage1", "b/stage1", "b/stage2")]
    for number, folder in enumerate(folders, 1):
        folder.mkdir(parents=True)
        (folder / "log.jsonl").write_text(number * '{"loss": 2.0}\n')
    texts = []
    monkeypatch.setattr(
        run_log.ImageDraw.ImageDraw, "text", lambda *args, **_: texts.append(args[2])
    )
    run_log.draw_losses(folders, tmp_path / "loss.png")
    assert [text.split(", ")[0] for text in texts if "steps, " in text] == [
        "a/stage1: 1 steps", "b/stage1: 2 steps", "stage2: 3 steps"
    ]  # fmt: skip


@pytest.mark.parametrize("error, reason", [
    (ValueError("stage1/log.jsonl, line 2: no line"), "stage1/log.jsonl, line 2: no line"),
    (OSError(28, "No space left on device"), "No space left on device"),
])  # fmt: skip
def test_a_run_ends_well_without_its_picture(error, reason, tmp_path: Path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_log, "draw_losses", fail)
    assert run(tmp_path / "run", "steps=1") == 0
    said = capsys.readouterr()
    assert "loss.png was not drawn: " in said.err and reason in said.err
    assert f"saved {tmp_path / 'run'}/model.safetensors" in said.out


def test_logs_of_something_else_are_named(tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"epoch": 1}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: no line of a training's log"):
        run_log.draw_losses([tmp_path], tmp_path / "loss.png")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(ValueError, match="no run has a finite loss"):
        run_log.draw_losses([tmp_path], tmp_path / "loss.png")


@pytest.mark.slow
def test_a_signal_to_the_whole_group_ends_the_step_and_saves(tmp_path: Path):
    """As torchrun and timeout send it: the processes that make batches get it, too."""
    arguments = command(tmp_path / "run", "steps=500", "num_workers=2")
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT,
                               start_new_session=True)  # fmt: skip
    wait_for_lines(process, tmp_path / "run", 3)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert saved_step(tmp_path / "run") == len(losses(tmp_path / "run")) >= 3


@pytest.mark.parametrize("option, reason", [
    ("grad_clip=-1", "0 or more"), ("grad_clip=nan", "0 or more"),
    ("micro_batch_size=-1", "0 or more"), ("seed=18446744073709551616", "below 2^63"),
    ("device=gpu", "device=gpu"),
])  # fmt: skip
def test_numbers_that_no_run_can_have(tmp_path: Path, capsys, option, reason):
    assert run(tmp_path, "steps=1", option) == 2
    assert reason in capsys.readouterr().err
