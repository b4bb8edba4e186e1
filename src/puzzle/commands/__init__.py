"""The commands that `cli.py` gathers: questions, children, serving."""
