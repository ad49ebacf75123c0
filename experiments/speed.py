"""How fast int8 is at the official size: decoding, prefill, pictures, and how long a start takes.

    python experiments/speed.py                     random weights, 20 GB of memory, 10 minutes
    python experiments/speed.py layers=2 rounds=1   a look in a minute
    python experiments/speed.py weights=DIR         ... and starts from DIR, made by quantize.py
    python experiments/speed.py peer=llama.cpp      ... and llama-cpp-python beside it, if installed

Speed depends on the machine and, where others share its memory, on the minute. So all variants are
in memory at once and take turns, each figure is the median of its turns, and before and after every
decoding the speed of reading memory is measured, which is about its limit.
"""

import math
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import vision
from data import inference_prompt, load_image
from experiments.command_line import report
from experiments.peers import LlamaCpp, write_gguf
from generate import encode_images, generate_ids, prepare
from model import ModelConfig, TinyGPTV, set_dtype
from official.checkpoints import keep_freed_memory
from quantize import Int8Linear, pack_phi, pack_vision, quantize_model

RESULT = ROOT / "experiments" / "results" / "speed.json"
PROMPT, NEW_TOKENS, CAPTION_TOKENS = 64, 8, 25  # a caption of 20 words has about 25 tokens


@dataclass
class Config:
    """What is measured; options as key=value."""

    layers: int = 0  # of Phi and of the ViT; 0: all
    rounds: int = 5
    weights: str = ""  # a folder that quantize.py has written at full size
    peer: str = ""  # llama.cpp


# ---- models ----
def random_model(layers: int) -> TinyGPTV:
    """The official sizes with random weights, matrices in bf16, without LoRA."""
    config = replace(ModelConfig.preset("full", stage=4), lora=None)
    if layers:
        config.phi = replace(config.phi, num_layers=layers)
        config.vision = replace(config.vision, num_layers=layers)
    with torch.device("meta"):
        model = TinyGPTV(config)
    set_dtype(model, torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.02)
    return model.eval().requires_grad_(False)


def int8_copy(model: TinyGPTV) -> TinyGPTV:
    """A quantized copy, not packed; it shares all that is not quantized."""
    with torch.device("meta"):
        copy = TinyGPTV(model.config)
    copy.load_state_dict(model.state_dict(), assign=True)
    quantize_model(copy)
    copy.config = replace(copy.config, int8=True)
    return copy.eval().requires_grad_(False)


def packed_copy(int8: TinyGPTV) -> TinyGPTV:
    """The same model, ready for the CPU's int8 instructions."""
    with torch.device("meta"):
        copy = TinyGPTV(int8.config)
    copy.load_state_dict(int8.state_dict(), assign=True)
    pack_phi(copy.phi, release=lambda: None)
    pack_vision(copy.visual_encoder, release=lambda: None)
    return copy.eval()


def decoded_bytes(int8: TinyGPTV) -> int:
    """What a token reads of a quantized model: all int8 weights of Phi."""
    layers = (module for module in int8.phi.modules() if isinstance(module, Int8Linear))
    return sum(layer.weight.nbytes for layer in layers)


@contextmanager
def naive(model: TinyGPTV) -> Iterator[None]:
    """Int8Linear by its definition: dequantize, then multiply."""
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    for layer in layers:
        layer.forward = layer.naive
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def fused_attention() -> Iterator[None]:
    """The ViT as modules are usually written, with torch's fused attention."""
    ours, vision.attend = vision.attend, F.scaled_dot_product_attention
    try:
        yield
    finally:
        vision.attend = ours


# ---- turns ----
def bandwidth(probe: Tensor) -> float:
    """GB/s of reading memory, with all threads."""
    began = time.perf_counter()
    probe.sum()
    return probe.nbytes / (time.perf_counter() - began) / 1e9


def generation(model: TinyGPTV, new_tokens: int) -> dict[str, float]:
    """Seconds of the prompt, and of each token after it."""
    inputs_embeds = torch.randn(1, PROMPT, model.config.phi.hidden_size)
    mask = torch.ones(1, PROMPT, dtype=torch.long)
    ticks = [time.perf_counter()]
    for _ in generate_ids(model.phi, inputs_embeds, mask, new_tokens + 1):
        ticks.append(time.perf_counter())
    steps = [after - before for before, after in zip(ticks[1:], ticks[2:])]
    return {"prefill": ticks[1] - ticks[0], "token": statistics.median(steps)}


@torch.inference_mode()
def picture(model: TinyGPTV, size: int) -> dict[str, float]:
    """Seconds from pixels to the vectors that Phi reads."""
    pixel_values = torch.randn(1, 3, size, size)
    began = time.perf_counter()
    model.encode_images(pixel_values)
    return {f"picture_{size}": time.perf_counter() - began}


def answering(model: TinyGPTV) -> dict[str, float]:
    """Pictures, and the seconds from one of 224 px to a caption of 20 words."""
    found = picture(model, 224) | picture(model, 448)
    began = time.perf_counter()
    picture(model, 224)
    generation(model, CAPTION_TOKENS - 1)
    return found | {"caption": time.perf_counter() - began}


def take_turns(
    turns: dict[str, Callable[[], dict]], rounds: int, probe: Tensor
) -> dict[str, dict]:
    """Medians over the rounds of what each variant's turn returns, and of the bandwidth beside it.
    The first round warms up and is not counted."""
    seen: dict[str, list[dict]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            before, found = bandwidth(probe), turn()
            found["bandwidth"] = (before + bandwidth(probe)) / 2
            if number:
                seen[name].append(found)
            print(f"round {number} {name}: {rounded(found)}", file=sys.stderr)
    return {
        name: {key: statistics.median(found[key] for found in rows) for key in rows[0]}
        for name, rows in seen.items()
    }


def decoding(turn: Callable[[], dict], num_bytes: int, probe: Tensor) -> dict[str, float]:
    """A turn of decoding alone and its share of the bandwidth right before and after."""
    before, found = bandwidth(probe), turn()
    around = (before + bandwidth(probe)) / 2
    return found | {"share": num_bytes / found["token"] / 1e9 / around}


def measure(config: Config) -> dict:
    """All variants of the model at full size, taking turns; random weights."""
    keep_freed_memory()  # as loading from files does
    bf16 = random_model(config.layers)
    int8 = int8_copy(bf16)
    packed = packed_copy(int8)
    num_bytes = decoded_bytes(int8)
    probe = torch.ones(2**25, dtype=torch.int64)  # 268 MB, more than any cache

    def plain() -> dict[str, float]:
        with fused_attention():
            return picture(bf16, 224) | picture(bf16, 448)

    def twin() -> dict[str, float]:
        with naive(int8):
            return decoding(lambda: generation(int8, 1), num_bytes, probe)

    turns = {
        "int8": lambda: answering(packed)
        | decoding(lambda: generation(packed, NEW_TOKENS), num_bytes, probe),
        "int8 as it lies": lambda: picture(int8, 224)
        | decoding(lambda: generation(int8, NEW_TOKENS), num_bytes, probe),
        "dequantize, then multiply": twin,
        "bf16": lambda: answering(bf16)
        | decoding(lambda: generation(bf16, NEW_TOKENS), 2 * num_bytes, probe),
        "bf16, fused attention": plain,
    }
    with tempfile.TemporaryDirectory(prefix="speed_") as folder:
        if config.peer:
            write_gguf(Path(folder) / "phi2.gguf", bf16.config.phi)
            peer = LlamaCpp(Path(folder) / "phi2.gguf", torch.get_num_threads())
            turns["llama.cpp Q8_0"] = lambda: decoding(
                lambda: peer.generation(PROMPT, NEW_TOKENS), num_bytes * 34 // 32, probe
            )
        variants = take_turns(turns, config.rounds, probe)
        if config.peer:
            peer.close()
    return {"gb_a_token": num_bytes / 1e9, "activation_error": activation_error(int8, packed),
            "variants": variants, "ratios": ratios(variants)}  # fmt: skip


def ratios(variants: dict[str, dict]) -> dict[str, float]:
    """How many times as fast int8 is as each of the others in what both do."""
    ours = variants["int8"]
    return {
        f"{key}, {name}": row[key] / ours[key]
        for name, row in variants.items() if name != "int8"
        for key in row if key in ours and key not in ("share", "bandwidth")
    }  # fmt: skip


@torch.inference_mode()
def activation_error(int8: TinyGPTV, packed: TinyGPTV) -> float:
    """How far what Phi's first layer adds is off because activations become bytes, relative to the
    same int8 weights with activations in fp32."""
    torch.manual_seed(0)
    x = torch.randn(1, PROMPT, int8.config.phi.hidden_size)
    cos_sin = torch.ones(1, 1, PROMPT, packed.phi.layers[0].rotary_dim // 2, 2) / math.sqrt(2)
    with naive(int8):
        right = int8.phi.layers[0](x, cos_sin, None)
    found = packed.phi.layers[0](x, cos_sin, None)
    return float((found - right).norm() / (right - x).norm())


# ---- starts ----
def start(weights: str, pack: bool) -> float:
    """Seconds from the files to the first token about a picture of 224 px, imports aside."""
    image, began = load_image(ROOT / "assets" / "shapes.png"), time.perf_counter()
    model = TinyGPTV.from_pretrained(weights, pack=pack)
    model.config.stage = 3  # 224 px
    prompts = [inference_prompt("caption", "", 3)]
    batch = prepare(model, encode_images(model, [image]), [1], prompts)
    next(generate_ids(model.phi, *batch, 1))
    return time.perf_counter() - began


def starts(weights: str) -> dict[str, float]:
    """Medians of three starts in new processes, after one that fills the system's cache."""
    found = {}
    for name, pack in (("as it lies", False), ("packed", True)):
        seconds = []
        for _ in range(4):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds.append(pool.apply(start, [weights, pack]))
        found[name] = statistics.median(seconds[1:])
    return found


def rounded(value: object) -> object:
    """To four digits, which is more than repeats."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cpu_name() -> str:
    """The CPU's name and those of its units that matter here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = re.search(r"model name\s*: (.+)", text)
    known = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    units = [unit for unit in known if unit in text]
    return f"{name[1] if name else platform.processor()}, {', '.join(units) or 'no int8'}"


def measure_all(config: Config) -> dict:
    """All that README shows. Raises ValueError for another peer than there is."""
    if config.peer not in ("", "llama.cpp"):
        raise ValueError(f"peer={config.peer} is not known; the one there is: llama.cpp")
    if config.peer and not LlamaCpp.is_installed():
        print("peer=llama.cpp is left out: llama-cpp-python is not installed", file=sys.stderr)
        config.peer = ""
    result = {"layers": config.layers or "all", "rounds": config.rounds, "cpu": cpu_name(),
              "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip
    if config.weights:
        result["first_token"] = starts(config.weights)
    return rounded(result | measure(config))


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return report(arguments, Config, measure_all, RESULT, places=("weights", "peer"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
