"""A large chain: what each question costs beside a chain of a tenth of the branches, and what the tables weigh."""

import datetime
from contextlib import ExitStack
from statistics import median

from tests.bench import stage
from tests.bench.analytics.asking import Asked, History, ask, rows_read
from tests.bench.analytics.questions import RANGE_DAYS, questions
from tests.bench.analytics.years import DAY, some_customers
from tests.bench.figures import Goal, Outcome, Plan, Score
from tests.bench.history import require_room
from tests.bench.show import Show
from tests.bench.size import chain

BRANCHES, SMALL = 500, 50
PRODUCTS_OF_A_PURCHASE = chain.PRODUCTS_A_DAY // chain.PURCHASES_A_DAY
CUSTOMERS = 500  # of those who are asked for
GROWTH = Goal("500 branches / 50", 1.5, more_is_better=False)


def run(plan: Plan, show: Show) -> Outcome:
    days = max(plan.rows // (BRANCHES * chain.PURCHASES_A_DAY), RANGE_DAYS)
    last = datetime.datetime.now(datetime.UTC).date() - DAY
    first = last - (days - 1) * DAY
    with ExitStack() as stack:
        show.say("Starting a private PostgreSQL …")
        directory = stack.enter_context(stage.temporary_directory())
        require_room(days * BRANCHES * chain.PURCHASES_A_DAY, directory)
        server = stack.enter_context(stage.private_postgres(directory))
        chains = []
        for branches in (SMALL, BRANCHES):
            url = stage.migrated(server, f"chain_{branches}", "analytics_svc")
            rows = days * branches * chain.PRODUCTS_A_DAY
            with show.progress(f"{branches} branches, {days} days", rows) as advance:
                chain.load(url, branches, first, last, advance)
            settings = {"ANALYTICS_DATABASE_URL": url, "LOG_LEVEL": "WARNING"}
            service = stack.enter_context(stage.service("analytics", ("analytics_svc", "serve"), settings, directory))
            chains.append(History(branches, url, service.address))
        asked = questions(last, some_customers(chains[0].url, CUSTOMERS))
        rounds: dict[str, list[list[Asked]]] = {question.name: [] for question in asked}
        with show.progress("questions", (1 + plan.rounds) * len(asked)) as advance:
            for number in range(1 + plan.rounds):
                for question in asked:
                    found = [ask(each, question) for each in chains]
                    if number:
                        rounds[question.name].append(found)
                    advance(1)
        read = {question.name: [rows_read(each, question) for each in chains] for question in asked}
        sizes = chain.table_sizes(chains[-1].url)

    growth = {name: median(large.p50_ms / small.p50_ms for small, large in each) for name, each in rounds.items()}
    lines = []
    for name, each in rounds.items():
        small, large = (Asked(*map(median, zip(*answers, strict=True))) for answers in zip(*each, strict=True))
        figures = [small.p50_ms, large.p50_ms, large.p99_ms]
        lines.append([name, *(f"{ms:.2f}" for ms in figures), *(f"{rows:,.0f}" for rows in read[name])])
    headings = ["", f"{SMALL} branches", f"{BRANCHES}", "p99", f"rows, {SMALL}", f"rows, {BRANCHES}"]
    show.table(f"ms for an answer, of {days} days", headings, lines)
    weights = [[name, f"{count:,}", f"{size / 2**20:,.0f}"] for name, (count, size) in sizes.items()]
    show.table(f"Tables of {BRANCHES} branches", ["", "rows", "MiB"], weights)
    show.verdicts([(f"{name}: {GROWTH.meaning}", value, GROWTH) for name, value in growth.items()])
    return Outcome(
        {"size_growth_10x": growth},
        {
            "days": days,
            "answers": {name: [[a._asdict() for a in each] for each in found] for name, found in rounds.items()},
            "rows_read": read,
            "tables": sizes,
        },
        scores=[Score(value, Goal(f"{name}: {GROWTH.meaning}", GROWTH.value, False)) for name, value in growth.items()],
    )
