"""What the runs of ablation.py have found: tables for README.md, and assets/ablation.png."""

import json
import statistics
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from experiments.ablation import BACKBONES, RESULTS, STUDIES, Config
from experiments.encoded_scenes import fingerprint
from experiments.run_log import COLORS

# Final losses of the stages with Phi-2 (paper, table 4); "vanish": its word for the gradient's end.
PAPER = {
    "full": "2.620, 2.343, 1.125, 1.330", "no LoRA": "2.620, not told, vanish",
    "no input LayerNorm": "2.839, 2.555, 1.344, vanish", "no RMSNorm": "2.747, vanish",
    "no QK-norm": "vanish",
}  # fmt: skip
METRICS = {"caption F1": "caption_f1", "VQA": "vqa", "refer": "refer_iou50",
           "identify": "identify", "detection F1": "detection_f1",
           "grounding F1": "grounding_f1"}  # fmt: skip
STAGES = ("1", "2", "3", "4")
VARIANT_COLORS = (*COLORS, "#e08a1e")
WIDTH, HEIGHT, MARGIN, LEGEND = 900, 400, 50, 40
Runs = dict[str, list[dict]]  # of each variant


def read_runs(study: str) -> Runs:
    """The results of a study with the shipped weights, variants as STUDIES has them; those without
    a run are left out."""
    runs: Runs = {name: [] for name in STUDIES[study]}
    for path in sorted((RESULTS / study).glob("*.json")):
        run = json.loads(path.read_text("utf-8"))
        if run["weights"] == fingerprint(Config.weights, BACKBONES):
            runs[run["variant"]].append(run)
    return {name: found for name, found in runs.items() if found}


def loss_of(run: dict, stage: str) -> float | None:
    return run["stages"][stage]["loss"]


def metric_of(run: dict, name: str) -> float | None:
    value = run[METRICS[name]]
    return value["mean"] if isinstance(value, dict) else value


def spread(values: list[float | None]) -> str:
    """Mean and standard deviation over the seeds; what is not finite in one of them has neither."""
    if None in values:
        return "not finite"
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def norms_table(runs: Runs) -> str:
    """How each variant trained: losses, the paper's, gradients, and fp16 over all stages."""
    rows = []
    for name, found in runs.items():
        stages = [stage for run in found for stage in run["stages"].values()]
        middle = statistics.median(stage["grad_norm_median"] or 0 for stage in stages)
        largest = max(stage["grad_norm_max"] or 0 for stage in stages)
        bad = statistics.mean(stage["fp16_bad"] for stage in stages)
        lost = [stage["fp16_lost"] for stage in stages if stage["fp16_lost"] is not None]
        rows.append([
            name, *(spread([loss_of(run, stage) for run in found]) for stage in STAGES),
            PAPER[name], f"{middle:.2f}, {largest:.1f}",
            f"{statistics.mean(lost):.2%}" if lost else "", f"{bad:.0%}",
            f"{max(stage['largest_activation'] for stage in stages):.0f}",
        ])  # fmt: skip
    head = ["", *(f"loss, stage {stage}" for stage in STAGES), "the paper's, with Phi-2",
            "gradient's norm: median, largest", "of it lost in fp16", "not finite in fp16",
            "largest activation"]  # fmt: skip
    return table(head, rows)


def metrics_table(runs: Runs) -> str:
    rows = [[f"{name} ({len(found)})",
             *(spread([metric_of(run, metric) for run in found]) for metric in METRICS)]
            for name, found in runs.items()]  # fmt: skip
    return table(["after stage 4 (runs)", *METRICS], rows)


def ablation_section() -> str:
    """Both tables and the picture; other studies as further rows."""
    runs = read_runs("norms")
    if not runs:
        return "Not run yet with the shipped weights."
    others = {name: found for study in STUDIES if study != "norms"
              for name, found in read_runs(study).items()}  # fmt: skip
    picture = "![losses and scores without each part](assets/ablation.png)"
    return "\n\n".join([norms_table(runs), metrics_table(runs | others), picture])


# ---- the picture ----
def draw_ablation(path: Path) -> None:
    """Losses of each stage and scores after the last, a dot a run, as a PNG. None without runs."""
    runs = read_runs("norms")
    if not runs:
        return
    losses = {f"stage {stage}": {name: [loss_of(run, stage) for run in found]
                                 for name, found in runs.items()} for stage in STAGES}  # fmt: skip
    scores = {metric: {name: [metric_of(run, metric) for run in found]
                       for name, found in runs.items()} for metric in METRICS}  # fmt: skip
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, name in enumerate(STUDIES["norms"]):
        x = MARGIN + number * (WIDTH - MARGIN) // len(STUDIES["norms"])
        draw.ellipse((x, 14, x + 8, 22), VARIANT_COLORS[number])
        draw.text((x + 14, 18), name, "black", font, anchor="lm")
    draw_panel(draw, (MARGIN, int(0.4 * WIDTH)), "final loss", losses)
    draw_panel(draw, (int(0.4 * WIDTH) + MARGIN, WIDTH - MARGIN // 2), "score", scores)
    image.save(path)


def draw_panel(
    draw: ImageDraw.ImageDraw, sides: tuple[int, int], title: str,
    groups: dict[str, dict[str, list[float | None]]],
) -> None:  # fmt: skip
    """Dots from zero upwards, group by group, in each a column a variant. Not finite: no dot."""
    left, right = sides
    top, bottom, font = LEGEND + 30, HEIGHT - MARGIN, ImageFont.load_default(12)
    values = [v for group in groups.values() for many in group.values() for v in many]
    highest = max((v for v in values if v is not None), default=0) or 1
    draw.text((left, LEGEND + 10), title, "black", font, anchor="lm")
    for part in range(5):
        y = bottom - (bottom - top) * part / 4
        draw.line((left, y, right, y), "#dddddd")
        draw.text((left - 6, y), f"{highest * part / 4:.2f}", "black", font, anchor="rm")
    width = (right - left) / len(groups)
    columns = list(STUDIES["norms"])
    for place, (label, group) in enumerate(groups.items()):
        draw.text((left + (place + 0.5) * width, bottom + 12), label, "black", font, anchor="mm")
        for name, many in group.items():
            column = columns.index(name)
            x = left + (place + (column + 1) / (len(columns) + 1)) * width
            for value in (value for value in many if value is not None):
                y = bottom - (bottom - top) * value / highest
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), VARIANT_COLORS[column])
