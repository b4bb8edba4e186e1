"""Mistral: Llama with, in its first version, one sliding window in every layer."""

from puzzle.model.families import Family, common, one_window

FAMILY = Family(common, windows=one_window)
