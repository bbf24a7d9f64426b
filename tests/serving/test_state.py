"""Sessions in memory and in Redis: kept apart, kept in order, and continued by any server."""

import asyncio
import contextlib
import json
import os
import signal
import threading
from functools import partial

import httpx
import pytest
from safetensors.torch import load

from tests.support.programs import free_port, in_threads, wait_until
from tests.support.service import redis_server, serving, spoken, undisturbed

pytest.importorskip("prometheus_client", reason="the service needs its extra: pip install '.[serve]'")

import redis

from modeling_mamba_ema.serving.errors import Refusal
from modeling_mamba_ema.serving.sessions import Session, open_store


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def server(saved_model, database):
    with serving(saved_model, "--state", database, "--max-rate", 10_000) as started:
        yield started


@pytest.fixture(params=["memory", "redis"])
def state(request):
    return "memory" if request.param == "memory" else request.getfixturevalue("database")


def run(state, model, seconds, work):
    """Await a function of a store."""

    async def with_store():
        store = open_store(state, model, seconds)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(with_store())


async def add(store, name, turns=1):
    async with store.hold(name) as held:
        await held.save(Session(bytes([turns]), {"turns": turns}))


def test_a_session_is_kept_replaced_and_deleted(state):
    async def work(store):
        assert await store.read("a") is None
        await add(store, "a")
        await add(store, "b")
        await add(store, "a", turns=2)
        assert await store.read("a") == Session(b"\2", {"turns": 2})
        assert await store.count() == 2
        async with store.hold("a") as held:
            assert held.session == Session(b"\2", {"turns": 2})
            await held.save(None)
        assert await store.read("a") is None
        assert await store.count() == 1

    run(state, "kept", 600, work)


def test_a_session_that_hears_nothing_is_forgotten(state):
    async def work(store):
        await add(store, "a")
        while await store.read("a") or await store.count():  # the test's own limit ends it
            await asyncio.sleep(0.01)

    run(state, "forgotten", 0.05, work)


def test_a_session_is_held_by_one_at_a_time_and_lets_others_pass(state):
    async def work(store):
        order = []

        async def wait_for_it():
            async with store.hold("a") as held:
                order.append(held.session.about["turns"])

        async with store.hold("a") as held:
            waiting = asyncio.create_task(wait_for_it())
            for turn in range(5):
                await add(store, f"other-{turn}")
            order.append("others")
            await held.save(Session(b"", {"turns": 1}))
        await waiting
        assert order == ["others", 1]

    run(state, "held", 600, work)


def test_a_lock_is_renewed_while_its_turn_is_heard(database):
    client = redis.from_url(database)

    async def work(store):
        async with store.hold("a"):
            left = [client.pttl("mamba-ema:renewed:lock:a")]
            while left[-1] <= min(left):  # until it rises; the test's own limit ends it
                await asyncio.sleep(0.05)
                left.append(client.pttl("mamba-ema:renewed:lock:a"))
        assert client.pttl("mamba-ema:renewed:lock:a") == -2  # gone

    run(database, "renewed", 600, work)


def test_who_has_lost_the_lock_cannot_save(database):
    async def work(store):
        async with store.hold("a") as late:
            redis.from_url(database).delete("mamba-ema:lost:lock:a")  # as when this server had been stopped
            async with store.hold("a") as held:
                await held.save(Session(b"new", {"turns": 1}))
            with pytest.raises(Refusal, match="session a was taken over by another server; send the turn again"):
                await late.save(Session(b"old", {"turns": 1}))
        assert (await store.read("a")).state == b"new"

    run(database, "lost", 600, work)


def test_servers_of_different_models_do_not_share_sessions(database):
    run(database, "one", 600, lambda store: add(store, "a"))

    async def work(store):
        assert await store.read("a") is None
        assert await store.count() == 0

    run(database, "other", 600, work)


def test_a_server_is_killed_and_another_continues_to_the_bit(saved_model, database, server):
    turns = [spoken(seed, seconds=25 if seed == 3 else 0.5) for seed in range(6)]
    client = redis.from_url(database)
    with serving(saved_model, "--state", database) as victim:
        heard = [(victim, server)[turn % 2].heard("call", turns[turn], number=turn + 1) for turn in range(3)]

        def send():
            with contextlib.suppress(httpx.HTTPError):  # the connection breaks
                victim.turn("call", turns[3], number=4)

        sending = threading.Thread(target=send)
        sending.start()
        wait_until(lambda: client.keys("mamba-ema:*:lock:call"))
        victim.kill()
        sending.join()
    # The turn is sent again, whether it was lost or only its answer was.
    heard += [server.heard("call", turns[turn], number=turn + 1) for turn in range(3, 6)]
    assert [row["values"] for row in heard] == undisturbed(saved_model, turns)
    (key,) = client.keys("mamba-ema:*:session:call")
    assert int(load(client.hget(key, "state"))["tracker.num_turns"]) == 6  # safetensors
    assert json.loads(client.hget(key, "about"))["last"] == heard[-1]
    assert client.ttl(key) > 3000


def test_two_servers_never_interleave_the_turns_of_a_call(saved_model, database, server):
    turns = {seed: spoken(seed, seconds=0.2 + 0.02 * seed) for seed in range(20)}
    heard: dict = {}
    with serving(saved_model, "--state", database) as other:

        def send(to, seed):
            heard[seed] = to.heard("race", turns[seed])

        in_threads([partial(send, (server, other)[seed % 2], seed) for seed in turns])
    order = sorted(heard, key=lambda seed: heard[seed]["turn"])
    assert [heard[seed]["turn"] for seed in order] == list(range(1, 21))
    assert [heard[seed]["values"] for seed in order] == undisturbed(saved_model, [turns[seed] for seed in order])


def test_turns_that_redis_does_not_take_are_refused_and_can_be_sent_again(saved_model, database, server):
    turns, client = [spoken(seed) for seed in range(2)], redis.from_url(database)
    server.heard("full", turns[0], number=1)
    client.config_set("maxmemory", 1)
    refused = server.turn("full", turns[1], number=2)
    client.config_set("maxmemory", 0)
    assert refused.status_code == 503
    assert refused.json()["detail"].startswith("the state in Redis cannot be used: ")
    assert server.heard("full", turns[1], number=2)["values"] == undisturbed(saved_model, turns)[1]


def test_a_server_goes_on_when_its_redis_was_away(saved_model, tmp_path):
    turns, port = [spoken(seed) for seed in range(2)], free_port()
    with redis_server(tmp_path, port) as url, serving(saved_model, "--state", url, "--max-batch", 1) as server:
        server.heard("call", turns[0], number=1)
        os.kill(redis.from_url(url).info()["process_id"], signal.SIGKILL)
        refused = server.turn("call", turns[1], number=2)
        assert refused.status_code == 503
        assert refused.json()["detail"].startswith("the state in Redis cannot be used: ")
        assert "mamba_ema_sessions NaN" in server.http.get("/metrics").text
        with redis_server(tmp_path, port):
            assert server.heard("call", turns[1], number=2)["values"] == undisturbed(saved_model, turns)[1]
