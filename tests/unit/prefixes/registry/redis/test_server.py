"""The Redis servers that other tests rely on do what their names say."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.support import redis_server
from tests.support.redis_cluster import RedisCluster
from tests.support.redis_front import Front
from tests.support.redis_sentinel import RedisSentinel
from tests.support.redis_server import SERVERS, RedisServer, find_servers, free_port


@pytest.fixture(params=SERVERS, scope="module")
def binary(request: pytest.FixtureRequest) -> Path:
    return SERVERS[request.param]


@pytest.fixture
def server(binary: Path) -> Iterator[RedisServer]:
    with RedisServer(binary, append_only=True) as server:
        yield server


def test_a_server_of_a_wheel_is_always_there() -> None:
    assert "valkey-9" in SERVERS
    assert all(path.is_file() for path in SERVERS.values())


def test_no_server_at_all_is_an_error_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "WHEELS", {"none": ("no-such-wheel", "redis-server")})
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("TEST_REDIS_SERVER", raising=False)
    with pytest.raises(RuntimeError, match="no Redis server"):
        find_servers()


def test_a_server_is_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEST_REDIS_SERVER", str(tmp_path))
    assert find_servers()["custom"] == tmp_path


def test_it_listens_on_the_loopback_alone_and_never_evicts(server: RedisServer) -> None:
    with server.client() as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
    with redis.Redis.from_url(server.url) as client:
        assert client.ping()


def test_what_was_written_outlives_a_crash_and_a_restart_on_the_same_port(server: RedisServer) -> None:
    url = server.url
    with server.client() as client:
        client.set("key", "value")
    server.kill()
    assert not server.running
    with server.client(retry=None) as client, pytest.raises(redis.ConnectionError):
        client.get("key")
    server.start()
    server.restart()
    assert server.url == url
    with server.client() as client:
        assert client.get("key") == b"value"


def test_without_the_aof_a_crash_loses_everything(binary: Path) -> None:
    with RedisServer(binary) as server:
        with server.client() as client:
            client.set("key", "value")
        server.restart()
        with server.client() as client:
            assert client.dbsize() == 0


def test_flush_empties_it(server: RedisServer) -> None:
    with server.client() as client:
        client.set("key", "value")
        server.flush()
        assert client.dbsize() == 0


def test_paused_it_accepts_and_does_not_answer_resumed_it_answers(server: RedisServer) -> None:
    server.pause()
    with server.client(socket_timeout=0.2, retry=None) as client, pytest.raises(redis.TimeoutError):
        client.ping()
    assert server.running
    server.resume()
    with server.client() as client:
        assert client.ping()


def test_it_ends_also_when_paused(binary: Path) -> None:
    for end in (RedisServer.stop, RedisServer.kill, RedisServer.close):
        server = RedisServer(binary).start()
        server.pause()
        end(server)
        assert not server.running
        server.close()


def test_its_folder_goes_with_it_unless_it_was_given(binary: Path, tmp_path: Path) -> None:
    with RedisServer(binary) as own:
        folder = own.folder
    assert not folder.exists()
    with RedisServer(binary, folder=tmp_path, append_only=True) as first, first.client() as client:
        client.set("key", "value")
    with RedisServer(binary, folder=tmp_path, append_only=True) as second, second.client() as client:
        assert client.get("key") == b"value"


def test_a_password_is_demanded_and_stands_in_no_command_line(binary: Path) -> None:
    with RedisServer(binary, password="s3cret") as server:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        with server.client(password=None, retry=None) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
        assert server.process is not None
        assert not any("s3cret" in str(argument) for argument in list(server.process.args))  # type: ignore[arg-type]
        assert server.password_file.read_text().strip() == "s3cret"
        assert {path.stat().st_mode & 0o77 for path in (server.password_file, server.folder / "redis.conf")} == {0}


def test_config_lines_replace_ours(binary: Path) -> None:
    with RedisServer(binary, config={"maxmemory-policy": "allkeys-lru"}) as server, server.client() as client:
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lru"


def test_a_server_that_cannot_start_says_what_it_wrote(binary: Path) -> None:
    server = RedisServer(binary, config={"no-such-setting": "1"})
    with pytest.raises(AssertionError, match="no-such-setting"), server:
        pass
    assert not server.folder.exists()


def test_a_port_that_was_taken_meanwhile_is_left_for_another(binary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RedisServer(binary) as first:
        ports = iter([first.port, free_port()])
        monkeypatch.setattr(redis_server, "free_port", lambda: next(ports))
        with RedisServer(binary) as second:
            assert second.port != first.port


def test_tls_is_demanded_and_its_authority_is_checked(binary: Path) -> None:
    with RedisServer(binary, tls=True, password="s3cret") as server:
        assert server.certificates is not None and server.url.startswith("rediss://")
        with redis.Redis.from_url(server.url, ssl_ca_certs=str(server.certificates.ca_certs)) as client:
            assert client.ping()
        with redis.Redis.from_url(server.url, retry=None) as client, pytest.raises(redis.ConnectionError) as caught:
            client.ping()
        assert "CERTIFICATE_VERIFY_FAILED" in str(caught.value)
        with (
            redis.Redis(port=server.port, retry=None, socket_timeout=5) as client,
            pytest.raises((redis.ConnectionError, redis.TimeoutError)),
        ):
            client.ping()


def test_mutual_tls_demands_the_clients_certificate(binary: Path) -> None:
    with RedisServer(binary, tls="mutual") as server:
        files = server.certificates
        assert files is not None
        trust = {"ssl_ca_certs": str(files.ca_certs)}
        shown = {"ssl_certfile": str(files.certfile), "ssl_keyfile": str(files.keyfile)}
        with redis.Redis.from_url(server.url, **trust, **shown) as client:
            assert client.ping()
        with (
            redis.Redis.from_url(server.url, **trust, retry=None) as client,
            pytest.raises((redis.ConnectionError, ssl.SSLError)),
        ):
            client.ping()


def test_a_front_delays_answers_and_cuts_connections(server: RedisServer) -> None:
    with Front(server.port) as front, redis.Redis(port=front.port, retry=None, socket_timeout=10) as client:
        client.set("key", b"x" * (1 << 20))
        front.delay_s = 0.2
        began = time.monotonic()
        client.ping()
        assert time.monotonic() - began >= 0.2
        front.delay_s = 30
        failures: list[Exception] = []

        def wait() -> None:
            try:
                client.ping()
            except redis.ConnectionError as error:
                failures.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        front.cut()
        waiting.join(20)
        assert len(failures) == 1
        front.delay_s = 0
        assert client.get("key") == b"x" * (1 << 20)


def test_a_front_before_a_dead_server_closes_what_it_accepts(server: RedisServer) -> None:
    with Front(server.port) as front, redis.Redis(port=front.port, retry=None, socket_timeout=10) as client:
        assert client.ping()
        server.kill()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        with pytest.raises(redis.ConnectionError):
            client.ping()
        server.start()
        assert client.ping()


@pytest.mark.slow
def test_a_cluster_serves_every_slot_through_a_dead_node_and_its_return(binary: Path) -> None:
    keys = [f"key-{number}" for number in range(30)]
    with RedisCluster(binary, password="s3cret", append_only=True) as cluster:
        with cluster.client() as client:
            for key in keys:
                client.set(key, key)
            pipeline = client.pipeline(transaction=True)
            pipeline.set("{tenant}a", 1)
            pipeline.set("{tenant}b", 2)
            pipeline.execute()
            assert [client.get("{tenant}a"), client.get("{tenant}b")] == [b"1", b"2"]
        sizes = []
        for node in cluster.nodes:
            with node.client() as client:
                sizes.append(client.dbsize())
        assert sum(sizes) == len(keys) + 2 and min(sizes) > 0
        holder = cluster.node_of(keys[0])
        with holder.client() as client:
            assert client.get(keys[0]) == keys[0].encode()
        holder.kill()
        holder.start()
        cluster.wait_ok()
        with cluster.client() as client:
            assert [client.get(key) for key in keys] == [key.encode() for key in keys]
        cluster.flush()
        with cluster.client() as client:
            assert client.dbsize() == 0


@pytest.mark.slow
@pytest.mark.parametrize("sentinels", [1, 3])
def test_sentinels_follow_a_killed_master_and_take_it_back_as_a_replica(binary: Path, sentinels: int) -> None:
    with RedisSentinel(binary, sentinels=sentinels, password="s3cret", append_only=True) as group:
        with group.client() as client:
            client.set("key", "value")
            old = group.master
            group.wait_replica()
            new = group.failover()
            assert new is not old and group.master is new
            assert client.get("key") == b"value"
            client.set("key", "later")
        old.start()
        group.wait_replica()
        assert group.replica is old
        with old.client() as client:
            assert client.get("key") == b"later"
        assert group.switch() is old
        with group.client() as client:
            assert client.get("key") == b"later"
