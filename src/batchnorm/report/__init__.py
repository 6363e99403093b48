"""Reports: one `Report` in, one form out."""

from batchnorm.report.json import to_json
from batchnorm.report.terminal import print_report

__all__ = ["print_report", "to_json"]
