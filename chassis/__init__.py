"""What any of our processes needs in order to run, and nothing about purchases.

Admission: at least two processes use it today; it names no table, event, queue or message of ours. How much of it there
may be is in ARCHITECTURE.md.
"""

import os

# gRPC's C part writes a line of its own, no JSON, for each handshake that fails, and strangers decide how many do. It
# reads this when it is loaded, so that no later place will do.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
