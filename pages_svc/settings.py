"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.cells import CellsSettings
from chassis.plaintext import BUT_FOR, TLS_FILES, is_local
from chassis.settings import SettingsError, address, integer, log_level, setting, target, text
from chassis.tokens import TokenSettings
from chassis.traces import TraceSettings


@dataclass(frozen=True, kw_only=True)
class ServeSettings(TokenSettings, CellsSettings, TraceSettings):
    listen: str = setting(
        "PAGES_LISTEN",
        address,
        "host:port",
        "where browsers find the pages; beyond this machine with TLS and JWT_ISSUER only",
        default="127.0.0.1:8080",
    )
    metrics_listen: str = setting(
        "PAGES_METRICS_LISTEN", address, "host:port", "where Prometheus reads", default="127.0.0.1:9468"
    )
    purchases_target: str = setting(
        "PURCHASES_TARGET", target, "host:port", "where the purchases service is found", default="127.0.0.1:50051"
    )
    analytics_target: str = setting(
        "ANALYTICS_TARGET", target, "host:port", "where the query server is found", default="127.0.0.1:50052"
    )
    relay_target: str = setting(
        "RELAY_TARGET", target, "host:port", "where the relay is found", default="127.0.0.1:50053"
    )
    consumer_target: str = setting(
        "CONSUMER_TARGET", target, "host:port", "where the consumer is found", default="127.0.0.1:50054"
    )
    till_certificates: str = setting(
        "TILL_CERTIFICATES",
        text,
        "path",
        "of a directory of the tills' own certificates (branch-1-till-POS-3.pem, …-key.pem, ca.pem), for the page that "
        "sells; empty: it sells as the pages themselves",
        default="",
    )
    journals: str = setting(
        "PAGES_JOURNALS",
        text,
        "path",
        "of a directory for the journals of the tills that sell by the page; empty: they cannot go offline",
        default="",
    )
    viewers_max: int = setting(
        "PAGES_VIEWERS_MAX",
        integer(1, 10_000),
        "browsers",
        "that follow pages at once; more are told to wait",
        default=500,
    )
    log_level: str = log_level()


def check(config: ServeSettings, *, tokens: bool, certified: bool) -> None:
    """Whoever reaches the pages may do what they can do, unless everybody brings a token.

    Raises:
        SettingsError
    """
    problems = []
    host = config.listen.rpartition(":")[0]
    if not is_local(host):
        if not tokens:
            problems.append(f"PAGES_LISTEN: {host} is beyond this machine: set JWT_ISSUER, so that who looks is known")
        if not certified and config.allow_plaintext != "yes":
            problems.append(f"PAGES_LISTEN: {host} is beyond this machine: set {', '.join(TLS_FILES)}, {BUT_FOR}")
    if tokens and not certified and config.allow_plaintext != "yes":
        problems.append(f"JWT_ISSUER is set, but not {', '.join(TLS_FILES)}: tokens must not travel in plaintext")
    if config.jwt_listen:
        problems.append("JWT_LISTEN is not for the pages: they listen at PAGES_LISTEN")
    if problems:
        raise SettingsError(problems)


def served_with(config: ServeSettings) -> tuple[str | None, str | None]:
    """The files of the certificate and key that browsers beyond this machine are shown: those that the services are."""
    if is_local(config.listen.rpartition(":")[0]) or not config.certificate_file:
        return None, None
    return config.certificate_file, config.key_file
