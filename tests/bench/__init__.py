"""What the system costs and how fast it is, beside yardsticks on the same machine: `make bench`; see README.md."""
