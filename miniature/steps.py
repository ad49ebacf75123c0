"""What the two long runs of pre-training share: AdamW, its learning rate, saving; and a lock."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from official.checkpoints import lock, replace_file
from train import optimizer_groups


def warmup_cosine(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def adamw(modules: list[nn.Module], weight_decay: float = 0.05) -> torch.optim.AdamW:
    """AdamW with weight decay on all but norms and biases."""
    groups = optimizer_groups(nn.ModuleList(modules), weight_decay)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def save_half(module: nn.Module, path: Path) -> None:
    """Writes the module in fp16, in half the bytes: all of it, or the old file stays. Raises
    OSError."""
    tensors = {name: tensor.half() for name, tensor in module.state_dict().items()}
    with replace_file(path) as temporary:
        save_file(tensors, temporary)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within, no other process makes what this lock file stands for. Raises ValueError if one
    does so already."""
    with open(path, "w") as file:
        lock(file, f"{path}: another process makes this part; wait for it")
        try:
            yield
        finally:
            path.unlink()


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One step of AdamW at this learning rate, the gradient clipped to a norm of 1. Raises
    RuntimeError if it is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    optimizer.step()
