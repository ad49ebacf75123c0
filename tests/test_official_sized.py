"""The files that experiments/official_sized.py writes, at tiny sizes, and what it refuses."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from experiments import official_sized
from official import load


@pytest.fixture
def tiny(golden, tmp_path, monkeypatch):
    """Manifests with all the names, but sizes of 1 and 2."""
    monkeypatch.setattr(official_sized, "GOLDEN", tmp_path / "golden")
    monkeypatch.setattr(official_sized, "FIRST_SHARD", 2_000)
    (tmp_path / "golden" / "manifests").mkdir(parents=True)
    shutil.copytree(golden / "tokenizer_files", tmp_path / "golden" / "tokenizer_files")
    for path in (golden / "manifests").glob("*.json"):
        manifest = json.loads(path.read_text("utf-8"))
        for key in manifest.get("keys", []):
            shape, dtype = manifest["keys"][key]
            manifest["keys"][key] = [min(size, 2) for size in shape], dtype
        (tmp_path / "golden" / "manifests" / path.name).write_text(json.dumps(manifest))
    return tmp_path


def test_the_files_have_the_official_names_and_containers(golden, tiny):
    folder = tiny / "files"
    official_sized.write_files(folder)
    parts = load.find_parts(folder)
    assert {part: len(files) for part, files in parts.items()} == {
        load.EVA: 1, load.QFORMER: 1, load.PHI: 2, load.CHECKPOINT: 2,
    }  # fmt: skip
    summary = json.loads((golden / "manifests" / "summary.json").read_text("utf-8"))
    stage = torch.load(folder / "TinyGPT-V_for_Stage4.pth", weights_only=True)
    assert list(stage) == summary["top_level_keys_of_stage_checkpoints"]
    moments = stage["optimizer"]["state"].values()
    shapes = [tensor.shape for tensor in stage["model"].values()]
    assert [moment["exp_avg"].shape for moment in moments] == shapes
    assert json.loads((folder / "phi-2" / "config.json").read_text()) == summary["real_config"]
    assert load.full_config(parts, None, 0).phi.partial_rotary_factor == 0.4
    held = sum(path.stat().st_size for path in folder.rglob("*.*"))
    assert official_sized.bytes_to_write() < held
    assert not list(tiny.glob("*.part"))


def test_the_bytes_are_those_of_the_real_files():
    needed = official_sized.bytes_to_write()
    assert needed == pytest.approx(8.56e9 + 543_639_991, rel=1e-3)  # in the result, and stage 3


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(official_sized, "too_large", lambda dtype: "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9))
    monkeypatch.setattr(official_sized, "multiprocessing", None)  # nothing may be written
    told = refusal(official_sized.main, f"folder={tmp_path / 'files'}")
    assert "files will need 9.1 GB, and 3.0 GB are free there; make room, or choose" in told
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_ends_the_experiment(tmp_path, capfd):
    (tmp_path / "files.part").write_text("in the way")
    with pytest.raises(ValueError, match=r"files was not written \(exit code 2\)"):
        official_sized.write_apart(tmp_path / "files")
    told = capfd.readouterr().err
    assert told.startswith("error: ") and "files.part" in told and told.count("\n") == 1


def test_what_the_memory_does_not_hold_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(official_sized, "available_bytes", lambda: 10e9)
    monkeypatch.setattr(official_sized, "measure", lambda folder, dtype, stage: (dtype, stage))
    monkeypatch.setattr(official_sized, "write_apart", lambda folder: None)
    config = official_sized.Config(folder=str(official_sized.ROOT))
    result = official_sized.measure_all(config)
    assert result["runs"] == [("bf16", 3), ("bf16", 4)] and result["cpu"]
    reason = "fp32 is left out: it needs 17.2 GB of memory, and 10.0 GB are free"
    assert result["left_out"] == [reason] and reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="no dtype is left to measure"):
        official_sized.measure_all(official_sized.Config(dtypes="fp32"))
