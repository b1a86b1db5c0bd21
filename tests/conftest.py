"""
What holds for all tests: they have a base folder of their own, so that none writes to that of the
user, and too many shapes for the compiler are an error, where torch would only stop compiling.
"""

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def base_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        yield


@pytest.fixture(autouse=True)
def no_silent_return_to_eager():
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.config.fail_on_recompile_limit_hit = True
