"""A thread that runs while a context is open."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def running(function: Callable[..., None], *arguments) -> Iterator[None]:
  """Calls `function(*arguments, ended)` in a daemon thread.

  At the end of the context, sets the `threading.Event` `ended` and waits until the function
  returns.
  """
  ended = threading.Event()
  thread = threading.Thread(target=function, args=(*arguments, ended), daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
