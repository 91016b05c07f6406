"""What runs left behind: results, tables, plots, and several methods on an equal footing."""

from hf_curriculum_distill.report.figures import PLOT_FILE, plot_comparison
from hf_curriculum_distill.report.tables import align, format_summary, format_table

__all__ = ["PLOT_FILE", "align", "format_summary", "format_table", "plot_comparison"]
