"""Settings of tokens and bans by halves are refused; what strangers make up fills no memory, and evicts nobody."""

import datetime
import json
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from chassis import tokens
from chassis.access import AccessSettings, gate
from chassis.settings import SettingsError, load
from chassis.tokens import Tokens, TokenSettings

KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER, AUDIENCE = "https://login.retail.example", "backbone"


def public(**more: Any) -> dict[str, Any]:
    return {**json.loads(jwt.algorithms.ECAlgorithm.to_jwk(KEY.public_key())), "kid": "one", **more}


def token(**claims: Any) -> str:
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "kim", "exp": time.time() + 3_600, "role": "operator", **claims}
    return jwt.encode(said, KEY, "ES256", {"kid": "one"})


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps({"keys": [public()]}))
    return path


@pytest.fixture
def accepted(keys_file: Path) -> Tokens:
    return Tokens(TokenSettings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys_file=str(keys_file)))


def test_a_token_is_verified_once(accepted: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    good = token()
    caller = accepted.caller(good)
    assert caller is not None
    assert (caller.name, caller.role) == (f"{ISSUER}#kim", "operator")
    monkeypatch.setattr(jwt, "decode", None)
    assert accepted.caller(good) == caller


def test_a_remembered_token_ends(accepted: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    good = token()
    assert accepted.caller(good)
    later = time.time() + 3_600 + 31  # and the leeway
    monkeypatch.setattr(time, "time", lambda: later)
    assert accepted.caller(good) is None


def test_made_up_tokens_are_bounded_and_evict_nobody(accepted: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REMEMBERED_MAX", 100)
    good = token()
    assert accepted.caller(good)
    for number in range(1_000):
        assert accepted.caller(f"made.up.{number}") is None
        assert len(accepted._refused) <= 100
    monkeypatch.setattr(jwt, "decode", None)
    assert accepted.caller(good)


def test_a_token_that_was_early_is_right_later(accepted: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    early = token(nbf=time.time() + 60)
    assert accepted.caller(early) is None
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 120)
    monkeypatch.setattr(jwt.api_jwt, "datetime", _In120s)
    assert accepted.caller(early)


class _In120s(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "_In120s":
        later = datetime.datetime.now(tz) + datetime.timedelta(seconds=120)
        return cls.fromtimestamp(later.timestamp(), tz)


@pytest.mark.parametrize("payload", ["[" * 3_000, '{"exp": 1e999}', '{"exp": "x"}', "null", "\\ud800"])
def test_odd_contents_are_refused(accepted: Tokens, payload: str) -> None:
    """Signed by the issuer, for that matter."""
    odd = jwt.PyJWS().encode(payload.encode(), KEY, "ES256", {"kid": "one"})
    assert accepted.caller(odd) is None


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ("nothing", "no JWK set|Expecting value"),
        ("{}", "no JWK set"),
        ('{"keys": []}', "must have keys"),
        (json.dumps({"keys": [public(kid="")]}), "kid"),
        (json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "one"}]}), "public keys only"),
        (json.dumps({"keys": [public(d="c2VjcmV0")]}), "public keys only"),
    ],
)
def test_keys_that_are_none_stop_the_start(keys_file: Path, listed: str, problem: str) -> None:
    keys_file.write_text(listed)
    with pytest.raises(SettingsError, match=problem):
        Tokens(TokenSettings(jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys_file=str(keys_file)))


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"JWT_ISSUER": ISSUER}, ["JWT_AUDIENCE", "JWT_KEYS_FILE"]),
        ({"JWT_LISTEN": "127.0.0.1:1"}, ["JWT_ISSUER"]),
        ({"TLS_BANNED_FILE": "/nowhere/banned"}, ["TLS_BANNED_FILE"]),
    ],
)
def test_what_is_set_by_halves_stops_the_start(environ: dict[str, str], named: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        gate(load(AccessSettings, environ), certificates=True)
    assert all(any(name in problem for problem in refused.value.problems) for name in named)


def test_without_certificates_there_are_neither_tokens_nor_bans(keys_file: Path, tmp_path: Path) -> None:
    (tmp_path / "banned").touch()
    config = AccessSettings(
        jwt_issuer=ISSUER, jwt_audience=AUDIENCE, jwt_keys_file=str(keys_file), banned_file=str(tmp_path / "banned")
    )
    with pytest.raises(SettingsError) as refused:
        gate(config, certificates=False)
    assert [problem.partition(" ")[0] for problem in refused.value.problems] == ["JWT_ISSUER", "TLS_BANNED_FILE"]


@pytest.mark.parametrize("name", ["Retail.Example", "retail.example/", "spiffe://retail.example", "y z"])
def test_a_trust_domain_is_a_name(name: str) -> None:
    with pytest.raises(SettingsError, match="TRUST_DOMAIN"):
        load(AccessSettings, {"TRUST_DOMAIN": f"x{name}"})
