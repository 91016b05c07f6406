"""What runs left behind: results, tables, plots, and several methods on an equal footing."""

from hf_curriculum_distill.report.tables import PLOT_FILE, align, format_summary, format_table, plot_comparison

__all__ = ["PLOT_FILE", "align", "format_summary", "format_table", "plot_comparison"]
