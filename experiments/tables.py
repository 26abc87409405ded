"""Plain-text tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.records import Run, TeleportRecord, by_label


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, as wide as their widest cell; the first column to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def format_line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    ruler = "  ".join("-" * width for width in widths)
    return "\n".join([format_line(header), ruler, *(format_line(row) for row in rows)])


def epoch_table(runs: Sequence[Run]) -> str:
    """A line for each epoch of each run: what was measured after it, and the teleports accepted during it."""
    header = ("run", "epoch", "train loss", "val. loss", "val. acc.", "‖∇L‖", "time (s)", "teleports")
    rows = [
        (
            run.label,
            str(record.epoch),
            f"{record.train_loss:.4f}",
            _optional(record.validation_loss, ".4f"),
            _optional(record.validation_accuracy, ".2%"),
            f"{record.gradient_norm:.3g}",
            f"{record.seconds:.2f}",
            str(sum(record.epoch - 1 <= one.position < record.epoch for one in run.teleports if one.accepted) or ""),
        )
        for run in runs
        for record in run.epochs
    ]
    return format_table(header, rows)


def teleport_table(runs: Sequence[Run]) -> str:
    """A line for each teleport: where, on how many samples, ‖∇L‖ and the loss of its batch before and after."""
    header = ("run", "seed", "at epoch", "n", "‖∇L‖ before", "after", "loss before", "after", "drift", "ms", "note")
    rows = [(run.label, str(run.seed), *_teleport_cells(teleport)) for run in runs for teleport in run.teleports]
    return format_table(header, rows) if rows else "no teleports"


def summary_table(runs: list[Run]) -> str:
    """A line for each run: how it ended."""
    header = ("run", "seed", "epochs", "train loss", "val. loss", "val. acc.", "time (s)", "teleports")
    rows = [
        (
            run.label,
            str(run.seed),
            str(run.final.epoch),
            f"{run.final.train_loss:.4g}",
            _optional(run.final.validation_loss, ".4f"),
            _optional(run.final.validation_accuracy, ".2%"),
            f"{run.final.seconds:.2f}",
            f"{sum(teleport.accepted for teleport in run.teleports)} of {len(run.teleports)}" if run.teleports else "-",
        )
        for members in by_label(runs).values()
        for run in members
    ]
    return format_table(header, rows)


def _teleport_cells(teleport: TeleportRecord) -> tuple[str, ...]:
    return (
        f"{teleport.position:.2f}",
        str(teleport.samples),
        f"{teleport.gradient_norm_before:.4g}",
        f"{teleport.gradient_norm_after:.4g}",
        f"{teleport.loss_before:.4g}",
        f"{teleport.loss_after:.4g}",
        f"{teleport.drift:.1e}",
        f"{1e3 * teleport.seconds:.0f}",
        "" if teleport.accepted else f"rejected: {teleport.reason}",
    )


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
