"""The recipe served as a deployment, as a user would, with an engine that someone can break and repair meanwhile.

    python -m tests.faults.serving_driver NAME

Each run happens in a process that Prefect spawns, and which imports this module as __mp_main__ first. Environment: as
for `tests.faults.driver`, and
    FAULT_BROKEN      a file that holds text; while it is there, the engine dies at prompts that contain it
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults.driver import install

if __name__ in ("__main__", "__mp_main__"):
    from models.engine import EngineError
    from models.fake_engine import FakeEngine

    BROKEN = Path(os.environ["FAULT_BROKEN"])
    sample = FakeEngine.sample

    def breakable(self: Any, requests: Any, sampling: Any) -> Iterator[Any]:
        """Draw, until a request is met that cannot be."""

        def accepted() -> Iterator[Any]:
            for request in requests:
                if BROKEN.exists() and BROKEN.read_text() in request.messages[-1]["content"]:
                    raise EngineError(f"the engine is broken at {request.key}")
                yield request

        return sample(self, accepted(), sampling)

    FakeEngine.sample = breakable  # type: ignore[method-assign]
    install()

if __name__ == "__main__":
    from prefect.flows import EntrypointType

    from flows.rest_em import rest_em

    rest_em.serve(name=sys.argv[1], entrypoint_type=EntrypointType.MODULE_PATH, print_starting_message=False)
