"""Explanations of features in words, and scores that say how far to trust them."""
