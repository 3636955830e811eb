"""Exceptions for the user, and the meaning of other libraries' exceptions."""


class InputError(ValueError):
    """
    An option, file or value of the user's is invalid. str() is one line that names it and what is valid; scripts print
    it and exit with status 2 (cli.parser.run).
    """


class FileAccessError(InputError):
    """The system refuses to read a file or list a folder: its content may be intact."""


class TrainingError(RuntimeError):
    """
    Training cannot continue, such as after NaN. str() is one line with the step, the rank and the last good checkpoint;
    scripts print it and exit with status 1.
    """


def is_dead_worker_error(error: BaseException | None) -> bool:
    """Whether a DataLoader's worker was killed; torch raises this anywhere in the program."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def first_line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def shared_memory_error(error: BaseException) -> str:
    """The line in which torch reports full shared memory, as a data worker does; "" for other errors."""
    return next((line.strip() for line in str(error).splitlines() if "</torch_" in line), "")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine is out of memory."""
    # on the CPU torch raises RuntimeError
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
