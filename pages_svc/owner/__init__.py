"""The owner's page: the chain's numbers, or a branch's, as they change."""
