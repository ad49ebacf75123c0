"""What an answer points at, and where its words look, drawn on the picture.

    labelled_boxes, draw_boxes     boxes
    answer_attention, word_heat    where in the picture the words of an answer look
    overlay, page_of               heat over the picture; many of them, with labels
    draw_attention                 the picture of --attn

Two looks lie between a word and the picture: Phi's token that predicts the word looks at the places
of the queries, and each query has looked at the patches. Their product is the word's heat. The
Q-Former's look is that of its last layer, after which it sees no more, mean of the heads; Phi's is
the mean of all heads and layers, each weighted by itself, so that a head that looks at one query
counts more than one that looks at all of them. experiments/attention.py measures these choices and
others: captions are read in Phi's last layer, boxes in the middle ones, and this tells of both.
"""

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data import IMAGE_TOKEN_ID, Tokenizer, encode_prompt, parse_boxes
from model import TinyGPTV, autocast


# ---- boxes ----
BoxLabel = tuple[tuple[int, int, int, int], str]  # in hundredths of the picture
PALETTE = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


def labelled_boxes(text: str, label: str) -> tuple[list[BoxLabel], int]:
    """Boxes of an answer, each with the last <p>phrase</p> before it, or `label` where there is
    none, and how many were malformed."""
    texts = re.split(r"<p>(.*?)</p>", text)  # text, phrase, text, phrase, ..., text
    labelled, ignored = [], 0
    for phrase, after in zip([label, *texts[1::2]], texts[::2]):
        boxes, malformed = parse_boxes(after)
        labelled += [(box, " ".join(phrase.split())) for box in boxes]
        ignored += malformed
    return labelled, ignored


def boxes_of(task: str, asked: str, answered: str) -> tuple[list[BoxLabel], int]:
    """`labelled_boxes` of an answer; for identify, the one that was asked about with the answer."""
    text, label = (asked, answered) if task == "identify" else (answered, asked)
    return labelled_boxes(text, label)


def draw_boxes(image: Image.Image, boxes: Sequence[BoxLabel]) -> Image.Image:
    """A copy of the picture with the boxes on it and their labels inside them."""
    image = image.copy()
    draw, (width, height) = ImageDraw.Draw(image), image.size
    line = max(2, min(image.size) // 150)
    font = ImageFont.load_default(max(11, min(image.size) // 25))
    for number, (box, label) in enumerate(boxes):
        color = PALETTE[number % len(PALETTE)]
        x1, y1, x2, y2 = (min(s - 1, v * s // 100) for v, s in zip(box, (width, height) * 2))
        draw.rectangle((x1, y1, x2, y2), outline=color, width=line)
        x = max(0, min(x1 + 2 * line, width - draw.textlength(label, font)))
        draw.text((x, y1 + line), label, color, font, stroke_width=2, stroke_fill="white")
    return image


def check_picture_name(option: str, path: Path) -> None:
    """Raises ValueError, beginning with `option`, unless a picture can be written there."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{option}: no picture format has this ending; use .png or .jpg")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no folder {path.parent}")


def draw_answer(image: Image.Image, path: Path, task: str, asked: str, answered: str) -> None:
    """Writes the picture with the boxes of the answer, or for identify with the one asked for."""
    boxes, ignored = boxes_of(task, asked, answered)
    if ignored:
        warnings.warn(f"{ignored} malformed boxes in the answer are not drawn")
    if not boxes:
        warnings.warn(f"the answer has no box to draw; {path} is the picture as it was")
    draw_boxes(image, boxes).save(path)


# ---- attention ----
Word = tuple[str, list[int]]  # and which tokens of its text it is made of


class Cropped(list):
    """Takes attention maps (B, heads, T, S), as `maps` of `Phi`, and keeps some rows and columns of
    each: the whole maps of all layers would fill the memory."""

    def __init__(self, rows: slice, columns: slice):
        super().__init__()
        self.place = (..., rows, columns)

    def append(self, attention_map: Tensor) -> None:
        """Keeps a part of a map (B, heads, T, S), in fp32 and on the CPU."""
        super().append(attention_map[self.place].float().cpu())


def words_of(ids: Sequence[int], tokenizer: Tokenizer) -> list[Word]:
    """The words of a text, parted by white space."""
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    token_of = [token for token, piece in enumerate(pieces) for _ in piece]  # of every byte
    return [
        (match[0].decode("utf-8", "replace"), sorted(set(token_of[match.start() : match.end()])))
        for match in re.finditer(rb"\S+", b"".join(pieces))
    ]


@torch.inference_mode()
def answer_attention(
    model: TinyGPTV, image_embeds: Tensor, prompt: str, answered: str
) -> tuple[list[Word], Tensor]:
    """The words of an answer to a prompt, and Phi's attention (num_layers, num_heads, num_tokens,
    num_queries) from the token before each of its tokens, which predicts it, to the picture. What
    is missing to a sum of one goes to text.

    image_embeds (1, num_queries, hidden_size). The answer is read once more, after its prompt, in
    the tokens that training would have for it.
    """
    tokenizer, num_queries = model.tokenizer, model.config.qformer.num_queries
    before = [tokenizer.bos_token_id, *encode_prompt(prompt, tokenizer, num_queries, 1)]
    ids, first = tokenizer.encode(answered), before.index(IMAGE_TOKEN_ID)
    maps = Cropped(slice(len(before) - 1, None), slice(first, first + num_queries))
    weight = model.phi.lm_head.weight
    with autocast(weight):
        # the last token predicts none
        input_ids = torch.tensor([(before + ids)[:-1]], device=weight.device)
        model.phi(model.phi.embed(input_ids, image_embeds), maps=maps)
    return words_of(ids, tokenizer), torch.cat(maps)


def query_looks(cross_attention: Tensor) -> Tensor:
    """(heads, num_queries, 1 + patches) of a layer of the Q-Former -> (num_queries, grid, grid):
    the class token has no place in the picture."""
    patches = cross_attention.float().mean(dim=0)[:, 1:].cpu()
    side = math.isqrt(patches.shape[1])
    return patches.unflatten(1, (side, side))


def token_weights(attention: Tensor) -> Tensor:
    """How much each token of `answer_attention` reads each query, (num_tokens, num_queries): the
    mean of all heads and layers, each weighted by itself."""
    return attention.square().mean(dim=(0, 1))


def word_means(of_tokens: Tensor, words: Sequence[Word]) -> Tensor:
    """(num_tokens, num_queries) -> (num_words, num_queries)"""
    return torch.stack([of_tokens[tokens].mean(dim=0) for _, tokens in words])


def word_heat(weights: Tensor, words: Sequence[Word], looks: Tensor) -> Tensor:
    """Through the queries to the picture: weights (num_tokens, num_queries), looks (num_queries,
    grid, grid) -> (num_words, grid, grid)."""
    return torch.einsum("wq,qij->wij", word_means(weights, words), looks)


# ---- pictures of attention ----
SIDE, GAP, TEXT = 160, 12, 15  # of a tile: its longer side, what is between two, size of letters
LABEL = 132  # the least width for label and bar
INK, FAINT, BAR = "#222222", "#dddddd", "#c1121f"


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture, faded, with heat (grid, grid) on it: yellow where there is some, red at its
    maximum. Preprocessing squashes the whole picture to the square that the grid divides, so the
    grid stretched over the whole picture, whatever its shape, lies where the patches were."""
    scaled = (255 * heat / heat.max().clamp(min=1e-12)).numpy()
    mask = Image.fromarray(scaled).resize(image.size, Image.Resampling.BILINEAR).convert("L")
    grey = image.convert("L").convert("RGB")
    faded = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.6)
    hot = ImageOps.colorize(mask, "#ffd000", "#c00000", "#ff7000")
    return Image.composite(hot, faded, mask.point(lambda v: min(255, 1.2 * v)))


def page_of(tiles: Sequence[tuple[Image.Image, str, float | None]], title: str) -> Image.Image:
    """Pictures of one size in rows; under each its label and, if it has one, a bar and number of
    its share."""
    width, height = tiles[0][0].size
    cell_width, cell_height = max(width, LABEL) + GAP, height + 2 * TEXT + 2 * GAP
    rows = max(1, round(math.sqrt(len(tiles) * cell_width / cell_height / 1.5)))
    columns = math.ceil(len(tiles) / rows)
    rows, top = math.ceil(len(tiles) / columns), TEXT + 2 * GAP
    title_width = (font := ImageFont.load_default(TEXT)).getlength(title)
    wide = max(columns * cell_width, math.ceil(title_width) + GAP) + GAP
    page = Image.new("RGB", (wide, rows * cell_height + top), "white")
    draw = ImageDraw.Draw(page)
    draw.text((GAP, GAP), title, INK, font)
    for number, (picture, label, share) in enumerate(tiles):
        x, y = GAP + number % columns * cell_width, top + number // columns * cell_height
        page.paste(picture, (x, y))
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline=FAINT)
        while font.getlength(label) > cell_width - GAP:
            label = label[:-1]
        y += height
        draw.text((x, y + 2), label, INK, font)
        if share is not None:
            y += TEXT + 8
            for end, color in ((1.0, FAINT), (share, BAR)):
                draw.rectangle((x, y + 3, x + end * (LABEL - 50), y + TEXT - 5), fill=color)
            draw.text((x + LABEL - 42, y - 2), f"{100 * share:.0f} %", INK, font)
    return page


def draw_attention(
    image: Image.Image, path: Path, words: Sequence[Word], attention: Tensor,
    cross_attention: Tensor, of_queries: bool = False,
) -> None:  # fmt: skip
    """Writes where each word of an answer looks; or of_queries, where each query does.

    words, attention: of `answer_attention`; cross_attention (heads, num_queries, 1 + patches), of
    the Q-Former's last layer that looks at the picture.
    """
    if not words:
        warnings.warn(f"the answer is empty; {path} is not written")
        return
    looks = query_looks(cross_attention)
    size = [max(1, round(SIDE * side / max(image.size))) for side in image.size]
    small = image.resize(size, Image.Resampling.LANCZOS)
    by_layer = attention.mean(dim=1)  # (num_layers, num_tokens, num_queries)
    if of_queries:
        heats, tiles = looks, []
        shares, readers = word_means(by_layer[-1], words).max(dim=0)  # of every query
        labels = [f"{query}: {words[reader][0]}" for query, reader in enumerate(readers.tolist())]
        title = "where each query looks; which word reads it most in the last layer, and how much"
    else:
        heats, tiles = word_heat(token_weights(attention), words, looks), [(small, "", None)]
        shares = word_means(by_layer.mean(dim=0), words).sum(dim=1)
        labels = [word for word, _ in words]
        title = "where each word looks; how much of its attention the picture gets"
    for heat, label, share in zip(heats, labels, shares.tolist()):
        tiles.append((overlay(small, heat), re.sub("</?p>", "", label), share))
    page_of(tiles, title).save(path)
