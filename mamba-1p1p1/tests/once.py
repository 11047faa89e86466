"""What is compiled once for all tests, by whichever of pytest's workers needs it first; the others wait for it."""

import fcntl
import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path


def shared_folder(tmp_path_factory, name: str) -> Path:
    """A folder of this run of the tests, the same one for all of its workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def kept(folder: Path, function: Callable) -> Callable:
    """`function`, of arguments whose repr is all that they are: what it returned to another is read from `folder`."""

    def found(*arguments):
        path = folder / f"{function.__name__}-{hashlib.sha256(repr(arguments).encode()).hexdigest()}"
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                result = function(*arguments)
                Path(f"{path}.new").write_bytes(pickle.dumps(result))
                os.replace(f"{path}.new", path)
        return pickle.loads(path.read_bytes())

    return found
