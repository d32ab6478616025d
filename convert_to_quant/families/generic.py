"""A model that no family fits; never recognized: its structure decides, and the caller says so."""

from .base import Family

FAMILY = Family(name="generic", title="unknown model")
