"""The peers' section of ``docs/benchmarks.md``: figures, goals, tables, plots."""
