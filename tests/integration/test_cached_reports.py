"""Do gateways hear what an instance has cached? Whole instances (fake engines, real inboxes)."""

from __future__ import annotations

import asyncio

from instance.fake_blocks import block_hashes
from instance.fake_model import FakeRequest
from instance.messages import ALL_CACHED, HASH_BYTES
from tests.support.fleet import Fleet, Gateway, a_request, fleet_of
from tests.support.known_blocks import split

SIZE = 16


def hashes_of(request: FakeRequest) -> list[bytes]:
    return [digest.to_bytes(HASH_BYTES, "big") for digest in block_hashes(request.prompt, SIZE)]


def knows(gateway: Gateway, instance: str, request: FakeRequest) -> bool:
    return set(hashes_of(request)) <= gateway.known[instance].hashes


async def run(fleet: Fleet, at: str, request_id: str, request: FakeRequest) -> None:
    await fleet.run(at, request_id, request, 1)
    await fleet.finish(request_id)


async def test_a_subscriber_hears_all_and_then_what_changes() -> None:
    early, late = a_request(1, 5 * SIZE, 2), a_request(2, 3 * SIZE, 2)
    async with fleet_of(1) as fleet:
        gateway = fleet.gateway
        await run(fleet, "i0", "early", early)
        gateway.subscribe(fleet.members["i0"], cached_from=ALL_CACHED)
        await gateway.until(lambda: knows(gateway, "i0", early))
        await run(fleet, "i0", "late", late)
        await gateway.until(lambda: knows(gateway, "i0", late))
        first, *changes = gateway.cached["i0"]
        assert (first.begin, first.instance, first.epoch, first.block_size) == (ALL_CACHED, "i0", 1, SIZE)
        assert split(first.added)[:5] == hashes_of(early), "in order, from the first block on"
        assert [one.begin for one in changes] == [one.end for one in (first, *changes)][:-1], "no gap"
        assert await fleet.services["i0"].reset_prefix_cache()
        await gateway.until(lambda: gateway.known["i0"].hashes == set())


async def test_what_was_lost_is_told_again_to_who_says_how_much_it_knows() -> None:
    request = a_request(3, 4 * SIZE, 2)
    async with fleet_of(1) as fleet:
        gateway, member = fleet.gateway, fleet.members["i0"]
        gateway.subscribe(member, cached_from=ALL_CACHED)
        await gateway.until(lambda: bool(gateway.cached["i0"]))
        known = gateway.known["i0"].cached_from
        await run(fleet, "i0", "r", request)
        await gateway.until(lambda: knows(gateway, "i0", request))
        num_heard = len(gateway.cached["i0"])
        gateway.subscribe(member, cached_from=known)
        await gateway.until(lambda: len(gateway.cached["i0"]) > num_heard)
        again = gateway.cached["i0"][-1]
        assert again.begin == known and set(hashes_of(request)) <= set(split(again.added))


async def test_a_destination_tells_the_blocks_that_came_with_a_request() -> None:
    request = a_request(4, 6 * SIZE, 3000)
    async with fleet_of(2) as fleet:
        gateway = fleet.gateway
        for member in fleet.members.values():
            gateway.subscribe(member, cached_from=ALL_CACHED)
        await fleet.run("i0", "r", request, 5)
        await gateway.until(lambda: knows(gateway, "i0", request))
        assert not set(hashes_of(request)) & gateway.known["i1"].hashes
        told = await fleet.services["i0"].migrate("r", fleet.members["i1"])
        assert told.outcome == "committed"
        await gateway.until(lambda: knows(gateway, "i1", request))
        gateway.abort(*fleet.members.values(), request_ids=("r",))


async def test_who_did_not_ask_or_whose_lease_has_ended_hears_nothing_of_it() -> None:
    """Load reports go on to one that only stopped asking for blocks."""
    async with fleet_of(1) as fleet:
        gateway, member = fleet.gateway, fleet.members["i0"]
        gateway.subscribe(member, cached_from=ALL_CACHED)
        await gateway.until(lambda: bool(gateway.cached["i0"]))
        gateway.subscribe(member)
        await run(fleet, "i0", "r", a_request(5, 4 * SIZE, 2))
        num_heard, num_reports = len(gateway.cached["i0"]), gateway.num_reports["i0"]
        await gateway.until(lambda: gateway.num_reports["i0"] >= num_reports + 6)
        assert len(gateway.cached["i0"]) == num_heard
        agent = fleet.services["i0"].agent
        gateway.subscribe(member, lease_s=0.01, cached_from=0)
        async with asyncio.timeout(20):
            while agent.num_subscribers or agent._cached.is_wanted:  # noqa: ASYNC110 - it waits for a lease to end
                await asyncio.sleep(0.01)
