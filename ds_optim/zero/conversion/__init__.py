"""A DeepSpeed JSON that was written for another optimizer, as one for an optimizer of this package."""

from ds_optim.zero.conversion.convert import Converted, convert

__all__ = ["Converted", "convert"]
