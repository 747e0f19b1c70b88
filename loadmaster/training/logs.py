"""A log for each rank: RUN_DIR/logs/rank-N.log, with the times at which what happened."""

from __future__ import annotations

import logging
import os
from pathlib import Path

NAME = "loadmaster"


def log_to(run_dir: Path, rank: int, everything: bool = False) -> None:
    """Let this process log there. everything: also what it prints, and what libraries print."""
    path = run_dir / "logs" / f"rank-{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger(NAME)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.handleError = lambda record: None  # a full disk: the run says so itself, and not for every line
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.disabled = False  # as a logging configuration with disable_existing_loggers would have it
    if everything:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
