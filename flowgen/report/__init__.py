"""Writes a report about a run: one HTML page that needs no other file and no network."""

from flowgen.report.page import check_report_path, report_page

__all__ = ["check_report_path", "report_page"]
