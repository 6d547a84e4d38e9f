"""Who gets in? Tokens, TLS and mutual TLS, with the client of the command line and with stock channels."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from orchestrator.access import ClientAccess, ServerAccess
from orchestrator.admin.client import AdminClient
from orchestrator.admin.errors import Declined, NotAdmitted
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2 as pb
from orchestrator.admin.pb.kvferry.admin.v1 import admin_pb2_grpc as pb_grpc
from orchestrator.admin.server import AdminServer
from orchestrator.cli import run_cli
from orchestrator.config import client_access_here
from orchestrator.errors import StartUpError
from tests.support.admin_world import Terms, World, admin_world
from tests.support.certificates import Authority

TOKEN = "a-token-of-24-characters"


async def policy_etag(world: World, access: ClientAccess) -> str:
    def ask() -> str:
        with AdminClient(world.address, access) as client:
            return client.policy().etag

    return await asyncio.to_thread(ask)


async def test_the_client_of_the_command_line_shows_its_token() -> None:
    async with admin_world(Terms(access=ServerAccess(token=TOKEN))) as world:
        assert await policy_etag(world, ClientAccess(token=TOKEN))
        for wrong in (ClientAccess(), ClientAccess(token=f"{TOKEN}x")):
            with pytest.raises(NotAdmitted, match="KVFERRY_ADMIN_TOKEN"):
                await policy_etag(world, wrong)


async def test_without_a_token_it_serves_this_machine_only() -> None:
    async with admin_world() as world:
        for host in ("0.0.0.0", "::", "192.0.2.1", "an-other.example"):
            with pytest.raises(StartUpError, match="give it a token"):
                await AdminServer(world.loop).start(host, 0)
        open_to_all = AdminServer(world.loop, ServerAccess(token=TOKEN))
        address = await open_to_all.start("0.0.0.0", 0)
        world.address = f"127.0.0.1:{address.rpartition(':')[2]}"
        assert await policy_etag(world, ClientAccess(token=TOKEN))
        await open_to_all.stop(0)


async def test_with_tls_both_sides_must_trust_each_other() -> None:
    ours, theirs = Authority("ours"), Authority("theirs")
    server, client, stranger = ours.sign("server"), ours.sign("client"), theirs.sign("client")
    plain = ServerAccess(certificate=server.certificate, key=server.key)
    async with admin_world(Terms(access=plain)) as world:
        assert await policy_etag(world, ClientAccess(ca=ours.certificate))
        for wrong in (ClientAccess(ca=theirs.certificate), ClientAccess()):
            with pytest.raises(Exception, match="the admin address"):
                await policy_etag(world, wrong)
    mutual = ServerAccess(TOKEN, server.certificate, server.key, ours.certificate)
    async with admin_world(Terms(access=mutual)) as world:
        right = ClientAccess(TOKEN, ours.certificate, client.certificate, client.key)
        assert await policy_etag(world, right)
        for wrong in (
            ClientAccess(TOKEN, ours.certificate),
            ClientAccess(TOKEN, ours.certificate, stranger.certificate, stranger.key),
            ClientAccess("", ours.certificate, client.certificate, client.key),
        ):
            with pytest.raises(NotAdmitted):
                await policy_etag(world, wrong)


async def test_a_stock_client_speaks_tls_and_sends_its_token_as_call_credentials() -> None:
    authority = Authority()
    server = authority.sign("server")
    async with admin_world(Terms(access=ServerAccess(TOKEN, server.certificate, server.key))) as world:
        credentials = grpc.composite_channel_credentials(
            grpc.ssl_channel_credentials(authority.certificate), grpc.access_token_call_credentials(TOKEN)
        )
        async with grpc.aio.secure_channel(world.address, credentials) as channel:
            stub = pb_grpc.AdminServiceStub(channel)
            assert (await stub.GetPolicy(pb.GetPolicyRequest())).policy.name == "policy"


async def test_the_commands_reach_a_guarded_api_by_flags_and_by_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = Authority()
    server, client = authority.sign("server"), authority.sign("client")
    access = ServerAccess(TOKEN, server.certificate, server.key, authority.certificate)
    certificate, key = client.write(tmp_path, "client")
    ca, token_file = tmp_path / "ca.crt", tmp_path / "token"
    ca.write_bytes(authority.certificate)
    token_file.write_text(TOKEN + "\n")
    flags = ["--admin-ca", str(ca), "--admin-cert", certificate, "--admin-key", key]
    async with admin_world(Terms(access=access)) as world:
        here = ["--admin", world.address]

        async def run(*arguments: str) -> tuple[int, str, str]:
            status = await asyncio.to_thread(run_cli, [*arguments, *here])
            shown = capsys.readouterr()
            return status, shown.out, shown.err

        status, _, err = await run(*flags, "policy")
        assert status == 2 and "KVFERRY_ADMIN_TOKEN" in err
        flags += ["--admin-token-file", str(token_file)]
        status, out, _ = await run(*flags, "policy")
        assert status == 0 and "rebalance.threshold_steps   512" in out
        monkeypatch.setenv("KVFERRY_ADMIN_CA", str(ca))
        monkeypatch.setenv("KVFERRY_ADMIN_CERT", certificate)
        monkeypatch.setenv("KVFERRY_ADMIN_KEY", key)
        monkeypatch.setenv("KVFERRY_ADMIN_TOKEN", TOKEN)
        status, out, _ = await run("policy", "--set", "rebalance.threshold_steps=9", "--set", "rebalance.enabled=false")
        assert status == 0 and out.splitlines() == [
            "rebalance.enabled is now false (was true)",
            "rebalance.threshold_steps is now 9 (was 512)",
        ]
        status, out, _ = await run("policy", "--reset", "rebalance.threshold_steps", "--dry-run")
        assert (status, out) == (0, "rebalance.threshold_steps would be 512 (was 9)\n")
        status, _, err = await run("policy", "--set", "drain.max_moves=0")
        assert (status, err) == (1, "kvferry: drain.max_moves: it is 0, it must be a whole number from 1 to 1000\n")
        status, _, err = await run("scale", "3")
        assert status == 1 and "cannot scale" in err, "it was let in, and refused by the core"
        status, out, _ = await run("status")
        assert status == 0 and "instance-0" in out
        assert (await run("cancel", "cmpl-1", "--dry-run"))[1] == "cmpl-1 would end on instance-0\n"
        assert (await run("cancel", "client-cmpl-1"))[1] == "cmpl-1 was ended on instance-0\n"
        status, _, err = await run("cancel-migration", "5")
        assert (status, err) == (1, "kvferry: no migration has the number 5\n")
        watching = asyncio.create_task(run("watch", "--only", "requests"))
        async with asyncio.timeout(10):
            while world.server.watchtower.num_streams == 0:
                await policy_etag(world, client_access_here({}))
        await world.server.stop(5.0)
        status, out, err = await watching
        assert status == 1 and "is being stopped" in err
        assert out.splitlines()[:3] == [
            "+ cmpl-1 running on instance-0",
            "+ cmpl-2 running on instance-0",
            "= that is the state now; what follows are changes",
        ]


async def test_a_no_has_its_reason_for_programs() -> None:
    async with admin_world() as world:

        def ask() -> str:
            with AdminClient(world.address) as client, pytest.raises(Declined) as caught:
                client.cancel_migration("5")
            return caught.value.reason

        assert await asyncio.to_thread(ask) == "NOT_FOUND"
