"""Who answers for an instance? The agent: submissions, aborts, subscriptions, frames, reports, migrations; on asyncio.

It never touches the engine but through its host (`EngineLoop`), and never waits for it while it answers the fleet:
reports leave on time during the longest prefill.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from instance.cached import CACHED_INTERVAL_S, CachedBook
from instance.headroom import Headroom
from instance.lifecycle import State, follow
from instance.loop import StepDone
from instance.messages import (
    NO_STEPS,
    Abort,
    FleetMessage,
    Frame,
    LoadReport,
    MigrationEnvelope,
    PriorityChanged,
    RequestLoad,
    RequestReport,
    Submit,
    SubmitAnswer,
    Subscribe,
)
from instance.migrations import DestinationAdapter, InboxChannel, Outgoing
from instance.ports import EngineHost, Inbox
from instance.report import MAX_REPORTED_REQUESTS, Standing, Subscribers, add_step, load_report, smooth_step_time
from instance.revival import Decided, let_in, refusal_of
from instance.spec import InstanceSpec, MigrationSummary
from instance.stream import StreamTable, Tombstones
from instance.types import (
    NO_WISHES,
    EngineFacts,
    EngineRefusal,
    PriorityAnswer,
    PriorityOutcome,
    RequestView,
    Submission,
)
from instance.waiting_room import WaitingRoom
from migration import wire
from migration.driver import IncomingReport, IncomingTable
from migration.errors import MalformedMessage
from migration.messages import Cancel as CancelMigration
from migration.messages import Commit, Grow, Prepare, Reserve
from migration.params import IncomingParams, MigrationParams
from migration.types import Epoch, Incarnation, InstanceId, Outcome, RequestId

MAX_FENCED = 4096
STOP_GRACE_S = 1.0


@dataclass(slots=True)
class AgentCounts:
    """What was dropped, and why."""

    stale_epoch: int = 0
    fenced: int = 0
    malformed_migration: int = 0
    unexpected: int = 0
    incoming_committed: int = 0
    incoming_ended_otherwise: int = 0


class Agent:
    """One instance's asyncio side. Made when its engine has started; `run` until the instance stops."""

    def __init__(self, spec: InstanceSpec, facts: EngineFacts, loop: EngineHost, mailbox: Inbox) -> None:
        self._spec = spec
        self._facts = facts
        self._loop = loop
        self._mailbox = mailbox
        self._own = Incarnation(InstanceId(spec.instance), Epoch(spec.epoch), mailbox.address)
        self._state = State.SERVING
        self._streams = StreamTable()
        self._tombstones = Tombstones()
        self._subscribers = Subscribers()
        self._cached = CachedBook(spec.instance, spec.epoch, facts.block_size)
        self._step_time_s = 0.0
        self._steps = NO_STEPS
        self._num_adding = 0
        self._room = WaitingRoom(spec.max_waiting)
        self.headroom: Headroom = ()
        self._fenced: dict[str, int] = {}
        self.counts = AgentCounts()
        self._outgoing = Outgoing(self._own, loop, self._streams, mailbox, spec.max_migrations_out, self._is_fenced)
        self._destination = DestinationAdapter(
            self._own, loop, self._streams, self._tombstones, mailbox, self._why_closed
        )
        self._incoming = IncomingTable(
            self._own,
            IncomingParams(max_incoming=spec.max_migrations_in),
            engine=self._destination,
            mover=loop.engine.mover,
            open_channel=lambda peer: InboxChannel(mailbox, self._own, peer),
            on_end=self._incoming_ended,
        )

    @property
    def own(self) -> Incarnation:
        return self._own

    @property
    def state(self) -> State:
        return self._state

    async def run(self) -> None:
        """Serve until cancelled. Whatever it raises ends the instance."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._incoming.run(), name="incoming")
            group.create_task(self._receive(), name="receive")
            group.create_task(self._report_load(), name="report-load")
            group.create_task(self._report_requests(), name="report-requests")
            group.create_task(self._report_cached(), name="report-cached")

    async def close(self) -> None:
        """End every migration: what may have been committed is waited for, for STOP_GRACE_S at most."""
        self._state = follow(self._state, State.STOPPED)
        self._publish_load()
        self._outgoing.cancel_all("the instance stops")
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await self._incoming.close()
                await self._outgoing.wait_none_left()
        except TimeoutError:
            # A commit that nobody answers would hold the stop up for ever; the gateway asks the other side.
            await self._outgoing.break_off()

    # ---- orders
    async def migrate(self, request_id: str, destination: Incarnation, params: MigrationParams) -> MigrationSummary:
        return await self._outgoing.migrate(RequestId(request_id), destination, params)

    def cancel_migration(self, request_id: str, reason: str) -> bool:
        """False: no migration of this request leaves here. See `Outgoing.cancel`."""
        return self._outgoing.cancel(RequestId(request_id), reason)

    async def set_priority(self, request_id: str, priority: int) -> PriorityAnswer:
        """Between two steps; its gateway hears of it. Raises EngineFailed when the engine has ended."""

        def tell(answer: PriorityAnswer) -> None:
            gateway = self._streams.gateway(RequestId(request_id))
            if answer.outcome is PriorityOutcome.SET and gateway is not None:
                changed = PriorityChanged(request_id, self._own.instance, self._own.epoch, priority)
                self._mailbox.send(gateway, changed)

        return await self._loop.call(lambda engine: engine.set_priority(RequestId(request_id), priority), then=tell)

    def drain(self) -> None:
        """Take no new request and no migration in; what runs goes on until it is moved or done."""
        self._become(State.DRAINING)

    def undrain(self) -> None:
        self._become(State.SERVING)

    def member_lost(self, instance: str, epoch: int) -> None:
        """This incarnation (and every earlier one) is dead: what it still says is dropped, its migrations end."""
        self._fenced[instance] = max(epoch, self._fenced.get(instance, epoch))
        while len(self._fenced) > MAX_FENCED:
            del self._fenced[next(iter(self._fenced))]
        lost = Incarnation(InstanceId(instance), Epoch(epoch), "")
        self._outgoing.peer_lost(lost)
        self._incoming.source_lost(lost)

    def _is_fenced(self, peer: Incarnation) -> bool:
        return peer.epoch <= self._fenced.get(peer.instance, -1)

    def check_integrity(self) -> None:
        """At rest: no migration is under way, nothing is remembered of those that were."""
        assert len(self._outgoing) == 0 and self._incoming.num_incoming == 0
        self._destination.check_integrity()

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def num_subscribers(self) -> int:
        return len(self._subscribers.addresses())

    # ---- from the engine's thread, through the loop
    def on_step(self, done: StepDone) -> None:
        """One step: a frame to every gateway that has tokens in it."""
        elapsed_s = done.time.end_s - done.time.start_s
        work = done.result.work
        step_s = elapsed_s / work.num_steps
        self._step_time_s = smooth_step_time(self._step_time_s, step_s, done.result.num_decoding, work.num_steps)
        self._steps = add_step(self._steps, work, max(elapsed_s, self._loop.min_step_s))
        if not done.result.outputs:
            return
        now_s = self._loop.now_s()
        for gateway, entries in self._streams.entries(done.result.outputs).items():
            frame = Frame(
                instance=self._own.instance,
                epoch=self._own.epoch,
                step=done.step,
                sent_s=done.time.end_s,
                entries=entries,
                load=self._report_for(gateway),
            )
            self._mailbox.send(gateway, frame)
            self._subscribers.report_sent(gateway, now_s)

    # ---- from the fleet
    async def _receive(self) -> None:
        while True:
            self._handle(await self._mailbox.receive())

    def _handle(self, message: FleetMessage) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self._abort(tuple(RequestId(request_id) for request_id in message.request_ids))
            case Subscribe():
                now_s = self._loop.now_s()
                self._subscribers.subscribe(
                    message.address, message.lease_s, message.with_requests, now_s, message.interval_s
                )
                self._cached.subscribe(message.address, message.cached_from)
                self._heed(message.headroom)
                self._publish_load()
            case MigrationEnvelope():
                self._migration_message(message)
            case _:
                self.counts.unexpected += 1

    def _heed(self, headroom: Headroom | None) -> None:
        if headroom is not None and headroom != self.headroom:
            self.headroom = headroom
            self._loop.call(lambda engine: engine.set_headroom(headroom))

    def _submit(self, submit: Submit) -> None:
        self._subscribers.submit_seen(submit.gateway_address, submit.sequence)
        request_id = RequestId(submit.request_id)
        if request_id in self._streams:
            self._answer(submit, None)  # A repeated submission.
            return
        if refusal := self._why_not(submit):
            self._answer(submit, refusal)
            return
        submission = Submission(
            request_id, submit.external_id, submit.priority, submit.num_prompt_tokens, submit.max_tokens, submit.payload
        )
        # Open before the engine knows it: its first tokens must find their stream.
        self._streams.open_for(submit, self._loop.now_s())
        self._num_adding += 1
        added = let_in(self._loop, self._room, submission, submit.output_token_ids)
        added.add_done_callback(lambda future: self._added(submit, future))

    def _why_not(self, submit: Submit) -> EngineRefusal | None:
        if submit.epoch != self._own.epoch:
            self.counts.stale_epoch += 1
            return EngineRefusal(f"this is epoch {self._own.epoch}, not {submit.epoch}", final=False)
        if submit.request_id in self._tombstones:
            return EngineRefusal("its client has left", final=True)
        if reason := self._why_closed():
            return EngineRefusal(reason, final=False)
        # Not their sum: one that was added just now may still count as being added.
        if max(self._loop.load.num_waiting, self._num_adding) >= self._spec.max_waiting:
            return self._room.refusal
        return None

    def _added(self, submit: Submit, added: asyncio.Future[Decided]) -> None:
        self._num_adding -= 1
        refusal = refusal_of(added)
        if refusal is not None:
            self._streams.close(RequestId(submit.request_id))
        elif submit.request_id in self._tombstones:  # a revival is done later than what was asked after it
            self._loop.call(lambda engine: engine.abort((RequestId(submit.request_id),)))
        self._answer(submit, refusal)

    def _answer(self, submit: Submit, refusal: EngineRefusal | None) -> None:
        answer = SubmitAnswer(
            request_id=submit.request_id,
            instance=self._own.instance,
            epoch=self._own.epoch,
            refusal=None if refusal is None else refusal.reason,
            final=refusal is not None and refusal.final,
        )
        self._mailbox.send(submit.gateway_address, answer)

    def _abort(self, request_ids: tuple[RequestId, ...]) -> None:
        """The order matters: with the tombstone in place, whatever is still on its way here is refused."""
        self._tombstones.add(request_ids)
        for request_id in request_ids:
            self._streams.close(request_id)
            self._incoming.request_aborted(request_id)
        self._loop.call(lambda engine: engine.abort(request_ids))
        for request_id in request_ids:
            self._outgoing.client_aborted(request_id)

    def _migration_message(self, envelope: MigrationEnvelope) -> None:
        sender = Incarnation(InstanceId(envelope.from_instance), Epoch(envelope.from_epoch), envelope.from_address)
        if self._is_fenced(sender):
            self.counts.fenced += 1
            return
        try:
            message = wire.decode(envelope.body)
        except MalformedMessage:
            self.counts.malformed_migration += 1
            return
        if envelope.to_epoch != self._own.epoch:
            self.counts.stale_epoch += 1
            if not isinstance(message, Reserve):
                return  # A reserve is answered: the table refuses it by its own epoch.
        if isinstance(message, Reserve | Grow | Prepare | Commit | CancelMigration):
            self._incoming.deliver(message, sender)
        else:
            self._outgoing.deliver(message, sender)

    def _incoming_ended(self, report: IncomingReport) -> None:
        if report.outcome is Outcome.COMMITTED:
            self.counts.incoming_committed += 1
        else:
            self.counts.incoming_ended_otherwise += 1

    # ---- reports
    async def _report_load(self) -> None:
        while True:
            self._publish_load()
            await asyncio.sleep(self._subscribers.due_in_s(self._loop.now_s()))

    def _publish_load(self) -> None:
        for address in self._subscribers.take_due(self._loop.now_s()):
            self._mailbox.send(address, self._report_for(address))

    def _report_for(self, address: str) -> LoadReport:
        standing = Standing(
            instance=self._own.instance,
            epoch=self._own.epoch,
            step=self._loop.num_steps,
            state=self._state,
            block_size=self._facts.block_size,
            total_blocks=self._facts.total_blocks,
            step_time_s=self._step_time_s,
            migrations_in=self._incoming.num_incoming,
            migrations_out=len(self._outgoing),
            steps=self._steps,
            max_step_tokens=self._facts.max_num_batched_tokens,
            max_running=self._facts.max_num_seqs,
        )
        return load_report(standing, self._loop.load, self._subscribers.submits_seen(address))

    async def _report_requests(self) -> None:
        while True:
            await asyncio.sleep(self._subscribers.requests_due_in_s(self._loop.now_s()))
            now_s = self._loop.now_s()
            if addresses := self._subscribers.take_due_requests(now_s):
                views = await self._loop.look(lambda engine: engine.requests())
                report = RequestReport(
                    instance=self._own.instance,
                    epoch=self._own.epoch,
                    step=self._loop.num_steps,
                    requests=tuple(self._request_load(view, now_s) for view in views[:MAX_REPORTED_REQUESTS]),
                )
                for address in addresses:
                    self._mailbox.send(address, report)

    async def _report_cached(self) -> None:
        while True:
            await asyncio.sleep(CACHED_INTERVAL_S)
            self._cached.keep(self._subscribers.addresses())
            if self._cached.is_wanted:
                self._cached.note(await self._loop.look(lambda engine: engine.take_cached_changes()))
                for address, message in self._cached.take_due():
                    self._mailbox.send(address, message)

    def _request_load(self, view: RequestView, now_s: float) -> RequestLoad:
        wishes = self._streams.wishes(view.request_id) or NO_WISHES
        return RequestLoad(
            request_id=view.request_id,
            external_id=view.external_id,
            status=view.status.value,
            priority=view.priority,
            num_prompt_tokens=view.num_prompt_tokens,
            num_output_tokens=view.num_output_tokens,
            max_tokens=view.max_tokens,
            num_blocks=view.num_blocks,
            arrived_s=self._streams.age_s(view.request_id, now_s),
            movable=view.movable,
            ttft_s=wishes.ttft_s,
            tpot_s=wishes.tpot_s,
            waited_s=wishes.waited_s,
        )

    # ---- state
    def _why_closed(self) -> str | None:
        return None if self._state is State.SERVING else f"this instance is {self._state.value}"

    def _become(self, state: State) -> None:
        self._state = follow(self._state, state)
        self._subscribers.make_all_due(self._loop.now_s())
        self._publish_load()
