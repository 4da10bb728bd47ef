"""Results and reports: one schema of rows, one renderer of tables, plots, Markdown and HTML."""

from ds_optim.report import units
from ds_optim.report.machine import describe_machine
from ds_optim.report.plots import Bars, Curves
from ds_optim.report.render import Report, render
from ds_optim.report.schema import Row, RunInfo, append_row, read_rows, write_rows
from ds_optim.report.table import Column, TableSpec, build_table, failures, to_markdown, to_rich

__all__ = [
    "Bars",
    "Column",
    "Curves",
    "Report",
    "Row",
    "RunInfo",
    "TableSpec",
    "append_row",
    "build_table",
    "describe_machine",
    "failures",
    "read_rows",
    "render",
    "to_markdown",
    "to_rich",
    "units",
    "write_rows",
]
