"""The integration with DeepSpeed: how an optimizer gets in, and where its parameters' elements then lie."""

from __future__ import annotations

from ds_optim.optimizers.alike import register_load
from ds_optim.sharding.binding import register_binder, register_engine_check
from ds_optim.zero.agree import load_peers
from ds_optim.zero.bind import bind_zero, is_partitioned, recognize_engine
from ds_optim.zero.config import from_config
from ds_optim.zero.initialize import initialize

register_binder(bind_zero, is_partitioned)
register_engine_check(recognize_engine)
register_load(load_peers)

__all__ = ["from_config", "initialize"]
