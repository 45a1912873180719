"""Moves events from the outbox to the broker, at least once, and never opens a payload."""
