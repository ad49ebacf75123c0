"""What fp16 does to a training step: numbers too large for it, and gradients too small.

The paper's failures are of fp16, whose largest number is 65,504 and whose smallest 6e-8. Here the
same batch goes through the model once in fp32 and twice in fp16 (weights, products, scores,
activations and their gradients; norms and what is trained stay in fp32, as in the official code):
without a loss scale, and with the first that torch's GradScaler tries.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridge import naive_attention
from experiments.encoded_scenes import on_queries
from model import TinyGPTV, autocast, set_dtype

LOSS_SCALE = 2.0**16


@dataclass
class Pass:
    """What a forward and a backward pass gave."""

    loss: float
    gradient: Tensor  # of what all variants of the model train, LoRA left out, in one row
    activation: float  # the largest number that one of Phi's linear maps gave
    score: float  # the largest q·k, before it is divided by the root of head_dim

    @property
    def is_finite(self) -> bool:
        """Whether the loss and all of the gradient are."""
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all())


def passes(model: TinyGPTV, batch: dict, dtype: torch.dtype, loss_scale: float = 1.0) -> Pass:
    """A batch there and back through a copy of the model with its frozen weights in dtype."""
    twin = copy.deepcopy(model).eval()
    set_dtype(twin, dtype)
    activations, scores = [], []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, maps: None) -> Tensor:
        scores.append((q.detach().float() @ k.detach().float().mT).abs().max())
        return naive_attention(q, k, v, mask)[0]  # scores in dtype, as the official code has them

    for block in twin.phi.layers:
        block.self_attn.attend = attend
    for module in twin.phi.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output: activations.append(output.detach().abs().max())
            )
    with on_queries(twin):
        with autocast(twin.phi.embed_tokens.weight):
            loss = twin(**batch)
        (loss * loss_scale).backward()
    gradient = torch.cat([p.grad.flatten() for name, p in twin.named_parameters()
                          if p.grad is not None and ".lora_" not in name])  # fmt: skip
    return Pass(loss.item(), gradient / loss_scale, *(
        torch.stack(seen).float().max().item() for seen in (activations, scores)
    ))  # fmt: skip


def in_fp16(model: TinyGPTV, batches: list[dict]) -> dict:
    """not_finite: the share of batches whose loss or gradient is not finite without a loss scale;
    lost, lost_scaled: in the others the share of the gradient's elements that are zero and not so
    in fp32; activation, score: the largest in fp32. None where there is nothing finite."""
    truths = [passes(model, batch, torch.float32) for batch in batches]
    plain = [passes(model, batch, torch.float16) for batch in batches]
    scaled = [passes(model, batch, torch.float16, LOSS_SCALE) for batch in batches]
    return {
        "not_finite": sum(not half.is_finite for half in plain) / len(batches),
        "lost": share_lost(truths, plain), "lost_scaled": share_lost(truths, scaled),
        "activation": finite(max(truth.activation for truth in truths)),
        "score": finite(max(truth.score for truth in truths)),
    }  # fmt: skip


def share_lost(truths: list[Pass], halves: list[Pass]) -> float | None:
    """Of the elements of the finite gradients that are not zero in fp32, those that are in fp16."""
    lost = elements = 0
    for truth, half in zip(truths, halves):
        if half.is_finite:
            lost += int(((half.gradient == 0) & (truth.gradient != 0)).sum())
            elements += int((truth.gradient != 0).sum())
    return lost / elements if elements else None


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
