"""`retail-pos import FILE --map MAP.toml [--dry-run] [--report R.json]`, and `retail-pos import FILE --guess`."""

import json
import time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import click
from rich.console import Console
from rich.table import Column, Table

from chassis import tls
from chassis.lifecycle import FORCED_EXIT_CODE
from pos.errors import PosError
from pos.importing import maps, sending
from pos.importing.books import Books, Reason
from pos.importing.guess import guess
from pos.importing.maps import BadMap
from pos.importing.reading import DELIMITERS, Source, UnreadableFile
from pos.importing.sending import Sent
from pos.progress import waiting_for, work_progress
from pos.settings import Settings

REFRESH_S = 0.1


def run(file: Path, name: str, settings: Settings, console: Console, *, dry_run: bool, report: IO[str] | None) -> int:
    """Exit code 0: all of the file is accounted for, and the service has what was sent; 1: it has not; 2: nothing was
    sent, as the file or the map cannot be used.
    """
    try:
        meaning = maps.load(name)
        source = Source(
            file, encoding=meaning.encoding, delimiter=meaning.delimiter, columns=list(meaning.columns.values())
        )
        with console.status(f"reading {file.name}"):
            books = Books(source, meaning)
            sales = list(books.make())
    except (BadMap, UnreadableFile) as error:
        click.echo(f"{error}\nnothing was sent", err=True)
        return 2
    show_books(books, console)
    sent = None
    if not dry_run:
        try:
            sent = _send(sales, settings, console)
        except (PosError, tls.Broken) as error:
            click.echo(f"the import stopped: {error}\nsend the file again: what is stored stays as it is", err=True)
            return 1
        except KeyboardInterrupt:
            click.echo("stopped; what was acknowledged is stored: sending the file again goes on", err=True)
            return FORCED_EXIT_CODE
        show_sent(sent, console)
    if report:
        with report:
            json.dump(as_json(books, sent), report, indent=2, ensure_ascii=False)
            report.write("\n")
    return 0 if books.balance == 0 and (sent is None or sent.agrees) else 1


def run_guess(file: Path) -> int:
    """Print a first map."""
    try:
        click.echo(guess(Source(file)), nl=False)
    except UnreadableFile as error:
        click.echo(str(error), err=True)
        return 2
    return 0


def _send(sales: list[Any], settings: Settings, console: Console) -> Sent:
    with work_progress(console) as progress:
        bar = progress.add_task("sent", total=len(sales), note="")
        shown_at = 0.0

        def show(sent: Sent) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at > REFRESH_S or sent.sent.sales == len(sales):
                shown_at = time.monotonic()
                progress.update(bar, completed=sent.sent.sales, note="")

        def pause(pause_s: float, why: PosError) -> None:
            progress.update(bar, note=waiting_for(why))
            time.sleep(pause_s)

        return sending.send(
            sales,
            settings.purchases_target,
            tls.credentials(settings),
            Path(settings.till_certificates) if settings.till_certificates else None,
            pause=pause,
            progress=show,
        )


def show_books(books: Books, console: Console) -> None:
    """What the file turned out to be, and where all of it goes."""
    found = books.source.found
    told = [found.kind]
    if found.encoding:
        told += [found.encoding_text, f"delimiter {DELIMITERS.get(found.delimiter, repr(found.delimiter))}"]
    told += [f"decimal {'comma' if books.decimal == ',' else 'point'}", f"dates as {books.dates}"]
    told += [f"times of {books.map.time_zone}"]
    console.print(f"{books.source.path.name}: {'; '.join(told)}", markup=False)
    table = Table(
        "", Column("rows", justify="right"), Column("sales", justify="right"), Column("amount", justify="right")
    )
    table.add_row("in the file", f"{books.rows:,}", "", _money(books.amount))
    for reason, note in books.left_out.items():
        unknown = f", {note.amounts_unknown:,} of unknown amount" if note.amounts_unknown else ""
        table.add_row(f"left out: {reason}{unknown}", f"-{note.rows:,}", "", _money(-note.amount))
    for rule, note in books.taken_off.items():
        table.add_row(f"taken off: {rule}", f"({note.rows:,})", "", _money(-note.amount))
    kept = books.rows - sum(note.rows for note in books.left_out.values())
    table.add_section()
    table.add_row("to be sent", f"{kept:,}", f"{books.sales:,}", _money(books.sent_amount))
    console.print(table)
    for reason, note in books.left_out.items():
        _show_examples(reason, note, console)
    if books.balance:
        console.print(f"{_money(books.balance)} of the file is not accounted for: this is a fault of the importer")


def _show_examples(reason: str, note: Reason, console: Console) -> None:
    console.print(f"{reason}, such as", markup=False)
    for example in note.examples:
        console.print(f"  line {example.line}: {example.text}", markup=False)


def show_sent(sent: Sent, console: Console) -> None:
    """What was sent and what the service has, side by side."""
    table = Table("", Column("sales", justify="right"), Column("amount", justify="right"))
    table.add_row("sent", f"{sent.sent.sales:,}", _cents(sent.sent.cents))
    for reason, refusal in sent.refused.items():
        table.add_row(f"refused: {reason}", f"-{refusal.sales:,}", _cents(-refusal.cents))
    table.add_section()
    before = f", {sent.replayed:,} of them before" if sent.replayed else ""
    table.add_row(f"stored by the service{before}", f"{sent.answered.sales:,}", _cents(sent.answered.cents))
    table.add_row("its sums of those days and branches", f"{sent.chain.sales:,}", _cents(sent.chain.cents))
    console.print(table)
    for reason, refusal in sent.refused.items():
        console.print(f"{reason}, such as", markup=False)
        for example in refusal.examples:
            console.print(f"  {example}", markup=False)
    for day, branch in sent.lacking[:5]:
        console.print(f"branch {branch} lacks sales of {day}")
    console.print("All agree." if sent.agrees else "They do not agree.")


def as_json(books: Books, sent: Sent | None) -> dict[str, object]:
    found = books.source.found
    told: dict[str, object] = {
        "file": str(books.source.path),
        "map": books.map.name,
        "found": {
            "kind": found.kind,
            "encoding": found.encoding,
            "delimiter": found.delimiter,
            "decimal": books.decimal,
            "dates": books.dates.order,
        },
        "rows": books.rows,
        "amount": _plain(books.amount),
        "left_out": [_reason(reason, note) for reason, note in books.left_out.items()],
        "taken_off": [_reason(rule, note) for rule, note in books.taken_off.items()],
        "to_send": {"sales": books.sales, "amount": _plain(books.sent_amount)},
        "balance": _plain(books.balance),
    }
    if sent is not None:
        told["sent"] = {"sales": sent.sent.sales, "amount": _plain(Decimal(sent.sent.cents).scaleb(-2))}
        told["stored"] = {
            "sales": sent.answered.sales,
            "amount": _plain(Decimal(sent.answered.cents).scaleb(-2)),
            "before": sent.replayed,
        }
        told["refused"] = [
            {
                "reason": reason,
                "sales": refusal.sales,
                "amount": _plain(Decimal(refusal.cents).scaleb(-2)),
                "examples": refusal.examples,
            }
            for reason, refusal in sent.refused.items()
        ]
        told["agrees"] = sent.agrees
    return told


def _reason(reason: str, note: Reason) -> dict[str, object]:
    return {
        "reason": reason,
        "rows": note.rows,
        "amount": _plain(note.amount),
        "rows_of_unknown_amount": note.amounts_unknown,
        "examples": [example._asdict() for example in note.examples],
    }


def _plain(amount: Decimal) -> str:
    text = f"{amount:f}"
    return f"{amount:.2f}" if Decimal(text).as_tuple().exponent >= -2 else text.rstrip("0")  # type: ignore[operator]


def _money(amount: Decimal) -> str:
    whole, _, fraction = _plain(amount).partition(".")
    return f"{int(whole):,}.{fraction}" if whole != "-0" else f"-0.{fraction}"


def _cents(cents: int) -> str:
    return _money(Decimal(cents).scaleb(-2))
