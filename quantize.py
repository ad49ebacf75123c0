"""int8: the large matrices at one byte a weight, half of what bf16 takes.

To say one token, the language model reads all of its 2.6 billion weights and does two operations
with each. A processor calculates far faster than its memory delivers, so a token takes at least as
long as reading the weights does: what is half as large can be twice as fast. Prompts and pictures
multiply each weight with many rows at once. There arithmetic is the limit, and int8 gains less.

Read it from the leaves to the root:

    quantize_rows, dequantize    the idea: integers from -127 to 127, and one scale a row (symmetric
                                 absmax quantization per output channel)
    Int8Linear                   a linear layer that keeps such weights (weight-only quantization)
    as_bytes, PackedLinear       x as integers, too, one scale a token, for a CPU's int8
                                 instructions: VNNI, for vectors, or AMX, for matrices
    Int8Block, Int8VisionBlock   a layer of Phi, and of the ViT, around such products
    pack_phi, pack_vision        a quantized model made ready for them
    quantize_tensors, main       a model from file to file, tensor by tensor:

    python quantize.py --weights DIR --out DIR
"""

import json
import math
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoRALinear

# What is quantized: nearly all there is, the matrices of Phi and of the ViT's blocks. The rest is
# small or is looked up and not multiplied, and stays in 16 bits (embeddings, the Q-Former's linear
# layers, the patch projection) or fp32 (norms, positions, the projection, the biases of what is
# quantized).
QUANTIZED = re.compile(
    r"phi\.layers\.\d+\.self_attn\.(qkv|dense)"
    r"|phi\.layers\.\d+\.mlp\.fc[12]"
    r"|phi\.lm_head"
    r"|visual_encoder\.blocks\.\d+\.attn\.(qkv|proj)"
    r"|visual_encoder\.blocks\.\d+\.mlp\.fc[12]"
)
TINY = torch.finfo(torch.float32).tiny  # the least scale, so that nothing is 0 / 0


# ---- the idea ----
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> int8 (out, in) and fp32 scale (out,): weight is nearly int8 * scale.

    The largest weight of a row becomes 127 or -127 and all are rounded to integers. The scale is
    the step between two neighbours, so that no weight is off by more than scale / 2. A row of zeros
    stays one.
    """
    # Not torch.empty_like, which imports torch's compiler for a model on the meta device.
    quantized = weight.new_empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(len(weight), dtype=torch.float32)
    if weight.is_meta:  # of a model that has shapes but no memory yet
        return quantized, scales
    # Part by part: what is worked on stays in the processor's cache.
    parts = zip(weight.split(128), quantized.split(128), scales.split(128))
    for rows, numbers, scale in parts:
        rows = rows.float()
        scale.copy_(rows.abs().amax(dim=1) / 127).clamp_(min=TINY)
        numbers.copy_((rows / scale[:, None]).round_())
    return quantized, scales


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 (out, in) and scale (out,) -> fp32 (out, in)."""
    return weight * scale[:, None]


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ in bf16 for training around a frozen W. The backward pass needs W alone, so neither x
    nor a bf16 copy of W is kept. x (..., in), weight (out, in), scale (out,) -> (..., out)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return (x @ weight.bfloat16().T * scale).bfloat16()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return (grad * scale).bfloat16() @ weight.bfloat16(), None, None


class Int8Linear(nn.Module):
    """y = x Wᵀ + b, with W kept as int8 and one scale a row: what a quantized file holds."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def naive(self, x: Tensor) -> Tensor:
        """The definition: a whole matrix again, then an ordinary product."""
        y = F.linear(x, dequantize(self.weight, self.scale).to(x.dtype))
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The same with products in bf16; fp32 comes out, or bf16 while a gradient flows to x.
        Integers up to 127 are exact in bf16, so W is multiplied without its scale, and the result
        is scaled in fp32.

        On a CPU up to 16 rows of x go to torch's kernel for int8 weights, which is slow for more;
        those are multiplied by W turned to bf16, 1024 rows of W at a time, so that each copy is
        small.
        """
        if x.requires_grad and torch.is_grad_enabled():
            y = FrozenProduct.apply(x.bfloat16(), self.weight, self.scale)
            return y if self.bias is None else y + self.bias.bfloat16()
        rows = x.flatten(0, -2).bfloat16()
        on_cpu = x.device.type == "cpu"
        if on_cpu and len(rows) <= 16:
            ones = torch.ones_like(self.scale, dtype=torch.bfloat16)
            y = torch._weight_int8pack_mm(rows, self.weight, ones)
        else:
            parts = self.weight.split(1024 if on_cpu else len(self.weight))
            with torch.autocast(x.device.type, enabled=False):  # in fp16 sums could overflow
                y = torch.cat([rows @ part.bfloat16().T for part in parts], dim=1)
        y = y * self.scale if self.bias is None else torch.addcmul(self.bias, y, self.scale)
        return y.unflatten(0, x.shape[:-1])


def quantize_model(model: nn.Module) -> None:
    """Replaces, in place, every linear layer that QUANTIZED lists, one after the other. A layer
    with LoRA keeps its detour beside the int8 weights."""
    for name in [name for name, _ in model.named_modules() if QUANTIZED.fullmatch(name)]:
        linear = model.get_submodule(name)
        if isinstance(linear, LoRALinear):
            linear.int8, linear.weight, linear.bias = Int8Linear(linear), None, None
        else:
            model.set_submodule(name, Int8Linear(linear))


# ---- products of integers ----
# A CPU's int8 instructions multiply bytes and add the products up without any error; so x has to
# become bytes as well, with a scale for each token (dynamic quantization; the scale of x is called
# a step here, to tell it from that of W). One byte for a number is coarse: 127 steps up to the
# largest, and a product that is off by about one percent. Two bytes are finer than bf16, except for
# numbers a hundred times smaller than the largest. Each number is n steps, and an integer is
# n = 256 * high + low (1000 = 256 * 4 - 24), with both between -128 and 127; and so
#
#     W n = 256 * (W high) + (W low)
#
# These are two rows in place of one, but W, on which everything waits, is read once for both: when
# one token is decoded, the second byte is almost free.
LARGEST = {1: 127, 2: 127 * 256}  # what a row's largest number becomes; a byte ends at 127
LEAST_STEP = torch.tensor(TINY)  # so that a row of zeros is not 0 / 0
OFFSETS = {1: 2.0**23 + 128, 2: 2.0**23 + 128 * 256 + 128}  # see as_bytes


def as_bytes(rows: Tensor, step: Tensor, num_bytes: int) -> Tensor:
    """rows (n, in) of fp32 as integers, in steps (n, 1) -> uint8 (num_bytes * n, in), first the low
    bytes of all rows, then the high ones.

    128 is added to each byte, which makes it unsigned, and 2^23 to the whole: from there on
    neighbours in fp32 differ by one, so that the sum is rounded, and the lowest bytes of its 32
    bits, which come first in memory, are the integer that it was rounded to.
    """
    numbers = (rows / step).add_(OFFSETS[num_bytes])
    if num_bytes == 1:
        return numbers.view(torch.int32).to(torch.uint8)  # the lowest byte
    numbers = numbers.view(torch.uint8).unflatten(1, (-1, 4))  # (n, in, 4)
    return numbers[..., :2].movedim(-1, 0).flatten(0, 1)


def is_coarse(magnitudes: Tensor, step: Tensor) -> bool:
    """Whether in some row of magnitudes (n, in) rounding to its step (n, 1) has an RMS error,
    step / sqrt(12), above 4 % of the mean magnitude. It is about 1 % for normally distributed
    numbers; outliers raise it."""
    return bool((step / math.sqrt(12) > 0.04 * magnitudes.mean(dim=1, keepdim=True)).any())


def joined(tensors: list[Tensor], order: Tensor | None) -> Tensor:
    """Tensors as one, the rows of the first in that order; a single one without an order where it
    lies."""
    first = tensors[0].detach() if order is None else tensors[0][order]
    return torch.cat([first, *tensors[1:]]) if len(tensors) > 1 else first


class PackedLinear(nn.Module):
    """One or several linear layers of the same x as one product of integers: x is quantized, too.

    x (..., in) -> (..., out) in fp32. num_bytes: 1 or 2 for each number of x; every row of x has a
    step of its own, so that its largest number just fits. order: in which the rows of the first W
    are stored, if not as they are. Where one byte would be too coarse for some row, because a few
    numbers are much larger than the others, all rows take two. For CPUs only, and not to be moved,
    saved or trained: whole numbers have no gradient.

    VNNI wants W in another order, into which oneDNN packs it. With AMX, torch._int_mm takes W as it
    is, so that a single layer stays where it lies; several layers, or rows in another order, are
    copied.
    """

    def __init__(self, linears: list[Int8Linear], num_bytes: int, order: Tensor | None = None):
        super().__init__()
        biases = [torch.zeros_like(linear.scale) if linear.bias is None else linear.bias.float()
                  for linear in linears]  # fmt: skip
        self.weight = joined([linear.weight for linear in linears], order)
        self.scale = joined([linear.scale for linear in linears], order)
        self.bias = joined(biases, order)
        self.num_bytes = num_bytes
        self.has_amx = torch.cpu.get_capabilities().get("amx_int8", False)
        if not self.has_amx:
            self.zero_points = torch.zeros(len(self.weight), dtype=torch.int32)
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in fp32."""
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("packed layers have no gradient; load the model with pack=False")
        rows = x.flatten(0, -2).float()  # (n, in)
        magnitudes = rows.abs()
        largest = magnitudes.amax(dim=1, keepdim=True)  # (n, 1)
        num_bytes = self.num_bytes
        if num_bytes == 1 and is_coarse(magnitudes, largest / LARGEST[1]):
            num_bytes = 2
        step = torch.add(LEAST_STEP, largest, alpha=1 / LARGEST[num_bytes])
        y = self.multiply(as_bytes(rows, step, num_bytes), num_bytes)  # (num_bytes * n, out)
        if num_bytes == 2:
            y = torch.add(y[: len(rows)], y[len(rows) :], alpha=256)
        y = torch.addcmul(self.bias, y, step)
        return y.contiguous().unflatten(0, x.shape[:-1])  # it may lie transposed

    def multiply(self, numbers: Tensor, num_bytes: int) -> Tensor:
        """(num_bytes * n, in) of uint8, where 128 stands for 0 -> (num_bytes * n, out) in fp32."""
        if not self.has_amx:
            return torch.ops.onednn.qlinear_pointwise(
                numbers, 1.0, 128,  # x: scale, zero point
                self.weight, self.scale, self.zero_points, None,  # W: packed; no bias
                1.0, 0, torch.float32, "none", [], "",  # y: scale, zero point, type; nothing after
            )  # fmt: skip
        signed = (numbers ^ 128).view(torch.int8)  # to turn the highest bit over subtracts 128
        # W xᵀ is faster than x Wᵀ, but what comes out lies transposed and is turned in the end.
        # With two bytes that pays: they are joined before, so that half as much has to be turned.
        if num_bytes == 2:
            y = torch._int_mm(self.weight, signed.T).T
        else:
            y = torch._int_mm(signed, self.weight.T)
        return y * self.scale


@cache
def has_int8_unit() -> bool:
    """Whether this is an x86 CPU that multiplies bytes exactly. One without VNNI adds pairs of
    products up in 16 bits, where the largest do not fit: so the largest are tried, as one byte and
    as two, in few rows and in many."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    linear = nn.Linear(128, 64, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.full((64, 128), 127.0))
    try:
        layers = [PackedLinear([Int8Linear(linear)], num_bytes) for num_bytes in (1, 2)]
        found = [layer(torch.ones(rows, 128)) for layer in layers for rows in (1, 20)]
    except (RuntimeError, AttributeError):  # a torch that was built without oneDNN
        return False
    # The step is rounded, which is nothing; sums that did not fit are off by thousands.
    return all(((y - 127 * 128).abs() < 1).all() for y in found)


class Int8Block(nn.Module):
    """model.Block in integers: the same sum, in three products and few operations between them.
    Few, because the weights that stream through push everything else out of the processor's cache:
    each small operation takes several times as long as it would alone.

    Attention and MLP read the same x, so [q | k | v | fc1] are one product. q and k are normalised
    and rotated together, in place. The two channels that turn together lie side by side, as the
    real and the imaginary part of one number: of 8 channels that all turn, 0 4 1 5 2 6 3 7.
    """

    def __init__(self, block: nn.Module, rotary_dim: int):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.num_heads = attention.layer, attention.num_heads
        self.attend, self.rotary_dim = attention.attend, rotary_dim
        hidden_size = attention.dense.weight.shape[0]
        channels = torch.arange(hidden_size // self.num_heads)  # of one head
        turning, still = channels[:rotary_dim], channels[rotary_dim:]
        channels = torch.cat([turning.view(2, -1).T.flatten(), still])
        # of q and k, by head: (2 * heads, head_dim)
        heads = torch.arange(2 * hidden_size).view(2 * self.num_heads, -1)[:, channels]
        order = torch.cat([heads.flatten(), torch.arange(2 * hidden_size, 3 * hidden_size)])  # v
        self.qkv_fc1 = PackedLinear([attention.qkv, mlp.fc1], 2, order)
        self.qkv_fc1_sizes = [3 * hidden_size, len(mlp.fc1.weight)]
        self.dense, self.fc2 = PackedLinear([attention.dense], 2), PackedLinear([mlp.fc2], 2)
        self.input_layernorm, self.post_layernorm = block.input_layernorm, block.post_layernorm
        norms = attention.q_layernorm, attention.k_layernorm
        self.eps = norms[0].eps
        weights, biases = [n.weight[channels] for n in norms], [n.bias[channels] for n in norms]
        self.qk_weight = torch.stack(weights)[:, None, None, None]  # (2, 1, 1, 1, head_dim)
        self.qk_bias = torch.stack(biases)[:, None, None, None]

    def forward(
        self, x: Tensor, cos_sin: Tensor, mask: Tensor | None, cache: object = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """As model.Block; cache: a model.KVCache."""
        B, T, C = x.shape
        qkv, up = self.qkv_fc1(self.input_layernorm(x)).split(self.qkv_fc1_sizes, dim=-1)
        qkv = qkv.view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (3, B, heads, T, D)
        qk = F.layer_norm(qkv[:2], qkv.shape[-1:], eps=self.eps)  # (2, B, heads, T, D)
        qk = torch.addcmul(self.qk_bias, qk, self.qk_weight, out=qkv[:2])
        # complex: (2, B, heads, T, rotary_dim / 2) times (B, 1, T, rotary_dim / 2)
        turning = torch.view_as_complex(qk[..., : self.rotary_dim].unflatten(-1, (-1, 2)))
        turning.mul_(torch.view_as_complex(cos_sin))
        kv = qkv[1:] if cache is None else cache.update(self.layer, qkv[1:])
        y = self.attend(qkv[0], *kv, mask, maps).transpose(1, 2).reshape(B, T, C)
        attended = self.post_layernorm(self.dense(y))
        return x + attended + self.fc2(F.gelu(up, approximate="tanh"))


class Int8VisionBlock(nn.Module):
    """vision.Block by some 128 tokens at a time, so that what lies between two products stays in
    the cache; only attention needs all of them at once. Whether one byte is enough is decided for
    these tokens together. They may be of two pictures, so that beside others a picture's features
    can differ a little from those it has alone."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, hidden_size) -> the same."""
        attn, norm1 = self.block.attn, self.block.norm1
        rows = x.flatten(0, 1)  # (B * N, hidden_size)
        parts = max(1, len(rows) // 128)
        qkv = torch.cat([attn.project(norm1(part)) for part in rows.chunk(parts)])
        mixed = attn.mix(qkv.unflatten(0, x.shape[:2])).flatten(0, 1)
        done = map(self.finish, rows.chunk(parts), mixed.chunk(parts))
        return torch.cat(list(done)).view_as(x)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Tokens x (n, hidden_size) and what attention has found for them -> the same after both
        halves of the block."""
        x = x + self.block.attn.proj(mixed)
        return x + self.block.mlp(self.block.norm2(x))


def pack_phi(phi: nn.Module, release: Callable[[], None]) -> None:
    """Makes the products of a quantized Phi ready for int8 instructions, in place, with two bytes a
    number. release: called after each layer, by one of two threads, to give back the memory of
    its old form, so that no more than two layers are in memory twice."""
    phi.requires_grad_(False)
    if phi.config.qk_norm and phi.config.attn_norm:
        packed = partial(Int8Block, rotary_dim=phi.config.rotary_dim)
    else:  # Phi-2 without TinyGPT-V's norms, which Int8Block expects
        packed = partial(pack_layers, num_bytes=2)
    pack_each(phi.layers, packed, release)
    phi.lm_head = PackedLinear([phi.lm_head], 2)
    release()


def pack_vision(vit: nn.Module, release: Callable[[], None]) -> None:
    """The same for the ViT, with one byte a number wherever that is not too coarse."""
    vit.requires_grad_(False)
    pack_each(vit.blocks, lambda block: Int8VisionBlock(pack_layers(block, 1)), release)


def pack_each(
    blocks: nn.ModuleList, packed: Callable[[nn.Module], nn.Module], release: Callable[[], None]
) -> None:
    """Replaces each block by packed(block), two at a time: packing takes one thread only."""

    def pack(number: int) -> None:
        blocks[number] = packed(blocks[number])
        release()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(pack, range(len(blocks))))  # a list, so that an error is not lost


def pack_layers(block: nn.Module, num_bytes: int) -> nn.Module:
    """Replaces, in place, every Int8Linear below `block` by a PackedLinear; returns the block."""
    for name, layer in list(block.named_modules()):
        if isinstance(layer, Int8Linear):
            block.set_submodule(name, PackedLinear([layer], num_bytes))
    return block


# ---- from file to file ----
def quantize_tensors(
    tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a model as those of its quantized form: each matrix that QUANTIZED lists as
    int8 weight and scale, 512 rows at a time; all others unchanged."""
    for name, tensor in tensors:
        layer = name.removesuffix(".weight")
        if layer == name or not QUANTIZED.fullmatch(layer):
            yield name, tensor
            continue
        for rows in tensor.split(512):
            weight, scale = quantize_rows(rows)
            yield name, weight
            yield f"{layer}.scale", scale


SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int8: "I8"}


def write_tensors(
    path: Path, expected: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """A safetensors file of tensors that come one by one, a tensor perhaps in parts; the library's
    own writer wants them all at once.

    expected: all of them on the meta device, for the table of names, types, shapes and places at
    the beginning of the file. Raises ValueError unless each comes as a whole.
    """
    table, end = {}, 0  # the widest types come first, so that each tensor is aligned
    for name, like in sorted(expected.items(), key=lambda item: -item[1].element_size()):
        table[name] = {"dtype": SAFETENSORS_NAMES[like.dtype], "shape": list(like.shape),
                       "data_offsets": [end, end := end + like.nbytes]}  # fmt: skip
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # the format wants tensors to begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        written = {name: row["data_offsets"][0] for name, row in table.items()}
        for name, tensor in tensors:
            file.seek(first + written[name])
            numbers = tensor.to(expected[name].dtype).contiguous().flatten()
            written[name] += file.write(numbers.view(torch.uint8).numpy())
    missing = [name for name, row in table.items() if written[name] != row["data_offsets"][1]]
    if missing:
        raise ValueError(f"{len(missing)} tensors did not come as a whole, first {missing[0]}")


def quantize_directory(weights: Path, out: Path, stage: int | None) -> str:
    """Writes a quantized weights directory; returns a report of what was read and written. Matrices
    are read as fp16: most official files have them so, and for the Q-Former's that is enough."""
    # here, because that module is built on this one
    from official.checkpoints import open_quantized, replace_file, write_config

    if out.resolve().is_relative_to(weights.resolve()):
        raise ValueError(f"--out {out} lies in {weights}, where it would count as weights of it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not an empty folder; say one that is new")
    model, tensors = open_quantized(weights, stage)
    out.mkdir(parents=True, exist_ok=True)
    with replace_file(out / "model.safetensors") as path:
        write_tensors(path, model.state_dict(), tensors)
        for file in model.tokenizer.files:
            shutil.copy(file, out)
        write_config(model.config, out, backbones=".")
        size = path.stat().st_size
    written = f"{out}: stage {model.stage}, {size:,} bytes"
    return "\n".join(filter(None, [model.load_report, written]))


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    # here, so that the layers above need nothing but torch and lora.py
    from experiments.command_line import Parser, exit_code

    parser = Parser(description="Quantize TinyGPT-V to int8.", allow_abbrev=False)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--stage", type=int, help="the last by default")

    def work() -> None:
        given = parser.parse(arguments)
        print(quantize_directory(given.weights, given.out, given.stage))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
