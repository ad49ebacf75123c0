"""Runs of train.py as a lab has them: in parts, stopped, continued, shared, gone wrong."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def gradients(model: TinyGPTV, micro: list[dict]) -> dict[str, torch.Tensor]:
    optimizer = new_optimizer(model)
    micro = [train.to_device(batch, "cpu") for batch in micro]
    train_step(model, optimizer, NO_SCALING, micro, lr=0.0)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_have_the_gradient_of_the_whole_batch(model, rows, size):
    """However many tokens each of them has: a mean of means would not do."""
    expected = gradients(model, train.micro_batches(rows, 0, 0))
    for name, grad in gradients(model, train.micro_batches(rows, size, 0)).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_changes_no_gradient(rows):
    config = with_defaults(train.TrainConfig(stage=3, precision="fp32"))
    plain = gradients(prepare_model(config, {}, "cpu"), [collate(rows, 0)])  # with dropout
    config.checkpointing = True
    torch.manual_seed(config.seed)
    again = gradients(prepare_model(config, {}, "cpu"), [collate(rows, 0)])
    assert all(torch.equal(plain[name], again[name]) for name in plain)


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


def test_a_run_is_not_mixed_with_another(whole: Path, tmp_path: Path, capsys):
    assert run(whole, "steps=6") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(tmp_path / "none", "steps=6", "resume=1") == 2
    assert "no run that could go on" in capsys.readouterr().err
    assert run(tmp_path / "run", "steps=4", "save_every=2") == 0
    with open(tmp_path / "run/train_state.pt", "wb") as file:
        config = vars(with_defaults(train.TrainConfig(stage=1)))
        torch.save(dict.fromkeys(train.STATE) | {"config": config, "world_size": 2}, file)
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    told = capsys.readouterr().err
    assert "stage=1" in told and "processes=2" in told and "seed=42" in told
    torch.save(dict.fromkeys(train.STATE - {"frozen"}), tmp_path / "run/train_state.pt")
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    assert "train_state.pt is damaged (it has no frozen)" in capsys.readouterr().err
    (tmp_path / "run/train_state.pt").write_bytes(b"PK\x03\x04")
    assert run(tmp_path / "run", "steps=4", "resume=1") == 2
    assert "train_state.pt is damaged" in capsys.readouterr().err


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


def bad_loss(model: TinyGPTV, steps: set[int]) -> None:
    """Makes the loss of some steps, counted from 1, not a number."""
    plain, calls = model.forward, []

    def forward(**batch):
        calls.append(1)
        return plain(**batch) * (float("nan") if len(calls) in steps else 1.0)

    model.forward = forward


def test_a_step_without_finite_loss_changes_nothing(tmp_path: Path, monkeypatch, capsys):
    prepare = prepare_model

    def prepared(*arguments) -> TinyGPTV:
        bad_loss(model := prepare(*arguments), {2, 3, 5})
        return model

    monkeypatch.setattr(train, "prepare_model", prepared)
    monkeypatch.setattr(run_log, "MAX_BAD_STEPS", 3)  # in a row, which these are not
    assert run(tmp_path / "run", "steps=6") == 0
    assert "3 steps without finite loss" in capsys.readouterr().out
    is_bad = [loss is None for loss in losses(tmp_path / "run")]
    assert is_bad == [False, True, True, False, True, False]
    assert TinyGPTV.from_pretrained(tmp_path / "run").stage == 2  # all finite


def test_it_stops_when_nothing_is_finite_any_more(tmp_path: Path, monkeypatch, capsys):
    prepare = prepare_model

    def prepared(*arguments) -> TinyGPTV:
        bad_loss(model := prepare(*arguments), set(range(3, 100)))
        return model

    monkeypatch.setattr(train, "prepare_model", prepared)
    monkeypatch.setattr(run_log, "MAX_BAD_STEPS", 3)
    assert run(tmp_path / "run", "steps=9", "save_every=1") == 2
    told = capsys.readouterr().err
    assert "step 5: no finite loss" in told and "holds the last checkpoint" in told
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
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert run.poll() is None
        time.sleep(0.1)
    run.terminate()
    assert run.wait(60) != 0 and (tmp_path / "run/train_state.pt").exists()
    assert start("run", "resume=1").wait(300) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_survives_being_killed(tmp_path: Path):
    """Twenty times, at random moments: the weights are those of an undisturbed run."""
    assert run(tmp_path / "whole", "steps=200") == 0
    rng, kills = random.Random(0), 0
    arguments = [sys.executable, *command(tmp_path / "run", "steps=200", "save_every=1")]
    while True:
        resume = ["resume=1"] if (tmp_path / "run/train_state.pt").exists() else []
        if not resume:
            (tmp_path / "run/log.jsonl").unlink(missing_ok=True)
            (tmp_path / "run/model.safetensors").unlink(missing_ok=True)
        process = subprocess.Popen([*arguments, *resume], cwd=ROOT, env=ENVIRONMENT)
        try:
            seconds = rng.uniform(4, 9) if kills < 20 else None
            assert process.wait(seconds) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills >= 20
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_error_in_a_worker_is_one_line(tmp_path: Path, monkeypatch, capsys):
    def broken(*_):
        raise ValueError("the picture a.jpg is gone")

    monkeypatch.setattr(train.MixtureDataset, "__getitem__", broken)
    assert run(tmp_path / "run", "steps=1", "num_workers=1") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the picture a.jpg is gone"


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
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    state = torch.load(tmp_path / "run" / "train_state.pt", weights_only=True)
    assert state["step"] == log.read_text().count("\n") >= 3


@pytest.mark.parametrize("option, reason", [
    ("grad_clip=-1", "0 or more"), ("grad_clip=nan", "0 or more"),
    ("micro_batch_size=-1", "0 or more"),
    ("device=gpu", "device=gpu"),
])  # fmt: skip
def test_numbers_that_no_run_can_have(tmp_path: Path, capsys, option, reason):
    assert run(tmp_path, "steps=1", option) == 2
    assert reason in capsys.readouterr().err
