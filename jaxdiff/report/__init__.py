"""A report of runs as one HTML file."""

from jaxdiff.report.page import write_report

GENERATOR = b'<meta name="generator" content="jaxdiff report">'  # near the beginning of every report

__all__ = ["GENERATOR", "write_report"]
