"""Quasi-hyperbolic momentum."""

from explaind_qhm.optimizer import QHM

__all__ = ["QHM"]
