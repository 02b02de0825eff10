"""A Redis whose users are those of the deployment: by the ACL file that its setup writes, which wants a Redis 7.

Owns the server and the users' URLs. Knows no test.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Final
from urllib.parse import quote

from tests.support.paths import ROOT
from tests.support.redis_server import SERVERS, RedisServer

WITH_USERS: Final = tuple(name for name in SERVERS if "6.2" not in name)
USERS: Final = ("default", "probe", "server", "trainer")


def load_setup() -> ModuleType:
    """``docker/setup_secrets.py``, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("setup_secrets", ROOT / "docker/setup_secrets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RedisWithUsers(RedisServer):
    """``url`` is the server's user's; ``client`` is the default user's, who may do everything."""

    def __init__(self, binary: Path | None = None) -> None:
        self._secrets = tempfile.TemporaryDirectory(prefix="prefixd-secrets-")
        folder, setup = Path(self._secrets.name), load_setup()
        for readers in setup.READERS.values():
            for reader in readers:
                (folder / reader).mkdir(exist_ok=True)
        assert setup.main(folder, folder) == 0
        secrets = {user: secret for user, (secret, _) in setup.USERS.items()}
        holders = {user: next(iter(setup.READERS[secret])) for user, secret in secrets.items()}
        self.passwords = {user: (folder / holders[user] / secrets[user]).read_text() for user in secrets}
        config = {"aclfile": str(folder / "redis" / "users.acl")}
        super().__init__(binary, password=self.passwords["default"], config=config)

    def url_of(self, user: str, db: int = 0) -> str:
        """Where that user finds a database."""
        return f"redis://{user}:{quote(self.passwords[user])}@{self.address}/{db}"

    @property
    def url(self) -> str:
        return self.url_of("server")

    def close(self) -> None:
        super().close()
        self._secrets.cleanup()
