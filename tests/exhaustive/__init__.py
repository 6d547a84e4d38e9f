"""Breadth first over joint protocol states."""
