"""The passwords of the containers, made once: `python3 -m deploy.passwords`, before the first `docker compose up`.

Writes beside the compose file, for its owner only, `.env`, from which compose takes each password; and for the broker
`broker-definitions.json`, which holds hashes. What is in `.env` stays as it is; what is missing there is added. Needs
nothing but Python.
"""

import json
import os
import secrets
from pathlib import Path

from deploy import broker

HERE = Path(__file__).parent

PASSWORDS = (
    "POSTGRES_PASSWORD",  # the superuser's
    "PURCHASES_OWNER_PASSWORD",
    "ANALYTICS_OWNER_PASSWORD",
    "PURCHASES_PASSWORD",
    "RELAY_PASSWORD",
    "CONSUMER_PASSWORD",
    "ANALYTICS_PASSWORD",
    *map(broker.setting, broker.PROCESSES),
    "GRAFANA_PASSWORD",  # of its administrator
)


def make(directory: Path) -> None:
    env = directory / ".env"
    known = _read(env)
    missing = {name: secrets.token_urlsafe(24) for name in PASSWORDS if not known.get(name)}
    if missing:
        lines = env.read_text() if env.exists() else ""
        _replace(env, 0o600, lines + "".join(f"{name}={password}\n" for name, password in missing.items()))
    passwords = {name: (known | missing)[broker.setting(name)] for name in broker.PROCESSES}
    definitions = json.dumps(broker.definitions(passwords), indent=2) + "\n"
    _replace(directory / "broker-definitions.json", 0o644, definitions)  # the broker's user is another one than ours


def _read(env: Path) -> dict[str, str]:
    """In the order of the lines, so that the last one counts, as it does for compose."""
    lines = env.read_text().splitlines() if env.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _replace(path: Path, mode: int, text: str) -> None:
    """In one step: an interruption leaves the file as it was."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.chmod(mode)
    fresh.replace(path)


if __name__ == "__main__":
    make(HERE)
    print(f"The passwords are in {HERE / '.env'}. Next: docker compose -f deploy/compose.yaml up --build")
