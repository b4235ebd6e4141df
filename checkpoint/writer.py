"""DCP's writer, and what goes wrong with it in one line."""

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from checkpoint import directories
from errors import UserError


class Writer(dcp.FileSystemWriter):
    """DCP's, whose errors are the disk's own: what an error came from does not travel to the other ranks with it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Writes this rank's file."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            if cause := directories.disk_error(error):
                raise cause from error
            raise


def one_line(error: BaseException) -> str:
    """The reason, without DCP's tracebacks of every rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if not isinstance(error, UserError):
        error = directories.disk_error(error) or error
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)
