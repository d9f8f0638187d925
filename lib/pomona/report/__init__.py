"""Reports for people: Markdown with plots, and short summaries for a terminal."""
