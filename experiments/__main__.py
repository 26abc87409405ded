"""The command line: `python -m experiments COMMAND`, of which `--help` lists the commands.

Each experiment's defaults are the published settings (for digits the demo's); an option that is not given leaves its
setting alone. Figures (PNG) and all their numbers (JSON) go to the folder `--out`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from experiments import (
    classification,
    guards,
    minima,
    noise,
    override,
    planar,
    plasticity,
    regression,
    require_extra,
    spike,
    trade,
)
from experiments.data import Dataset, load_digits, load_mnist
from experiments.gpt import results as transformer
from experiments.gpt.model import Text
from experiments.gpt.runs import ARMS
from experiments.plasticity import results
from experiments.plasticity.jobs import SUITES, WHOLE, jobs_of
from experiments.plasticity.tasks import PROTOCOLS
from experiments.records import Run
from experiments.starts import results as starts
from experiments.starts.problems import PROBLEMS
from experiments.study import program
from experiments.study.jobs import FULL, QUICK
from experiments.study.problems import DATA
from experiments.training import (
    OPTIMIZERS,
    BoundedTeleports,
    TeleportSettings,
    TrainingSettings,
    default_lr,
)
from symtele_cuda.errors import TeleportError
from symtele_cuda.operator.teleport_layer import ACTIONS

OBJECTIVES = ("grad_norm", "lookahead")
Number = TypeVar("Number", int, float)
PROGRAM = "python -m experiments"
USAGE_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 after an error (one line on stderr) or 130 after an interrupt."""
    options = make_parser().parse_args(arguments)
    try:
        print(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, TeleportError, program.StudyError) as error:
        print(f"{PROGRAM} {options.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def _with_results(run: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> str:
    """`run`, after a look at what it needs at its end: a folder to write to, and something to draw with."""
    require_extra("matplotlib.figure")
    options.out.mkdir(parents=True, exist_ok=True)
    return f"{run(options)}\n\nFigures and numbers are in {options.out}/"


def run_booth(options: argparse.Namespace) -> str:
    return _run_planar(options, planar.BOOTH)


def run_rosenbrock(options: argparse.Namespace) -> str:
    return _run_planar(options, planar.ROSENBROCK)


def run_regression(options: argparse.Namespace) -> str:
    names = regression.PUBLISHED if options.optimizer is None else (options.optimizer,)
    baselines = []
    for baseline in (regression.BASELINES[name] for name in names):
        training = override(baseline.training, epochs=options.epochs, lr=options.lr, device=options.device)
        baselines.append(replace(baseline, training=training, teleports=_teleports(options, baseline.teleports)))
    epochs = sum(len(baseline.arms()) * baseline.training.epochs for baseline in baselines)
    with _progress(epochs * options.seeds) as on_epoch:
        return regression.run(baselines, regression.published_seeds(_seeds(options)), options.out, on_epoch)


def run_mnist(options: argparse.Namespace) -> str:
    dataset = load_mnist(options.data_dir)
    preset = classification.PRESETS[options.preset]
    if options.teleport_epochs is not None:
        preset = replace(preset, schedules=(options.teleport_epochs,))
    training = replace(classification.MNIST_TRAINING, epochs=preset.epochs, batch_size=preset.batch_size)
    teleports = [_teleports(options, settings) for settings in preset.teleports(options.algorithms)]
    return _classify(options, dataset, classification.MNIST_WIDTHS, training, teleports)


def run_minima(options: argparse.Namespace) -> str:
    dataset = load_mnist(options.data_dir)
    training, teleports = _training(options, minima.TRAINING), _schedule(options, minima.TELEPORTS)
    with _progress(training.epochs * (1 + len(minima.OBJECTIVES)) * options.seeds) as on_epoch:
        return minima.run(dataset, training, teleports, _seeds(options), options.out, on_epoch)


def run_digits(options: argparse.Namespace) -> str:
    dataset = load_digits() if options.data_dir is None else load_mnist(options.data_dir)
    teleports = [_teleports(options, BoundedTeleports())]
    return _classify(options, dataset, classification.DIGITS_WIDTHS, classification.DIGITS_TRAINING, teleports)


def run_spike(options: argparse.Namespace) -> str:
    dataset = load_mnist(options.data_dir)
    training = override(
        spike.TRAINING,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        device=options.device,
    )
    ladder = spike.variants(training.batch_size, options.step_size)
    with _named_runs(options.seeds * (1 + len(ladder))) as on_run:
        return spike.run(dataset, training, ladder, _seeds(options), options.out, on_run)


def run_trade(options: argparse.Namespace) -> str:
    dataset, seeds = load_mnist(options.data_dir), _seeds(options)
    problem = override(trade.PROBLEM, epochs=options.epochs)
    with _named_runs(len(trade.RATES) * len(trade.variants()) * len(seeds)) as on_run:
        return trade.run(dataset, problem, trade.RATES, seeds, options.out, on_run)


def run_guards(options: argparse.Namespace) -> str:
    problem = override(guards.PROBLEM, epochs=options.epochs)
    with _named_runs(guards.count_runs(options.seeds)) as on_run:
        return guards.run(load_digits(), problem, _seeds(options), options.out, on_run)


def run_noise(options: argparse.Namespace) -> str:
    name, dataset = ("digits", load_digits()) if options.data_dir is None else ("mnist", load_mnist(options.data_dir))
    with _named_runs(noise.count_runs(options.seeds)) as on_run:
        return noise.run(name, dataset, _seeds(options), options.epochs, options.out, on_run)


def run_plasticity(options: argparse.Namespace) -> str:
    dataset = load_digits() if options.data_dir is None else load_mnist(options.data_dir)
    suite = SUITES[options.suite]
    jobs = jobs_of(suite, options.seeds, options.protocols, options.tasks)
    with _named_runs(len(jobs)) as on_run:
        return results.run(dataset, jobs, suite.drawn, options.out, on_run)


def run_transformer(options: argparse.Namespace) -> str:
    settings, arms = options.settings or [*transformer.SETTINGS], options.arms or [*ARMS]
    plan, text = transformer.Plan(settings, arms, options.seeds, options.steps), Text.of_standard_library()
    with _named_runs(plan.count) as on_run:
        return transformer.run(text, plan, options.out, on_run)


def run_starts(options: argparse.Namespace) -> str:
    on_mnist = options.data_dir is not None
    names = options.problems or [name for name, problem in PROBLEMS.items() if problem.on_mnist == on_mnist]
    datasets = {name: DATA[PROBLEMS[name].data](options.data_dir) for name in names}
    with _named_runs(len(starts.settings(names)) * starts.FEWEST_RATES) as on_run:
        return starts.run(datasets, options.seeds, options.epochs, options.out, on_run)


def run_study(options: argparse.Namespace) -> str:
    profile = QUICK if options.quick else FULL
    if not options.tables:
        studies = program.select(profile, options.problem, options.optimizer, options.data_dir)
        program.train(studies, options.data_dir, options.out, options.processes)
    return program.report(profile.values(), options.out)


def _run_planar(options: argparse.Namespace, defaults: planar.PlanarSettings) -> str:
    settings = override(
        defaults,
        steps=options.epochs,
        lr=options.lr,
        optimizer=options.optimizer,
        teleport_steps=options.teleport_epochs,
        ascent_steps=options.teleport_steps,
        ascent_rate=options.step_size,
    )
    return planar.run(settings, _seeds(options), options.out)


def _classify(
    options: argparse.Namespace,
    dataset: Dataset,
    widths: tuple[int, ...],
    defaults: TrainingSettings,
    teleports: list[TeleportSettings],
) -> str:
    training = _training(options, defaults)
    with _progress(training.epochs * (1 + len(teleports)) * options.seeds) as on_epoch:
        return classification.run(
            options.command, dataset, widths, training, teleports, _seeds(options), options.out, on_epoch
        )


def _training(options: argparse.Namespace, defaults: TrainingSettings) -> TrainingSettings:
    optimizer = options.optimizer or defaults.optimizer
    return override(
        replace(defaults, optimizer=optimizer, lr=default_lr(optimizer, sgd_lr=defaults.lr)),
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        device=options.device,
    )


def _schedule(options: argparse.Namespace, defaults: TeleportSettings) -> TeleportSettings:
    return override(
        defaults,
        epochs=options.teleport_epochs,
        teleports_per_epoch=options.teleports_per_epoch,
        batch_size=options.teleport_batch_size,
        holdout_size=options.holdout_size,
        steps=options.teleport_steps,
        step_size=options.step_size,
    )


def _teleports(options: argparse.Namespace, defaults: TeleportSettings) -> TeleportSettings:
    return override(
        _schedule(options, defaults), objective=options.objective, action=options.action, lr=options.teleport_lr
    )


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.seeds)


@contextmanager
def _progress(epochs: int) -> Iterator[Callable[[Run], None]]:
    """A bar over all epochs of all runs on stderr, fed with the run so far."""
    with _bar(epochs, "epoch") as bar:

        def on_epoch(run: Run) -> None:
            bar.set_description(f"seed {run.seed}, {run.label}", refresh=False)
            bar.set_postfix_str(f"train loss {run.final.train_loss:.4g}", refresh=False)
            bar.update()

        yield on_epoch


@contextmanager
def _named_runs(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over runs on stderr, fed with the name of what has finished."""
    with _bar(total, "run") as bar:

        def on_run(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield on_run


def _bar(total: int, unit: str) -> Any:
    return require_extra("tqdm").tqdm(total=total, unit=unit, dynamic_ncols=True, delay=0.1)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Symmetry teleportation: experiments.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add_with_seeds(run: Callable[[argparse.Namespace], str], seeds: int, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(run.__name__.removeprefix("run_"), help=text, description=text)
        command.set_defaults(run=lambda options: _with_results(run, options))
        _add_seed_options(command, seeds)
        return command

    def add(run: Callable[[argparse.Namespace], str], seeds: int, text: str) -> argparse.ArgumentParser:
        command = add_with_seeds(run, seeds, text)
        command.add_argument("--epochs", type=positive_int, help="epochs, or steps of booth and rosenbrock")
        command.add_argument("--optimizer", choices=OPTIMIZERS)
        _add_rate(command)
        return command

    for run_function in (run_booth, run_rosenbrock):
        name = run_function.__name__.removeprefix("run_")
        command = add(run_function, 5, f"gradient descent on the {name} function, with and without teleports")
        _add_search_options(command, epochs="steps, counted from 1, that a teleport precedes", step_size=positive_float)
    command = add(run_regression, 5, "multi-layer regression on 4 samples, GD and AdaGrad, one teleport")
    _add_teleport_options(command)
    command = add(run_mnist, 1, "784-512-512-10 on MNIST, the published schedules")
    _add_teleport_options(command)
    _add_data_options(command, required=True)
    command.add_argument(
        "--preset",
        choices=classification.PRESETS,
        default=classification.DEFAULT_PRESET,
        help="which published figure: its schedules, number of epochs and batch size (default: %(default)s)",
    )
    _add_algorithm_options(command)
    command = add_with_seeds(run_spike, 3, "the loss spike of a teleport on MNIST, one difference at a time")
    _add_data_options(command, required=True)
    command.add_argument("--epochs", type=positive_int, help="epochs before the one with teleports (default: 1)")
    _add_rate(command)
    rate = "of the published ascent (default: %(default)s)"
    command.add_argument("--step-size", type=positive_float, default=spike.PUBLISHED_RATE, help=rate)
    _add_device_option(command)
    command = add_with_seeds(run_trade, 3, "what the holdout guard and the other defaults cost and gain, on MNIST")
    command.add_argument("--data-dir", type=Path, required=True, help="folder with MNIST-format files")
    command.add_argument("--epochs", type=positive_int, help="epochs (default: 8)")
    command = add_with_seeds(run_guards, 5, "which guard keeps a teleport from doing harm, on scikit-learn's digits")
    command.add_argument("--epochs", type=positive_int, help="epochs (default: 20)")
    command = add_with_seeds(run_noise, 5, "what teleports do under noise in the inputs, on digits or on MNIST")
    command.add_argument("--data-dir", type=Path, help="folder with MNIST-format files, in place of the digits")
    command.add_argument("--epochs", type=positive_int, help="at most so many epochs (default: 60, on MNIST 12)")
    command = commands.add_parser("starts", help=starts.TEXT, description=starts.TEXT)
    command.set_defaults(run=lambda options: _with_results(run_starts, options))
    command.add_argument("--data-dir", type=Path, help="folder with MNIST-format files: the problems on them")
    command.add_argument("--problems", choices=PROBLEMS, nargs="+", help="these only (default: all others)")
    command.add_argument("--epochs", type=positive_int, help="of each run (default: the problem's own)")
    command.add_argument("--seeds", type=positive_int, default=5, help="how many seeds (default: %(default)s)")
    _add_out(command)
    command = commands.add_parser("plasticity", help=plasticity.TEXT, description=plasticity.TEXT)
    command.set_defaults(run=lambda options: _with_results(run_plasticity, options))
    command.add_argument("--suite", choices=SUITES, default=WHOLE, help="which runs (default: %(default)s)")
    command.add_argument("--protocols", choices=PROTOCOLS, nargs="+", help="of the suite these only (default: all)")
    command.add_argument("--data-dir", type=Path, help="folder with MNIST-format files, in place of the digits")
    command.add_argument("--tasks", type=positive_int, help="so many of a protocol at most")
    command.add_argument("--seeds", type=positive_int, default=5, help="how many seeds (default: %(default)s)")
    _add_out(command)
    command = commands.add_parser("transformer", help=transformer.TEXT, description=transformer.TEXT)
    command.set_defaults(run=lambda options: _with_results(run_transformer, options))
    command.add_argument("--settings", choices=transformer.SETTINGS, nargs="+", help="these only (default: all)")
    command.add_argument("--arms", choices=ARMS, nargs="+", help="these only (default: all)")
    command.add_argument("--steps", type=positive_int, help="of each run (default: the setting's own)")
    command.add_argument("--seeds", type=positive_int, default=3, help="how many seeds (default: %(default)s)")
    _add_out(command)
    command = add(
        run_minima, 5, "784-16-10-10 on MNIST, teleported to flatter and sharper, less and more curved places"
    )
    _add_schedule_options(command)
    _add_data_options(command, required=True)
    command = add(run_digits, 5, "the demo: 64-128-128-10 on scikit-learn's digits, or on MNIST-format files")
    _add_teleport_options(command)
    _add_data_options(command, required=False)
    _add_study(commands)
    return parser


def _add_study(commands: argparse._SubParsersAction[Parser]) -> None:
    text = (
        "is it worth it? Seven tuned optimizers without and with teleports on four problems; goes on where it stopped"
    )
    command = commands.add_parser("study", help=text, description=text)
    command.set_defaults(run=lambda options: _with_results(run_study, options))
    command.add_argument("--data-dir", type=Path, help="folder with MNIST-format files, for the problems on mnist")
    command.add_argument("--problem", choices=FULL, nargs="+", help="train these only (default: all)")
    command.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", help="train with these only (default: all)")
    command.add_argument("--processes", type=positive_int, default=2, help="runs at a time (default: %(default)s)")
    command.add_argument(
        "--quick", action="store_true", help="few samples, epochs, rates and seeds: two or three minutes"
    )
    command.add_argument("--tables", action="store_true", help="train nothing: tables and figure of the runs in --out")
    _add_out(command)


def _add_seed_options(parser: argparse.ArgumentParser, seeds: int) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=natural, default=0, help="the first seed (default: %(default)s)")
    group.add_argument("--seeds", type=positive_int, default=seeds, help="how many seeds (default: %(default)s)")
    _add_out(group)


def _add_rate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lr", type=positive_float, help="learning rate")


def _add_out(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--out", type=Path, default=Path("symtele_out"), help="results' folder (default: %(default)s)")


def _add_search_options(
    parser: argparse.ArgumentParser, epochs: str, step_size: Callable[[str], float | str]
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("teleports")
    group.add_argument("--teleport-epochs", type=epoch_list, metavar="E,E,…", help=epochs)
    group.add_argument("--teleport-steps", type=positive_int, help="ascent steps of one teleport")
    group.add_argument("--step-size", type=step_size, help="the rate of the ascent")
    return group


def _add_schedule_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    epochs = "epochs with teleports, counted from 0, such as 1,7,13,19"
    group = _add_search_options(parser, epochs, step_size=auto_or(positive_float))
    group.add_argument("--teleports-per-epoch", type=positive_int)
    group.add_argument("--teleport-batch-size", type=auto_or(positive_int), help="a number of samples, or auto")
    group.add_argument("--holdout-size", type=auto_or(natural), help="further samples that guard them, or auto")
    _add_device_option(parser)
    return group


def _add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="auto", help="cpu, cuda, … (default: cuda if there is one)")


def _add_teleport_options(parser: argparse.ArgumentParser) -> None:
    group = _add_schedule_options(parser)
    group.add_argument("--objective", choices=OBJECTIVES)
    group.add_argument("--action", choices=ACTIONS)
    group.add_argument(
        "--teleport-lr",
        type=positive_float,
        help="the lookahead takes plain gradient steps of this rate (default: the optimizer's own step)",
    )


def _add_data_options(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir", type=Path, required=required, help="folder with train-images-idx3-ubyte[.gz] and so on, or t10k-*"
    )
    group.add_argument("--batch-size", type=positive_int, help="samples of a mini-batch")


def _add_algorithm_options(parser: argparse.ArgumentParser) -> None:
    ours, published = (classification.OUR_ALGORITHM,), (classification.PUBLISHED_ALGORITHM,)
    parser.set_defaults(algorithms=ours)
    group = parser.add_mutually_exclusive_group()

    def add(option: str, algorithms: tuple[str, ...], text: str) -> None:
        group.add_argument(option, dest="algorithms", action="store_const", const=algorithms, help=text)

    add("--published", published, "teleport by the published algorithm")
    add("--both", ours + published, "one curve by this library's teleports, one by the published algorithm")


def positive_int(text: str) -> int:
    return _parse(text, int, lambda value: value >= 1, "a whole number >= 1")


def natural(text: str) -> int:
    return _parse(text, int, lambda value: value >= 0, "a whole number >= 0")


def positive_float(text: str) -> float:
    return _parse(text, float, lambda value: math.isfinite(value) and value > 0, "a finite number > 0")


def epoch_list(text: str) -> tuple[int, ...]:
    """`1,7,13` → (1, 7, 13), sorted and without repetitions."""
    return tuple(sorted({natural(part) for part in text.split(",")}))


def auto_or(parse: Callable[[str], float]) -> Callable[[str], float | str]:
    return lambda text: text if text == "auto" else parse(text)


def device(text: str) -> str:
    """A device that this torch can use; `auto` is cuda where there is one."""
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use device {text!r}: {str(error).splitlines()[0]}") from error
    return text


def _parse(text: str, convert: Callable[[str], Number], accepts: Callable[[Number], bool], expected: str) -> Number:
    with suppress(ValueError):
        value = convert(text)
        if accepts(value):
            return value
    raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
