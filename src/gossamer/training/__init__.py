"""Zeros in weights while they train: what is never there need not be paid for."""
