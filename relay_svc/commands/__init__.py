"""What an operator calls by hand."""
