"""The position of a run: updates done, the label of its next checkpoint, and when that is due."""

from dataclasses import dataclass


@dataclass
class Position:
    """
    A checkpoint that is written inside the loop, at step k, follows k + 1 updates; the closing one at N follows N.

    :param step: of this loop.
    :param resume_step: steps before it, where a run of the original is resumed: the loop counts from 0 again then.
                        With a state file step itself continues, and this is 0.
    :param done: whether the update of this step has been made.
    :param saved: (label, updates) of the checkpoint last written or resumed from.
    """

    step: int = 0
    resume_step: int = 0
    done: bool = False
    saved: tuple[int, int] | None = None

    def label(self) -> int:
        """The number in the name of a checkpoint written now."""
        return self.step + self.resume_step

    @property
    def updates(self) -> int:
        """Steps done since the beginning of the run."""
        return self.label() + self.done

    def move_to(self, step: int) -> None:
        self.step, self.done = step, False

    def move_back(self) -> None:
        """To the end of the step before: this one failed."""
        self.step, self.done = self.step - 1, True

    def mark_saved(self) -> None:
        self.saved = self.label(), self.updates

    def is_at_source(self) -> bool:
        """Whether a checkpoint written now would overwrite the one of the original that the run was resumed from."""
        return self.step == 0 and self.resume_step > 0

    def save_due(self, interval: int) -> bool:
        """After a step: whether a checkpoint is due, one in each interval."""
        return self.step % interval == 0 and not self.is_at_source()

    def closing_save_due(self, interval: int) -> bool:
        """After the last step: whether its work is not saved yet."""
        regular = (self.step - 1) % interval == 0 and self.saved == (self.label() - 1, self.updates)
        return not regular and self.saved != (self.label(), self.updates)

    def has_news(self) -> bool:
        """Whether steps have been done since the last checkpoint."""
        return self.updates > (self.saved or (0, 0))[1] and not self.is_at_source()

    def next_save(self, interval: int, last: int | None) -> int:
        """
        The label of the next checkpoint.

        :param last: the step that the run ends at; None for no end.
        """
        wait = -self.step % interval or interval * self.is_at_source()
        following = self.label() + wait
        return following if last is None else max(self.label(), min(following, last))
