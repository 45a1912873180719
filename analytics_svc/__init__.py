"""Owns the analytics database, with two processes.

`consume` counts each purchase once, however often its event arrives; `serve` answers questions about the sums.

    __main__ → consumer → apply → quarantine → events → errors     the write half
    __main__ → server → queries → errors                           the read half
"""
