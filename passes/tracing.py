"""The lock of torch.export, which changes settings of the whole process."""

from __future__ import annotations

import threading

TRACING = threading.RLock()
"""Held by the one thread that exports; an export inside an export takes it again.

Not taken inside a dynamo backend: dynamo compiles under a lock of its own, which export may ask for.
"""
