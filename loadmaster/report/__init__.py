"""report.html: one page that shows a run, from the plan to the proof, and opens without a network."""

from loadmaster.report.page import write_report

__all__ = ["write_report"]
