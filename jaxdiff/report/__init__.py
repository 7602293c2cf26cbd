"""A report of runs as one HTML file."""

from jaxdiff.report.page import write_report

__all__ = ["write_report"]
