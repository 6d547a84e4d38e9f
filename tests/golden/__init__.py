"""Traces in text form, compared line by line; `make golden` writes them anew."""
