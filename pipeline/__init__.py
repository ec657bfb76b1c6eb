"""Catalogs of media to Parquet scores, on Ray."""

import os

# Ray reads this once, when it is imported: a cluster that we start here then listens on loopback
# only. It has no effect on a cluster that is there already.
if not os.environ.get("RAY_ADDRESS"):
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
