"""The finished child in the forms that other engines read."""
