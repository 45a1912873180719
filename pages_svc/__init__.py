"""The pages for people: the owner's numbers, a till, and the system's insides. Reads and acts by the services' API."""
