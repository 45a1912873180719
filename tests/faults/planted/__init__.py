"""Bugs that are put into the services on purpose, from outside, to see that the checker finds them.

Each module describes its bug in its first line and has

    FAULTS     kinds of faults under which the bug shows; () for those that show by themselves
    CAUGHT_AS  the findings that are right; the run must have one of them at least
    plant()    patches the service, in its own process, before it starts
    prepare()  optional: changes the databases, as their owner, after the migrations

`python -m tests.faults.catch` runs them all and prints the table of the README.
"""

from typing import Any


def replace(owner: Any, name: str, new: Any) -> Any:
    """Put something in the place of what is there, and return that. An error when there is nothing: then the bug would
    not be planted, and nothing would be proven."""
    old = getattr(owner, name)
    setattr(owner, name, new)
    return old
