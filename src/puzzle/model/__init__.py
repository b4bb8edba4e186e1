"""Models: architectures and search spaces, the parent and its families, children, variants."""
