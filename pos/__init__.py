"""The till's side: a client library for till software, a simulated chain, and the replay of real files."""
