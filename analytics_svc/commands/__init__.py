"""What operators run by hand: clients of the services' own APIs, so that they work from anywhere."""
