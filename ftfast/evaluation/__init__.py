"""What was gained and what was forgotten: metrics, suites, report."""
