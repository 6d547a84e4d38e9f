"""Does a start that does not succeed leave nothing behind, and nobody else hurt? A fake of the actors of Ray."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from instance.spec import EngineKind, InstanceSpec
from instance.spec import InstanceStarted as Facts
from migration.types import Epoch, InstanceId
from orchestrator.config import Engine, ServeConfig
from orchestrator.errors import ActorGone, CallFailed, StartUpError
from orchestrator.runtime.actor import core_params
from orchestrator.runtime.compose import instance_resources, instance_specs, scaling_spec
from orchestrator.runtime.launch import RayLauncher
from orchestrator.runtime.ray_cluster import RayCluster, Resources, instance_actor_name, instance_of
from orchestrator.runtime.spec import OrchestratorSpec
from orchestrator.state import ScalingParams

NEW, EPOCH, ACTOR = InstanceId("instance-2"), Epoch(7), "kvferry-instance-2-7"
TEMPLATE = InstanceSpec("", 0, EngineKind.FAKE, ("fake",), token="secret")


class FakeActors:
    """Actors by name; each step of a start may fail, or never end."""

    def __init__(self) -> None:
        self.there: dict[str, InstanceSpec] = {}
        self.place_error: Exception | None = None
        self.load_error: Exception | None = None
        self.loading = asyncio.Event()
        self.is_slow = False

    def make_instance(self, spec: InstanceSpec, resources: Resources) -> str:
        name = instance_actor_name(spec.instance, spec.epoch)
        if name in self.there:
            raise StartUpError(f"an actor named {name} is there already")
        self.there[name] = spec
        return name

    async def process_id(self, actor_name: str, timeout_s: float) -> int:
        if self.place_error is not None:
            raise self.place_error
        return 4711

    async def start_instance(self, actor_name: str, spec: InstanceSpec, timeout_s: float) -> Facts:
        self.loading.set()
        if self.is_slow:
            await asyncio.Event().wait()
        if self.load_error is not None:
            raise self.load_error
        return Facts(spec.instance, spec.epoch, "tcp://127.0.0.1:1", "tiny", 16, 1000, 2048, 16, 1, 0.1)

    async def stop_actor(self, actor_name: str, timeout_s: float) -> None:
        self.kill(actor_name)

    def kill(self, actor_name: str) -> None:
        self.there.pop(actor_name, None)


def launcher(actors: FakeActors) -> RayLauncher:
    return RayLauncher(actors, TEMPLATE, Resources(0), timeout_s=30.0)


async def test_an_instance_is_the_template_with_its_name_and_epoch() -> None:
    actors = FakeActors()
    event = await launcher(actors).start(NEW, EPOCH)
    spec = actors.there[ACTOR]
    assert (spec.instance, spec.epoch, spec.engine_argv, spec.token) == (NEW, EPOCH, ("fake",), "secret")
    assert (event.incarnation.epoch, event.actor_name, event.process_id) == (EPOCH, ACTOR, 4711)
    await launcher(actors).stop(NEW, EPOCH)
    assert actors.there == {}


@pytest.mark.parametrize(
    ("place_error", "load_error", "words"),
    [
        (CallFailed("no answer"), None, "no process within 30 s: is there room for 1 kvferry_instance?"),
        (ActorGone("its process ended"), None, "its process ended"),
        (None, CallFailed("the model is no folder"), "the model is no folder"),
        (None, ActorGone("its process ended"), "its process ended"),
    ],
)
async def test_a_start_that_fails_is_one_line_and_leaves_no_actor(
    place_error: Exception | None, load_error: Exception | None, words: str
) -> None:
    actors = FakeActors()
    actors.place_error, actors.load_error = place_error, load_error
    with pytest.raises(StartUpError) as caught:
        await launcher(actors).start(NEW, EPOCH)
    assert str(caught.value) == words and actors.there == {}


async def test_a_start_that_is_called_off_leaves_no_actor() -> None:
    actors = FakeActors()
    actors.is_slow = True
    starting = asyncio.create_task(launcher(actors).start(NEW, EPOCH))
    await actors.loading.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert actors.there == {}


async def test_an_actor_that_has_the_name_already_is_not_hurt() -> None:
    actors = FakeActors()
    await launcher(actors).start(NEW, EPOCH)
    with pytest.raises(StartUpError, match="is there already"):
        await launcher(actors).start(NEW, EPOCH)
    assert list(actors.there) == [ACTOR], "it may be somebody's who serves"


def test_the_instance_is_known_by_its_actor_and_without_ray_there_are_none() -> None:
    assert instance_of(ACTOR) == NEW
    assert RayCluster(is_ours=False).instance_actors() == [], "asking starts no Ray"


def test_what_serve_was_told_reaches_the_orchestrator() -> None:
    """As it crosses Ray: flags, the spec as JSON, the bounds of the core."""
    config = ServeConfig(
        model="fake",
        engine=Engine.FAKE,
        instances=2,
        autoscale=True,
        autoscale_max=5,
        autoscale_low_steps=100.0,
        autoscale_high_steps=400.0,
        start_timeout_s=50.0,
        retire_timeout_s=70.0,
        instance_labels="zone=a",
    )
    template = instance_specs(config, "secret")[0]
    assert template.num_sharing == 5, "the memory is shared out for all there may be"
    resources = instance_resources(config, num_gpus=0)
    sent = OrchestratorSpec("127.0.0.1", 0, token="secret", scaling=scaling_spec(config, template, resources))
    come = msgspec.json.decode(msgspec.json.encode(sent), type=OrchestratorSpec)
    assert come == sent
    params = core_params(come).scaling
    assert (params.can_start, params.is_automatic, params.fewest, params.most, params.capacity) == (True, True, 1, 5, 5)
    assert params.first_epoch == template.epoch + 1, "above that of any instance there ever was"
    assert params.start_timeout_s > 2 * config.start_timeout_s, "the launcher must have answered by then"
    assert params.retire_timeout_s == 70.0
    autoscale = params.autoscale
    assert (autoscale.low_steps, autoscale.high_steps, autoscale.cap_steps) == (100.0, 400.0, 800.0)
    assert core_params(msgspec.structs.replace(come, scaling=None)).scaling == ScalingParams()
