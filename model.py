"""TinyGPT-V (arXiv 2312.16862): a picture and a prompt go in, logits for the next token come out.

Read it from the leaves to the root:

    rotary embedding, RMSNorm          two small ideas
    KVCache                            what decoding remembers
    Attention, MLP, Block, Phi         the language model, Phi-2 with TinyGPT-V's extra norms
    TinyGPTV                           ViT -> Q-Former -> projection -> Phi

Phi-2 differs from most language models in that attention and MLP run side by side on the same
normalised input. TinyGPT-V adds three norms to keep a small model stable when pictures arrive:
LayerNorm on queries and keys, and RMSNorm on what attention returns.

official/checkpoints.py reads and writes the weights.
"""

import math
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
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
from data import IGNORE, IMAGE_TOKEN_ID, Tokenizer
from lora import LORA_PRESETS, LoRAConfig, add_lora
from quantize import has_int8_unit, pack_phi, pack_vision, quantize_model
from vision import VISION_PRESETS, EvaViT, VisionConfig


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

    @property
    def head_dim(self) -> int:
        """How many channels each head has."""
        return self.hidden_size // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """How many channels of each head rotate."""
        return int(self.partial_rotary_factor * self.head_dim)


PHI_PRESETS = {
    "full": PhiConfig(vocab_size=51200, hidden_size=2560, num_layers=32, num_heads=32,
                      intermediate_size=10240),
    "mini": PhiConfig(vocab_size=832, hidden_size=192, num_layers=6, num_heads=6,
                      intermediate_size=768, max_position_embeddings=512,
                      partial_rotary_factor=0.5, resid_dropout=0.0),
}  # fmt: skip


def rotary_cos_sin(position_ids: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Cosine and sine of every position's angles (RoPE, arXiv 2104.09864, section 3.2), in fp32.

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
        shape = (config.num_layers, 2, batch_size, config.num_heads, max_length, config.head_dim)
        self.kv = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def update(self, layer: int, kv: Tensor) -> Tensor:
        """Stores keys and values (2, B, heads, T, head_dim) of the newest T tokens; returns those
        of all, (2, B, heads, length + T, head_dim). `length` is moved on by Phi, when all layers
        have stored theirs. Raises ValueError if there is no room left."""
        end, room = self.length + kv.shape[3], self.kv.shape[4]
        if end > room:
            raise ValueError(f"the cache has room for {room} tokens, not for {end}")
        self.kv[layer, :, :, :, self.length : end] = kv
        return self.kv[layer, :, :, :, :end]


class Attention(nn.Module):
    """Causal self-attention with partial rotary positions and TinyGPT-V's norm on q and k.

    The norm comes before the rotation and is shared by all heads. It bounds the length of q and k
    by its weight and bias, which keeps scores far from fp16's limit: that is its purpose (paper,
    section 3.2).
    """

    def __init__(self, config: PhiConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        if config.qk_norm:
            self.q_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
            self.k_layernorm = nn.LayerNorm(config.head_dim, eps=config.layer_norm_eps)
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
        """q (B, heads, T, head_dim), k and v (B, heads, S, head_dim), mask as in causal_mask -> as
        q; maps receives (B, heads, T, S)."""
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
        embeddings = torch.empty(config.vocab_size, config.hidden_size)
        if not embeddings.is_meta:  # there normal_, as in nn.Embedding(...), imports a compiler
            nn.init.normal_(embeddings)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """input_ids (B, T), image_embeds (num_images, num_queries, hidden_size) -> (B, T,
        hidden_size): token embeddings, the places of pictures filled with theirs in order. The
        residual stream begins here, in fp32 whatever the embeddings' own dtype.

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
        """inputs_embeds (B, T, hidden_size) -> the same. attention_mask (B, S) covers cached tokens
        too; position_ids (B, T) default to counting from the cache's length; `maps`, if a list,
        receives (B, heads, T, S) for each layer. Raises ValueError past the last position."""
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
        cos_sin = rotary_cos_sin(position_ids, self.config.rotary_dim, self.config.rope_theta)
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
        labelled = targets != IGNORE
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
        """The official size ("full") or the miniature ("mini"): only numbers differ. vision: "clip"
        for CLIP's ViT in the place of EVA's. Raises ValueError for another name."""
        if name not in PHI_PRESETS:
            raise ValueError(f"preset={name} is not known; choose from {', '.join(PHI_PRESETS)}")
        if vision not in ("", *VISION_PRESETS):
            known = ", ".join(VISION_PRESETS)
            raise ValueError(f"vision={vision} is not known; choose from {known}")
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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def set_dtype(model: "TinyGPTV", dtype: torch.dtype) -> None:
    """Linear maps and embeddings to `dtype`, the embeddings of a quantized model to fp16; what the
    stages train, norms and positions stay fp32. With a half dtype the model computes under
    torch.autocast."""
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            for name, parameter in module.named_parameters(recurse=False):
                if not is_trainable(f"{prefix}.{name}"):
                    parameter.data = parameter.data.to(dtype)
    if model.config.int8:  # rows are looked up, not multiplied: fp16, as they lie in the file
        model.phi.embed_tokens.half()


def half_dtype(device: str) -> torch.dtype:
    """The 16-bit type that the device computes with: bf16, which has the range of fp32, or fp16."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.float16 if kind == "mps" else torch.bfloat16


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
        self.tokenizer: Tokenizer | None = None  # set on loading, as are the next three
        self.backbones: Path | None = None  # the folder of the frozen tensors
        self.load_report = ""  # what official/load.py has to say
        self.carried: set[str] = set()  # frozen tensors that are the checkpoint's, not a backbone's
        self.visual_encoder = EvaViT(config.vision)
        self.qformer = QFormer(config.qformer)
        self.projector = Projector(config.projector)
        self.phi = Phi(config.phi)
        if config.lora is not None:
            add_lora(self.phi, config.lora)
        if config.int8:
            quantize_model(self)  # the shapes; the numbers come from the file

    @property
    def stage(self) -> int:
        """Which stage made the model what it is; 0 before the first."""
        return self.config.stage

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels: stage 4 doubles the resolution."""
        return self.config.vision.image_size * (2 if self.stage == 4 else 1)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all that the stages train, in fp32, and what is `carried`, in
        the model's precision. Raises ValueError if the model is quantized."""
        if self.config.int8:
            raise ValueError("a quantized model can't be trained or exported; use the one that it "
                             "was made from")  # fmt: skip
        # copies: a safetensors file holds no views, and no memory under two names
        return {name: p.detach().clone(memory_format=torch.contiguous_format)
                for name, p in self.named_parameters()
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
        cls, directory: str | Path, stage: int | None = None, device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None, int8: bool = False, pack: bool = True,
    ) -> "TinyGPTV":  # fmt: skip
        """The model of a weights directory, ready to answer (`model.tokenizer` is set).

        directory: a checkpoint directory; one that holds backbones and stage1 ... stage4; a folder
        with the official files (official/load.py); or what quantize.py has made of any of these.
        stage: which one, by default the last; 0 for the model before stage 1. dtype: of the frozen
        linear maps and embeddings; by default fp32, half precision for official and quantized
        weights (a quantized model's embeddings are fp16); fp16 on a CPU brings a warning. int8:
        quantize while loading; an error for weights that are quantized already. pack: make
        quantized weights ready for int8 instructions, else products are in bf16. Without AMX that
        copies all weights, which takes a while at the official size, with it Phi's qkv and fc1;
        what is not copied stays where it lies in the file.
        Raises ValueError or FileNotFoundError, naming file and tensor, unless every tensor is
        there, has its shape, is finite, and none is left over.
        """
        # here, because that module is built on this one
        from official.checkpoints import (
            collected, keep_freed_memory, open_pretrained, open_quantized, release_all,
        )  # fmt: skip

        directory, device = Path(directory), str(device)
        on_cpu = torch.device(device).type == "cpu"
        if dtype == torch.float16 and on_cpu:
            warnings.warn("a CPU multiplies fp16 very slowly; use bf16 or fp32")
        if int8:
            model, tensors = open_quantized(directory, stage)
            set_dtype(model, dtype or half_dtype(device))
        else:
            model, tensors = open_pretrained(directory, stage, device, dtype)
        model.load_state_dict(collected(tensors, model.state_dict()), assign=True)
        model.to(device).eval()
        if model.config.int8 and pack and on_cpu and has_int8_unit():
            model.requires_grad_(False)  # what feeds packed layers can't learn through them
            file = None if int8 else model.backbones / "model.safetensors"
            pack_phi(model.phi, partial(release_all, file))
            pack_vision(model.visual_encoder, partial(release_all, file))
        keep_freed_memory()
        return model
