"""The first half of the miniature's projection: see pretrain.py.

TinyGPT-V does not begin its projection from nothing: the first of the two linear maps comes from
MiniGPT-4, where it had learned to lead from the Q-Former to another language model, Vicuna (paper,
section 3.1). The miniature has no Vicuna; it takes over what matters of that history, a map whose
output is easy to learn from. Queries vary ten thousand times more in some directions than in
others, and gradient descent hardly sees what lies in the weak ones, here most of what tells where
objects are. This map gives all directions the same strength.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from bridge import PROJECTOR_PRESETS, QFORMER_PRESETS, Projector, QFormer
from miniature.pretrain_vision import vision_batch
from miniature.steps import save_half
from vision import VISION_PRESETS, EvaViT

FIRST_SEED = 5 * 10**8  # stream.py's numbers for captions in stage 3, which has none
WEAKEST = 0.02  # variance; what varies less is taken for noise and not strengthened to the full


def whitening(x: Tensor) -> tuple[Tensor, Tensor]:
    """W (features, features) and b for which W x + b has mean 0, and variance 1 in all directions
    but the weakest. x: (n, features)."""
    mean = x.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((x - mean).T))
    strengths = (variances.clamp(min=0) + WEAKEST).rsqrt()
    weight = directions * strengths @ directions.T
    return weight, -weight @ mean


@torch.no_grad()
def pretrain_projection(out: Path, num_scenes: int = 1600, batch_size: int = 40) -> None:
    """From the queries of so many scenes, half of them at doubled resolution; writes
    projection.safetensors."""
    torch.manual_seed(0)
    vit, qformer = EvaViT(VISION_PRESETS["mini"]), QFormer(QFORMER_PRESETS["mini"])
    for module, name in ((vit, "vision"), (qformer, "qformer")):
        tensors = load_file(out / f"{name}.safetensors")
        module.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    queries = []
    for first in tqdm(range(0, num_scenes, batch_size), desc="projection"):
        size = vit.config.image_size * (1 + first // batch_size % 2)
        seeds = range(FIRST_SEED + first, FIRST_SEED + first + batch_size)
        queries.append(qformer(vit(vision_batch("train", seeds, size)["pixel_values"])))
    weight, bias = whitening(torch.cat(queries).flatten(0, 1))
    fc1 = Projector(PROJECTOR_PRESETS["mini"]).fc1
    turned = torch.randn(fc1.weight.shape) / len(weight) ** 0.5  # into as many features as it has
    fc1.weight.data, fc1.bias.data = turned @ weight, turned @ bias
    save_half(torch.nn.ModuleDict({"fc1": fc1}), out / "projection.safetensors")
