"""The miniature's tokenizer: byte-level BPE trained on the world's texts, in GPT-2's files."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from data import IMAGE_PLACEHOLDER, STAGES, byte_names, make_sample
from miniature import world
from model import PHI_PRESETS

# GPT-2's split into words for ASCII text, which is all that the world speaks.
ASCII_WORDS = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


def train_bpe(words: Counter[str], num_merges: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (arXiv 1508.07909): join the most frequent pair, again and again."""
    names = byte_names()
    spelled = {word: [names[byte] for byte in word.encode()] for word in words}
    merges = []
    for _ in range(num_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(spelled[word], spelled[word][1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for symbols in spelled.values():
            for at in range(len(symbols) - 2, -1, -1):
                if tuple(symbols[at : at + 2]) == best:
                    symbols[at : at + 2] = ["".join(best)]
    return merges


def world_texts(num_scenes: int) -> Iterator[str]:
    """Prompts and answers of all tasks and stages about the first scenes; their inventories."""
    for seed in range(num_scenes):
        scene, rng = world.sample_scene(seed, "train"), random.Random(seed)
        yield " " + " ".join(word for word in world.inventory(scene) if not word.isdigit())
        for record in world.records(scene, rng, 112, image="x"):
            for stage in (1, 3, 4):
                if stage == 4 or record["task"] in ("caption", "detail"):
                    for prompt, answer in make_sample(record, stage, rng, (112, 112)):
                        yield from prompt.split(IMAGE_PLACEHOLDER)
                        yield answer + STAGES[stage].end_sym


def pretrain_tokenizer(out: Path) -> None:
    """Writes vocab.json, merges.txt and added_tokens.json, as many tokens as the preset has."""
    words: Counter[str] = Counter()
    for text in world_texts(2000):
        words.update(re.findall(ASCII_WORDS, text.replace("  ", "")))
    words.update({str(number): 10**6 for number in range(100)})  # one token each, rare or not
    vocab_size = PHI_PRESETS["mini"].vocab_size
    merges = train_bpe(words, vocab_size - 256 - 2)
    tokens = [*byte_names().values(), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate(tokens)}
    added = {"<|endoftext|>": len(vocab), "  ": len(vocab) + 1}
    (out / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (out / "merges.txt").write_text("\n".join(lines), "utf-8")
    (out / "added_tokens.json").write_text(json.dumps(added), "utf-8")
