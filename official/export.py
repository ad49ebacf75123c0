"""Writes what was trained here as a checkpoint that the official code loads:

    python official/export.py --weights runs/stage2 --out TinyGPT-V_for_Stage2.pth

Names, layout and container are the official ones; the optimizer's state is not exported.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.command_line import Parser, exit_code
from model import TinyGPTV, is_trainable
from official.checkpoints import collected, open_pretrained, replace_file
from official.weights import to_official

BERT_POSITIONS = 512  # the official checkpoints carry this buffer of the Q-Former's unused half


def read_checkpoint(folder: Path) -> tuple[TinyGPTV, dict[str, Tensor]]:
    """A model without its numbers, and what its checkpoint holds, in fp32 whatever the model would
    compute in: a Q-Former of its own is not rounded. Raises what `TinyGPTV.from_pretrained` does,
    and ValueError for a quantized model."""
    model, tensors = open_pretrained(folder, None, "cpu", torch.float32, copy=False)
    if model.config.int8:
        raise ValueError(f"{folder} is quantized; export what it was made from")
    wanted = ((name, tensor) for name, tensor in tensors
              if is_trainable(name) or name.startswith("qformer."))  # fmt: skip
    found = collected(wanted, model.state_dict())
    kept = {name for name in found if is_trainable(name)} | model.carried
    return model, {name: found[name] for name in found if name in kept}


def export_checkpoint(model: TinyGPTV, state: dict[str, Tensor], path: Path) -> int:
    """Writes the tensors of a model's checkpoint; returns how many they are."""
    tensors = {n: t.cpu().contiguous() for n, t in to_official(state, model.config).items()}
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(BERT_POSITIONS)[None]
    with replace_file(path) as part:
        torch.save({"model": tensors}, part)
    return len(state)


def main(arguments: list[str]) -> int:
    """Exit code: 0, 2 after a line on stderr that says what was wrong, or 130 after Ctrl-C."""
    parser = Parser(description="Export a checkpoint in the official format.", allow_abbrev=False)
    parser.add_argument("--weights", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")

    def work() -> None:
        given = parser.parse(arguments)
        if not given.out.parent.is_dir() or given.out.is_dir():
            raise ValueError(f"--out {given.out}: say a file in a folder that exists")
        model, state = read_checkpoint(given.weights)
        if model.load_report:
            print(model.load_report, file=sys.stderr)
        count = export_checkpoint(model, state, given.out)
        print(f"{given.out}: {count} tensors of stage {model.stage}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
