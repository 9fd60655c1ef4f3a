"""Writes a report about a run, as one HTML page that needs neither other files nor a network."""

from flowgen.report.page import check_report_path, report_page

__all__ = ["check_report_path", "report_page"]
