"""`python -m tests.bench.write.silent`: `retail-purchases serve` without metrics: what is counted is thrown away."""

from prometheus_client import Counter, Gauge, Histogram


def forget(*_: object, **__: object) -> None:
    pass


for kind, methods in ((Counter, ("inc",)), (Gauge, ("set", "set_function")), (Histogram, ("observe",))):
    for method in methods:
        setattr(kind, method, forget)

if __name__ == "__main__":
    from purchases_svc.__main__ import commands

    raise SystemExit(commands.carry_out(["serve"]))
