"""Makes deploy/grafana/dashboards/retail-backbone.json, the dashboard: `python -m deploy.dashboard [FILE]`.

What it shows is in deploy/dashboard_figures.py; a test asks a real Prometheus every question in it.
"""

import itertools
import json
import sys
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueGraphMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardSpecialValueMapOptions,
    DataSourceRef,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
)

from deploy.dashboard_figures import CHAIN, ROWS, Figure, Lines, Query

FILE = Path(__file__).parent / "grafana" / "dashboards" / "retail-backbone.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNBOOK = "deploy/RUNBOOK.md"
COLUMNS = 24  # of Grafana's grid


def build() -> str:
    """The dashboard as JSON."""
    made = (
        dashboard.Dashboard("Retail backbone")
        .uid("retail-backbone")
        .description("What sells now, how fresh the numbers are, whether they are right; and what a sale passes.")
        .tags(["retail"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .annotation(
            dashboard.AnnotationQuery()
            .name("Alarms")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("red")
            .expr('ALERTS{alertstate="firing"}')
        )
        .with_row(dashboard.Row("The chain").id(1_000))
    )
    ids = itertools.count(1)  # links to panels go by them
    for figure in CHAIN:
        made = made.with_panel(_figure(figure).id(next(ids)).span(COLUMNS // len(CHAIN)).height(4))
    for title, panels in ROWS:
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for lines in panels:
            made = made.with_panel(_lines(lines).id(next(ids)).span(lines.width).height(7))
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _figure(figure: Figure) -> stat.Panel:
    good, bad = "green", "red"
    steps = [Threshold(value=None, color=good)]
    if figure.bad_from is not None:
        steps.append(Threshold(value=figure.bad_from, color=bad))
    if figure.bad_below is not None:
        steps = [Threshold(value=None, color=bad), Threshold(value=figure.bad_below, color=good)]
    unknown = DashboardSpecialValueMapOptions(
        match=SpecialValueMatch.NULL_AND_NAN, result=ValueMappingResult(text="not known yet", color="yellow")
    )
    mappings: list[ValueMapping] = [SpecialValueMap(options=unknown)]
    if figure.words:
        words = {value: ValueMappingResult(text=word) for value, word in figure.words.items()}
        mappings.append(ValueMap(options=words))
    return (
        stat.Panel()
        .title(figure.title)
        .description(_described(figure.normal))
        .datasource(SOURCE)
        .unit(figure.unit)
        .color_mode(BigValueColorMode.BACKGROUND_SOLID)
        .graph_mode(BigValueGraphMode.AREA)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .mappings(mappings)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .with_target(_target(Query(figure.expr, figure.title), 0))
    )


def _lines(lines: Lines) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(lines.title)
        .description(_described(lines.normal))
        .datasource(SOURCE)
        .unit(lines.unit)
        .min(0)
        .fill_opacity(10)
        .tooltip(common.VizTooltipOptions())
        .legend(common.VizLegendOptions().show_legend(True).calcs(["lastNotNull", "max"]))
    )
    for number, query in enumerate(lines.queries):
        made = made.with_target(_target(query, number))
    return made


def _target(query: Query, number: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + number)).range()


def _described(normal: str) -> str:
    return f"Normal: {normal}. ({RUNBOOK}, docs/metrics.md)"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(build())
