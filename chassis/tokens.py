"""Bearer tokens (JWT) of an identity provider, for people and services that have no certificate of their own.

To verify one costs as much as a whole call, so that who a token stands for is remembered until it ends.
"""

import json
import time
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jwt

from chassis.followed import Followed
from chassis.identity import Caller
from chassis.settings import SettingsError, listen_address, seconds, setting, text

ALGORITHMS = ("ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA")  # by key pairs
ROLES = ("manager", "reader", "operator", "service")  # a till has a certificate
TOKEN_LENGTH_MAX = 8_192
SUBJECT_LENGTH_MAX = 200
REMEMBERED_MAX = 10_000  # of each kind, half a kilobyte each
BRANCH_MAX = 2**31 - 1

Keys = dict[str, jwt.PyJWK]


def algorithms(raw: str) -> tuple[str, ...]:
    named = tuple(name.strip() for name in raw.split(","))
    if wrong := [name for name in named if name not in ALGORITHMS]:
        raise ValueError(f"knows nothing of {', '.join(wrong)}; there are {', '.join(ALGORITHMS)}")
    return named


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Issuer, audience and keys, or none of them."""

    jwt_listen: str = setting(
        "JWT_LISTEN",
        listen_address,
        "host:port",
        "where callers need no certificate, but a token; empty: nowhere",
        default="",
    )
    jwt_issuer: str = setting("JWT_ISSUER", text, "URL", "`iss` of tokens that are accepted", default="")
    jwt_audience: str = setting("JWT_AUDIENCE", text, "name", "`aud` of tokens that are for us", default="")
    jwt_keys_file: str = setting(
        "JWT_KEYS_FILE", text, "JWKS file", "the issuer's public keys; followed without restart", default=""
    )
    jwt_algorithms: tuple[str, ...] = setting(
        "JWT_ALGORITHMS", algorithms, "names", "of signatures that are accepted", default=("ES256", "RS256", "EdDSA")
    )
    jwt_leeway_s: float = setting(
        "JWT_LEEWAY_S", seconds(0, 300), "s", "that the issuer's clock may differ from ours", default=30.0
    )
    jwt_role_claim: str = setting(
        "JWT_ROLE_CLAIM", text, "claim", "that names the role: manager, reader, operator or service", default="role"
    )
    jwt_branch_claim: str = setting(
        "JWT_BRANCH_CLAIM", text, "claim", "that names a manager's branch", default="branch_id"
    )


def tokens(config: TokenSettings) -> "Tokens | None":
    """None when no tokens are accepted.

    Raises:
        SettingsError: they are set by halves, or there are no keys.
    """
    named = {
        "JWT_ISSUER": config.jwt_issuer,
        "JWT_AUDIENCE": config.jwt_audience,
        "JWT_KEYS_FILE": config.jwt_keys_file,
    }
    if not any(named.values()):
        if config.jwt_listen:
            raise SettingsError(["JWT_LISTEN is set, but no JWT_ISSUER: nobody could call there"])
        return None
    if missing := [f"{name} is not set, though others of tokens are" for name, value in named.items() if not value]:
        raise SettingsError(missing)
    return Tokens(config)


class Tokens:
    """Tells who a token stands for."""

    def __init__(self, config: TokenSettings) -> None:
        self._config = config
        self.keys = Followed("JWT_KEYS_FILE", config.jwt_keys_file, _keys)
        self._known: dict[bytes, Caller] = {}
        self._refused: set[bytes] = set()  # apart: strangers make up as many as they like

    def forget(self) -> None:
        """The keys have changed."""
        self._known.clear()
        self._refused.clear()

    def caller(self, token: str) -> Caller | None:
        """None for a token that is not accepted: not the issuer's, not for us, not valid now, or of no role."""
        if len(token) > TOKEN_LENGTH_MAX:
            return None
        name = sha256(token.encode(errors="replace")).digest()
        if name in self._refused:
            return None
        caller = self._known.get(name)
        if caller is None:
            caller = self._verified(name, token)
            if caller is None:
                return None
            _make_room(self._known)
            self._known[name] = caller
        return caller if caller.until is None or caller.until > time.time() else None

    def _verified(self, name: bytes, token: str) -> Caller | None:
        config = self._config
        try:
            header = jwt.get_unverified_header(token)
            key = self.keys.value.get(header.get("kid", ""))
            if key is None or key.algorithm_name not in config.jwt_algorithms:
                return None
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=config.jwt_issuer,
                audience=config.jwt_audience,
                leeway=config.jwt_leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.DecodeError:  # of these bytes nothing will ever come; a token that is early may be right later
            _make_room(self._refused)
            self._refused.add(name)
            return None
        except (jwt.PyJWTError, ValueError, TypeError, ArithmeticError, RecursionError):
            return None
        return self._caller(claims)

    def _caller(self, claims: dict[str, Any]) -> Caller | None:
        said = claims.get(self._config.jwt_role_claim)
        roles = [role for role in ROLES if role == said or (isinstance(said, list) and role in said)]
        subject = claims["sub"]
        if len(roles) != 1 or not 0 < len(subject) <= SUBJECT_LENGTH_MAX or not subject.isprintable():
            return None
        branch_id = None
        if roles == ["manager"]:
            branch_id = _branch(claims.get(self._config.jwt_branch_claim))
            if branch_id is None:
                return None
        until = float(claims["exp"]) + self._config.jwt_leeway_s
        service = subject if roles == ["service"] else ""
        return Caller(f"{self._config.jwt_issuer}#{subject}", roles[0], branch_id, until=until, service=service)


def _make_room(remembered: dict[bytes, Caller] | set[bytes]) -> None:
    if len(remembered) >= REMEMBERED_MAX:
        remembered.clear()


def _branch(said: Any) -> int | None:
    if isinstance(said, str) and said.isascii() and said.isdigit() and len(said) <= 10:
        said = int(said)
    return said if type(said) is int and 0 < said <= BRANCH_MAX else None


def _keys(said: str) -> Keys:
    """By their ids. Each is public, is for signatures, and is for one algorithm."""
    try:
        listed = json.loads(said)["keys"]
        keys = {key.get("kid"): key for key in listed if key.get("use", "sig") == "sig"}
    except (KeyError, TypeError, AttributeError):
        raise ValueError("is no JWK set") from None
    if not keys or not all(isinstance(name, str) and name for name in keys):
        raise ValueError("must have keys, each with a kid")
    if secret := [name for name, key in keys.items() if key.get("kty") == "oct" or "d" in key]:
        raise ValueError(f"must have public keys only, not {', '.join(secret)}")
    try:
        return {name: jwt.PyJWK(key) for name, key in keys.items()}
    except jwt.PyJWTError as error:
        raise ValueError(str(error)) from None
