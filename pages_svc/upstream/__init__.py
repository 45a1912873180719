"""The services, as the pages see them."""
