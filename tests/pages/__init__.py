"""What tests of the pages and their pictures share: a browser, and a chain that has sold until this minute."""
