"""The broker's users: a user for each process, which may do what that process does and no more. None administers.

    RELAY_BROKER_PASSWORD=… CONSUMER_BROKER_PASSWORD=… python3 deploy/broker.py >definitions.json

prints the definitions that RabbitMQ loads at each start (`load_definitions` in rabbitmq.conf). They hold no password,
only salted hashes. Needs nothing but Python.
"""

import base64
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VIRTUAL_HOST = "/"


@dataclass(frozen=True)
class Rights:
    """Regular expressions for the names of the queues and exchanges on which a user may do something.

    `configure`: make and delete. `write`: publish to an exchange, bind a queue. `read`: consume from a queue, bind to
    an exchange.
    """

    configure: str
    write: str
    read: str


EXCHANGE, QUEUE, BOTH = r"^purchases$", r"^purchases\.created$", r"^purchases(\.created)?$"

# Both make the queue and bind it. Only the relay publishes, and only the consumer reads.
PROCESSES: Mapping[str, Rights] = {
    "relay": Rights(configure=BOTH, write=BOTH, read=EXCHANGE),
    "consumer": Rights(configure=QUEUE, write=QUEUE, read=BOTH),
}


def definitions(passwords: Mapping[str, str], rights: Mapping[str, Rights] = PROCESSES) -> dict[str, Any]:
    """The virtual host, and the users of `rights` with their passwords."""
    return {
        "vhosts": [{"name": VIRTUAL_HOST}],
        "users": [
            {
                "name": name,
                "password_hash": _hashed(passwords[name]),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": [],
            }
            for name in rights
        ],
        "permissions": [{"user": name, "vhost": VIRTUAL_HOST, **asdict(of)} for name, of in rights.items()],
    }


def _hashed(password: str) -> str:
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def setting(user: str) -> str:
    """The environment variable with the user's password."""
    return f"{user.upper()}_BROKER_PASSWORD"


def main() -> None:
    passwords = {user: os.environ.get(setting(user), "") for user in PROCESSES}
    if missing := [setting(user) for user, password in passwords.items() if not password]:
        sys.exit(f"not set: {', '.join(missing)}")
    print(json.dumps(definitions(passwords), indent=2))


if __name__ == "__main__":
    main()
