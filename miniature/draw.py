"""Scenes as data, and their pictures: points around each shape, antialiased drawing, wear.

world.py decides what is in a scene; here it becomes pixels. Lengths and places are fractions of
the image side, x to the right and y downwards.
"""

import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SUPERSAMPLE = 3  # objects are drawn this much larger and reduced


@dataclass(frozen=True)
class SceneObject:
    """One drawn object. box (x1, y1, x2, y2) is tight around what is drawn, center its middle."""
    shape: str
    color: str
    size: str
    fill: str
    box: tuple[float, float, float, float]
    center: tuple[float, float]
    extent: float  # longer side before the rotation
    angle: float  # degrees
    variant: float  # 0..1: how this one's shape differs from others of its kind
    rgb: tuple[int, int, int]
    line_width: float  # of an outline; 0 for a solid object


@dataclass(frozen=True)
class Scene:
    """Objects from left to right, and how the picture is drawn."""
    objects: tuple[SceneObject, ...]
    ground: tuple[tuple[int, int, int], tuple[int, int, int]]  # a gradient from one to the other
    ground_angle: float  # of the gradient, degrees
    grain: float  # standard deviation of the ground's noise, in steps of 0..255
    noise: float  # the same, over the whole picture
    blur: float  # radius as a fraction of the image side
    contrast: float  # 1 leaves the picture as it is, less pales it
    jpeg_quality: int  # 0: not compressed
    seed: int  # of the noise


def outline(shape: str, variant: float) -> np.ndarray:
    """Points (n, 2) around the unit shape: box centred on 0, longer side 1, y downwards."""
    turn = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    if shape == "circle":
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -0.86 - 0.14 * variant), (0.5, 0), (-0.5, 0)])
    elif shape == "star":
        turn = np.arange(10) * math.pi / 5
        radius = np.where(np.arange(10) % 2, 0.38 + 0.1 * variant, 1)
        points = np.stack([radius * np.sin(turn), -radius * np.cos(turn)], 1)
    elif shape == "heart":
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        points = np.stack([16 * np.sin(turn) ** 3, -y * (0.95 + 0.1 * variant)], 1)
    elif shape == "cross":
        arm = 0.28 + 0.12 * variant
        points = np.array([(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
                           (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])
    elif shape == "diamond":  # a tall rhombus, so that it is no rotated square
        points = np.array([(0, -0.7), (0.5, 0), (0, 0.7), (-0.5, 0)])
    else:  # moon: a disc less a smaller disc to its right
        offset, hole = 0.5 + 0.12 * variant, 0.82
        x = (1 - hole**2 + offset**2) / (2 * offset)  # where the two circles meet
        tip, hole_tip = math.acos(x), math.acos((x - offset) / hole)
        outer = np.linspace(tip, 2 * math.pi - tip, 28)
        inner = np.linspace(2 * math.pi - hole_tip, hole_tip, 22)[1:-1]
        points = np.concatenate([
            np.stack([np.cos(outer), np.sin(outer)], 1),
            np.stack([offset + hole * np.cos(inner), hole * np.sin(inner)], 1)])
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / (high - low).max()


def placed_outline(shape: str, variant: float, extent: float, angle: float) -> np.ndarray:
    """Points (n, 2) of the shape scaled and turned (degrees, clockwise), its box centred on 0."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = extent * outline(shape, variant) @ np.array([[cos, sin], [-sin, cos]])
    return points - (points.min(0) + points.max(0)) / 2


def render(scene: Scene, image_size: int) -> Image.Image:
    """The scene as an antialiased RGB picture (image_size, image_size).

    The same scene gives the same pixels (JPEG wear: with the same Pillow).
    """
    rng = np.random.default_rng(scene.seed)
    picture = _ground(scene, image_size, rng)
    for obj in scene.objects:
        mask, corner = _mask(obj, image_size)
        picture.paste(obj.rgb, corner, mask)
    if scene.blur:
        picture = picture.filter(ImageFilter.GaussianBlur(scene.blur * image_size))
    if scene.noise or scene.contrast < 1:
        pixels = 255 - (255 - np.asarray(picture, np.float32)) * scene.contrast
        if scene.noise:
            pixels += scene.noise * rng.standard_normal(pixels.shape, np.float32)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if scene.jpeg_quality:
        file = BytesIO()
        picture.save(file, "JPEG", quality=scene.jpeg_quality)
        picture = Image.open(file).convert("RGB")
    return picture


def _ground(scene: Scene, image_size: int, rng: np.random.Generator) -> Image.Image:
    first, second = scene.ground
    if first == second and not scene.grain:
        return Image.new("RGB", (image_size, image_size), first)
    side = np.linspace(-0.5, 0.5, image_size, dtype=np.float32)
    angle = math.radians(scene.ground_angle)
    way = (math.cos(angle) * side + math.sin(angle) * side[:, None]) / math.sqrt(2) + 0.5
    way = way[..., None]  # (S, S, 1): 0 where the ground is of the first color, 1 the second
    pixels = np.float32(first) + way * (np.float32(second) - np.float32(first))
    if scene.grain:
        pixels += scene.grain * rng.standard_normal((image_size, image_size, 1), np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _mask(obj: SceneObject, image_size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of each pixel (mode L) around the object, and where its corner belongs."""
    corner = tuple(int(v * image_size) for v in obj.box[:2])
    far = tuple(math.ceil(v * image_size) for v in obj.box[2:])
    size = tuple(SUPERSAMPLE * (b - a) for a, b in zip(corner, far))
    points = placed_outline(obj.shape, obj.variant, obj.extent, obj.angle) + np.array(obj.center)
    points = SUPERSAMPLE * (points * image_size - np.array(corner)) - 0.5
    path = [tuple(point) for point in points.tolist()]
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).polygon(path, fill=255)
    if obj.line_width:  # the inner half of a line of double width: it stays inside the box
        line = Image.new("L", size)
        width = max(2, round(2 * SUPERSAMPLE * obj.line_width * image_size))
        ImageDraw.Draw(line).line(path + path[:2], fill=255, width=width, joint="curve")
        mask = ImageChops.darker(mask, line)
    return mask.reduce(SUPERSAMPLE), corner
