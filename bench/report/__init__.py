"""From measurements to pages: results as JSON, statistics, goals, Markdown, plots."""
