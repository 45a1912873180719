"""The query server: does an answer's cost grow with the history, what do read models save, what does gRPC add?"""

import datetime
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from statistics import median

from tests.bench import stage
from tests.bench.analytics import years
from tests.bench.analytics.asking import Asked, History, ask, ask_purchases, rows_read
from tests.bench.analytics.plot import plot
from tests.bench.analytics.questions import RANGE_DAYS, Question, different_summaries, questions
from tests.bench.analytics.summaries import ECHO, IN_FLIGHT, SUMMARY, Load, measure_summaries
from tests.bench.analytics.years import DAY
from tests.bench.figures import Goal, Outcome, Plan, Score, median_ratio
from tests.bench.history import require_room
from tests.bench.show import Show

PURCHASES_ROUNDS_MAX = 3  # in which the tables of purchases are asked, too: some answers take seconds
CUSTOMERS = 500  # of those who are asked for
FILTERS = 1_000  # of the summaries

# The goals are meant for a history of 100 times the range that is asked for: three years.
GROWTH = Goal("longest / shortest history", 1.5, more_is_better=False)
GROWTHS = {"ListTopProducts_all_time": Goal(GROWTH.meaning, 3.0, more_is_better=False)}
SAVING = Goal("SQL on purchases / ours", 100, more_is_better=True)
SAVINGS = dict.fromkeys(("GetSalesSummary", "ListTopProducts", "ListLoyalCustomers"), SAVING)
ON_TOP = Goal(f"calls/s / {ECHO}", 0.7, more_is_better=True)


def run(plan: Plan, show: Show) -> Outcome:
    rows = _rows(plan.history)
    with ExitStack() as stack:
        show.say("Starting a private PostgreSQL …")
        directory = stack.enter_context(stage.temporary_directory())
        require_room(rows // years.ITEMS, directory)
        server = stack.enter_context(stage.private_postgres(directory))
        last = datetime.datetime.now(datetime.UTC).date() - DAY
        first = last - (plan.history * RANGE_DAYS - 1) * DAY
        purchases_url = stage.migrated(server, "purchases", "purchases_svc")
        with show.progress(f"{rows:,} items, selling", rows) as advance:
            years.load_purchases(purchases_url, first, last, advance)
        histories = []
        for times in sorted({1, max(plan.history // 10, 1), plan.history}):
            url = stage.migrated(server, f"analytics_{times}", "analytics_svc")
            since = last - (times * RANGE_DAYS - 1) * DAY
            with show.progress(f"{_rows(times):,} items, adding up", _rows(times)) as advance:
                years.load_read_models(url, purchases_url, since, last, advance)
            settings = {"ANALYTICS_DATABASE_URL": url, "LOG_LEVEL": "WARNING"}
            service = stack.enter_context(stage.service("analytics", ("analytics_svc", "serve"), settings, directory))
            histories.append(History(times, url, service.address))

        asked = questions(last, years.some_customers(histories[0].url, CUSTOMERS))
        answers, purchases_ms = _measure(asked, histories, purchases_url, plan.rounds, show)
        rows_of_answers = {question.name: [rows_read(each, question) for each in histories] for question in asked}
        requests = different_summaries(FILTERS, first, last)
        loads, fed = measure_summaries(histories[-1], requests, plan.rounds, plan.measure_s, directory, show)

    growth = {name: median(each[-1].p50_ms / each[0].p50_ms for each in rounds) for name, rounds in answers.items()}
    saving = {
        question.oltp_name: median(purchases_ms[question.name])
        / median(each[-1].p50_ms for each in answers[question.name])
        for question in asked
    }
    on_top = median_ratio(*([load.calls_per_s for load in loads[name]] for name in (SUMMARY, ECHO)))
    show.table(*_table_of_answers(histories, answers, purchases_ms))
    show.table(*_table_of_rows(histories, rows_of_answers))
    show.table(*_table_of_loads(loads, fed))
    verdicts = _verdicts(growth, saving, on_top)
    show.verdicts(verdicts)
    return Outcome(
        {
            f"query_growth_{plan.history}x": growth,
            f"query_vs_oltp_{plan.history}x": saving,
            "summary_vs_one_select": on_top,
        },
        {
            "histories": [history.times for history in histories],
            "answers": {name: [[a._asdict() for a in each] for each in rounds] for name, rounds in answers.items()},
            "rows_read": rows_of_answers,
            "purchases_ms": purchases_ms,
            "summaries": {name: [load._asdict() for load in each] for name, each in loads.items()},
            "events_counted_per_s": fed,
        },
        plot(histories, answers, purchases_ms, loads),
        [Score(value, replace(goal, meaning=meaning)) for meaning, value, goal in verdicts if goal],
    )


def _rows(times: int) -> int:
    return times * RANGE_DAYS * years.ROWS_A_DAY


Answers = Mapping[str, Sequence[Sequence[Asked]]]  # by question: in each round, from each history


def _measure(
    asked: Sequence[Question], histories: Sequence[History], purchases_url: str, rounds: int, show: Show
) -> tuple[dict[str, list[list[Asked]]], dict[str, list[float]]]:
    """Each question to each history in turn, after a round that does not count, and to the tables of purchases."""
    answers: dict[str, list[list[Asked]]] = {question.name: [] for question in asked}
    purchases_ms: dict[str, list[float]] = {question.name: [] for question in asked}
    with show.progress("questions", (1 + rounds) * len(asked)) as advance:
        for number in range(1 + rounds):
            for question in asked:
                found = [ask(history, question) for history in histories]
                if number:
                    answers[question.name].append(found)
                if 0 < number <= PURCHASES_ROUNDS_MAX:
                    purchases_ms[question.name].append(ask_purchases(purchases_url, question))
                advance(1)
    return answers, purchases_ms


def _verdicts(
    growth: Mapping[str, float], saving: Mapping[str, float], on_top: float
) -> list[tuple[str, float, Goal | None]]:
    return [
        *((f"{name}: {GROWTH.meaning}", value, GROWTHS.get(name, GROWTH)) for name, value in growth.items()),
        *((f"{name}: {SAVING.meaning}", value, SAVINGS.get(name)) for name, value in saving.items()),
        (f"{SUMMARY}: {ON_TOP.meaning}", on_top, ON_TOP),
    ]


Table = tuple[str, list[str], list[list[str]]]


def _table_of_answers(
    histories: Sequence[History], answers: Answers, purchases_ms: Mapping[str, Sequence[float]]
) -> Table:
    headings = ["", *(f"{history.times} ×" for history in histories), "p99", "in SQL"]
    lines = []
    for name, rounds in answers.items():
        medians = [Asked(*map(median, zip(*each, strict=True))) for each in zip(*rounds, strict=True)]
        times = [f"{asked.p50_ms:.2f}" for asked in medians]
        lines.append([name, *times, f"{medians[-1].p99_ms:.1f}", f"{median(purchases_ms[name]):,.1f}"])
    title = f"ms, by history in units of {RANGE_DAYS} days; p99: of the last"
    return title, headings, lines


def _table_of_rows(histories: Sequence[History], rows: Mapping[str, list[float]]) -> Table:
    headings = ["", *(f"{history.times} ×" for history in histories)]
    return "Rows read for an answer", headings, [[n, *(f"{each:,.0f}" for each in read)] for n, read in rows.items()]


def _table_of_loads(loads: Mapping[str, Sequence[Load]], fed: float) -> Table:
    lines = []
    for name, rounds in loads.items():
        load = Load(*map(median, zip(*rounds, strict=True)))
        lines.append([name, f"{load.calls_per_s:,.0f}", f"{load.p50_ms:.1f}", f"{load.p99_ms:.1f}"])
    title = f"{IN_FLIGHT} calls at once, {fed:,.0f} new sales/s beside them"
    return title, ["", "calls/s", "p50 ms", "p99 ms"], lines
