"""The embedded parent, for demonstrations and tests, and the script that made it."""
