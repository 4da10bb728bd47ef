"""What this room registers with those below: who finds an optimizer's parameters in ZeRO's partitions."""

from __future__ import annotations

from ds_optim.optimizers.alike import register_load
from ds_optim.sharding.binding import register_binder, register_engine_check
from ds_optim.zero.agree import load_peers
from ds_optim.zero.bind import bind_zero, is_partitioned, recognize_engine

register_binder(bind_zero, is_partitioned)
register_engine_check(recognize_engine)
register_load(load_peers)
