"""Metric definitions, the metrics file, provenance, and the offline HTML report of a run."""
