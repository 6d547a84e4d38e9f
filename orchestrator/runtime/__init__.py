"""The shells that carry out the core's effects on a Ray cluster."""
