"""Pure decisions: frozen view and parameters in, plan with its reason out."""
