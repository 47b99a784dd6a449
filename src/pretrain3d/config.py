"""One YAML names one run: composition, overrides, registries and the error a user sees."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake: one clear line with what is wrong, the value, and what would be right. Exit status 2."""
