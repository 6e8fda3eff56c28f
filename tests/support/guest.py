"""
A host process of its own, for tests that end it.

It imports everything once, and then serves each line of JSON on its standard input in a child that
it forks off: the child opens an engine, makes one image, and tells its pixels. Children can be
killed at any moment, and cost no import.
"""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any


def tell(**facts: Any) -> None:
    """Write one line."""
    print(json.dumps(facts), flush=True)  # noqa: T201 - this is how it speaks to the test


def serve(order: dict[str, Any]) -> None:
    """Open an engine, make one image, close the engine."""
    from holdfast.engine.engine import Engine
    from holdfast.engine.requests.kinds import request_from_json

    tell(begun=os.getpid())
    with Engine(
        order["model"], cache_dir=Path(order["cache"]), log_file=Path(order["log"])
    ) as engine:
        result = engine.run(request_from_json(order["request"]))
    images = (*result.images, *result.first_pass)
    tell(pixels=[sha256(image.tobytes()).hexdigest() for image in images])


def main() -> None:
    """Serve until the input ends."""
    from holdfast.engine.imports import heavy

    heavy()
    import optimum.intel.openvino

    assert optimum.intel.openvino
    tell(ready=os.getpid())
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            serve(json.loads(line))
            os._exit(0)
        tell(ended=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
