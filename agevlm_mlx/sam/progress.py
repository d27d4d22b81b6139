"""How far long work on a data set's images is."""

import sys
import time
from dataclasses import dataclass

#: Seconds between progress lines where the output is not a terminal.
PROGRESS_SECONDS = 10.0


@dataclass
class Progress:
    """A line with rate and time left: rewritten on a terminal, else one every ten seconds.

    brief: say nothing at the end if nothing had to be said before.
    """

    total: int
    what: str = "images"
    brief: bool = False
    first: float = 0.0
    shown: float = 0.0

    def show(self, done: int) -> None:
        """Say how far it is, if it is time to."""
        now = time.monotonic()
        self.first = self.first or now  # not before: loading the teacher says nothing of its pace
        live = sys.stderr.isatty()
        pause = 0.2 if live else PROGRESS_SECONDS
        last = done >= self.total and not (self.brief and not self.shown)
        if not last and now - (self.shown or self.first) < pause:
            return
        self.shown = now
        line = f"{self.what} {done}/{self.total}"
        # A batch comes all at once: the first one says nothing of the pace.
        if done > 1 and now >= self.first + 1:
            rate = (done - 1) / (now - self.first)
            line += f"  {rate:.1f}/s"
            line += f"  {_duration((self.total - done) / rate)} left" if done < self.total else ""
        end = "\r" if live and done < self.total else "\n"
        print(f"{line:<60}" if live else line, end=end, file=sys.stderr, flush=True)

    def show_of(self, done: int, total: int) -> None:
        """`show` for a caller that knows the total."""
        self.total = total
        self.show(done)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
