"""Development tools: set-up, generators, lint contracts. Never installed."""
