"""The other services as this one sees them."""

from importlib import resources

SERVICE_CONFIG = (resources.files("retail") / "service_config.json").read_text()  # what they ask of every client
