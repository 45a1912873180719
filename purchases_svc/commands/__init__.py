"""What an operator runs by hand; one file for each command."""
