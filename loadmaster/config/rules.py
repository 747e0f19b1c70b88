"""Rules between fields: one table, checked on every job and printed in docs/configuration.md.

A rule is here only if it holds for every model and machine; what depends on memory, on the model's config.json
or on the GPUs that are there is preflight's to refuse.
"""

from loadmaster.config import data_rules, job_rules, serving_rules
from loadmaster.config.rule_table import RULES, broken_rules

RULES.sort(key=lambda entry: entry.check.__module__)  # whichever module was imported first

__all__ = ["RULES", "broken_rules", "data_rules", "job_rules", "serving_rules"]
