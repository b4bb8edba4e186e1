"""Text: where it comes from, its packed token sequences, and multiple-choice questions."""
