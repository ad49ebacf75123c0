"""TinyGPT-V (arXiv 2312.16862): a picture and a prompt go in, logits for the next token come out.

Read it from the leaves to the root:

    rotary embedding, RMSNorm          two small ideas
    KVCache                            what decoding remembers
    Attention, MLP, Block, Phi         the language model, Phi-2 with TinyGPT-V's extra norms
    TinyGPTV                           ViT -> Q-Former -> projection -> Phi
    loading, saving                    strict: every tensor accounted for, or an error that names it

Phi-2 differs from most language models in that attention and MLP run side by side on the same
normalised input. TinyGPT-V adds three norms to keep a small model stable when pictures arrive:
LayerNorm on queries and keys, and RMSNorm on what attention returns.
"""

import ctypes
import json
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bridge import (
    PROJECTOR_PRESETS,
    QFORMER_PRESETS,
    Projector,
    ProjectorConfig,
    QFormer,
    QFormerConfig,
    naive_attention,
)
from data import IMAGE_TOKEN_ID, Tokenizer, printable
from lora import LORA_PRESETS, LoRAConfig, add_lora, merge_tensors
from quantize import has_int8_unit, pack_phi, pack_vision, quantize_model, quantize_tensors
from vision import VISION_PRESETS, EvaViT, VisionConfig

Tensors = Iterator[tuple[str, Tensor]]  # names and tensors, one after the other


@dataclass
class PhiConfig:
    """Sizes of Phi, and which of TinyGPT-V's norms it has."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 2048
    partial_rotary_factor: float = 0.4  # the share of each head that rotates
    rope_theta: float = 10000.0
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-6
    resid_dropout: float = 0.1
    qk_norm: bool = True  # False: without TinyGPT-V's norm on q and k
    attn_norm: bool = True  # False: without TinyGPT-V's norm on attention's output


PHI_PRESETS = {
    "full": PhiConfig(vocab_size=51200, hidden_size=2560, num_layers=32, num_heads=32,
                      intermediate_size=10240),
    "mini": PhiConfig(vocab_size=832, hidden_size=192, num_layers=6, num_heads=6,
                      intermediate_size=768, max_position_embeddings=512,
                      partial_rotary_factor=0.5, resid_dropout=0.0),
}  # fmt: skip


def rotary_cos_sin(position_ids: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Cosine and sine of every position's angles (RoPE, arXiv 2104.09864, eq. 34), in fp32.

    position_ids (B, T) -> (B, 1, T, rotary_dim / 2, 2), to be broadcast over heads.
    """
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device).float() / rotary_dim
    angles = position_ids[:, None, :, None].float() / theta**exponents  # (B, 1, T, rotary_dim / 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def apply_rotary(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the first `rotary_dim` channels of every head of x (B, heads, T, head_dim); channel i
    turns together with channel i + rotary_dim / 2. The other channels carry no position."""
    cos, sin = cos_sin.unbind(-1)
    rotary_dim = 2 * cos.shape[-1]
    first, second = x[..., :rotary_dim].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], dim=-1)


class RMSNorm(nn.Module):
    """x / rms(x) * weight: LayerNorm without the mean and the bias, computed in fp32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) -> the same, in fp32."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class KVCache:
    """Keys and values of all past tokens, so that decoding computes each token once.

    Room for `max_length` tokens is taken at the start; `length` tells how many are in it.
    """

    def __init__(
        self, config: PhiConfig, batch_size: int, max_length: int,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        head_dim = config.hidden_size // config.num_heads
        shape = (config.num_layers, 2, batch_size, config.num_heads, max_length, head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def update(self, layer: int, kv: Tensor) -> Tensor:
        """Stores keys and values (2, B, heads, T, head_dim) of the newest T tokens; returns those
        of all tokens."""
        end = self.length + kv.shape[3]
        self.kv[layer, :, :, :, self.length : end] = kv
        return self.kv[layer, :, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with partial rotary positions and TinyGPT-V's norm on q and k.

    The norm comes before the rotation and is shared by all heads. Because q and k then have a
    bounded length, no score can overflow fp16: that is its purpose (paper, section 3.2).
    """

    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        head_dim = config.hidden_size // config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        if config.qk_norm:
            self.q_layernorm = nn.LayerNorm(head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(head_dim, eps=config.layer_norm_eps)
        else:
            self.q_layernorm = self.k_layernorm = nn.Identity()

    def forward(
        self, x: Tensor, cos_sin: Tensor, mask: Tensor | None,
        cache: KVCache | None = None, maps: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, hidden_size) -> the same; mask: see causal_mask; cache and maps: see Phi."""
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = apply_rotary(self.q_layernorm(q).to(v.dtype), cos_sin)  # (B, heads, T, head_dim)
        k = apply_rotary(self.k_layernorm(k).to(v.dtype), cos_sin)
        if cache is not None:
            # (B, heads, all tokens so far, head_dim)
            k, v = cache.update(self.layer, torch.stack([k, v]))
        y = self.attend(q, k, v, mask, maps)
        return self.dense(y.transpose(1, 2).reshape(B, T, C))

    @staticmethod
    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, maps: list[Tensor] | None
    ) -> Tensor:
        """(B, heads, T, head_dim), from k and v of all tokens so far."""
        if maps is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y, attention_map = naive_attention(q, k, v, mask)
        maps.append(attention_map)
        return y


class MLP(nn.Module):
    """Two linear layers around the tanh approximation of GELU (`gelu_new`)."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, hidden_size) -> the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Phi's parallel block: y = x + RMSNorm(attention(h)) + mlp(h), where h = LayerNorm(x).

    The paper's figure 5c feeds the MLP with x itself; the released code, and we, with h.
    """

    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_layernorm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if config.attn_norm else nn.Identity()
        )
        self.mlp = MLP(config)
        self.resid_dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self, x: Tensor, cos_sin: Tensor, mask: Tensor | None,
        cache: KVCache | None = None, maps: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """x (B, T, hidden_size) -> the same; mask, cache and maps as in Attention."""
        h = self.input_layernorm(x)
        attended = self.post_layernorm(self.self_attn(h, cos_sin, mask, cache, maps))
        return x + self.resid_dropout(attended) + self.resid_dropout(self.mlp(h))


def causal_mask(attention_mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor:
    """(1 or B, 1, T, S), True where the last T of S tokens may look: at themselves and back,
    never at padding. `attention_mask` (B, S) is 1 on real tokens."""
    positions = torch.arange(S, device=device)
    mask = (positions[None, :] <= positions[S - T :, None])[None, None]  # (1, 1, T, S)
    if attention_mask is not None:
        itself = positions[None, :] == positions[S - T :, None]
        # A padding token looks at itself, so that no row of the softmax is empty.
        mask = mask & (attention_mask[:, None, None, :S].bool() | itself)
    return mask


class Phi(nn.Module):
    """The language model. inputs_embeds (B, T, hidden_size) -> hidden states (B, T, hidden_size)
    after the final norm; `lm_head` turns those into logits (B, T, vocab_size)."""

    def __init__(self, config: PhiConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Token embeddings (B, T, hidden_size), the places of pictures filled with theirs in order.
        The sum over all layers begins with them, in fp32 whatever the embeddings' own dtype.

        Raises ValueError when the pictures do not fill those places exactly.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        places = int(is_image.sum())
        available = 0 if image_embeds is None else image_embeds[..., 0].numel()
        if places != available:
            raise ValueError(f"the prompt has {places} image places, the pictures fill {available}")
        embeds = self.embed_tokens(input_ids.clamp(min=0))
        embeds = embeds.to(torch.promote_types(embeds.dtype, torch.float32))
        if image_embeds is None:
            return embeds
        return embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: KVCache | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """attention_mask (B, S) covers cached tokens too; position_ids (B, T) default to counting
        from the cache's length; `maps`, if a list, receives (B, heads, T, S) for each layer."""
        T = inputs_embeds.shape[1]
        past = 0 if cache is None else cache.length
        device = inputs_embeds.device
        if past + T > self.config.max_position_embeddings:
            raise ValueError(
                f"the prompt with its picture and answer takes {past + T} positions; this model "
                f"has {self.config.max_position_embeddings}"
            )
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=device)[None]
        head_dim = self.config.hidden_size // self.config.num_heads
        rotary_dim = int(self.config.partial_rotary_factor * head_dim)
        cos_sin = rotary_cos_sin(position_ids, rotary_dim, self.config.rope_theta)
        mask = None  # a single token may look at all before it
        if T > 1 or attention_mask is not None:
            mask = causal_mask(attention_mask, T, past + T, device)
        x = inputs_embeds
        for block in self.layers:
            x = block(x, cos_sin, mask, cache, maps)
        if cache is not None:
            cache.length += T
        return self.final_layernorm(x)

    def loss(self, inputs_embeds: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross entropy over all labels (B, T) but -100, 0 if there are none; token t predicts
        label t + 1."""
        hidden = self(inputs_embeds, attention_mask)
        targets = labels[:, 1:]
        labelled = targets != -100
        logits = self.lm_head(hidden[:, :-1][labelled])  # (labelled tokens, vocab_size)
        total = F.cross_entropy(logits.float(), targets[labelled], reduction="sum")
        return total / labelled.sum().clamp(min=1)

    def init_weights(self) -> None:
        """Weights for training from scratch: normal, Phi-2's 0.02 at width 2560; biases zero."""
        std = 0.02 * math.sqrt(2560 / self.config.hidden_size)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)


# Our names -> those of the official checkpoints and of Phi-2's files; `{}` is the layer's number.
# The official code calls the fused projection `query_key_value` and interleaves it by head.
PHI_NAMES = {
    "embed_tokens": "model.embed_tokens",
    "layers.{}.input_layernorm": "model.layers.{}.input_layernorm",
    "layers.{}.self_attn.qkv": "model.layers.{}.self_attn.query_key_value",
    "layers.{}.self_attn.dense": "model.layers.{}.self_attn.dense",
    "layers.{}.self_attn.q_layernorm": "model.layers.{}.self_attn.q_layernorm",
    "layers.{}.self_attn.k_layernorm": "model.layers.{}.self_attn.k_layernorm",
    "layers.{}.post_layernorm": "model.layers.{}.post_layernorm",
    "layers.{}.mlp.fc1": "model.layers.{}.mlp.fc1",
    "layers.{}.mlp.fc2": "model.layers.{}.mlp.fc2",
    "final_layernorm": "model.final_layernorm",
    "lm_head": "lm_head",
}


@dataclass
class ModelConfig:
    """All of config.json: the sizes of the parts, and what training has made of them."""

    vision: VisionConfig
    qformer: QFormerConfig
    projector: ProjectorConfig
    phi: PhiConfig
    lora: LoRAConfig | None  # stages 2 to 4
    stage: int  # of training, 1 to 4; 0 is before the first
    int8: bool = False  # quantized, LoRA merged (quantize.py)

    @classmethod
    def preset(cls, name: str, stage: int, vision: str = "") -> "ModelConfig":
        """"full" is the official size, "mini" the miniature: only numbers differ. vision: "clip"
        for CLIP's ViT in the place of EVA's."""
        if name not in PHI_PRESETS:
            raise ValueError(f"preset={name} is not known; choose from {', '.join(PHI_PRESETS)}")
        vision_config = VISION_PRESETS[vision or name]
        qformer = replace(QFORMER_PRESETS[name], vision_hidden_size=vision_config.hidden_size)
        return cls(
            vision_config, qformer, PROJECTOR_PRESETS[name], PHI_PRESETS[name],
            LORA_PRESETS[name] if stage >= 2 else None, stage,
        )

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """What dataclasses.asdict made. Raises KeyError or TypeError for anything else."""
        lora = values["lora"]
        return cls(
            VisionConfig(**values["vision"]), QFormerConfig(**values["qformer"]),
            ProjectorConfig(**values["projector"]), PhiConfig(**values["phi"]),
            LoRAConfig(**lora) if lora else None, values["stage"], values.get("int8", False),
        )  # fmt: skip


# What numbers a configuration may hold: whole ones from 1 to a million, others from 0 to 1, or
RANGES = {"num_layers": (1, 200), "stage": (0, 4), "rope_theta": (1, 1e9)}


def check_config(config: object) -> None:
    """Raises ValueError, naming the key, for what no model can be: it would fail when it answers,
    or take all memory before."""
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if is_dataclass(value):
            check_config(value)
        elif name != "lora":  # None where there is none
            kinds = (int, float) if field.type is float else (field.type,)
            least, most = RANGES.get(name, (1, 10**6) if field.type is int else (0, 1))
            if type(value) not in kinds or not least <= value <= most:
                expected = f"{field.type.__name__} from {least} to {most}"
                raise ValueError(f"{name} is {value!r:.40}, not of type {expected}")
    sizes = vars(config)
    for whole, part in (("hidden_size", "num_heads"), ("image_size", "patch_size")):
        if {whole, part} <= sizes.keys() and sizes[whole] % sizes[part]:
            raise ValueError(f"{whole} {sizes[whole]} is no multiple of {part} {sizes[part]}")
    if isinstance(config, PhiConfig):
        head_dim = config.hidden_size // config.num_heads
        if (rotary_dim := int(config.partial_rotary_factor * head_dim)) < 2 or rotary_dim % 2:
            raise ValueError(f"{rotary_dim} channels of each head rotate; they have to be pairs")


def set_dtype(model: "TinyGPTV", dtype: torch.dtype) -> None:
    """Linear maps and embeddings to `dtype`; what the stages train, norms and positions stay fp32.
    With a half dtype the model computes under torch.autocast."""
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            for name, parameter in module.named_parameters(recurse=False):
                if not is_trainable(f"{prefix}.{name}"):
                    parameter.data = parameter.data.to(dtype)
    if model.config.int8:  # rows are looked up, not multiplied: fp16, as they lie in the file
        model.phi.embed_tokens.half()


def half_dtype(device: str) -> torch.dtype:
    """The 16-bit type that the device computes with: bf16, which has the range of fp32, or fp16."""
    if device.startswith("cuda") and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float16 if device == "mps" else torch.bfloat16


def autocast(weight: Tensor) -> torch.autocast:
    """Half precision for a part of the model with such weights; changes nothing for fp32."""
    is_half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(weight.device.type, weight.dtype, enabled=is_half)


def is_new(name: str) -> bool:
    """Whether a parameter is TinyGPT-V's own: no backbone brings the projections and LoRA."""
    return name.startswith("projector.") or ".lora_" in name


def is_trainable(name: str) -> bool:
    """Whether the stages train a parameter: the new ones, and the weights (not the biases) of
    Phi's norms. All else is frozen throughout, the Q-Former too."""
    is_norm = name.startswith("phi.") and name.endswith("layernorm.weight")
    return is_norm or is_new(name)


class TinyGPTV(nn.Module):
    """The whole model. `forward` returns the training loss; generate.py drives the parts itself."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.stage = config.stage
        self.load_report = ""  # what official/load.py has to say
        self.carried: set[str] = set()  # frozen tensors that are the checkpoint's, not a backbone's
        self.visual_encoder = EvaViT(config.vision)
        self.qformer = QFormer(config.qformer)
        self.projector = Projector(config.projector)
        self.phi = Phi(config.phi)
        if config.lora is not None:
            add_lora(self.phi, config.lora)
        if config.int8:
            quantize_model(self)  # in shape; what is in it comes from the file

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels: stage 4 doubles the resolution."""
        return self.config.vision.image_size * (2 if self.stage == 4 else 1)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all that the stages train, and what is `carried`."""
        if self.config.int8:
            raise ValueError("of a quantized model nothing can be trained or exported; use the one "
                             "that it was made from")  # fmt: skip
        return {name: p.detach().contiguous() for name, p in self.named_parameters()
                if is_trainable(name) or name in self.carried}  # fmt: skip

    def encode_images(self, pixel_values: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """(num_images, 3, S, S) -> (num_images, num_queries, hidden_size of Phi)."""
        with autocast(self.qformer.layers[0].mlp.fc1.weight):
            return self.projector(self.qformer(self.visual_encoder(pixel_values), maps))

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor,
        pixel_values: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Mean cross entropy over all labelled tokens of the batch.

        input_ids, labels, attention_mask (B, T); a label of -100 is not a target;
        pixel_values (num_images, 3, S, S), as many as input_ids has places for.
        """
        image_embeds = None if pixel_values is None else self.encode_images(pixel_values)
        return self.phi.loss(self.phi.embed(input_ids, image_embeds), attention_mask, labels)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, stage: int | None = None, device: str = "cpu",
        dtype: torch.dtype | None = None, int8: bool = False, pack: bool = True,
    ) -> "TinyGPTV":  # fmt: skip
        """The model of a weights directory, ready to answer (`model.tokenizer` is set).

        directory: a checkpoint directory, or one that holds backbones and stage1 ... stage4; of
        those `stage` picks one, the last by default, and 0 the backbones with a new projector. Or
        a folder with the official files (official/load.py), or what quantize.py has made of either.
        dtype: of the frozen linear maps and embeddings; fp32 by default, of official and quantized
        weights half precision. int8: quantize what is not quantized yet. pack: make quantized
        weights ready for the CPU's int8 unit, which takes seconds; else they are used where they
        lie in the file. Raises ValueError or FileNotFoundError, naming file and tensor, unless
        every tensor is there, has its shape, is finite, and none is left over.
        """
        directory = Path(directory)
        if int8:
            model, tensors = open_quantized(directory, stage)
            set_dtype(model, dtype or half_dtype(device))
        else:
            model, tensors = open_pretrained(directory, stage, device, dtype)
        model.load_state_dict(collected(tensors, model.state_dict()), assign=True)
        model.to(device).eval()
        if model.config.int8 and pack and device == "cpu" and has_int8_unit():
            file = None if int8 else model.backbones / "model.safetensors"
            pack_phi(model.phi, partial(release, file))
            pack_vision(model.visual_encoder, partial(release, file))
        return model


# ---- loading and saving ----

BACKBONE_FILES = {
    "vision.safetensors": "visual_encoder.",
    "qformer.safetensors": "qformer.",
    "phi.safetensors": "phi.",
}


def open_pretrained(
    directory: Path, stage: int | None, device: str, dtype: torch.dtype | None, copy: bool = True
) -> tuple[TinyGPTV, Tensors]:
    """The model with shapes but no memory, and its tensors as they are read: the checkpoint's
    first, of official files one after the other. copy: False if tensors may stay in the mapped
    file, where nobody may write to them."""
    if is_official(directory):
        from official.load import open_official  # it is built on this file

        return open_official(directory, stage, device, dtype, copy=copy)
    folder = checkpoint_directory(directory, stage)
    config, backbones = read_config(folder)
    if stage not in (None, config.stage):
        raise ValueError(f"{directory} holds stage {config.stage}, not {stage}")
    with torch.device("meta"):
        model = TinyGPTV(config)
    model.backbones = folder / backbones
    on_official = is_official(model.backbones)
    is_half = on_official or config.int8
    set_dtype(model, dtype or (half_dtype(device) if is_half else torch.float32))
    if not on_official:
        model.tokenizer = read_tokenizer(model.backbones, config)
    return model, read_model(model, folder, device, copy)


def open_quantized(directory: Path, stage: int | None) -> tuple[TinyGPTV, Tensors]:
    """As `open_pretrained`, of the model quantized, LoRA merged. A tensor may come in parts."""
    source, tensors = open_pretrained(directory, stage, "cpu", torch.float16, copy=False)
    if source.config.int8:
        raise ValueError(f"{directory} is quantized already")
    with torch.device("meta"):
        model = TinyGPTV(replace(source.config, lora=None, int8=True))
    set_dtype(model, torch.float16)
    model.tokenizer = source.tokenizer

    def read() -> Tensors:
        lora = source.config.lora
        merged = merge_tensors(tensors, lora) if lora else tensors
        yield from quantize_tensors(merged)
        model.load_report = source.load_report

    return model, read()


def collected(tensors: Tensors, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """All tensors in the dtypes of `expected`, those that came in parts as wholes."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors:
        parts.setdefault(name, []).append(tensor.to(expected[name].dtype))
    return {name: torch.cat(some) if len(some) > 1 else some[0] for name, some in parts.items()}


def read_model(model: TinyGPTV, folder: Path, device: str, copy: bool) -> Tensors:
    """The tensors of a checkpoint directory, then what its backbones have beside them."""
    expected = model.state_dict()
    if model.config.int8:
        tensors = read_tensors(folder / "model.safetensors", "", expected, copy=False)
        require(tensors, set(expected), folder)
        yield from tensors.items()
        return
    if model.stage > 0:
        own = read_tensors(folder / "model.safetensors", "", expected, copy)
        require(own, {name for name in expected if is_trainable(name)}, folder)
        model.carried = {name for name in own if not is_trainable(name)}
    else:  # the first half of the projection has a history, the second begins
        path = model.backbones / "projection.safetensors"
        own = new_projector(model.config.projector)
        own |= read_tensors(path, "projector.", expected, copy)
    yield from own.items()
    if is_official(model.backbones):
        from official.load import read_backbones

        yield from read_backbones(model, device, own, copy)
        return
    for file, prefix in BACKBONE_FILES.items():
        tensors = read_tensors(model.backbones / file, prefix, expected, copy)
        names = {n for n in expected if n.startswith(prefix) and not is_new(n)}
        require(tensors, names, model.backbones)
        yield from ((name, tensor) for name, tensor in tensors.items() if name not in own)


def is_official(directory: Path) -> bool:
    """Whether a folder holds official files, or the beginnings of their download: their ViT and
    Q-Former are pickles. A folder with one of our configurations is ours whatever else is there."""
    for path in (directory / "config.json", *directory.glob("stage[1-4]/config.json")):
        if path.exists() and '"qformer"' in path.read_text("utf-8", errors="replace"):
            return False
    endings = (".pth", ".pt", ".bin", ".part")
    return any(path.suffix in endings for path in files_below(directory))


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and up to three folders below it. Links are followed: no further, so
    that those in a circle end."""
    depths = ("*", "*/*", "*/*/*", "*/*/*/*")
    return sorted(path for depth in depths for path in folder.glob(depth) if path.is_file())


def checkpoint_directory(directory: Path, stage: int | None) -> Path:
    """The checkpoint directory that `stage` means in `directory`."""
    if not directory.is_dir():
        raise FileNotFoundError(f"no weights directory {directory}")
    if (directory / "model.safetensors").exists() or stage == 0:
        return directory
    stages = sorted(int(path.name[5:]) for path in directory.glob("stage[1-4]"))
    if not stages or (stage is not None and stage not in stages):
        wanted = "no checkpoint" if stage is None else f"no stage {stage}"
        found = ", ".join(map(str, stages)) or "none"
        raise FileNotFoundError(f"{directory}: {wanted} in it; stages found: {found}")
    return directory / f"stage{stage or stages[-1]}"


def read_config(folder: Path) -> tuple[ModelConfig, str]:
    """The model's sizes, and the folder of its frozen tensors as seen from `folder`."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text("utf-8"))
        config = ModelConfig.from_dict(values)
        check_config(config)
        return config, os.fspath(values.get("backbones", "."))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; is {folder} a weights directory?") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model: {error!r:.300}") from None


def read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer in a folder. Raises ValueError if it has more ids than the model has rows."""
    tokenizer = Tokenizer(folder)
    if len(tokenizer) > config.phi.vocab_size:
        raise ValueError(f"the tokenizer files of {folder} have {len(tokenizer)} ids, the model "
                         f"has {config.phi.vocab_size}: they do not belong together")  # fmt: skip
    return tokenizer


def read_tensors(
    path: Path, prefix: str, expected: dict[str, Tensor], copy: bool
) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked, their names after `prefix`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        tensors = load_file(path)
    except Exception as error:  # damaged bytes can make a parser raise anything
        from official.fetch import not_weights  # stands above this file

        with open(path, "rb") as file:
            kind = not_weights(file.read(64))
        told = f"{path} ({path.stat().st_size} bytes) is "
        told += f"{kind}, " * bool(kind) + f"not a safetensors file: {printable(error)}"
        raise ValueError(told) from None
    names = {prefix + name: tensor for name, tensor in tensors.items()}
    try:
        return {n: check_tensor(n, tensor, expected.get(n), copy) for n, tensor in names.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {printable(error)}") from None


def check_tensor(name: str, tensor: Tensor, expected: Tensor | None, copy: bool) -> Tensor:
    """What a file holds in the dtype of the tensor (on the meta device) whose place it takes; a
    copy, or where possible the mapped file itself. Raises ValueError if there is none, the shape
    differs, a number is not finite, or int8 is no int8."""
    if expected is None:
        raise ValueError(f"unexpected tensor {name}")
    if tensor.shape != expected.shape:
        shapes = f"{tuple(tensor.shape)}, the model needs {tuple(expected.shape)}"
        raise ValueError(f"{name} has shape {shapes}")
    if expected.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if not expected.is_floating_point() and tensor.dtype != expected.dtype:
        raise ValueError(f"{name} holds {tensor.dtype}, the model needs {expected.dtype}")
    converted = in_dtype(tensor, expected.dtype, copy)
    if not all_finite(converted):
        is_finite = all_finite(tensor.double())  # some types of 8 bits have no extremes
        too_large = f"numbers too large for {expected.dtype}"
        raise ValueError(f"{name} holds {too_large if is_finite else 'NaN or infinity'}")
    return converted


def in_dtype(tensor: Tensor, dtype: torch.dtype, copy: bool) -> Tensor:
    """The tensor in a dtype; in new memory if `copy` or if it has another one.

    fp16 becomes bf16 by way of fp32, in parts that fit into the processor's cache: torch is fast on
    both halves of the way, and slow on the whole.
    """
    if (tensor.dtype, dtype) != (torch.float16, torch.bfloat16):
        return tensor.to(dtype, copy=copy)
    result = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
    for place, part in zip(*(whole.reshape(-1).split(2**18) for whole in (result, tensor))):
        place.copy_(part.float())
    return result


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # NaN is the extreme of both


def release(path: Path | None) -> None:
    """Gives back what was read of a mapped file: its pages count as this process's memory. (They
    stay in the system's cache. Where there is no /proc, only the count is higher.) What was written
    to the mapped tensors would be lost."""
    maps = Path("/proc/self/maps")
    if path is None or not maps.exists():
        return
    ending = f" {path.resolve()}"
    for line in maps.read_text().splitlines():
        if line.endswith(ending):
            start, end = (int(address, 16) for address in line.split()[0].split("-"))
            span = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            ctypes.CDLL(None).madvise(*span, mmap.MADV_DONTNEED)


def require(found: dict[str, Tensor], names: set[str], folder: Path) -> None:
    """Raises ValueError unless all names were found in the folder."""
    missing = sorted(names - set(found))
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")


def new_projector(config: ProjectorConfig) -> dict[str, Tensor]:
    """A projector that has learned nothing yet (torch's default initialisation), to be trained."""
    return {f"projector.{name}": t for name, t in Projector(config).state_dict().items()}


def save_checkpoint(model: TinyGPTV, folder: Path) -> None:
    """Writes config.json and model.safetensors. The frozen tensors of the backbones stay where
    they are, in `model.backbones`, to which config.json points."""
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / "model.safetensors") as path:
        save_file(model.checkpoint_tensors(), path)
    write_config(model.config, folder, os.path.relpath(model.backbones, folder))


def write_config(config: ModelConfig, folder: Path, backbones: str) -> None:
    """Writes config.json; backbones: the folder of the frozen tensors as seen from `folder`."""
    text = json.dumps(asdict(config) | {"backbones": backbones}, indent=2)
    with replace_file(folder / "config.json") as path:
        path.write_text(text + "\n", "utf-8")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary file to write into, which takes the place of `path` when all of it is on the
    disk: whatever happens, `path` is the old file or the new one. Raises OSError if the writing
    fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # by who writes
            raise OSError(f"cannot write {path} ({error}); nothing else has changed") from error
        raise
