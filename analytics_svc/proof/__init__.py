"""That the numbers are right, and how far they go."""
