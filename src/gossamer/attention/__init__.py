"""Zeros in attention: read only the context that matters."""
