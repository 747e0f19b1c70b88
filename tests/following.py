"""A lead that does something alone, and a follower that waits: python following.py HOW, with torchrun's variables.

HOW is what becomes of the lead: stop (SIGSTOP), kill (SIGKILL), or a number: it ends with this exit code. With
`absent`, the last rank never comes to join the others.
"""

import os
import signal
import sys

from loadmaster import team
from loadmaster.errors import LoadmasterError
from loadmaster.training.stop import StopSignal
from loadmaster.training.world import join, meet


def main(how: str) -> int:
    team.SILENCE_S = 4.0
    if how == "absent":
        if os.environ["RANK"] == "2":
            return 0
        try:
            meet(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), "here", patience_s=8.0)
        except LoadmasterError as error:
            print(error)
            return error.exit_code
    ours = team.Team(join("cpu"))
    if ours.follows:
        return ours.follow(StopSignal())
    if how.isdigit():
        return ours.end(int(how))
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[how])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
