"""How does one request run, moved or unmoved, beside others? One pair of instances, batch by batch."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from bench.exactness_compare import Compound, Leg, Moved, Ran, Seen, read
from bench.exactness_kinds import Compared, Found, Plan
from bench.exactness_scenes import AT_ONCE, adapter_of
from bench.fleet import Fleet, FleetError, Stream
from bench.models.pictured import ImageFront
from instance.standalone import Verb

NAMES = ("first", "second")
REQUEST_TIMEOUT_S = 90.0
GAP_S = 3.0
"""After a request's end has come, its last tokens may still be on the way from the other instance this long."""
SETTLE_S = 10.0
RETRY_S = 0.004
ALONE_EVERY = 8
PASSERS_BY = 2
"""Requests a batch whose clients leave while they are moved; they are compared with nothing."""


class Runs:
    """Runs requests on one pair of instances."""

    def __init__(self, fleet: Fleet, rng: Random, front: ImageFront | None) -> None:
        """`front`: renders prompts with images, where there are any."""
        self._fleet = fleet
        self._rng = rng
        self._front = front
        self._names = itertools.count(1)
        self._streams: list[Stream] = []

    async def batch(self, plans: Sequence[Plan]) -> list[Compound]:
        """1. All of them moved, and all of them unmoved, together. 2. Every ALONE_EVERY-th, and those of which the two
        differ, alone: one in each instance at a time."""
        for plan in plans:
            await self._prime(plan)
        gate = asyncio.Semaphore(AT_ONCE[plans[0].kind.scene])
        jobs = [(plan, is_moved) for plan in plans for is_moved in (True, False)]
        self._rng.shuffle(jobs)
        leaving = [self._leave_early(gate, self._rng.choice(plans)) for _ in range(PASSERS_BY)]
        runs = (self._run(plan, is_moved, gate) for plan, is_moved in jobs)
        ran, _ = await asyncio.gather(asyncio.gather(*runs), asyncio.gather(*leaving))
        for (plan, _), run in zip(jobs, ran, strict=True):
            read(plan, run, run.streams)
        found = {(plan.kind.name, plan.seed, is_moved): a for (plan, is_moved), a in zip(jobs, ran, strict=True)}
        compounds = []
        for plan in plans:
            moved, unmoved = (found[plan.kind.name, plan.seed, is_moved] for is_moved in (True, False))
            compounds.append(Compound(plan, moved, unmoved, None))
        return await self._arbitrate(compounds)

    async def _arbitrate(self, compounds: Sequence[Compound]) -> list[Compound]:
        numbers = [i for i, c in enumerate(compounds) if c.plan.seed % ALONE_EVERY == 0 or c.difference]
        gates = asyncio.Semaphore(1), asyncio.Semaphore(1)
        lanes = (self._run(compounds[i].plan, False, gates[n % 2], n % 2) for n, i in enumerate(numbers))
        alone = dict(zip(numbers, await asyncio.gather(*lanes), strict=True))
        for i, run in alone.items():
            read(compounds[i].plan, run, run.streams)
        return [replace(compound, alone=alone.get(i)) for i, compound in enumerate(compounds)]

    async def settle(self) -> tuple[int, str]:
        """(blocks that are not free, or held by reservations, once nothing runs any more; what is wrong, or "")."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            leaked, told = 0, ""
            for name, instance in self._fleet.instances.items():
                try:
                    await instance.order(Verb.CHECK_INTEGRITY)
                except FleetError as error:
                    told = told or str(error)
                census = (await instance.order(Verb.CENSUS)).census
                assert census is not None
                leaked += census.total_blocks - census.free_blocks
                if census.requests or census.free_blocks != census.total_blocks or census.reserved_blocks:
                    told = told or f"{name}: {census}"
            if not told or time.monotonic() > deadline_s:
                self._fleet.forget(*self._streams)
                self._streams.clear()
                return leaked, told
            await asyncio.sleep(0.01)

    async def _prime(self, plan: Plan) -> None:
        """Let an instance compute the prompt first, so that its blocks are cached there."""
        match plan.kind.found:
            case Found.CACHED_HERE:
                here = plan.begins[0]
            case Found.CACHED_THERE:
                here = 1 - plan.begins[0]
            case _:
                return
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        stream = self._fleet.send(NAMES[here], self._request(plan, params, _salt(plan)))
        self._streams.append(stream)
        await stream.wait_tokens(1)

    async def _run(self, plan: Plan, is_moved: bool, gate: asyncio.Semaphore, here: int | None = None) -> Ran:
        """`here`: where it runs, instead of where it is planned to begin."""
        ran = Ran()
        async with gate:
            run = _Run(self._fleet, plan, ran, is_moved)
            salt = _salt(plan) if is_moved else f"unmoved-{next(self._names)}"
            request = self._request(plan, plan.params(), salt)
            if is_moved and plan.kind.found is Found.PREEMPTED:
                request.priority = 1  # behind all others: when blocks run short, it is the one
            begins = plan.begins if here is None else (here,) * plan.n
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await run.all(request, begins)
            except TimeoutError:
                ran.error = f"it stood still: {[len(stream.tokens) for stream in ran.streams]} tokens came"
                ran.lost += 1
                self._fleet.abort(*ran.streams)
            except FleetError as error:
                ran.error = str(error)
                self._fleet.abort(*ran.streams)
        self._streams += ran.streams
        return ran

    async def _leave_early(self, gate: asyncio.Semaphore, plan: Plan) -> None:
        """A request whose client goes away while it is being moved."""
        async with gate:
            params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
            here = plan.begins[0]
            stream = self._fleet.send(NAMES[here], self._request(plan, params, f"leaving-{next(self._names)}"))
            await stream.wait_tokens(self._rng.randrange(12))
            moving = asyncio.create_task(self._fleet.migrate(stream, NAMES[here], NAMES[1 - here]))
            await asyncio.sleep(self._rng.uniform(0.0, 0.04))
            self._fleet.abort(stream)
            await moving

    def _request(self, plan: Plan, params: SamplingParams, salt: str) -> EngineCoreRequest:
        name = f"{plan.kind.name.replace(' ', '-').replace(',', '')}-{plan.seed}-{next(self._names)}"
        if plan.pictures:
            assert self._front is not None
            request: EngineCoreRequest = self._front.request(name, plan.pieces(), params)
            request.cache_salt = salt
            return request
        return EngineCoreRequest(
            request_id=name,
            prompt_token_ids=list(plan.prompt),
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=adapter_of(plan.adapter),
            cache_salt=salt,
            data_parallel_rank=None,
            external_req_id=name,
        )


def _salt(plan: Plan) -> str:
    """Of a moved run: no other run's blocks are found for it, but those that were put there for it."""
    return f"moved-{plan.kind.name}-{plan.seed}"


class _Run:
    """One run of one request: its sequences, their moves, and vLLM's output processor where the kind needs it."""

    def __init__(self, fleet: Fleet, plan: Plan, ran: Ran, is_moved: bool) -> None:
        self._fleet = fleet
        self._plan = plan
        self._ran = ran
        self._is_moved = is_moved
        is_text = plan.kind.compared is Compared.TEXT
        self._processor = OutputProcessor(plan.tokenizer, log_stats=False) if is_text else None
        self._texts: list[Any] = []

    async def all(self, request: EngineCoreRequest, begins: Sequence[int]) -> None:
        """Raises FleetError when an instance refuses the request or an order."""
        children = self._children(request)
        try:
            async with asyncio.TaskGroup() as group:
                for number, (child, here) in enumerate(zip(children, begins, strict=True)):
                    stream = self._fleet.send(NAMES[here], child)
                    self._ran.streams.append(stream)
                    group.create_task(self._follow(stream))
                    if self._is_moved:
                        group.create_task(self._travel(number, stream, here))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        parts = sorted(self._texts, key=lambda part: part.index)
        self._ran.seen = tuple(Seen(tuple(p.token_ids), p.finish_reason, p.stop_reason, p.text) for p in parts)

    def _children(self, request: EngineCoreRequest) -> list[EngineCoreRequest]:
        """As vLLM's AsyncLLM splits a request with n > 1."""
        if self._processor is None:
            return [request]
        if self._plan.n == 1:
            self._processor.add_request(request, None)
            return [request]
        parent = ParentRequest(request)
        children = []
        for index in range(self._plan.n):
            name, params = parent.get_child_info(index)
            child = self._copy(request, name, params)
            self._processor.add_request(child, None, parent, index)
            children.append(child)
        return children

    @staticmethod
    def _copy(request: EngineCoreRequest, name: str, params: SamplingParams) -> EngineCoreRequest:
        values = {field: getattr(request, field) for field in request.__struct_fields__}
        return EngineCoreRequest(**{**values, "request_id": name, "sampling_params": params})

    async def _follow(self, stream: Stream) -> None:
        num_read = 0
        while True:
            await stream.wait(lambda: stream.finished or len(stream.tokens) > num_read)  # noqa: B023
            if stream.finished and not stream.is_whole:
                await self._wait_rest(stream)
            if self._processor is not None and self._read(stream, num_read):
                self._fleet.abort(stream)  # a stop string: as the gateway does
                stream.finished = True
                stream.changed()
            if stream.finished:
                return
            num_read = len(stream.tokens)

    async def _wait_rest(self, stream: Stream) -> None:
        """The end came from one instance, and tokens before it are still on the way from the other."""
        try:
            async with asyncio.timeout(GAP_S):
                await stream.wait(lambda: stream.is_whole)
        except TimeoutError:
            assert stream.end is not None
            self._ran.lost += stream.end - len(stream.tokens)
            raise FleetError(f"only {len(stream.tokens)} of {stream.end} tokens came") from None

    def _read(self, stream: Stream, num_read: int) -> bool:
        """Give new tokens to the output processor. True: it wants the request to end."""
        assert self._processor is not None
        last = stream.last if stream.is_whole else None
        output = EngineCoreOutput(
            request_id=stream.request_id,
            new_token_ids=[token.token_id for token in stream.tokens[num_read:]],
            finish_reason=None if last is None or last.finish_reason is None else FinishReason(last.finish_reason),
            stop_reason=None if last is None else last.stop_reason,
        )
        done = self._processor.process_outputs([output])
        self._texts += [part for request in done.request_outputs for part in request.outputs]
        return stream.request_id in done.reqs_to_abort

    async def _travel(self, number: int, stream: Stream, here: int) -> None:
        # Its tokens may overtake the answer, and end it (a stop string) before the answer is here.
        await stream.wait(lambda: stream.accepted or stream.finished)
        status = ""
        for position, hop in enumerate(self._plan.hops[number]):
            await stream.wait(lambda: len(stream.tokens) >= hop.at or stream.finished)  # noqa: B023
            if position == 0:
                status = await self._reach(stream, here)
            if await self._move(Leg(number, here, hop.mode, status), stream):
                here = 1 - here
            if stream.finished:
                return

    async def _reach(self, stream: Stream, here: int) -> str:
        """Wait for the state in which the kind's first move is to find it, or its end; its status, if asked for."""
        match self._plan.kind.found:
            case Found.PREEMPTED:
                while not stream.finished and (await self._standing(stream, here))[0] != "preempted":  # noqa: ASYNC110
                    await asyncio.sleep(RETRY_S)
            case Found.HALF_COMPUTED:
                while not stream.tokens and not (await self._standing(stream, here))[1]:  # noqa: ASYNC110
                    await asyncio.sleep(RETRY_S)
            case Found.UNCOMPILED:
                return (await self._standing(stream, here))[0]
            case _:
                pass
        return ""

    async def _standing(self, stream: Stream, here: int) -> tuple[str, int]:
        """Its status in that instance, and the blocks it holds there."""
        census = (await self._fleet.instances[NAMES[here]].order(Verb.CENSUS)).census
        return ("", 0) if census is None else census.requests.get(stream.request_id, ("", 0))

    async def _move(self, leg: Leg, stream: Stream) -> bool:
        """Try until it is moved or has finished. True: it is at the other instance now."""
        here = leg.source
        while not stream.finished:
            num_tokens = len(stream.tokens)
            summary = await self._fleet.migrate(stream, NAMES[here], NAMES[1 - here], leg.mode)
            match summary.outcome:
                case "committed":
                    self._ran.moves.append(Moved(leg, num_tokens, summary))
                    return True
                case "refused" | "preempted" | "timed_out" | "finished_at_source" | "aborted_by_client":
                    self._ran.refusals.append(summary.reason or summary.outcome)
                case "fault":
                    self._ran.faults.append(summary.reason)
                case _:
                    raise FleetError(f"a migration ended {summary.outcome}: {summary.reason}")
            await asyncio.sleep(RETRY_S)
        return False
