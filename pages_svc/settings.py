"""What can be set from outside; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.plaintext import is_local
from chassis.settings import SettingsError, address, integer, log_level, setting, target, text
from chassis.tls import TlsSettings
from chassis.traces import TraceSettings


@dataclass(frozen=True, kw_only=True)
class ServeSettings(TlsSettings, TraceSettings):
    listen: str = setting(
        "PAGES_LISTEN", address, "host:port", "where browsers find the pages; of this machine", default="127.0.0.1:8080"
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
    viewers_max: int = setting(
        "PAGES_VIEWERS_MAX",
        integer(1, 10_000),
        "browsers",
        "that follow pages at once; more are told to wait",
        default=500,
    )
    log_level: str = log_level()


def require_this_machine(config: ServeSettings) -> None:
    """Raises SettingsError: whoever reaches the pages may do what they can do, so nobody else may reach them."""
    host = config.listen.rpartition(":")[0]
    if not is_local(host):
        raise SettingsError([f"PAGES_LISTEN: {host} is beyond this machine, and the pages ask nobody who they are"])
