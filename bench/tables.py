"""The committed results as tables: `python -m bench.tables > docs/measurements.md`.

Those of a second machine, `bench/results/xeon`, stand below those of the first. Those of a GPU, `bench/results/gpu`,
come behind the others where there are any.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import layer, roofline
from bench.harness import UNIT
from bench.teleport import GRAD_NORM, LOOKAHEAD, PUBLISHED, PUBLISHED_LEAN, STANDARDISE
from bench.training import PLAIN, TELEPORTED
from bench.training import PUBLISHED as PUBLISHED_RULE

RESULTS = Path(__file__).parent / "results"
Results = dict[str, Any]

TELEPORT_TEXT = """## A teleport

`python -m bench.teleport`, file `bench/results/teleport.json`. In units of one forward+backward pass on the same batch,
measured right before in the same run; set-up and the writing of the weights included. `Standardise` is in closed form,
with both refits; the searches and the published algorithm take ten steps, and are what "faster" compares. The last (SVD
pseudo-inverse per layer and step, first-order inverse, double backward) is written in `bench/baselines.py` in two
readings: as its authors' program differentiates, through everything, and leaner, with ∇L taken at fixed weights.
"""
SECOND_MACHINE_TEXT = """The same with `--rounds 7 --out bench/results/xeon/teleport.json` on another machine:
"""
PRESENT_TEXT = """The same of the present program, with `Standardise`, on another day's machine of the first kind,
`--out bench/results/present/teleport.json`; the two above are of the program before its report had noise and weights:
"""
TRAINING_TEXT = """## Training on MNIST digits

`python -m bench.training --data-dir DIR`, file `bench/results/training.json`. 10,000 digits, 8,000 of them for
training, 784-512-512-10, LeakyReLU 0.1, no bias, batch 20, plain SGD, 8 epochs; the teleports of `Teleporter` without
its bounds on weights and noise, three of 200 samples at the start of epoch 0, with 200 more each as their holdout;
means over five seeds, wall-clock with teleports and with two processes at a time. The published rule teleports as often
on as many samples, at the largest of four fixed rates that overflowed on no seed.
"""
TARGET_TEXT = """Wall-clock to the end of the first epoch with a train loss no larger than a given one, teleports
included, mean over the seeds:
"""
AGAIN_TEXT = """## The study of optimizers, trained twice

`python -m bench.evidence_again FOLDER`, file `bench/results/again.json`: the runs of
[docs/experiments.md](experiments.md#is-it-worth-it), and those of another time, of one go of {minutes:.0f} minutes in
which the runs that refuse all their teleports were trained to the end as well. The same are those that have all losses,
accuracies and teleports in common to the last digit kept, five; the factors are how many times as long a run's training
took that other time.
"""
LAYER_TEXT = """## The operator

`python -m bench.layer`, file `bench/results/layer.json`. `teleport_layer` forward and backward, float32, one CPU
thread, against the formula as one would write it with a Cholesky factor, its plain-torch twin, which takes an SVD in
float64, and the same with one in float32, all by autograd. The operator checks its arguments and its result besides:
with a few samples that and the calls themselves are most of its time.
"""

GPU_TEXT = """## On a GPU

`bench/gpu.sh`, files in `bench/results/gpu/`. Times of a whole teleport are wall-clock with a wait for the device
before and after, all others the device's own.
"""
GPU_TELEPORT_TEXT = """### A teleport of ten steps

The first call of a shape runs kernel by kernel, the second captures its CUDA graph, the others replay it. A step is a
tenth of what twenty steps cost more than ten, in forward+backward passes on the same batch.
"""
GPU_LAYER_TEXT = """### The operator

`teleport_layer` forward and backward: with the compiled kernels, on torch's own, and the same formula as one would
write it with a Cholesky factor, plain and compiled by torch. What torch compiles is timed against the operator alone,
in rows of its own. The last column is the time that the counted work must take at the ceilings of the same run, as a
share of ours.
"""
GPU_PRODUCT_TEXT = """### Float32 products

In float32's accuracy, square, with the ceilings that the library reached: {ceilings}.
"""
GPU_TRAINING_TEXT = """### Training

One process; the arms of a seed share split, initial weights and order of batches.
"""


def load(name: str, folder: Path = RESULTS) -> Results:
    with (folder / f"{name}.json").open(encoding="utf-8") as file:
        return json.load(file)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured table, numbers to the right."""
    lines = [header, ["---", *("--:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def teleport_table(results: Results) -> str:
    rows = []
    for name, shape in results["shapes"].items():
        units = {label: timing["units"] for label, timing in shape["timings"].items()}
        ours = units[GRAD_NORM]
        rows.append(
            [
                f"`{name}`",
                *(f"{units[label]:.1f}" if label in units else "–" for label in STANDARDISE),
                f"{ours:.1f}",
                f"{units[LOOKAHEAD]:.1f}",
                f"{units[PUBLISHED]:.0f}",
                f"{units[PUBLISHED_LEAN]:.0f}",
                f"{units[PUBLISHED] / ours:.1f}×",
                f"{units[PUBLISHED_LEAN] / ours:.1f}×",
            ]
        )
    ours = ("shape", "standardise, last", "standardise, all", "`grad_norm`", "`lookahead`")
    return table((*ours, "published", "published, lean", "faster", "faster than lean"), rows)


def training_table(results: Results) -> str:
    labels = {PLAIN: "plain SGD", TELEPORTED: "teleported", PUBLISHED_RULE: "published rule"}
    rows = [
        [
            f"`{name}`, {label}",
            f"{means['train_loss']:.4f}",
            f"{means['validation_loss']:.3f}",
            f"{100 * means['validation_accuracy']:.2f} %",
            f"{means['seconds']:.1f} s",
        ]
        for name, shape in results["shapes"].items()
        for key, label in labels.items()
        for means in [shape["means"][key]]
    ]
    return table(("run", "train loss", "validation loss", "validation accuracy", "wall-clock"), rows)


def target_table(results: Results) -> str:
    rows = [
        [
            f"`{name}`, {shape['shape']['target_loss']:g}",
            *(_seconds(shape["means"][key]["seconds_to_target_loss"]) for key in (PLAIN, TELEPORTED, PUBLISHED_RULE)),
        ]
        for name, shape in results["shapes"].items()
    ]
    return table(("run, train loss", "plain SGD", "teleported", "published rule"), rows)


def again_table(results: Results) -> str:
    rows = []
    for name, problem in results["problems"].items():
        factors = problem["seconds, other / committed"]
        counts = (problem["runs"], problem["same"], problem["in one alone"])
        rows.append([name, *map(str, counts), *(f"{factors[key]:.2f}×" for key in ("least", "median", "largest"))])
    header = ("problem", "runs of both times", "the same", "runs of one time", "factor, least", "median", "largest")
    return table(header, rows)


def layer_table(results: Results) -> str:
    contestants = list(next(iter(results["shapes"].values()))["timings"])
    rows = [
        [f"`{name}`", *(f"{1e3 * shape['timings'][label]['seconds']:.2f} ms" for label in contestants)]
        for name, shape in results["shapes"].items()
    ]
    return table(("shape", *contestants), rows)


def gpu_teleport_table(results: Results) -> str:
    rows = []
    for name, shape in _measured(results):
        seconds = {label: timing["seconds"] for label, timing in shape["timings"].items()}
        faster = seconds[PUBLISHED] / seconds[GRAD_NORM] if PUBLISHED in seconds else None
        rows.append(
            [
                f"`{name}`",
                _milliseconds(shape["searches"][GRAD_NORM]["seconds of the first call"]),
                _milliseconds(shape["searches"][GRAD_NORM]["seconds of the second call"]),
                _milliseconds(seconds[GRAD_NORM]),
                _milliseconds(seconds[LOOKAHEAD]),
                f"{shape['requirements']['units of one step']['value']:.2f}",
                _milliseconds(seconds[UNIT]),
                _milliseconds(seconds.get(PUBLISHED)),
                "" if faster is None else f"{faster:.0f}×",
            ]
        )
    header = ("shape", "first call", "second", "`grad_norm`", "`lookahead`", "a step", UNIT, "published", "faster")
    return table(header, rows)


def gpu_layer_table(results: Results) -> str:
    contestants = (UNIT, layer.OPERATOR, layer.ON_TORCH, layer.EAGER, layer.COMPILED)
    rows = []
    for name, shape in _measured(results):
        seconds = {label: timing["seconds"] for label, timing in shape["timings"].items()}
        share = shape["requirements"]["share of the ceilings"]["value"]
        rows.append([f"`{name}`", *(_milliseconds(seconds.get(key)) for key in contestants), f"{100 * share:.0f} %"])
    return table(("shape", *contestants, "ceilings"), rows)


def product_table(results: Results) -> str:
    rows = []
    for name, shape in _measured(results):
        theirs, ours = (shape["ratios"][f"{label}, TFLOP/s"] for label in (roofline.LIBRARY, roofline.OURS))
        speedup = shape["requirements"]["faster than the library, times"]["value"]
        rows.append([f"`{name}`", f"{theirs:.1f} TFLOP/s", f"{ours:.1f} TFLOP/s", f"{speedup:.2f}×"])
    return table(("shape", roofline.LIBRARY, roofline.OURS, "faster"), rows)


def page() -> str:
    """docs/measurements.md."""
    sections = ["# Measurements", "Made by `python -m bench.tables` from the files in `bench/results/`."]
    teleport, training = load("teleport"), load("training")
    sections += [TELEPORT_TEXT.rstrip(), teleport_table(teleport), _machine(teleport)]
    elsewhere = load("teleport", RESULTS / "xeon")
    sections += [SECOND_MACHINE_TEXT.rstrip(), teleport_table(elsewhere), _machine(elsewhere)]
    present = load("teleport", RESULTS / "present")
    sections += [PRESENT_TEXT.rstrip(), teleport_table(present), _machine(present)]
    sections += [TRAINING_TEXT.rstrip(), training_table(training), TARGET_TEXT.rstrip(), target_table(training)]
    sections += [_machine(training)]
    again = load("again")
    sections += [AGAIN_TEXT.format(**again).rstrip(), again_table(again), _machine(again)]
    operator = load("layer")
    sections += [LAYER_TEXT.rstrip(), layer_table(operator), _machine(operator)]
    return "\n\n".join(sections + gpu_sections(RESULTS / "gpu"))


def gpu_sections(folder: Path) -> list[str]:
    """The sections of the benchmarks whose results the folder holds."""
    sections = []
    parts: dict[str, tuple[str, list[Callable[[Results], str]]]] = {
        "teleport": (GPU_TELEPORT_TEXT, [gpu_teleport_table]),
        "layer": (GPU_LAYER_TEXT, [gpu_layer_table]),
        "roofline": (GPU_PRODUCT_TEXT, [product_table]),
        "training": (GPU_TRAINING_TEXT, [training_table, target_table]),
    }
    for name, (text, tables) in parts.items():
        if not (folder / f"{name}.json").exists():
            continue
        results = load(name, folder)
        ceilings = results.get("settings", {}).get("ceilings")
        said = text.format(ceilings=_describe(ceilings)) if name == "roofline" else text
        sections += [said.rstrip(), *(make(results) for make in tables), _machine(results)]
    return [GPU_TEXT.rstrip(), *sections] if sections else []


def _measured(results: Results) -> list[tuple[str, Results]]:
    """The shapes whose checks passed, and which so have timings."""
    return [(name, shape) for name, shape in results["shapes"].items() if "timings" in shape]


def _describe(ceilings: Results) -> str:
    return roofline.describe(roofline.Ceilings(**ceilings))


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _seconds(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds:.1f} s"


def _machine(results: Results) -> str:
    machine = results.get("machine") or next(iter(results["shapes"].values()))["seeds"][0]["machine"]
    return f"Machine: {machine}"


if __name__ == "__main__":
    print(page())
