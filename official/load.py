"""Loads the official weight files into our modules: all of them, strictly, and only once.

    WeightFile       one file, memory-mapped, and which part of the model it holds
    open_weights     whatever the container: safetensors, torch's zip, torch's older pickle
    find_parts       the files of a folder, by part
    Filling          a model that has shapes but no memory yet, filled tensor by tensor
    load_official    everything together, with a report of what came from where

A file is known by the names of its tensors, not by its own. Every tensor of the model has to come
from a file or from the short list of what no file has; every tensor of a file is used, or ignored
for a reason that the report gives; all else is an error that names file and tensor.
"""

import ctypes
import json
import mmap
import pickle
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data import Tokenizer
from lora import LORA_PRESETS
from model import ModelConfig, TinyGPTV, check_tensor, is_trainable, new_projector, set_dtype
from official.fetch import NOT_WEIGHTS
from official.weights import (
    clip_from_official,
    eva_from_official,
    from_official,
    phi_from_official,
)

# The parts of the model, each with what only its files have among their names; first fit wins.
EVA, CLIP, QFORMER, PHI = "EVA's ViT", "CLIP's ViT", "the Q-Former", "Phi-2"
PROJECTION, CHECKPOINT = "MiniGPT-4's projection", "TinyGPT-V"
SIGNS = {
    CHECKPOINT: r"(module\.)?(llama_model\.|llama_proj2\.)",
    PROJECTION: r"llama_proj\.",
    QFORMER: r"Qformer\.",
    CLIP: r"visual\.|vision_model\.|transformer\.resblocks\.",
    EVA: r"blocks\.\d+\.attn\.q_bias$",
    PHI: r"transformer\.(embd|h)\.|lm_head\.|model\.(embed_tokens|layers|final_layernorm)\.",
}
ENDINGS = (".pth", ".bin", ".safetensors")
AGAIN = "fetch it again: python official/fetch.py"
# What Phi-2's files lack of TinyGPT-V's norms, and its checkpoints bring or leave as they began.
NEW_NORM = r"phi\.layers\.\d+\.(self_attn\.[qk]_layernorm|post_layernorm)\.(weight|bias)"


@dataclass
class WeightFile:
    path: Path
    tensors: dict[str, Tensor]  # memory-mapped: nothing is read before it is used
    part: str
    loaded: int = 0
    ignored: Counter = field(default_factory=Counter)  # reason: how many tensors

    def let_go(self) -> None:
        """Gives back what has been read: pages of a mapped file count as this process's memory.
        (They stay in the system's cache. Where there is no /proc, only the count is higher.)"""
        maps = Path("/proc/self/maps")
        lines = maps.read_text().splitlines() if maps.exists() else []
        for line in lines:
            if line.endswith(f" {self.path.resolve()}"):
                start, end = (int(address, 16) for address in line.split()[0].split("-"))
                span = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
                ctypes.CDLL(None).madvise(*span, mmap.MADV_DONTNEED)


# ---- files ----


def open_weights(path: Path) -> WeightFile:
    """One weight file. Raises ValueError, with the file's size and what to do, for what is not."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    for start, kind in NOT_WEIGHTS.items():
        if head.lstrip().startswith(start):
            raise ValueError(f"{path} ({size:,} bytes) is {kind}, not weights; {AGAIN}")
    try:
        if head.startswith(b"PK"):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        elif head.startswith(b"\x80"):  # before torch 1.6
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            content = load_file(path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} ({size:,} bytes) holds something else than tensors and plain values "
            f"({first_words(error)}); that could run code, so it was not opened. If the file is "
            f"not what its author made, {AGAIN}"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path} ({size:,} bytes) is damaged or cut off ({first_words(error)}); {AGAIN}"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # beside it may be an optimizer, which stays unread
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} is not a table of tensors, so it is no weight file")
    return WeightFile(path, content, part_of(path, content))


def first_words(error: Exception) -> str:
    """What a library says, without the advice that follows."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    return text.splitlines()[0].split(". ")[0][:120]


def part_of(path: Path, tensors: dict[str, Tensor]) -> str:
    for part, sign in SIGNS.items():
        if any(re.match(sign, name) for name in tensors):
            return part
    first = next(iter(tensors), "nothing at all")
    raise ValueError(f"{path} is no part of TinyGPT-V (it begins with {first}); move it elsewhere")


def find_parts(folder: Path) -> dict[str, list[WeightFile]]:
    """The weight files in a folder and in its subfolders, by the part that they hold."""
    for index in sorted(folder.rglob("*.index.json")):
        for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())):
            if not index.with_name(name).exists():
                raise FileNotFoundError(f"{index.with_name(name)} is missing; {AGAIN}")
    parts: dict[str, list[WeightFile]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS):
        file = open_weights(path)
        parts.setdefault(file.part, []).append(file)
    if not parts:
        raise FileNotFoundError(f"{folder} holds no weights; {AGAIN} --out {folder}")
    if EVA in parts and CLIP in parts:
        eva, clip = parts[EVA][0].path, parts[CLIP][0].path
        raise ValueError(f"{eva} and {clip} are two ViTs; move one of them elsewhere")
    for part in (QFORMER, PHI, EVA if CLIP not in parts else CLIP):
        if part not in parts:
            raise FileNotFoundError(f"{folder} holds no file of {part}; {AGAIN} --out {folder}")
    for part, files in parts.items():
        if part != CHECKPOINT:
            check_no_tensor_twice(files)
    return parts


def check_no_tensor_twice(files: list[WeightFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for name in file.tensors:
            if name in seen:
                both = f"{seen[name]} and {file.path}"
                raise ValueError(f"{both} both hold {name}; move one of them elsewhere")
            seen[name] = file.path


def stage_of(file: WeightFile) -> int:
    """The stage that a checkpoint is of: its name says it, or else whether it has LoRA."""
    named = re.search(r"[Ss]tage_?([1-4])", file.path.name)
    return int(named[1]) if named else 4 if has_lora(file) else 1


def has_lora(file: WeightFile) -> bool:
    return any(".lora_A." in name for name in file.tensors)


def choose_checkpoint(files: list[WeightFile], stage: int | None) -> WeightFile | None:
    """The checkpoint of the stage, by default of the last there is; None for stage 0."""
    if stage == 0 or (stage is None and not files):
        return None
    by_stage: dict[int, WeightFile] = {}
    for file in files:
        if stage_of(file) in by_stage:
            both = f"{by_stage[stage_of(file)].path} and {file.path}"
            raise ValueError(f"{both} are both of stage {stage_of(file)}; move one elsewhere")
        by_stage[stage_of(file)] = file
    if stage is not None and stage not in by_stage:
        found = ", ".join(map(str, sorted(by_stage))) or "none"
        raise FileNotFoundError(f"no checkpoint of stage {stage}; stages found: {found}")
    return by_stage[stage or max(by_stage)]


# ---- sizes ----


def full_config(parts: dict[str, list[WeightFile]], checkpoint: WeightFile | None) -> ModelConfig:
    """The official sizes, with what the folder says of itself: which ViT, whether LoRA, and how
    much of each head rotates, which Phi-2's config.json tells (0.5 in its first days)."""
    vision = "clip" if CLIP in parts else "full"
    config = ModelConfig.preset("full", stage_of(checkpoint) if checkpoint else 0, vision)
    config.lora = LORA_PRESETS["full"] if checkpoint and has_lora(checkpoint) else None
    path = parts[PHI][0].path.with_name("config.json")
    if path.exists():
        values = json.loads(path.read_text("utf-8"))
        factor = values.get("partial_rotary_factor", config.phi.partial_rotary_factor)
        config.phi = replace(config.phi, partial_rotary_factor=factor)
    return config


# ---- filling the model ----


class Filling:
    """A model on the meta device, all shapes and no memory, and the tensors it has got so far.

    A tensor at a time is turned into our layout and dtype: there are never two copies of more.
    """

    def __init__(self, model: TinyGPTV, device: str):
        self.model, self.device = model, device
        self.expected = model.state_dict()
        self.state: dict[str, Tensor] = {}
        self.source: dict[str, Path] = {}  # where each came from

    def add(self, files: list[WeightFile]) -> None:
        """Takes all that the files of one part hold."""
        file_of = {name: file for file in files for name in file.tensors}
        unreleased = 0
        for names in taken_together(file_of, files[0].part):
            tensors = {name: file_of[name].tensors[name] for name in names}
            file = file_of[names[0]]
            try:
                ours, ignored = self.translate(file.part, tensors)
                for name, tensor in ours.items():
                    label = names[0] if len(ours) == 1 else name
                    tensor = check_tensor(label, tensor, self.expected.get(name))
                    self.state[name], self.source[name] = tensor.to(self.device), file.path
            except ValueError as error:
                raise ValueError(f"{file.path}: {error}") from None
            for name in names:
                if name in ignored:
                    file_of[name].ignored[ignored[name]] += 1
                else:
                    file_of[name].loaded += 1
                    unreleased += tensors[name].nbytes
            if unreleased > 2**28:
                unreleased = 0
                for file in files:
                    file.let_go()
        for file in files:
            file.tensors = {}  # closes the file

    def translate(self, part: str, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, str]]:
        """Tensors by our names, and for those without a use the reasons."""
        config = self.model.config
        if part in (CHECKPOINT, QFORMER, PROJECTION):
            return from_official(tensors, config)
        if part == PHI:
            state, ignored = phi_from_official(tensors, config.phi.num_heads)
            return {f"phi.{name}": tensor for name, tensor in state.items()}, ignored
        from_file = clip_from_official if part == CLIP else eva_from_official
        state, ignored = from_file(tensors, config.vision.num_layers)
        return {f"visual_encoder.{name}": tensor for name, tensor in state.items()}, ignored

    def begin_the_rest(self, checkpoint: WeightFile | None) -> list[str]:
        """Gives a beginning to what no file needs to have: TinyGPT-V's norms, and without a
        checkpoint the projection. Returns the names. Raises ValueError if anything else is missing.
        """
        missing = [name for name in self.expected if name not in self.state]
        projector = new_projector(self.model.config.projector)
        for name in missing:
            shape = self.expected[name].shape
            if re.fullmatch(NEW_NORM, name) and (name.endswith("bias") or not checkpoint):
                value = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            elif name.startswith("projector.") and not checkpoint:
                value = projector[name]
            else:
                raise ValueError(f"no file holds {name}, shape {tuple(shape)}")
            self.state[name] = value.to(self.device)
        return missing

    def check_trained(self, checkpoint: WeightFile) -> None:
        """All that the stages train has to come from the checkpoint, not from a backbone.

        The first release of stage 4 was trained with the Q-Former, but without Phi's last norm.
        """
        first_release = self.source.get("qformer.query_tokens") == checkpoint.path
        for name in filter(is_trainable, self.expected):
            if self.source.get(name) != checkpoint.path:
                if not (first_release and name == "phi.final_layernorm.weight"):
                    raise ValueError(f"{checkpoint.path} lacks {name}, which every stage trains")


def taken_together(names: Iterable[str], part: str) -> list[list[str]]:
    """Names of tensors that are translated together: q, k and v of a layer, all others alone.
    (CLIP's layouts can only be told apart as a whole.)"""
    if part == CLIP:
        return [list(names)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.[qkv]_proj\.", ".qkv.", name), []).append(name)
    return list(groups.values())


def load_official(
    directory: str | Path, stage: int | None = None, device: str = "cpu",
    dtype: torch.dtype | None = None, config: ModelConfig | None = None,
) -> TinyGPTV:  # fmt: skip
    """TinyGPT-V from a folder with the official files; `model.load_report` tells what came from
    where.

    stage: which checkpoint, by default the last there is; 0 for none. dtype: of all linear maps and
    embeddings that stay frozen, by default the device's half precision. config: other sizes than
    the official ones. Raises ValueError or FileNotFoundError, naming file and tensor, for what is
    missing, unexpected, of the wrong shape, or not finite.
    """
    parts = find_parts(Path(directory))
    checkpoint = choose_checkpoint(parts.pop(CHECKPOINT, []), stage)
    with torch.device("meta"):
        model = TinyGPTV(config or full_config(parts, checkpoint))
    set_dtype(model, dtype or half_dtype(device))
    model.backbones = parts[PHI][0].path.parent
    model.tokenizer = Tokenizer(model.backbones)  # before the long part, should it be missing
    filling = Filling(model, device)
    for files in parts.values():
        filling.add(files)
    if checkpoint:
        filling.add([checkpoint])
        filling.check_trained(checkpoint)
    begun = filling.begin_the_rest(checkpoint)
    model.load_state_dict(filling.state, assign=True)
    files = [file for files in parts.values() for file in files] + [checkpoint] * bool(checkpoint)
    model.load_report = report(model, files, begun, checkpoint)
    return model.eval()


def half_dtype(device: str) -> torch.dtype:
    """The 16-bit type that the device computes with: bf16, which has the range of fp32, or fp16."""
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float16 if device == "mps" else torch.bfloat16


def report(
    model: TinyGPTV, files: list[WeightFile], begun: list[str], checkpoint: WeightFile | None
) -> str:
    """What came from where, a line a file."""
    lines = []
    for file in files:
        line = f"{file.path}: {file.part}, {file.loaded} tensors loaded"
        for reason, count in file.ignored.items():
            line += f", {count} ignored ({reason})"
        lines.append(line)
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = f"; {len(begun)} tensors that no file has are as training begins" if begun else ""
    lines.append(f"{total:,} parameters, every one accounted for{rest}")
    if not checkpoint:
        lines.append("without a checkpoint of TinyGPT-V this model talks nonsense until trained")
    return "\n".join(lines)
