"""A rank that looks at itself and the others, as before training.

python examined.py FOLDER, with torchrun's variables; CONFIG and CLOCK (seconds ahead) make a rank different.
"""

import os
import sys
import time
from pathlib import Path

from loadmaster.config.show import show_error
from loadmaster.errors import LoadmasterError
from loadmaster.training import doctor
from loadmaster.training.world import World, join, leave


def main(folder: Path) -> int:
    ahead_s = float(os.environ.get("CLOCK", "0"))
    doctor.time.time = lambda now=time.time: now() + ahead_s  # the clock of the whole machine cannot be set here
    world = World()
    try:
        world = join("cpu")
        doctor.examine(world, os.environ.get("CONFIG", "c0ffee"), "data", folder, doctor.Needs(), print)
        return 0
    except LoadmasterError as error:
        show_error(error)
        return error.exit_code
    finally:
        leave(world)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
