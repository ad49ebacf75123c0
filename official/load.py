"""Loads the official weight files into our modules: all of them, strictly, and only once.

    WeightFile       one file, memory-mapped, and which part of the model it holds
    open_weights     whatever the container: safetensors, torch's zip, torch's older pickle
    find_parts       the files of a folder, by part
    Filling          what a model that has shapes but no memory yet gets, tensor by tensor
    open_official    everything together, with a report of what came from where

A file is known by the names of its tensors, not by its own. Every tensor of the model has to come
from a file or from the short list of what no file has; every tensor of a file is used, or ignored
for a reason that the report gives; all else is an error that names file and tensor.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from data import printable
from experiments.command_line import is_out_of_memory
from lora import LORA_PRESETS
from model import ModelConfig, TinyGPTV, half_dtype, is_trainable, set_dtype
from official.checkpoints import (
    Tensors,
    check_numbers,
    check_place,
    files_below,
    first_words,
    new_projector,
    qformer_lacks,
    read_pickle,
    read_safetensors,
    read_tokenizer,
    release,
)
from official.fetch import is_file_name, not_weights
from official.weights import (
    clip_from_official,
    eva_from_official,
    from_official,
    official_name,
    phi_from_official,
    rename,
)
from vision import CLIP_NAMES

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
PARTS_OF = {"visual_encoder": (EVA, CLIP), "qformer": (QFORMER,), "phi": (PHI,)}
ENDINGS = (".pth", ".pt", ".bin", ".safetensors")
AGAIN = "fetch it again: python official/fetch.py"
ROWS = 8192  # of a tensor that is not copied, at a time; none that LoRA changes has more
# TinyGPT-V's norms, which Phi-2's files lack: checkpoints bring the weights, biases stay zero.
NEW_NORM = r"phi\.layers\.\d+\.(self_attn\.[qk]_layernorm|post_layernorm)\.(weight|bias)"


@dataclass
class WeightFile:
    """A file of weights that is open, and what has become of its tensors."""

    path: Path
    tensors: dict[str, Tensor]  # memory-mapped, but for pickles from before torch 1.6
    part: str
    places: list[list[str]] = field(default_factory=list)  # of each tensor used, by our names
    ignored: Counter = field(default_factory=Counter)  # reason: how many tensors


# ---- files ----
def open_weights(path: Path) -> WeightFile:
    """One weight file. Raises ValueError, with the file's size and what to do, for what is not."""
    described = f"{path} ({path.stat().st_size:,} bytes)"
    with open(path, "rb") as file:
        head = file.read(64)
    is_table = head[8:9] == b"{"  # of safetensors: JSON after eight bytes with its length
    if head.startswith((b"PK", b"\x80")) and not is_table:
        content = read_pickle(path, AGAIN, is_zip=head.startswith(b"PK"))
    elif is_table or path.suffix == ".safetensors":
        content = read_safetensors(path, AGAIN)
    else:
        kind = not_weights(head)
        told = f"{kind}, not weights" if kind else "damaged or cut off (it begins like no weights)"
        raise ValueError(f"{described} is {told}; {AGAIN}")
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]  # beside it may be an optimizer, which stays unread
    if not (isinstance(content, dict) and all(isinstance(name, str) for name in content)
            and all(map(is_plain, content.values()))):  # fmt: skip
        raise ValueError(f"{described} is not a table of tensors, so it is no weight file; {AGAIN}")
    return WeightFile(path, content, part_of(path, content))


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor with all its numbers, not a sparse one or a mere shape."""
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def part_of(path: Path, tensors: dict[str, Tensor]) -> str:
    """Which part of the model a file holds, by its names. Raises ValueError for none."""
    for part, sign in SIGNS.items():
        if any(re.match(sign, name) for name in tensors):
            return part
    first = printable(next(iter(tensors), "nothing at all"))[:120]
    raise ValueError(f"{path} is no part of TinyGPT-V (it begins with {first}); move it "
                     "elsewhere")


def read_json(path: Path) -> dict:
    """A JSON object. Raises ValueError, naming the file, for anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) is not a JSON table; {AGAIN}")
    return content


def find_parts(folder: Path) -> dict[str, list[WeightFile]]:
    """The weight files in a folder and in its subfolders, by the part that they hold."""
    paths = files_below(folder)
    for index in (path for path in paths if path.name.endswith(".index.json")):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(map(is_file_name, weight_map.values())):
            raise ValueError(f"{index} does not say in which files the tensors are; {AGAIN}")
        missing = sorted({name for name in weight_map.values()
                          if not index.with_name(name).exists()})  # fmt: skip
        if missing:
            raise FileNotFoundError(f"{index.with_name(missing[0])} is missing; {AGAIN}")
    parts: dict[str, list[WeightFile]] = {}
    for file in (open_weights(path) for path in paths if path.suffix in ENDINGS):
        parts.setdefault(file.part, []).append(file)
    if EVA in parts and CLIP in parts:
        eva, clip = parts[EVA][0].path, parts[CLIP][0].path
        raise ValueError(f"{eva} and {clip} are two ViTs; move one of them elsewhere")
    for part in (CLIP if CLIP in parts else EVA, QFORMER, PHI):
        if part not in parts:
            raise FileNotFoundError(f"{folder} holds no file of {part}; {AGAIN} --out {folder}")
    return parts


def stage_of(file: WeightFile) -> int | None:
    """The stage that a checkpoint is of, if the name of the file or of its folder says so."""
    named = re.findall(r"[Ss]tage_?([1-4])", f"{file.path.parent.name}/{file.path.name}")
    return int(named[-1]) if named else None


def has_lora(file: WeightFile) -> bool:
    """Whether a checkpoint is of stage 2 or later."""
    return any(".lora_A." in name for name in file.tensors)


def choose_checkpoint(
    files: list[WeightFile], stage: int | None
) -> tuple[WeightFile | None, int]:
    """The checkpoint of the stage, by default of the last there is, and the stage; (None, 0) for
    stage 0 or where there is none."""
    if stage == 0 or (stage is None and not files):
        return None, 0
    by_stage: dict[int, WeightFile] = {}
    for file in files:
        number = stage_of(file) or stage
        if number is None:
            raise ValueError(f"no name says which stage {file.path} is of; say it with --stage")
        if number in by_stage:
            both = f"{by_stage[number].path} and {file.path}"
            raise ValueError(f"{both} are both of stage {number}; move one elsewhere")
        by_stage[number] = file
    if stage is not None and stage not in by_stage:
        found = ", ".join(map(str, sorted(by_stage))) or "none"
        raise FileNotFoundError(f"no checkpoint of stage {stage}; stages found: {found}")
    last = stage or max(by_stage)
    return by_stage[last], last


# ---- sizes ----
def full_config(
    parts: dict[str, list[WeightFile]], checkpoint: WeightFile | None, stage: int
) -> ModelConfig:
    """The official sizes, with what the folder says of itself: which ViT, whether LoRA, and how
    much of each head rotates, which Phi-2's config.json tells (0.5 in its first days)."""
    config = ModelConfig.preset("full", stage, "clip" if CLIP in parts else "full")
    config.lora = LORA_PRESETS["full"] if checkpoint and has_lora(checkpoint) else None
    path = parts[PHI][0].path.with_name("config.json")
    if path.exists():
        factor = read_json(path).get("partial_rotary_factor", config.phi.partial_rotary_factor)
        if not isinstance(factor, float) or not 0 < factor <= 1:
            raise ValueError(f"{path}: partial_rotary_factor is {factor}, not above 0 and up to 1")
        config.phi = replace(config.phi, partial_rotary_factor=factor)
    return config


# ---- filling the model ----
class Filling:
    """A model on the meta device, all shapes and no memory, and the tensors it has got so far.

    Tensors are turned into our layout and dtype one at a time, so that only one is ever in memory
    twice.
    """

    def __init__(self, model: TinyGPTV, device: str, copy: bool):
        self.model, self.device, self.copy = model, device, copy
        self.expected = model.state_dict()
        self.source: dict[str, Path] = {}  # where each tensor came from
        self.files: list[WeightFile] = []  # the files taken so far
        self.num_read = 0  # bytes since pages were last given back

    def take(self, files: list[WeightFile]) -> Tensors:
        """All that the files of one part hold, but for what an earlier part brought. Without
        `copy`, a tensor of many rows comes in parts."""
        self.files += files
        file_of = files_by_name(files)
        placed: dict[str, Path] = {}  # by this part
        for names in taken_together(file_of, files[0].part):
            tensors = {name: file_of[name].tensors[name] for name in names}
            yield from self.place(file_of[names[0]], tensors, placed)
        for file in files:
            file.tensors = {}  # closes the file

    def place(
        self, file: WeightFile, tensors: dict[str, Tensor], placed: dict[str, Path]
    ) -> Tensors:
        """Some tensors of a file, translated and checked; notes in `file` what became of them."""
        try:
            ours, ignored = self.translate(file.part, tensors)
            for name, tensor in ours.items():
                label = " + ".join(tensors) if len(ours) == 1 else name
                if name in placed:
                    raise held_twice(label, placed[name], file.path)
                placed[name] = file.path
                if name not in self.source:
                    self.source[name] = file.path
                    dtype = check_place(label, tensor, self.expected.get(name), AGAIN)
                    for part in [tensor] if self.copy else tensor.split(ROWS):
                        self.make_room(part.nbytes)
                        part = check_numbers(label, part, dtype, self.copy, AGAIN)
                        yield name, part.to(self.device)
        except ValueError as error:
            raise ValueError(f"{file.path}: {printable(error)}") from None
        except RuntimeError as error:  # about types that torch can't join or convert
            if is_out_of_memory(error):
                raise
            told = f"{printable(next(iter(tensors)))} can't be used ({first_words(error)})"
            raise ValueError(f"{file.path}: {told}; {AGAIN}") from None
        file.places += [list(ours)] * (len(tensors) - len(ignored))
        file.ignored.update(ignored.values())

    def make_room(self, num_bytes: int) -> None:
        """For so many bytes more: every 64 MB gives back what was read of all files. (Of the
        checkpoint, too: its LoRA is read layer by layer.)"""
        self.num_read += num_bytes
        if self.num_read > 2**26:
            self.num_read = num_bytes
            for file in self.files:
                release(file.path)

    def translate(self, part: str, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, str]]:
        """Tensors by our names, and for those without a use the reasons."""
        config = self.model.config
        try:
            if part in (CHECKPOINT, QFORMER, PROJECTION):
                return from_official(tensors, config)
            if part == PHI:
                state, ignored = phi_from_official(tensors, config.phi.num_heads)
                return {f"phi.{name}": tensor for name, tensor in state.items()}, ignored
            from_file = clip_from_official if part == CLIP else eva_from_official
            state, ignored = from_file(tensors, config.vision.num_layers)
            return {f"visual_encoder.{name}": tensor for name, tensor in state.items()}, ignored
        except ValueError as error:
            raise ValueError(f"{error}; {AGAIN}") from None

    def report(self, file: WeightFile) -> str:
        """A line about what became of a file's tensors."""
        used = [any(self.source[name] == file.path for name in names) for names in file.places]
        line = f"{file.path}: {file.part}, {sum(used)} tensors loaded"
        if not all(used):
            line += f", {len(used) - sum(used)} ignored (the checkpoint has its own)"
        for reason, count in file.ignored.items():
            line += f", {count} ignored ({reason})"
        return line

    def begin_the_rest(self, has_checkpoint: bool) -> dict[str, Tensor]:
        """A beginning for what no file needs to have: TinyGPT-V's norms, and without a checkpoint
        the projection. Raises ValueError if anything else is missing."""
        begun = {}
        projector = {} if has_checkpoint else new_projector(self.model.config.projector)
        for name in (name for name in self.expected if name not in self.source):
            if re.fullmatch(NEW_NORM, name) and (name.endswith("bias") or not has_checkpoint):
                value = new_norm(name, self.expected[name])
            elif name in projector:
                value = projector[name]
            else:
                raise self.missing(name)
            begun[name] = value.to(self.device)
        return begun

    def rest(self, has_checkpoint: bool) -> Tensors:
        """What no file needs to have; then the report is complete."""
        begun = self.begin_the_rest(has_checkpoint)
        yield from begun.items()
        lines = [self.report(file) for file in self.files]
        lines += closing_lines(self.model, len(begun), has_checkpoint)
        self.model.load_report = "\n".join(lines)

    def missing(self, name: str) -> ValueError:
        """The error about a tensor that no file holds: its name there, and where it belongs."""
        parts = PARTS_OF[name.split(".")[0]]
        files = [file for file in self.files if file.part in parts]
        theirs = official_name(name, has_lora=False).removeprefix("llama_model.")
        theirs = theirs.removeprefix("visual_encoder.")
        if files[0].part == CLIP:
            theirs = rename(theirs, CLIP_NAMES) or theirs
        shape, paths = tuple(self.expected[name].shape), " or ".join(str(f.path) for f in files)
        told = f"no file holds {name} (officially {theirs}), shape {shape}"
        return ValueError(f"{told}; it belongs in {paths}; {AGAIN}")

    def check_trained(self, checkpoint: WeightFile) -> None:
        """All that the stages train has to come from the checkpoint, not from a backbone; and a
        Q-Former comes from it as a whole or not at all.

        The first release of stage 4 trained the Q-Former, too, but not Phi's last norm.
        """
        brought = {name for name, path in self.source.items() if path == checkpoint.path}
        is_first = "qformer.query_tokens" in brought
        lacking = qformer_lacks(brought, self.expected)
        reason = "though it brings a Q-Former of its own"
        if not lacking:
            lacking = [name for name in self.expected if is_trainable(name) and name not in brought
                       and not (is_first and name == "phi.final_layernorm.weight")]  # fmt: skip
            reason = "which every stage trains"
        if lacking:
            theirs = official_name(lacking[0], has_lora=self.model.config.lora is not None)
            told = f"{checkpoint.path} lacks {lacking[0]} (officially {theirs}), {reason}"
            raise ValueError(f"{told}; {AGAIN}")


def new_norm(name: str, like: Tensor) -> Tensor:
    """A weight or bias of one of TinyGPT-V's norms, as training begins."""
    return torch.zeros(like.shape) if name.endswith(".bias") else torch.ones(like.shape)


def held_twice(name: str, one: Path, other: Path) -> ValueError:
    """The error about a tensor that is in two files."""
    return ValueError(f"{one} and {other} both hold {name}; move one of them elsewhere")


def files_by_name(files: list[WeightFile]) -> dict[str, WeightFile]:
    """The file that holds each tensor. Raises ValueError if two do."""
    file_of: dict[str, WeightFile] = {}
    for file in files:
        for name in file.tensors:
            if name in file_of:
                raise held_twice(name, file_of[name].path, file.path)
            file_of[name] = file
    return file_of


def taken_together(names: Iterable[str], part: str) -> list[list[str]]:
    """Names of tensors that are translated together: q, k and v of a layer, all others alone.
    (CLIP's layouts can only be told apart as a whole.)"""
    if part == CLIP:
        return [list(names)]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\.[qkv]_proj\.", ".qkv.", name), []).append(name)
    return list(groups.values())


def open_official(
    directory: str | Path, stage: int | None = None, device: str = "cpu",
    dtype: torch.dtype | None = None, copy: bool = True, config: ModelConfig | None = None,
) -> tuple[TinyGPTV, Tensors]:  # fmt: skip
    """TinyGPT-V from a folder with the official files, as `checkpoints.open_pretrained` returns it.
    `model.load_report` tells what came from where as soon as all tensors have come.

    stage: which checkpoint, by default the last there is; 0 for none. dtype: of all linear maps and
    embeddings that stay frozen, by default the device's half precision. config: other sizes than
    the official ones. Raises ValueError or FileNotFoundError, naming file and tensor, for what is
    missing, unexpected, of the wrong shape, or not finite.
    """
    parts = find_parts(Path(directory))
    checkpoint, stage = choose_checkpoint(parts.pop(CHECKPOINT, []), stage)
    with torch.device("meta"):
        model = TinyGPTV(config or full_config(parts, checkpoint, stage))
    set_dtype(model, dtype or half_dtype(device))
    model.backbones = Path(directory)
    model.tokenizer = read_tokenizer(parts[PHI][0].path.parent, model.config)
    return model, read_official(Filling(model, device, copy), parts, checkpoint)


def read_official(
    filling: Filling, parts: dict[str, list[WeightFile]], checkpoint: WeightFile | None
) -> Tensors:
    """The tensors of the checkpoint, of the other files, and what none of them has."""
    if checkpoint:
        yield from filling.take([checkpoint])
        filling.check_trained(checkpoint)
        filling.model.carried = {name for name in filling.source if not is_trainable(name)}
    for files in parts.values():
        yield from filling.take(files)
    yield from filling.rest(has_checkpoint=checkpoint is not None)


def read_backbones(
    model: TinyGPTV, device: str, own: dict[str, Tensor], copy: bool
) -> Tensors:
    """What the official files bring of a model whose checkpoint, trained here on top of them, has
    brought `own`. Sets the model's tokenizer."""
    parts = find_parts(model.backbones)
    parts.pop(CHECKPOINT, None)
    model.tokenizer = read_tokenizer(parts[PHI][0].path.parent, model.config)
    filling = Filling(model, device, copy)
    filling.source = dict.fromkeys(own, Path())
    for files in parts.values():
        yield from filling.take(files)
    yield from filling.rest(has_checkpoint=model.stage > 0)


def closing_lines(model: TinyGPTV, begun: int, has_checkpoint: bool) -> list[str]:
    """The end of the report: the total, and a warning where there is no checkpoint."""
    total = sum(parameter.numel() for parameter in model.parameters())
    rest = f"; {begun} tensors that no file has are as training begins" if begun else ""
    lines = [f"stage {model.stage}: {total:,} parameters, every one accounted for{rest}"]
    if not has_checkpoint:
        lines.append("without a checkpoint of TinyGPT-V this model talks nonsense until trained")
    return lines
