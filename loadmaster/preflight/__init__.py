"""What fits where, how fast, for how much: decided without torch, before a GPU is rented."""

from loadmaster.preflight.plan import Plan
from loadmaster.preflight.search import make_plan
from loadmaster.preflight.table import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
