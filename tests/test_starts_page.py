"""The page on standardised starts says what the committed numbers say."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import evidence_tables, starts_tables
from bench.starts_tables import GUARDS, Comparison, Guard, Pair, judge
from experiments.starts.arms import (
    ALL,
    ALL_ANYWAY,
    EACH,
    EACH_ANYWAY,
    INITS,
    LAST,
    LOOKAHEAD,
    ON_BEST,
    PLAIN,
    TRAINED,
    TRAINED_ANYWAY,
)

PAGE = " ".join((Path(__file__).parents[1] / evidence_tables.STANDARDISE).read_text(encoding="utf-8").split())
DOCUMENTS = starts_tables.read_starts(evidence_tables.FOLDER)
TWO_HIDDEN = ("digits", "digits, other rules", "digits, Muon")  # whose rates are chosen at 0.01
LEAKY, TANH, SIGMOID = STUDIED = ("LeakyReLU 0.1", "tanh", "sigmoid")
HOLDOUT, LEAST, MORE, NOISE, CHANGE, KEPT = GUARDS
Rows = dict[str, dict[str, Any]]


def rows_of(*problems: str) -> dict[tuple[str, str, str], Rows]:
    """By setting, the row of each arm."""
    found: dict[tuple[str, str, str], Rows] = {}
    for row in (row for document in DOCUMENTS for row in document["rows"]):
        if row["problem"] in problems:
            found.setdefault((row["problem"], row["activation"], row["optimizer"]), {})[row["arm"]] = row
    return found


def last(row: dict[str, Any]) -> float:
    """The epochs to the lowest of its levels."""
    return math.inf if row["epochs"][-1] is None else row["epochs"][-1]


def fastest_init(arms: Rows) -> float:
    return min(last(arms[arm]) for arm in INITS)


def pairs(problem: str, arm: str, *wanted: str) -> list[Pair]:
    """Those of an activation and an optimizer, where these are given."""
    own = [pair for pair in starts_tables.pairs_of(DOCUMENTS, arm) if pair.setting.problem == problem]
    return [pair for pair in own if {*wanted} <= {pair.setting.activation, pair.setting.optimizer}]


def between(values: list[float], form: str = ".0f") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def says(sentence: str, *values: object) -> None:
    """Whether the page has the sentence with these values."""
    expected = sentence.format(*values)
    assert expected in PAGE, expected


@pytest.mark.parametrize(
    ("problem", "activation", "optimizer", "level", "of_plain", "of_best"),
    [
        ("digits", LEAKY, "sgd", 0.01, 0.65, 0.9),
        ("digits", LEAKY, "momentum", 0.01, 0.65, 0.9),
        ("digits", LEAKY, "adam", 0.01, 0.72, 0.9),  # 0.65 was asked for
        ("digits", TANH, "sgd", 0.01, 0.5, 0.9),
        ("digits", SIGMOID, "sgd", 0.03, 0.5, 0.8),
        ("digits, deep", SIGMOID, "sgd", 0.03, 0.5, 0.5),
        ("mnist", LEAKY, "sgd", 0.1, 0.75, 1.0),
    ],
)
def test_standardised_starts_need_the_share_of_epochs_that_was_asked_for(
    problem: str, activation: str, optimizer: str, level: float, of_plain: float, of_best: float
) -> None:
    found = starts_tables.epochs_of(DOCUMENTS, problem, activation, optimizer, level)
    assert found[ALL] <= of_plain * found[PLAIN]
    assert found[ALL] <= of_best * min(found[arm] for arm in INITS if arm in found)


def test_what_the_page_says_of_epochs_and_noise_on_digits() -> None:
    settings = rows_of(*TWO_HIDDEN)
    both = [arms for arms in settings.values() if math.isfinite(last(arms[PLAIN]))]
    of_plain = [100 * last(arms[ALL]) / last(arms[PLAIN]) for arms in both]
    in_all = [100 * (last(arms[ALL]) + arms[ALL]["cost"]) / last(arms[PLAIN]) for arms in both]
    says("standardising needs {} % of the epochs to a train loss of 0.01, with the time", between(of_plain))
    says("with the time of the teleport {} %", between(in_all))
    of_best = [100 * last(arms[ALL]) / fastest_init(arms) for arms in settings.values()]
    says("**Against the best initialisation** it needs {} %", between(of_best))
    below_plain = [arms[PLAIN]["noisy"] - arms[ALL]["noisy"] for arms in both]
    best = {setting: max(arms[init]["noisy"] for init in INITS) for setting, arms in settings.items()}
    below_best = [best[setting] - arms[ALL]["noisy"] for setting, arms in settings.items()]
    exactly = [best[setting] - arms[LAST]["noisy"] for setting, arms in settings.items() if LAST in arms]
    says("under noise is up to {:.1f} points below", max(below_plain))
    says("and up to {:.1f} below the best from an initialisation", max(below_best))
    says("costs more robustness, up to {:.1f} points", max(exactly))
    for (_, activation, optimizer), arms in rows_of("digits").items():
        if activation != LEAKY and optimizer != "adam":
            assert arms[ALL]["lowest"] > max(arms[init]["lowest"] for init in INITS)


def test_what_the_page_says_of_time() -> None:
    digits, muon, mnist = (
        between([arms[ALL]["cost"] for arms in rows_of(*problems).values()], ".1f")
        for problems in (TWO_HIDDEN[:2], TWO_HIDDEN[2:], ("mnist", "mnist, narrow"))
    )
    says("takes as long as {} epochs of a network of this size on digits", digits)
    assert muon == "0.1 to 0.1"
    says("{} on MNIST digits, which have 400", mnist)


def test_what_the_page_says_of_later_and_of_more_teleports() -> None:
    settings = [*rows_of("digits").values()]
    refused, made = (sum(arms[TRAINED][name] for arms in settings) for name in ("refused", "teleports"))
    says("the guards refuse {} of the {} teleports at the best rates", refused, made)
    both = [arms for arms in settings if math.isfinite(last(arms[PLAIN]))]
    left = [between([100 * last(arms[arm]) / last(arms[PLAIN]) for arms in both]) for arm in (TRAINED, TRAINED_ANYWAY)]
    says("{} % of the plain run's epochs to 0.01 are left, and {} % where the guards are not asked", *left)
    behind_sigmoid = [arms for (_, activation, _), arms in rows_of("digits").items() if activation == SIGMOID]
    assert all(arms[TRAINED_ANYWAY]["lowest"] > arms[PLAIN]["lowest"] for arms in behind_sigmoid)
    often = [arms for arms in settings if EACH in arms]
    says("{} of {} are refused", *(sum(arms[EACH][name] for arms in often) for name in ("refused", "teleports")))
    for arm, text in ((EACH, "It then takes {:.1f}, {:.1f} and {:.1f} epochs"), (EACH_ANYWAY, "all of them {:.1f}, ")):
        says(text, *(last(arms[arm]) for arms in often))
    says("once at the start {:.1f}, {:.1f} and {:.1f}.", *(last(arms[ALL]) for arms in often))
    assert all(last(arms[EACH_ANYWAY]) > last(arms[ALL]) for arms in often)
    says("such a run take as long as {} epochs", between([arms[EACH]["cost"] for arms in often]))


def test_what_the_page_says_of_the_lookahead() -> None:
    settings = [arms for arms in rows_of("digits").values() if LOOKAHEAD in arms]
    refused, made = (sum(arms[LOOKAHEAD][name] for arms in settings) for name in ("refused", "teleports"))
    says("is refused {} of {} times at the best rates", refused, made)
    slowest = [min(pairs("digits", LOOKAHEAD, name), key=lambda pair: pair.lr) for name in STUDIED]
    ratios = [Comparison.make(pair, "train").ratio for pair in slowest]
    says("the final train loss is ×{:.2f}, ×{:.2f} and ×{:.2f} that of the plain run", *ratios)


def test_what_the_page_says_of_deep_networks() -> None:
    deep = rows_of("digits, deep tanh")
    sgd, adam = (deep["digits, deep tanh", TANH, optimizer] for optimizer in ("sgd", "adam"))
    for arms in (sgd, adam):
        assert arms[PLAIN]["epochs"][0] is None
        assert last(arms[ALL]) > max(last(arms[init]) for init in INITS)
    assert last(adam[ALL]) == last(adam[ON_BEST]) == math.inf
    says("to 0.01 in {:.1f} epochs with SGD, and not in twelve with Adam", last(sgd[ALL]))
    says("orthogonal initialisation it takes {:.1f} and {:.1f}", last(sgd["orthogonal"]), last(adam["orthogonal"]))
    says("standardised on top {:.1f} and more than twelve", last(sgd[ON_BEST]))
    lowest = [arms[arm]["lowest"] for arm in (ALL, "orthogonal") for arms in (sgd, adam)]
    says("validation loss is {:.2f} and {:.2f} in place of {:.2f} and {:.2f}", *lowest)
    four = rows_of("digits, deep")["digits, deep", SIGMOID, "sgd"]
    assert four[PLAIN]["epochs"][0] is None
    assert four[ALL]["epochs"][1] < min(four[init]["epochs"][1] or math.inf for init in INITS) / 2


def test_what_the_page_says_of_mnist() -> None:
    wide, narrow = ([*rows_of(name).values()] for name in ("mnist", "mnist, narrow"))
    says("{} % of the epochs to a train loss of 0.1", between([100 * _first(a, ALL) / _first(a, PLAIN) for a in wide]))
    says("{:.1f} and {:.1f} epochs to 0.1 behind LeakyReLU and tanh", *(_first(arms, ALL) for arms in narrow))
    says("in place of {:.1f} and {:.1f}, and", *(_first(arms, PLAIN) for arms in narrow))
    lowest = [arms[arm]["lowest"] for arm in (ALL, PLAIN) for arms in narrow]
    says("validation loss of {:.3f} and {:.3f} in place of {:.3f} and {:.3f}", *lowest)


def _first(arms: Rows, arm: str) -> float:
    return float(arms[arm]["epochs"][0])


def test_what_the_page_says_of_the_regression() -> None:
    settings = rows_of("diabetes")
    sgd, adam = ([settings["diabetes", name, optimizer] for name in (LEAKY, TANH)] for optimizer in ("sgd", "adam"))
    for text, of_both, arm in (("SGD and no guard {:.3f}", sgd, ALL_ANYWAY), ("With Adam it is {:.3f}", adam, ALL)):
        lowest = [[arms[which]["lowest"] for arms in of_both] for which in (arm, PLAIN)]
        says(text + " and {:.3f} in place of {:.3f} and {:.3f}", *lowest[0], *lowest[1])
    for name in (LEAKY, TANH):
        assert all(Comparison.make(pair, "train").lost == 0 for pair in pairs("diabetes", ALL, name, "sgd"))
    lost = []
    for name in (LEAKY, TANH):
        made = [Comparison.make(pair, "train") for pair in pairs("diabetes", ALL_ANYWAY, name, "sgd")]
        lost.append([one for one in made if one.lost > 0])
    says("{} of {} runs diverge from a rate of", sum(one.lost for one in lost[0]), 5 * len(lost[0]))
    says("rate of {:.3f} on behind LeakyReLU", lost[0][0].lr)
    says("it is {} of {} from", sum(one.lost for one in lost[1]), 5 * len(lost[1]))
    says("from {:.3f} to {:.2f}. The plain", lost[1][0].lr, lost[1][-1].lr)
    assert all(any(one.lr == arms[PLAIN]["lr"] for one in own) for own, arms in zip(lost, sgd, strict=True))
    assert [arms[ALL]["refused"] for arms in sgd] == [5, 5]
    assert [arms[ALL]["lr"] for arms in sgd] == [arms[PLAIN]["lr"] for arms in sgd]
    middle = {arm: row["epochs"][1] for arm, row in adam[1].items()}
    says("to 0.4 it takes {:.1f} epochs in place of {:.1f}, the initialisations", middle[ALL], middle[PLAIN])
    says("the initialisations {}.", between([middle[init] for init in INITS], ".1f"))
    of_adam = [Comparison.make(pair, "lowest") for pair in pairs("diabetes", ALL, TANH, "adam")]
    says("higher beyond chance at {} of {} rates", sum(one.is_worse for one in of_adam), len(of_adam))
    says("by {:.0f} % at most", 100 * max(one.ratio for one in of_adam if one.is_worse) - 100)


def test_what_the_page_says_of_the_default_at_every_rate() -> None:
    known = starts_tables.pairs_of(DOCUMENTS, ALL)
    says("Of {} rates in {} settings", len(known), len({pair.setting for pair in known}))
    cases = []
    for name, text in (("train", "The final train loss"), ("lowest", "The lowest validation loss")):
        made = [Comparison.make(pair, name) for pair in known]
        worse = [one.setting for one in made if one.is_worse]
        says(f"{text} is better at {{}} and worse at {{}}", sum(one.is_better for one in made), len(worse))
        cases.append(Counter(setting.problem for setting in worse))
    assert cases == [
        {"mnist, narrow": 1},
        {"diabetes": 6, "mnist": 2, "mnist, narrow": 6},
    ]


def runs_and_means(guard: Guard, own: list[Pair], figure: str) -> tuple[str, str]:
    """Of the runs that it refuses and of the others, as the table has it."""
    place = ("runs", "epochs", "train", "lowest").index(figure)
    refused, passed = judge(guard, own)
    return refused.cells()[place], passed.cells()[place]


def test_what_the_page_says_of_the_guards_at_the_start() -> None:
    found = starts_tables.guarded(DOCUMENTS)
    for where, own in found.items():
        if where.startswith(("digits", "mnist")) and where.endswith("at the start"):
            assert not any(judge(guard, own)[0].train for guard in (HOLDOUT, LEAST, NOISE, CHANGE)), where
    tanh = found["mnist, tanh, at the start"]
    assert runs_and_means(MORE, tanh, "runs") == ("10", "15")  # of five seeds at five rates
    says("1.4 would refuse two of five seeds. Their runs need {} of", runs_and_means(MORE, tanh, "epochs")[0])
    says("those of the others {}. [What", runs_and_means(MORE, tanh, "epochs")[1])
    refused = []
    for name in (LEAKY, TANH):
        halves = judge(LEAST, found[f"diabetes, {name}, at the start"])
        refused.append(len(halves[0].train))
        diverged = [sum(map(math.isinf, half.train)) / len(half.train) for half in halves]
        assert diverged[0] < 1.2 * diverged[1]
    says("`min_gain` refuses {} runs behind LeakyReLU and {} behind tanh", *refused)


def test_what_the_page_says_of_the_guards_after_two_epochs() -> None:
    own = {name: pairs("digits", TRAINED_ANYWAY, name) for name in STUDIED}
    every = [pair for of_one in own.values() for pair in of_one]
    train, lowest = (runs_and_means(KEPT, every, name) for name in ("train", "lowest"))
    says("the {} runs that 0.9 refuses end at", runs_and_means(KEPT, every, "runs")[0])
    says("at {} of the train loss and {} of the lowest validation loss", train[0], lowest[0])
    says("the others at {} and {}.", train[1], lowest[1])
    assert runs_and_means(NOISE, every, "runs")[0] == runs_and_means(CHANGE, every, "runs")[0] == "1"
    says("separates the validation loss, {} from {}", *runs_and_means(LEAST, every, "lowest"))
    says("hardly the epochs, {} from {}", *runs_and_means(LEAST, every, "epochs"))
    says("The {} runs that 3 % refuses need", runs_and_means(HOLDOUT, every, "runs")[0])
    says("refuses need {} of the epochs, the others {}.", *runs_and_means(HOLDOUT, every, "epochs"))
    says("Behind LeakyReLU it is {} against {}", *runs_and_means(HOLDOUT, own[LEAKY], "lowest"))
    says("behind tanh {} against {}.", *runs_and_means(HOLDOUT, own[TANH], "lowest"))
    says("behind sigmoid alone, {} against {}.", *runs_and_means(HOLDOUT, own[SIGMOID], "lowest"))
