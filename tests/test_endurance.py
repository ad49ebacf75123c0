"""Many in a row: memory does not grow, and the last answer is as good as the first. And twice the
same: what is promised to repeat.

Promised on every machine: which records, scenes and wordings a seed means, and in which order.
Promised on one machine with one number of threads: the same weights and the same text, to the bit.
Not promised: the same last digits on another processor, another number of threads or another
version of torch, which add up in another order; greedy answers then differ where two words are
nearly as probable.
"""

import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import generate as cli
import train
from damaged import picture, small_config
from generate import Sampling, generate
from model import TinyGPTV
from test_model import write_tokenizer

ROOT = Path(__file__).parent.parent
MEGABYTES = 20  # more than that is a leak: what a single answer needs is given back
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")
pytestmark = pytest.mark.filterwarnings("ignore:.*answers cut")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(),
                                reason="memory is read from /proc")  # fmt: skip


def resident_mb() -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def random_picture(rng: random.Random) -> io.BytesIO:
    """Of any size, mode and format, like what people have."""
    mode, kind = rng.choice(MODES), "PNG"
    size = (rng.randint(1, 300), rng.randint(1, 300))
    if mode in ("RGB", "L", "CMYK"):
        kind = rng.choice(["JPEG", "TIFF"])
    image = Image.effect_noise(size, 80)
    file = io.BytesIO()
    (image.convert("L").convert(mode) if mode != "I;16" else Image.new(mode, size)).save(file, kind)
    file.seek(0)
    return file


def answers(model: TinyGPTV, number: int, tokens: int) -> list[str]:
    """As many answers, each to another question, half of them greedy."""
    said = []
    for n in range(number):
        task, text = [("vqa", f"what is number {n}?"), ("caption", ""), ("refer", "it")][n % 3]
        prompt = data.inference_prompt(task, text, model.stage)
        sampling = Sampling(temperature=n % 2, seed=n)
        said.append("".join(generate(model, [picture()], prompt, sampling, tokens)))
    return said


@needs_proc
def test_answers_in_a_row_leave_nothing_behind(small):
    model = TinyGPTV.from_pretrained(small)
    first = answers(model, 6, 8)
    before = resident_mb()
    for _ in range(5):
        assert answers(model, 6, 8) == first
    assert resident_mb() - before < MEGABYTES
    assert answers(TinyGPTV.from_pretrained(small), 6, 8) == first and len(set(first)) > 3


@needs_proc
def test_pictures_in_a_row_leave_nothing_behind():
    rng = random.Random(0)
    files = [random_picture(rng) for _ in range(50)]
    first = [data.preprocess(data.load_image(file), 112) for file in files]
    assert all(pixels.isfinite().all() and pixels.shape == (3, 112, 112) for pixels in first)
    before = resident_mb()
    for file, pixels in zip(files, first):
        file.seek(0)
        assert data.preprocess(data.load_image(file), 112).equal(pixels)
    assert resident_mb() - before < MEGABYTES


@needs_proc
@pytest.mark.slow
def test_200_answers_of_the_miniature_about_50_pictures(tmp_path, capsys):
    """The whole command line, weights and all, as often as a patient user types it. The last answer
    is that of a fresh process."""
    rng, told = random.Random(1), {}
    paths, asked = [], ["--ask", "what color is it?"]
    for n in range(50):
        paths.append(tmp_path / f"{n}.img")
        paths[-1].write_bytes(random_picture(rng).getvalue())
    for n in range(200):
        path = paths[n % 50]
        assert cli.main(["--img", str(path), *asked]) == 0
        said = capsys.readouterr().out
        assert told.setdefault(path, said) == said
        if n == 20:
            before = resident_mb()
    assert resident_mb() - before < 3 * MEGABYTES
    for path in paths[::20]:  # three of them, each in a process of its own
        alone = subprocess.run([sys.executable, ROOT / "generate.py", "--img", path, *asked],
                               capture_output=True, text=True)  # fmt: skip
        assert (alone.returncode, alone.stdout) == (0, told[path])


# ---- twice the same ----
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 40, 0.95, 1.1, seed=3)])
def test_the_same_seed_gives_the_same_text(small, sampling):
    prompt = data.inference_prompt("caption", "", 4)
    said = {"".join(generate(TinyGPTV.from_pretrained(small), [picture()], prompt, sampling, 20))
            for _ in range(2)}  # fmt: skip
    assert len(said) == 1 and len(said.pop()) > 5


def test_the_same_seed_gives_the_same_weights(tmp_path):
    """Dropout, batches and what has no weights yet follow from it."""
    written = []
    for n, seed in enumerate((7, 7, 8)):
        arguments = ["stage=2", "steps=2", "batch_size=2", "num_workers=0", f"seed={seed}"]
        assert train.main([*arguments, f"out={tmp_path / str(n)}"]) == 0
        written.append((tmp_path / str(n) / "model.safetensors").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_seed_means_the_same_records_on_every_machine(tmp_path):
    """Written down here: whoever changes the order changes every run that goes on after it."""
    keys = train.mixture_batches([1, 1, 1], [1, 1, 1], seed=42)
    assert [next(keys)[0] for _ in range(8)] == [
        (1, 0), (0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (0, 3),
    ]  # fmt: skip
    lines = [{"task": "instruct", "prompt": f"say {n}", "answer": f"{n}"} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_tokenizer(tmp_path)
    records, tokenizer = data.read_records(tmp_path / "a.jsonl"), data.Tokenizer(tmp_path)
    for stage, order in ((3, "3201424301"), (4, "1340232140")):  # each stage has its own
        rows = data.RecordDataset(records, data.RowSettings(stage, tokenizer, 28, 2), seed=42)
        labels = [rows[n]["labels"] for n in range(10)]
        said = [tokenizer.decode(row[row != data.IGNORE].tolist()) for row in labels]
        assert said == [f"{digit}###" for digit in order]


def test_init_is_seeded():
    """What has no weights yet: train.py sets the seed before."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(TinyGPTV(small_config(4)).state_dict())
    assert all(models[0][name].equal(tensor) for name, tensor in models[1].items())
