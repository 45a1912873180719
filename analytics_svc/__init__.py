"""Owns the analytics database, with two processes.

`consume` counts each purchase once, however often its event arrives, and proves the sums; `serve` answers questions.

Rooms, each of which knows only those below it:

    __main__ → commands     what a process or a command is made of
    proof | serve           that the numbers are right and how far they go | the questions
    ingest                  from the queue to the read models
    upstream                the purchases service and the relay, as seen from here
    purchase | database | errors | settings
"""
