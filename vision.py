"""The eye: EVA-CLIP ViT-g/14 (arXiv 2211.07636), as BLIP-2 and TinyGPT-V use it.

A picture of S x S pixels is cut into patches of 14 x 14. Each patch becomes one vector, a learned
position is added, and a stack of pre-norm transformer blocks lets the patches look at each other.
Three things set this ViT apart from the textbook one:

  - the key has no bias: softmax over keys cannot see a term that is the same for every key;
  - there is no final norm and no head, all tokens are handed on, the class token included;
  - a larger picture than it was trained on gets its positions by bicubic interpolation.

Parameter names equal those of the official file `eva_vit_g.pth`, so no renaming is needed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class VisionConfig:
    """Sizes of a ViT."""

    image_size: int  # the size whose position grid is stored, in pixels; others are interpolated
    patch_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    layer_norm_eps: float = 1e-6
    clip: bool = False  # CLIP's ViT in place of EVA's


# The official files have one layer more (EVA's 40, CLIP's 24); BLIP-2 reads the input of the last.
VISION_PRESETS = {
    "full": VisionConfig(image_size=224, patch_size=14, hidden_size=1408, num_layers=39,
                         num_heads=16, intermediate_size=6144),
    "mini": VisionConfig(image_size=112, patch_size=14, hidden_size=192, num_layers=5,
                         num_heads=6, intermediate_size=640),
    "clip": VisionConfig(image_size=224, patch_size=14, hidden_size=1024, num_layers=23,
                         num_heads=16, intermediate_size=4096, layer_norm_eps=1e-5, clip=True),
}  # fmt: skip


class PatchEmbed(nn.Module):
    """Cuts the picture into patches and maps each to one vector.

    The official file has this as a convolution whose stride is its kernel size; that is exactly a
    linear layer on the numbers of every patch. Computed as one, it also avoids the memory that
    torch's convolution takes in bf16 on some CPUs."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(3, config.hidden_size, patch, stride=patch, bias=not config.clip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, S, S) -> (B, N, hidden_size), row by row."""
        patch = self.proj.kernel_size[0]
        x = pixel_values.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        x = x.permute(0, 2, 4, 1, 3, 5)  # (B, 3, rows, 14, columns, 14) -> by patch, 3 x 14 x 14
        x = x.flatten(3).flatten(1, 2)  # (B, N, 588)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v, each (B, heads, N, head_dim).

    In bf16 on a CPU the mean of all keys is subtracted first, which softmax cannot see. Small
    numbers lose less by rounding: of the keys, where they come in fp32, and of the scores, which
    plain products round to bf16. On a CPU without AMX, a unit for matrices of bf16, torch's fused
    call is slow at EVA's head_dim of 88, so two heads at a time are multiplied plainly. On other
    devices, in fp32 and while gradients are recorded, as in training, it is the fused call alone.
    """
    half = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if q.device.type != "cpu" or not half or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    k = k - k.mean(dim=2, keepdim=True)
    if torch.cpu.get_capabilities().get("amx_bf16", False):
        return F.scaled_dot_product_attention(q, k, v)
    k = k / math.sqrt(q.shape[-1])
    q, k, v = (x.bfloat16().split(2, dim=1) for x in (q, k, v))
    return torch.cat([(a @ b.mT).softmax(dim=-1) @ c for a, b, c in zip(q, k, v)], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention without a mask: every patch sees every patch. `project` and `mix`
    are apart because quantize.Int8VisionBlock runs the first on some tokens, the second on all."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(hidden_size))
        self.k_bias = nn.Parameter(torch.zeros(hidden_size)) if config.clip else None
        self.v_bias = nn.Parameter(torch.zeros(hidden_size))
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., 3 * hidden_size): q, k and v of each token."""
        k_bias = torch.zeros_like(self.q_bias) if self.k_bias is None else self.k_bias
        bias = torch.cat([self.q_bias, k_bias, self.v_bias])
        if isinstance(self.qkv, nn.Linear):
            return F.linear(x, self.qkv.weight, bias.to(self.qkv.weight.dtype))
        return self.qkv(x) + bias  # quantized

    def mix(self, qkv: Tensor) -> Tensor:
        """(B, N, 3 * hidden_size) -> (B, N, hidden_size): what each token finds in the others."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).flatten(2)  # from (B, heads, N, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, hidden_size) -> the same."""
        return self.proj(self.mix(self.project(x)))


class MLP(nn.Module):
    """Two linear layers around the exact (erf) GELU, or around CLIP's quick approximation."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.quick_gelu = config.clip
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, hidden_size) -> the same."""
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class Block(nn.Module):
    """Pre-norm block: each half reads a normalised copy and adds what it found."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, hidden_size) -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def interpolate_pos_embed(pos_embed: Tensor, grid: int, align_corners: bool = False) -> Tensor:
    """Stretches learned positions (1, 1 + g*g, C) to a grid of another side: (1, 1 + grid*grid, C).

    The patch positions are a g x g picture with C channels and are resized like one (bicubic,
    in fp32); the class token's row has no place in it and is copied. The paper speaks of relative
    position bias at 448 px; the official code does this instead, and so do we. align_corners: the
    outermost positions stay the outermost, as CLIP's loader has it and EVA's has not.
    """
    cls_pos, patch_pos = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patch_pos.shape[1])
    if side == grid:
        return pos_embed
    picture = patch_pos.float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (1, C, g, g)
    picture = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=align_corners)
    patch_pos = picture.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, grid*grid, C)
    return torch.cat([cls_pos, patch_pos], dim=1)


class EvaViT(nn.Module):
    """pixel_values (B, 3, S, S), normalised -> (B, 1 + (S/14)^2, C), the class token first.

    With config.clip it is CLIP's ViT-L/14 (arXiv 2103.00020), the other eye that BLIP-2 was trained
    with. That one differs in small things: patches have no bias, but keys have; a norm comes before
    the first block; GELU is approximated; corners stay aligned when positions are stretched.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        num_patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_patches, config.hidden_size))
        self.ln_pre = nn.Identity()
        if config.clip:
            self.ln_pre = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (B, 3, S, S) -> (B, 1 + N, hidden_size): class token and patches with their
        positions. Raises ValueError unless S x S is square and whole patches."""
        B, _, height, width = pixel_values.shape
        patch = self.config.patch_size
        if height != width or height % patch:
            raise ValueError(
                f"pixel_values are {height} x {width}; the ViT takes square pictures whose side is "
                f"a multiple of {patch}"
            )
        x = self.patch_embed(pixel_values)  # (B, N, C)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)  # (B, 1 + N, C)
        return x + interpolate_pos_embed(self.pos_embed, height // patch, self.config.clip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """As the class says. Raises ValueError for a picture that is not square and whole
        patches."""
        x = self.ln_pre(self.embed(pixel_values))
        for block in self.blocks:
            x = block(x)
        return x

    def init_weights(self) -> None:
        """Weights for training from scratch: truncated normal, the official 0.02 at width 1408, and
        what is written to the residual stream shrinks with the depth of the block."""
        std = 0.02 * math.sqrt(1408 / self.config.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.trunc_normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for depth, block in enumerate(self.blocks, start=1):
            block.attn.proj.weight.data.div_(math.sqrt(2.0 * depth))
            block.mlp.fc2.weight.data.div_(math.sqrt(2.0 * depth))


# Our names of CLIP's ViT -> those of `clip_vit_L.pth`, and -> Hugging Face's; `{}` is the block.
# "in_proj" is q, k and v in one, as official/weights.py makes it of what the files have.
CLIP_NAMES = {
    "cls_token": "class_embedding",
    "pos_embed": "positional_embedding",
    "patch_embed.proj": "conv1",
    "ln_pre": "ln_pre",
    "blocks.{}.norm1": "transformer.resblocks.{}.ln_1",
    "blocks.{}.attn.qkv": "transformer.resblocks.{}.attn.in_proj",
    "blocks.{}.attn.proj": "transformer.resblocks.{}.attn.out_proj",
    "blocks.{}.norm2": "transformer.resblocks.{}.ln_2",
    "blocks.{}.mlp.fc1": "transformer.resblocks.{}.mlp.c_fc",
    "blocks.{}.mlp.fc2": "transformer.resblocks.{}.mlp.c_proj",
}
CLIP_HF_NAMES = {
    "cls_token": "vision_model.embeddings.class_embedding",
    "pos_embed": "vision_model.embeddings.position_embedding.weight",
    "patch_embed.proj": "vision_model.embeddings.patch_embedding",
    "ln_pre": "vision_model.pre_layrnorm",
    "blocks.{}.norm1": "vision_model.encoder.layers.{}.layer_norm1",
    "blocks.{}.attn.qkv": "vision_model.encoder.layers.{}.self_attn.in_proj",
    "blocks.{}.attn.proj": "vision_model.encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "vision_model.encoder.layers.{}.layer_norm2",
    "blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "vision_model.encoder.layers.{}.mlp.fc2",
}
