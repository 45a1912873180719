"""How the system is brought to a machine: the local stack, images, manifests, dashboards."""
