"""Mistral: Llama with, in its first version, the same sliding window in every layer."""

from puzzle.model.families.family import Family, common, same_window

FAMILY = Family(common, windows=same_window)
