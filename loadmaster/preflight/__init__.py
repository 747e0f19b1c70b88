"""What fits where, how fast, for how much: decided without torch, before a GPU is rented."""

from loadmaster.preflight.dataset import estimate_tokens
from loadmaster.preflight.make import make_plan
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.table import print_plan

__all__ = ["Plan", "estimate_tokens", "make_plan", "print_plan"]
