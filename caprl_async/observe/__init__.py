"""What a person sees of a run: metrics, progress, the result table, the report."""
