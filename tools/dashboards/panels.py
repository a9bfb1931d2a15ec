"""The panels that the dashboards are made of."""

from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardLinkType, DataSourceRef, Panel

DATASOURCE = DataSourceRef("prometheus", "${datasource}")

STAT_WIDTH = 4
GRAPH_WIDTH = 12
GRAPH_HEIGHT = 8


@dataclass(frozen=True, slots=True)
class Query:
    """A question to Prometheus; ``legend`` names its series."""

    expression: str
    legend: str = ""


def graph(
    title: str,
    *queries: Query,
    unit: str,
    description: str = "",
    stacked: bool = False,
    exemplars: bool = False,
) -> Builder[Panel]:
    """Lines over time, half a page wide; ``unit`` is one of Grafana's."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .min(0)
        .span(GRAPH_WIDTH)
        .height(GRAPH_HEIGHT)
        .fill_opacity(40 if stacked else 8)
    )
    if stacked:
        panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    for index, query in enumerate(queries):
        panel = panel.with_target(_target(query, index, exemplars))
    return panel


def number(title: str, query: Query, *, unit: str, description: str = "") -> Builder[Panel]:
    """One number, as it is now."""
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .unit(unit)
        .span(STAT_WIDTH)
        .height(4)
        .with_target(_target(query, 0, exemplars=False))
    )


def board(uid: str, title: str, rows: dict[str, list[Builder[Panel]]]) -> dashboard.Dashboard:
    """A dashboard of ``rows`` of panels, with a choice of the data source."""
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .tags(["darkroom"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .link(
            dashboard.DashboardLink("Darkroom")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["darkroom"])
            .include_vars(True)
            .keep_time(True)
        )
    )
    for name, panels in rows.items():
        built = built.with_row(dashboard.Row(name))
        for panel in panels:
            built = built.with_panel(panel)
    return built


def _target(query: Query, index: int, exemplars: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expression).ref_id(chr(ord("A") + index))
    if query.legend:
        target = target.legend_format(query.legend)
    return target.exemplar(True) if exemplars else target
