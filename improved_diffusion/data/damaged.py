"""Leave out images that cannot be decoded."""

from .. import dist_util
from ..utils.errors import InputError
from ..utils.progress import Progress
from ..utils.streams import printable, show
from .folders import Paths
from .images import damage
from .loader import BatchesInOrder

NAMED = 100  # damaged images named in the log


def without_damaged(folder: str, paths: list[str], num_workers: int) -> tuple[list[str], list[str]]:
    """
    Decode each image once, and leave out those that cannot be decoded. A collective: each rank decodes a share, and all
    return the same.

    :param folder: for messages.
    :param num_workers: processes that decode.
    :return: (the other paths, in order; lines that count and name those left out).
    :raises InputError: on all ranks, if a file cannot be read, or no image remains.
    """
    try:
        mine = _problems(paths[dist_util.rank() :: dist_util.world_size()], num_workers), ""
    except InputError as e:
        mine = {}, str(e)
    problems = {}
    for of_a_rank, error in dist_util.all_gather_object(mine):
        if error:
            raise InputError(error)
        problems.update(of_a_rank)
    damaged = [path for path in paths if path in problems]
    if len(damaged) == len(paths):
        raise InputError(f"{folder}: none of its {len(paths):,} images can be decoded; {problems[damaged[0]]}")
    if not damaged:
        return paths, []
    notes = [f"{folder}: {len(damaged):,} of {len(paths):,} images left out, which cannot be decoded:"]
    notes += [printable(problems[path]) for path in damaged[:NAMED]]
    if len(damaged) > NAMED:
        notes.append(f"and {len(damaged) - NAMED:,} more")
    return [path for path in paths if path not in problems], notes


def _problems(paths, num_workers):
    """{path: why it cannot be decoded}."""
    found = {}
    with Progress("checking", len(paths), "images", show, show=dist_util.rank() == 0) as progress:
        for batch in BatchesInOrder(Paths(paths), 32, num_workers, collate_fn=_damages):
            found.update((path, problem) for path, problem in batch if problem)
            progress.update(len(batch))
    return found


def _damages(paths):
    return [(path, damage(path)) for path in paths]
