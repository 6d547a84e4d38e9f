"""Where is each request of this gateway, and what is to be sent about it? Pure: events in, effects out, `now_s` given.

A request is *waiting* here (everybody refused it, or nobody is there), *unanswered* (sent, not yet accepted), *running*
at its owner, or *orphaned* (its owner is dead or silent). A lost answer is unknown, not no: what starts anew does so
under another id, so that nothing said about the first attempt can mix with the second.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from instance import messages as msg
from migration.types import Epoch, Incarnation, InstanceId, RequestId
from orchestrator.gateway.errors import Failure
from orchestrator.gateway.missing import Missing
from orchestrator.gateway.placing import crowded, gave_up, impossible, lost_too_often, rejection
from orchestrator.gateway.relay import Owner, OwnerMoved, Relay
from orchestrator.gateway.types import Deliver, Effect, Fail, Flight, Forget, Outgoing, RouterCounts, RouterParams, Send
from orchestrator.policy.admission import Admit, Queue, Reject, admit, defer, patience_s
from orchestrator.policy.dispatch import ClusterView, DispatchBook, NoChoice, demand_blocks
from orchestrator.policy.slo import Pace


class Router:
    """One gateway's requests and members."""

    def __init__(self, address: str, params: RouterParams, book: DispatchBook | None = None) -> None:
        self._address = address
        self._params = params
        self.counts = RouterCounts()
        self.relay = Relay()
        self._book = book or DispatchBook(params.dispatch, gateway=address)
        self.set_dispatch = self._book.set_params
        self._members: dict[InstanceId, Incarnation] = {}
        self._heard_s: dict[InstanceId, float] = {}
        self._lost: OrderedDict[Owner, None] = OrderedDict()
        self._flights: dict[RequestId, Flight] = {}
        self._wire_ids: dict[RequestId, RequestId] = {}
        """Of requests beyond their first attempt."""
        self._waiting: set[RequestId] = set()
        self._unanswered: set[RequestId] = set()
        self._orphaned: dict[RequestId, float] = {}
        self._suspect: dict[RequestId, float] = {}
        """Requests that were there when a member died (they may just have moved to it): when each was last heard of."""
        self._gap_since: dict[RequestId, float] = {}
        self._missing = Missing(self._flights, self.relay, params.missing_after_s)
        self._subscribed_s = -math.inf
        self._arrivals = 0

    # ---- what is known
    def view(self, now_s: float) -> ClusterView:
        return self._book.view(now_s)

    @property
    def pace(self) -> Pace:
        """What is known of each member's speed."""
        return self._book.pace

    def why_nobody_serves(self, now_s: float) -> str | None:
        """None: at least one instance serves and has said so lately."""
        return self._book.why_nobody(now_s)

    @property
    def hashed_block_size(self) -> int | None:
        """None: prompts need not be hashed."""
        return self._book.hashed_block_size

    @property
    def num_requests(self) -> int:
        return len(self._flights)

    # ---- members
    def set_members(self, members: Iterable[Incarnation], now_s: float, num_gateways: int = 1) -> list[Effect]:
        """These are the members now; whoever is not among them any more has ended. `num_gateways` use them."""
        new = {member.instance: member for member in members if (member.instance, member.epoch) not in self._lost}
        effects: list[Effect] = []
        for known in list(self._members.values()):
            kept = new.get(known.instance)
            if kept is None or kept.epoch != known.epoch:
                effects += self._lose(known.instance, known.epoch, now_s)
        for name in new:
            self._heard_s.setdefault(name, now_s)
        self._members = new
        self._book.set_members([(member.instance, member.epoch) for member in new.values()], num_gateways)
        return effects + self._subscribe(now_s)

    def on_member_lost(self, instance: InstanceId, epoch: Epoch, now_s: float) -> list[Effect]:
        """This incarnation has ended. What it owned is orphaned: it may turn up elsewhere within the grace."""
        effects = self._lose(instance, epoch, now_s)
        self._book.set_members([(other.instance, other.epoch) for other in self._members.values()])
        return effects

    def _lose(self, instance: InstanceId, epoch: Epoch, now_s: float) -> list[Effect]:
        """The same, but for the book, which is told once however many are lost. Nothing: it was no member any more."""
        owner = (instance, epoch)
        self._lost[owner] = None
        while len(self._lost) > self._params.max_lost:
            self._lost.popitem(last=False)
        self._orphan(owner, now_s)
        for request_id in () if self._book.has_said_farewell(*owner) else self._flights.keys() - self._waiting:
            self._suspect.setdefault(request_id, now_s)
        member = self._members.get(instance)
        if member is None or member.epoch != epoch:
            return []
        del self._members[instance]
        self._heard_s.pop(instance, None)
        return [Forget(member.address)]

    # ---- requests
    def submit(self, request: Outgoing, now_s: float) -> list[Effect]:
        self._arrivals += 1
        flight = Flight(request, self._arrivals, now_s, request.request_id, arrived_s=now_s)
        self._flights[request.request_id] = flight
        if any(self._flights[other].request.priority <= request.priority for other in self._waiting):
            is_serving = self.why_nobody_serves(now_s) is None
            return self._not_sent(flight, defer(request.asks, NoChoice("others wait before it", is_serving)))
        return self._dispatch(flight, now_s)

    def abort(self, request_ids: Iterable[str]) -> list[Effect]:
        """The clients are gone: end these requests wherever they are (they may be changing hands: tell everybody)."""
        sent: list[str] = []
        for given in map(RequestId, request_ids):
            request_id = self._wire_ids.get(given, given)
            if request_id in self._flights:
                if request_id not in self._waiting:
                    sent.append(request_id)
                self._drop(request_id)
        return self._abort_everywhere(tuple(sent))

    def fail_all(self, failure: Failure, among: Iterable[RequestId] | None = None) -> list[Effect]:
        """End every request (those of `among` that are here) with this failure, here and at the instances."""
        named = self._flights if among is None else {self._wire_ids.get(one, one) for one in among}
        request_ids = tuple(one for one in named if one in self._flights)
        return sum((self._fail(one, failure) for one in request_ids), self._abort_everywhere(request_ids))

    # ---- what instances say
    def on_message(self, message: msg.FleetMessage, now_s: float) -> list[Effect]:
        match message:
            case msg.Frame():
                return self._on_frame(message, now_s)
            case msg.LoadReport():
                self._on_report(message, now_s)
                return []
            case msg.RequestReport():
                self._on_requests(message)
                return []
            case msg.CachedBlocks():
                self._book.on_cached(message)
                return []
            case msg.SubmitAnswer():
                return self._on_answer(message, now_s)
            case msg.OwnerChanged():
                owner = (InstanceId(message.instance), Epoch(message.epoch))
                if owner not in self._lost:
                    self._on_moves(self.relay.on_owner_changed(RequestId(message.request_id), owner, message.offset))
                return []
            case msg.PriorityChanged():
                if (flight := self._flights.get(RequestId(message.request_id))) is not None:
                    flight.request = replace(flight.request, priority=message.priority)
                return []
            case _:
                return []  # not for a gateway

    def _on_report(self, report: msg.LoadReport, now_s: float) -> None:
        member = self._members.get(InstanceId(report.instance))
        if member is None or member.epoch != report.epoch:
            return
        self._heard_s[member.instance] = now_s
        self._book.on_report(report, now_s)

    def _on_requests(self, report: msg.RequestReport) -> None:
        """Those that are nowhere: with the next tick they end, since tokens of theirs were lost, or start anew."""
        members = {(one.instance, one.epoch) for one in self._members.values()}
        for request_id in self._missing.on_report(report, members):
            (self._gap_since if self.relay.num_tokens(request_id) else self._orphaned)[request_id] = -math.inf

    def _on_frame(self, frame: msg.Frame, now_s: float) -> list[Effect]:
        sender = (InstanceId(frame.instance), Epoch(frame.epoch))
        if sender in self._lost:
            return []
        self._on_report(frame.load, now_s)
        relayed = self.relay.on_entries(sender, frame.entries)
        self._on_moves(relayed.moves)
        if self._unanswered or self._suspect or self._gap_since or self.relay.has_gaps:
            self._on_heard(frame, now_s)
        entries = []
        for entry in relayed.entries:
            entries.append(self._flights[RequestId(entry.request_id)].as_client_knows_it(entry))
            if entry.finish_reason is not None:
                self._drop(RequestId(entry.request_id))
        return [Deliver(sender, tuple(entries), frame.sent_s)] if entries else []

    def _on_heard(self, frame: msg.Frame, now_s: float) -> None:
        for entry in frame.entries:
            request_id = RequestId(entry.request_id)
            self._unanswered.discard(request_id)
            if request_id in self._suspect:
                # Not cleared: this may have been said before it moved to the dead one.
                self._suspect[request_id] = now_s
            if self.relay.has_gap(request_id):
                self._gap_since.setdefault(request_id, now_s)
            elif self._gap_since:
                self._gap_since.pop(request_id, None)

    def _on_moves(self, moves: tuple[OwnerMoved, ...]) -> None:
        self.counts.moved += len(moves)
        for move in moves:
            self._orphaned.pop(move.request_id, None)
            self._unanswered.discard(move.request_id)

    def _on_answer(self, answer: msg.SubmitAnswer, now_s: float) -> list[Effect]:
        request_id = RequestId(answer.request_id)
        flight = self._flights.get(request_id)
        owner = (InstanceId(answer.instance), Epoch(answer.epoch))
        if flight is None or request_id not in self._unanswered:
            return []
        asked = self.relay.owner(request_id)
        if asked is None or asked[0] != owner[0]:
            return []
        self._unanswered.discard(request_id)
        if answer.refusal is None:
            return []
        self.counts.refused += 1
        self._book.on_not_taken(owner[0], asked[1], flight.sequence)
        if answer.final:
            return self._fail(request_id, impossible(flight, answer.refusal))
        flight.refused_by.add(owner[0])
        flight.last_refusal = f"{answer.instance}: {answer.refusal}"
        self.relay.close(request_id)
        return self._dispatch(flight, now_s)

    def on_unsent(self, request_id: str, now_s: float) -> list[Effect]:
        """A submission could not be queued for its instance: as if refused."""
        owner = self.relay.owner(RequestId(request_id))
        full = "its inbox is full"
        return [] if owner is None else self._on_answer(msg.SubmitAnswer(request_id, *owner, full), now_s)

    # ---- time
    def tick(self, now_s: float) -> list[Effect]:
        """Call it every 50 ms or so."""
        effects: list[Effect] = []
        if now_s - self._subscribed_s >= self._params.subscribe_every_s:
            effects += self._subscribe(now_s)
        for member in self._members.values():
            if now_s - self._heard_s[member.instance] > self._params.silent_after_s:
                # It had long enough to say that something moved: no grace.
                self._orphan((member.instance, member.epoch), now_s - self._params.orphan_grace_s)
        effects += self._retry_waiting(now_s)
        effects += self._give_up_unanswered(now_s)
        effects += self._settle_orphans(now_s)
        self._missing.tick(self._waiting, now_s)
        too_long_s = now_s - self._params.gap_timeout_s
        for request_id in [late for late, since_s in self._gap_since.items() if since_s < too_long_s]:
            effects += self._abort_everywhere((request_id,)) + self._start_anew(self._flights[request_id], now_s)
        return effects

    def _retry_waiting(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        num_tried, timeout_s = 0, self._params.dispatch_timeout_s
        for request_id in sorted(self._waiting, key=self._rank):
            flight = self._flights[request_id]
            waited_s, patience = now_s - flight.unplaced_since_s, patience_s(flight.request.asks, timeout_s)
            nobody = self.why_nobody_serves(now_s) if waited_s > min(timeout_s, patience) else None
            if nobody is not None or waited_s > patience:
                effects += self._fail(request_id, gave_up(flight, nobody, now_s))
            elif num_tried < self._params.max_retries_per_tick:
                num_tried += 1
                flight.refused_by.clear()
                effects += self._dispatch(flight, now_s)
        return effects

    def _rank(self, request_id: RequestId) -> tuple[int, int]:
        """Order among those that wait: priority (lower is more urgent, as in vLLM), then first come."""
        flight = self._flights[request_id]
        return flight.request.priority, flight.arrival

    def _give_up_unanswered(self, now_s: float) -> list[Effect]:
        # The same id is never sent twice to an instance that has not refused it: the first may have run, and moved.
        effects: list[Effect] = []
        late = [one for one in self._unanswered if self._flights[one].sent_s < now_s - self._params.unanswered_for_s]
        seen = self._book.submits_seen(now_s) if late else {}
        very_late_s = now_s - self._params.unanswered_though_seen_for_s
        for request_id in late:
            flight, owner = self._flights[request_id], self.relay.owner(request_id)
            if owner is not None and flight.sequence <= seen.get(owner, 0) and flight.sent_s >= very_late_s:
                continue  # it has arrived: a long step holds up its answer
            effects += self._abort_everywhere((request_id,))
            effects += self._start_anew(flight, now_s)
        return effects

    def _settle_orphans(self, now_s: float) -> list[Effect]:
        effects: list[Effect] = []
        over = [one for one, since in self._orphaned.items() if now_s - since >= self._params.orphan_grace_s]
        over += [one for one, since in self._suspect.items() if now_s - since > self._params.suspect_for_s]
        for request_id in over:
            flight = self._flights.get(request_id)
            if flight is None:
                continue  # it was on both lists
            # The old owner may only be slow: end it there.
            effects += self._abort_everywhere((request_id,))
            flight.unplaced_since_s = now_s
            effects += self._start_anew(flight, now_s)
        return effects

    def _start_anew(self, flight: Flight, now_s: float) -> list[Effect]:
        """What was delivered stays as it is; it goes on after that, as it would have or not (`README.md`)."""
        flight.output = self.relay.tokens(flight.wire_id)
        if flight.attempt == self._params.max_attempts:
            return self._fail(flight.wire_id, lost_too_often(flight))
        self._drop(flight.wire_id)
        self.counts.redispatched += 1
        self.counts.revived += bool(flight.output)
        flight.refused_by.clear()  # that was then
        flight.attempt += 1
        flight.wire_id = RequestId(f"{flight.request.request_id}~{flight.attempt}")
        self._flights[flight.wire_id] = flight
        self._wire_ids[flight.request.request_id] = flight.wire_id
        return self._dispatch(flight, now_s)

    # ---- parts
    def _dispatch(self, flight: Flight, now_s: float) -> list[Effect]:
        request = flight.request
        demand = demand_blocks(request.num_prompt_tokens + len(flight.output), self._book.block_size)
        refused_by, wanted = flight.refused_by, flight.wanted(now_s)
        found = self._book.choose(demand, now_s, refused_by, wanted, request.prefix, request.priority)
        verdict = admit(request.asks, found, now_s - flight.arrived_s)
        if not isinstance(verdict, Admit):
            return self._not_sent(flight, verdict)
        choice = verdict.choice
        member = self._members[choice.instance]
        flight.sequence = self._book.on_dispatched(choice.instance, demand, now_s, request.priority)
        flight.sent_s = now_s
        self.relay.open(flight.wire_id, (choice.instance, choice.epoch), flight.output)
        self._waiting.discard(flight.wire_id)
        self._unanswered.add(flight.wire_id)
        self.counts.dispatched += 1
        return [Send(member.address, flight.submission(self._address, member.epoch))]

    def _not_sent(self, flight: Flight, verdict: Queue | Reject) -> list[Effect]:
        if isinstance(verdict, Reject):
            return self._fail(flight.wire_id, rejection(verdict))
        return self._wait(flight, verdict.message)

    def _wait(self, flight: Flight, reason: str) -> list[Effect]:
        request_id = flight.wire_id
        if request_id in self._waiting:
            return []
        if len(self._waiting) >= self._params.max_waiting:
            return self._fail(request_id, crowded(len(self._waiting)))
        flight.last_refusal = flight.last_refusal or reason
        self._waiting.add(request_id)
        return []

    def _fail(self, request_id: RequestId, failure: Failure) -> list[Effect]:
        client_id = self._flights[request_id].request.request_id
        self._drop(request_id)
        self.counts.failed[failure.kind] += 1
        return [Fail(client_id, failure)]

    def _drop(self, request_id: RequestId) -> None:
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self._wire_ids.pop(flight.request.request_id, None)
        self._waiting.discard(request_id)
        self._unanswered.discard(request_id)
        for since in (self._orphaned, self._suspect, self._gap_since):
            since.pop(request_id, None)
        self.relay.close(request_id)

    def _orphan(self, owner: Owner, since_s: float) -> None:
        for request_id in self.relay.owned_by(owner):
            self._orphaned.setdefault(request_id, since_s)

    def _abort_everywhere(self, request_ids: tuple[str, ...]) -> list[Effect]:
        members = self._members.values() if request_ids else ()
        return [Send(member.address, msg.Abort(request_ids)) for member in members]

    def _subscribe(self, now_s: float) -> list[Effect]:
        self._subscribed_s = now_s
        members, params, cached = self._members.values(), self._params, self._book.cached_from
        terms = (self._address, params.subscribe_lease_s, self._missing.is_seeking)
        every_s = params.report_interval_s(len(members))
        return [Send(one.address, msg.Subscribe(*terms, cached(one.instance), None, every_s)) for one in members]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every request is in the states it may be in together."""
        self.relay.check_integrity()
        self._book.check_integrity()
        assert set(self._wire_ids.values()) <= self._flights.keys()
        for group in (self._waiting, self._unanswered, self._orphaned, self._suspect, self._gap_since):
            assert set(group) <= self._flights.keys(), "a request that ended is still listed"
        assert not self._waiting & self._unanswered, "a waiting request was sent"
        for request_id in self._flights.keys() - self._waiting:
            assert request_id in self.relay, "a request that was sent has no stream"
