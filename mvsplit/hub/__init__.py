"""Weights from elsewhere and for elsewhere."""

from mvsplit.hub.released import export_released, load_released

__all__ = ["export_released", "load_released"]
