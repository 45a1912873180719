"""What can be set from outside for the tills' commands; see `chassis.settings`."""

from dataclasses import dataclass

from chassis.cells import CellsSettings
from chassis.settings import setting, target, text
from chassis.traces import TraceSettings


@dataclass(frozen=True, kw_only=True)
class Settings(CellsSettings, TraceSettings):
    purchases_target: str = setting(
        "PURCHASES_TARGET", target, "host:port", "where the purchases service is found", default="127.0.0.1:50051"
    )
    analytics_target: str = setting(
        "ANALYTICS_TARGET", target, "host:port", "where the query server is found", default="127.0.0.1:50052"
    )
    consumer_target: str = setting(
        "CONSUMER_TARGET", target, "host:port", "where the consumer, which audits, is found", default="127.0.0.1:50054"
    )
    till_certificates: str = setting(
        "TILL_CERTIFICATES",
        text,
        "directory",
        "of the tills' certificates, branch-1-till-POS-3.pem and its key in …-key.pem, and of ca.pem",
        default="",
    )
