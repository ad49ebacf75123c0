"""Between the names of the official weight files and ours.

The readable names of this code base and the official ones meet in the tables beside the classes
(QFORMER_NAMES, PROJECTOR_NAMES, PHI_NAMES; the names of EVA's ViT are the official ones). Here the
tables are put together and used in both directions, CLIP_NAMES in one. Some things are more than a
name: Phi-2 comes in three layouts, the official code interleaves the rows of q, k and v by head,
where we keep blocks, and CLIP's biases of q, k and v are one.
"""

import re

import torch
from torch import Tensor

from bridge import PROJECTOR_NAMES, QFORMER_NAMES
from model import PHI_NAMES, ModelConfig
from vision import CLIP_HF_NAMES, CLIP_NAMES

# Microsoft's first layout of Phi-2 -> ours; its Wqkv already holds q, k and v as blocks.
MICROSOFT_NAMES = {
    "transformer.embd.wte": "embed_tokens",
    "transformer.h.{}.ln": "layers.{}.input_layernorm",
    "transformer.h.{}.mixer.Wqkv": "layers.{}.self_attn.qkv",
    "transformer.h.{}.mixer.out_proj": "layers.{}.self_attn.dense",
    "transformer.h.{}.mlp.fc1": "layers.{}.mlp.fc1",
    "transformer.h.{}.mlp.fc2": "layers.{}.mlp.fc2",
    "lm_head.ln": "final_layernorm",
    "lm_head.linear": "lm_head",
}
OFFICIAL_NAMES = (
    {"visual_encoder": "visual_encoder"}
    | {f"qformer.{ours}": theirs for ours, theirs in QFORMER_NAMES.items()}
    | {f"projector.{ours}": theirs for ours, theirs in PROJECTOR_NAMES.items()}
    | {f"phi.{ours}": f"llama_model.{theirs}" for ours, theirs in PHI_NAMES.items()}
)
OUR_NAMES = {theirs: ours for ours, theirs in OFFICIAL_NAMES.items()}
OUR_PHI_NAMES = {theirs: ours for ours, theirs in PHI_NAMES.items()}

# In the official files but without a use: why each is left out.
COMPUTED = "computed, not learned"
TEXT_HALF = "of the text half of the Q-Former, which no picture passes"
IGNORED = {
    r"Qformer\.bert\.embeddings\.position_ids": TEXT_HALF,
    r"t5_proj\.": "BLIP-2's projection to its own language model",
    r".*\.inv_freq": COMPUTED,
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.": TEXT_HALF,
    r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.": TEXT_HALF,
    r"Qformer\.cls\.|vision_proj\.|text_proj\.|itm_head\.|temp$": TEXT_HALF,
}
CLIP_UNUSED = r"text_|logit_scale|visual_projection|proj$|ln_post|.*post_layernorm|.*position_ids"


def rename(name: str, table: dict[str, str]) -> str | None:
    """`name` translated by its longest beginning that the table holds; None where none fits.

    "layers.3.mlp.fc1.weight" fits the row "layers.{}.mlp.fc1"; what follows the row is kept.
    """
    pattern_of = {source: re.escape(source).replace(r"\{\}", r"(\d+)") for source in table}
    for source in sorted(table, key=len, reverse=True):
        if match := re.fullmatch(pattern_of[source] + r"((?:\..+)?)", name):
            *number, rest = match.groups()
            return table[source].replace("{}", "".join(number)) + rest
    return None


def official_name(name: str, has_lora: bool) -> str:
    """The name that one of our tensors has in the official model."""
    theirs = rename(name, OFFICIAL_NAMES)
    return theirs.replace("llama_model.", "llama_model.base_model.model.") if has_lora else theirs


def by_blocks(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows [q_0 k_0 v_0 q_1 k_1 v_1 ...], one head after the other -> [q | k | v]. A tensor of
    another number of rows is returned as it is, for who checks its shape to refuse."""
    if tensor.ndim == 0 or tensor.shape[0] % (3 * num_heads):
        return tensor
    rows = tensor.unflatten(0, (num_heads, 3, -1))  # (heads, 3, head_dim, ...)
    return rows.transpose(0, 1).reshape(tensor.shape)


def by_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows [q | k | v] -> [q_0 k_0 v_0 q_1 k_1 v_1 ...]: the inverse of `by_blocks`."""
    rows = tensor.unflatten(0, (3, num_heads, -1))  # (3, heads, head_dim, ...)
    return rows.transpose(0, 1).reshape(tensor.shape)


def is_interleaved(name: str) -> bool:
    """Whether the official code stores this tensor by head: weight, bias and LoRA B of Phi's qkv
    (the ViT's is stored in blocks)."""
    return ".self_attn.qkv." in name and ".lora_A." not in name


def join_qkv(tensors: dict[str, Tensor], joined: str) -> dict[str, Tensor]:
    """Makes one tensor [q | k | v], named `joined`, of each q_proj, k_proj and v_proj. Raises
    ValueError if one of the three is missing or has another shape."""
    tensors = dict(tensors)
    for name in [name for name in tensors if re.search(r"\.[qkv]_proj\.", name)]:
        names = [re.sub(r"\.[qkv]_proj\.", f".{x}_proj.", name) for x in "qkv"]
        if missing := [part for part in names if part not in tensors]:
            raise ValueError(f"{name} is there, but {missing[0]} is not")
        if len({tensors[part].shape for part in names}) > 1:
            shapes = [f"{part} {tuple(tensors[part].shape)}" for part in names]
            raise ValueError(f"{', '.join(shapes)} should have one shape")
        if name == names[0]:
            whole = torch.cat([tensors[part] for part in names])
            tensors[name.replace("q_proj", joined)] = whole
    return {name: t for name, t in tensors.items() if not re.search(r"\.[qkv]_proj\.", name)}


def phi_from_official(
    tensors: dict[str, Tensor], num_heads: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Phi-2 in any of its three layouts -> (tensors by our names, below `phi`; ignored names with
    the reason).

    Microsoft's first release (transformer.h.N.mixer.Wqkv), today's (q_proj, k_proj, v_proj) and the
    one that the official code reads (query_key_value, rows by head). Raises ValueError for a name
    of none.
    """
    state, ignored = {}, {}
    for name, tensor in join_qkv(tensors, "qkv").items():
        if name.endswith(".inv_freq"):
            ignored[name] = COMPUTED
            continue
        is_microsoft = re.match(r"transformer\.|lm_head\.(ln|linear)\.", name)
        table = MICROSOFT_NAMES if is_microsoft else OUR_PHI_NAMES
        ours = rename(name.replace(".self_attn.qkv.", ".self_attn.query_key_value."), table)
        if ours is None:
            raise ValueError(f"{name} is no tensor of Phi-2 in a known layout")
        by_head = ".query_key_value." in name
        state[ours] = by_blocks(tensor, num_heads) if by_head else tensor
    return state, ignored


def eva_from_official(
    tensors: dict[str, Tensor], num_layers: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """EVA's ViT, whose names are ours -> (tensors, below `visual_encoder`; ignored names with the
    reason)."""
    state, ignored = {}, {}
    for name, tensor in tensors.items():
        layer = re.match(r"blocks\.(\d+)\.", name)
        if layer and int(layer[1]) >= num_layers:
            ignored[name] = "of a block after the last that BLIP-2 uses"
        elif re.match(r"(norm|fc_norm|head)\.", name):
            ignored[name] = "of the norm and head after the last block"
        else:
            state[name] = tensor
    return state, ignored


def clip_from_official(
    tensors: dict[str, Tensor], num_layers: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CLIP's ViT as LAVIS, OpenAI or Hugging Face store it -> (tensors by our names, below
    `visual_encoder`; ignored names with the reason). Raises ValueError for a name without place.
    """
    table = CLIP_NAMES
    if any(name.startswith("vision_model.") for name in tensors):
        table = CLIP_HF_NAMES
    is_openai = any(name.startswith("visual.") for name in tensors)
    used, ignored = {}, {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("visual.").replace("in_proj_", "in_proj.")
        layer = re.search(r"(?:resblocks|encoder\.layers)\.(\d+)\.", plain)
        is_text = is_openai and not name.startswith("visual.")
        if is_text or re.match(CLIP_UNUSED, plain) or (layer and int(layer[1]) >= num_layers):
            ignored[name] = "not part of the picture's path through CLIP"
        else:
            used[plain] = tensor

    theirs = {name: ours for ours, name in table.items()}
    state = {}
    for name, tensor in join_qkv(used, "in_proj").items():
        ours = rename(name, theirs)
        if ours is None:
            raise ValueError(f"{name} is no tensor of CLIP's ViT in a known layout")
        state[ours] = tensor
    if missing := [table[ours] for ours in ("cls_token", "pos_embed") if ours not in state]:
        raise ValueError(f"{missing[0]} is missing")
    state["cls_token"] = state["cls_token"].view(1, 1, -1)
    state["pos_embed"] = state["pos_embed"][None]
    for name in [name for name in state if name.endswith(".qkv.bias")]:
        for x, bias in zip("qkv", state.pop(name).chunk(3)):
            state[name.replace("qkv.bias", f"{x}_bias")] = bias
    return state, ignored


def from_official(
    tensors: dict[str, Tensor], config: ModelConfig
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the names of the official model -> (by ours, ignored names with the reason).

    Takes names with LoRA (llama_model.base_model.model.model...), without (llama_model.model...),
    and those of newer PEFT versions (.default.). Raises ValueError for a name that has no place.
    """
    state, ignored = {}, {}
    for name, tensor in tensors.items():
        plain = name.removeprefix("module.").replace(".default.", ".")
        plain = plain.replace("llama_model.base_model.model.", "llama_model.")
        reason = next((why for key, why in IGNORED.items() if re.match(key, plain)), None)
        if reason is not None:
            ignored[name] = reason
            continue
        ours = rename(plain, OUR_NAMES)
        if ours is None:
            raise ValueError(f"{name} is no tensor of TinyGPT-V")
        if is_interleaved(ours):
            tensor = by_blocks(tensor, config.phi.num_heads)
        state[ours] = tensor
    return state, ignored


def to_official(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `from_official`, with the prefix that the official code uses with LoRA."""
    tensors = {}
    for name, tensor in state.items():
        if is_interleaved(name):
            tensor = by_heads(tensor, config.phi.num_heads)
        tensors[official_name(name, config.lora is not None)] = tensor
    return tensors
