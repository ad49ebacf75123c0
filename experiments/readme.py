"""Writes the numbers of README.md: python experiments/readme.py

Each of its tables and outputs stands between two comments, <!-- name --> and <!-- /name -->, and is
made anew from experiments/results/, from the log of each shipped stage and from the code; so are
loss.png, speed.png, architecture.png and ablation.png in assets/.
"""

import json
import re
import subprocess
import sys
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image, ImageDraw, ImageFont

from experiments.ablation_report import METRICS, ablation_section, draw_ablation, metric_of
from experiments.architecture import draw_architecture, shape_table, shapes
from experiments.run_log import COLORS, draw_losses
from experiments.speed import CAPTION_TOKENS
from model import ModelConfig, TinyGPTV
from train import set_trainable

LEARNS = {
    1: "projections, norms of Phi",
    2: "the same and LoRA",
    3: "the same",
    4: "the same, doubled resolution",
}


def result(name: str) -> dict:
    """What an experiment has kept in experiments/results/ under this name."""
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text("utf-8"))


def cell(value: float | None) -> str:
    """A score in a table; empty for what was not asked."""
    return "" if value is None else f"{value:.3f}"


def stage_table() -> str:
    """One row a stage: what learns, how many parameters, how long it took, what comes of it."""
    lines = [
        "| stage | learns | parameters | steps | seconds | caption F1 | VQA | refer | identify "
        "| detection F1 | grounding F1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, learns in LEARNS.items():
        folder = ROOT / "miniature" / "weights" / f"stage{stage}"
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        model = TinyGPTV.from_pretrained(folder)
        set_trainable(model)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        effort = f"{parameters:,} | {log[-1]['step']} | {log[-1]['seconds']:.0f}"
        scores = " | ".join(metric_cells(result(f"world_test_stage{stage}")))
        lines.append(f"| {stage} | {learns} | {effort} | {scores} |")
    return "\n".join(lines)


def metric_cells(scores: dict) -> list[str]:
    """The six scores of a result of evaluate.py."""
    return [cell(metric_of(scores, name)) for name in METRICS]


def score_table() -> str:
    """The last stage on pictures of each kind."""
    kinds = {
        "test scenes": "world_test_stage4",
        "held-out pairs": "world_held_stage4",
        "test scenes, blind": "world_test_stage4_blind",
        "foreign pictures": "foreign_records_stage4",
        "test scenes, int8": "world_test_stage4_weights-int8",
    }
    lines = [
        "| stage 4 on | pictures | caption F1 | VQA | refer | identify | detection F1 "
        "| grounding F1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, name in kinds.items():
        scores = result(name)
        lines.append(f"| {kind} | {scores['n']} | " + " | ".join(metric_cells(scores)) + " |")
    kinds_of_vqa = [kind for kind in result("world_test_stage4")["vqa"] if kind != "mean"]
    lines += ["", "| questions of stage 4 about | " + " | ".join(kinds_of_vqa) + " |",
              "|---" * (len(kinds_of_vqa) + 1) + "|"]  # fmt: skip
    for kind, name in list(kinds.items())[:3]:
        vqa = result(name)["vqa"]
        lines.append(f"| {kind} | " + " | ".join(cell(vqa[k]) for k in kinds_of_vqa) + " |")
    return "\n".join(lines)


def weakest() -> str:
    """What the miniature does worst: a kind of question, and a task."""
    scores = result("world_test_stage4")
    kinds = {kind: value for kind, value in scores["vqa"].items() if kind != "mean"}
    tasks = {name.split()[0]: metric_of(scores, name) for name in METRICS if name != "VQA"}
    (kind, answered), (task, done) = (min(some.items(), key=itemgetter(1))
                                      for some in (kinds, tasks))  # fmt: skip
    return (f"Of the kinds of question the miniature is weakest at `{kind}` ({answered:.3f}), of "
            f"the tasks at `{task}` ({done:.3f}).")  # fmt: skip


def size_table() -> str:
    """The model of the official size: loading, memory and speed."""
    lines = [
        "| weights in | picture | read the files | load, cold | load, warm | first token "
        "| tokens/s | model | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in result("official_sized")["runs"]:
        lines.append(
            f"| {run['dtype']} | {run['image_size']} px | {run['read_seconds_cold']} s "
            f"| {run['load_seconds_cold']} s | {run['load_seconds_warm']} s "
            f"| {run['first_token_seconds']} s | {run['tokens_per_second']} "
            f"| {run['model_gb']} GB | {run['peak_gb']} GB |"
        )
    return "\n".join(lines)


def speed_table() -> str:
    """Speed of the official size on a CPU, in turns."""
    speed = result("speed")
    columns = {"token": "a token", "share": "of the bandwidth", "prefill": "prompt of 64 tokens",
               "picture_224": "picture, 224 px", "picture_448": "448 px",
               "caption": "picture to 20 words",
               "bandwidth": "bandwidth around the whole turn"}  # fmt: skip
    forms = {"bandwidth": "{:.0f} GB/s", "share": "{:.0%}"}
    head = (f"{speed['cpu']}, {speed['threads']} threads; a token reads "
            f"{speed['gb_a_token']:.2f} GB of int8.")  # fmt: skip
    lines = [head, "", "| | " + " | ".join(columns.values()) + " |",
             "|---" * (len(columns) + 1) + "|"]  # fmt: skip
    for name, row in speed["variants"].items():
        cells = [forms.get(key, "{:.3f} s").format(row[key]) if key in row else ""
                 for key in columns]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if "llama.cpp Q8_0" in speed["variants"]:
        token, prompt = (speed["ratios"][f"{key}, llama.cpp Q8_0"] for key in ("token", "prefill"))
        lines += ["", f"llama.cpp's token takes {token:.2f} times as long as that of int8, its "
                  f"prompt {prompt:.2f} times."]  # fmt: skip
    lines += ["", "Activations as integers change what Phi's first layer adds by "
              f"{speed['activation_error']:.4%}."]  # fmt: skip
    if starts := speed.get("first_token"):
        lines[-1] += (" From the files to the first token about a picture of 224 px: "
                      + ", ".join(f"{name} {s:.1f} s" for name, s in starts.items()) + ".")
    return "\n".join(lines)


OTHER_RUNS = {
    "speed_slow": "The same CPU in an hour in which AMX was half as fast (others share the "
                  "machine), with a version of the code that took longer to start",
    "speed_vnni": "Another CPU, with a version earlier still",
}


def other_runs() -> str:
    """How the speed differs in another hour and on another CPU, a paragraph each."""
    plain, told = "bf16, fused attention", []
    for name, beginning in OTHER_RUNS.items():
        speed = result(name)
        ours, ratios, starts = speed["variants"]["int8"], speed["ratios"], speed["first_token"]
        pictures = " and ".join(f"{ratios[f'picture_{size}, {plain}']:.2f}" for size in (224, 448))
        token, prompt = (ratios[f"{key}, llama.cpp Q8_0"] for key in ("token", "prefill"))
        told.append(
            f"{beginning} ({speed['cpu']}; `experiments/results/{name}.json`). A token took "
            f"{ours['token']:.3f} s, {ours['share']:.0%} of the bandwidth, and with llama.cpp "
            f"{token:.2f} times as long, its prompt {prompt:.2f} times. Pictures of 224 and 448 px "
            f"were {pictures} times as fast as in bf16 with fused attention. To the first token it "
            f"took {starts['as it lies']:.1f} s as it lies and {starts['packed']:.1f} s packed."
        )
    return "\n\n".join(told)


BARS = {"tokens a second": "token", "seconds for a picture, 224 px": "picture_224",
        "seconds for a picture, 448 px": "picture_448",
        "seconds from a picture to 20 words": "caption"}  # fmt: skip
BAR_COLORS = dict(zip(("int8", "int8 as it lies", "bf16", "bf16, fused attention",
                       "dequantize, then multiply", "llama.cpp Q8_0"),
                      (*COLORS, "#999999", "#e08a1e")))  # fmt: skip


def draw_speed(path: Path) -> None:
    """The speed table as bars, a group a column, as a PNG."""
    variants = result("speed")["variants"]
    groups = {title: {name: 1 / row[key] if key == "token" else row[key]
                      for name, row in variants.items() if key in row}
              for title, key in BARS.items()}  # fmt: skip
    height = sum(26 + 20 * len(bars) for bars in groups.values()) + 20
    image = Image.new("RGB", (760, height), "white")
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default(13), 10
    for title, bars in groups.items():
        draw.text((10, y + 10), title, "black", font, anchor="lm")
        y += 22
        for name, value in bars.items():
            draw.text((200, y + 9), name, "black", font, anchor="rm")
            end = 210 + 470 * value / max(bars.values())
            draw.rectangle((210, y + 2, end, y + 16), BAR_COLORS[name])
            draw.text((end + 6, y + 9), f"{value:.2f}", "black", font, anchor="lm")
            y += 20
        y += 4
    image.save(path)


def memory_table() -> str:
    """Memory of an answer at the official size, and of quantize.py."""
    rows = result("memory")
    made, cpu = rows.pop("quantize.py"), rows.pop("cpu")
    lines = [f"{cpu}:", "", "| weights | loaded | after an answer about 448 px | peak |",
             "|---|---|---|---|"]  # fmt: skip
    for name, row in rows.items():
        lines.append(f"| {name} | {row['loaded']} GB | {row['at_the_end']} GB | {row['peak']} GB |")
    lines += ["", f"`quantize.py` took {made['seconds']} s and {made['peak']} GB for all of it."]
    return "\n".join(lines)


def largest_drop() -> float:
    """How much lower the quantized miniature's score is where it loses most."""
    whole, int8 = (all_scores(result(f"world_test_stage4{name}")) for name in ("", "_weights-int8"))
    return round(max(whole[name] - int8[name] for name in whole), 4)


def all_scores(scores: dict) -> dict[str, float]:
    """All scores of a result, those of the kinds of question among them."""
    return scores["vqa"] | {key: value for key, value in scores.items() if type(value) is float}


def aims_table() -> str:
    """What int8 was to reach, and what was measured, as far as it was."""
    speed, memory = result("speed"), result("memory")
    ours, ratios, starts = speed["variants"]["int8"], speed["ratios"], speed.get("first_token", {})
    plain, peer, made = "bf16, fused attention", "llama.cpp Q8_0", memory["quantize.py"]
    faster = "times as fast as"
    at_least = [
        ("a token's share of the bandwidth", 0.75, ours["share"], "{:.0%}"),
        (f"a token, {faster} llama.cpp", 1, ratios.get(f"token, {peer}"), "{:.2f}"),
        (f"a token, {faster} dequantizing, then multiplying", 20,
         ratios["token, dequantize, then multiply"], "{:.1f}"),
        (f"a prompt of 64 tokens, {faster} llama.cpp", 2.3, ratios.get(f"prefill, {peer}"),
         "{:.2f}"),
        (f"a picture of 224 px, {faster} bf16 with fused attention", 1.8,
         ratios[f"picture_224, {plain}"], "{:.2f}"),
        (f"a picture of 448 px, {faster} bf16 with fused attention", 2,
         ratios[f"picture_448, {plain}"], "{:.2f}"),
        (f"a picture to 20 words, {faster} bf16", 2.5, ratios["caption, bf16"], "{:.2f}"),
        ("answers of the miniature that are the same as in fp32", 0.99,
         result("agreement")["int8"]["same"], "{:.1%}"),
    ]  # fmt: skip
    at_most = [
        ("points off that score of the miniature which loses most", 0.005, largest_drop(),
         "{:.4f}"),
        ("error by activations as integers", 0.001, speed["activation_error"], "{:.4%}"),
        ("memory for an answer about 448 px", 4.6, memory["int8"]["peak"], "{:.2f} GB"),
        ("to the first token, weights as they lie", 2, starts.get("as it lies"), "{:.1f} s"),
        ("to the first token, weights packed", 10, starts.get("packed"), "{:.1f} s"),
        ("`quantize.py`, memory", 0.6, made["peak"], "{:.2f} GB"),
        ("`quantize.py`, for a GB of its files", 30 / 5.6,
         made["seconds"] / result("official_sized")["runs"][0]["files_gb"], "{:.1f} s"),
    ]  # fmt: skip
    lines = ["| | aim | measured | |", "|---|---|---|---|"]
    for sign, rows in (("≥", at_least), ("≤", at_most)):
        for what, aim, found, form in rows:
            if found is not None:
                missed = found < aim if sign == "≥" else found > aim
                cells = [what, f"{sign} {form.format(aim)}", form.format(found)]
                lines.append("| " + " | ".join([*cells, "missed" if missed else ""]) + " |")
    return "\n".join(lines)


def training_table() -> str:
    """The memory that a step of each stage needs, by the plan."""
    runs = result("training_memory")["runs"]
    ways = list(dict.fromkeys(run["way"] for run in runs))
    lines = ["| stage | rows of tokens | " + " | ".join(ways) + " |"]
    lines.append("|---" * (len(ways) + 2) + "|")
    for first in range(0, len(runs), len(ways)):
        row = runs[first : first + len(ways)]
        rows = "{stage} | {batch_size} of {tokens}".format(**row[0])
        lines.append(f"| {rows} | " + " | ".join(f"{run['total_gb']} GB" for run in row) + " |")
    return "\n".join(lines)


def efficiency_table() -> str:
    """Size, time and memory at the official size, beside what the paper tells (its table 3)."""
    with torch.device("meta"):
        model = TinyGPTV(ModelConfig.preset("full", stage=4))
    everything, phi = (sum(p.numel() for p in part.parameters()) / 1e9
                       for part in (model, model.phi))  # fmt: skip
    speed = result("speed")
    spoken = {name: row["caption"] / 20 for name, row in speed["variants"].items()
              if "caption" in row}  # fmt: skip
    tokens = {name.split()[0]: f"{row['token']:.3f}" for name, row in speed["variants"].items()
              if name in ("int8", "llama.cpp Q8_0")}  # fmt: skip
    memory, runs = result("memory"), result("training_memory")["runs"]
    training = {way: max(run["total_gb"] for run in runs if run["way"] == way)
                for way in ("plain", "micro-batches", "int8")}  # fmt: skip
    rows = {
        "parameters": (f"{everything:.2f} billion, Phi with its norms and LoRA {phi:.2f}",
                       "2.8 billion: the language model"),
        "seconds a word, 8 bits": (
            f"{spoken['int8']:.2f} on {speed['threads']} CPU cores: a picture in 20 words, taken "
            f"for {CAPTION_TOKENS} tokens",
            "0.067 (LLaVA 0.426, MiniGPT-4 0.300) on a GPU: not comparable"),
        "seconds a word, 16 bits": (f"{spoken['bf16']:.2f}, likewise", ""),
        "seconds a token, 8 bits": (", ".join(f"{name} {s}" for name, s in tokens.items()), ""),
        "memory, 8 bits": (f"{memory['int8']['peak']} GB",
                           "5.6 GB (LLaVA 22, MiniGPT-4 23.5)"),
        "memory, 16 bits": (f"{memory['bf16']['peak']} GB", "about 8 GB (its repository)"),
        "training memory, the largest stage": (
            "{plain} GB; {micro-batches} GB in micro-batches with checkpointing, {int8} GB "
            "in int8 as well".format(**training), "a card of 24 GB"),
    }  # fmt: skip
    lines = ["| | here | the paper |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {ours} | {theirs} |"
                              for name, (ours, theirs) in rows.items()])  # fmt: skip


def attention_table() -> str:
    """How much of the heat of a word or query lies in the box of what it is about."""
    found = result("attention")
    kinds = {"caption": "words of a caption", "refer": "the box that answers `refer`",
             "queries": "queries 8i to 8i + 7, object i from the left"}  # fmt: skip
    lines = ["| | heat in the box | hottest patch in it | chance |", "|---|---|---|---|"]
    for kind, words in kinds.items():
        values = (cell(found[kind][key]) for key in ("share", "hottest", "chance"))
        lines.append(f"| {words} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def agreement() -> str:
    """How many answers of the rounded miniature are those of the miniature itself."""
    found = result("agreement")
    lines = [f"Answers that are the same as in fp32, of {found['questions']:,} about test scenes, "
             "greedy:", "", "| | all | " + " | ".join(found["int8"]["by_task"]) + " |",
             "|---" * (len(found["int8"]["by_task"]) + 2) + "|"]  # fmt: skip
    for name in ("int8", "bf16"):
        shares = [found[name]["same"], *found[name]["by_task"].values()]
        lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join(lines)


def described() -> str:
    """What the first command prints."""
    command = [sys.executable, "generate.py", "--img", "assets/shapes.png"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return f"```\n{run.stdout.strip()}\n```"


def with_line_counts(text: str) -> str:
    """The README with the lines of each file in the table that begins | `file` | lines |."""

    def counted(row: re.Match) -> str:
        return f"| `{row[1]}` | {len((ROOT / row[1]).read_text('utf-8').splitlines())} |"

    return re.sub(r"^\| `(\w+\.py)` \| \d+ \|", counted, text, flags=re.MULTILINE)


def put(text: str, name: str, content: str) -> str:
    """The README with `content` between the comments of that name."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"README.md has no <!-- {name} --> ... <!-- /{name} -->")
    return re.sub(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.DOTALL)


def main() -> None:
    """Writes README.md and the pictures anew. Raises ValueError if it lacks one of the marks."""
    path = ROOT / "README.md"
    text = path.read_text("utf-8")
    text = put(text, "describe", described())
    stages = ROOT / "miniature" / "weights"
    draw_losses([stages / f"stage{stage}" for stage in LEARNS], ROOT / "assets" / "loss.png")
    architecture = draw_architecture(shapes("full"), shapes("mini"))
    architecture.save(ROOT / "assets" / "architecture.png")
    text = put(with_line_counts(text), "shapes", shape_table())
    text = put(text, "stages", stage_table() + "\n\n" + score_table())
    text = put(text, "weakest", weakest())
    text = put(text, "size", size_table())
    draw_speed(ROOT / "assets" / "speed.png")
    text = put(text, "speed", "\n\n".join([speed_table(), other_runs(), memory_table()]))
    text = put(text, "aims", aims_table())
    text = put(text, "attention", attention_table())
    text = put(text, "agreement", agreement())
    text = put(text, "training", training_table())
    text = put(text, "efficiency", efficiency_table())
    draw_ablation(ROOT / "assets" / "ablation.png")
    text = put(text, "ablation", ablation_section())
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
