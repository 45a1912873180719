"""Several cells: what a purchase costs with more of them at the same load, and what a lost one does to another."""

from contextlib import ExitStack
from statistics import median

from deploy.healthcheck import is_serving
from deploy.local.machine import StackError, wait_until
from tests.bench import stage
from tests.bench.cells.chain import Chain, Measured, chain
from tests.bench.figures import Flow, Goal, Outcome, Plan, median_ratio, middle_flow, scores
from tests.bench.show import Show

NUMBERS = (1, 2, 4)
PER_S = 800.0  # over all cells: what two cores bear, with the load's clients and all servers on them
LONGER = 2  # times as long as others are measured
BACK_TIMEOUT_S = 60.0
GOALS = {
    "cells_cost_growth": Goal("four cells : one, CPU a purchase", 1.1, more_is_better=False),
    "lost_cell_p99_ratio": Goal("p99 beside a lost cell : beside one that is there", 1.5, more_is_better=False),
}


def run(plan: Plan, show: Show) -> Outcome:
    seconds = plan.measure_s * LONGER
    with ExitStack() as stack:
        show.say("Starting a PostgreSQL for each cell, and what they share, three times …")
        directory = stack.enter_context(stage.temporary_directory())
        chains = {number: stack.enter_context(chain(directory / str(number), number)) for number in NUMBERS}

        def sell(number: int) -> Measured:
            others = [it for other, each in chains.items() if other != number for it in each.processes]
            with stage.paused(*others):
                return chains[number].sell(PER_S, seconds)

        contenders = {f"{number} cells": (lambda number=number: sell(number)) for number in NUMBERS}
        rounds = show.in_turn(contenders, plan.rounds, "the same load over more cells")
        others = [it for number in (1, 4) for it in chains[number].processes]
        with stage.paused(*others), show.progress("a lost cell", plan.rounds) as advance:
            beside = []
            for _ in range(plan.rounds):
                beside.append(lost(chains[2], seconds))
                advance(1)

    flows = {
        name: [Flow(sum(load.purchases / load.seconds for load in each.loads), each.cpu_us) for each in measured]
        for name, measured in rounds.items()
    }
    costs = {name: [sum(flow.cpu_us.values()) for flow in each] for name, each in flows.items()}
    first, *more = costs
    growth = {name: median_ratio(costs[name], costs[first]) for name in more}
    ratios = {
        "cells_cost_growth": growth[more[-1]],
        "lost_cell_p99_ratio": median(without / with_it for with_it, without in beside),
    }
    show.flows(f"{PER_S:,.0f} purchases a second over all cells", {name: middle_flow(it) for name, it in flows.items()})
    show.ratios("Beside one cell, or beside a cell that is there", ratios, GOALS)
    details = {
        "per_s": PER_S,
        "cost_growth": growth,
        "flows": {name: [flow._asdict() for flow in each] for name, each in flows.items()},
        "p99_ms_with_and_without_the_other": beside,
    }
    return Outcome({"cells": ratios}, details, scores=scores(ratios, GOALS))


def lost(pair: Chain, seconds: float) -> tuple[float, float]:
    """The first cell's p99 while the second is there, and while it is not: its database is killed, and its processes
    look for that all the while. The second sells nothing meanwhile, so that only its loss makes a difference.
    """
    first, second = pair.cells
    alone = pair._replace(cells=[first])
    with_it = alone.sell(PER_S / len(NUMBERS), seconds).loads[0].p99_ms
    second.postgres.kill()
    try:
        without = alone.sell(PER_S / len(NUMBERS), seconds).loads[0].p99_ms
    finally:
        second.postgres.start()
    if not wait_until(lambda: is_serving(second.purchases.address), BACK_TIMEOUT_S):
        raise StackError("the second cell does not come back")
    return with_it, without
