"""Loads and runs a model of the official size, on random weights in the official files' forms.

    python experiments/official_sized.py                    writes about 9 GB to a temporary folder
    python experiments/official_sized.py folder=DIR         ... or to DIR, where they stay
    python experiments/official_sized.py dtypes=bf16,fp32

The names, shapes, types and containers are those that tests/golden/manifests tells; in the place of
the official run's settings stands a short table, and the optimizer's moments are zeros. Each figure
comes from generate.py in a process of its own: the load, with the import of torch, ends when it
prints its report; the speed is that of the tokens after the first. Cold means right after the
files were put out of the system's cache. For comparison the same files are read from end to end,
though the loader passes over some of it: the optimizer's state and EVA's last block. A dtype for
which the memory is too small is left out, and the result says so.
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments.command_line import exit_code, report
from experiments.speed import cpu_name
from model import DTYPES, ModelConfig, TinyGPTV, set_dtype

GOLDEN = ROOT / "tests" / "golden"
RESULT = ROOT / "experiments" / "results" / "official_sized.json"
FIRST_SHARD = 4_995_584_848  # bytes of the first of Phi-2's two files
EVA, BLIP2, PHI = "eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth", "phi2_split_qkv"
STAGES = {stage: f"TinyGPT-V_for_Stage{stage}.pth" for stage in (3, 4)}
NEW_TOKENS = 33


@dataclass
class Config:
    """Where and in which precisions; options as key=value."""

    folder: str = ""  # where the files are, or are to be written; default: temporary
    dtypes: str = "bf16,fp32"


# ---- files ----
def read_manifest(name: str) -> dict:
    """What is known of an official file: tests/golden/manifests/."""
    return json.loads((GOLDEN / "manifests" / f"{name}.json").read_text("utf-8"))


def manifest_keys(name: str) -> dict[str, tuple[list[int], torch.dtype]]:
    """Shape and type of each tensor in a file."""
    manifest = read_manifest(name)
    if "keys_same_as" in manifest:
        return manifest_keys(manifest["keys_same_as"].removesuffix(".json"))
    return {key: (shape, getattr(torch, dtype))
            for key, (shape, dtype) in manifest["keys"].items()}  # fmt: skip


def random_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of one manifest: norms near one, all else near zero."""
    tensors = {}
    for key, (shape, dtype) in manifest_keys(name).items():
        if not dtype.is_floating_point:
            tensors[key] = torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)
            continue
        tensor = torch.empty(shape).normal_(std=0.02)
        is_norm = re.search(r"(norm|norm\d|LayerNorm|ln_vision)\.weight$", key)
        tensors[key] = (tensor + 1 if is_norm else tensor).to(dtype)
    return tensors


def write_files(final: Path) -> None:
    """A folder as official/fetch.py fills it; it has its name only when it is complete."""
    torch.manual_seed(0)
    folder = final.with_name(final.name + ".part")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "phi-2").mkdir(parents=True)
    for file in ("vocab.json", "merges.txt", "added_tokens.json"):
        shutil.copy(GOLDEN / "tokenizer_files" / file, folder / "phi-2")
    config = read_manifest("summary")["real_config"]
    (folder / "phi-2" / "config.json").write_text(json.dumps(config))
    torch.save(random_tensors(EVA), folder / EVA)
    torch.save({"model": random_tensors(BLIP2)}, folder / BLIP2)
    for stage, name in STAGES.items():
        torch.save(runner_file(random_tensors(name), stage), folder / name)
    write_phi(random_tensors(PHI), folder / "phi-2")
    folder.rename(final)


def runner_file(tensors: dict[str, Tensor], stage: int) -> dict:
    """What the official runner keeps of a stage."""
    moments = {i: {"exp_avg": torch.zeros_like(t), "exp_avg_sq": torch.zeros_like(t)}
               for i, t in enumerate(tensors.values())}  # fmt: skip
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5,
              "growth_interval": 2000, "_growth_tracker": 0}  # fmt: skip
    return {"model": tensors, "optimizer": {"state": moments, "param_groups": []},
            "config": {"run": {"stage": stage}}, "scaler": scaler, "epoch": 0}  # fmt: skip


def bytes_to_write() -> int:
    """What `write_files` takes on the disk: all tensors, those of the stages with two moments."""
    total = 0
    for name in (EVA, BLIP2, PHI, *STAGES.values()):
        sizes = [torch.Size(shape).numel() * dtype.itemsize
                 for shape, dtype in manifest_keys(name).values()]  # fmt: skip
        total += sum(sizes) * (3 if name in STAGES.values() else 1)
    return total


def write_apart(folder: Path) -> None:
    """`write_files` in another process, whose memory is not counted. Raises ValueError if there is
    no room on the disk, or if it fails."""
    needed, there = bytes_to_write(), next(path for path in folder.parents if path.exists())
    if (free := shutil.disk_usage(there).free) < 1.01 * needed:
        raise ValueError(f"{folder} will need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
                         "free there; make room, or choose another place with folder=DIR")
    writer = multiprocessing.get_context("spawn").Process(target=write_or_tell, args=[folder])
    writer.start()
    writer.join()
    if writer.exitcode:
        raise ValueError(f"{folder} was not written (exit code {writer.exitcode})")


def write_or_tell(folder: Path) -> None:
    """`write_files` as a process of its own, with an exit code."""
    sys.exit(exit_code(lambda: write_files(folder)))


def write_phi(tensors: dict[str, Tensor], folder: Path) -> None:
    """Two safetensors files, the first as large as Phi-2's first, and their index."""
    shards: list[dict[str, Tensor]] = [{}, {}]
    size = 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        shards[size > FIRST_SHARD][name] = tensor
    files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for file, shard in zip(files, shards):
        save_file(shard, folder / file)
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def read_seconds(files: list[Path], cold: bool) -> float:
    """How long it takes to read the files and do nothing else."""
    if cold:
        forget(files)
    began = time.time()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    return time.time() - began


def forget(files: list[Path]) -> None:
    """Puts the files out of the system's cache."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- one run of generate.py ----
def run(folder: Path, stage: int, dtype: str, new_tokens: int) -> dict[str, float]:
    """Seconds until the weights are loaded and until the end, and the peak of memory in bytes."""
    command = [
        sys.executable, "generate.py", "--weights", str(folder), "--stage", str(stage), "--dtype",
        dtype, "--max-new-tokens", str(new_tokens), "--img", "assets/shapes.png",
    ]  # fmt: skip
    began = time.time()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    loaded, told = 0.0, ""
    for line in process.stderr:
        told += line
        if "every one accounted for" in line:
            loaded = time.time() - began
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0 or f"cut after {new_tokens} tokens" not in told:
        last = " ".join(told.splitlines()[-1:])
        raise ValueError(f"{' '.join(command)} did not write {new_tokens} tokens: {last}")
    return {"load": loaded, "all": time.time() - began, "peak": usage.ru_maxrss * 1024}


def resident_bytes(dtype: str) -> int:
    """What the loaded model itself takes."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("full", stage=4))
    set_dtype(model, DTYPES[dtype])
    return sum(p.nbytes for p in model.parameters())


def available_bytes() -> int:
    """How much memory is not in use, or only by the system's cache."""
    found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) * 1024


def too_large(dtype: str) -> str:
    """Why a dtype can't be measured here, in words; empty if it can."""
    needed, available = 1.1 * resident_bytes(dtype), available_bytes()
    if needed <= available:
        return ""
    return (f"{dtype} is left out: it needs {needed / 1e9:.1f} GB of memory, and "
            f"{available / 1e9:.1f} GB are free")  # fmt: skip


def measure(folder: Path, dtype: str, stage: int) -> dict:
    """One row of the table: a dtype and a stage, which says how large the picture is."""
    other = f"Stage{7 - stage}"  # the checkpoint that is not read
    files = [path for path in folder.rglob("*.*") if other not in path.name]
    read = read_seconds(files, cold=True), read_seconds(files, cold=False)
    forget(files)
    cold = run(folder, stage, dtype, 1)
    warm = run(folder, stage, dtype, 1)
    long = run(folder, stage, dtype, NEW_TOKENS)
    decoding = (long["all"] - long["load"]) - (warm["all"] - warm["load"])
    resident = resident_bytes(dtype)
    return {
        "dtype": dtype, "image_size": 448 if stage == 4 else 224,
        "files_gb": round(sum(path.stat().st_size for path in files) / 1e9, 2),
        "read_seconds_cold": round(read[0], 1), "load_seconds_cold": round(cold["load"], 1),
        "read_seconds_warm": round(read[1], 1), "load_seconds_warm": round(warm["load"], 1),
        "first_token_seconds": round(warm["all"] - warm["load"], 1),
        "tokens_per_second": round((NEW_TOKENS - 1) / decoding, 2),
        "model_gb": round(resident / 1e9, 2), "peak_gb": round(long["peak"] / 1e9, 2),
        "peak_over_model": round(long["peak"] / resident, 3),
    }  # fmt: skip


def measure_all(config: Config) -> dict:
    """What `main` prints. Raises ValueError for what the user can have got wrong."""
    dtypes = config.dtypes.split(",")
    if unknown := set(dtypes) - set(DTYPES):
        raise ValueError(f"dtypes={config.dtypes}: {unknown.pop()} is not in {list(DTYPES)}")
    left_out = {dtype: reason for dtype in dtypes if (reason := too_large(dtype))}
    print(*left_out.values(), sep="\n", end="\n" * bool(left_out), file=sys.stderr)
    dtypes = [dtype for dtype in dtypes if dtype not in left_out]
    if not dtypes:
        raise ValueError("no dtype is left to measure; close other programs, or say dtypes=bf16")
    with tempfile.TemporaryDirectory(prefix="official_sized_") as temporary:
        folder = Path(config.folder or f"{temporary}/files")
        if not folder.exists():
            write_apart(folder)
        return {
            "cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "left_out": list(left_out.values()),
            "runs": [measure(folder, dtype, stage) for dtype in dtypes for stage in (3, 4)],
        }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return report(arguments, Config, measure_all, RESULT, places=("folder",))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
