"""Reports: one `Report` in, one form out."""

from collections.abc import Callable

from batchnorm.audit import Report
from batchnorm.report.github import to_github
from batchnorm.report.html import to_html
from batchnorm.report.json import to_json
from batchnorm.report.sarif import to_sarif
from batchnorm.report.terminal import print_report

__all__ = ["FORMS", "print_report", "to_github", "to_html", "to_json", "to_sarif"]

FORMS: dict[str, Callable[[Report], str]] = {".json": to_json, ".sarif": to_sarif, ".html": to_html}
"""By a file's suffix."""
