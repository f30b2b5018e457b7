"""Profiles: the file is a valid pprof, and what it says about a program whose behaviour is known is true."""

import asyncio
import gzip
import hashlib
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from neon_services.ground.debug_http import DebugApi
from neon_services.ground.http import make_application
from neon_services.ground.pprof import Profile, ProfileBuilder
from neon_services.ground.profiling import CpuProfiler, HeapProfilingOff, heap_profile
from tests.waiting import eventually


def opened(content: bytes) -> Any:
    """Read the file and check all that pprof checks before it shows anything."""
    profile = Profile.FromString(gzip.decompress(content))
    strings = profile.string_table
    assert strings[0] == ""
    assert len(set(strings)) == len(strings)
    mappings = {mapping.id for mapping in profile.mapping}
    functions = {function.id: function for function in profile.function}
    locations = {location.id: location for location in profile.location}
    assert 0 not in mappings | functions.keys() | locations.keys()
    assert (len(functions), len(locations)) == (len(profile.function), len(profile.location))
    for location in profile.location:
        assert location.mapping_id in mappings
        assert all(line.function_id in functions for line in location.line)
    for sample in profile.sample:
        assert len(sample.value) == len(profile.sample_type)
        assert all(number in locations for number in sample.location_id)
        assert all(label.key < len(strings) and label.str < len(strings) for label in sample.label)
    for function in profile.function:
        assert 0 < function.name < len(strings) and 0 < function.filename < len(strings)
    return profile


def kinds(profile: Any) -> list[tuple[str, str]]:
    return [(profile.string_table[kind.type], profile.string_table[kind.unit]) for kind in profile.sample_type]


def stacks(profile: Any) -> Iterator[tuple[list[str], str, list[int]]]:
    """(functions from the innermost, thread, values) of every sample."""
    strings = profile.string_table
    functions = {function.id: strings[function.name] for function in profile.function}
    names = {location.id: functions[location.line[0].function_id] for location in profile.location}
    for sample in profile.sample:
        thread = strings[sample.label[0].str] if sample.label else ""
        yield [names[number] for number in sample.location_id], thread, list(sample.value)


def test_the_bytes_are_those_of_the_format() -> None:
    """One sample by hand, against the field numbers of profile.proto."""
    builder = ProfileBuilder((("samples", "count"),), period=("cpu", "nanoseconds", 10), program="p")
    builder.add([("f", "a.py", 1, 3), ("main", "a.py", 9, 12)], [7])
    builder.add([("f", "a.py", 1, 3)], [8])
    raw = gzip.decompress(builder.finish(5))
    assert bytes.fromhex("1207 0a02 0102 1201 07".replace(" ", "")) in raw  # sample: locations 1, 2; value 7
    assert bytes.fromhex("1206 0a01 01 1201 08".replace(" ", "")) in raw
    assert bytes.fromhex("22 0a 0801 1001 2204 0801 1003".replace(" ", "")) in raw  # location 1: mapping 1, function 1, line 3
    assert b"\x32\x01f" in raw and b"\x32\x04a.py" in raw and raw.count(b"a.py") == 1  # the table of strings


def burn(until: threading.Event) -> None:
    while not until.is_set():
        hashlib.sha256(b"x" * 2000).digest()


async def test_processor_time_is_given_to_who_used_it() -> None:
    """One thread works, one waits: the working one has (nearly) all the time, the waiting one none."""
    over = threading.Event()
    threads = [threading.Thread(target=burn, args=(over,), name="busy"), threading.Thread(target=over.wait, name="idle")]
    for thread in threads:
        thread.start()
    before = time.process_time_ns()
    try:
        profile = opened(await CpuProfiler(0.7, 200).run())
    finally:
        used = time.process_time_ns() - before
        over.set()
        for thread in threads:
            thread.join()
    assert kinds(profile) == [("samples", "count"), ("cpu", "nanoseconds")]
    by_thread: Counter[str] = Counter()
    burning = 0
    for stack, thread, (_, nanoseconds) in stacks(profile):
        by_thread[thread] += nanoseconds
        if "burn" in stack:
            assert stack[-1] == "Thread._bootstrap", "stacks go from the innermost frame to the outermost"
            burning += nanoseconds
    assert by_thread["idle"] < 20_000_000
    assert burning > 0.5 * used
    assert sum(by_thread.values()) < 1.2 * used
    assert 0.6e9 < profile.duration_nanos < 3e9


async def test_the_event_loop_is_seen_where_it_works() -> None:
    """Work between two system calls, as a safekeeper does it: seen from outside, it would all be in the system calls."""

    def check() -> None:
        for _ in range(20):
            hashlib.sha256(bytes(20_000)).digest()

    def write(file: Any) -> None:
        file.write(b"x" * 4096)
        file.flush()

    async def serve() -> None:
        with tempfile.TemporaryFile() as file:
            while True:
                check()
                write(file)
                await asyncio.sleep(0)

    serving = asyncio.create_task(serve())
    before = time.thread_time_ns()
    profile = opened(await CpuProfiler(0.8, 200).run())
    used = time.thread_time_ns() - before
    serving.cancel()
    by_function: Counter[str] = Counter()
    for stack, thread, (_, nanoseconds) in stacks(profile):
        if thread == "MainThread":
            by_function.update({name.rsplit(".", 1)[-1]: nanoseconds for name in set(stack)})
    assert by_function["serve"] > 0.6 * used, "the main thread did hardly anything else"
    assert by_function["check"] > 5 * by_function["write"], by_function


async def test_a_thread_that_ends_meanwhile_does_no_harm() -> None:
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            threads = [threading.Thread(target=hashlib.sha256, args=(b"x" * 100_000,)) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    running = threading.Thread(target=come_and_go)
    running.start()
    try:
        opened(await CpuProfiler(0.3, 1000).run())
    finally:
        over.set()
        running.join()


def test_the_heap_is_by_where_it_was_asked_for() -> None:
    if not tracemalloc.is_tracing():
        with pytest.raises(HeapProfilingOff, match="PYTHONTRACEMALLOC"):
            heap_profile()
    tracemalloc.start(5)
    try:
        kept = [bytearray(1000) for _ in range(3000)]
        profile = opened(heap_profile())
    finally:
        tracemalloc.stop()
    assert kinds(profile) == [("inuse_objects", "count"), ("inuse_space", "bytes")]
    found = [values for stack, _, values in stacks(profile) if stack[0].startswith("test_profiling.py:")]
    count, size = max(found, key=lambda values: values[1])
    assert 3000 <= count < 7000
    assert size > 3_000_000
    assert len(kept) == 3000


@pytest.fixture
def api() -> DebugApi:
    return DebugApi()


@pytest.fixture
async def service(api: DebugApi) -> AsyncIterator[str]:
    application = make_application()
    api.add_routes(application.router)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"  # type: ignore[attr-defined]
    await runner.cleanup()


async def get(url: str) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.read()


async def test_a_service_profiles_itself(service: str) -> None:
    status, content = await get(f"{service}/profile/cpu?seconds=1&frequency=100")
    assert status == 200
    profile = opened(content)
    assert profile.string_table[profile.mapping[0].filename] == sys.argv[0]
    assert profile.period == 10_000_000


@pytest.mark.parametrize(
    "query",
    ["seconds=0", "seconds=61", "seconds=x", "seconds=-1", "seconds=1.5", "seconds=", "frequency=0", "frequency=1001",
     "format=svg", "force=yes", f"seconds={'1' * 5000}"],
)  # fmt: skip
async def test_wrong_parameters_are_refused_by_name(service: str, query: str) -> None:
    status, content = await get(f"{service}/profile/cpu?{query}")
    assert status == 400
    assert query.split("=")[0] in content.decode()


async def test_one_profile_at_a_time_unless_forced(service: str, api: DebugApi) -> None:
    first = asyncio.create_task(get(f"{service}/profile/cpu?seconds=60"))
    async with asyncio.timeout(10):
        await eventually(lambda: api.profiling, "the profile to begin")
        status, content = await get(f"{service}/profile/cpu?seconds=1")
        assert (status, b"already running" in content) == (409, True)
        status, _ = await get(f"{service}/profile/cpu?seconds=1&force=true")
        assert status == 200
        status, content = await first
    assert status == 200, "who was ended gets what there was until then"
    assert opened(content).duration_nanos < 10e9


async def test_the_heap_of_a_process_that_does_not_trace_it(service: str) -> None:
    status, content = await get(f"{service}/profile/heap")
    assert (status, b"PYTHONTRACEMALLOC" in content) == (412, True)
