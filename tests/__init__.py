"""All tests; the folder says which kind (README.md)."""
