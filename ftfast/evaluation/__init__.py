"""What was gained and what was forgotten: metrics, suites, report."""

from __future__ import annotations

from ftfast.evaluation.continual import ContinualMetrics, continual_metrics, harmonic_mean
from ftfast.evaluation.defaults import builtin_controls, builtin_target, default_suites
from ftfast.evaluation.embedding import PixelCache, embed_images, embed_texts
from ftfast.evaluation.model_card import model_card
from ftfast.evaluation.report import ReportInfo, RunSummary, write_comparison, write_report
from ftfast.evaluation.results import CheckpointResult, SummaryRow, SweepPoint, aggregate, best_alpha, summary_rows
from ftfast.evaluation.suites import Results, Suite, evaluate, main_metric, open_suites
from ftfast.evaluation.sweep import alpha_sweep
from ftfast.evaluation.tables import print_comparison, print_summary, sweep_line

__all__ = [
    "CheckpointResult",
    "ContinualMetrics",
    "PixelCache",
    "ReportInfo",
    "Results",
    "RunSummary",
    "Suite",
    "SummaryRow",
    "SweepPoint",
    "aggregate",
    "alpha_sweep",
    "best_alpha",
    "builtin_controls",
    "builtin_target",
    "continual_metrics",
    "default_suites",
    "embed_images",
    "embed_texts",
    "evaluate",
    "harmonic_mean",
    "main_metric",
    "model_card",
    "open_suites",
    "print_comparison",
    "print_summary",
    "summary_rows",
    "sweep_line",
    "write_comparison",
    "write_report",
]
