"""Makes the miniature's backbones: what stands in for the pre-training of EVA, BLIP-2 and Phi-2.

    python miniature/pretrain.py                     all parts, one after the other
    python miniature/pretrain.py part=vision         one of: tokenizer, vision, projection, language

tokenizer   a byte-level BPE from the world's texts (bpe.py), a few seconds
vision      ViT and Q-Former together learn to write scenes out (pretrain_vision.py)
projection  the first of the two linear maps behind them (pretrain_projection.py), a minute
language    Phi learns the world's texts without pictures (pretrain_language.py)

The two long parts, vision and language, can run side by side. They overwrite miniature/weights, on
which the shipped stages stand: train those anew afterwards. No scene of theirs returns in stages 1
to 4, and none has a held-out pair of shape and color; but half of the pictures have their color
channels shuffled, and then no color is told.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.command_line import exit_code
from miniature.bpe import pretrain_tokenizer
from miniature.pretrain_language import pretrain_language
from miniature.pretrain_projection import pretrain_projection
from miniature.pretrain_vision import pretrain_vision
from miniature.steps import locked
from model import ModelConfig

PARTS = {
    "tokenizer": pretrain_tokenizer,
    "vision": pretrain_vision,
    "projection": pretrain_projection,
    "language": pretrain_language,
}


def pretrain(arguments: list[str]) -> None:
    """The parts that the arguments name. Raises ValueError for what is no part, and for a part that
    another process is making."""
    out = Path(__file__).resolve().parent / "weights"
    chosen = arguments[0].removeprefix("part=") if arguments else "all"
    if len(arguments) > 1 or chosen not in ("all", *PARTS):
        parts = ", ".join(f"part={name}" for name in PARTS)
        raise ValueError(f"say {parts} or nothing, not {' '.join(arguments)}")
    out.mkdir(parents=True, exist_ok=True)
    config = asdict(ModelConfig.preset("mini", stage=0))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    for name, make in PARTS.items():
        if chosen in ("all", name):
            with locked(out / f"{name}.lock"):
                make(out)


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    return exit_code(lambda: pretrain(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
