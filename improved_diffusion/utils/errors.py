"""Exceptions for the user, and the meaning of other libraries' exceptions."""

from .streams import printable


class InputError(ValueError):
    """
    An option, file or value of the user's is invalid. str() is one line that names it and what is valid; scripts print
    it and exit with status 2 (cli.parser.run). Control characters, as in file names, are escaped.
    """

    def __str__(self):
        return printable(super().__str__())


class MissingFileError(InputError, FileNotFoundError):
    """There is no such file or folder."""


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


def exhausted_limit(error: BaseException) -> str:
    """The line that reports too many open files, or processes and threads; "" for other errors."""
    texts = ("Too many open files", "can't start new thread", "Resource temporarily unavailable")
    return next((line.strip() for line in str(error).splitlines() if any(text in line for text in texts)), "")


def is_compiler_error(error: BaseException) -> bool:
    """Whether torch.compile failed."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the machine is out of memory."""
    # on the CPU torch raises RuntimeError; cuBLAS and cuDNN have names of their own
    texts = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
