"""Every file that is read, damaged at random: it is refused in one line that names it, or it loads.

Never another exception, never a wait of more than SECONDS, never more than MEGABYTES of memory
beyond what was there. (A picture that says it is large takes some bytes for each of its pixels, up
to data.MAX_PIXELS, which is less here.) What loads is used, because damage may show only then.
Seeds are fixed; a few dozen damaged files of each kind by default, thousands with -m slow.
"""

import io
import json
import random
import re
import shutil
import signal
import tarfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import data
from damaged import damage, picture, write_weights
from generate import generate
from model import TinyGPTV
from official.convert import read_references
from official.load import find_parts, open_weights
from official.stream import ShardDataset, read_index, read_mixture
from test_model import write_tokenizer

SECONDS, MEGABYTES = 5, 256
MERGES = ["a b", "ab c", "Ġ ab", "c a"]


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


@contextmanager
def limits():
    """Raises TooSlow after SECONDS; checks the peak of memory where Linux tells it."""

    def stop(*_):
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resident = memory("VmRSS")
    forget_peak()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert memory("VmHWM") - resident < MEGABYTES


def memory(key: str) -> float:
    """A line of /proc/self/status in megabytes; 0 where there is none."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+)", status.read_text()) if status.exists() else None
    return int(found[1]) / 1024 if found else 0.0


def forget_peak() -> None:
    """Lets VmHWM begin anew, where that is allowed; else the limit holds for the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def outcome(read: Callable[[], object], named: Path) -> str:
    try:
        with limits():
            read()
        return "loaded"
    except (ValueError, OSError) as error:
        told = str(error)
        assert str(named) in told and told.isprintable() and len(told) < 2000, told
        return "refused"


# ---- what is read: functions that write valid files, and give those to damage and a reader ----
Target = tuple[list[Path], Callable[[], object], Path]  # damaged, reader, what the message names


def picture_target(folder: Path, kind: str, **options) -> Target:
    path = folder / f"a.{kind}"
    mode = "P" if kind == "gif" else "RGBA" if kind == "png" else "RGB"
    picture(mode=mode).save(path, **options)

    def read():
        image = data.load_image(path)
        assert image.mode == "RGB" and data.preprocess(image, 28).isfinite().all()

    return [path], read, path


def use_tensors(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor.double().sum().item()  # every byte is there


def safetensors_target(folder: Path) -> Target:
    path = folder / "a.safetensors"
    tensors = {"llama_proj.weight": torch.ones(4, 3), "llama_proj.bias": torch.ones(3).half()}
    save_file(tensors, path)
    return [path], lambda: use_tensors(open_weights(path).tensors), path


def pth_target(folder: Path, is_zip: bool) -> Target:
    path = folder / "a.pth"
    tensors = {"llama_proj.weight": torch.ones(4, 3), "llama_proj.bias": torch.ones(3).half()}
    runner = {"model": tensors, "optimizer": {"state": {0: {"step": 3}}}, "epoch": 3}
    torch.save(runner, path, _use_new_zipfile_serialization=is_zip)
    return [path], lambda: use_tensors(open_weights(path).tensors), path


def tokenizer_target(folder: Path, *names: str) -> Target:
    write_tokenizer(folder)
    vocab = json.loads((folder / "vocab.json").read_text("utf-8"))
    tokens = [merge.replace(" ", "") for merge in MERGES]
    vocab |= {token: 257 + n for n, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({"  ": 300, "\t\t": 301}))

    def read():
        tokenizer, text = data.Tokenizer(folder), "abc  ab<|endoftext|>ca é\t\t\n"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 <= min(ids) <= max(ids) < len(tokenizer)

    return [folder / name for name in names], read, folder


def records_target(folder: Path) -> Target:
    picture().save(folder / "a.png")
    boxes = {"phrase": "the dog", "boxes": [[1, 2, 30, 20], [0, 0, 7.5, 9]]}
    records = [
        {"image": "a.png", "task": "caption", "caption": "a dog on a sofa"},
        {"image": "a.png", "task": "vqa", "question": "what?", "answers": ["dog", "a cat"]},
        {"image": "a.png", "task": "detection", **boxes},
        {"task": "chat", "turns": [["What is this?", "A dog."], ["Red?", "No."]]},
    ]
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    tokenizer = tokenizer_of(folder)

    def read():
        rows = data.RecordDataset(data.read_records(path), data.RowSettings(4, tokenizer, 28, 4))
        try:
            use_tensors({"rows": rows[0]["input_ids"]})
        except ValueError as error:  # of a box outside its picture; the run has counted it
            assert "cannot be used" in str(error)

    return [path], read, path


def tokenizer_of(folder: Path) -> data.Tokenizer:
    write_tokenizer(folder)
    return data.Tokenizer(folder)


def shard_target(folder: Path, format: int) -> Target:
    path = folder / "0.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for key in ("1", "2", "b" * 90 + "/" + "c" * 90):  # of which some formats make two headers
            for ending in ("jpg", "json"):
                content = io.BytesIO()
                picture().save(content, "JPEG")
                if ending == "json":
                    content = io.BytesIO(b'{"caption": "a dog", "width": 40}')
                about = tarfile.TarInfo(f"{key}.{ending}")
                about.size = len(content.getvalue())
                content.seek(0)
                tar.addfile(about, content)
    tokenizer = tokenizer_of(folder)

    def read():
        read_index.cache_clear()
        rows = ShardDataset([path], data.RowSettings(1, tokenizer, 28, 4))
        for reason in [reason for n in range(4) for reason in rows[n]["skipped"]]:
            assert str(path) in reason and reason.isprintable()

    return [path], read, path


def mixture_target(folder: Path) -> Target:
    path = folder / "mixture.json"
    path.write_text('{"4": {"mine": [2, 3], "laion": [0.5, 8]}, "1": {"laion": [1, 64]}}')

    def read():
        for name, (ratio, size) in read_mixture(folder, 4).items():
            random.choices([name], [ratio], k=size)

    return [path], read, path


def references_target(folder: Path) -> Target:
    """A pickle as Python 2 wrote it."""
    path = folder / "refs(unc).p"
    path.write_bytes(b"(lp0\n(dp1\nS'ann_id'\np2\nI7\nsS'raw'\np3\nS'caf\\xc3\\xa9'\np4\nsa.")
    return [path], lambda: repr(read_references(path)), path


def checkpoint_target(folder: Path, *names: str) -> Target:
    write_weights(folder)

    def read():
        model = TinyGPTV.from_pretrained(folder)
        if model.stage == 4:
            prompt = data.inference_prompt("vqa", "what?", 4)
            try:
                list(generate(model, [picture()], prompt, max_new_tokens=2))
            except ValueError as error:  # of a number that is finite, but much too large
                assert "its weights damaged" in str(error)

    return [folder / name for name in names], read, folder


def index_target(folder: Path) -> Target:
    """The table of Phi-2's files, before any of them is opened."""
    path = folder / "model.safetensors.index.json"
    weight_map = {"lm_head.weight": "model-1.safetensors", "lm_head.bias": "model-2.safetensors"}
    path.write_text(json.dumps({"weight_map": weight_map}))
    for name in weight_map.values():
        save_file({f"lm_head.{name[6]}": torch.ones(1)}, folder / name)
    return [path], lambda: find_parts(folder), folder


WEIGHTS = ("vision.safetensors", "qformer.safetensors", "phi.safetensors")
TARGETS = {
    "jpeg": lambda folder: picture_target(folder, "jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0"
                                          b"\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
    "png": lambda folder: picture_target(folder, "png"),
    "gif": lambda folder: picture_target(folder, "gif"),
    "webp": lambda folder: picture_target(folder, "webp"),
    "bmp": lambda folder: picture_target(folder, "bmp"),
    "tiff": lambda folder: picture_target(folder, "tiff", compression="tiff_lzw"),
    "ppm": lambda folder: picture_target(folder, "ppm"),
    "avif": lambda folder: picture_target(folder, "avif"),
    "jpeg 2000": lambda folder: picture_target(folder, "jp2"),
    "safetensors": safetensors_target,
    "pth": lambda folder: pth_target(folder, True),
    "old pth": lambda folder: pth_target(folder, False),
    "vocab.json": lambda folder: tokenizer_target(folder, "vocab.json"),
    "merges.txt": lambda folder: tokenizer_target(folder, "merges.txt"),
    "added_tokens.json": lambda folder: tokenizer_target(folder, "added_tokens.json"),
    "jsonl": records_target,
    "tar": lambda folder: shard_target(folder, tarfile.USTAR_FORMAT),
    "pax tar": lambda folder: shard_target(folder, tarfile.PAX_FORMAT),
    "gnu tar": lambda folder: shard_target(folder, tarfile.GNU_FORMAT),
    "mixture.json": mixture_target,
    "references": references_target,
    "index.json": index_target,
    "config.json": lambda folder: checkpoint_target(folder, "stage4/config.json"),
    "checkpoint": lambda folder: checkpoint_target(folder, "stage4/model.safetensors"),
    "backbones": lambda folder: checkpoint_target(folder, *WEIGHTS, "vocab.json"),
}  # fmt: skip


def fuzz(folder: Path, name: str, times: int) -> None:
    folder.mkdir(exist_ok=True)
    paths, read, named = TARGETS[name](folder)
    contents = {path: path.read_bytes() for path in paths}
    assert outcome(read, named) == ("refused" if name == "index.json" else "loaded")
    for seed in range(times):
        rng = random.Random(f"{name} {seed}")
        path = rng.choice(paths)
        path.write_bytes(damage(contents[path], rng))
        try:
            outcome(read, named)
        except BaseException as error:  # what failed is kept for whoever looks into it
            shutil.copy(path, folder / f"failed{path.suffix}")
            raise AssertionError(f"{name} {seed}: {path}: {error!r:.500}") from error
        finally:
            path.write_bytes(contents[path])


@pytest.fixture(autouse=True)
def fewer_pixels(monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", 10_000_000)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:.*answers cut")
def test_damaged_files_are_refused_or_load(name, tmp_path):
    fuzz(tmp_path / "few", name, 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore:.*answers cut")
def test_thousands_of_damaged_files_are_refused_or_load(name, tmp_path):
    fuzz(tmp_path / "many", name, 2000)
