"""What all tests share: a base folder of their own, so that none writes to that of the user."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def base_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("base")))
        yield
