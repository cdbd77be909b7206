"""`cupy.cuda`: driver and runtime as far as counters ask them."""

from __future__ import annotations

from types import SimpleNamespace

import gpusim

from . import memory

driver = SimpleNamespace(ctxGetCurrent=lambda: int(memory.context_is_up))
runtime = SimpleNamespace(getDeviceCount=gpusim.device_count)
