"""The whole model at a glance: a drawing, and the shapes that run through it.

    python experiments/architecture.py         writes assets/architecture.png, prints the shapes

Both come from the code: shapes are seen by hooks while a picture without numbers (torch's meta
device) runs through the model, and the drawing is labelled with them.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import ModelConfig, TinyGPTV

TOKENS = 50  # of a prompt with one picture
# What a row of the table shows: the words for it, and the module whose output it is.
OUTPUTS = {
    "patches": "visual_encoder.patch_embed",
    "one ViT block, inside the MLP": "visual_encoder.blocks.0.mlp.fc1",
    "picture, class token first": "visual_encoder",
    "32 queries ask": "qformer.layers.0.cross_attn.query",
    "the picture's keys": "qformer.layers.0.cross_attn.key",
    "32 queries, answered": "qformer",
    "first projection": "projector.fc1",
    "32 words for Phi": "projector.fc2",
    "one Phi block, q, k and v": "phi.layers.0.self_attn.qkv",
    "LoRA's detour": "phi.layers.0.self_attn.qkv.lora_A",
    "one Phi block, inside the MLP": "phi.layers.0.mlp.fc1",
    "one Phi block, attention's part": "phi.layers.0.post_layernorm",
    "hidden states": "phi.final_layernorm",
    "logits": "phi.lm_head",
}


def shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """The shapes of stage 4 of a preset, one picture and TOKENS tokens, by their words."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset(preset, stage=4))
        pixel_values = torch.empty(1, 3, model.image_size, model.image_size)
        inputs_embeds = torch.empty(1, TOKENS, model.config.phi.hidden_size)
    seen = {"pixels": tuple(pixel_values.shape)}

    def note(words: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        seen[words] = tuple(output.shape)

    for words, name in OUTPUTS.items():
        model.get_submodule(name).register_forward_hook(partial(note, words))
    with torch.no_grad():
        model.projector(model.qformer(model.visual_encoder(pixel_values)))
        seen["prompt with the picture in it"] = tuple(inputs_embeds.shape)
        model.phi.lm_head(model.phi(inputs_embeds))
    return seen


def shape_table() -> str:
    """The shapes of both presets side by side, with the module that each is the output of."""
    full, mini = shapes("full"), shapes("mini")
    code = {"pixels": "data.preprocess", "prompt with the picture in it": "phi.embed"} | OUTPUTS
    lines = ["| | in the code | full | mini |", "|---|---|---|---|"]
    for words, shape in full.items():
        sizes = " | ".join(" × ".join(map(str, found)) for found in (shape, mini[words]))
        lines.append(f"| {words} | `{code[words]}` | {sizes} |")
    return "\n".join(lines)


# ---- the drawing ----
WIDTH, HEIGHT = 1200, 740
FROZEN, TRAINED, PLAIN, LINE = "#d8e6f3", "#fbdcae", "#f1f1f1", "#444444"
BOTTOM, PITCH = 690, 56  # of the columns of boxes
SUM = "+"


def level(number: int) -> int:
    """Height of the middle of a column's box, counted from below."""
    return BOTTOM - PITCH * number - 19


class Drawing:
    """Boxes, arrows and words on white, twice as large as they will be: so lines get smooth."""

    def __init__(self):
        self.image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, words: str, size: int = 15, anchor: str = "mm") -> None:
        """Lines of words at the point (x, y); anchor: as in Pillow, for each line."""
        font = ImageFont.load_default(2 * size)
        lines = words.split("\n")
        for n, line in enumerate(lines):
            at = 2 * x, 2 * (y + (n - (len(lines) - 1) / 2) * size * 1.2)
            self.draw.text(at, line, "black", font, anchor)

    def box(self, x: float, y: float, words: str, color: str, width: int = 170, height: int = 40,
            size: int = 14) -> None:  # fmt: skip
        """A box around the point (x, y)."""
        sides = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        self.draw.rounded_rectangle([2 * side for side in sides], 14, color, LINE, 3)
        self.text(x, y, words, size)

    def plus(self, x: float, y: float) -> None:
        """A circle with a plus sign: here two ways are added."""
        circle = [2 * side for side in (x - 11, y - 11, x + 11, y + 11)]
        self.draw.ellipse(circle, "white", LINE, 3)
        self.text(x, y - 1, SUM, 18)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through the points, level or upright, with a head at the last."""
        scaled = [(2 * x, 2 * y) for x, y in points]
        self.draw.line(scaled, LINE, 4, "curve")
        (x0, y0), (x, y) = scaled[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        side = [(x - 16 * dx + s * 9 * dy, y - 16 * dy + s * 9 * dx) for s in (-1, 1)]
        self.draw.polygon([(x, y), *side], LINE)

    def column(self, x: int, title: str, parts: list[tuple[str, str]]) -> None:
        """Boxes and sums one over the other, with arrows between them, under a title."""
        self.text(x, 282, title, 16)
        reach = [11 if words == SUM else 20 for words, _ in parts]  # from a middle upwards
        self.arrow((x, level(0) + 48), (x, level(0) + 20))
        for n, (words, color) in enumerate(parts):
            if words == SUM:
                self.plus(x, level(n))
            else:
                self.box(x, level(n), words, color)
            above = reach[n + 1] if n + 1 < len(parts) else 20
            self.arrow((x, level(n) - reach[n]), (x, level(n + 1) + above))

    def bypass(self, x: int, low: float, high: int, reach: int) -> None:
        """A residual: from under level `low` past the boxes to the right side of level `high`."""
        start, end = level(low) + 30, level(high)
        self.arrow((x, start), (x + 105, start), (x + 105, end), (x + reach, end))


def draw_pipeline(drawing: Drawing, full: dict, mini: dict) -> None:
    """The way from the picture to the answer, with the shapes on it."""
    picture = Image.open(ROOT / "assets" / "shapes.png").convert("RGB").resize((220, 220))
    drawing.image.paste(picture, (40, 80))
    parts = [
        (290, "EVA ViT-g/14", FROZEN, "pixels"),
        (500, "Q-Former\n32 queries", FROZEN, "picture, class token first"),
        (710, "two linear\nprojections", TRAINED, "32 queries, answered"),
        (920, "Phi-2\n+ LoRA + norms", TRAINED, "32 words for Phi"),
    ]
    for x, words, color, before in parts:
        drawing.box(x, 95, words, color, 126, 80, 16)
        drawing.arrow((x - 147, 95), (x - 63, 95))
        sizes = [" x ".join(map(str, shapes[before][1:])) for shapes in (full, mini)]
        drawing.text(x - 106, 70, sizes[0], 12)
        drawing.text(x - 106, 118, sizes[1], 12)
    drawing.arrow((983, 95), (1050, 95))
    drawing.text(1072, 95, "red", 16)
    drawing.box(920, 200, "[vqa]  what color is the star?", PLAIN, 260, 34)
    drawing.arrow((920, 183), (920, 135))
    drawing.text(1060, 200, "embedded around\nthe 32 vectors", 13, "lm")
    drawing.text(250, 170, "above the arrows: full size, below: mini (stage 4)", 13)


def draw_vision_block(drawing: Drawing) -> None:
    """A pre-norm block, two residuals."""
    drawing.column(110, "ViT block, 39 (mini: 5)", [
        ("LayerNorm", FROZEN), ("self-attention,\nk without bias", FROZEN), (SUM, ""),
        ("LayerNorm", FROZEN), ("MLP, erf GELU", FROZEN), (SUM, ""),
    ])  # fmt: skip
    drawing.bypass(110, 0, 2, reach=11)
    drawing.bypass(110, 3, 5, reach=11)


def draw_qformer_layer(drawing: Drawing) -> None:
    """A post-norm layer: queries look at each other, at the picture, and are worked on."""
    drawing.column(450, "Q-Former layer, 12 (mini: 4)", [
        ("self-attention\nof the queries", FROZEN), ("add, LayerNorm", FROZEN),
        ("cross-attention", FROZEN), ("add, LayerNorm", FROZEN),
        ("MLP, erf GELU", FROZEN), ("add, LayerNorm", FROZEN),
    ])  # fmt: skip
    for low in (0, 2, 4):
        drawing.bypass(450, low, low + 1, reach=85)
    drawing.arrow((275, level(2)), (365, level(2)))
    drawing.text(312, level(2) - 24, "picture, in every\nsecond layer", 12)


def draw_phi_block(drawing: Drawing) -> None:
    """A parallel block: attention with its norms and LoRA, the MLP beside it, one sum."""
    x, mlp, top = 800, 1020, level(6)
    drawing.column(x, "Phi block, 32 (mini: 6)", [
        ("LayerNorm", TRAINED), ("q | k | v   + LoRA", TRAINED), ("LayerNorm of q and k", TRAINED),
        ("rotate q and k,\ncausal attention", FROZEN), ("dense   + LoRA", TRAINED),
        ("RMSNorm", TRAINED), (SUM, ""),
    ])  # fmt: skip
    split = level(0) - 28
    drawing.arrow((x, split), (mlp, split), (mlp, level(3) + 20))
    drawing.box(mlp, level(3), "MLP, tanh GELU", FROZEN)
    drawing.arrow((mlp, level(3) - 20), (mlp, top), (x + 11, top))
    start = level(0) + 32
    drawing.arrow((x, start), (x - 105, start), (x - 105, top), (x - 11, top))


def draw_legend(drawing: Drawing) -> None:
    """What the two colors mean."""
    for n, (words, color) in enumerate([("learns in the stages", TRAINED), ("frozen", FROZEN)]):
        drawing.box(1000, 672 + 32 * n, "", color, 30, 22)
        drawing.text(1025, 672 + 32 * n, words, 14, "lm")


def draw_architecture(full: dict, mini: dict) -> Image.Image:
    """The whole drawing, labelled with the shapes of both presets (of `shapes`)."""
    drawing = Drawing()
    draw_pipeline(drawing, full, mini)
    draw_vision_block(drawing)
    draw_qformer_layer(drawing)
    draw_phi_block(drawing)
    draw_legend(drawing)
    return drawing.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def main() -> int:
    """Draws and prints. Exit code: 0."""
    draw_architecture(shapes("full"), shapes("mini")).save(ROOT / "assets" / "architecture.png")
    print(shape_table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
