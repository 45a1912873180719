"""The local stack: PostgreSQL, a private RabbitMQ node and the four services, for one checkout.

Whatever it starts carries one environment variable, `LOCAL_STACK`, that names the directory it belongs to, and is
found again by it. No pid is ever written down, so none can be stale, and no kill -9 leaves anything to clean up.
"""
