"""Plots and self-contained HTML pages from run folders. Needs what a run left behind, and no jax."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxcl.reporting.comparison import write_comparison, write_overview
    from jaxcl.reporting.comparison_data import comparison_table, read_comparison
    from jaxcl.reporting.importance_page import write_importance
    from jaxcl.reporting.report import write_report
    from jaxcl.reporting.run_data import RunData, read_results, read_run

__all__ = [
    "RunData",
    "comparison_table",
    "read_comparison",
    "read_results",
    "read_run",
    "write_comparison",
    "write_importance",
    "write_overview",
    "write_report",
]
