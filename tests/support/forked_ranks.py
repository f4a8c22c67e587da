# SPDX-License-Identifier: Apache-2.0
"""The ranks of an engine, forked off one process that has imported vLLM.

On a CPU vLLM starts each rank as a new interpreter, which imports all of it anew, for longer than a
tiny model's loading and answers take. What a rank runs is the same.
"""

import functools
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from unittest import mock


class _Rank(ForkServerProcess):
    """With the environment that its parent has now, not the one of the first rank's start."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._environment = dict(os.environ)

    def run(self):
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Rank


@functools.cache
def context():
    """The context of multiprocessing by which ranks are started."""
    made = _Context()
    made.set_forkserver_preload(["rank_modules"])
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        forkserver.ensure_running()
    return made


def install():
    """Have vLLM start the ranks of engines in this process so."""
    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = context
