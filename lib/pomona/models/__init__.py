"""Models: local ones loaded and scored, remote ones asked."""
