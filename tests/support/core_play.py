"""How does a test play the cluster to the core? A hand-moved clock, and a fleet that does what the core asks for."""

from __future__ import annotations

from instance.messages import RequestLoad
from migration.types import Epoch, Incarnation, InstanceId, Outcome
from orchestrator.core import Orchestrator
from orchestrator.effects import (
    Answer,
    Effect,
    Result,
    SetDraining,
    StartInstance,
    StartMigration,
    StopInstance,
)
from orchestrator.events import (
    DrainingSet,
    Event,
    InstanceLost,
    InstanceStarted,
    InstanceStartFailed,
    MigrationEnded,
    MigrationFigures,
    ReportReceived,
    RequestsReceived,
    Ticked,
    Token,
)
from orchestrator.state import CoreParams, ScalingSnapshot
from tests.support.reports import load_report, request_report

CALLER = Token(1)
TOTAL_BLOCKS = 1000


def named(number: int) -> InstanceId:
    return InstanceId(f"instance-{number}")


def started(instance: InstanceId, epoch: int = 1) -> InstanceStarted:
    incarnation = Incarnation(instance, Epoch(epoch), f"tcp://127.0.0.1:{epoch}")
    return InstanceStarted(incarnation, f"kvferry-{instance}-{epoch}", "tiny", 16, TOTAL_BLOCKS)


class Cluster:
    """A core and its instances, as they really are. `tick` lets time pass and everybody report."""

    def __init__(self, params: CoreParams, num_instances: int) -> None:
        self.core = Orchestrator(params)
        self.now_s = 100.0
        self.step = 0
        self.there: dict[InstanceId, list[RequestLoad]] = {}
        self.epochs: dict[InstanceId, int] = {}
        self.draining: set[InstanceId] = set()
        self.silent: set[InstanceId] = set()
        self.effects: list[Effect] = []
        """All there ever were."""
        self.start_error: str | None = None
        """Starts fail with it; empty: they are never answered."""
        self.obeys_stop = True
        self.obeys_drain = True
        for number in range(num_instances):
            self.comes(named(number), 1)

    # ---- what happens in the cluster
    def on(self, event: Event) -> list[Effect]:
        """The effects are carried out, and what follows from them is among what is returned."""
        effects = self.core.on(event, self.now_s)
        self.core.check_integrity()
        self.effects += effects
        following = [effect for asked in effects for effect in self._carry_out(asked)]
        return effects + following

    def comes(self, instance: InstanceId, epoch: int) -> list[Effect]:
        effects = self.on(started(instance, epoch))
        self.there[instance], self.epochs[instance] = [], epoch
        self.draining.discard(instance)
        return effects

    def dies(self, instance: InstanceId, reason: str = "killed") -> list[Effect]:
        del self.there[instance]
        self.draining.discard(instance)
        return self.on(InstanceLost(instance, Epoch(self.epochs[instance]), reason))

    def _carry_out(self, effect: Effect) -> list[Effect]:
        match effect:
            case StartInstance():
                if self.start_error is None:
                    return self.comes(effect.instance, effect.epoch)
                if self.start_error:
                    return self.on(InstanceStartFailed(effect.instance, effect.epoch, self.start_error))
            case StopInstance():
                if self.obeys_stop and self.epochs.get(effect.instance) == effect.epoch:
                    assert not self.there[effect.instance], "a request was killed with its instance"
                    return self.dies(effect.instance, "it was stopped")
            case SetDraining():
                if not self.obeys_drain and effect.draining:
                    return self.on(DrainingSet(effect.instance, effect.epoch, True, "no answer"))
                (self.draining.add if effect.draining else self.draining.discard)(effect.instance)
                return self.on(DrainingSet(effect.instance, effect.epoch, effect.draining))
            case StartMigration():
                moved = [one for one in self.there[effect.source.instance] if one.request_id == effect.request_id]
                assert moved, "it moves what is not there"
                self.there[effect.source.instance].remove(moved[0])
                self.there[effect.destination.instance].append(moved[0])
                return self.on(MigrationEnded(effect.number, Outcome.COMMITTED, "", MigrationFigures()))
            case _:
                pass
        return []

    def tick(self, seconds: float = 1.0) -> list[Effect]:
        """So much time passes, everybody reports, and the core looks."""
        self.now_s += seconds
        self.step += 1
        effects: list[Effect] = []
        for instance, requests in list(self.there.items()):
            if instance in self.silent:
                continue
            state = "draining" if instance in self.draining else "serving"
            used, epoch = sum(request.num_blocks for request in requests), self.epochs[instance]
            load = load_report(
                instance,
                epoch=epoch,
                step=self.step,
                state=state,
                total_blocks=TOTAL_BLOCKS,
                free_blocks=TOTAL_BLOCKS - used,
                num_running=len(requests),
            )
            effects += self.on(ReportReceived(load))
            effects += self.on(RequestsReceived(request_report(instance, *requests, epoch=epoch, step=self.step)))
        return effects + self.on(Ticked())

    def run(self, seconds: int) -> list[Effect]:
        return [effect for _ in range(seconds) for effect in self.tick()]

    # ---- what is seen
    @property
    def scaling(self) -> ScalingSnapshot:
        scaling = self.core.snapshot(self.now_s).scaling
        assert scaling is not None
        return scaling

    def launches(self) -> list[tuple[str, int]]:
        return [(one.instance, one.epoch) for one in self.effects if isinstance(one, StartInstance)]

    def stops(self) -> list[tuple[str, int]]:
        return [(one.instance, one.epoch) for one in self.effects if isinstance(one, StopInstance)]


def answer(effects: list[Effect], token: Token = CALLER) -> Result:
    answers = [effect.result for effect in effects if isinstance(effect, Answer) and effect.token == token]
    assert len(answers) == 1, "a command is answered exactly once"
    return answers[0]
