"""Turn a run's results into a report for programs and for people."""
