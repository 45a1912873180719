"""The way of an event: the relay, the consumer, and the whole pipeline at a steady rate, each beside its yardstick."""

from collections.abc import Sequence
from contextlib import ExitStack
from statistics import median

from tests.bench import stage
from tests.bench.figures import Flow, Goal, Outcome, Plan, median_ratio, middle, middle_flow, percentile, scores
from tests.bench.pipeline import moving, soon, whole
from tests.bench.pipeline.moving import APPLY, ONE_BY_ONE, RAW, RELAY, SINGLE, TWO
from tests.bench.pipeline.plot import plot
from tests.bench.show import Show

GOALS = {
    "relay_vs_raw_pipelined": Goal("relay : pika, pipelined", 0.75, more_is_better=True),
    "relay_vs_one_confirm": Goal("relay : pika, one by one", 8.0, more_is_better=True),
    "apply_vs_single": Goal("consumer : one by one", 6.0, more_is_better=True),
    "apply_two_consumers_vs_one": Goal("two consumers : one", 1.5, more_is_better=True),
    "apply_lock_wait_share": Goal("two consumers, waiting for locks : working", 0.05, more_is_better=False),
    "end_to_end_vs_pgbench": Goal("whole pipeline : pgbench", 1.0, more_is_better=True),
    "keeper_and_audit_cost": Goal("keeper and audit, of all CPU", 0.05, more_is_better=False),
    "relay_latency_p50": Goal("commit to queue at 100 events/s, median ms", 5.0, more_is_better=False),
    "relay_cpu": Goal("relay and PostgreSQL, CPU µs an event", 30.0, more_is_better=False),
    "visibility_p50": Goal("answer to visible, median ms", 25.0, more_is_better=False),
    "visibility_p99": Goal("answer to visible, p99 ms", 150.0, more_is_better=False),
    "lag_p50": Goal("complete_through_time lies back, median ms", 250.0, more_is_better=False),
}


def run(plan: Plan, show: Show) -> Outcome:
    with ExitStack() as stack:
        show.say("Starting a private PostgreSQL and a private RabbitMQ …")
        directory = stack.enter_context(stage.temporary_directory())
        scene = moving.Scene(
            stack.enter_context(stage.private_postgres(directory / "postgres")),
            stack.enter_context(stage.private_rabbitmq(directory / "rabbitmq")),
            directory,
        )
        relayed = moving.relay(scene, plan, show)
        one_by_one = soon.measure(scene, plan, show)
        applied, waiting = moving.apply(scene, plan, show)
        rounds = whole.measure(scene, plan, show)

    ratios = {
        "relay_vs_raw_pipelined": median_ratio(per_s(relayed[RELAY]), per_s(relayed[RAW])),
        "relay_vs_one_confirm": median_ratio(per_s(relayed[RELAY]), per_s(relayed[ONE_BY_ONE])),
        "apply_vs_single": median_ratio(per_s(applied[APPLY]), per_s(applied[SINGLE])),
        "apply_two_consumers_vs_one": median_ratio(per_s(applied[TWO]), per_s(applied[APPLY])),
        "apply_lock_wait_share": median(waiting),
        "end_to_end_vs_pgbench": median(each.highest.ratio for each in rounds),
        "keeper_and_audit_cost": median(each.highest.keeper_and_audit_share for each in rounds),
    }
    visible_ms = sorted(ms for each in rounds for ms in each.half.visible_ms)
    lag_ms = sorted(ms for each in rounds for ms in each.half.lag_ms)
    visibility_ms = {f"p{percent}": percentile(visible_ms, percent) for percent in (50, 99)}
    relay_ms, broker_ms = (
        sorted(ms for each in one_by_one[name] for ms in each.waits_ms) for name in (soon.RELAY, soon.ALONE)
    )
    relay_latency_ms = {f"p{percent}": percentile(relay_ms, percent) for percent in (50, 99)}
    broker_latency_ms = {f"p{percent}": percentile(broker_ms, percent) for percent in (50, 99)}
    relay_cpu_us = {name: us for name, us in middle_flow(relayed[RELAY]).cpu_us.items() if name != "RabbitMQ"}
    pgbench = middle([each.highest.pgbench for each in rounds])
    pipeline = steady(rounds)

    show.flows("From the outbox to the queue", {name: middle_flow(flows) for name, flows in relayed.items()})
    show.flows("From the queue to the read models", {name: middle_flow(flows) for name, flows in applied.items()})
    show.whole(pgbench, pipeline)
    show.ratios("Beside its yardstick, which is 1", ratios, GOALS)
    half_per_s = median(each.half.purchases / each.half.seconds for each in rounds)
    show.say(
        f"At {half_per_s:,.0f} purchases/s, ListDailySales shows a sale {milliseconds(visible_ms)} after its answer."
    )
    show.say(f"At {soon.EVENTS_PER_S} events/s, one is in the queue {milliseconds(relay_ms)} after its commit.")
    show.say(f"The broker alone takes {milliseconds(broker_ms)} of that: a message of pika's.")
    if lag_ms:
        show.say(f"complete_through_time then lies {milliseconds(lag_ms)} back.")

    details = {
        "events_to_the_queue": raw_flows(relayed),
        "events_one_by_one": {name: [each._asdict() for each in rounds] for name, rounds in one_by_one.items()},
        "events_into_the_read_models": raw_flows(applied),
        "lock_wait_shares": waiting,
        "whole": [each.raw() for each in rounds],
        "visible_ms": visible_ms,
        "lag_ms": lag_ms,
    }
    speeds = {
        whole.PGBENCH: [each.highest.pgbench.purchases_per_s for each in rounds],
        whole.PIPELINE: [each.highest.recorded_per_s for each in rounds],
    }
    picture = plot(relayed, {name: applied[name] for name in (APPLY, SINGLE)}, speeds, pgbench, pipeline, visible_ms)
    figures = {
        "visibility_ms": visibility_ms,
        "relay_latency_ms": relay_latency_ms,
        "broker_latency_ms": broker_latency_ms,
        "relay_cpu_us": relay_cpu_us,
    }
    absolute = {
        "relay_latency_p50": relay_latency_ms["p50"],
        "relay_cpu": sum(relay_cpu_us.values()),
        "visibility_p50": visibility_ms["p50"],
        "visibility_p99": visibility_ms["p99"],
    } | ({"lag_p50": percentile(lag_ms, 50)} if lag_ms else {})
    return Outcome({**ratios, **figures}, details, picture, scores({**ratios, **absolute}, GOALS))


def per_s(flows: Sequence[Flow]) -> list[float]:
    return [flow.events_per_s for flow in flows]


def steady(rounds: Sequence[whole.Round]) -> Flow:
    """The highest steady rate, and what a purchase costs at it."""
    return middle_flow([Flow(each.highest.recorded_per_s, each.highest.cpu_us) for each in rounds])


def milliseconds(ascending: Sequence[float]) -> str:
    return f"{percentile(ascending, 50):,.1f} ms (p99: {percentile(ascending, 99):,.0f} ms)"


def raw_flows(rounds: dict[str, list[Flow]]) -> dict[str, list[dict[str, object]]]:
    return {name: [flow._asdict() for flow in flows] for name, flows in rounds.items()}
