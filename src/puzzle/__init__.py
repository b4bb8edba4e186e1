"""Puzzle: make a trained LLM cheaper to serve, by distillation-based architecture search."""
