"""The exceptions a user should ever see, and what to take over from others."""


class InputError(ValueError):
    """
    What the user gave (a flag, a file, a value) cannot work.

    str() is one line that names it and says what would be right; scripts print
    that line and leave with status 2 (parser.run).
    """


class FileAccessError(InputError):
    """The system does not let this process read a file or list a folder, so nothing is known about its content."""


class TrainingError(RuntimeError):
    """
    Training cannot go on (the network yields NaN). str() is one line that says at which step, on which
    rank, and which checkpoint is the last good one; scripts print it and leave with status 1.
    """


def is_loss_of_a_worker(error):
    """Whether torch tells, wherever the program is at that moment, that a process of a DataLoader's was killed."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def first_line(error):
    """What another library's exception says, without what it says below that."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def loss_of_shared_memory(error):
    """The line in which torch says that it cannot get shared memory, as for the batch of a data worker; or ""."""
    return next((line.strip() for line in str(error).splitlines() if "</torch_" in line), "")


def is_out_of_memory(error):
    """Whether an exception says that a GPU or the machine has no memory left for a tensor or an array."""
    # torch's of the CPU are RuntimeErrors
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
