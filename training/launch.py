"""torchrun for run_train.sh: the same options, but a user's mistake stays exit status 2, and one line tells what ended.

    python -m training.launch [torchrun's options] train.py --config X.toml ...

torchrun itself makes 1 of every status, and adds forty lines below the one that says what is wrong.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch(arguments: list[str]) -> int:
    """0; 2 if any rank found a user's mistake, which it has told itself; 1 if one failed otherwise."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        main(arguments)
    except ChildFailedError as error:
        if any(failure.exitcode == 2 for failure in error.failures.values()):
            return 2
        rank, first = error.get_first_failure()
        code = first.exitcode
        what = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"rank {rank} {what}; the others were stopped", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
