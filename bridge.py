"""The bridge from pictures to words: BLIP-2's Q-Former (arXiv 2301.12597) and two projections.

The ViT hands over hundreds of vectors, too many to read and in a language that the language model
does not speak. The Q-Former holds 32 learned queries: vectors that talk to each other by
self-attention and look at the picture by cross-attention. What they have gathered after the last
layer is all that the language model will ever know of the picture: 32 vectors, at any resolution.

The Q-Former is a BERT: post-norm, that is LayerNorm *after* each residual sum, and erf GELU. Only
the part that runs on queries is here; BLIP-2's text half is dropped by TinyGPT-V as well.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class QFormerConfig:
    """Sizes of the Q-Former; vision_hidden_size is the width of the ViT that it reads."""

    num_queries: int  # also the number of places that a picture takes in the prompt
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vision_hidden_size: int
    cross_attention_freq: int = 2  # layers 0, 2, 4, ... look at the picture
    layer_norm_eps: float = 1e-12


@dataclass
class ProjectorConfig:
    """Widths of the two projections: Q-Former -> what lies between -> Phi."""

    in_features: int
    mid_features: int  # 4096 because the first projection was MiniGPT-4's, made for Vicuna-7B
    out_features: int


QFORMER_PRESETS = {
    "full": QFormerConfig(num_queries=32, hidden_size=768, num_layers=12, num_heads=12,
                          intermediate_size=3072, vision_hidden_size=1408),
    "mini": QFormerConfig(num_queries=32, hidden_size=192, num_layers=4, num_heads=6,
                          intermediate_size=384, vision_hidden_size=192),
}  # fmt: skip

PROJECTOR_PRESETS = {
    "full": ProjectorConfig(in_features=768, mid_features=4096, out_features=2560),
    "mini": ProjectorConfig(in_features=192, mid_features=256, out_features=192),
}

# Our names -> those of BLIP-2's file; `{}` is the layer's number.
QFORMER_NAMES = {
    "query_tokens": "query_tokens",
    "ln_vision": "ln_vision",
    "norm": "Qformer.bert.embeddings.LayerNorm",
    "layers.{}.self_attn.query": "Qformer.bert.encoder.layer.{}.attention.self.query",
    "layers.{}.self_attn.key": "Qformer.bert.encoder.layer.{}.attention.self.key",
    "layers.{}.self_attn.value": "Qformer.bert.encoder.layer.{}.attention.self.value",
    "layers.{}.self_attn.dense": "Qformer.bert.encoder.layer.{}.attention.output.dense",
    "layers.{}.self_attn.norm": "Qformer.bert.encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.cross_attn.query": "Qformer.bert.encoder.layer.{}.crossattention.self.query",
    "layers.{}.cross_attn.key": "Qformer.bert.encoder.layer.{}.crossattention.self.key",
    "layers.{}.cross_attn.value": "Qformer.bert.encoder.layer.{}.crossattention.self.value",
    "layers.{}.cross_attn.dense": "Qformer.bert.encoder.layer.{}.crossattention.output.dense",
    "layers.{}.cross_attn.norm": "Qformer.bert.encoder.layer.{}.crossattention.output.LayerNorm",
    "layers.{}.mlp.fc1": "Qformer.bert.encoder.layer.{}.intermediate_query.dense",
    "layers.{}.mlp.fc2": "Qformer.bert.encoder.layer.{}.output_query.dense",
    "layers.{}.mlp.norm": "Qformer.bert.encoder.layer.{}.output_query.LayerNorm",
}
PROJECTOR_NAMES = {"fc1": "llama_proj", "fc2": "llama_proj2"}


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention written out; the readable twin of `F.scaled_dot_product_attention`.

    q (..., T, D), k and v (..., S, D), mask (..., T, S) True where q may look. Returns the result
    (..., T, D) and the attention map (..., T, S), each row of which sums to one: the fused call
    never has the map in memory, which is why it is fast and why pictures of it need this one.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    attention_map = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return attention_map @ v, attention_map


class Attention(nn.Module):
    """BERT attention with its residual and post-norm: self-attention when `context` is `x`,
    cross-attention when `context` is the picture."""

    def __init__(self, config: QFormerConfig, context_size: int):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(context_size, config.hidden_size)
        self.value = nn.Linear(context_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> (B, heads, T, head_dim)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """x (B, T, hidden_size), context (B, S, context_size) -> (B, T, hidden_size)."""
        q = self.split_heads(self.query(x))
        k = self.split_heads(self.key(context))
        v = self.split_heads(self.value(context))
        if maps is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y, attention_map = naive_attention(q, k, v)
            maps.append(attention_map)  # (B, heads, queries, tokens of the context)
        y = y.transpose(1, 2).flatten(2)  # (B, T, hidden_size)
        return self.norm(self.dense(y) + x)


class MLP(nn.Module):
    """BERT feed-forward with its residual and post-norm."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> the same."""
        return self.norm(self.fc2(F.gelu(self.fc1(x))) + x)


class Layer(nn.Module):
    """The queries talk to each other, look at the picture (every second layer), and think."""

    def __init__(self, config: QFormerConfig, sees_picture: bool):
        super().__init__()
        self.self_attn = Attention(config, context_size=config.hidden_size)
        self.cross_attn = Attention(config, config.vision_hidden_size) if sees_picture else None
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, image_features: Tensor, maps: list[Tensor] | None = None
    ) -> Tensor:
        """x (B, queries, hidden_size), image_features (B, N, vision_hidden_size) -> as x."""
        x = self.self_attn(x, context=x)
        if self.cross_attn is not None:
            x = self.cross_attn(x, context=image_features, maps=maps)
        return self.mlp(x)


class QFormer(nn.Module):
    """image_features (B, N, vision_hidden_size), raw from the ViT -> (B, num_queries, hidden_size).

    `maps`, if a list, receives the cross-attention maps (B, heads, num_queries, N), one for each
    layer that looks at the picture.
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.config = config
        # The ViT ends without a norm; BLIP-2 adds this one (torch's default eps, 1e-5).
        self.ln_vision = nn.LayerNorm(config.vision_hidden_size)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_queries, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            Layer(config, sees_picture=index % config.cross_attention_freq == 0)
            for index in range(config.num_layers)
        )

    def forward(self, image_features: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """As the class says."""
        image_features = self.ln_vision(image_features)
        x = self.norm(self.query_tokens)  # (1, queries, hidden_size)
        x = x.expand(len(image_features), -1, -1)
        for layer in self.layers:
            x = layer(x, image_features, maps)
        return x

    def init_weights(self) -> None:
        """Weights for training from scratch, as BERT's: normal of 0.02, biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)


class Projector(nn.Module):
    """Q-Former space -> language model space, (B, 32, 768) -> (B, 32, 2560).

    Two linear layers with nothing between them: as a map that is one matrix of rank 768 at most;
    as a history it is MiniGPT-4's projection to Vicuna and a new one from there to Phi-2.
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.in_features, config.mid_features)
        self.fc2 = nn.Linear(config.mid_features, config.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return self.fc2(self.fc1(x))
