"""Do many migrations at once get in each other's way? Both directions of a pair, all pairs of a fleet, called off ones.

Fake engines, real inboxes and carriers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import permutations

import pytest

from instance.spec import Carrier, MigrationSummary
from tests.support.fleet import Fleet, a_request, expected_output, fleet_of

MANY = 8
SLOW = ("--step-time-ms", "8")
"""Steps so long that a busy machine gets its migrations done before the requests end."""
WHY = "the operator changed her mind"


async def migrate(fleet: Fleet, request_id: str, source: str, destination: str) -> MigrationSummary:
    return await fleet.services[source].migrate(request_id, fleet.members[destination])


def shares(names: list[str], num_each: int) -> dict[str, str]:
    """Request ids and where each one starts."""
    return {f"{name}-r{number}": name for name in names for number in range(num_each)}


@pytest.mark.parametrize("carrier", [Carrier.TCP, Carrier.SHM])
async def test_eight_requests_cross_eight_others_between_one_pair(carrier: Carrier) -> None:
    starts = shares(["i0", "i1"], MANY)
    requests = {name: a_request(key, 100 + 30 * key, 500) for key, name in enumerate(starts)}
    limits = {"max_migrations_out": MANY, "max_migrations_in": MANY}
    flags = ("--num-gpu-blocks-override", "2048", "--max-num-seqs", "32")
    async with fleet_of(2, *SLOW, *flags, carrier=carrier, **limits) as fleet:
        await asyncio.gather(*(fleet.run(starts[name], name, request, 5) for name, request in requests.items()))
        other = {"i0": "i1", "i1": "i0"}
        told = await asyncio.gather(*(migrate(fleet, name, at, other[at]) for name, at in starts.items()))
        assert [summary.outcome for summary in told] == ["committed"] * (2 * MANY), Counter(s.reason for s in told)
        await fleet.finish(*requests)
        for name, request in requests.items():
            assert fleet.gateway.tokens(name) == expected_output(request), name
        await fleet.check_rest()


async def test_requests_move_between_all_pairs_of_four_instances_at_once() -> None:
    names = ["i0", "i1", "i2", "i3"]
    routes = {f"{source}-{destination}": (source, destination) for source, destination in permutations(names, 2)}
    requests = {name: a_request(key, 150, 500) for key, name in enumerate(routes)}
    limits = {"max_migrations_out": 3, "max_migrations_in": 3}
    async with fleet_of(4, *SLOW, "--num-gpu-blocks-override", "1024", "--max-num-seqs", "16", **limits) as fleet:
        await asyncio.gather(*(fleet.run(routes[name][0], name, request, 5) for name, request in requests.items()))
        told = await asyncio.gather(*(migrate(fleet, name, *route) for name, route in routes.items()))
        assert [summary.outcome for summary in told] == ["committed"] * len(routes), Counter(s.reason for s in told)
        await fleet.finish(*requests)
        for name, request in requests.items():
            assert fleet.gateway.tokens(name) == expected_output(request), name
        await fleet.check_rest()


@pytest.mark.parametrize("turns", [0, 10, 40, 100, 300])
async def test_a_migration_that_is_called_off_leaves_the_request_whole_and_free_to_move_again(turns: int) -> None:
    """The moment of the call is swept over the whole migration; a late one must find it committed."""
    request = a_request(3, 2000, 500)
    async with fleet_of(2, *SLOW) as fleet:
        await fleet.run("i0", "r", request, 5)
        moving = asyncio.create_task(migrate(fleet, "r", "i0", "i1"))
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        was_moving = fleet.services["i0"].cancel_migration("r", WHY)
        told = await moving
        if told.outcome != "committed":
            assert was_moving and (told.outcome, told.reason) == ("refused", f"withdrawn by the source: {WHY}"), told
            assert (await migrate(fleet, "r", "i0", "i1")).outcome == "committed"
        await fleet.finish("r")
        assert fleet.gateway.tokens("r") == expected_output(request)
        await fleet.check_rest()


async def test_calling_off_one_migration_leaves_the_others_alone() -> None:
    requests = {"stays": a_request(1, 2000, 500), "goes": a_request(2, 2000, 500)}
    async with fleet_of(2, *SLOW, "--num-gpu-blocks-override", "1024") as fleet:
        await asyncio.gather(*(fleet.run("i0", name, request, 5) for name, request in requests.items()))
        moving = {name: asyncio.create_task(migrate(fleet, name, "i0", "i1")) for name in requests}
        await asyncio.sleep(0)
        assert fleet.services["i0"].cancel_migration("stays", "called off")
        told = {name: await task for name, task in moving.items()}
        assert {name: summary.outcome for name, summary in told.items()} == {"stays": "refused", "goes": "committed"}
        assert not fleet.services["i0"].cancel_migration("stays", "too late")
        await fleet.finish(*requests)
        for name, request in requests.items():
            assert fleet.gateway.tokens(name) == expected_output(request), name
        await fleet.check_rest()
