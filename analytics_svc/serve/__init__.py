"""The owner's questions, answered from the read models."""
