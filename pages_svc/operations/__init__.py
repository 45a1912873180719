"""`/operations`: where sales are on their way, what is stuck and why, and what an operator does about it."""
