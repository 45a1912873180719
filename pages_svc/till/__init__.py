"""`/till`: a cash register for a person. It sells by the client library, as any till does."""
