"""An event that no interrupt can break."""

from queue import Empty, SimpleQueue


class Flag:
    """Something that happens once, and that threads wait for.

    Not `threading.Event`: an interrupt in the middle of one may leave its lock taken, and whoever sets it
    then hangs. Here all waiting is one call in C.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._words: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Let it have happened."""
        self._is_set = True
        self._tell_another()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has happened, or for so long; say whether it has."""
        while not self._is_set:
            try:
                self._words.get(timeout=timeout_s)
            except Empty:
                break
            finally:
                self._tell_another()  # also where an interrupt comes between
        return self._is_set

    def _tell_another(self) -> None:
        if self._is_set:
            self._words.put(None)
