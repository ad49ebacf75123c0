"""What the runs of ablation.py have found: tables for README.md, and assets/ablation.png."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from experiments.ablation import FP16_BATCHES, RESULTS, STUDIES, Config, described, read_run
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
    """The results of a study with the shipped weights and the usual budget, variants as STUDIES has
    them, in the order of their seeds: of those seeds that all of them have been run with. Raises
    ValueError for a damaged file."""
    runs: dict[str, dict[int, dict]] = {name: {} for name in STUDIES[study]}
    for path in (RESULTS / study).glob("*.json"):
        run = read_run(path)
        name, seed = run["variant"], run["seed"]
        usual = described(Config(study=study), name, seed) | {"precision": run["precision"]}
        if name in runs and usual.items() <= run.items():
            runs[name][seed] = run
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    return {name: [found[seed] for seed in seeds] for name, found in runs.items()} if seeds else {}


def loss_of(run: dict, stage: str) -> float | None:
    """The final loss of a stage; None if it is not finite."""
    return run["stages"][stage]["loss"]


def metric_of(run: dict, name: str) -> float | None:
    """The score in one of METRICS; of VQA the mean over the kinds of question."""
    value = run[METRICS[name]]
    return value["mean"] if isinstance(value, dict) else value


def spread(values: list[float | None], sign: str = "") -> str:
    """Mean and standard deviation over the seeds; what is not finite in one of them has neither."""
    if None in values:
        return "not finite"
    mean = f"{statistics.mean(values):{sign}.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def of_all(summary: Callable, values: list[float | None], form: str) -> str:
    """A summary of the values in this form, under the same rule."""
    return "not finite" if None in values else f"{summary(values):{form}}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Cells as a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def losses_table(runs: Runs) -> str:
    """How each variant trained: what its edit alone costs, losses, the paper's, gradients."""
    rows = []
    for name, found in runs.items():
        norms = [[run["stages"][stage]["grad_norm_median"] for run in found] for stage in STAGES]
        largest = [run["stages"][stage]["grad_norm_max"] for run in found for stage in STAGES]
        bad = sum(run["stages"][stage]["bad_steps"] for run in found for stage in STAGES)
        rows.append([
            name, spread([found[0]["untrained"]]),
            *(spread([loss_of(run, stage) for run in found]) for stage in STAGES), PAPER[name],
            ", ".join(of_all(statistics.median, some, ".2f") for some in norms),
            of_all(max, largest, ".0f"), str(bad),
        ])  # fmt: skip
    head = ["", "untrained", *(f"loss, stage {stage}" for stage in STAGES),
            "the paper's, with Phi-2", "gradient's norm, stages 1 to 4", "its largest",
            "steps not finite"]  # fmt: skip
    return table(head, rows)


def fp16_table(runs: Runs) -> str:
    """What fp16 does to each variant, before a stage and after it, over all stages. What is tried
    are not the steps of the training, but some batches forward and backward (fp16.py)."""
    tried = f"batches not finite (of {FP16_BATCHES * len(STAGES)} a run)"
    rows = []
    for name, found in runs.items():
        cells = [name]
        for moment in (0, 1):
            seen = [run["stages"][stage]["fp16"][moment] for run in found for stage in STAGES]
            cells += [f"{statistics.mean(one['not_finite'] for one in seen):.0%}"]
            for key in ("lost", "lost_scaled"):
                lost = [one[key] for one in seen if one[key] is not None]
                cells += [f"{statistics.mean(lost):.2%}" if lost else ""]
            for key in ("activation", "score"):
                cells += [f"{max(one[key] or math.inf for one in seen):,.0f}"]
        rows.append(cells)
    columns = [tried, "gradient rounded to 0", "... with a loss scale",
               "largest activation in fp32", "largest q·k in fp32"]  # fmt: skip
    head = ["fp16", *(f"{column}, {moment}" for moment in ("before", "after")
                      for column in columns)]  # fmt: skip
    return table(head, rows)


def metrics_table(runs: Runs, full: list[dict]) -> str:
    """Scores, and in brackets what they are more than the full model's: the mean over the seeds
    that both have been run with."""
    of_seed = {run["seed"]: run for run in full}
    rows = []
    for name, found in runs.items():
        cells = [f"{name} ({len(found)})"]
        for metric in METRICS:
            scores = [metric_of(run, metric) for run in found]
            more = [score - metric_of(of_seed[run["seed"]], metric)
                    for score, run in zip(scores, found) if run["seed"] in of_seed]  # fmt: skip
            compared = more and found is not full
            cells += [spread(scores) + (f" ({spread(more, '+')})" if compared else "")]
        rows.append(cells)
    return table(["after stage 4 (runs)", *METRICS], rows)


def ablation_section() -> str:
    """The tables and the picture; other studies as further rows of the last table."""
    runs = read_runs("norms")
    if not runs:
        return "Not run yet with the shipped weights."
    others = {name: found for study in STUDIES if study != "norms"
              for name, found in read_runs(study).items()}  # fmt: skip
    picture = "![losses and scores without each part](assets/ablation.png)"
    scores = metrics_table(runs | others, runs["full"])
    return "\n\n".join([losses_table(runs), fp16_table(runs), scores, picture])


# ---- the picture ----
def draw_ablation(path: Path) -> None:
    """Losses of each stage and scores after the last, a dot a run, as a PNG. None without runs."""
    runs = read_runs("norms")
    if not runs:
        return
    losses = {f"stage {stage}": {name: [loss_of(run, stage) for run in found]
                                 for name, found in runs.items()} for stage in STAGES}  # fmt: skip
    scores = {metric.split()[0]: {name: [metric_of(run, metric) for run in found]
                                  for name, found in runs.items()} for metric in METRICS}
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
    """Dots from zero upwards, group by group, in each a column a variant. Not finite: a cross."""
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
            for value in many:
                if value is None:
                    draw.text((x, top - 8), "x", VARIANT_COLORS[column], font, anchor="mm")
                    continue
                y = bottom - (bottom - top) * value / highest
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), VARIANT_COLORS[column])
