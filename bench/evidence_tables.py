"""The tables of docs/experiments.md and docs/standardise.md, made from the files in bench/results/evidence.

    python -m bench.evidence_tables

A table stands between the lines `<!-- table NAME -->` and `<!-- end of table -->`; NAME.json is the file of its row.
What is made of several files has a NAME of its own, see `ACROSS`.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import starts_tables
from bench.evidence_files import read
from bench.evidence_plasticity import plasticity_table, rows_of
from bench.harness import RESULTS
from bench.tables import table
from experiments import spike
from experiments.classification import PLAIN
from experiments.gpt.runs import MUON, ROTATED, SOAP
from experiments.plasticity import arms
from experiments.plasticity.results import best_of
from experiments.starts.arms import ALL, INITS
from experiments.study import tables
from experiments.study.summary import summaries_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = EXPERIMENTS, STANDARDISE, SYMMETRIES, README = (
    "docs/experiments.md",
    "docs/standardise.md",
    "docs/symmetries.md",
    "README.md",
)
FOLDER = RESULTS / "evidence"
NOT_RUN = "Not run yet."
STUDY = "study"
MARKED = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(?=<!-- end of table -->)", re.DOTALL)

Document = dict[str, Any]
Runs = list[dict[str, Any]]


def write() -> None:
    """Put the tables of today's files into the pages."""
    for page in (ROOT / name for name in PAGES):
        page.write_text(filled(page.read_text(encoding="utf-8"), FOLDER), encoding="utf-8")


def filled(page: str, folder: Path) -> str:
    """The page with the table of each file between its markers, or a line that says that there is none yet."""

    def fill(found: re.Match[str]) -> str:
        if (of_several := ACROSS.get(found["name"])) is not None:
            return f"{found[1]}\n{of_several(folder)}\n\n"
        path = folder / f"{found['name']}.json"
        if not path.exists():
            return f"{found[1]}\n{NOT_RUN}\n\n"
        document = read(path)
        return f"{found[1]}\n{TABLES[document['experiment']](document)}\n\n{_origin(document)}\n\n"

    return MARKED.sub(fill, page)


def time_sentence(documents: Sequence[Document]) -> str:
    """How many minutes the rows took whose files say so."""
    timed = {document["row"]: document["minutes"] for document in documents if document["minutes"] is not None}
    study = timed.pop(STUDY, None)
    alone = "was not trained in one go" if study is None else f"took {study:.0f} minutes with its two processes"
    return (
        f"The rows of one process each took {sum(timed.values()):.0f} minutes together, half as long two at a time; "
        f"the study {alone}."
    )


def planar_table(document: Document) -> str:
    """A line a run: where gradient descent, with and without teleports, and Newton's method end."""
    runs = document["runs"]
    plain = runs[0]["losses"][-1]
    rows = [
        [
            run["label"],
            "" if run["seed"] is None else str(run["seed"]),
            str(len(run["losses"]) - 1),
            _number(run["losses"][-1]),
            "0" if run["losses"][-1] == 0 else f"{plain / run['losses'][-1]:.3g}",
            _range([jump["gradient_norm_after"] / jump["gradient_norm_before"] for jump in run["jumps"]], "×{:.2g}"),
        ]
        for run in runs
    ]
    header = ("method", "seed", "steps", "final loss", "plain / this", "‖∇L‖ at a teleport, median (range)")
    return table(header, rows)


def training_table(document: Document) -> str:
    """A line a curve: how it ends, and what its teleports do; medians (ranges) over the seeds."""
    rows = []
    for label, runs in _by_label(document["runs"]).items():
        finals = [run["epochs"][-1] for run in runs]
        teleports = [teleport for run in runs for teleport in run["teleports"]]
        rows.append(
            [
                label,
                _range([final["epoch"] for final in finals], "{:g}"),
                _range([_float(final["train_loss"]) for final in finals], "{:.3g}"),
                *_validation(finals),
                _range([growth(teleport) for teleport in teleports if teleport["gradient_norm_before"] is not None]),
                _range([worst_rise(run) for run in runs if run["teleports"]], "{:+.1%}"),
            ]
        )
    header = (
        "run",
        "epochs",
        "train loss",
        "validation loss",
        "accuracy",
        "‖∇L‖ at a teleport",
        "worst change of the train loss over an epoch with teleports",
    )
    return table(header, rows)


def growth(teleport: dict[str, Any]) -> float:
    """‖∇L‖ after a teleport over that before it."""
    return _float(teleport["gradient_norm_after"]) / teleport["gradient_norm_before"]


def worst_rise(run: dict[str, Any]) -> float:
    """The largest relative rise of the train loss over an epoch in which the run teleports."""
    epochs = run["epochs"]
    return max(
        _float(epochs[epoch + 1]["train_loss"]) / _float(epochs[epoch]["train_loss"]) - 1
        for epoch in {int(teleport["position"]) for teleport in run["teleports"]}
    )


def spike_table(document: Document) -> str:
    """A line a variant, medians over the seeds; what a rise adds to that of the variant it is compared with."""
    rises = spike.rises_of([spike.restore(run) for run in document["runs"]])
    known = {variant.label for variant in spike.variants(1, 1.0)}  # the record has two that are not made any more
    rows = []
    for variant in document["settings"]["variants"]:
        if variant["label"] not in known:
            continue
        own, base = rises[variant["label"]], rises[variant["base"]]
        rows.append(
            [
                variant["label"],
                variant["base"],
                variant["change"],
                f"{own.accepted} of {own.teleports}",
                f"×{own.gradient_norm:.3g}",
                f"{own.drift:.0e}",
                _percent(own.first_train),
                _percent(own.first_train - base.first_train),
                _percent(own.first_validation),
                f"{100 * own.first_accuracy:+.1f}",
                _percent(own.all_train),
                _number(own.end),
            ]
        )
    plain = rises[PLAIN]
    rows.insert(0, [PLAIN, *[""] * 10, _number(plain.end)])
    header = (
        "variant",
        "as",
        "but",
        "accepted",
        "‖∇L‖",
        "drift",
        "train",
        "of that, the difference",
        "validation",
        "accuracy",
        "train, all four",
        "train loss at the end",
    )
    return table(header, rows)


def trade_table(document: Document) -> str:
    """A line for each rate and variant, over the seeds."""
    header = (
        "rate",
        "but for",
        "rise at a teleport, mean",
        "largest",
        "accepted",
        "time of the run",
        "train loss",
        "validation loss",
    )
    rows = []
    for entry in document["trades"]:
        rises = entry["rises"]
        rows.append(
            [
                f"{entry['lr']:g}",
                entry["variant"],
                _percent(statistics.fmean(rises)) if rises else "",
                _percent(max(rises)) if rises else "",
                str(len(rises)),
                f"{statistics.fmean(entry['time_shares']):.1%}",
                _number(statistics.fmean(entry["train_losses"])),
                _number(statistics.fmean(entry["validation_losses"])),
            ]
        )
    return table(header, rows)


def guards_table(document: Document) -> str:
    """A line for each optimizer, rate and guard, over the seeds."""
    header = (
        "optimizer, rate",
        "guard",
        "teleports",
        "diverged",
        "worst train loss, teleported / plain",
        "train loss",
        "plain",
        "time of the run",
    )
    rows = [
        [
            f"{entry['optimizer']}, {entry['lr']:g}",
            entry["guard"],
            str(entry["teleports"]),
            str(entry["diverged"]),
            "" if entry["worst"] is None else f"{entry['worst']:.3f}",
            "" if entry["train_loss"] is None else _number(entry["train_loss"]),
            "" if entry["plain_loss"] is None else _number(entry["plain_loss"]),
            f"{entry['time_share']:.1%}",
        ]
        for entry in document["outcomes"]
    ]
    return table(header, rows)


def noise_table(document: Document) -> str:
    """A line for each setting and arm, against the plain runs of the same seeds."""
    header = (
        "activation",
        "optimizer, rate",
        "arm",
        "teleports accepted",
        *(f"accuracy under noise at {level:g}" for level in document["settings"]["levels"]),
        "‖W‖ / plain",
        "epochs / plain",
        "spikes",
    )
    rows = [
        [
            entry["activation"],
            f"{entry['optimizer']}, {entry['lr']:g}",
            entry["arm"],
            f"{entry['accepted']} of {entry['teleports']}" if entry["teleports"] else "",
            *("" if points is None else f"{points:+.1f}" for points in entry["noise"]),
            *("" if entry[name][0] is None else f"{entry[name][0]:.2f}" for name in ("norms", "epochs")),
            str(entry["spikes"]),
        ]
        for entry in document["outcomes"]
    ]
    return table(header, rows)


def transformer_table(document: Document) -> str:
    """A table a setting, a line for each arm at its best rate, warm-up and β₂."""
    header = ["arm", "rate", "warm-up", "β₂", "validation loss", "±"]
    header += ["steps to AdamW's", "time", "a step", "logits changed by"]
    found: dict[str, list[list[str]]] = {}
    for row in document["rows"]:
        cells = [row["arm"], f"{row['lr']:g}", str(row["warm_up"]), f"{row['beta2']:g}"]
        cells += [f"{row['last']:.3f}", f"{row['spread']:.3f}"]
        cells += ["never" if row[name] is None else f"{row[name]:.0%}" for name in ("steps_to", "time_to")]
        cells.append(f"×{row['step_time']:.2f}")
        found.setdefault(row["setting"], []).append([*cells, f"{row['inexact']:.0e}" if row["inexact"] else ""])
    return "\n\n".join(f"**{setting}**\n\n{table(header, rows)}" for setting, rows in found.items())


def advice_table(folder: Path) -> str:
    """README's answer to who should use it, from the files of starts and of plasticity."""
    starts, tasks, gpt = starts_tables.read_starts(folder), *(read(folder / f"{row}.json") for row in _OTHERS)
    new = "`Teleporter(model, optimizer)`"
    leaky = [f"{rule} {_epochs(starts, 'digits', 'LeakyReLU 0.1', rule, 0.01)}" for rule in ("sgd", "momentum", "adam")]
    smooth = [f"{sigma} {_epochs(starts, 'digits', sigma, 'sgd', 0.01)}" for sigma in ("tanh", "sigmoid")]
    regression = [_lowest(starts, "diabetes", sigma, "sgd") for sigma in ("LeakyReLU 0.1", "tanh")]
    slow = "a rate that is too small and must stay"
    rows = [
        ["a new MLP, LeakyReLU", new, "; ".join(leaky)],
        ["… tanh and sigmoid, SGD", new, "; ".join(smooth)],
        ["… four sigmoid layers, SGD", new, _epochs(starts, "digits, deep", "sigmoid", "sgd", 0.03)],
        ["… 784-512-512-10 on MNIST digits, SGD", new, _epochs(starts, "mnist", "LeakyReLU 0.1", "sgd", 0.1)],
        ["… 784-128-10 there", "no teleport", _epochs(starts, "mnist, narrow", "LeakyReLU 0.1", "sgd", 0.1)],
        ["… eight tanh layers, SGD", "an initialisation", _epochs(starts, "digits, deep tanh", "tanh", "sgd", 0.01)],
        ["… a regression, 10-64-64-1, SGD", "no teleport", "; ".join(regression)],
        [
            "a network that goes on to other tasks",
            '`teleporter.refresh((x, y))`, `Standardise(refit="all")`',
            "; ".join(_tasks(tasks, protocol, sigma) for protocol, sigma in _TOLD),
        ],
        ["a Transformer that stays with AdamW", "`EigenbasisTeleporter(model, optimizer)`", _steps(gpt)],
        [slow, '`method=Ascent("lookahead", …)`', "several times faster, see below"],
    ]
    return table(["situation", "call", "effect"], rows).replace("--:", "---")  # text, not numbers


_OTHERS = ("plasticity", "transformer")
_TOLD = (("random labels", "tanh"), ("random labels", "LeakyReLU 0.01"), ("relabelled", "tanh"))


def _epochs(documents: Sequence[Document], problem: str, activation: str, optimizer: str, level: float) -> str:
    """The epochs to a train loss of the standardised start, PyTorch's and the best of the initialisations."""
    found = starts_tables.epochs_of(documents, problem, activation, optimizer, level)
    least = min(found[arm] for arm in INITS if arm in found)
    ours, plain, best = (_finite(value) for value in (found["standardise"], found["plain"], least))
    return f"{ours} epochs to {level:g} (PyTorch's start {plain}, best initialisation {best})"


def _lowest(documents: Sequence[Document], problem: str, activation: str, optimizer: str) -> str:
    """The lowest validation loss from the standardised start, and from PyTorch's, each at its best rate."""
    setting = starts_tables.Setting(problem, activation, optimizer)
    rows = [row for document in documents for row in document["rows"] if starts_tables.Setting.of(row) == setting]
    found = {row["arm"]: row for row in rows}
    refused = f", {found[ALL]['refused']} of {found[ALL]['teleports']} refused" if found[ALL]["refused"] else ""
    ours, plain = (found[arm]["lowest"] for arm in (ALL, PLAIN))
    return f"{activation}: lowest validation loss {ours:.2f} (PyTorch's start {plain:.2f}){refused}"


def _finite(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "never"


def _steps(document: Document) -> str:
    """The share of AdamW's steps to its final loss, by setting, beside that of the optimizers to name first."""
    shares = {(row["setting"], row["arm"]): row["steps_to"] for row in document["rows"]}
    told = []
    for setting in dict.fromkeys(setting for setting, _ in shares):
        others = [f"{arm} {shares[setting, arm]:.0%}" for arm in (SOAP, MUON) if (setting, arm) in shares]
        ours = f"{shares[setting, ROTATED]:.0%} of the steps to AdamW's final loss"
        told.append(f"{setting}: {ours} ({', '.join(others)})")
    return "; ".join(told)


def _tasks(document: Document, protocol: str, activation: str) -> str:
    """The accuracy on the last tasks, and the share of predictions kept."""
    best = best_of(rows_of(document))
    ours = best[protocol, activation, arms.ANYHOW]
    others = {arm: best[protocol, activation, arm].last for arm in (arms.PLAIN, arms.RESET, arms.FRESH)}
    listed = ", ".join(f"{arm} {last:.1f}" for arm, last in others.items())
    return f"{protocol}, {activation}: {ours.last:.1f} % on the last tasks ({listed}), {ours.kept:.0f} % kept"


def study_tables(document: Document) -> str:
    """The study's own tables without their title, their headings below that of the section."""
    _, _, text = tables.page(summaries_of(document)).partition("\n\n")
    return re.sub("^#", "##", text, flags=re.MULTILINE)


TABLES: dict[str, Callable[[Document], str]] = {
    "booth": planar_table,
    "rosenbrock": planar_table,
    "regression": training_table,
    "mnist": training_table,
    "spike": spike_table,
    "trade": trade_table,
    "guards": guards_table,
    "noise": noise_table,
    "minima": training_table,
    "starts": starts_tables.best_rates_table,
    "plasticity": plasticity_table,
    "study": study_tables,
    "transformer": transformer_table,
}
ACROSS: dict[str, Callable[[Path], str]] = {
    "minutes": lambda folder: time_sentence([read(path) for path in sorted(folder.glob("*.json"))]),
    "advice": advice_table,
    "starts-default": starts_tables.default_table,
    "starts-guards": starts_tables.guards_table,
}


def _origin(document: Document) -> str:
    """What the numbers were made with, and in what time."""
    versions, seeds = document["versions"], document["settings"].get("seeds", [])
    parts = [f"Seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}" if seeds else "", document["data"]]
    parts += [f"symtele_cuda {versions['symtele_cuda']}", f"torch {versions['torch']}"]
    if document.get("minutes") is not None:
        parts.append(f"in {document['minutes']:.{0 if document['minutes'] >= 10 else 1}f} minutes")
    if "beginning_of" in document:
        parts.append(f"the beginning of the runs of {document['beginning_of']}")
    return ", ".join(part for part in parts if part) + "."


def _by_label(runs: Runs) -> dict[str, Runs]:
    labels = dict.fromkeys(run["label"] for run in runs)
    return {label: [run for run in runs if run["label"] == label] for label in labels}


def _validation(finals: Sequence[dict[str, Any]]) -> list[str]:
    """Loss and accuracy, empty where there is no validation set."""
    if all(final["validation_accuracy"] is None for final in finals):
        return ["", ""]
    return [
        _range([_float(final["validation_loss"]) for final in finals], "{:.3g}"),
        _range([final["validation_accuracy"] for final in finals], "{:.2%}"),
    ]


def _range(values: Sequence[float], form: str = "×{:.3g}") -> str:
    """The median, and the smallest and largest value where they differ."""
    if not values:
        return ""
    shown = [form.format(value) for value in (statistics.median(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _float(value: float | None) -> float:
    """A loss of a JSON file; null, what is not finite, comes back as infinity."""
    return math.inf if value is None else value


def _number(value: float) -> str:
    return f"{value:.2e}" if value and not 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{share:+.1%}" if abs(share) < 100 else f"×{share + 1:.1e}"


if __name__ == "__main__":
    write()
