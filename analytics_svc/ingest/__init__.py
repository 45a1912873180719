"""From the queue to the read models: each event counts once."""
