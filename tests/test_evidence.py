"""The page of experiments says what the committed numbers say, and the script that makes them runs what is missing."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import shutil
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import evidence, evidence_again, evidence_cut, evidence_tables
from bench.evidence import ROWS, Place, Row
from bench.evidence_files import as_text, read
from bench.evidence_plasticity import plasticity_table, rows_of
from bench.tables import load
from experiments import __main__ as command_line
from experiments import classification, noise, planar
from experiments.data import Dataset
from experiments.plasticity.arms import ANYHOW, DORMANT, FRESH, PLAIN, RESET, SELECTED, SHRUNK
from experiments.plasticity.jobs import BOTH
from experiments.plasticity.results import Row as Learned
from experiments.plasticity.results import Setting, best_of, tuned_earlier
from experiments.study.jobs import DEFAULTS, FULL, Job, Study
from experiments.study.problems import Problem
from experiments.study.records import Check, Record, Teleport, Validation
from experiments.study.store import Store
from experiments.study.summary import summaries_of
from experiments.training import TeleportSettings, TrainingSettings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in evidence_tables.PAGES}
PAGE = PAGES[evidence_tables.EXPERIMENTS]
LARGEST = 300_000  # bytes of one file of numbers
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs symtele_cuda[demo]")


def numbers(name: str) -> dict:
    return read(evidence_tables.FOLDER / f"{name}.json")


def place_at(folder: Path) -> Place:
    return Place(folder, folder / "figures", folder / "results", data_dir=None, data=None)


# --- the page and the committed numbers ------------------------------------------------------------------------------


def test_the_page_s_tables_are_made_from_the_numbers() -> None:
    for page in PAGES.values():
        assert evidence_tables.filled(page, evidence_tables.FOLDER) == page


def test_every_row_has_its_command_its_table_and_its_figures_on_the_page() -> None:
    for row in ROWS:
        page = PAGES[row.page]
        assert f"python -m experiments {row.command}" in page
        assert f"<!-- table {row.name} -->" in page, row.name
        assert bool(re.search(rf"\(figures/{row.name}[\w-]*\.png\)", page)) == row.drawn, row.name
        arguments = [*row.arguments, *(["--data-dir", "DIR"] if row.data else [])]
        assert command_line.make_parser().parse_args(arguments).command == row.command
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_row_has_its_numbers_made_by_its_command() -> None:
    made = {path.stem for path in evidence_tables.FOLDER.glob("*.json")}
    assert made == {row.name for row in ROWS}
    for row in ROWS:
        document = numbers(row.name)
        assert document["row"] == row.name and document["arguments"] == list(row.arguments)
        assert (document["data"] is not None) == row.data
        assert (evidence_tables.FOLDER / f"{row.name}.json").stat().st_size < LARGEST, row.name


def test_every_figure_on_the_page_exists() -> None:
    named = set(re.findall(r"\(figures/([\w-]+)\.png\)", "".join(PAGES.values())))
    assert len(named) >= sum(row.drawn for row in ROWS)
    missing = {name for name in named if not (ROOT / "docs" / "figures" / f"{name}.png").is_file()}
    assert missing == set()


def test_the_stand_in_for_the_full_set_is_named() -> None:
    for row in ROWS:
        if row.data and row.name not in ("study", "starts-mnist"):
            assert numbers(row.name)["settings"]["data"] in numbers(row.name)["data"]


def test_rosenbrock_and_booth_show_what_they_must() -> None:
    for name, bound in (("rosenbrock", 1e-6), ("booth", None)):
        runs = numbers(name)["runs"]
        (plain,) = [run["losses"][-1] for run in runs if run["label"] == planar.PLAIN]
        teleported = [run["losses"][-1] for run in runs if run["label"] == planar.ASCENT]
        assert len(teleported) == 5
        assert max(teleported) < (plain / 10 if bound is None else bound)


def test_the_run_that_diverges_in_the_source_completes_here() -> None:
    document = numbers("mnist-batch-200")
    ends = {run["label"]: run["epochs"][-1] for run in document["runs"]}
    lost = [label for label, end in ends.items() if end["train_loss"] is None]
    assert len(lost) == 1 and lost[0].endswith("rate 0.01")
    ours = next(end for label, end in ends.items() if label.endswith("lookahead"))
    assert ours["epoch"] == document["settings"]["training"]["epochs"]
    assert ours["train_loss"] < ends["plain"]["train_loss"]


def test_the_page_on_plasticity_says_what_its_numbers_say() -> None:
    page = " ".join(PAGES[evidence_tables.STANDARDISE].split())
    rows = best_of(rows_of(numbers("plasticity")))

    def last(protocol: str, arm: str) -> list[float]:
        return [rows[protocol, activation, arm].last for activation in BOTH]

    def kept(protocol: str, arm: str) -> list[float]:
        return [rows[protocol, activation, arm].kept for activation in BOTH]

    anyhow, fresh, shrunk = "standardise, whatever is kept", "fresh network", "shrink and perturb 0.8"
    names, random = "relabelled", "random labels"
    tanh, leaky = last(names, "standardise")
    assert f"{tanh:.1f} % (tanh) and {leaky:.1f} % (LeakyReLU)" in page
    assert "against {:.1f} and {:.1f}".format(*last(names, fresh)) in page
    assert "{:.1f} and {:.1f} % against".format(*last(random, anyhow)) in page
    assert "% against {:.1f} and {:.1f}.".format(*last(random, fresh)) in page
    assert min(kept(names, "standardise")) >= 97.95
    assert min(rows[names, one, "standardise"].kept_least for one in ("tanh", "LeakyReLU 0.01")) >= 96
    assert "({:.1f} and {:.1f} %)".format(*last(random, "optimizer reset")) in page
    assert "({:.1f} and {:.1f} %) and keeps more".format(*last(random, shrunk)) in page
    both = [*kept(random, shrunk), *kept(random, anyhow)]
    assert "({:.0f} and {:.0f} % against {:.0f} and {:.0f} %)".format(*both) in page
    assert "{:.0f} to {:.0f} % of them stay".format(*kept("permuted inputs", anyhow)) in page
    for protocol in (names, random, "warm start"):
        assert all(ours >= theirs for ours, theirs in zip(last(protocol, anyhow), last(protocol, fresh), strict=True))


def test_the_page_on_gradual_changes_says_what_its_numbers_say() -> None:
    page = " ".join(PAGES[evidence_tables.STANDARDISE].split())
    whole, rows = (best_of(rows_of(numbers(name))) for name in ("plasticity", "plasticity-gradual"))
    bit_by_bit, online = "gradually relabelled", "online permuted"

    def both(
        protocol: str, arm: str, figure: Callable[[Learned], float], found: dict[Setting, Learned] = rows
    ) -> list[float]:
        return [figure(found[protocol, activation, arm]) for activation in BOTH]

    def last(row: Learned) -> float:
        return row.last

    def mean(row: Learned) -> float:
        return statistics.fmean(row.curve)

    def kept(row: Learned) -> float:
        return row.kept

    plain = both(bit_by_bit, PLAIN, last)
    assert "ends at {:.1f} % behind tanh and {:.1f} % behind LeakyReLU".format(*plain) in page
    assert "at a stroke at {:.1f} and {:.1f} (with".format(*both("relabelled", PLAIN, last, whole)) in page
    assert "A fresh network ends at {:.1f} and {:.1f}, the".format(*both(bit_by_bit, FRESH, last)) in page
    assert "standardised one at {:.1f} and {:.1f}. Behind".format(*both(bit_by_bit, ANYHOW, last)) in page
    ends = zip(both(online, PLAIN, lambda row: row.first), both(online, PLAIN, last), strict=True)
    assert "falls from {:.1f} to {:.1f} % and from {:.1f} to {:.1f}.".format(*itertools.chain(*ends)) in page
    assert "the standardised one has {:.1f} and {:.1f} %".format(*both(online, ANYHOW, mean)) in page
    assert "every 150 steps {:.1f} and {:.1f}, the".format(*both(online, FRESH, mean)) in page
    assert "plain one {:.1f} and {:.1f}.".format(*both(online, PLAIN, mean)) in page
    assert "Shrink and perturb ({:.1f} and {:.1f})".format(*both(online, SHRUNK, mean)) in page
    assert "reinitialization ({:.1f} and {:.1f})".format(*both(online, SELECTED, mean)) in page
    shares = [*both(online, SHRUNK, kept), *both(online, SELECTED, kept), *both(online, ANYHOW, kept)]
    assert "they keep {:.0f} and {:.0f}, and {:.0f} and {:.0f} %, the standardised network {:.0f} and {:.0f}:".format(
        *shares
    ) in page


def test_the_page_on_rates_and_other_optimizers_says_what_its_numbers_say() -> None:
    page = " ".join(PAGES[evidence_tables.STANDARDISE].split())
    everything = rows_of(numbers("plasticity"))
    rows, tuned = best_of(everything), tuned_earlier(everything)
    names, random = "relabelled", "random labels"

    def both(protocol: str) -> list[float]:
        return [rows[protocol, activation, SELECTED].last for activation in BOTH]

    assert "it ends at {:.1f} and {:.1f} %, with permuted".format(*both(names)) in page
    assert "inputs at {:.1f} and {:.1f}, and".format(*both("permuted inputs")) in page
    assert "at {:.1f} % behind tanh, with as much kept, but behind LeakyReLU at {:.1f}".format(*both(random)) in page
    (first, _, last), (first_random, _, last_random) = (tuned[one, "tanh", PLAIN] for one in (names, random))
    assert f"ends at {first:.1f} % with new names and at {first_random:.1f} on random labels" in page
    assert f"on the last ones at {last:.1f} and {last_random:.1f}." in page
    ours = [tuned[one, "tanh", ANYHOW] for one in (names, random)]
    assert "standardised one ends at {:.1f} and {:.1f} either way".format(*(three[0] for three in ours)) in page
    assert all(three[0] == three[2] for three in ours)
    assert "best on the tenth task at {:.1f} and {:.1f}.".format(*(three[1] for three in ours)) in page
    sgd = best_of(rows_of(numbers("plasticity-sgd")))
    ends = [sgd[one, "tanh", PLAIN] for one in (names, random)]
    assert f"from {ends[0].first:.1f} to {ends[0].last:.1f} % with new names" in page
    assert f"from {ends[1].first:.1f} to {ends[1].last:.1f} on random labels" in page
    relu = best_of(rows_of(numbers("plasticity-relu")))
    shown = [relu[names, "ReLU", arm].last for arm in (ANYHOW, PLAIN, DORMANT, FRESH)]
    assert "it ends at {:.1f} % (plain {:.1f}, ReDo {:.1f}, fresh {:.1f})".format(*shown) in page
    ours, shrunk, plain = (relu[random, "ReLU", arm] for arm in (ANYHOW, SHRUNK, PLAIN))
    assert f"random labels it ends at {ours.last:.1f} and keeps {ours.kept:.0f} % of the predictions" in page
    assert f"ends at {shrunk.last:.1f} and keeps {shrunk.kept:.0f}, the plain network at {plain.last:.1f}." in page
    mnist = best_of(rows_of(numbers("plasticity-mnist")))
    ends = {arm: [mnist[names, one, arm].last for one in BOTH] for arm in (PLAIN, RESET, ANYHOW, FRESH, SHRUNK)}
    assert "ends at {:.1f} % behind tanh and at {:.1f} behind LeakyReLU, with".format(*ends[PLAIN]) in page
    assert "optimizer at {:.1f} and {:.1f}, standardised at {:.1f}".format(*ends[RESET], ends[ANYHOW][0]) in page
    assert "and {:.1f}, a fresh one at {:.1f} and {:.1f}.".format(ends[ANYHOW][1], *ends[FRESH]) in page
    assert "is ahead with {:.1f} and {:.1f}, and".format(*ends[SHRUNK]) in page
    shares = [round(mnist[names, one, arm].kept) for arm in (SHRUNK, ANYHOW) for one in BOTH]
    assert "keeps {} and {} % of the predictions, the standardised network {} and {}.".format(*shares) in page


def test_the_page_on_control_says_what_its_numbers_say() -> None:
    page = " ".join(PAGES[evidence_tables.STANDARDISE].split())
    rows = best_of(rows_of(numbers("plasticity-control")))
    ours, plain, reset, fresh, shrunk = (rows["CartPole", "ReLU", arm] for arm in (ANYHOW, PLAIN, RESET, FRESH, SHRUNK))
    assert f"keeps {ours.kept:.0f} % of the values, and the return changes by {ours.jump:+.1f}" in page
    assert f"A fresh network loses {-fresh.jump:.1f} and shrink and perturb {-shrunk.jump:.1f}:" in page
    ends = [f"{row.last:.1f} ± {row.spread:.1f}" for row in (plain, ours)]
    assert f"ends at {ends[0]} %, the standardised one at {ends[1]}, with a new optimizer at {reset.last:.1f}" in page
    assert f"fresh one at {fresh.last:.1f}, shrunk and perturbed at {shrunk.last:.1f}." in page
    means = [statistics.fmean(row.curve) for row in (plain, reset, ours)]
    assert "the plain one has {:.1f} %, with a new optimizer {:.1f}, standardised {:.1f}.".format(*means) in page


# --- the files -------------------------------------------------------------------------------------------------------


def test_a_file_comes_back_rounded(tmp_path: Path) -> None:
    point = {"at": [1, 2], "loss": math.pi, "note": None, "seen": True}
    runs = [
        {"label": "a", "points": [{"epoch": epoch, **point} for epoch in (3, 4, 5)], "ends": [[1.0, 2.0], [3.0, 4.0]]},
        {"label": "b", "points": [{"epoch": epoch, **point} for epoch in (3, 3, 4)], "ends": []},
        {"label": "c", "points": [{"epoch": 0, **point, "inner": [point, point]}] * 2, "ends": [{}, {}]},
    ]
    document = {"row": "x", "settings": {"rates": [1e-12, 0.1234567]}, "runs": runs, "data": None}
    path = tmp_path / "x.json"
    path.write_text(as_text(document), encoding="utf-8")
    expected = json.loads(json.dumps(document).replace(str(math.pi), "3.1416").replace("0.1234567", "0.12346"))
    assert read(path) == expected
    assert len(path.read_text(encoding="utf-8").splitlines()) == 10  # one for each entry and each run
    with pytest.raises(ValueError, match="Out of range float values"):
        as_text({"loss": math.nan})


# --- the script ------------------------------------------------------------------------------------------------------


@needs_matplotlib
def test_a_row_is_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, place = Row("other-name", ("booth", "--seeds", "1"), minutes=0.1), place_at(tmp_path)
    assert evidence.run([row], place, processes=1) == []
    document = read(place.numbers(row))
    assert document["arguments"] == ["booth", "--seeds", "1"] and len(document["runs"]) == 3
    assert 0 < document["minutes"] < 5
    assert {path.name for path in place.figures.iterdir()} == {"other-name_curves.png", "other-name_trajectory.png"}
    assert evidence.is_done(row, place) and not evidence.is_done(replace(row, arguments=("booth",)), place)
    assert "(1 of 1" in capsys.readouterr().err
    assert evidence.run([row], place, processes=1) == []
    assert "done before" in capsys.readouterr().err
    evidence.forget([row], place)
    assert not evidence.is_done(row, place) and not (place.work / row.name).exists()


def test_a_row_goes_on_from_the_records_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        folder = Path(words[words.index("--out") + 1])
        with (folder / "study-a.jsonl").open("a") as file:
            file.write("one more run\n")
        (folder / "study.json").write_text('{"runs": []}', encoding="utf-8")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", command)
    row, place = Row("study", ("study",), minutes=1, records="study-*.jsonl"), place_at(tmp_path)
    kept = place.results / "study-a.jsonl"
    assert evidence.run([row], place, processes=1) == []
    place.numbers(row).unlink()
    shutil.rmtree(place.work / row.name)
    assert evidence.run([row], place, processes=1) == []
    assert kept.read_text() == 2 * "one more run\n"
    assert read(place.numbers(row))["minutes"] is None  # they would not be of the whole
    evidence.forget([row], place)
    assert not kept.exists()


def test_a_row_that_fails_says_why_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(words: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        folder = Path(words[words.index("--out") + 1])
        if "bad" in words:
            (folder / "errors.txt").write_text("progress\nerror: no such thing\n", encoding="utf-8")
            return subprocess.CompletedProcess(words, 2)
        (folder / f"{words[3]}.json").write_text('{"runs": []}', encoding="utf-8")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", command)
    rows = [
        Row("wrong", ("bad",), minutes=2),
        Row("right", ("good",), minutes=1),
        Row("alone", ("good",), minutes=9, alone=True),
        Row("digits", ("good",), minutes=1, data=True),
    ]
    place = place_at(tmp_path)
    assert evidence.run(rows, place, processes=2) == ["wrong"]
    said = capsys.readouterr().err
    assert "wrong: FAILED: error: no such thing" in said
    assert "digits: left out, it needs --data-dir" in said
    assert {path.stem for path in place.results.iterdir()} == {"right", "alone"}
    assert said.index("alone: done") < said.index("right: good")


def test_a_row_that_is_run_again_takes_its_beginning_along() -> None:
    assert [row.name for row in evidence.choose(["booth", "mnist-paper-one"])] == [
        "booth",
        "mnist-paper-one",
        "mnist-one",
    ]
    assert [row.name for row in evidence.choose(["mnist-one"])] == ["mnist-one"]
    assert tuple(evidence.choose(None)) == ROWS


@needs_matplotlib
@pytest.mark.parametrize("row", [row for row in ROWS if row.of is not None], ids=lambda row: row.name)
def test_a_row_is_cut_out_of_the_longer_one(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, longer = numbers(row.name), numbers(row.of)
    place = replace(place_at(tmp_path), data=longer["data"])
    place.results.mkdir()
    shutil.copy(evidence_tables.FOLDER / f"{row.of}.json", place.results)
    assert evidence.run([row], place, processes=1) == []
    assert f"{row.name}: the beginning of {row.of}" in capsys.readouterr().err
    assert read(place.numbers(row)) == document
    assert (place.figures / f"{row.name}.png").stat().st_size > 0
    runs = {run["label"]: run for run in document["runs"]}
    assert set(runs) == set(document["settings"]["arms"]) < set(longer["settings"]["arms"])
    assert max(run["epochs"][-1]["epoch"] for run in runs.values()) == document["settings"]["training"]["epochs"] == 80
    for run in longer["runs"]:
        if run["label"] in runs:
            beginning = runs[run["label"]]
            assert beginning["epochs"] == run["epochs"][: len(beginning["epochs"])]
            assert beginning["teleports"] == run["teleports"]  # all are made early


@needs_matplotlib
def test_the_beginning_of_a_run_is_the_shorter_run(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(600, 40, generator=generator)
    dataset = Dataset("noise", inputs, inputs[:, :3].argmax(dim=1))
    training = TrainingSettings(epochs=3, batch_size=20, optimizer="sgd", lr=0.05)
    ways = [TeleportSettings(epochs=(epoch,), min_gain=0.0) for epoch in (0, 1)]

    def document(epochs: int, teleports: list[TeleportSettings]) -> dict:
        settings = replace(training, epochs=epochs)
        classification.run("mnist", dataset, (30,), settings, teleports, range(1), tmp_path, lambda run: None)
        return json.loads((tmp_path / "mnist.json").read_text())

    def without_seconds(found: dict) -> dict:
        for run in found["runs"]:
            for record in (*run["epochs"], *run["teleports"]):
                del record["seconds"]
        return found

    cut_out = evidence_cut.cut(document(3, ways), classification.labelled(ways[1:]), epochs=2)
    assert without_seconds(cut_out) == without_seconds(document(2, ways[1:]))
    assert [len(run["epochs"]) for run in cut_out["runs"]] == [3, 3] and cut_out["runs"][1]["teleports"]


def test_rows_made_on_other_data_are_run_again(tmp_path: Path) -> None:
    row = Row("mnist", ("mnist",), minutes=1, data=True)
    small = replace(place_at(tmp_path), data="t10k, 10000 samples")
    small.results.mkdir()
    small.numbers(row).write_text(as_text(small.origin(row)), encoding="utf-8")
    assert evidence.is_done(row, small)
    assert not evidence.is_done(row, replace(small, data="train, 60000 samples"))


def test_the_quick_profile_stays_in_its_folder(tmp_path: Path) -> None:
    quick = Place.make(tmp_path, quick=True, data_dir=None)
    assert quick.results.parent == quick.figures.parent == tmp_path
    for row in ROWS:
        short = row.in_short()
        arguments = [*short.arguments, *(["--data-dir", "DIR"] if row.data else [])]
        assert command_line.make_parser().parse_args(arguments).command == row.command


def test_the_time_is_that_of_the_rows_that_were_timed() -> None:
    rows = [("booth", 0.6), ("mnist-one", None), ("spike", 3.0)]
    documents = [{"row": row, "minutes": minutes} for row, minutes in rows]
    untimed = evidence_tables.time_sentence([*documents, {"row": "study", "minutes": None}])
    assert "took 4 minutes together" in untimed and "the study was not trained in one go." in untimed
    timed = evidence_tables.time_sentence([*documents, {"row": "study", "minutes": 117.2}])
    assert "took 4 minutes together" in timed and "the study took 117 minutes" in timed


def test_the_table_of_a_run_that_diverges() -> None:
    epochs = [
        {"epoch": e, "train_loss": loss, "validation_loss": loss, "validation_accuracy": 0.5}
        for e, loss in ((0, 1.0), (1, None))
    ]
    teleport = {"position": 0.5, "gradient_norm_before": 1.0, "gradient_norm_after": 3.0}
    run = {"label": "plain", "epochs": epochs, "teleports": [teleport]}
    line = evidence_tables.training_table({"runs": [run]}).splitlines()[-1]
    assert line == "| plain | 1 | inf | inf | 50.00% | ×3 | +inf% |"


def test_the_tables_on_plasticity_show_the_best_rate_and_what_an_earlier_choice_costs() -> None:
    row = {"protocol": "relabelled", "activation": "tanh", "arm": "plain", "lr": 1e-3, "first": 90.0, "last": 70.0}
    row |= {"spread": 1.0, "kept_own": 100.0, "kept": 99.0, "kept_least": 98.0, "refused": 2}
    slow = row | {"curve": [90.0] * 10, "jump": None}
    fast = row | {"lr": 4e-3, "first": 80.0, "last": 75.0, "curve": [80.0] * 10, "jump": None}
    hidden = row | {"arm": "shrink and perturb 0.4", "curve": [90.0] * 10, "jump": None}
    text = plasticity_table({"rows": [slow, fast, hidden]})
    assert "| plain | 0.004 | 80.0 → 75.0 ± 1.0 | 80.0 | 100.0 / 99.0 / 98.0 (2 refused) |" in text.splitlines()
    assert "| plain | 70.0 / 70.0 / 75.0 |" in text.splitlines() and "0.4" not in text
    jumping = plasticity_table({"rows": [row | {"curve": [0.0, 90.0], "jump": -12.5}]})
    assert jumping.splitlines()[-1].endswith("| -12.5 |") and "best on the first task" not in jumping


# --- the study trained another time -----------------------------------------------------------------------------------

PROBLEM = Problem("digits", "digits", (16,), batch_size=40, epochs=2, check_every=4)
ONE_RATE = Study(PROBLEM, {"sgd": (0.1,)}, targets=(1.0,), seconds=(1.0, 1.0), seeds=(1,), state_seeds=(1,))


def folder_of(place: Path, teleported: Sequence[Record], plain: Record | None = None) -> Path:
    """The records of seeds 0, 1, …, of plain runs and teleported ones."""
    store = Store(place, "digits")
    for seed, record in enumerate(teleported):
        for teleports, one in ((None, plain or record), (DEFAULTS, record)):
            store.append(Job(PROBLEM, "sgd", 0.1, teleports, seed), "data", "machine", one)
    return place


def run_of(losses: Sequence[float], seconds: float, accepted: bool = False, cut_short: bool = False) -> Record:
    checks = tuple(Check(5 * step, seconds * step, loss) for step, loss in enumerate(losses))
    later = losses[-1] if accepted or not cut_short else math.nan
    teleports = (Teleport(3, 1.0, accepted, 2.5, 2.5, later),)
    return Record(10, checks, (Validation(1.0, math.nan),), teleports, refused=0, cut_short=cut_short)


def test_runs_are_the_same_up_to_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_again, "FULL", {"digits": ONE_RATE})
    ours = folder_of(tmp_path / "ours", [run_of([2.0, 1.0, 0.5], 2.0), run_of([2.0, 1.0, 0.5], 2.0)])
    others = folder_of(tmp_path / "others", [run_of([2.0, 1.0, 0.5], 3.0), run_of([2.0, 1.0, 0.4], 2.0)])
    problem = evidence_again.compare(ours, others)["digits"]
    assert (problem["runs"], problem["same"], problem["in one alone"]) == (4, 2, 0)
    assert problem["seconds, other / committed"] == {"least": 1.0, "median": 1.25, "largest": 1.5}


def test_a_run_that_was_cut_short_is_held_against_one_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_again, "FULL", {"digits": ONE_RATE})
    plain, short = run_of([2.0, 1.0, 0.5], 2.0), run_of([2.0, 1.0], 2.0, cut_short=True)
    ours = folder_of(tmp_path / "ours", [short, short], plain)
    others = folder_of(tmp_path / "others", [run_of([2.0, 1.0, 0.5], 2.5)], plain)
    problem = evidence_again.compare(ours, others)["digits"]
    assert (problem["runs"], problem["same"], problem["in one alone"]) == (2, 2, 2)
    assert problem["seconds, other / committed"] == {"least": 1.0, "median": 1.0, "largest": 1.0}  # 4 + 1 and 5 seconds
    with pytest.raises(ValueError, match=r"must hold runs of digits that .*ours holds too, got none"):
        evidence_again.compare(ours, tmp_path)


def test_what_the_page_says_of_another_time_is_what_its_file_says() -> None:
    problems = load("again")["problems"].values()
    assert all(problem["runs"] == problem["same"] > 0 for problem in problems)
    factors = [problem["seconds, other / committed"] for problem in problems]
    least, largest = min(entry["least"] for entry in factors), max(entry["largest"] for entry in factors)
    assert f"by factors from {least:.1f} to {largest:.1f}," in " ".join(PAGE.split())


def test_what_refusals_cost_is_what_the_records_say() -> None:
    """The medians, by problem, over the runs whose teleports were all refused: of their share of the plain run and of
    their seconds."""
    shares, seconds = {}, {}
    for name, study in FULL.items():
        lines = evidence_again.lines_of(study, evidence_tables.FOLDER)
        refusing = [
            (line.record, lines[replace(job, teleports=None)].record)
            for job, line in lines.items()
            if job.teleports == DEFAULTS and job.seed in study.seeds
            if line.record.teleports and not line.record.accepted and not line.record.diverged
        ]
        shares[name] = statistics.median(run.final.seconds / plain.final.seconds - 1 for run, plain in refusing)
        seconds[name] = statistics.median(sum(one.seconds for one in run.teleports) for run, _ in refusing)
    percent = {name: f"{100 * share:.1f}" for name, share in shares.items()}
    text = " ".join(PAGE.split())
    assert (
        f"{percent['mnist-128']} % of the plain run's in the middle on mnist-128, {percent['mnist-512']} on mnist-512, "
        f"{percent['digits']} on digits and {percent['diabetes']} on diabetes"
    ) in text
    assert f"{seconds['digits']:.2f}" == f"{seconds['diabetes']:.2f}"
    assert (
        f"{seconds['digits']:.2f} s on diabetes and digits, {seconds['mnist-128']:.2f} s on mnist-128, "
        f"{seconds['mnist-512']:.2f} s on mnist-512"
    ) in text


def test_the_shares_of_the_page_and_the_readme_are_those_of_the_study() -> None:
    (study,) = (summary for summary in summaries_of(numbers("study")) if summary.problem == "mnist-512")
    shares = {rate.lr: f"{100 * rate.share.mean:.0f}" for rate in study.by_rate if rate.optimizer == "sgd"}
    asked = [shares[lr] for lr in (0.002, 0.01, 0.03, 0.1)]
    assert f"reached in {asked[0]}, {asked[1]}, {asked[2]} and {asked[3]} % of its wall-clock" in " ".join(PAGE.split())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    first, *others = zip(asked, ("0.002", "0.01", "0.03", "0.1"), strict=True)
    said = ", ".join(f"{share} % at {lr}" for share, lr in others)
    assert f"reached in {first[0]} % of its wall-clock at rate {first[1]}, {said}, teleports included" in readme


def test_no_harm_beyond_chance_is_left_on_the_fresh_seeds() -> None:
    """What the page and the README say of the rates that were looked at again."""
    summaries = summaries_of(numbers("study"))
    suspects = {(harm.optimizer, harm.lr) for summary in summaries for harm in summary.harm if harm.beyond_chance}
    again = [harm for summary in summaries for harm in summary.fresh_harm]
    assert {(harm.optimizer, harm.lr) for harm in again} == suspects and len(suspects) == 4
    assert not any(harm.beyond_chance or harm.harmed_seeds for harm in again)
    assert all(harm.seeds == 20 for harm in again)


def outcomes(arm: str, **wanted: object) -> list[dict[str, Any]]:
    """Those of both rows on noise, of an arm and with these settings."""
    found = [entry for name in ("noise", "noise-mnist") for entry in numbers(name)["outcomes"] if entry["arm"] == arm]
    return [entry for entry in found if all(entry[key] == value for key, value in wanted.items())]


def known(entries: list[dict[str, Any]], name: str) -> list[float]:
    return [value for entry in entries for value in entry[name] if value is not None]


def test_the_bounds_keep_their_promises_and_page_and_readme_say_what_is_left() -> None:
    page, readme = (" ".join(text.split()) for text in (PAGE, (ROOT / "README.md").read_text(encoding="utf-8")))
    bounded, free, fast = map(outcomes, (noise.BOUNDED, noise.UNBOUNDED, noise.FAST_START))
    worst, worst_free, worst_fast = (-min(known(entries, "noise")) for entries in (bounded, free, fast))
    assert worst <= 2 and sum(entry["spikes"] for entry in bounded) == 0
    below = f"under noise is nowhere more than {worst:.1f} points below"
    assert below in page and f"{below} the plain run's, and no run's loss spikes" in readme
    heaviest = max(known(free, "norms"))
    assert f"up to {heaviest:.0f} times as large" in page
    assert f"up to {worst_free:.1f} points below the plain run's at the same train loss" in page
    assert f"start is at most {worst_fast:.1f} below" in page
    runs = 5 * len(bounded)
    assert f"and {sum(entry['spikes'] for entry in free)} of {runs} runs spike" in page
    assert f"at most {max(known(bounded, 'norms')):.1f} times the plain run's, and no run of {runs} spikes" in page
    assert f"up to {worst_free:.1f} points below, and weights become up to {heaviest:.0f} times as large" in readme
    left = {
        activation: known(outcomes(noise.BOUNDED, optimizer="sgd", activation=activation), "epochs")
        for activation in ("LeakyReLU 0.1", "tanh")
    }
    leaky, tanh = (f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %" for shares in left.values())
    assert f"{leaky} of the plain run's epochs, behind tanh {tanh}" in page
    assert f"{leaky} of the plain run's epochs behind LeakyReLU 0.1 and {tanh} behind tanh" in readme


def test_the_demo_of_the_readme_is_that_of_its_file() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    document = json.loads((ROOT / "docs" / "figures" / "digits.json").read_text(encoding="utf-8"))
    arms = document["settings"]["arms"]
    plain, teleported = ([run for run in document["runs"] if run["label"] == arm] for arm in arms)
    ends = [[run["epochs"][-1] for run in runs] for runs in (teleported, plain)]
    losses, accuracies = (
        [statistics.fmean(end[name] for end in arm) for arm in ends] for name in ("train_loss", "validation_accuracy")
    )
    assert f"train loss of {losses[0]:.3f} in place of {losses[1]:.3f}" in readme
    assert f"accuracy of {accuracies[0]:.1%} in place of {accuracies[1]:.1%}".replace("%", " %") in readme
