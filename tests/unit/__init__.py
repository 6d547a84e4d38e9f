"""Pure code, milliseconds each."""
