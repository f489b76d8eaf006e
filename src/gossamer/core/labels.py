"""What a label says that is not to be predicted."""

from __future__ import annotations

IGNORED = -100
"""Label of a token that counts in no loss, as torch and Hugging Face have it."""
