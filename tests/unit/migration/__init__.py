"""The migration package's pure parts, and its drivers on a jumping clock."""
