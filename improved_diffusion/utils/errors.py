"""The exceptions that a user sees, and what other libraries' exceptions mean."""


class InputError(ValueError):
    """
    The user gave an invalid option, file or value.

    str() is one line that names it and what is valid; scripts print it and exit with status 2 (parser.run).
    """


class FileAccessError(InputError):
    """The system does not let this process read a file or list a folder: nothing is known about its content."""


class TrainingError(RuntimeError):
    """
    Training cannot continue (the network yields NaN). str() is one line with the step, the rank and the last good
    checkpoint; scripts print it and exit with status 1.
    """


def is_loss_of_a_worker(error):
    """Whether an exception means that a DataLoader's process was killed; torch raises it anywhere in the program."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def first_line(error):
    """The first line of an exception's message."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def loss_of_shared_memory(error):
    """The line in which torch says that it cannot get shared memory, as for the batch of a data worker; or ""."""
    return next((line.strip() for line in str(error).splitlines() if "</torch_" in line), "")


def is_out_of_memory(error):
    """Whether an exception means that a GPU or the machine is out of memory."""
    # torch's of the CPU are RuntimeErrors
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ("out of memory", "can't allocate memory", "not enough memory")
    )
