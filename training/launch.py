"""torchrun for run_train.sh: the same options, but a user's mistake stays exit status 2, and one line tells what ended.

    python -m training.launch RESTARTS [torchrun's options] train.py --config X.toml ...

torchrun itself makes 1 of every status, and adds forty lines below the one that says what is wrong. After a failure
that is no mistake all processes are started again, RESTARTS times at most, and go on from the newest checkpoint.
torchrun's own restarts would try mistakes again too. On several nodes the launchers agree without a word: when ranks of
one have died those of the others fail as well, and the n-th start of each meets at the n-th port from the first.
"""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch(arguments: list[str]) -> int:
    """0; 2 if any rank found a user's mistake, which it has told itself; 1 if one failed otherwise."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    stops: list[int] = []  # run_train.sh tells that the ranks have been asked to end: none is to start again
    signal.signal(signal.SIGUSR1, lambda number, _: stops.append(number))
    restarts, *options = arguments
    for start in range(1 + int(restarts)):
        try:
            main(_with_port_of(start, options))
        except ChildFailedError as error:
            if any(failure.exitcode == 2 for failure in error.failures.values()):
                return 2
            rank, first = error.get_first_failure()
            code = first.exitcode
            what = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            again = start < int(restarts) and not stops
            next_start = f": restart {start + 1} of {restarts}" if again else ""
            print(f"rank {rank} {what}; the others were stopped{next_start}", file=sys.stderr, flush=True)
            if not again:
                return 1
        else:
            return 0
    raise AssertionError("the last start returns")


def _with_port_of(start: int, options: list[str]) -> list[str]:
    """torchrun's options for the start with this number, from 0."""
    if "--master-port" not in options:
        return options
    place = options.index("--master-port") + 1
    return [*options[:place], str(int(options[place]) + start), *options[place + 1 :]]


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
