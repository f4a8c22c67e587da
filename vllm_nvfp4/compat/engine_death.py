# SPDX-License-Identifier: Apache-2.0
"""How a server ends whose engine has died."""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm_nvfp4.compat import versions


def install() -> None:
    """End a server whose engine has died with status 1 and one line.

    vLLM ends it with status 0, which a service manager takes for the user's wish. In the server's
    process alone, and only once it serves with this method.
    """
    launcher = versions.server_launcher()
    if launcher is None or hasattr(launcher.terminate_if_errored, "__wrapped__"):
        return
    terminate = launcher.terminate_if_errored

    @functools.wraps(terminate)
    def terminate_with_status(server: Any, engine: Any) -> None:
        was_ending = server.should_exit
        terminate(server, engine)
        if was_ending or not server.should_exit:
            return
        shutdown = server.shutdown

        async def shutdown_and_fail(*args: Any, **kwargs: Any) -> None:
            await shutdown(*args, **kwargs)
            raise RuntimeError(
                "the engine process of this server has died, so the server ends; the first error "
                "above says why; if there is none, the process was killed, as for lack of memory"
            )

        server.shutdown = shutdown_and_fail

    # Handlers of requests have the function under its name too.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and vars(module).get("terminate_if_errored") is terminate:
            module.terminate_if_errored = terminate_with_status  # type: ignore[attr-defined]
