"""Sizes, imports and layout: what the conventions promise, policed."""
