"""What the dashboard shows: from the chain's view to that of each process, in the order of a sale's way.

Each panel says what is normal. `$__rate_interval` is Grafana's: the shortest time over which a rate can be told.
"""

from collections.abc import Sequence
from typing import NamedTuple

OURS = 'job=~"purchases|relay|consumer|analytics"'
SOME = " > 0"  # of many lines, those that tell something


class Query(NamedTuple):
    """A question to Prometheus, and what its lines are called. One answer is one figure."""

    expr: str
    legend: str = ""


class Figure(NamedTuple):
    """One number; `bad_from` is where it becomes red, and what it should be is said in words."""

    title: str
    normal: str
    expr: str
    unit: str = "short"
    bad_from: float | None = None
    bad_below: float | None = None
    words: dict[str, str] = {}  # noqa: RUF012 - of a NamedTuple, which nobody changes


class Lines(NamedTuple):
    """A figure over time."""

    title: str
    normal: str
    queries: Sequence[Query]
    unit: str = "short"
    width: int = 8


def quantiles(metric: str, by: str = "", labels: str = "", of: Sequence[float] = (0.5, 0.99)) -> list[Query]:
    """p50 and p99 of a histogram, over all processes of a kind."""
    groups = ", ".join(["le", *([by] if by else [])])
    name = f"{{{{{by}}}}} " if by else ""
    return [
        Query(
            f"histogram_quantile({q}, sum by ({groups}) (rate({metric}_bucket{labels}[$__rate_interval])))",
            f"{name}p{q * 100:g}",
        )
        for q in of
    ]


def rate(metric: str, by: str = "", labels: str = "", *, none: bool = False) -> str:
    """A second's; `none` where a counter has no line before it counts for the first time."""
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({metric}{labels}[$__rate_interval]))" + (" or vector(0)" if none else "")


CHAIN = [
    Figure("Sales a minute", "follows the shops' day", "sum(rate(purchases_flushed_sales_total[2m])) * 60"),
    Figure(
        "Numbers are complete up to … ago",
        "below 6 s; red: the numbers fall behind",
        "max(analytics_complete_through_lag_seconds)",
        "s",
        bad_from=60,
    ),
    Figure(
        "Wrong, by the audit",
        "none; red: is anything wrong with the numbers?",
        "max(analytics_audit_wrong) + max(analytics_audit_foreign_events)",
        bad_from=1,
        words={"0": "none"},
    ),
    Figure(
        "Audit's word is … old",
        "about a minute; red: the audit does not run",
        "time() - max(analytics_audit_compared_through_seconds)",
        "s",
        bad_from=600,
    ),
    Figure(
        "Processes up",
        "as many as were started; red: a process is down",
        f"sum(up{{{OURS}}}) / count(up{{{OURS}}})",
        "percentunit",
        bad_below=1,
    ),
    Figure(
        "Alarms",
        "none; each names its section of the runbook",
        'count(ALERTS{alertstate="firing"}) or vector(0)',
        bad_from=1,
        words={"0": "none"},
    ),
]

ROWS: Sequence[tuple[str, Sequence[Lines]]] = [
    (
        "From the till to the numbers",
        [
            Lines(
                "Sold, published, counted, a second",
                "the three go together",
                [
                    Query(rate("purchases_flushed_sales_total"), "sold"),
                    Query(rate("relay_events_sent_total"), "published"),
                    Query(rate("analytics_events_total", labels='{outcome="counted"}'), "counted"),
                ],
                "ops",
                12,
            ),
            Lines(
                "How long after the sale it is counted",
                "below a second; the whole chain is complete up to 6 s ago",
                [
                    *quantiles("analytics_event_age_seconds"),
                    Query("max(analytics_complete_through_lag_seconds)", "complete up to"),
                ],
                "s",
                12,
            ),
        ],
    ),
    (
        "Purchases",
        [
            Lines(
                "Sales and uploads by outcome",
                "OK; UNAVAILABLE only while something restarts, INTERNAL never",
                [
                    Query(
                        rate("grpc_server_handled_total", "grpc_method, grpc_code", '{job="purchases"}') + SOME,
                        "{{grpc_method}} {{grpc_code}}",
                    )
                ],
                "ops",
            ),
            Lines(
                "Time to answer a sale",
                "some tens of milliseconds under load",
                quantiles(
                    "grpc_server_handling_seconds",
                    labels='{job="purchases", grpc_method="CreatePurchase"}',
                    of=(0.5, 0.95, 0.99),
                ),
                "s",
            ),
            Lines(
                "Refused, by reason",
                "the tills' own mistakes; OVERLOADED rare",
                [Query(rate("grpc_server_refused_total", "reason", '{job="purchases"}', none=True), "{{reason}}")],
                "ops",
            ),
            Lines(
                "Sales in a commit",
                "grows with the load",
                [Query(f"{rate('purchases_flushed_sales_total')} / {rate('purchases_flushes_total')}", "sales")],
            ),
            Lines("Time of a commit", "as the disk has it", quantiles("purchases_flush_seconds"), "s"),
            Lines(
                "Outbox, and its limit",
                "near 0; at the limit sales are refused",
                [
                    Query("max(purchases_outbox_backlog)", "events that wait"),
                    Query("max(purchases_outbox_backlog_max)", "limit"),
                ],
            ),
        ],
    ),
    (
        "Relay",
        [
            Lines(
                "Oldest event that waits",
                "below a second",
                [Query("max(relay_oldest_pending_seconds)", "age")],
                "s",
            ),
            Lines("Time to the broker's confirm", "milliseconds", quantiles("relay_confirm_seconds"), "s"),
            Lines(
                "Not sent, by status; breaker",
                "NEW near 0, FAILED 0, breaker 0",
                [
                    Query("max by (status) (relay_outbox_events)", "{{status}}"),
                    Query("min(relay_breaker_open)", "breaker open"),
                    Query(rate("relay_events_lost_by_broker_total"), "lost by the broker, a second"),
                ],
            ),
        ],
    ),
    (
        "Consumer and audit",
        [
            Lines(
                "Deliveries, by outcome",
                "counted as sold; duplicates after restarts",
                [
                    Query(rate("analytics_events_total", "outcome"), "{{outcome}}"),
                    Query(rate("analytics_redeliveries_total"), "redelivered"),
                ],
                "ops",
            ),
            Lines("Time to count a batch", "tens of milliseconds", quantiles("analytics_batch_seconds"), "s"),
            Lines(
                "Deliveries in a batch",
                "grows with the load",
                quantiles("analytics_batch_events"),
            ),
            Lines(
                "In quarantine, by reason",
                "0",
                [Query("max by (reason) (analytics_quarantined_events) or vector(0)", "{{reason}}")],
            ),
            Lines(
                "Awaited by the keeper; batches not summed up",
                "comes back to 0; some hundreds",
                [
                    Query("max(analytics_keeper_awaited)", "awaited"),
                    Query("max(analytics_noted_batches)", "batches"),
                ],
            ),
            Lines(
                "The audit's work",
                "on their way: back to 0; days never proven: down to 0",
                [
                    Query("max(analytics_audit_pending_purchases)", "purchases on their way"),
                    Query("max(analytics_audit_unproven_days)", "days never proven"),
                    Query("max(analytics_audit_wrong)", "wrong"),
                ],
            ),
        ],
    ),
    (
        "Owners' questions",
        [
            Lines(
                "Answers, by method and outcome",
                "OK",
                [
                    Query(
                        rate("grpc_server_handled_total", "grpc_method, grpc_code", '{job="analytics"}') + SOME,
                        "{{grpc_method}} {{grpc_code}}",
                    )
                ],
                "ops",
                12,
            ),
            Lines(
                "Time to answer, p99 by method",
                "milliseconds; heavy questions more",
                quantiles("grpc_server_handling_seconds", "grpc_method", '{job="analytics"}', of=(0.99,)),
                "s",
                12,
            ),
        ],
    ),
    (
        "Databases and processes",
        [
            Lines(
                "Vacuum is held back for",
                "below a minute, but for backups",
                [
                    Query("max(relay_cleanup_blocker_seconds)", "purchases"),
                    Query("max(analytics_snapshot_held_seconds)", "analytics"),
                ],
                "s",
            ),
            Lines(
                "A failover would lose sales",
                "0",
                [
                    Query("max(purchases_failover_unsafe)", "purchases"),
                    Query("max(analytics_failover_unsafe)", "analytics"),
                ],
            ),
            Lines(
                "Connections to the databases, by pool",
                "used now and then; nobody waits for long",
                [
                    Query(
                        'sum by (job, pool) (db_client_connection_count{state="used"})' + SOME, "{{job}} {{pool}} used"
                    ),
                    Query("sum by (job) (db_client_connection_pending_requests)", "{{job}} waiting"),
                ],
            ),
            Lines(
                "Time to get a connection, p99 by process",
                "below a millisecond; above a second, calls are refused soon",
                quantiles("db_client_connection_wait_time_seconds", "job", of=(0.99,)),
                "s",
            ),
            Lines(
                "Partitions to come, days",
                "purchases above 58, the outbox above 2.9",
                [Query("min by (table) (purchases_partitions_ahead_days)", "{{table}}")],
            ),
            Lines(
                "Processor, cores",
                "below one for each process",
                [Query(rate("process_cpu_seconds_total", "job", f"{{{OURS}}}"), "{{job}}")],
            ),
            Lines(
                "Memory",
                "level",
                [Query(f"sum by (job) (process_resident_memory_bytes{{{OURS}}})", "{{job}}")],
                "bytes",
            ),
            Lines(
                "Open files and connections",
                "level; far below the limit",
                [Query(f"sum by (job) (process_open_fds{{{OURS}}})", "{{job}}")],
            ),
            Lines(
                "Versions that run",
                "one, but while a release is rolled out",
                [Query("count by (version) (retail_build_info)", "{{version}}")],
            ),
        ],
    ),
]
