"""A small model and a small picture as files, and damage to files: at random, and of the kinds that
pictures have."""

import io
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from model import ModelConfig, TinyGPTV
from official.checkpoints import save_checkpoint
from test_model import full_config, randomized, write_backbones

DIGITS = b"0123456789"
KINDS = "flip flip byte byte digit digit digit cut out insert double swap".split()


def damage(content: bytes, rng: random.Random) -> bytes:
    """One to three changes: bits or digits flipped, bytes cut, inserted, doubled or swapped."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 4, 64, 10**9)))
        kind = rng.choice(KINDS)
        if kind == "flip" and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif kind == "byte" and a < len(data):
            data[a] = rng.choice((0, 0x7F, 0x80, 0xFF, *b'"{[-,:]}/.'))
        elif kind == "digit":
            places = [n for n, byte in enumerate(data[a : a + 4096], a) if byte in DIGITS]
            if places:
                place = rng.choice(places)
                number = rng.choice((b"0", b"-1", b"9", b"7", b"0.5", b"1e999", b"9" * 20, b"null"))
                data[place : place + 1] = number
        elif kind == "cut" and rng.random() < 0.5:
            del data[a:]
        elif kind == "out":
            del data[a:b]
        elif kind == "insert":
            data[a:a] = rng.randbytes(rng.choice((1, 2, 8, 512)))
        elif kind == "double":
            data[a:a] = data[a:b]
        elif kind == "swap" and b < len(data):
            data[a], data[b] = data[b], data[a]
    return bytes(data)


def small_config(stage: int) -> ModelConfig:
    """A model that takes a millisecond; positions enough for a question in bytes."""
    config = full_config(stage)
    config.phi = replace(config.phi, max_position_embeddings=256)
    return config


def write_weights(folder: Path, stage: int = 4) -> TinyGPTV:
    """Backbones, tokenizer and one checkpoint; the model with the same random weights."""
    model = randomized(TinyGPTV(small_config(stage)))
    write_backbones(model, folder)
    save_checkpoint(model, folder / f"stage{stage}")
    return TinyGPTV.from_pretrained(folder)


def picture(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((5, 5, 20, 20), "red")
    return image.convert(mode)


def write_png_that_says(path: Path, width: int, height: int) -> None:
    """A small picture whose header says that it has another size."""
    picture().save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


BAD_PICTURES = ("missing", "empty", "text", "folder", "cut", "bomb")


def bad_picture(folder: Path, kind: str) -> Path:
    """A picture in the folder that can't be read, of a kind of BAD_PICTURES."""
    path = folder / f"{kind}.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    contents = {"empty": b"", "text": b"<html>not here</html>", "cut": file.getvalue()[:1500]}
    if kind == "folder":
        path.mkdir()
    elif kind == "bomb":  # it says that it has 400 million pixels
        write_png_that_says(path, 20_000, 20_000)
    elif kind in contents:
        path.write_bytes(contents[kind])
    return path
