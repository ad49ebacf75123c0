"""Weights directories: reading and writing them, strictly.

A directory holds config.json, model.safetensors with what the stages have trained, and next to it
or in another folder the backbones: ours as safetensors, or the official files (load.py). One that
quantize.py made holds the whole model. Whatever is read, every tensor is accounted for, has its
shape and only finite numbers, or there is an error that names file and tensor; and no tensor is in
memory twice. What is written replaces the old file when it is whole, and not before.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge import Projector, ProjectorConfig
from data import Tokenizer, printable
from experiments.command_line import is_out_of_memory
from lora import merge_tensors
from model import (
    ModelConfig,
    PhiConfig,
    TinyGPTV,
    half_dtype,
    is_new,
    is_trainable,
    set_dtype,
)
from official.fetch import not_weights
from quantize import joined, quantize_tensors

Tensors = Iterator[tuple[str, Tensor]]  # names and tensors, one after the other

BACKBONE_FILES = {
    "vision.safetensors": "visual_encoder.",
    "qformer.safetensors": "qformer.",
    "phi.safetensors": "phi.",
}
OUR_FILES = (*BACKBONE_FILES, "projection.safetensors", "model.safetensors", "train_state.pt")
RENEW = "make it again with train.py or quantize.py, or restore the miniature's with git"


# ---- tensors ----
def read_tensors(
    path: Path, prefix: str, expected: dict[str, Tensor], copy: bool
) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked, their names after `prefix`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; {RENEW}")
    names = {prefix + name: tensor for name, tensor in read_safetensors(path, RENEW).items()}
    checked = {}
    try:
        for name, tensor in names.items():
            dtype = check_place(name, tensor, expected.get(name), RENEW)
            checked[name] = check_numbers(name, tensor, dtype, copy, RENEW)
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error)}") from None
    return checked


def read_safetensors(path: Path, advice: str) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped. Raises ValueError, with the file's size and with advice
    what to do, for what is no such file."""
    try:
        return load_file(path)
    except Exception as error:  # damaged bytes can make a parser raise anything
        if is_out_of_memory(error):
            raise
        with open(path, "rb") as file:
            kind = not_weights(file.read(64))
        reason = f"is not a safetensors file, or is damaged or cut off ({printable(error)[:120]})"
        told = f"is {kind}, not weights" if kind else reason
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) {told}; {advice}") from None


def read_pickle(path: Path, advice: str, is_zip: bool) -> object:
    """What torch.save has written. is_zip: in the zip container of torch 1.6 and later, which is
    memory-mapped. Raises ValueError, with the file's size and with advice what to do, for what is
    damaged, or could do harm."""
    described = f"{path} ({path.stat().st_size:,} bytes)"
    try:
        if is_zip and not is_stored(path):
            raise ValueError("it is compressed, which torch does not do, to an unknown size")
        with warnings.catch_warnings():  # of its version
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # damaged bytes can make a parser raise anything
        if is_out_of_memory(error):
            raise
        reason = first_words(error)
        if "unsupported global" in reason.lower():
            raise ValueError(
                f"{described} holds something else than tensors and plain values ({reason}); "
                f"that could run code, so it was not opened. If it is damaged, {advice}"
            ) from None
        raise ValueError(f"{described} is damaged or cut off ({reason}); {advice}") from None


def is_stored(path: Path) -> bool:
    """Whether nothing in a zip archive is compressed, so that no few bytes unpack to gigabytes."""
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def first_words(error: Exception) -> str:
    """What a library says, without the advice that follows."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    words = re.search(r"unsupported global.*", text, re.IGNORECASE) or re.search(r".*", text)
    return printable(words[0].split(". ")[0][:120])


def check_place(name: str, tensor: Tensor, expected: Tensor | None, advice: str) -> torch.dtype:
    """The dtype that a file's tensor has in the model, where `expected`, on the meta device, holds
    its place. Raises ValueError, with advice what to do, if nothing does, or if it has another
    shape or another kind of numbers."""
    if expected is None:
        raise ValueError(f"unexpected tensor {name}; {advice}")
    if tensor.shape != expected.shape:
        shapes = f"{tuple(tensor.shape)}, the model needs {tuple(expected.shape)}"
        raise ValueError(f"{name} has shape {shapes}; {advice}")
    if expected.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers; {advice}")
    if not expected.is_floating_point() and tensor.dtype != expected.dtype:
        raise ValueError(f"{name} holds {tensor.dtype}, the model needs {expected.dtype}; {advice}")
    return expected.dtype


def check_numbers(name: str, tensor: Tensor, dtype: torch.dtype, copy: bool, advice: str) -> Tensor:
    """A tensor in a dtype; a copy, or where possible the mapped file itself. Raises ValueError,
    with advice what to do, if a number is not finite or too large for the dtype."""
    converted = in_dtype(tensor, dtype, copy)
    if not all_finite(converted):
        if all_finite(tensor.double()):  # some types of 8 bits have no extremes
            raise ValueError(f"{name} holds numbers too large for {dtype}; use bf16 or fp32")
        raise ValueError(f"{name} holds NaN or infinity; {advice}")
    return converted


def in_dtype(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    """The tensor in a dtype; in new memory if `copy` or if it has another one.

    fp16 becomes bf16 by way of fp32, in parts that fit into the processor's cache: torch is fast on
    both halves of the way, and slow on the whole.
    """
    if (tensor.dtype, dtype) != (torch.float16, torch.bfloat16):
        return tensor.to(dtype, copy=copy)
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for place, part in zip(*(whole.reshape(-1).split(2**18) for whole in (result, tensor))):
        place.copy_(part.float())
    return result


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it."""
    if not tensor.is_floating_point():
        return True  # without reading it
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is the extreme of both


def require(found: dict[str, Tensor], names: set[str], path: Path) -> None:
    """Raises ValueError unless all names were found in the file."""
    if missing := sorted(names - set(found)):
        told = f"{len(missing)} tensors are missing, first {missing[0]}"
        raise ValueError(f"{path}: {told}; {RENEW}")


def qformer_lacks(found: set[str], expected: Iterable[str]) -> list[str]:
    """What a checkpoint lacks that brings a Q-Former of its own, which is not to be mixed with the
    backbone's; nothing if it brings none. The norm before it is frozen wherever it was trained."""
    whole = {name for name in expected if name.startswith("qformer.")}
    frozen = {name for name in whole if name.startswith("qformer.ln_vision.")}
    return sorted(whole - frozen - found) if whole & found else []


def tensors_fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of the first 64 numbers of each tensor: enough to tell models apart, where hashing all
    of them would take minutes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().flatten()[:64].float().cpu().numpy())
    return digest.hexdigest()[:16]


def release(path: Path) -> None:
    """Gives back what was read of a mapped file, whose pages count as this process's memory. (They
    stay in the system's cache. What was written to the mapped tensors would be lost.) For Linux;
    elsewhere nothing happens, and a process seems to hold more than it needs."""
    if not sys.platform.startswith("linux"):
        return
    ending = f" {path.resolve()}"
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(ending):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            span = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            ctypes.CDLL(None).madvise(*span, mmap.MADV_DONTNEED)


def release_all(path: Path | None) -> None:
    """`release`, and gives back what the C library keeps of freed tensors (half a gigabyte while
    weights are packed; while they are loaded it would only be asked for again)."""
    if path is not None:
        release(path)
    call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Tells the C library to keep the memory of freed tensors, of up to 32 MB each and 64 MB in
    all, for the next ones. Else it may give each back to the system, which clears every page before
    it lends it again: half a second for a first picture at the official size."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
    call_glibc("mallopt", trim_threshold, 2**26)
    call_glibc("mallopt", mmap_threshold, 2**25)  # the most, by its manual


def call_glibc(name: str, *arguments: int) -> None:
    """Calls a function of GNU's C library on Linux; with another library nothing happens."""
    if sys.platform.startswith("linux"):
        if function := getattr(ctypes.CDLL(None), name, None):
            function(*arguments)


# ---- directories ----
def files_below(folder: Path) -> list[Path]:
    """The files in a folder and up to three folders below it. Links are followed; the limit of
    depth ends those that form a circle."""
    depths = ("*", "*/*", "*/*/*", "*/*/*/*")
    return sorted(path for depth in depths for path in folder.glob(depth) if path.is_file())


def is_official(directory: Path) -> bool:
    """Whether a folder holds official files, or the beginnings of their download: weights whose
    files have none of our names. With one of our configurations it is ours whatever else is there.
    """
    for path in (directory / "config.json", *directory.glob("stage[1-4]/config.json")):
        if path.exists() and '"qformer"' in path.read_text("utf-8", errors="replace"):
            return False
    endings = (".pth", ".pt", ".bin", ".safetensors", ".part")
    return any(path.suffix in endings and path.name not in OUR_FILES
               for path in files_below(directory))  # fmt: skip


def checkpoint_directory(directory: Path, stage: int | None) -> Path:
    """The checkpoint directory that `stage` means in `directory`."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no weights directory {directory}")
    if (directory / "model.safetensors").exists() or stage == 0:
        return directory
    stages = sorted(int(path.name[5:]) for path in directory.glob("stage[1-4]"))
    if not stages or (stage is not None and stage not in stages):
        wanted = "no checkpoint" if stage is None else f"no stage {stage}"
        found = ", ".join(map(str, stages)) or "none"
        advice = f"get the official files with python official/fetch.py --out {directory}"
        advice = "choose one of them, or train it" if stages else advice
        raise FileNotFoundError(f"{directory}: {wanted} in it; stages found: {found}; {advice}")
    return directory / f"stage{stage or stages[-1]}"


# Whole numbers go from 1 to a million and others from 0 to 1, but for these.
RANGES = {"num_layers": (1, 200), "stage": (0, 4), "rope_theta": (1, 1e9)}


def check_config(config: object) -> None:
    """Raises ValueError, naming the key, for what no model can be: it would fail when it answers,
    or take all memory before."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if is_dataclass(value):
            check_config(value)
        elif name != "lora":  # None where there is none
            kinds = (int, float) if field.type is float else (field.type,)
            least, most = RANGES.get(name, (1, 10**6) if field.type is int else (0, 1))
            if type(value) not in kinds or not least <= value <= most:
                expected = f"{field.type.__name__} from {least} to {most}"
                raise ValueError(f"{name} is {value!r:.40}, not of type {expected}")
    sizes = vars(config)
    for whole, part in (("hidden_size", "num_heads"), ("image_size", "patch_size")):
        if {whole, part} <= sizes.keys() and sizes[whole] % sizes[part]:
            raise ValueError(f"{whole} {sizes[whole]} is no multiple of {part} {sizes[part]}")
    if isinstance(config, PhiConfig):
        rotary_dim = config.rotary_dim
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"{rotary_dim} channels of each head rotate; they have to be pairs")


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The model's sizes, and the folder of its frozen tensors as seen from `folder`."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        config = ModelConfig.from_dict(values)
        check_config(config)
        return config, os.fspath(values.get("backbones", "."))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; is {folder} a weights directory?") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model: {error!r:.300}; {RENEW}") from None


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a folder. Raises ValueError if it has more ids than the model has rows."""
    tokenizer = Tokenizer(folder)
    if len(tokenizer) > config.phi.vocab_size:
        raise ValueError(f"the tokenizer files of {folder} have {len(tokenizer)} ids, the model "
                         f"has {config.phi.vocab_size}: they do not belong together")  # fmt: skip
    return tokenizer


# ---- models ----
def new_projector(config: ProjectorConfig) -> dict[str, Tensor]:
    """A projector that has learned nothing yet (torch's default initialisation), to be trained."""
    return {f"projector.{name}": t for name, t in Projector(config).state_dict().items()}


def read_model(model: TinyGPTV, folder: Path, device: str, copy: bool) -> Tensors:
    """The tensors of a checkpoint directory, then what its backbones have beside them."""
    expected = model.state_dict()
    if model.config.int8:
        path = folder / "model.safetensors"
        tensors = read_tensors(path, "", expected, copy=False)
        require(tensors, set(expected), path)
        yield from tensors.items()
        return
    if model.stage > 0:
        path = folder / "model.safetensors"
        own = read_tensors(path, "", expected, copy)
        trained = {name for name in expected if is_trainable(name)}
        require(own, trained | set(qformer_lacks(set(own), expected)), path)
        model.carried = set(own) - trained
    else:  # the first projection comes with the backbones, the second is new
        path = model.backbones / "projection.safetensors"
        own = new_projector(model.config.projector)
        own |= read_tensors(path, "projector.", expected, copy)
    yield from own.items()
    if is_official(model.backbones):
        from official.load import read_backbones

        yield from read_backbones(model, device, own, copy)
        return
    for file, prefix in BACKBONE_FILES.items():
        tensors = read_tensors(model.backbones / file, prefix, expected, copy)
        names = {n for n in expected if n.startswith(prefix) and not is_new(n)}
        require(tensors, names, model.backbones / file)
        yield from ((name, tensor) for name, tensor in tensors.items() if name not in own)


def open_pretrained(
    directory: Path, stage: int | None, device: str, dtype: torch.dtype | None, copy: bool = True
) -> tuple[TinyGPTV, Tensors]:
    """The model with shapes but no memory, and its tensors as they are read: the checkpoint's
    first, of official files one after the other. copy: False if tensors may stay in the mapped
    file, where nobody may write to them; official ones of many rows then come in parts."""
    if is_official(directory):
        from official.load import open_official  # it is built on this file

        return open_official(directory, stage, device, dtype, copy=copy)
    folder = checkpoint_directory(directory, stage)
    config, backbones = read_config(folder)
    if stage not in (None, config.stage):
        raise ValueError(f"{directory} holds stage {config.stage}, not {stage}")
    with torch.device("meta"):
        model = TinyGPTV(config)
    model.backbones = folder / backbones
    on_official = is_official(model.backbones)
    is_half = on_official or config.int8
    set_dtype(model, dtype or (half_dtype(device) if is_half else torch.float32))
    if not on_official:
        model.tokenizer = read_tokenizer(model.backbones, config)
    return model, read_model(model, folder, device, copy)


def open_quantized(directory: Path, stage: int | None) -> tuple[TinyGPTV, Tensors]:
    """As `open_pretrained`, of the model quantized, LoRA merged. A tensor may come in parts."""
    source, tensors = open_pretrained(directory, stage, "cpu", torch.float16, copy=False)
    if source.config.int8:
        raise ValueError(f"{directory} is quantized already")
    with torch.device("meta"):
        model = TinyGPTV(replace(source.config, lora=None, int8=True))
    set_dtype(model, torch.float16)
    model.tokenizer = source.tokenizer

    def read() -> Tensors:
        lora = source.config.lora
        merged = merge_tensors(tensors, lora) if lora else tensors
        yield from quantize_tensors(merged)
        model.load_report = source.load_report

    return model, read()


def collected(tensors: Tensors, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in the dtypes of `expected`, those that come in parts joined as soon as they are
    whole."""
    parts: dict[str, list[Tensor]] = {}
    whole = {}
    for name, tensor in tensors:
        parts.setdefault(name, []).append(tensor.to(expected[name].dtype))
        if sum(map(len, parts[name])) == len(expected[name]):
            whole[name] = joined(parts.pop(name), order=None)
    return whole


# ---- writing ----
def lock(file: TextIO, told: str) -> None:
    """Locks an open file until it is closed. Raises ValueError with what is told if another process
    holds it. The lock is this process's alone: flock's would live on in those that it starts."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(told) from None


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary file to write into, which takes the place of `path` when all of it is on the
    disk: whatever happens, `path` is the old file or the new one. Raises OSError if the writing
    fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError) or is_out_of_memory(error):
            raise  # about what is read meanwhile, or about memory
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # by who writes
            raise OSError(f"cannot write {path} ({error}); nothing else has changed") from error
        raise


def write_config(config: ModelConfig, folder: Path, backbones: str) -> None:
    """Writes config.json; backbones: the folder of the frozen tensors as seen from `folder`."""
    text = json.dumps(asdict(config) | {"backbones": backbones}, indent=2)
    with replace_file(folder / "config.json") as path:
        path.write_text(text + "\n", "utf-8")


def save_checkpoint(model: TinyGPTV, folder: Path) -> None:
    """Writes config.json and model.safetensors. The frozen tensors of the backbones stay where
    they are, in `model.backbones`, to which config.json points."""
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / "model.safetensors") as path:
        save_file(model.checkpoint_tensors(), path)
    write_config(model.config, folder, os.path.relpath(model.backbones, folder))
