"""LoRA (arXiv 2106.09685): fine-tune a large linear layer through a small detour.

                 x
         ┌───────┴────────┐
         │                │ dropout
     W (frozen)       A: in -> r        a few directions to read
         │                │
         │            B: r -> out       a few directions to write, starts at zero
         │                │ x alpha / r
         └───────(+)──────┘
                 y = W x + b + (alpha / r) B A dropout(x)

W stays as it was; only A and B learn. Because B starts at zero, the model begins exactly where the
pre-trained one ended. Afterwards the detour can be folded into W and costs nothing.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class LoRAConfig:
    """Sizes of a LoRA detour."""

    r: int  # rank of the detour
    alpha: int  # the detour is scaled by alpha / r
    dropout: float = 0.05


LORA_PRESETS = {
    "full": LoRAConfig(r=64, alpha=16),
    "mini": LoRAConfig(r=8, alpha=2),
}

# What TinyGPT-V adapts: in each Phi layer the fused q|k|v projection and the attention's output.
TARGETS = ("qkv", "dense")


class LoRALinear(nn.Linear):
    """A LoRA detour around a linear layer, whose pre-trained weight and bias it shares."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device  # perhaps "meta"
        self.lora_A = nn.Linear(self.in_features, config.r, bias=False, device=device)
        self.lora_B = nn.Linear(config.r, self.out_features, bias=False, device=device)
        self.lora_dropout = nn.Dropout(config.dropout)
        self.scaling = config.alpha / config.r
        self.int8: nn.Module | None = None  # quantize.py's layer for weight and bias, if any
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        detour = self.lora_B(self.lora_A(self.lora_dropout(x)))
        frozen = super().forward(x) if self.int8 is None else self.int8(x)
        return frozen + self.scaling * detour

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain linear layer with W + (alpha / r) B A in place of W. Not if quantized."""
        weight = merge(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(weight.to(self.weight.dtype))
        linear.bias = self.bias
        return linear


def merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A in fp32: weight (out, in), lora_A (r, in), lora_B (out, r)."""
    merged = weight.to(torch.float32, copy=True)
    return merged.addmm_(lora_B.float(), lora_A.float(), alpha=scaling)


def merge_tensors(
    tensors: Iterable[tuple[str, Tensor]], config: LoRAConfig
) -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a model with LoRA -> those of the same model merged, one by one. A and B of
    a layer have to come before its weight, and the weight in one part. Raises ValueError for an A
    or B without the other, or without a weight after it."""
    lora: dict[str, Tensor] = {}
    for name, tensor in tensors:
        layer = name.removesuffix(".weight")
        pair = [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
        if ".lora_" in name:
            lora[name] = tensor
        elif all(part in lora for part in pair):
            yield name, merge(tensor, *map(lora.pop, pair), config.alpha / config.r)
        else:
            yield name, tensor
    if lora:
        raise ValueError(f"{next(iter(lora))} came without its partner, or after its weight")


def add_lora(module: nn.Module, config: LoRAConfig) -> None:
    """Replaces, in place, every linear layer below `module` whose name is in TARGETS."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS and type(child) is nn.Linear:
                setattr(parent, name, LoRALinear(child, config))


def merge_lora(module: nn.Module) -> None:
    """Folds, in place, every LoRA detour below `module` into its weight."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
